"""ZSKD: Zero-Shot Knowledge Distillation in Deep Networks.   Gaurav Kumar Nayak, Konda Reddy
Mopuri, Vaisakh Shaj, R. Venkatesh Babu, Anirban Chakraborty. ICML 2019, arXiv 1905.08114. Authors' code
(TensorFlow 1): github.com/vcl-iisc/ZSKD, commit 54c855f. A rival that RDSKD's paper names, in the
shape of a method file.

The idea. There is no generator. Each image is fitted by itself, from noise, until the teacher
answers with a softmax vector that was drawn for it. The vectors come from one Dirichlet
distribution a class. Its concentrations say which classes are alike in the teacher's last layer.
The student then learns from these "data impressions", strongly augmented, at temperature 20.

     last layer's weights ══► class similarity ══► Dirichlet ══► targets y
                                                                     ║
     x (pixels) ──► images ──► teacher ──► softmax(T(x) / τ) ──► CE ◄╝
         ▲                                                       │
         └─── gradient, through the frozen teacher, into x only ◄┘
     x ──► pool ──► moved ──► images ─┬──► teacher ══► logits ──┐
                                      └──► student ──► KL ◄─────┘ ──► student only (══► no gradient)

Run     python benchmarks/zskd.py --dataset digits      seeds 0-4, last epoch, made at commit
        c07d91b: student 80.67 ± 8.15 %, teacher 98.89 %
Copy    kd_loss, soft_ce_loss, class_similarity, concentrations, draw_targets, moved,
        synthesize_pool, distill
Letters T teacher, S student · x the pixels that are fitted, y their targets, τ temperature · α the
        concentrations of a Dirichlet, β their scale · N batch, K classes, C H W image, D features,
        M images in the pool.
Words   An impression is a fitted image. The pool holds all of them. An epoch is one pass over it.
Sources [code] the authors' code · [paper] through others' notes · [ports] Sharpiless/ZSKD-pytorch
        4fab2c6, ljrprocc/DataFree · [memory] unverified · [inferred] a choice made here.

Where paper, authors' code and this file differ
 1. Half of the targets are drawn with β = 1, half with 0.1 [paper]. In the authors' code 0.1 has no
    effect, because a later normalisation undoes it. The paper is followed.
 2. The code begins a class's next batch from the last one's images and Adam state, and a batch
    holds one class. Here every batch begins from noise and a fresh Adam, and classes and both β are
    mixed in it.
 3. The authors' rate of 0.001 moves a pixel by 1.5 at most in 1,500 steps. The ports take 3 and 2,
    on normalised images that begin as Gaussian noise. The presets cifar10 and mnist have the
    authors'.
 4. The code rescales the whole batch to [0, 1] after every step. Followed: images of one batch
    share that.
 5. The authors' augmentation draws from a list of scales, shifts, rotations, flips, transpositions
    and noises. Here one affine map and Gaussian noise an image cover scale, shift and rotation.
    Crop and flips come from the data set alone. There is no transposition and no salt and pepper
    [inferred].
 6. The student's soft cross-entropy [paper] and KL have the same gradient. KL is reported: 0 is a
    perfect copy.
"""
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (BadInput, Means, Run, augment, batches, build_optimizer, command_line, cosine,
                    dataset_spec, frozen, last_linear, load_networks, normalize, parse, set_lr, steps,
                    with_own_seed)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """CIFAR-10 [code], with AlexNet there; augmentation [inferred]."""
    epochs: int = 500                   # passes over the pool
    batch_size: int = 64                # the student's
    impressions: int = 40_000           # images in the pool, over all classes
    synthesis_batch_size: int = 100     # images fitted side by side; they share the rescaling to [0, 1]
    synthesis_steps: int = 1500         # steps on the pixels a batch
    lr_images: float = 1e-3             # Adam, on the pixels
    temperature: float = 20.0           # τ, of impressions and student
    augmentation: float = 1.0           # strength of scale, shift, turn and noise; 1: the authors' range
    student_optimizer: Literal["sgd", "adam"] = "adam"  # sgd: momentum 0.9; adam: AdamW
    lr_student: float = 1e-3            # of the student, at the start
    weight_decay: float = 0.0           # of the student
    schedule: Literal["constant", "cosine"] = "constant"  # of the student's rate; cosine: to 0
    seed: int = 0                       # of student, targets, noise and augmentation


