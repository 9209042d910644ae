"""CuDFKD: Dynamic Data-Free Knowledge Distillation by Easy-to-Hard Learning Strategy.   Jingru Li, Sheng Zhou, Liangcheng Li,
Haishuai Wang, Zhi Yu, Jiajun Bu. Inf. Sci. 2023, arXiv 2208.13648. Authors' code: github.com/ljrprocc/DataFree, commit bf3096b.

The idea. One generator, trained all along, makes images of which the teacher is sure, whose BatchNorm statistics look real and that
spread over the classes. Easy to hard, twice. The generator: a term that asks for images on which student and teacher agree
in class but differ in confidence weighs nothing or little at first, and more later. The student: an image on which it is far
off counts for less (self-paced learning), and how far is "far", the age of the curriculum, grows with every step.

     z ──► G ──► pixels ──► normalize ──┬──► teacher ──┬─► sure of a class · all classes · BN statistics ──┐
           ▲                            │              └─► logits ─┐                                      │
           │                            └──► student at rest ─► logits ─► - α KL where both agree ─────────┤
           └──────── gradient, through the frozen networks, into G only: 1 step ◄──────────────────────────┘
     z ══► G at rest ══► images ─┬══► teacher ══► logits ──┐
                                 └──► student ──► ℓ of each image ──► mean v(ℓ; λ) ℓ ──► student only: 10 steps  (══► no gradient)

Run    python cudfkd.py --dataset digits      seeds 0-4, last epoch: student 96.33 ± 0.63 %, teacher 98.89 %, 82 s a run after the
                                              teacher's half minute, two CPU threads (benchmarks/results/cudfkd-digits-seed*.jsonl)
       python cudfkd.py --teacher resnet34 --student resnet18      CIFAR-10, the authors' settings, for a GPU; not run, no number here
Copy   kd_losses, l1_losses, curriculum_weights, curriculum_regularizer, curriculum_loss, one_hot_loss, information_entropy_loss, bn_loss,
       adversarial_loss, adversarial_weight, Generator, images_and_answers, check, quantiles, distill
Letters   N batch, K classes, C H W image, L latent, M images in a round · ℓ loss of an image, v its weight, λ the age, α the
       adversarial weight.
Sources   [code] the authors' code · [authors] their README and notebooks · [inferred] a reconstruction or a choice made here. No
       equation number stands here: the paper's text was not at hand.

Where paper, authors' code and this file differ
 1. What v weighs. In the code of 2022-05 to 2022-08, and in its last state, ℓ is one number a batch, and v scales the whole
    step; from 2022-09 to 2022-12 it is one an image. Only the latter chooses between images, which is the method's idea, and
    their difficulty figure is drawn by image [authors]; yet the CIFAR-10 numbers of the README are older than it. --granularity
    sample is the default, with the mean of v ℓ over the batch; --granularity batch where the README's numbers are the aim.
 2. The code's `none` switches off the curriculum of the student and the rise of α together, so that the published ablation cannot
    tell them apart. Here --curriculum none and --no-ramp are two switches. --no-ramp holds α at --adversarial-start.
 3. The regularizer f(v; λ), of which v is the minimum, has no gradient: v is a constant in the student's step. One version of the
    code adds its value to the printed loss. Here it explains v, and no more.
 4. Entropy is taken at the distillation's temperature in the code, 20 on CIFAR-10, where it is nearly ln K whatever the generator
    does. The presets follow; here it is a flag of its own, --entropy-temperature. The adversarial term always has temperature
    3 [code].
 5. Schedules. The code adds g to α after every epoch between two marks, and a fixed number to λ after every student step. The
    presets hold start and end, as they come out over the authors' epochs, so that --epochs keeps the curve; a run of one or two epochs
    is too short for α to rise.
 6. The ten batches of a round are made in one pass of generator and teacher, which are at rest: the same mathematics, as both
    normalise by running statistics. BN statistics are taken in the generator's step only. In the code every teacher pass takes
    them, weights that are at rest get gradients, and each step waits for two accuracies, where a round waits twice here
    (benchmarks/throughput.py).
 7. No augmentation of generated images, no memory of them [code]. The code's activation term has weight 0 in every script and its
    Jensen-Shannon variant of the adversarial term is in none; its squared loss sums over elements. All left out.
 8. Authors: the best epoch on the test set. Here: the last one (the best is printed in brackets).
 9. A teacher without BatchNorm, as LeNet-5: the BN term is off, and the log says so [inferred].
10. Tiny-ImageNet: on the authors' two GPUs the generator's batch is 128 and the student's 64 a GPU where the script says 512, and
    their student keeps ImageNet's stem. Both 128 here, with the networks of common.py.
11. SVHN: the numbers are those of the authors' next paper, for WRN-40-2 to WRN-40-1, whose code weighs by batch and has no agreement
    mask in the adversarial term. The numbers alone are taken.
12. Beside accuracy the authors measure agreement, as the log does, and a loyalty that their code computes as 1 - JSD^¼ where its usual
    definition has a square root. It is not computed here.
"""
import importlib.util
import io
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (BadInput, Means, autocast, batchnorms, cosine, denormalize, frozen, newest_by_class, normalize, recorded_statistics,
                    report_collapse, seeded, set_lr, steps)
