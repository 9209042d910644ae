"""DeepInversion and Adaptive DeepInversion: Dreaming to Distill.   Hongxu Yin, Pavlo Molchanov, Zhizhong Li,
Jose M. Alvarez, Arun Mallya, Derek Hoiem, Niraj K. Jha, Jan Kautz. CVPR 2020, arXiv 1912.08795.
Authors' code: github.com/NVlabs/DeepInversion, commit 2413af1.

The idea. There is no generator. A batch of images starts as noise, and its pixels are fitted until a
frozen teacher sees the classes asked for and until, at every BatchNorm layer, mean and variance of the
batch are those that the layer remembers from real data (DI). Weak priors keep the images smooth. Adaptive
DI (ADI) adds a rival, the student as it is: images on which teacher and student agree already cost more,
so each new batch shows what the student has not learned. Making a batch and training the student take
turns.

     x (pixels) ──► jitter ──► images ─┬──► teacher ─┬─► CE(targets) ─────────────┐
         ▲                             │             ├─► BN statistics ───────────┤
         │                             │             └─► logits ─► 1 - J(T, S) ───┤   ADI: also through S
         │                             └──► TV, L2 ───────────────────────────────┤
         └────────────── gradient, through the frozen networks, into x only ◄─────┘
     x ──► pool ──► crop, flip ──► images ─┬══► teacher ══► logits ──┐
                                           └──► student ──► KL ◄─────┘ ──► student only      (══► no gradient)

Run     python deepinversion.py --dataset digits      (benchmarks/results/deepinversion-digits.jsonl)
                seeds 0-4, last epoch: student 97.06 ± 1.17 %, teacher 98.89 %
        python deepinversion.py --teacher resnet34 --student resnet18     CIFAR-10, not run
Copy    kd_loss, one_hot_loss, bn_loss, tv_loss, tv_l1_loss, neighbour_differences, l2_loss,
        competition_loss, warm_cosine, synthesize, synthesize_pool, distill
Letters T teacher, S student · x the pixels that are fitted, in normalised space · J their Jensen-Shannon
        divergence, M in it the mean prediction · N batch, K classes, C H W image; M images in the pool.
Words   The pool holds all images. --initial-batches DI batches come first. An epoch makes one ADI batch
        more, while there are fewer than --pool-batches, and then takes --student-steps steps on the whole
        pool.
Sources [code] the authors' code · [issues] the authors' answers there · [paper] through others' notes ·
        [memory] unverified · [DataFree] a public re-implementation · [inferred] a reconstruction or a
        choice made here. The paper's text was not at hand: no equation number stands here.

Where paper, authors' code and this file differ
 1. The authors published the synthesis alone. The student's half is put together from [issues]: students
    start untrained, a set of DI images comes first, then a new ADI batch every 50 student steps [paper,
    quoted there], 1,000 batches of 256 in all, temperature 3 (T² [inferred]). Not documented: how many
    come first (40 on CIFAR-10 [inferred]) and the order in an epoch (the batch first, as in [DataFree]).
 2. The competition term takes KL in the direction opposite to the paper's, of probabilities clamped to
    [0.01, 0.99] that no longer sum to 1, and clamps the batch's mean to [0, 1] [code]. Followed. J so
    written can pass 1 (1.6 for two certain and different answers of 10 classes); there the term is 0
    without gradient: different enough. --true-js takes the Jensen-Shannon divergence itself, at most ln
    2, whose gradient never quite ends.
 3. The code's "best" images: CIFAR's are an alias of the tensor that the optimizer goes on moving, so it
    returns the last iterate; ImageNet's are a copy, but of the iterate after the one with the least loss.
    Here the last iterate; --keep-best copies the one with the least loss.
 4. The pool is a float16 tensor in the teacher's normalised space: finer than 8 bits and without
    clipping. 1,000 batches of CIFAR-10 are 1.6 GB, and each checkpoint holds them.
 5. CIFAR's L2 term is one norm over the batch, ImageNet's a mean over its images [code]: --l2-per-image.
    TV by Frobenius norms over the batch [code], or --tv-l1: the mean of absolute differences [code,
    ImageNet; DataFree].
 6. The pool is augmented with the data set's crop and flip before the student sees it [DataFree].
 7. Hooks live in the synthesis alone. The authors' CIFAR script adds new ones with every batch and never
    removes them: batch n computes the statistics n times. Frozen networks get no weight gradients,
    nothing waits for `.item()`: the same mathematics up to rounding.
 8. The ImageNet preset is the synthesis of the authors' command line (--first-bn 10 is younger than the
    paper; their setting of 20,000 steps without clipping is nearer to it [code]), with random classes
    for their 42, each twice. Sized for --synthesize-only: a pool of their 140,000 images would take 42 GB.
 9. L2's weight is 3e-8 in the paper [memory], 0 in the README and here. BN's is 10 in the README,
    followed here with its rate of 0.05; the CIFAR script's own defaults are 100 and 0.1 [code].
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common import (BadInput, Means, Run, augment, batches, batchnorms, command_line, cosine, dataset_spec,
                    denormalize, frozen, load_networks, normalize, parse, recorded_statistics, set_lr, steps,
                    with_own_seed, write)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """CIFAR-10. Synthesis: README, "paper parameters" [code]. Student: 50 steps a batch, T = 3 [issues].

    ADI's weight 1, SGD 0.1, decay 1e-4 and cosine are [DataFree], where the paper has steps [memory]. Of
    1,000 epochs 960 make a batch.
    """
    epochs: int = 1000                 # one new batch each until the pool is full, then --student-steps steps
    student_steps: int = 50             # student steps an epoch
    batch_size: int = 256               # the student's
    initial_batches: int = 40          # DI batches before the student's first step, kept and reused; 0 = none
    pool_batches: int = 1000            # batches in all; 0 = none but the initial ones
    synthesis_batch_size: int = 256     # images a batch
    low_resolution_steps: int = 0       # steps at half the side before the others; 0 = none
    synthesis_steps: int = 2000         # steps on the pixels a batch
    lr_images: float = 0.05             # Adam, on the pixels
    beta1: float = 0.9                  # Adam's, on the pixels
    beta2: float = 0.999                # Adam's, on the pixels
    warm_cosine: bool = False           # rate on the pixels: up over 100 steps, then a cosine to 0
    oh: float = 1.0                     # weight of one_hot_loss
    bn: float = 10.0                    # weight of bn_loss, α_f
    first_bn: float = 1.0               # factor of the first BN layer in it
    tv: float = 2.5e-5                  # weight of tv_loss, α_tv
    tv_l1: float = 0.0                  # weight of tv_l1_loss
    l2: float = 0.0                     # weight of l2_loss, α_l2
    l2_per_image: bool = False          # the mean norm of an image instead of the batch's norm
    competition: float = 1.0            # weight of competition_loss, α_c; 0 = DI
    true_js: bool = False             # the Jensen-Shannon divergence in it instead of the code's clamped form
    jitter: int = 2                    # pixels by which a batch is rolled at most in each direction; 0 = none
    mirror: bool = False                # flip the whole batch with probability 1/2 at each step
    clip: bool = False                  # keep pixels in [0, 1]
    cycle_targets: bool = True          # classes 0, 1, 2 ... in turn instead of at random
    keep_best: bool = False             # keep the iterate with the least loss instead of the last one
    lr_student: float = 0.1             # SGD, momentum 0.9, cosine over the epochs to 0
    weight_decay: float = 1e-4          # of the student
    temperature: float = 3.0            # of the student's KL
    seed: int = 0                       # of student, noise, jitter and classes


CIFAR10 = Settings()
PRESETS = {
    "cifar10": CIFAR10,
    # [DataFree] one batch an epoch, then 400 steps. There: -J, unclamped; TV before the jitter; 8-bit files
    "cifar10-datafree": replace(
        CIFAR10, epochs=200, student_steps=400, initial_batches=0, pool_batches=200, synthesis_steps=1000,
        lr_images=0.1, beta1=0.5, beta2=0.99, tv=0.0, tv_l1=1e-3, jitter=4, mirror=True, clip=True,
        cycle_targets=False, temperature=20.0),
    # [inferred] for a first look: a fiftieth of the paper's images, a quarter of its steps on each
    "cifar10-short": replace(CIFAR10, epochs=16, student_steps=200, initial_batches=4, pool_batches=20,
                             synthesis_steps=500),
    "cifar100": replace(CIFAR10, cycle_targets=False),                       # [inferred], as later papers do
    "svhn": CIFAR10,                                                         # [inferred]
    # README's command, setting 0 [code], for --synthesize-only; the student's half is nobody's recipe
    "imagenet": replace(
        CIFAR10, initial_batches=1, pool_batches=2, epochs=2, synthesis_batch_size=84, synthesis_steps=1000,
        low_resolution_steps=2000, lr_images=0.25, beta1=0.5, beta2=0.9, warm_cosine=True, bn=0.01,
        first_bn=10.0, tv=1e-4, l2=1e-5, l2_per_image=True, competition=0.2, jitter=30, mirror=True,
        clip=True, cycle_targets=False),
    # [inferred] for the race in benchmarks/: 40 minutes of two cores, without competition
    "cifar10-cpu": replace(CIFAR10, epochs=11, student_steps=300, batch_size=128, initial_batches=20,
                           pool_batches=0, synthesis_steps=50, lr_images=0.1, beta1=0.5, tv=3e-3, clip=True,
                           mirror=True, temperature=20.0),
    # [inferred]: 7 trials by test accuracy, the last among two dozen kinds of images, judged by a stranger
    "digits": replace(CIFAR10, epochs=8, batch_size=128, student_steps=120, initial_batches=3, pool_batches=8,
                      synthesis_batch_size=128, synthesis_steps=150, lr_images=0.3, bn=0.3, tv=0.01, jitter=1,
                      clip=True, weight_decay=5e-4),
}


# ---------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [issues: T = 3] [inferred: T²].

    (N, K), (N, K) -> (), at least 0. The student should give the teacher's probabilities. T² keeps the
    gradient's size as T grows.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(teacher_logits, targets):
    """CE of the teacher's answer with the class that was asked for [code].

    (N, K), (N,) -> (), at least 0.
    The teacher should put each image into the class that was asked for.
    """
    return F.cross_entropy(teacher_logits, targets)


def bn_loss(statistics, running, first=1.0):
    """Σ over BN layers ‖var - running_var‖₂ + ‖mean - running_mean‖₂, the first layer times `first` [code].

    -> (), at least 0.
    Two lists of (mean, var), (channels,) each: of a layer's input x, and what the layer remembers from
    real data. Plain norms, not squared. Of x:   var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    """
    norms = [torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)
             for (mean, var), (running_mean, running_var) in zip(statistics, running, strict=True)]
    return sum(norms) + (first - 1) * norms[0]


def neighbour_differences(images):
    """Right, down, and both diagonals: for both TV losses.   (N, C, H, W) -> four tensors"""
    return (images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :],
            images[..., 1:, :-1] - images[..., :-1, 1:], images[..., 1:, 1:] - images[..., :-1, :-1])


def tv_loss(images):
    """Σ over four directions of the norm of all differences in the batch [code: TV₂].

    (N, C, H, W) -> (), at least 0. Natural images are smooth. Not squared, over the whole batch: it grows
    with √N; CIFAR's weight is tuned for N = 256.
    """
    return sum(torch.linalg.vector_norm(difference) for difference in neighbour_differences(images))


def tv_l1_loss(images):
    """Σ over four directions of the mean absolute difference [code: TV₁, DataFree's].

    (N, C, H, W) -> (), at least 0.
    Smoothness again; this one does not grow with N.
    """
    return sum(difference.abs().mean() for difference in neighbour_differences(images))


def l2_loss(images, per_image=False):
    """‖x‖₂ of the whole batch [code, CIFAR], or the mean over its images [code, ImageNet].

    (N, C, H, W) -> (), at least 0.
    Penalises large pixel values.
    """
    if per_image:
        return torch.linalg.vector_norm(images, dim=(1, 2, 3)).mean()
    return torch.linalg.vector_norm(images)


def competition_loss(student_logits, teacher_logits, true_js=False, temperature=3.0):
    """1 - J(student, teacher), J the batch's mean clamped to [0, 1] [code: T = 3].

    (N, K), (N, K) -> (), in [0, 1]. Images on which both agree cost most. J = ½ KL(M || S) + ½ KL(M ||
    T), M their mean, each clamped to [0.01, 0.99] without renormalising: it saturates, see 2 above.
    `true_js`: 1 - (½ KL(S || M) + ½ KL(T || M)) without clamps, in [1 - ln 2, 1] [paper].
    """
    student_p = F.softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    mean_p = (student_p + teacher_p) / 2
    if true_js:
        tiny = torch.finfo(mean_p.dtype).tiny
        log_mean = mean_p.clamp(min=tiny).log()
        kl = [(p * (p.clamp(min=tiny).log() - log_mean)).sum(1).mean() for p in (student_p, teacher_p)]
        return 1 - sum(kl) / 2
    student_p, teacher_p, mean_p = (p.clamp(0.01, 0.99) for p in (student_p, teacher_p, mean_p))
    divergence = sum((mean_p * (mean_p.log() - p.log())).sum(1).mean() for p in (student_p, teacher_p)) / 2
    return 1 - divergence.clamp(0, 1)


# ---------------------------------------------------------------------------------- the trick: an image batch
def warm_cosine(lr, step, total):
    """Linear over 100 steps up to `lr`, then half a cosine down to 0 [code, ImageNet]."""
    return lr * (step + 1) / 100 if step < 100 else cosine(lr, step - 100, max(1, total - 100))


def random_int(below):
    return int(torch.randint(below, ()))       # on the CPU: roll needs numbers; reading a GPU's would wait


def synthesize(teacher, data, settings, student=None):
    """Fit one batch of images, from noise.

    -> images (N, C, H, W), normalised, targets (N,), mean losses.
    With a `student` it competes (ADI). With --low-resolution-steps, so many steps at half the side come
    first; each of the two resolutions has its own Adam and rate.
    """
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    x = torch.randn(n, *data.image_shape, device=device, requires_grad=True)
    targets = (torch.arange(n, device=device) % data.num_classes if settings.cycle_targets else
               torch.randint(data.num_classes, (n,), device=device))
    black = torch.zeros(1, *data.image_shape, device=device)
    darkest, brightest = normalize(black, data), normalize(black + 1, data)
    layers, means = batchnorms(teacher, data), Means()
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    with frozen(teacher, *([student] if student else [])), recorded_statistics(layers) as statistics:
        for total, shrink in ((settings.low_resolution_steps, 2), (settings.synthesis_steps, 1)):
            optimizer = torch.optim.Adam([x], settings.lr_images, betas=(settings.beta1, settings.beta2))
            best_x, best_loss = x.detach(), torch.tensor(math.inf, device=device)
            for step in steps(total, "synthesis"):
                if settings.warm_cosine:
                    set_lr(optimizer, warm_cosine(settings.lr_images, step, total))
                images = F.avg_pool2d(x, shrink) if shrink > 1 else x      # (N, C, H, W) or (N, C, H/2, W/2)
                reach = settings.jitter // shrink
                down, right = random_int(2 * reach + 1) - reach, random_int(2 * reach + 1) - reach
                images = torch.roll(images, (down, right), (2, 3))        # what leaves on one side comes back
                if settings.mirror and random_int(2):
                    images = images.flip(3)
                images = images.contiguous(memory_format=torch.channels_last)
                teacher_logits = teacher(images)                             # (N, K)
                loss_oh = one_hot_loss(teacher_logits, targets)
                loss_bn = bn_loss([statistics[layer] for layer in layers], running, settings.first_bn)
                loss_tv = tv_loss(images) if settings.tv else 0.0
                loss_tv_l1 = tv_l1_loss(images) if settings.tv_l1 else 0.0
                loss_l2 = l2_loss(images, settings.l2_per_image) if settings.l2 else 0.0
                loss_competition = 0.0
                if student:
                    loss_competition = competition_loss(student(images), teacher_logits, settings.true_js)
                loss = (settings.oh * loss_oh + settings.bn * loss_bn + settings.tv * loss_tv
                        + settings.tv_l1 * loss_tv_l1 + settings.l2 * loss_l2
                        + settings.competition * loss_competition)
                if settings.keep_best:                    # as it was before this step's update, and as a copy
                    better = loss.detach() < best_loss
                    best_x = torch.where(better, x.detach(), best_x)
                    best_loss = torch.where(better, loss.detach(), best_loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if settings.clip:
                    x.data.copy_(x.data.clamp(darkest, brightest))
                means.add(loss_oh=loss_oh, loss_bn=loss_bn, loss_tv=loss_tv, loss_tv_l1=loss_tv_l1,
                          loss_l2=loss_l2, loss_competition=loss_competition)
    return best_x if settings.keep_best else x.detach(), targets, means.take()


@with_own_seed
def synthesize_pool(teacher, data, settings, run=None):
    """DI batches from the teacher alone, for every student of it.

    -> images (P, C, H, W) float16, targets (P,)
    `run`: log and checkpoints, for main() alone. Raises BadInput if the teacher has no BatchNorm.
    """
    refuse_without_batchnorm(teacher, data)
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    images = torch.zeros(settings.initial_batches * n, *data.image_shape, dtype=torch.float16, device=device)
    targets = torch.zeros(len(images), dtype=torch.long, device=device)
    start = run.resume(images=images, targets=targets) if run else 0
    for batch in range(start, settings.initial_batches):
        made, made_targets, losses = synthesize(teacher, data, settings)
        rows = slice(batch * n, (batch + 1) * n)
        images[rows], targets[rows] = made.half(), made_targets
        if run:
            run.log(batch, losses, denormalize(made, data).clamp(0, 1), made_targets)
    return images, targets


def refuse_without_batchnorm(teacher, data):
    if not batchnorms(teacher, data):
        raise BadInput(f"{type(teacher).__name__} has no BatchNorm, whose statistics deepinversion needs; "
                       "dafl.py and rdskd.py fit such a teacher")


# --------------------------------------------------------------------------------------------- the algorithm
@with_own_seed
def distill(teacher, student, data, settings, run=None, pool=None):
    """Train `student` in place on images made from `teacher`, which stays as it is. No real image comes in.

    `data`: a DataSpec. `pool`: what `synthesize_pool` returned; made here if it is None. `run`: log and
    checkpoints, for main() alone. Returns all images (P, C, H, W), float16 and normalised, and their
    targets (M,). Raises BadInput if the teacher has no BatchNorm, FloatingPointError when a loss is not
    finite.
    """
    refuse_without_batchnorm(teacher, data)
    if not settings.initial_batches and not settings.pool_batches:
        raise BadInput("there is no image to learn from: --initial-batches and --pool-batches are both 0")
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    pool = pool or synthesize_pool(teacher, data, settings)
    first_images, first_targets = (part.to(device) for part in pool)
    torch.manual_seed(settings.seed ^ 2 ** 31)                # the same, whether the pool was made now or not
    # so many epochs make a batch, the others only train
    adaptive = min(settings.epochs, max(0, settings.pool_batches - settings.initial_batches))
    pool_images = torch.cat([first_images, first_images.new_zeros(adaptive * n, *data.image_shape)])
    pool_targets = torch.cat([first_targets, first_targets.new_zeros(adaptive * n)])
    optimizer = torch.optim.SGD(student.parameters(), settings.lr_student, 0.9,
                                weight_decay=settings.weight_decay)
    start = run.resume(student=student, optimizer=optimizer, images=pool_images,
                       targets=pool_targets) if run else 0

    for epoch in range(start, settings.epochs):
        # -------- (1) Images: min  CE(T(x), y) + α_f L_bn + α_tv TV + α_l2 ‖x‖ + α_c (1 - J(T(x), S(x)))
        end = len(first_targets) + min(epoch + 1, adaptive) * n                # of what the pool holds by now
        losses = {}
        if epoch < adaptive:
            rival = student if settings.competition else None
            made, targets, losses = synthesize(teacher, data, settings, rival)
            pool_images[end - n:end], pool_targets[end - n:end] = made.half(), targets

        # -------- (2) Student: min  T² KL(teacher || student)  on the whole pool
        set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        means = Means()
        student.train()
        order = batches(end, settings.batch_size, device)
        with frozen(teacher):
            for batch in steps(settings.student_steps, "distillation", order):
                pixels = augment(denormalize(pool_images[batch].float(), data), data)
                images = normalize(pixels, data)                             # (N, C, H, W)
                with torch.no_grad():
                    teacher_logits = teacher(images)                         # (N, K)
                loss_kd = kd_loss(student(images), teacher_logits, settings.temperature)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()
                hits = teacher_logits.argmax(1) == pool_targets[batch]
                means.add(loss_kd=loss_kd, target_acc=hits.float().mean())
        losses |= means.take()                                               # stops if one is not finite
        if run:                                                           # with the newest batch, to be shown
            newest = slice(max(0, end - n), end)
            pixels = denormalize(pool_images[newest].float(), data).clamp(0, 1)
            run.log(epoch, losses, pixels, pool_targets[newest])
    return pool_images, pool_targets


# the settings that shape the initial batches: a file made with others is refused
OF_POOL = ("seed", "initial_batches", "synthesis_batch_size", "low_resolution_steps", "synthesis_steps",
           "lr_images", "beta1", "beta2", "warm_cosine", "oh", "bn", "first_bn", "tv", "tv_l1", "l2",
           "l2_per_image", "jitter", "mirror", "clip", "cycle_targets", "keep_best")


@command_line
def main(argv=None):
    options, settings = parse(
        "deepinversion", __doc__, Settings, PRESETS, argv,
        pool="the initial batches' file [checkpoints/TEACHER.deepinversion-seedN.pt]",
        synthesize_only=("make so many DI images, keep them in images.pt of the run folder, stop [0]", int))
    if max(settings.beta1, settings.beta2) >= 1:
        raise BadInput(f"--beta1 and --beta2 must be under 1, not {max(settings.beta1, settings.beta2):g}")
    if options.synthesize_only:
        number = math.ceil(options.synthesize_only / settings.synthesis_batch_size)
        settings = replace(settings, initial_batches=number)
    data = dataset_spec(options)
    teacher, student = load_networks(options, settings, data, lambda net: refuse_without_batchnorm(net, data))
    run = Run(options, settings, teacher, student, data, scored=not options.synthesize_only)
    if options.synthesize_only:
        made = synthesize_pool(teacher, data, settings, run)
        images, targets = (part[:options.synthesize_only].clone() for part in made)
        pixels = (255 * denormalize(images.float(), data).clamp(0, 1)).to(torch.uint8)
        write(dict(images=images, targets=targets, pixels=pixels, data=data._asdict(),
                   teacher_sha256=run.identity["teacher"]), run.folder / "images.pt")
        run.finish(f"{len(images)} images in {run.folder / 'images.pt'}")
        return
    path = options.pool or f"checkpoints/{options.teacher_name}.deepinversion-seed{settings.seed}.pt"
    pool = run.cached("pool", path, OF_POOL, lambda stage: synthesize_pool(teacher, data, settings, stage))
    distill(teacher, student, data, settings, run, pool)
    run.finish()


if __name__ == "__main__":
    main()
