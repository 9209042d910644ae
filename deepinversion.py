"""DeepInversion and Adaptive DeepInversion: Dreaming to Distill.   Hongxu Yin, Pavlo Molchanov, Zhizhong Li, Jose M. Alvarez, Arun Mallya,
Derek Hoiem, Niraj K. Jha, Jan Kautz. CVPR 2020, arXiv 1912.08795. Authors' code: github.com/NVlabs/DeepInversion, commit 2413af1.

The idea. No generator: a batch of images starts as noise, and its pixels are fitted until a frozen teacher sees the classes asked for
and until, at every BatchNorm layer, mean and variance of the batch are those that the layer remembers from real data (DI). Weak
priors keep the images smooth. Adaptive DI adds a rival: the student at rest. Images on which teacher and student already agree cost
more, so that each new batch shows what the student has not learned; batches and student training take turns.

     x (pixels) ──► jitter ──► images ─┬──► teacher ─┬─► CE(targets) ─────────────┐
         ▲                             │             ├─► BN statistics ───────────┤
         │                             │             └─► logits ─► 1 - J(T, S) ───┤   ADI: also through the student at rest
         │                             └──► TV, L2 ───────────────────────────────┤
         └────────────── gradient, through the frozen networks, into x only ◄─────┘
     x ──► pool ──► crop, flip ──► images ─┬══► teacher ══► logits ──┐
                                           └──► student ──► KL ◄─────┘ ──► gradient: student only             (══► no gradient)

Run    python deepinversion.py --dataset digits      seeds 0-4, last epoch: student 97.06 ± 0.15 %, teacher 98.89 %, 102 s a run after
                                                     the teacher's half minute, two CPU threads
                                                     (benchmarks/results/deepinversion-digits-seed*.jsonl)
       python deepinversion.py --teacher resnet34 --student resnet18     CIFAR-10, the authors' synthesis numbers, for a GPU; not run
Copy   kd_loss, one_hot_loss, bn_loss, tv_loss, tv_l1_loss, neighbour_differences, l2_loss, competition_loss,
       rolled, warm_cosine, synthesize_pool, distill
Letters   N batch, K classes, C H W image, M images in the pool.
Sources   [code] the authors' code · [issues] the authors' answers there · [paper] through others' notes · [memory] unverified ·
       [DataFree] a public re-implementation · [inferred] a reconstruction or a choice made here. No equation number stands here:
       the paper's text was not at hand.

Where paper, authors' code and this file differ
 1. The authors published the synthesis alone. The student's half is put together from [issues]: students start untrained, first
    comes a set of DI images, then a new ADI batch every 50 student steps, 1,000 batches of 256 in all, temperature 3. T² is
    [inferred]. How many batches come first nobody printed: --initial-batches, 40 on CIFAR-10, is [inferred]. An epoch makes its batch
    before its student steps [DataFree], so that the first rival is untrained; the issues speak of the opposite order.
 2. The competition takes KL in the direction opposite to the paper's, of probabilities clamped to [0.01, 0.99] that no longer sum
    to 1, and clamps the result to [0, 1] [code]. Followed. J so written can pass 1 (1.6 for two sure and different answers of 10
    classes): there the term is 0 without gradient, a hinge that says "different enough". --true-js takes the Jensen-Shannon
    divergence itself, at most ln 2, whose gradient never quite ends.
 3. The code's "best" images: CIFAR's are an alias of the tensor that the optimizer goes on moving, so that it returns the last
    iterate; ImageNet's are a copy, but of the iterate after the one whose loss was least. Here the last iterate in both;
    --keep-best returns a true copy of the iterate with the least loss.
 4. The pool is a float16 tensor, in the teacher's normalised space: finer than 8 bits, and without the clipping that files need.
    1,000 batches of CIFAR-10 are 1.6 GB, and what the run made of them is in each checkpoint.
 5. CIFAR's L2 term is one norm over the batch, ImageNet's a mean over its images [code]: --l2-per-image. TV by Frobenius norms over the
    batch [code], or by means of absolute differences (--tv-l1 [code, ImageNet], [DataFree]).
 6. The pool is augmented with the data set's crop and flip before the student sees it [DataFree].
 7. Hooks are made once and live in the synthesis alone; the authors' CIFAR script adds new ones with every batch, and counts the BN
    term as often. Frozen networks get no weight gradients, statistics come from one pass, nothing waits for `.item()`: the same
    mathematics up to rounding (benchmarks/throughput.py).
 8. The ImageNet preset is the synthesis of the authors' command line (--first-bn 10 is younger than the paper), with labels drawn at
    random where they list 42 classes twice. It is sized for --synthesize-only: their 140,000 images would be a pool of 42 GB.
 9. The paper gives the L2 term a weight of 3e-8 [memory], the README none: 0 here, as --l2.
"""
import math