from run import Run, command_line, read_settings, write_atomically


# ----------------------------------------------------------------------------- the student's losses, and the curriculum on them
def kd_losses(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, of each image [code].   (N, K), (N, K) -> (N,), at least 0

    The student should share the teacher's doubts. Its mean is the usual distillation loss.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="none").sum(1)


def l1_losses(student_logits, teacher_logits):
    """Mean over classes of |student - teacher|, on raw logits, of each image [code].   (N, K), (N, K) -> (N,), at least 0

    Sees what a softmax hides, a shift of all logits; bounded gradients.
    """
    return (student_logits - teacher_logits).abs().mean(1)


def curriculum_weights(losses, age, curriculum="log"):
    """v(ℓ; λ), the v that makes v ℓ + f(v; λ) least [code].   losses of any shape, at least 0; age above 0 -> same shape, in [0, 1]

    hard   1 where ℓ < λ, else 0
    soft   1 - ℓ/λ, at least 0
    log    (1 + e^-λ) / (1 + e^(ℓ-λ)): 1 at ℓ = 0, about ½ at ℓ = λ, above 0
    none   1
    What is too hard for now counts less. As λ grows, all weights go to 1. Raises ValueError for another word.
    """
    if curriculum == "hard":
        return (losses < age).to(losses.dtype)
    if curriculum == "soft":
        return (1 - losses / age).clamp(min=0)
    if curriculum == "log":
        return (1 + math.exp(-age)) * torch.sigmoid(age - losses)              # the same, without an infinity in between
    if curriculum == "none":
        return torch.ones_like(losses)
    raise ValueError(f"curriculum must be hard, soft, log or none, not {curriculum!r}")


def curriculum_regularizer(weights, age, curriculum="log"):
    """f(v; λ), element by element [code].   weights in [0, 1] -> the same shape

    hard   -λ v
    soft   λ (v²/2 - v)
    log    μ ln μ + v ln v - λ v,   μ = 1 + e^-λ - v
    Rewards large weights, more so as λ grows. No gradient comes from it, see 3 above.
    """
    if curriculum == "hard":
        return -age * weights
    if curriculum == "soft":
        return age * (weights ** 2 / 2 - weights)
    if curriculum == "log":
        other = (1 + math.exp(-age) - weights).clamp(min=0)                    # v may be 1 and a rounding error
        return torch.xlogy(other, other) + torch.xlogy(weights, weights) - age * weights
    return torch.zeros_like(weights)


def curriculum_loss(losses, age, curriculum="log", granularity="sample"):
    """mean of v(ℓ; λ) ℓ over images, or v(ℓ̄; λ) ℓ̄ of the mean loss of the batch [code, both].   (N,) -> (), at least 0

    v is a constant here: descending v ∇ℓ descends min over v of v ℓ + f(v; λ), whose derivative by ℓ is v. Raises ValueError for
    another granularity than sample and batch.
    """
    if granularity not in ("sample", "batch"):
        raise ValueError(f"granularity must be sample or batch, not {granularity!r}")
    losses = losses.mean() if granularity == "batch" else losses
    return (curriculum_weights(losses.detach(), age, curriculum) * losses).mean()


# -------------------------------------------------------------------------- the generator's losses: tensors in, scalar out
def one_hot_loss(teacher_logits):
    """CE of the teacher's answer with its own first choice, mean over the batch [code].   (N, K) -> (), in [0, ln K]

    The teacher is sure of real images, so an image of which it is sure may pass for one, whatever its class.
    """
    return F.cross_entropy(teacher_logits, teacher_logits.argmax(1))


def information_entropy_loss(teacher_logits, temperature=1.0):
    """Σ_k p̄_k ln p̄_k, p̄ the batch's mean prediction at a temperature [code].   (N, K) -> (), in [-ln K, 0]

    Minus the entropy: least when a batch holds every class equally often, 0 when it holds one.
    """
    log_p = F.log_softmax(teacher_logits / temperature, dim=1).logsumexp(0) - math.log(len(teacher_logits))        # (N, K) -> (K,)
    return (log_p.exp() * log_p).sum()


def bn_loss(statistics, running):
    """Σ over BN layers ‖var - running_var‖₂ + ‖mean - running_mean‖₂ [code].   two lists of (mean, var), (channels,) each -> ()

    At least 0. The running statistics are the one trace of its data that a teacher keeps besides its weights. Plain norms, not
    squared. Of a BN layer's input x:   var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    """
    return sum(torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)
               for (mean, var), (running_mean, running_var) in zip(statistics, running, strict=True))


