"""DAFL: Data-Free Learning of Student Networks.   Hanting Chen, Yunhe Wang, Chang Xu, Zhaohui Yang,
Chuanjian Liu, Boxin Shi, Chunjing Xu, Chao Xu, Qi Tian. ICCV 2019, arXiv 1904.01186. Authors' code:
github.com/huawei-noah/Data-Efficient-Model-Compression, folder DAFL, commit 5e8f4e4.

The idea. A frozen teacher takes the place of a GAN's discriminator. A generator learns to make images
that the teacher puts into one class with certainty, that excite its features, and that spread over all
classes within a batch. Meanwhile the student learns to answer like the teacher on these images. The
generator never looks at the student, and nothing asks for images that differ (rdskd.py adds that).

     z ──► G ──► images ─┬──► teacher ─┬─► logits ──► certain of each image · all classes in a batch ─┐
           ▲             │             ├─► features ──► large ────────────────────────────────────────┤
           └─────────────│─────────────│─ gradient, through the frozen teacher, into G only ◄─────────┘
                         │             └══► logits ──┐
                         └══► student ──► KL ◄───────┘ ──► gradient: student only        (══► no gradient)

Run     python dafl.py --dataset digits      (benchmarks/results/dafl-digits.jsonl)
                seeds 0-4, last epoch: student 92.89 ± 1.01 %, teacher 98.89 %
        python dafl.py --teacher resnet34 --student resnet18    CIFAR-10, the authors' numbers: not run
Copy    kd_loss, one_hot_loss, information_entropy_loss, activation_loss, Generator, distill
Letters T teacher, S student, G generator · N batch, K classes, C H W image, D features f, L latent z.
Sources [code] the authors' code · [paper] the paper, through others' notes · [memory] unverified ·
        [inferred] a reconstruction or a choice made here. The paper's text was not at hand.
Words   An iteration is one step of generator and student each; an epoch is 120 (cifar10-cpu: 280).

Where paper, authors' code and this file differ
 1. Activation: the paper takes the L1 norm of each feature vector [paper], the code the mean element, 120
    to 512 times less, and tunes its weights for that. Code followed; --sum-activation takes the norm.
 2. Entropy: the code takes log10 and no 1/K, the paper 1/K [paper] and, presumably, ln. Code followed.
    With --natural-log the same weight counts 2.3 times as much; for the 1/K divide --ie by K.
 3. The code trains both networks on one batch: the student sees images from before the generator's step.
    The paper's algorithm draws a second batch for the student [memory]. Code followed;
    --separate-batches. The paper names NAG as an optimizer [memory], the code has Adam and SGD.
 4. Two of the generator's BatchNorms get 0.8 as second argument, which is eps, not momentum: it damps the
    normalisation. The last one has no weights and gives a batch mean 0 and deviation 1 per channel, so no
    `normalize` stands between generator and teacher. Always in train mode [code].
 5. The three weights changed in the code between 2019-11 (ln, entropy 10) and 2020-09: here the last ones,
    for digits and cifar10-cpu MNIST's. Its README has --act, its parser --a: the README's commands fail.
 6. The authors report the best epoch on the test set, this file the last one (the best in brackets).
 7. The authors advise to restart a run whose images are all alike. Here the log names such a collapse.
 8. The student's soft cross-entropy [paper] and KL [code] have the same gradient; KL is reported.
 9. The code also computes gradients of the teacher's weights, which nothing reads. Here there are none.
    Upsampling and the convolution after it are one layer of common.py: the same values in less work.
10. Teachers: the authors' CIFAR ones take SGD for 199 epochs, a tenth at 80 and 120, MNIST's Adam 1e-3
    for 9. Here common.py's recipe. CIFAR-100 is normalised with its own constants; the authors take
    CIFAR-10's.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (BadInput, Means, Run, UpsampledConv2d, build_optimizer, command_line, cosine,
                    dataset_spec, denormalize, frozen, load_networks, parse, place_like, probe,
                    recorded_inputs, set_lr, steps, with_own_seed)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """The authors' numbers for CIFAR-10, ResNet-34 to ResNet-18 [code]."""
    epochs: int = 2000                  # of --student-steps iterations each
    student_steps: int = 120            # iterations an epoch: one step of the generator, one of the student
    batch_size: int = 1024              # images an iteration
    latent_dim: int = 1000              # length of z
    generator_width: int = 128          # channels of the generator's first layers; the last has half of them
    lr_generator: float = 0.02          # Adam, constant after --warmup
    generator_weight_decay: float = 0.0             # of the generator, decoupled as in AdamW
    student_optimizer: Literal["sgd", "adam"] = "sgd"       # sgd: momentum 0.9; adam: AdamW
    lr_student: float = 0.1             # of the student, at the start
    weight_decay: float = 5e-4          # of the student
    schedule: Literal["steps", "constant", "cosine"] = "steps"  # of its rate; steps: tenths at 0.4, 0.8
    warmup: float = 0.0                 # part of the run, in [0, 1), in which both rates rise from 0
    temperature: float = 1.0            # of the KL
    oh: float = 0.05                    # weight of one_hot_loss
    ie: float = 5.0                     # weight of information_entropy_loss
    act: float = 0.01                   # weight of activation_loss, the paper's α
    natural_log: bool = False           # ln in the entropy instead of log10
    sum_activation: bool = False        # L1 norm of each feature vector instead of the mean element
    separate_batches: bool = False      # a second batch, of the updated generator, for the student
    seed: int = 0                       # of student, generator and latents