import torch
import torch.nn.functional as F

from common import (BadInput, Means, Shuffled, augment, autocast, batchnorms, cosine, denormalize, frozen, newest_by_class, normalize,
                    recorded_statistics, report_collapse, set_lr, steps)
from run import Run, command_line, read_settings, save_samples, stored_stage, write_atomically


# ------------------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [issues: T = 3] [inferred: T²].   (N, K), (N, K) -> ()

    At least 0. The student should share the teacher's doubts. T² keeps the gradient's size comparable as T grows.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(teacher_logits, targets):
    """CE of the teacher's answer with the class that was asked for [code].   (N, K), (N,) -> (), at least 0

    An image counts as one of class y when the teacher takes it for one.
    """
    return F.cross_entropy(teacher_logits, targets)


def bn_loss(statistics, running, first=1.0):
    """Σ over BN layers ‖var - running_var‖₂ + ‖mean - running_mean‖₂, the first layer times `first` [code].   -> (), at least 0

    Two lists of (mean, var), (channels,) each. The running statistics are the one trace of its data that a teacher keeps besides its
    weights. Plain norms, not squared. Of a BN layer's input x:   var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    """
    norms = [torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)
             for (mean, var), (running_mean, running_var) in zip(statistics, running, strict=True)]
    return sum(norms) + (first - 1) * norms[0]


def neighbour_differences(images):
    """Right, down, and both diagonals: for both TV losses.   (N, C, H, W) -> four tensors"""
    return (images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :],
            images[..., 1:, :-1] - images[..., :-1, 1:], images[..., 1:, 1:] - images[..., :-1, :-1])


def tv_loss(images):
    """Σ over four directions of the norm of all differences in the batch [code: TV₂].   (N, C, H, W) -> (), at least 0

    Natural images are smooth. Not squared, over the whole batch: it grows with √N, and its weights are tuned for N = 256.
    """
    return sum(torch.linalg.vector_norm(difference) for difference in neighbour_differences(images))


def tv_l1_loss(images):
    """Σ over four directions of the mean absolute difference [code: TV₁, DataFree's].   (N, C, H, W) -> (), at least 0

    Smoothness again; this one does not grow with N.
    """
    return sum(difference.abs().mean() for difference in neighbour_differences(images))


def l2_loss(images, per_image=False):
    """‖x‖₂ of the whole batch [code, CIFAR], or the mean over images of theirs [code, ImageNet].   (N, C, H, W) -> (), at least 0

    Pixels should not shout.
    """
    return torch.linalg.vector_norm(images, dim=(1, 2, 3)).mean() if per_image else torch.linalg.vector_norm(images)