CIFAR10 = Settings()
PRESETS = {
    "cifar10": CIFAR10,
    "mnist": replace(CIFAR10, impressions=24_000),                           # [memory]
    "mnist-cpu": replace(CIFAR10, epochs=40, batch_size=256, lr_student=2e-3, schedule="cosine",
                         impressions=20_000, synthesis_batch_size=500, synthesis_steps=200,
                         lr_images=0.1, augmentation=0.05),                   # [inferred], for the race
    "digits": replace(CIFAR10, epochs=40, lr_student=2e-3, schedule="cosine", impressions=2000,
                      synthesis_batch_size=500, synthesis_steps=100, lr_images=0.1,
                      augmentation=0.25),                                    # [inferred]
}


# ---------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """τ² KL(teacher || student) at temperature τ, mean over the batch [paper: τ = 20].

    (N, K), (N, K) -> (), at least 0. The student should give the teacher's probabilities, not only its class.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def soft_ce_loss(logits, targets, temperature):
    """CE between target distributions and softmax(logits / τ), mean over the batch [code].

    (N, K), (N, K) -> (), at least 0. The teacher should answer with the vector drawn for the image.
    """
    return -(targets * F.log_softmax(logits / temperature, dim=1)).sum(1).mean()


# ------------------------------------------------------------------------------------ the trick: the targets
def class_similarity(weight):
    """Cosine of the classes' weight vectors in the last layer [paper].   (K, D) -> (K, K), in [-1, 1]"""
    unit = F.normalize(weight, dim=1)
    return unit @ unit.T


def concentrations(similarity, scale):
    """α of each class's Dirichlet: a row of the similarity, stretched to [0, 1], times β [paper].

    Plus 1e-4 [code]: α must be above 0.   (K, K) -> (K, K)
    """
    low, high = similarity.min(1, keepdim=True).values, similarity.max(1, keepdim=True).values
    return scale * (similarity - low) / (high - low) + 1e-4


