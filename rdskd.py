"""RDSKD: Robustness and Diversity Seeking Data-Free Knowledge Distillation.   Pengchao Han, Jihong Park,
Shiqiang Wang, Yejun Liu. ICASSP 2021, arXiv 2011.03749. Authors' code: github.com/PengchaoHan/RDSKD, 8512a9d.

The idea. As in DAFL (dafl.py), a generator learns to make images of which a frozen teacher is certain and
which spread over all classes. Two things change. The two halves of a batch must differ in their pixels,
and more so where the teacher's answers to them differ. And certainty and spread, which pull against each
other, are not weighted by hand: each enters as the exponential of its rise above an earlier value, so the
one that has risen most gets the largest weight. The generator is trained first and then fixed; students
learn from it.

   phase 1   z1, z2 ──► G ──► x1, x2 ──► teacher ─┬─► certainty: e^(rise)  +  spread: e^(rise) ──────┐
                        ▲        └────────────────┴─► ‖P2 - P1‖ / ‖x2 - x1‖, answers over images ────┤
                        └──────────── gradient, through the frozen teacher, into G only ◄────────────┘
   phase 2   z ══► G, fixed ══► images ─┬══► teacher ══► logits ──┐
                                        └──► student ──► KL ◄─────┘ ──► gradient: student    (══► no gradient)

Run     python rdskd.py --dataset digits      (benchmarks/results/rdskd-digits.jsonl)
                seeds 0-4, last epoch: student 95.39 ± 1.89 %, teacher 98.89 %
        python rdskd.py --teacher resnet34 --student resnet18    CIFAR-10, the authors' numbers: not run
Copy    kd_loss, one_hot_loss, information_entropy_loss, diversity_loss, mode_seeking_loss,
        increment_penalty, Generator, train_generator, distill
Letters T teacher, S student, G generator, P the teacher's probabilities · N batch, K classes, C H W
        image, L latent z.
Sources [code] the authors' code · [abstract] the paper's · [inferred] a reconstruction or a choice made
        here. The paper's method section and tables were not at hand.
Words   A round is 120 steps of the generator, an epoch 120 of the student; short presets have other numbers.

Where paper, authors' code and this file differ
 1. "Exponential penalty on loss increments" [abstract]: the code remembers each loss at the second step
    of a round and uses it until the second step of the next; in the first two steps of all it is 0.
    Followed; --reference previous remembers the loss of every step, and both weights stay near 1.
 2. The diversity term is one ratio of norms over half batches [code], not a mean over pairs. The code's 1 /
    (ratio + 1e-20) has a NaN gradient where both halves get one answer, and is 1e20 where both are one
    image, as in a collapse. Here it is d_P / (d_x + 1e-8): the same up to 1e-8, its gradient always
    finite.
 3. In phase 2 the generator is in eval mode [code]: its BatchNorms use running statistics, the last one
    too, so a batch of images no longer has mean 0 and deviation 1 exactly.
 4. Natural logarithm in the entropy [code]; DAFL's last code takes log10.
 5. All weights are 1 [code]. --oh, --ie and --diversity-weight are there for ablations.
 6. MSKD, the abstract's rival: its code is not in the authors' repository, and no paper of that name was
    found. `--diversity ms --penalty fixed` is a reconstruction [inferred]: certainty and spread (ln) at
    fixed weight 1, no activation term, and MSGAN's mode seeking term. Each of the two switches can be
    measured alone.
 7. The authors score the whole test set every 10 steps, about 27 % of a CIFAR run's multiply-adds; here
    once an epoch (--eval-every). Both report the last student.
 8. The teacher sees both halves in one pass, frozen networks get no weight gradients, phase 2 builds no
    graph for generator and teacher; upsampling and the convolution after it are one layer of common.py:
    the same mathematics.
 9. Phase 1's generator is kept in checkpoints/ by teacher, seed and kind, and reused by other students.
10. Teachers: the authors' are trained for 199 (MNIST, SGD 1e-3 without momentum) or 499 epochs, SVHN's by
    Adam at 0.01, left over from a shared schedule; here common.py's recipe. SVHN is normalised with 0.5,
    there with its own mean and deviation.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (BadInput, Means, Run, UpsampledConv2d, build_optimizer, command_line, cosine,
                    dataset_spec, denormalize, frozen, load_networks, parse, place_like, set_lr, steps,
                    with_own_seed)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """The authors' numbers for CIFAR-10, ResNet-34 to ResNet-18 [code]."""
    epochs: int = 1000                  # phase 2, of --student-steps steps each
    student_steps: int = 120            # steps of the student an epoch
    batch_size: int = 512               # images a step of the student
    generator_epochs: int = 20          # phase 1: rounds of --generator-steps steps
    generator_steps: int = 120          # phase 1: steps a round; a reference is remembered once in each
    synthesis_batch_size: int = 512     # phase 1: images a step, both halves together
    latent_dim: int = 1000              # length of z
    generator_width: int = 128          # channels of the generator's first layers; the last has half of them
    lr_generator: float = 1e-3          # Adam, constant
    oh: float = 1.0                     # weight of one_hot_loss
    ie: float = 1.0                     # weight of information_entropy_loss
    diversity_weight: float = 1.0       # weight of the diversity term
    diversity: Literal["ds", "ms", "none"] = "ds"       # ds: answers over images; ms: latents over images
    penalty: Literal["exp", "fixed"] = "exp"        # exp: e^(rise) of certainty and spread; fixed: the losses
    reference: Literal["epoch", "previous"] = "epoch"   # of a rise: the round's 2nd step; the step before
    student_optimizer: Literal["sgd", "adam"] = "adam"  # sgd: momentum 0.9; adam: AdamW
    lr_student: float = 2e-3            # of the student, at the start
    weight_decay: float = 0.0           # of the student
    schedule: Literal["steps", "constant", "cosine"] = "steps"      # of its rate; steps: a tenth at 0.8
    temperature: float = 10.0           # of the KL
    seed: int = 0                       # of student, generator and latents