def competition_loss(student_logits, teacher_logits, true_js=False):
    """1 - J(student, teacher) at temperature 3, J clamped to [0, 1] [code].   (N, K), (N, K) -> (), in [0, 1]

    Images on which both agree cost most. J = ½ KL(M || S) + ½ KL(M || T), M their mean, each clamped to [0.01, 0.99] without
    renormalising: it saturates, see 2 above. `true_js`: 1 - (½ KL(S || M) + ½ KL(T || M)) without clamps, in [1 - ln 2, 1] [paper].
    """
    student_p, teacher_p = F.softmax(student_logits / 3, dim=1), F.softmax(teacher_logits / 3, dim=1)
    mean_p = (student_p + teacher_p) / 2
    if true_js:
        tiny = torch.finfo(mean_p.dtype).tiny
        log_mean = mean_p.clamp(min=tiny).log()
        divergence = sum((p * (p.clamp(min=tiny).log() - log_mean)).sum(1).mean() for p in (student_p, teacher_p)) / 2
        return 1 - divergence
    student_p, teacher_p, mean_p = (p.clamp(0.01, 0.99) for p in (student_p, teacher_p, mean_p))
    divergence = sum((mean_p * (mean_p.log() - p.log())).sum(1).mean() for p in (student_p, teacher_p)) / 2
    return 1 - divergence.clamp(0, 1)


# ------------------------------------------------------------------------------------------------ the trick: an image batch
def rolled(images, down, right):
    """All images of the batch moved by one shift, what leaves on one side comes back on the other [code]."""
    return torch.roll(images, (down, right), (2, 3))


def warm_cosine(lr, step, total):
    """Linear over 100 steps up to `lr`, then half a cosine down to 0 [code, ImageNet]."""
    return lr * (step + 1) / 100 if step < 100 else cosine(lr, step - 100, max(1, total - 100))


def synthesis_state(data, settings, device, rng):
    """What `synthesize` needs between its steps: part of the run's state, so that a kill costs a minute and not a batch."""
    n, seed = settings.synthesis_batch_size, int(torch.randint(2 ** 31, (), generator=rng, device=device))
    x = torch.zeros(n, *data.image_shape, device=device, requires_grad=True)
    return dict(
        x=x, targets=torch.zeros(n, dtype=torch.long, device=device), best=torch.zeros_like(x, requires_grad=False),
        best_loss=torch.zeros((), device=device),
        rng=rng, shifts=torch.Generator().manual_seed(seed),   # the latter on the CPU: `roll` wants numbers, and a GPU would have to wait
        image_optimizer=torch.optim.Adam([x], settings.lr_images, betas=(settings.beta1, settings.beta2)),
        synthesis_means=Means("loss_oh", "loss_bn", "loss_tv", "loss_tv_l1", "loss_l2", "loss_competition", device=device),
        made=[], synthesis_step=0, seconds_synthesis=0.0, images_synthesized=0, teacher_queries=0)      # made: the batches so far


