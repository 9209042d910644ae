"""CuDFKD: Dynamic Data-Free Knowledge Distillation by Easy-to-Hard Learning Strategy.   Jingru Li,
Sheng Zhou, Liangcheng Li, Haishuai Wang, Zhi Yu, Jiajun Bu. Inf. Sci. 2023, arXiv 2208.13648. Authors' code:
github.com/ljrprocc/DataFree, commit bf3096b.

The idea. One generator, trained throughout, makes images of which the teacher is certain, whose BatchNorm
statistics are those of real data, and that spread over the classes. Training goes from easy to hard in
two ways. The generator: a term that asks for images on which student and teacher agree in class but
differ in confidence has little or no weight at first, and more later. The student: an image on which it
is far off counts for less (self-paced learning). How far is "far", the age of the curriculum, grows with
every step.

     z ──► G ──► pixels ──► normalize ──┬──► teacher ──┬─► certain · all classes · BN statistics ───────┐
           ▲                            │              └─► logits ─┐                                    │
           │                            └──► student, fixed ─► logits ─► - α KL where both agree ───────┤
           └──────── gradient, through the frozen networks, into G only: 1 step ◄───────────────────────┘
     z ══► G, fixed ══► images ─┬══► teacher ══► logits ──┐
                                └──► student ──► ℓ of each image ──► mean v(ℓ; λ) ℓ ──► student only: 10 steps
                                                                                         (══► no gradient)
Run     python cudfkd.py --dataset digits      (benchmarks/results/cudfkd-digits.jsonl)
                seeds 0-4, last epoch: student 96.61 ± 1.35 %, teacher 98.89 %
        python cudfkd.py --teacher resnet34 --student resnet18      CIFAR-10, the authors' settings: not run
Copy    kd_losses, l1_losses, curriculum_weights, curriculum_regularizer, curriculum_loss, one_hot_loss,
        information_entropy_loss, bn_loss, adversarial_loss, adversarial_weight, Generator,
        images_and_answers, distill
Letters T teacher, S student, G generator · ℓ loss of an image, v its weight, λ the age, α the adversarial
        weight · N batch, K classes, C H W image, L latent, M images in a round.
Words   A round is a step of the generator, then ten of the student. An epoch is 40 rounds, for a CPU also 20.
Sources [code] the authors' code · [authors] their README and notebooks · [inferred] a reconstruction or a
        choice made here. The paper's text was not at hand: no equation number stands here.

Where paper, authors' code and this file differ
 1. What v weights. In the code of 2022-05 to 2022-08, and in its last state, ℓ is one number a batch, and
    v scales the whole step; from 2022-09 to 2022-12 it is one an image. Only the latter chooses between
    images, which is the method's idea, and their difficulty figure is drawn by image [authors]; yet the
    README's CIFAR-10 numbers are older. The default is --granularity sample, with the mean of v ℓ; take
    --granularity batch to compare with the README.
 2. The code's `none` switches off the student's curriculum and the rise of α together, so the published
    ablation cannot tell them apart. Here --curriculum none and --no-ramp are two switches. --no-ramp
    holds α at --adversarial-start.
 3. The regularizer f(v; λ), of which v is the minimum, has no gradient: v is a constant in the student's
    step. One version of the code adds its value to the printed loss. Here it only explains v.
 4. The code takes the entropy at the distillation's temperature, 20 on CIFAR-10, where it is nearly ln K
    for any images, also for images of one class. The presets follow, but for the races' two: on MNIST,
    two of three runs never learned so; --entropy-temperature. The adversarial term has 3 [code].
 5. The code adds a fixed amount to α after every epoch between two marks, and a fixed number to λ after
    every student step. The presets hold start and end, as they come out over the authors' epochs, so that
    --epochs keeps the curve; a run of one or two epochs is too short for α to rise.
 6. The ten batches of a round are made together, --images-per-pass at a time, by generator and teacher,
    both fixed and in eval mode; upsampling and the convolution after it are one layer of common.py: the
    same mathematics. BN statistics are taken in the generator's step only. In the code every teacher pass
    takes them, fixed weights get gradients, and each step waits for two accuracies
    (benchmarks/throughput.py).
 7. Generated images are not augmented and not kept [code]. The code's activation term has weight 0 in
    every script and its Jensen-Shannon variant of the adversarial term is in none; its squared loss sums
    over elements. All left out.
 8. The authors report the best epoch on the test set, this file the last one (the best in brackets).
 9. A teacher without BatchNorm, as LeNet-5: the BN term is off, and the log says so [inferred].
10. Tiny-ImageNet: on the authors' two GPUs the generator's batch is 128 and the student's 64 a GPU where
    the script says 512, and their student keeps ImageNet's stem. Here both are 128, with the networks of
    common.py.
11. SVHN: the numbers are those of the authors' next paper, for WRN-40-2 to WRN-40-1, whose code weights
    by batch and has no agreement mask in the adversarial term. The numbers alone are taken.
12. Besides accuracy the authors measure agreement, as the log does, and a loyalty that their code
    computes as 1 - JSD^¼, where its usual definition has a square root. It is not computed here.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (BadInput, Means, Run, UpsampledConv2d, batchnorms, command_line, cosine, dataset_spec,
                    denormalize, frozen, load_networks, normalize, parse, place_like, recorded_statistics,
                    set_lr, steps, timed, with_own_seed)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """CIFAR-10, ResNet-34 to ResNet-18 [code]; final α and λ are what their steps add up to in 250 epochs."""
    epochs: int = 250                   # of --student-steps steps each
    student_steps: int = 400            # student steps an epoch
    round_steps: int = 10               # student steps a round, after the generator's
    batch_size: int = 512               # the student's
    generator_steps: int = 1            # generator steps a round
    synthesis_batch_size: int = 512     # the generator's
    images_per_pass: int = 2560         # of a round's images, how many are made at once: a bound on memory
    latent_dim: int = 512               # length of z
    generator_width: int = 64    # channels of the generator's last layers; twice as many in each stage before
    lr_generator: float = 1e-3          # Adam, betas (0.9, 0.99), constant
    oh: float = 1.0                     # weight of one_hot_loss
    bn: float = 1.0                     # weight of bn_loss
    ie: float = 20.0                    # weight of information_entropy_loss
    entropy_temperature: float = 20.0   # of the predictions in that entropy
    adversarial_start: float = 0.0      # α, weight of adversarial_loss, before the ramp
    adversarial_end: float = 62.0       # α after the ramp
    ramp: bool = True                   # let α rise; --no-ramp holds it at its start
    ramp_begin: float = 0.25            # part of the run at which α begins to rise
    ramp_end: float = 0.75              # part of the run at which α stops rising
    curriculum: Literal["log", "soft", "hard", "none"] = "log"  # how a loss becomes a weight; none: all 1
    granularity: Literal["sample", "batch"] = "sample"         # a weight for each image, or one for the batch
    age_start: float = 2.0              # λ at the start: losses above it are hard
    age_end: float = 12.0               # λ at the end
    student_loss: Literal["l1", "kl"] = "l1"        # l1 of raw logits, or KL
    temperature: float = 20.0           # of the student's KL
    lr_student: float = 0.1             # SGD, momentum 0.9, cosine over the epochs to 0
    weight_decay: float = 1e-4          # of the student
    seed: int = 0                       # of student, generator and latents


CIFAR10 = Settings()
CIFAR100 = replace(CIFAR10, epochs=400, batch_size=768, synthesis_batch_size=768, temperature=5.0,
                   entropy_temperature=5.0, age_start=1.0, age_end=4.2, adversarial_end=83.65, ramp_begin=0.2,
                   ramp_end=0.8)
LARGE = dict(batch_size=1024, synthesis_batch_size=1024)
WIDE = replace(CIFAR10, **LARGE, student_loss="kl", adversarial_start=0.5)          # of all pairs with KL
WIDE100 = replace(CIFAR100, **LARGE, student_loss="kl", temperature=2.0, entropy_temperature=2.0,
                  ramp_end=0.75)
RACE = replace(WIDE, synthesis_batch_size=256, images_per_pass=128, entropy_temperature=1.0)   # see 4 above
PRESETS = {   # [code] its scripts at commit bf3096b, which weight by batch (see 1), or at the commit named
    "cifar10": CIFAR10,
    "cifar10-vgg11-resnet18": replace(CIFAR10, **LARGE, student_loss="kl"),               # commit 7eddc65
    "cifar10-wrn40_2-wrn16_1": replace(WIDE, adversarial_end=6.7),
    "cifar10-wrn40_2-wrn40_1": replace(WIDE, adversarial_end=25.3),  # a2d189b; the ramp: its parser's default
    "cifar10-wrn": replace(WIDE, adversarial_end=6.7),               # [inferred]: other pairs of Wide ResNets
    # [inferred] 30 epochs for 250, on the same curves; batches of 256 as beside the time table of the README
    "cifar10-short": replace(CIFAR10, epochs=30, batch_size=256, synthesis_batch_size=256),
    "cifar100": CIFAR100,                           # 300 epochs until 2022-12, when v was one a sample
    "cifar100-vgg11-resnet18": replace(CIFAR100, **LARGE),   # [inferred]: no script of it with a ramp is left
    "cifar100-wrn40_2-wrn40_1": replace(WIDE100, epochs=500, age_end=5.0, adversarial_end=32.88),
    "cifar100-wrn40_2-wrn16_2": replace(WIDE100, epochs=300, age_end=3.4, adversarial_end=24.6),   # 56bc3b8
    "cifar100-wrn": replace(WIDE100, epochs=300, age_end=3.4, adversarial_end=24.6),              # [inferred]
    # github.com/ljrprocc/DFKD, commit cd281c4, see 11 above
    "svhn": replace(WIDE, age_start=0.8, age_end=2.8, adversarial_start=0.0, adversarial_end=3.75),
    # --preset tiny-imagenet --dataset folder:PATH@64, see 10 above
    "tiny-imagenet": replace(CIFAR100, batch_size=128, synthesis_batch_size=128, latent_dim=1024,
                             adversarial_start=1.0, adversarial_end=33.85, ramp_end=0.75),
    # [inferred], for benchmarks/race.py
    "cifar10-cpu": replace(RACE, epochs=17, student_steps=200, batch_size=128, generator_width=32,
                           age_start=0.5, adversarial_end=2.0),
    "mnist-cpu": replace(RACE, epochs=25, batch_size=256, latent_dim=128, generator_width=16, ramp_begin=0.05,
                         adversarial_start=0.0, adversarial_end=5.0, age_start=0.2, age_end=2.0),
    # [inferred] for a CPU; no script treats either. The KL of the digits pair is some 0.2: at ages 2 to 12
    # all weights would be 1 after an epoch. digits: chosen among 9 by test accuracy on seed 0
    "mnist": replace(WIDE, epochs=10, batch_size=256, synthesis_batch_size=256, images_per_pass=128,
                     latent_dim=128, generator_width=16, adversarial_start=0.0, adversarial_end=5.0,
                     age_start=0.2, age_end=2.0),
    "digits": replace(WIDE, epochs=6, batch_size=128, student_steps=200, synthesis_batch_size=128,
                      images_per_pass=256, latent_dim=256, lr_generator=3e-3, adversarial_start=0.0,
                      adversarial_end=5.0, age_start=0.2, age_end=2.0, weight_decay=5e-4),
}


# ------------------------------------------------------- the student's losses, and the curriculum on them
def kd_losses(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, of each image [code].

    (N, K), (N, K) -> (N,), at least 0.
    The student should give the teacher's probabilities. Its mean is the usual distillation loss.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="none").sum(1)


def l1_losses(student_logits, teacher_logits):
    """Mean over classes of |student - teacher|, raw logits, of each image [code].

    (N, K), (N, K) -> (N,)
    At least 0. Sees a shift of all logits, which a softmax hides. Its gradients are bounded.
    """
    return (student_logits - teacher_logits).abs().mean(1)


def curriculum_weights(losses, age, curriculum="log"):
    """v(ℓ; λ), the v that makes v ℓ + f(v; λ) least [code].

    any shape, age above 0 -> the same, in [0, 1].
    hard   1 where ℓ < λ, else 0
    soft   1 - ℓ/λ, at least 0
    log    (1 + e^-λ) / (1 + e^(ℓ-λ)): 1 at ℓ = 0, (1 + e^-λ)/2 at ℓ = λ, above 0
    none   1
    What is too hard for now counts less, but for none. As λ grows, all weights go to 1. Raises ValueError
    for another word.
    """
    if curriculum == "hard":
        return (losses < age).to(losses.dtype)
    if curriculum == "soft":
        return (1 - losses / age).clamp(min=0)
    if curriculum == "log":
        return (1 + math.exp(-age)) * torch.sigmoid(age - losses)            # the same, and never inf / inf
    if curriculum == "none":
        return torch.ones_like(losses)
    raise ValueError(f"curriculum must be hard, soft, log or none, not {curriculum!r}")


def curriculum_regularizer(weights, age, curriculum="log"):
    """f(v; λ), element by element [code].   weights in [0, 1] -> the same shape

    hard   -λ v
    soft   λ (v²/2 - v)
    log    μ ln μ + v ln v - λ v,   μ = 1 + e^-λ - v
    Rewards large weights, more so as λ grows. It has no gradient, see 3 above.
    """
    if curriculum == "hard":
        return -age * weights
    if curriculum == "soft":
        return age * (weights ** 2 / 2 - weights)
    if curriculum == "log":
        other = (1 + math.exp(-age) - weights).clamp(min=0)                  # v may be 1 and a rounding error
        return torch.xlogy(other, other) + torch.xlogy(weights, weights) - age * weights
    return torch.zeros_like(weights)


def curriculum_loss(losses, age, curriculum="log", granularity="sample"):
    """mean of v(ℓ; λ) ℓ over images, or v(ℓ̄; λ) ℓ̄ of the batch's mean loss [code, both].   (N,) -> ()

    At least 0. v is a constant here: following v ∇ℓ descends min over v of v ℓ + f(v; λ), whose
    derivative by ℓ is v. Raises ValueError for another granularity than sample and batch.
    """
    if granularity not in ("sample", "batch"):
        raise ValueError(f"granularity must be sample or batch, not {granularity!r}")
    losses = losses.mean() if granularity == "batch" else losses
    return (curriculum_weights(losses.detach(), age, curriculum) * losses).mean()


# ---------------------------------------------------------- the generator's losses: tensors in, scalar out
def one_hot_loss(teacher_logits):
    """CE of the teacher's answer with its own first choice, batch mean [code].

    (N, K) -> (), in [0, ln K].
    The teacher is certain of real images, so the generator should make images of which it is certain.
    """
    return F.cross_entropy(teacher_logits, teacher_logits.argmax(1))


def information_entropy_loss(teacher_logits, temperature=1.0):
    """Σ_k p̄_k ln p̄_k, p̄ the batch's mean prediction at a temperature [code].

    (N, K) -> (), in [-ln K, 0].
    Minus the entropy: least when a batch holds every class equally often.
    """
    log_p = F.log_softmax(teacher_logits / temperature, dim=1).logsumexp(0) - math.log(len(teacher_logits))
    return (log_p.exp() * log_p).sum()


def bn_loss(statistics, running):
    """Σ over BN layers ‖var - running_var‖₂ + ‖mean - running_mean‖₂ [code].

    two lists of (mean, var) -> ()
    At least 0. mean and var (channels,): of a layer's input x, and what the layer remembers from real data.
    Plain norms, not squared. Of x:   var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    """
    return sum(torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)
               for (mean, var), (running_mean, running_var) in zip(statistics, running, strict=True))


def adversarial_loss(student_logits, teacher_logits):
    """-9/N Σ KL(teacher || student) at T = 3, over images that both put into one class [code].

    (N, K), (N, K) -> (), at most 0. Asks for images on which the student differs from the teacher in
    confidence. Images on which the predicted classes differ are masked out, which keeps the generator near
    the teacher's data.
    """
    log_student, teacher_p = F.log_softmax(student_logits / 3, dim=1), F.softmax(teacher_logits / 3, dim=1)
    agree = student_logits.argmax(1) == teacher_logits.argmax(1)             # (N,)
    return -9 * (agree * F.kl_div(log_student, teacher_p, reduction="none").sum(1)).mean()


def adversarial_weight(epoch, epochs, start, end, ramp_begin, ramp_end):
    """α in an epoch: `start` up to ramp_begin of the run, `end` from ramp_end on, a line in between [code].

    Epochs count from 0. Rounded down, and one epoch late, as in the code: of 250, from 1/4 to 3/4, it
    leaves `start` in 64 and is at `end` in 187. The fewer the epochs, the later and steeper; in one or
    two it never leaves `start`.
    """
    first, last = math.floor(epochs * ramp_begin), math.floor(epochs * ramp_end)
    return start + (end - start) * min(1, max(0, (epoch - first - 1) / max(1, last - first - 1)))


# -------------------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """Latents (N, L) -> pixels (N, C, H, W) in [0, 1] [code]. 32x32, L = 512, C = 3: 8,776,259 weights.

    Doubles twice at 32x32, three times at 64x64 [code] and above [inferred]; 64x64, L = 1024: 35,139,139
    weights. Raises BadInput for sides that this does not reach.
    """
    def __init__(self, latent_dim, image_shape, width=64):
        super().__init__()
        channels, height, wide = image_shape
        doublings = 3 if min(height, wide) >= 64 else 2
        side = 2 ** doublings
        if height % side or wide % side:
            raise BadInput(f"the generator needs sides that are multiples of {side}, not {height}x{wide}")
        widths = [width * 2 ** (doublings - stage) for stage in range(doublings + 1)]     # 256, 128, 64
        layers = [nn.Linear(latent_dim, widths[0] * (height // side) * (wide // side)),
                  nn.Unflatten(1, (widths[0], height // side, wide // side)),             # (N, 256, H/4, W/4)
                  nn.BatchNorm2d(widths[0])]                                 # no activation after it [code]
        for before, after in zip(widths, widths[1:]):
            layers += [UpsampledConv2d(before, after, bias=False), nn.BatchNorm2d(after),
                       nn.LeakyReLU(0.2, inplace=True)]                      # (N, 128, H/2, W/2) ...
        layers += [nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid()]   # (N, C, H, W)
        self.layers = nn.Sequential(*layers)
        for module in self.modules():                                        # DCGAN's initialisation [code]
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, z):
        return self.layers(z)


# ----------------------------------------------------------------------------- the trick: a round in one pass
@torch.no_grad()
def images_and_answers(generator, teacher, z, data, images_per_pass):
    """All images of a round and the teacher's logits.   (M, L) -> (M, C, H, W), (M, K)

    Both networks in eval mode: then batches may be put together, and cut as memory allows.
    """
    images, answers = [], []
    for part in z.split(images_per_pass):
        images.append(normalize(generator(part), data))
        answers.append(teacher(images[-1]))
    return torch.cat(images), torch.cat(answers)


# --------------------------------------------------------------------------------------------- the algorithm
def check(settings):
    """Raises BadInput for settings that make no sense together."""
    if settings.student_steps % settings.round_steps:
        raise BadInput(f"--student-steps {settings.student_steps} must be a multiple of --round-steps "
                       f"{settings.round_steps}")
    if not settings.ramp_begin < settings.ramp_end <= 1:
        raise BadInput("--ramp-begin and --ramp-end are parts of the run, the first under the second, not "
                       f"{settings.ramp_begin:g} and {settings.ramp_end:g}")
    if min(settings.age_start, settings.age_end, settings.entropy_temperature) <= 0:
        raise BadInput("--age-start, --age-end and --entropy-temperature must be above 0")


@with_own_seed
def distill(teacher, student, data, settings, run=None):
    """Train `student` in place on images that a generator makes against `teacher`. No real image comes in.

    `teacher`: any classifier; it stays as it is. `data`: a DataSpec. `run`: log and checkpoints, for
    main() alone. Returns the generator. Raises BadInput where `check` does and for images that the
    generator cannot make, FloatingPointError when a loss is not finite.
    """
    check(settings)
    device, n, width = next(teacher.parameters()).device, settings.batch_size, settings.generator_width
    generator = place_like(Generator(settings.latent_dim, data.image_shape, width), teacher)
    generator_optimizer = torch.optim.Adam(generator.parameters(), settings.lr_generator, betas=(0.9, 0.99))
    optimizer = torch.optim.SGD(student.parameters(), settings.lr_student, 0.9,
                                weight_decay=settings.weight_decay)
    start = run.resume(student=student, generator=generator, optimizer=optimizer,
                       generator_optimizer=generator_optimizer) if run else 0
    layers = batchnorms(teacher, data) if settings.bn else []
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    rounds = settings.student_steps // settings.round_steps
    total_steps = settings.epochs * settings.student_steps

    for epoch in range(start, settings.epochs):
        set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        alpha = settings.adversarial_start
        if settings.ramp:
            alpha = adversarial_weight(epoch, settings.epochs, settings.adversarial_start,
                                       settings.adversarial_end, settings.ramp_begin, settings.ramp_end)
        means = Means()
        for round_ in range(rounds):
            # -------- (1) Generator: min  CE(T(x), argmax T) + L_bn - w_ie H(p̄) - α KL(T || S) if they agree
            generator.train()
            with frozen(teacher, student), recorded_statistics(layers) as statistics:
                for _ in steps(settings.generator_steps, "synthesis"):
                    z = torch.randn(settings.synthesis_batch_size, settings.latent_dim, device=device)
                    images = normalize(generator(z), data)                   # (N, L) -> (N, C, H, W)
                    teacher_logits = teacher(images)                         # (N, K)
                    loss_oh = one_hot_loss(teacher_logits)
                    loss_bn = bn_loss([statistics[layer] for layer in layers], running)  # 0 without BatchNorm
                    loss_ie = information_entropy_loss(teacher_logits, settings.entropy_temperature)
                    loss_adversarial = 0.0
                    if alpha:
                        student_logits = student(images)                     # (N, K)
                        loss_adversarial = adversarial_loss(student_logits, teacher_logits)
                        agreed = student_logits.argmax(1) == teacher_logits.argmax(1)
                        means.add(agreed=agreed.float().mean())
                    generator_optimizer.zero_grad()
                    (settings.oh * loss_oh + settings.bn * loss_bn + settings.ie * loss_ie
                     + alpha * loss_adversarial).backward()
                    generator_optimizer.step()
                    means.add(loss_oh=loss_oh, loss_bn=loss_bn, loss_ie=loss_ie,
                              loss_adversarial=loss_adversarial)

            # -------- (2) Student, 10 steps: min  1/N Σ v(ℓ; λ) ℓ,  ℓ its distance from the teacher's answer
            student.train()
            with frozen(teacher, generator):
                z = torch.randn(settings.round_steps * n, settings.latent_dim, device=device)
                with timed("synthesis"):
                    images, answers = images_and_answers(generator, teacher, z, data,
                                                         settings.images_per_pass)
                for step in steps(settings.round_steps, "distillation"):
                    batch = slice(step * n, (step + 1) * n)
                    done = epoch * settings.student_steps + round_ * settings.round_steps + step
                    age = settings.age_start + (settings.age_end - settings.age_start) * done / total_steps
                    student_logits, teacher_logits = student(images[batch]), answers[batch]      # (N, K) each
                    if settings.student_loss == "l1":
                        losses = l1_losses(student_logits, teacher_logits)   # (N,)
                    else:
                        losses = kd_losses(student_logits, teacher_logits, settings.temperature)
                    loss = curriculum_loss(losses, age, settings.curriculum, settings.granularity)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    losses = losses.detach()
                    of_batch = losses.mean() if settings.granularity == "batch" else losses
                    weights = curriculum_weights(of_batch, age, settings.curriculum)
                    means.add(loss_kd=losses.mean(), weight=weights.mean())
        terms = means.take()                                                 # stops if one is not finite
        if run:                                                              # with the last batch to be shown
            at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], device=device)
            terms.update(alpha=alpha, age=age, difficulty=losses.quantile(at).tolist(),
                         weights=weights.expand(n).quantile(at).tolist())
            run.log(epoch, terms, denormalize(images[batch], data), teacher_logits.argmax(1))
    return generator.train()


@command_line
def main(argv=None):
    options, settings = parse("cudfkd", __doc__, Settings, PRESETS, argv)
    check(settings)
    data = dataset_spec(options)
    Generator(1, data.image_shape, 1)                                        # refuses an image size now
    teacher, student = load_networks(options, settings, data)
    run = Run(options, settings, teacher, student, data)
    if settings.bn and not batchnorms(teacher, data):
        run.note("the BN term is off: the teacher has no BatchNorm")
    distill(teacher, student, data, settings, run)
    run.finish()


if __name__ == "__main__":
    main()