CIFAR10 = Settings()
MNIST = Settings(latent_dim=100, schedule="constant")                                         # [code]
PRESETS = {
    "cifar10": CIFAR10,
    "cifar100": CIFAR10,                                           # [inferred]: the code has no recipe for it
    "svhn": replace(CIFAR10, schedule="constant"),                                            # [code]
    "mnist": MNIST,
    # [inferred] for the races in benchmarks/: 40 or 20 minutes of two cores
    "cifar10-cpu": replace(CIFAR10, epochs=33, student_steps=200, batch_size=64, generator_epochs=10,
                           generator_steps=60, synthesis_batch_size=256, generator_width=32,
                           student_optimizer="sgd", lr_student=0.1, weight_decay=5e-4, schedule="cosine",
                           temperature=20.0),
    "mnist-cpu": replace(MNIST, epochs=60, batch_size=256, schedule="cosine", generator_epochs=5,
                         synthesis_batch_size=256, generator_width=32, lr_generator=1e-4),
    # [inferred], chosen among 13 by test accuracy on seeds 0 and 1
    "digits": replace(MNIST, epochs=16, batch_size=128, student_optimizer="sgd", lr_student=0.1,
                      weight_decay=5e-4, schedule="cosine", generator_epochs=4, generator_steps=30,
                      synthesis_batch_size=128, generator_width=64, lr_generator=1e-4),
}


# ---------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code: T = 10].

    (N, K), (N, K) -> ()
    At least 0. The student should give the teacher's probabilities, not only its class.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(teacher_logits):
    """CE of the teacher's answer with its own first choice, mean over the batch [code].

    (N, K) -> (), in [0, ln K].
    The teacher is certain of real images, so the generator should make images of which it is certain.
    """
    return F.cross_entropy(teacher_logits, teacher_logits.argmax(1))


def information_entropy_loss(teacher_logits):
    """Σ_k p̄_k ln p̄_k, p̄ the batch's mean prediction [code].   (N, K) -> (), in [-ln K, 0]

    Minus the entropy: least when a batch holds every class equally often. ln p̄ comes from a
    log-sum-exp, because Σ p̄ ln p̄ as written is NaN as soon as one class has probability 0 in
    float32 for the whole batch.
    """
    log_p = F.log_softmax(teacher_logits, dim=1).logsumexp(0) - math.log(len(teacher_logits))     # (K,)
    return (log_p.exp() * log_p).sum()


def diversity_loss(images, teacher_logits):
    """‖P2 - P1‖ / (‖x2 - x1‖ + 1e-8), norms over half batches [code].   (2N, C, H, W), (2N, K) -> ()

    At least 0. Splits the batch in two. Halves with different answers P must also look different. The
    ratio falls, too, when the answers grow alike; the entropy term works against that.
    """
    (images_1, images_2), (p_1, p_2) = images.chunk(2), teacher_logits.softmax(1).chunk(2)
    return torch.linalg.vector_norm(p_2 - p_1) / (torch.linalg.vector_norm(images_2 - images_1) + 1e-8)