def synthesize(state, teacher, data, settings, student=None, run=None):
    """Fit one batch of images; it ends in state["best"], state["targets"]. With a `student` it competes (ADI).

    A new batch begins where state["synthesis_step"] is 0, not with the call: a resumed run enters in the middle. The caller sets it
    back. With --low-resolution-steps, so many steps at half the side come first; each of the two stages has its own Adam and rate.
    """
    x, targets, best, best_loss, optimizer, rng = (state[name] for name in ("x", "targets", "best", "best_loss", "image_optimizer", "rng"))
    layers = batchnorms(teacher)
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    nothing = torch.zeros((), device=x.device)
    low, full = settings.low_resolution_steps, settings.synthesis_steps
    darkest, brightest = (normalize(torch.full((1, *data.image_shape), value, device=x.device), data) for value in (0.0, 1.0))

    def number(below):
        return int(torch.randint(below, (), generator=state["shifts"]))
    with frozen(teacher, *([student] if student else [])), recorded_statistics(layers) as seen:
        for step in steps(state, "synthesis", low + full, run):
            stage_step, stage_steps, side = (step, low, 2) if step < low else (step - low, full, 1)
            if step == 0:                                      # a new batch
                x.data.normal_(generator=rng)
                cycle = torch.arange(len(x), device=x.device) % data.num_classes
                drawn = torch.randint(data.num_classes, (len(x),), generator=rng, device=x.device)
                targets.copy_(cycle if settings.cycle_targets else drawn)
            if stage_step == 0:
                optimizer.state.clear()
                best_loss.fill_(math.inf)                      # losses of two resolutions do not compare
            set_lr(optimizer, warm_cosine(settings.lr_images, stage_step, stage_steps) if settings.warm_cosine else settings.lr_images)
            images = F.avg_pool2d(x, side) if side > 1 else x                             # (N, C, H, W) or (N, C, H/2, W/2)
            reach = settings.jitter // side
            images = rolled(images, number(2 * reach + 1) - reach, number(2 * reach + 1) - reach)
            if settings.mirror and number(2):
                images = images.flip(3)
            images = images.contiguous(memory_format=torch.channels_last)
            with autocast(settings, x.device):
                teacher_logits = teacher(images).float()                                  # (N, K)
                student_logits = student(images).float() if student else None
            loss_oh = one_hot_loss(teacher_logits, targets)
            fired = [place for place, layer in enumerate(layers) if layer in seen]        # not a training-time side branch
            loss_bn = bn_loss([seen[layers[place]] for place in fired], [running[place] for place in fired], settings.first_bn)
            loss_tv = tv_loss(images) if settings.tv else nothing
            loss_tv_l1 = tv_l1_loss(images) if settings.tv_l1 else nothing
            loss_l2 = l2_loss(images, settings.l2_per_image) if settings.l2 else nothing
            loss_competition = competition_loss(student_logits, teacher_logits, settings.true_js) if student else nothing
            loss = (settings.oh * loss_oh + settings.bn * loss_bn + settings.tv * loss_tv + settings.tv_l1 * loss_tv_l1
                    + settings.l2 * loss_l2 + settings.competition * loss_competition)
            if settings.keep_best:                             # as it was before this step's update, and as a copy
                better = loss.detach() < best_loss
                best.copy_(torch.where(better, x.detach(), best))
                best_loss.copy_(torch.where(better, loss.detach(), best_loss))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if settings.clip:
                x.data.copy_(x.data.clamp(darkest, brightest))
            if not settings.keep_best and step == low + full - 1:
                best.copy_(x.detach())
            state["synthesis_means"].add(loss_oh, loss_bn, loss_tv, loss_tv_l1, loss_l2, loss_competition)
            state["teacher_queries"] += len(x)


def synthesize_pool(teacher, data, settings, run=None):
    """`initial_batches` of DI images: they know the teacher alone and serve all its students. -> dict(images, targets, teacher_queries)

    images (M, C, H, W) float16, normalised, targets (M,), both on the host. Raises BadInput if the teacher has no BatchNorm.
    """
    refuse_without_batchnorm(teacher)
    device = next(teacher.parameters()).device
    state = synthesis_state(data, settings, device, torch.Generator(device).manual_seed(settings.seed))
    if run:
        run.restore(state)
    for batch in range(len(state["made"]), settings.initial_batches):
        synthesize(state, teacher, data, settings, run=run)
        keep_batch(state)
        means = state["synthesis_means"].take()
        state["synthesis_step"] = 0
        if run:
            report_collapse(run, denormalize(state["best"], data).clamp(0, 1), round=batch)
            run.report(event="bank", round=batch, **{key: means[key] for key in means if key != "loss_competition"})
    empty = torch.zeros(0, *data.image_shape, dtype=torch.float16), torch.zeros(0, dtype=torch.long)
    images, targets = (torch.cat([none, *parts]) for none, *parts in zip(empty, *state["made"]))
    return dict(images=images, targets=targets, teacher_queries=state["teacher_queries"])


def keep_batch(state):
    """The batch that was just fitted goes to the others: float16, on the host, where a checkpoint takes it from."""
    state["made"].append((state["best"].half().cpu(), state["targets"].cpu().clone()))
    state["images_synthesized"] += len(state["targets"])


def refuse_without_batchnorm(teacher):
    if not batchnorms(teacher):
        raise BadInput(f"{type(teacher).__name__} has no BatchNorm, whose statistics deepinversion lives on; dafl.py and rdskd.py "
                       "fit such a teacher")