def adversarial_loss(student_logits, teacher_logits):
    """-1/N Σ over images that both see in one class of 9 KL(teacher || student) at temperature 3 [code].   (N, K), (N, K) -> (), at most 0

    Asks for images on which the student is unsure of what the teacher knows, but not wrong: no image that breaks the agreement
    is worth anything, so the generator cannot win by leaving what the teacher learned.
    """
    log_student, teacher_p = F.log_softmax(student_logits / 3, dim=1), F.softmax(teacher_logits / 3, dim=1)
    agree = student_logits.argmax(1) == teacher_logits.argmax(1)                          # (N,)
    return -9 * (agree * F.kl_div(log_student, teacher_p, reduction="none").sum(1)).mean()


def adversarial_weight(epoch, epochs, start, end, ramp_begin, ramp_end):
    """α in an epoch: `start` up to ramp_begin of the run, `end` from ramp_end on, a line between the two [code].

    Epochs count from 0. floor, and one epoch late, as in the code: of 250, from 1/4 to 3/4, it leaves `start` in 64 and is at `end` in
    187. The fewer the epochs, the later and steeper; in one or two it never leaves `start`.
    """
    first, last = math.floor(epochs * ramp_begin), math.floor(epochs * ramp_end)
    return start + (end - start) * min(1, max(0, (epoch - first - 1) / max(1, last - first - 1)))


# ------------------------------------------------------------------------------------------------------------ networks
class Generator(nn.Module):
    """Latents (N, L) -> pixels (N, C, H, W) in [0, 1] [code]. 32x32, L = 512, C = 3: 8,776,259 parameters; 64x64, L = 1024: 35,139,139.

    Doubles twice at 32x32, three times at 64x64 [code], and so below and above [inferred]. Raises BadInput for sides that this does
    not reach.
    """
    def __init__(self, latent_dim, image_shape, width=64):
        super().__init__()
        channels, height, wide = image_shape
        doublings = 3 if min(height, wide) >= 64 else 2
        side = 2 ** doublings
        if height % side or wide % side:
            raise BadInput(f"the generator needs images with sides that are multiples of {side}, not {height}x{wide}")
        widths = [width * 2 ** (doublings - stage) for stage in range(doublings + 1)]     # 256, 128, 64
        layers = [nn.Linear(latent_dim, widths[0] * (height // side) * (wide // side)),
                  nn.Unflatten(1, (widths[0], height // side, wide // side)),             # (N, 256, H/4, W/4)
                  nn.BatchNorm2d(widths[0])]                                              # no activation after it [code]
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
                       nn.LeakyReLU(0.2, inplace=True)]                                   # (N, 128, H/2, W/2), (N, 64, H, W)
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())    # (N, C, H, W)
        for module in self.modules():                                                     # [code]
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, z):
        return self.layers(z)


# ------------------------------------------------------------------------------------------------ the trick: a round in one pass
@torch.no_grad()
def images_and_answers(generator, teacher, z, data, settings):
    """All images of a round and what the teacher says of them.   (M, L) -> (M, C, H, W), (M, K)

    Call it within frozen(generator, teacher): in eval mode batches may be put together and cut as memory likes, --images-per-pass.
    """
    images, answers = [], []
    for part in z.split(settings.images_per_pass):
        with autocast(settings, z.device):
            images.append(normalize(generator(part).float(), data))
            answers.append(teacher(images[-1]).float())
    return torch.cat(images), torch.cat(answers)


QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]