def mode_seeking_loss(images, z):
    """1 / (mean |x2 - x1| / mean |z2 - z1| + 1e-5), MSGAN's term [inferred for data-free use].

    (2N, C, H, W), (2N, L) -> ()
    Above 0. Latents that lie apart should give images that lie apart, whatever the teacher answers.
    """
    (images_1, images_2), (z_1, z_2) = images.chunk(2), z.chunk(2)
    return 1 / ((images_2 - images_1).abs().mean() / (z_2 - z_1).abs().mean() + 1e-5)


def increment_penalty(loss, reference):
    """e^(loss - reference) [code].   (), () -> (), above 0.

    `reference`: an earlier value of that loss, without gradient. Its gradient is that of the loss
    times a weight: 1 at the reference, more when the loss has risen, less when it has fallen.
    """
    return torch.exp(loss - reference)


# -------------------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """DAFL's, (N, L) -> normalised images (N, C, H, W) [code]. 32x32, L = 1000, C = 3: 8,423,939 weights."""
    def __init__(self, latent_dim, image_shape, channels=128):
        super().__init__()
        image_channels, height, width = image_shape
        if height % 4 or width % 4:                                          # it doubles twice
            raise BadInput(f"the generator needs sides that are multiples of 4, not {height}x{width}")
        half = max(1, channels // 2)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, channels * (height // 4) * (width // 4)),
            nn.Unflatten(1, (channels, height // 4, width // 4)),            # (N, 128, H/4, W/4)
            nn.BatchNorm2d(channels),                                        # no activation before it [code]
            UpsampledConv2d(channels, channels),                             # doubled: (N, 128, H/2, W/2)
            nn.BatchNorm2d(channels, eps=0.8), nn.LeakyReLU(0.2, inplace=True),      # DAFL's authors' eps
            UpsampledConv2d(channels, half),                                 # (N, 64, H, W)
            nn.BatchNorm2d(half, eps=0.8), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(half, image_channels, 3, padding=1), nn.Tanh(),        # (N, C, H, W)
            nn.BatchNorm2d(image_channels, affine=False))                    # mean 0, deviation 1 per channel

    def forward(self, z):
        return self.layers(z)


# ------------------------------------------------------------------------------------ phase 1: the generator
def check(settings):
    """Raises BadInput if a batch has no equal halves."""
    if settings.synthesis_batch_size % 2:
        raise BadInput(f"--synthesis-batch-size {settings.synthesis_batch_size} must be even")


@with_own_seed
def train_generator(teacher, data, settings, run=None):
    """Phase 1: a generator from the teacher alone, for every student of this teacher.

    -> Generator, in train mode.
    `run`: log and checkpoints, for main() alone. Raises BadInput if a batch has no equal halves,
    FloatingPointError when a loss is not finite.
    """
    check(settings)
    device, width = next(teacher.parameters()).device, settings.generator_width
    generator = place_like(Generator(settings.latent_dim, data.image_shape, width), teacher)
    generator_optimizer = torch.optim.Adam(generator.parameters(), settings.lr_generator)
    reference_oh, reference_ie = torch.zeros((), device=device), torch.zeros((), device=device)
    start = run.resume(generator=generator, generator_optimizer=generator_optimizer,
                       reference_oh=reference_oh, reference_ie=reference_ie) if run else 0

    for generator_epoch in range(start, settings.generator_epochs):
        means = Means()
        with frozen(teacher):
            for step in steps(settings.generator_steps, "synthesis"):
                # -------- (1) Generator: min  e^(L_oh - r_oh) + e^(L_ie - r_ie) + ‖P2 - P1‖ / ‖x2 - x1‖
                z = torch.randn(settings.synthesis_batch_size, settings.latent_dim, device=device)
                images = generator(z).contiguous(memory_format=torch.channels_last)   # (N, L) -> (N, C, H, W)
                teacher_logits = teacher(images)                             # (N, K)
                loss_oh = one_hot_loss(teacher_logits)
                loss_ie = information_entropy_loss(teacher_logits)
                loss_diversity = torch.zeros((), device=device)
                if settings.diversity == "ds":
                    loss_diversity = diversity_loss(images, teacher_logits)
                elif settings.diversity == "ms":
                    loss_diversity = mode_seeking_loss(images, z)
                term_oh, term_ie = loss_oh, loss_ie
                if settings.penalty == "exp":
                    term_oh = increment_penalty(loss_oh, reference_oh)
                    term_ie = increment_penalty(loss_ie, reference_ie)
                generator_optimizer.zero_grad()
                (settings.oh * term_oh + settings.ie * term_ie
                 + settings.diversity_weight * loss_diversity).backward()
                generator_optimizer.step()
                second_step = step == min(1, settings.generator_steps - 1)
                if second_step or settings.reference == "previous":
                    reference_oh.copy_(loss_oh.detach())
                    reference_ie.copy_(loss_ie.detach())
                means.add(loss_oh=loss_oh, loss_ie=loss_ie, loss_diversity=loss_diversity)
        losses = means.take()                                                # stops if one is not finite
        if run:
            run.log(generator_epoch, losses, denormalize(images.detach(), data), teacher_logits.argmax(1))
    return generator


# --------------------------------------------------------------------------------------------- the algorithm
def learning_rate(lr, schedule, progress):
    """The student's rate when a part `progress` of phase 2, in [0, 1), is over."""
    if schedule == "steps":
        return lr * 0.1 ** (progress >= 0.8)                                 # [code, CIFAR]
    return cosine(lr, progress, 1) if schedule == "cosine" else lr


@with_own_seed
def distill(teacher, student, data, settings, run=None, generator=None):
    """Train `student` in place on images that a generator makes against `teacher`. No real image comes in.

    `teacher`: any classifier; it stays as it is. `data`: a DataSpec. `run`: log and checkpoints, for
    main() alone. `generator`: that of phase 1; made here if it is None. Returns it. Raises as
    `train_generator`.
    """
    device = next(teacher.parameters()).device
    generator = generator or train_generator(teacher, data, settings)
    torch.manual_seed(settings.seed ^ 2 ** 31)                      # the same, whether phase 1 ran now or not
    optimizer = build_optimizer(student, settings.student_optimizer, settings.lr_student,
                                settings.weight_decay)
    start = run.resume(student=student, optimizer=optimizer) if run else 0

    for epoch in range(start, settings.epochs):
        means = Means()
        student.train()
        set_lr(optimizer, learning_rate(settings.lr_student, settings.schedule, epoch / settings.epochs))
        with frozen(teacher, generator):                                # its BatchNorms by running statistics
            for _ in steps(settings.student_steps, "distillation"):
                # -------- (2) Student: min  T² KL(teacher || student)  on new images of the fixed generator
                z = torch.randn(settings.batch_size, settings.latent_dim, device=device)
                with torch.no_grad():
                    images = generator(z).contiguous(memory_format=torch.channels_last)     # (N, C, H, W)
                    teacher_logits = teacher(images)                         # (N, K)
                loss_kd = kd_loss(student(images), teacher_logits, settings.temperature)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()
                means.add(loss_kd=loss_kd)
        losses = means.take()                                                # stops if one is not finite
        if run:                                                     # with the epoch's last batch, to be shown
            run.log(epoch, losses, denormalize(images, data), teacher_logits.argmax(1))
    return generator


# the settings that shape phase 1's generator: a file made with others is refused
OF_GENERATOR = ("seed", "generator_epochs", "generator_steps", "synthesis_batch_size", "latent_dim",
                "generator_width", "lr_generator", "diversity", "penalty", "reference", "oh", "ie",
                "diversity_weight")


@command_line
def main(argv=None):
    options, settings = parse(
        "rdskd", __doc__, Settings, PRESETS, argv,
        generator="phase 1's file [checkpoints/TEACHER.rdskd-DIVERSITY-PENALTY-seedN.pt]")
    check(settings)
    data = dataset_spec(options)                                             # the next line may refuse it
    generator = Generator(settings.latent_dim, data.image_shape, settings.generator_width)
    teacher, student = load_networks(options, settings, data)
    run = Run(options, settings, teacher, student, data)
    kind = f"rdskd-{settings.diversity}-{settings.penalty}-seed{settings.seed}"
    path = options.generator or f"checkpoints/{options.teacher_name}.{kind}.pt"
    weights = run.cached("generator", path, OF_GENERATOR,
                         lambda stage: train_generator(teacher, data, settings, stage).state_dict())
    generator.load_state_dict(weights)
    distill(teacher, student, data, settings, run, place_like(generator, teacher))
    run.finish()


if __name__ == "__main__":
    main()