# ------------------------------------------------------------------------------------------------------- the algorithm
def distill(teacher, student, data, settings, run=None, pool=None):
    """Train `student` in place on images made from `teacher`, which stays as it is. No real image is passed in.

    `data`: a DataSpec. `settings`: the fields of a preset and `seed`; optionally `precision`. `pool`: what `synthesize_pool` gave; made
    here, without checkpoints, if it is None. Returns the images (M, C, H, W), float16 and normalised; the student comes back in
    train mode. Raises BadInput if the teacher has no BatchNorm, FloatingPointError when a loss is not finite.
    """
    refuse_without_batchnorm(teacher)
    if not settings.initial_batches and not settings.pool_batches:
        raise BadInput("there is no image to learn from: --initial-batches and --pool-batches are both 0")
    device, size = next(teacher.parameters()).device, settings.synthesis_batch_size
    pool = pool or synthesize_pool(teacher, data, settings)
    first = len(pool["targets"])
    adaptive = min(settings.epochs, max(0, settings.pool_batches - settings.initial_batches))          # epochs that make a batch
    images_of = torch.zeros(first + adaptive * size, *data.image_shape, dtype=torch.float16, device=device)
    targets_of = torch.zeros(first + adaptive * size, dtype=torch.long, device=device)
    images_of[:first], targets_of[:first] = pool["images"], pool["targets"]
    rng = torch.Generator(device).manual_seed(settings.seed ^ 2 ** 31)         # not the initial batches' stream
    optimizer = torch.optim.SGD(student.parameters(), settings.lr_student, 0.9, weight_decay=settings.weight_decay)
    state = dict(student=student, optimizer=optimizer, batches=Shuffled(rng), student_means=Means("loss_kd", "target_acc", device=device),
                 epoch=0, distillation_step=0, seconds_distillation=0.0, student_steps=0, **synthesis_state(data, settings, device, rng))
    state.update(images_synthesized=first, teacher_queries=pool["teacher_queries"])
    if run:
        run.restore(state)

    def fill(number):
        """The pool's rows of the run's own batch `number`."""
        rows = slice(first + number * size, first + (number + 1) * size)
        images_of[rows], targets_of[rows] = state["made"][number]
    for number in range(len(state["made"])):                   # of a resumed run
        fill(number)

    for epoch in range(state["epoch"], settings.epochs):
        # -------- (1) Images: min  CE(T(x), y) + w_bn L_bn + w_tv TV + w_l2 ‖x‖ + w_c (1 - J(T(x), S(x)))
        if epoch < adaptive:
            synthesize(state, teacher, data, settings, student if settings.competition else None, run)
        if state["distillation_step"] == 0:                    # else resumed in the middle of (2): the pool has them already
            if epoch < adaptive:
                keep_batch(state)
                fill(epoch)
            state["batches"].restart()
            set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        count = first + len(state["made"]) * size

        # -------- (2) Student: min  T² KL(teacher || student)  on the whole pool
        student.train()
        with frozen(teacher):
            for _ in steps(state, "distillation", settings.student_steps, run):
                batch = state["batches"].next(count, settings.batch_size)
                images = normalize(augment(denormalize(images_of[batch].float(), data), data, rng), data)        # (N, C, H, W)
                with torch.no_grad(), autocast(settings, device):
                    teacher_logits = teacher(images).float()                              # (N, K)
                with autocast(settings, device):
                    student_logits = student(images).float()                              # (N, K)
                loss_kd = kd_loss(student_logits, teacher_logits, settings.temperature)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()
                target_acc = (teacher_logits.argmax(1) == targets_of[batch]).float().mean()
                state["student_means"].add(loss_kd, target_acc)
                state["student_steps"] += 1
                state["teacher_queries"] += len(batch)

        means, made = {**state["synthesis_means"].take(), **state["student_means"].take()}, epoch < adaptive
        state.update(epoch=epoch + 1, synthesis_step=0, distillation_step=0)
        if run:
            means = {key: value if made or key in ("loss_kd", "target_acc") else None for key, value in means.items()}
            newest = denormalize(images_of[max(0, count - 1000):count].float(), data).clamp(0, 1)
            pixel_std = report_collapse(run, newest[-size:], epoch=epoch) if made else None
            run.report(epoch=epoch, **means, pixel_std=pixel_std, samples=newest_by_class(
                (255 * newest).to(torch.uint8), targets_of[max(0, count - 1000):count], min(data.num_classes, 20)))
    return images_of[:first + len(state["made"]) * size]