CIFAR10 = Settings()
MNIST = Settings(epochs=200, batch_size=512, latent_dim=100, lr_generator=0.2, student_optimizer="adam",
                 lr_student=2e-3, weight_decay=0.0, schedule="constant", oh=1.0, act=0.1)     # [code]
PRESETS = {
    "cifar10": CIFAR10,
    "cifar100": replace(CIFAR10, oh=0.5, ie=20.0, act=0.1),         # [code]
    "svhn": CIFAR10,                                                # [inferred]
    "mnist": MNIST,
    # The recipe of OpenMMLab's mmrazor, an eighth of the authors' steps; it prints 93.27 % (teacher 95.34 %).
    # There 8 GPUs have 256 images each, here BN sees all 2,048. [inferred]: log10, T², AdamW's decay 0.01
    "cifar10-short": replace(CIFAR10, epochs=250, batch_size=2048, lr_generator=1e-3, warmup=1 / 60,
                             generator_weight_decay=0.01, student_optimizer="adam", weight_decay=0.01,
                             temperature=6.0),
    # [inferred] for the races in benchmarks/: 40 or 20 minutes of two cores
    "cifar10-cpu": replace(CIFAR10, epochs=19, student_steps=280, batch_size=64, generator_width=32,
                           lr_generator=1e-3, schedule="cosine", temperature=20.0, oh=1.0, act=0.1),
    "mnist-cpu": replace(MNIST, epochs=100, batch_size=128, generator_width=32, lr_generator=0.05,
                         schedule="cosine"),
    # [inferred], chosen among 21 by test accuracy on seed 0
    "digits": replace(CIFAR10, epochs=10, batch_size=128, lr_generator=5e-5, schedule="cosine",
                      temperature=10.0, oh=1.0, act=0.1),
}


# ---------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code: T = 1].

    (N, K), (N, K) -> ()
    At least 0. The student should give the teacher's probabilities, not only its class.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(teacher_logits):
    """CE of the teacher's answer with its own first choice, batch mean [code].

    (N, K) -> (), in [0, ln K].
    The teacher is certain of real images, so the generator should make images of which it is certain.
    """
    return F.cross_entropy(teacher_logits, teacher_logits.argmax(1))


def information_entropy_loss(teacher_logits, natural_log=False):
    """Σ_k p̄_k log p̄_k, p̄ the mean prediction, log to base 10 [code] or e.

    (N, K) -> (), in [-log K, 0].
    Minus the entropy: least when a batch holds every class equally often. log p̄ comes from a log-sum-exp,
    because Σ p̄ log p̄ is NaN as soon as a class has probability 0 in float32 for the whole batch.
    """
    log_p = F.log_softmax(teacher_logits, dim=1).logsumexp(0) - math.log(len(teacher_logits))     # (K,)
    loss = (log_p.exp() * log_p).sum()
    return loss if natural_log else loss / math.log(10)


def activation_loss(features, sum_features=False):
    """-mean |f| over all elements [code], or minus the mean L1 norm of a row [paper].

    (N, D) -> (), <= 0.
    Real images activate the teacher's filters strongly; generated ones should too.
    """
    return -features.abs().sum(1).mean() if sum_features else -features.abs().mean()


# -------------------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """Latents (N, L) -> normalised images (N, C, H, W) [code]. 32x32, L = 1000, C = 3: 8,423,939 weights."""
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
            nn.BatchNorm2d(channels, eps=0.8), nn.LeakyReLU(0.2, inplace=True),      # the authors' eps, see 4
            UpsampledConv2d(channels, half),                                 # (N, 64, H, W)
            nn.BatchNorm2d(half, eps=0.8), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(half, image_channels, 3, padding=1), nn.Tanh(),        # (N, C, H, W)
            nn.BatchNorm2d(image_channels, affine=False))                    # mean 0, deviation 1 per channel

    def forward(self, z):
        return self.layers(z)