def draw_targets(weight, each):
    """`each` softmax vectors a class, half with β = 1 and half with 0.1 [paper].   (K, D) -> (K · each, K)

    A Dirichlet draw is a row of Gamma draws over its sum. With α = 1e-4 a Gamma draw is often 0 in
    float32, hence float64 and a clamp.
    """
    similarity = class_similarity(weight.detach().double().cpu())
    kinds = ((1.0, each - each // 2), (0.1, each // 2))
    alphas = torch.cat([concentrations(similarity, scale).repeat_interleave(count, 0)
                        for scale, count in kinds])                          # (K · each, K)
    draws = torch._standard_gamma(alphas).clamp(min=1e-30)
    return (draws / draws.sum(1, keepdim=True)).float()


def moved(pixels, strength):
    """Scale 0.6 to 1, shift up to 20 %, rotation up to ±90° and noise, all times `strength` [inferred].

    Drawn for each image.   pixels (N, C, H, W) in [0, 1] -> the same
    """
    draw = torch.rand(4, len(pixels), device=pixels.device)
    angle = (2 * draw[0] - 1) * strength * math.pi / 2
    zoom = 1 / (1 - 0.4 * strength * draw[1])          # the sampling grid grows where the picture shrinks
    shift = (2 * draw[2:] - 1) * 0.4 * strength        # of a side of 2
    matrix = torch.stack([torch.stack([zoom * angle.cos(), -zoom * angle.sin(), shift[0]], 1),
                          torch.stack([zoom * angle.sin(), zoom * angle.cos(), shift[1]], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(matrix, pixels.shape, align_corners=False)                       # (N, H, W, 2)
    pixels = F.grid_sample(pixels, grid, align_corners=False)
    return (pixels + 0.1 * strength * torch.randn(pixels.shape, device=pixels.device)).clamp(0, 1)


# --------------------------------------------------------------------------------------------- the algorithm
def images_of_a_class(settings, data):
    """How many impressions each class gets. Raises BadInput if there is none."""
    if settings.impressions < data.num_classes:
        raise BadInput(f"--impressions must be at least one a class, {data.num_classes}, not "
                       f"{settings.impressions}")
    return settings.impressions // data.num_classes


@with_own_seed
def synthesize_pool(teacher, data, settings, run=None):
    """All impressions, for every student of this teacher.   -> pixels (M, C, H, W) in [0, 1], targets (M, K)

    `run`: log and checkpoints, for main() alone. Raises BadInput if the teacher has no linear layer
    and for fewer impressions than classes, FloatingPointError when the loss is not finite.
    """
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    each = images_of_a_class(settings, data)
    targets = draw_targets(last_linear(teacher).weight, each)                # (M, K)
    targets = targets[torch.randperm(len(targets))].to(device)       # each batch has all classes and both β
    pixels = torch.rand(len(targets), *data.image_shape, device=device)
    start = run.resume(pixels=pixels) if run else 0
    for batch in range(start, math.ceil(len(targets) / n)):
        rows, means = slice(batch * n, (batch + 1) * n), Means()
        x = pixels[rows].clone().requires_grad_()                            # (N, C, H, W)
        optimizer = torch.optim.Adam([x], settings.lr_images)
        with frozen(teacher):
            for _ in steps(settings.synthesis_steps, "synthesis"):
                # -------- (1) Impressions: min  CE(y, softmax(T(x) / τ))  over the pixels
                loss_ce = soft_ce_loss(teacher(normalize(x, data)), targets[rows], settings.temperature)
                optimizer.zero_grad()
                loss_ce.backward()
                optimizer.step()
                low, high = x.data.aminmax()
                x.data = (x.data - low) / (high - low).clamp(min=1e-8)
                means.add(loss_ce=loss_ce)
        pixels[rows], losses = x.detach(), means.take()                      # stops if it is not finite
        if run:
            run.log(batch, losses, pixels[rows], targets[rows].argmax(1))
    return pixels, targets


@with_own_seed
def distill(teacher, student, data, settings, run=None, pool=None):
    """Train `student` in place on impressions of `teacher`, which stays as it is. No real image comes in.

    `data`: a DataSpec. `pool`: what `synthesize_pool` returned; made here if it is None. `run`: log
    and checkpoints, for main() alone. Returns the pool, pixels (M, C, H, W) in [0, 1] and targets
    (M, K). Raises as `synthesize_pool`.
    """
    device = next(student.parameters()).device
    pixels, targets = (part.to(device) for part in pool or synthesize_pool(teacher, data, settings))
    torch.manual_seed(settings.seed ^ 2 ** 31)                # the same, whether the pool was made now or not
    optimizer = build_optimizer(student, settings.student_optimizer, settings.lr_student,
                                settings.weight_decay)
    start = run.resume(student=student, optimizer=optimizer) if run else 0

    for epoch in range(start, settings.epochs):
        if settings.schedule == "cosine":
            set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        means, order = Means(), batches(len(pixels), settings.batch_size, device)
        student.train()
        with frozen(teacher):
            for batch in steps(math.ceil(len(pixels) / settings.batch_size), "distillation", order):
                # -------- (2) Student: min  τ² KL(teacher || student)  on moved impressions
                chosen = moved(augment(pixels[batch], data), settings.augmentation)    # (N, C, H, W)
                images = normalize(chosen, data)
                with torch.no_grad():
                    teacher_logits = teacher(images)                         # (N, K)
                loss_kd = kd_loss(student(images), teacher_logits, settings.temperature)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()
                means.add(loss_kd=loss_kd)
        losses = means.take()                                                # stops if it is not finite
        if run:
            run.log(epoch, losses, pixels, targets.argmax(1))
    return pixels, targets


# the settings that shape the pool: a file made with others is refused
OF_POOL = ("seed", "impressions", "synthesis_batch_size", "synthesis_steps", "lr_images", "temperature")


@command_line
def main(argv=None):
    options, settings = parse("zskd", __doc__, Settings, PRESETS, argv,
                              pool="the impressions' file [checkpoints/TEACHER.zskd-seedN.pt]")
    data = dataset_spec(options)
    images_of_a_class(settings, data)                                        # refuses too few now
    teacher, student = load_networks(options, settings, data, needs=last_linear)
    run = Run(options, settings, teacher, student, data)
    path = options.pool or f"checkpoints/{options.teacher_name}.zskd-seed{settings.seed}.pt"
    pool = run.cached("pool", path, OF_POOL, lambda stage: synthesize_pool(teacher, data, settings, stage))
    distill(teacher, student, data, settings, run, pool)
    run.finish()


if __name__ == "__main__":
    main()