# -------------------------------------------------------------------------------------- hyperparameters, command line
CIFAR10 = dict(   # synthesis: [code] README, "paper parameters"; ADI's weight 1 [DataFree]. Student: 50 steps a batch, T = 3
    # [issues]; SGD 0.1, decay 1e-4 and cosine [DataFree], where the paper has steps [memory]; 960 epochs make a batch, 40 more none
    epochs=1000, batch_size=256, student_steps=50, initial_batches=40, pool_batches=1000, synthesis_batch_size=256,
    low_resolution_steps=0, synthesis_steps=2000, lr_images=0.05, beta1=0.9, beta2=0.999, warm_cosine=False,
    oh=1.0, bn=10.0, first_bn=1.0, tv=2.5e-5, tv_l1=0.0, l2=0.0, l2_per_image=False, competition=1.0, true_js=False,
    jitter=2, mirror=False, clip=False, cycle_targets=True, keep_best=False, synthesize_only=0,
    lr_student=0.1, weight_decay=1e-4, temperature=3.0)
DATAFREE = {   # [DataFree] one batch an epoch, then 400 steps on the whole pool. There: -J, unclamped; TV before the jitter; 8-bit files
    **CIFAR10, "epochs": 200, "student_steps": 400, "initial_batches": 0, "pool_batches": 200, "synthesis_steps": 1000, "lr_images": 0.1,
    "beta1": 0.5, "beta2": 0.99, "tv": 0.0, "tv_l1": 1e-3, "jitter": 4, "mirror": True, "clip": True, "cycle_targets": False,
    "temperature": 20.0}
PRESETS = {
    "cifar10": CIFAR10,
    "cifar10-datafree": DATAFREE,
    # [inferred] a look at the method: a fiftieth of the paper's images, a quarter of its steps on each
    "cifar10-short": {**CIFAR10, "epochs": 16, "student_steps": 200, "initial_batches": 4, "pool_batches": 20, "synthesis_steps": 500},
    "cifar100": {**CIFAR10, "cycle_targets": False},                                                      # [inferred], as later papers do
    "svhn": CIFAR10,                                                          # [inferred]
    # [code] README's command, setting 0, for --synthesize-only; the student's half is no recipe of anybody's
    "imagenet": {**CIFAR10, "initial_batches": 1, "pool_batches": 2, "epochs": 2, "synthesis_batch_size": 84, "synthesis_steps": 1000,
                 "low_resolution_steps": 2000, "lr_images": 0.25, "beta1": 0.5, "beta2": 0.9, "warm_cosine": True, "bn": 0.01,
                 "first_bn": 10.0, "tv": 1e-4, "l2": 1e-5, "l2_per_image": True, "competition": 0.2, "jitter": 30, "mirror": True,
                 "clip": True, "cycle_targets": False},
    # [inferred]
    "digits": {**CIFAR10, "epochs": 8, "batch_size": 128, "student_steps": 120, "initial_batches": 3, "pool_batches": 8,
               "synthesis_batch_size": 128, "synthesis_steps": 150, "lr_images": 0.3, "bn": 0.3, "tv": 0.01, "jitter": 1, "clip": True,
               "weight_decay": 5e-4},
}
FLAGS = {
    "student_steps": "student steps an epoch",
    "initial_batches": "DI batches made before the student's first step, kept by seed and reused; 0 = none",
    "pool_batches": "batches in all, one more every epoch until they are there; 0 = none but the initial ones",
    "synthesis_batch_size": "images a batch",
    "low_resolution_steps": "steps at half the side before the others; 0 = none",
    "synthesis_steps": "steps on the pixels a batch",
    "lr_images": "Adam",
    "beta1": "Adam's, on the pixels",
    "beta2": "Adam's, on the pixels",
    "warm_cosine": "rate on the pixels: up over 100 steps, then a cosine to 0",
    "oh": "weight of the teacher's CE with the asked-for class",
    "bn": "weight of the BN statistics' distance, α_f",
    "first_bn": "factor of the first BN layer in it",
    "tv": "weight of the total variation by norms, α_tv",
    "tv_l1": "weight of the total variation by mean absolute differences",
    "l2": "weight of the images' norm, α_l2",
    "l2_per_image": "the mean norm of an image instead of the batch's norm",
    "competition": "weight of 1 - J(teacher, student), α_c; 0 = DI",
    "true_js": "the Jensen-Shannon divergence in it instead of the code's clamped form",
    "jitter": "pixels by which a batch is rolled at most, up, down, left and right; 0 = none",
    "mirror": "flip the whole batch, at each step with probability 1/2",
    "clip": "keep pixels in [0, 1]",
    "cycle_targets": "classes 0, 1, 2 ... in turn instead of at random",
    "keep_best": "keep the iterate with the least loss instead of the last one",
    "synthesize_only": "make so many images, keep them in images.pt in the run folder, and stop; 0 = train a student",
    "lr_student": "SGD, momentum 0.9, cosine over the epochs to 0",
    "weight_decay": "of the student",
    "temperature": "of the student's KL",
}
TEXT_FLAGS = {"pool": "the initial batches' file [checkpoints/TEACHER.deepinversion-seedN.pt]"}
POOL_SETTINGS = ("seed", "initial_batches", "synthesis_batch_size", "low_resolution_steps", "synthesis_steps", "lr_images", "beta1",
                 "beta2", "warm_cosine", "oh", "bn", "first_bn", "tv", "tv_l1", "l2", "l2_per_image", "jitter", "mirror", "clip",
                 "cycle_targets", "keep_best", "precision")