def quantiles(values):
    """The QUANTILES of a tensor's elements, a list of floats."""
    return torch.quantile(values.flatten(), torch.tensor(QUANTILES, device=values.device)).tolist()


# ------------------------------------------------------------------------------------------------------- the algorithm
def check(settings):
    """Raises BadInput for settings that make no sense together."""
    if settings.student_steps % settings.round_steps:
        raise BadInput(f"--student-steps must be a multiple of --round-steps, not {settings.student_steps} of {settings.round_steps}")
    if not settings.ramp_begin < settings.ramp_end <= 1:
        raise BadInput(f"--ramp-begin and --ramp-end are parts of the run, the first under the second, not {settings.ramp_begin:g} and "
                       f"{settings.ramp_end:g}")
    if min(settings.age_start, settings.age_end, settings.entropy_temperature) <= 0:
        raise BadInput("--age-start, --age-end and --entropy-temperature must be above 0")


def distill(teacher, student, data, settings, run=None):
    """Train `student` in place on images made from `teacher`, which stays as it is. No real image is passed in.

    `data`: a DataSpec. `settings`: the fields of a preset and `seed`; optionally `precision`. Returns the generator; it and the
    student come back in train mode. Raises BadInput where `check` does and for images that the generator cannot make,
    FloatingPointError when a loss is not finite.
    """
    check(settings)
    device, rounds = next(teacher.parameters()).device, settings.student_steps // settings.round_steps
    with seeded(settings.seed):
        generator = Generator(settings.latent_dim, data.image_shape, settings.generator_width)
        generator.to(device, memory_format=torch.channels_last)
    rng = torch.Generator(device).manual_seed(settings.seed)
    generator_optimizer = torch.optim.Adam(generator.parameters(), settings.lr_generator, betas=(0.9, 0.99))
    optimizer = torch.optim.SGD(student.parameters(), settings.lr_student, 0.9, weight_decay=settings.weight_decay)
    n = settings.batch_size
    state = dict(student=student, generator=generator, optimizer=optimizer, generator_optimizer=generator_optimizer, rng=rng,
                 generator_means=Means("loss_oh", "loss_bn", "loss_ie", "loss_adversarial", "agreed", device=device),
                 student_means=Means("loss_kd", "weight", device=device),
                 z=torch.zeros(settings.round_steps * n, settings.latent_dim, device=device),  # a round's: its images follow from it
                 difficulty=torch.zeros(settings.round_steps, n, device=device),               # ℓ and v of the latest round, to be shown
                 weights=torch.zeros(settings.round_steps, n, device=device),
                 pixels=torch.zeros(n, *data.image_shape, device=device),                      # and its last images
                 pseudo_labels=torch.zeros(n, dtype=torch.long, device=device),
                 epoch=0, synthesis_step=0, distillation_step=0, seconds_synthesis=0.0, seconds_distillation=0.0,
                 images_synthesized=0, student_steps=0, teacher_queries=0)
    layers = batchnorms(teacher) if settings.bn else []
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    if run:
        if settings.bn and not layers:
            run.report(event="note", text="the BN term is off: the teacher has no BatchNorm")
        run.restore(state)
    nothing, total_steps = torch.zeros((), device=device), settings.epochs * settings.student_steps

    for epoch in range(state["epoch"], settings.epochs):
        set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        alpha = (adversarial_weight(epoch, settings.epochs, settings.adversarial_start, settings.adversarial_end, settings.ramp_begin,
                                    settings.ramp_end) if settings.ramp else settings.adversarial_start)
        for round_ in range(state["distillation_step"] // settings.round_steps, rounds):       # a resumed run enters in the middle
            # -------- (1) Generator: min  CE(T(x), argmax T(x)) + L_bn - w_ie H(p̄) - α KL(T(x) || S(x)) where both agree
            generator.train()
            with frozen(teacher, student), recorded_statistics(layers) as seen:
                for _ in steps(state, "synthesis", (round_ + 1) * settings.generator_steps, run):
                    z = torch.randn(settings.synthesis_batch_size, settings.latent_dim, generator=rng, device=device)
                    with autocast(settings, device):
                        images = normalize(generator(z).float(), data)                    # (N, L) -> (N, C, H, W)
                        teacher_logits = teacher(images).float()                          # (N, K)
                        student_logits = student(images).float() if alpha else teacher_logits
                    fired = [place for place, layer in enumerate(layers) if layer in seen]             # not a training-time side branch
                    loss_oh = one_hot_loss(teacher_logits)
                    loss_bn = bn_loss([seen[layers[place]] for place in fired], [running[place] for place in fired]) if fired else nothing
                    loss_ie = information_entropy_loss(teacher_logits, settings.entropy_temperature)
                    loss_adversarial = adversarial_loss(student_logits, teacher_logits) if alpha else nothing
                    generator_optimizer.zero_grad()
                    (settings.oh * loss_oh + settings.bn * loss_bn + settings.ie * loss_ie + alpha * loss_adversarial).backward()
                    generator_optimizer.step()
                    agreed = (student_logits.argmax(1) == teacher_logits.argmax(1)).float().mean()
                    state["generator_means"].add(loss_oh, loss_bn, loss_ie, loss_adversarial, agreed)
                    state["teacher_queries"] += len(z)

            # -------- (2) Student, 10 steps: min  1/N Σ v(ℓ; λ) ℓ,  ℓ the distance of its answer from the teacher's
            student.train()
            images_of = None
            with frozen(teacher, generator):
                for step in steps(state, "distillation", (round_ + 1) * settings.round_steps, run):
                    place = step % settings.round_steps
                    if place == 0:
                        state["z"].normal_(generator=rng)
                        state["teacher_queries"] += len(state["z"])
                    if images_of is None:                      # a round begins, or one that was killed goes on
                        images_of, answers = images_and_answers(generator, teacher, state["z"], data, settings)
                    batch = slice(place * n, (place + 1) * n)
                    images, teacher_logits = images_of[batch], answers[batch]             # (N, C, H, W), (N, K)
                    age = settings.age_start + (settings.age_end - settings.age_start) * state["student_steps"] / total_steps
                    with autocast(settings, device):
                        student_logits = student(images).float()                          # (N, K)
                    losses = (l1_losses(student_logits, teacher_logits) if settings.student_loss == "l1" else
                              kd_losses(student_logits, teacher_logits, settings.temperature))         # (N,)
                    loss = curriculum_loss(losses, age, settings.curriculum, settings.granularity)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

                    losses = losses.detach()
                    weights = curriculum_weights(losses.mean() if settings.granularity == "batch" else losses, age, settings.curriculum)
                    state["difficulty"][place], state["weights"][place] = losses, weights
                    state["student_means"].add(losses.mean(), weights.mean())
                    state["student_steps"] += 1
                    state["images_synthesized"] += n
                    if place == settings.round_steps - 1:
                        state["pixels"].copy_(denormalize(images, data).clamp(0, 1))
                        state["pseudo_labels"].copy_(teacher_logits.argmax(1))

        means = {**state["generator_means"].take(), **state["student_means"].take()}
        state.update(epoch=epoch + 1, synthesis_step=0, distillation_step=0)
        if run:
            if not alpha:                                      # the student was not asked
                means.update(loss_adversarial=None, agreed=None)
            age = settings.age_start + (settings.age_end - settings.age_start) * state["student_steps"] / total_steps
            run.report(event="curriculum", epoch=epoch, age=age, quantiles=QUANTILES,
                       **{name: quantiles(state[name]) for name in ("difficulty", "weights")})
            pixel_std = report_collapse(run, state["pixels"], state["pseudo_labels"], epoch=epoch)
            samples = newest_by_class((255 * state["pixels"]).to(torch.uint8), state["pseudo_labels"], min(data.num_classes, 20))
            run.report(epoch=epoch, **means, alpha=alpha, age=age, pixel_std=pixel_std, samples=samples)
    generator.train()
    return generator


# ------------------------------------------------------------------------------------------- the picture that explains the paper
def draw_curriculum(rows):
    """The rows of a log -> a matplotlib Figure: difficulty and weight of an epoch's last images, and what moves them."""
    from matplotlib.figure import Figure
    seen, epochs = ([row for row in rows if row["event"] == event] for event in ("curriculum", "epoch"))
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    axes, x = figure.subplots(1, 3), [row["epoch"] + 1 for row in seen]
    for ax, name, label in ((axes[0], "difficulty", "loss ℓ of an image"), (axes[1], "weights", "weight v of its loss")):
        bands = list(zip(*[row[name] for row in seen]))
        ax.fill_between(x, bands[0], bands[4], color="tab:blue", alpha=0.2, linewidth=0, label="5 to 95 % of the images")
        ax.fill_between(x, bands[1], bands[3], color="tab:blue", alpha=0.4, linewidth=0, label="25 to 75 %")
        ax.plot(x, bands[2], color="tab:blue", marker=".", label="median")
        ax.set(xlabel="epoch", ylabel=label)
    axes[0].plot(x, [row["age"] for row in seen], color="black", linestyle="--", label="age λ")
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    axes[1].set_ylim(-0.02, 1.02)
    axes[2].plot(x, [row["alpha"] for row in epochs], color="tab:red", marker=".")
    axes[2].set_xlabel("epoch")
    axes[2].set_ylabel("α, weight of the adversarial term", color="tab:red")
    scored = [(row["epoch"] + 1, row["student_acc"]) for row in epochs if row["student_acc"] is not None]
    if scored:
        right = axes[2].twinx()
        right.plot(*zip(*scored), color="tab:green", marker=".")
        right.set_ylabel("student's test accuracy", color="tab:green")
    return figure


# -------------------------------------------------------------------------------------- hyperparameters, command line
# [code] its scripts, at commit bf3096b but where another is named. α and λ at the end of the run as their steps add up over the
# authors' epochs. CIFAR-100, ResNet-34 to ResNet-18: 300 epochs until 2022-12, when v was one a sample.
CIFAR10 = dict(   # ResNet-34 to ResNet-18
    epochs=250, batch_size=512, student_steps=400, round_steps=10, generator_steps=1, synthesis_batch_size=512, images_per_pass=2560,
    latent_dim=512, generator_width=64, lr_generator=1e-3, oh=1.0, bn=1.0, ie=20.0, entropy_temperature=20.0,
    adversarial_start=0.0, adversarial_end=62.0, ramp=True, ramp_begin=0.25, ramp_end=0.75,
    curriculum="log", granularity="sample", age_start=2.0, age_end=12.0,
    student_loss="l1", temperature=20.0, lr_student=0.1, weight_decay=1e-4)
CIFAR100 = {**CIFAR10, "epochs": 400, "batch_size": 768, "synthesis_batch_size": 768, "temperature": 5.0, "entropy_temperature": 5.0,
            "age_start": 1.0, "age_end": 4.2, "adversarial_end": 83.65, "ramp_begin": 0.2, "ramp_end": 0.8}
LARGE = {"batch_size": 1024, "synthesis_batch_size": 1024}
WIDE = {**CIFAR10, **LARGE, "student_loss": "kl", "adversarial_start": 0.5}                             # Wide ResNets on CIFAR-10
WIDE100 = {**CIFAR100, **LARGE, "student_loss": "kl", "temperature": 2.0, "entropy_temperature": 2.0, "ramp_end": 0.75}
PRESETS = {
    "cifar10": CIFAR10,
    "cifar10-vgg11-resnet18": {**CIFAR10, **LARGE, "student_loss": "kl"},     # commit 7eddc65
    "cifar10-wrn40_2-wrn16_1": {**WIDE, "adversarial_end": 6.7},
    "cifar10-wrn40_2-wrn40_1": {**WIDE, "adversarial_end": 25.3},             # commit a2d189b; the ramp is its parser's default
    # [inferred] 30 epochs for 250, on the same curves, compressed; batches of 256 as beside the time table of the README
    "cifar10-short": {**CIFAR10, "epochs": 30, "batch_size": 256, "synthesis_batch_size": 256},
    "cifar100": CIFAR100,
    "cifar100-vgg11-resnet18": {**CIFAR100, **LARGE},                         # [inferred]: no script of this pair is left
    "cifar100-wrn40_2-wrn40_1": {**WIDE100, "epochs": 500, "age_end": 5.0, "adversarial_end": 32.88},
    "cifar100-wrn40_2-wrn16_2": {**WIDE100, "epochs": 300, "age_end": 3.4, "adversarial_end": 24.6},         # commit 56bc3b8
    # github.com/ljrprocc/DFKD, commit cd281c4, the numbers alone: see 11 above
    "svhn": {**WIDE, "age_start": 0.8, "age_end": 2.8, "adversarial_start": 0.0, "adversarial_end": 3.75},
    # --preset tiny-imagenet --dataset folder:PATH@64, see 10 above
    "tiny-imagenet": {**CIFAR100, "batch_size": 128, "synthesis_batch_size": 128, "latent_dim": 1024, "adversarial_start": 1.0,
                      "adversarial_end": 33.85, "ramp_end": 0.75},
    # [inferred] for a CPU; the paper treats neither. At the ages above, 2 to 12, all weights would be 1 after an epoch: the KL of
    # the digits pair is some 0.2
    "mnist": {**WIDE, "epochs": 10, "batch_size": 256, "synthesis_batch_size": 256, "images_per_pass": 128, "latent_dim": 128,
              "generator_width": 16, "adversarial_start": 0.0, "adversarial_end": 5.0, "age_start": 0.2, "age_end": 2.0},
    "digits": {**WIDE, "epochs": 6, "batch_size": 128, "student_steps": 200, "synthesis_batch_size": 128, "images_per_pass": 256,
               "latent_dim": 256, "lr_generator": 3e-3, "adversarial_start": 0.0, "adversarial_end": 5.0, "age_start": 0.2, "age_end": 2.0,
               "weight_decay": 5e-4},
}
FLAGS = {
    "student_steps": "student steps an epoch",
    "round_steps": "student steps a round, after the generator's",
    "generator_steps": "generator steps a round",
    "synthesis_batch_size": "the generator's batch size",
    "images_per_pass": "of a round's images, how many go through generator and teacher at once: a bound on memory",
    "latent_dim": "length of z",
    "generator_width": "channels of the generator's last layers; each stage before has twice as many",
    "lr_generator": "Adam, constant",
    "oh": "weight of the teacher's CE with its own first choice",
    "bn": "weight of the BN statistics' distance",
    "ie": "weight of the class entropy of a batch",
    "entropy_temperature": "of the predictions in that entropy",
    "adversarial_start": "weight of the adversarial term before the ramp, α₀",
    "adversarial_end": "weight of the adversarial term after the ramp",
    "ramp": "let it rise; --no-ramp holds it at its start",
    "ramp_begin": "part of the run at which it begins to rise",
    "ramp_end": "part of the run at which it ends to rise",
    "curriculum": ("of the student: how a loss becomes a weight; none = all 1", ("log", "soft", "hard", "none")),
    "granularity": ("a weight for each image, or one for the batch", ("sample", "batch")),
    "age_start": "λ at the start: losses above it are hard",
    "age_end": "λ at the end",
    "student_loss": ("l1 of raw logits, or kl", ("l1", "kl")),
    "temperature": "of the student's KL",
    "lr_student": "SGD, momentum 0.9, cosine over the epochs to 0",
    "weight_decay": "of the student",
}


@command_line
def main(argv=None):
    settings = read_settings(argv, "cudfkd", __doc__, PRESETS, FLAGS)
    check(settings)
    if importlib.util.find_spec("matplotlib") is None:         # not after hours of training
        raise BadInput("matplotlib, which draws curriculum.png, is not installed; type: pip install -r requirements.txt")
    run = Run("cudfkd", settings)
    Generator(1, run.data.image_shape, 1)                      # refuse now, in words, what distill would refuse
    distill(run.teacher.model, run.student, run.data, settings, run)
    picture = io.BytesIO()
    draw_curriculum(run.rows).savefig(picture, format="png", dpi=110)
    write_atomically(run.folder / "curriculum.png", lambda file: file.write(picture.getvalue()))
    run.finish()


if __name__ == "__main__":
    main()