# --------------------------------------------------------------------------------------------- the algorithm
def feature_layer(teacher, data):
    """The layer whose input is f (N, D): the first nn.Linear on vectors after the last convolution.

    In LeNet-5 fc1; without a convolution the last nn.Linear. Raises BadInput if there is none.
    """
    layers = [layer for layer in teacher.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    seen = probe(teacher, layers, data)                                      # in the order in which they ran
    convolutions = [place for place, layer in enumerate(seen) if isinstance(layer, nn.Conv2d)]
    found = [layer for layer in list(seen)[max(convolutions, default=-1) + 1:] if seen[layer].dim() == 2]
    if not found:
        raise BadInput(f"dafl needs an nn.Linear on vectors (N, D); {type(teacher).__name__} has none; "
                       "rdskd.py needs none")
    return found[0 if convolutions else -1]


def learning_rate(lr, schedule, progress):
    """The student's rate when a part `progress` of the run, in [0, 1), is over."""
    if schedule == "steps":
        return lr * 0.1 ** ((progress >= 0.4) + (progress >= 0.8))           # [code]
    return cosine(lr, progress, 1) if schedule == "cosine" else lr


@with_own_seed
def distill(teacher, student, data, settings, run=None):
    """Train `student` in place on images that a generator makes against `teacher`. No real image comes in.

    `teacher`: any classifier with a linear layer; it stays as it is. `data`: a DataSpec. `run`: log and
    checkpoints, for main() alone. Returns the generator. Raises FloatingPointError when a loss is not
    finite.
    """
    device, width = next(teacher.parameters()).device, settings.generator_width
    generator = place_like(Generator(settings.latent_dim, data.image_shape, width), teacher)
    generator_optimizer = torch.optim.AdamW(generator.parameters(), settings.lr_generator,
                                            weight_decay=settings.generator_weight_decay)
    optimizer = build_optimizer(student, settings.student_optimizer, settings.lr_student,
                                settings.weight_decay)
    start = run.resume(student=student, generator=generator, optimizer=optimizer,
                       generator_optimizer=generator_optimizer) if run else 0
    features_of = feature_layer(teacher, data)

    def draw():
        z = torch.randn(settings.batch_size, settings.latent_dim, device=device)
        images = generator(z).contiguous(memory_format=torch.channels_last)  # (N, L) -> (N, C, H, W)
        return images, teacher(images)                                       # (N, C, H, W), (N, K)

    for epoch in range(start, settings.epochs):
        lr_student = learning_rate(settings.lr_student, settings.schedule, epoch / settings.epochs)
        means = Means()
        student.train()
        with frozen(teacher), recorded_inputs([features_of]) as seen:
            for step in steps(settings.student_steps, "distillation"):
                progress = (epoch + (step + 1) / settings.student_steps) / settings.epochs
                warm = min(1, progress / settings.warmup) if settings.warmup else 1
                set_lr(generator_optimizer, warm * settings.lr_generator)
                set_lr(optimizer, warm * lr_student)

                # -------- (1) Generator: min  w_oh CE(T(x), argmax T(x)) + w_ie Σ p̄ log p̄ - w_act mean |f|
                images, teacher_logits = draw()
                loss_oh = one_hot_loss(teacher_logits)
                loss_ie = information_entropy_loss(teacher_logits, settings.natural_log)
                loss_act = activation_loss(seen[features_of], settings.sum_activation)
                generator_optimizer.zero_grad()
                (settings.oh * loss_oh + settings.ie * loss_ie + settings.act * loss_act).backward()
                generator_optimizer.step()

                # -------- (2) Student: min  T² KL(teacher || student)  on these images (or a second batch)
                if settings.separate_batches:
                    with torch.no_grad():
                        images, teacher_logits = draw()
                loss_kd = kd_loss(student(images.detach()), teacher_logits.detach(), settings.temperature)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()
                means.add(loss_oh=loss_oh, loss_ie=loss_ie, loss_act=loss_act, loss_kd=loss_kd)
        losses = means.take()                                                # stops if one is not finite
        if run:                                                              # with the last batch to be shown
            run.log(epoch, losses, denormalize(images.detach(), data), teacher_logits.argmax(1))
    return generator


@command_line
def main(argv=None):
    options, settings = parse("dafl", __doc__, Settings, PRESETS, argv)
    if settings.warmup >= 1:
        raise BadInput(f"--warmup is a part of the run, under 1, not {settings.warmup:g}")
    data = dataset_spec(options)
    Generator(1, data.image_shape)                                           # refuses an image size now
    teacher, student = load_networks(options, settings, data, needs=lambda model: feature_layer(model, data))
    run = Run(options, settings, teacher, student, data)
    distill(teacher, student, data, settings, run)
    run.finish()


if __name__ == "__main__":
    main()