def stored_pool(run, settings):
    """The initial DI batches of this teacher and seed: read from their file, or made now and kept there."""
    path = settings.pool or f"checkpoints/{run.teacher.name}.deepinversion-seed{settings.seed}.pt"
    return stored_stage(run, settings, "image pool", path, POOL_SETTINGS,
                        lambda progress: synthesize_pool(run.teacher.model, run.data, settings, progress))


def synthesize_only(run, settings):
    """The first `--synthesize-only` DI images, in images.pt and samples.png of the run folder."""
    made = synthesize_pool(run.teacher.model, run.data, settings, run)
    images, targets = (made[name][:settings.synthesize_only].clone() for name in ("images", "targets"))
    pixels = (255 * denormalize(images.float(), run.data).clamp(0, 1)).to(torch.uint8)
    there = targets.unique().tolist()[:20]
    save_samples(run.folder / "samples.png", newest_by_class(pixels, targets, run.data.num_classes)[there], there)
    content = dict(images=images, targets=targets, pixels=pixels, data=run.data._asdict(), teacher_sha256=run.teacher.sha256)
    write_atomically(run.folder / "images.pt", lambda file: torch.save(content, file))
    run.finish(f"{len(images)} images in {run.folder / 'images.pt'}")


@command_line
def main(argv=None):
    settings = read_settings(argv, "deepinversion", __doc__, PRESETS, FLAGS, TEXT_FLAGS)
    if max(settings.beta1, settings.beta2) >= 1:
        raise BadInput(f"--beta1 and --beta2 must be under 1, not {max(settings.beta1, settings.beta2):g}")
    if settings.synthesize_only:
        settings.initial_batches = math.ceil(settings.synthesize_only / settings.synthesis_batch_size)
    run = Run("deepinversion", settings, scored=not settings.synthesize_only)
    refuse_without_batchnorm(run.teacher.model)
    if settings.synthesize_only:
        synthesize_only(run, settings)
    else:
        distill(run.teacher.model, run.student, run.data, settings, run, stored_pool(run, settings))
        run.finish()


if __name__ == "__main__":
    main()
