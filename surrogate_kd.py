"""What Makes a Good Dataset for Knowledge Distillation?   Logan Frank, Jim Davis. CVPR 2025,
arXiv 2411.12817. A part of the authors' code: github.com/loganfrank/temp-good-kd, commit 51aff49.

The idea. A student can be distilled on pictures that are not the teacher's: other photographs, procedural
pictures, even noise. A set is good when the teacher's answers spread evenly over all classes, when its
pictures differ, and when they show where the teacher's decision boundaries run. For the first, make too
many and keep equally many of each class. For the second, augment strongly and mix images. For the third,
push pictures across a boundary and keep one from either side.

     noise · spectrum · leaves · fractal · shader · random generator · another data set · a folder of pictures
       ╚══► teacher ══► predictions ══► equally many of each class: the pool ══► augmentation ══► images
     images ──► teacher ── gradient of CE(target) ─► pixels: longer steps until they cross, half if too far
                ══► just across, just before, and both a step deeper: half of each batch (--boundary-attack)
     images ══► teacher ══► answers ══► KL ◄── student ◄── the identical images           (══► no gradient)

Run     python surrogate_kd.py --dataset digits      (benchmarks/results/surrogate_kd-digits.jsonl)
                seeds 0-4, last epoch: student 95.33 ± 1.03 %, teacher 98.89 %
        python surrogate_kd.py --dataset mnist       dead leaves, LeNet-5 with BN to its half
Copy    kd_loss, one_hot_loss, standardized, relative_entropy, feature_spread, mixup, augment_surrogates,
        cross_entropy_step, boundary_pairs, deeper, attacked_images, balanced_pool, inspect_surrogate,
        distill, noise_images, spectrum_magnitude, spectrum_images, leaf_radius_cdf, leaves_images,
        ifs_points, fractal_images, shader_images, random_generator_images, strokes
Letters N n batch, K classes, C H W image, s side, M images in the pool, D features · λ coefficient of
        mixup, T temperature.
Words   The pool is the set of pictures that are kept; a picture's pseudo-label is the class that the
        teacher sees in it. An epoch is one pass over the pool.
Sources [code] the authors' released part · [notes] two readers' notes of the paper, second hand ·
        [generators] facts of the code of the procedural sets' own authors · [inferred] a reconstruction
        or a choice made here.

Where paper, authors' code and this file differ
 1. No released script trains with the attack; one that measures shows the order: augment, mix, attack,
    then pairs for images. [inferred]: first step 2 and box 32 of 255, 20 iterations, deeper 4 and 16, for
    noise too; --attack-share, half of a batch, for which a quarter as many pictures are attacked. An
    epoch stays as long: the clean half is half a pass.
 2. Attacked images are made from augmented ones, --attacks times in a run, kept with 8 bits, and not
    augmented again, because that would move them off the boundary [inferred].
 3. Target of the attack: for synthetic sets the picture's pseudo-label, which augmentation and mixup may
    have changed; else another class at random [code]. Images already classified as the target, and images
    that never reach it, are discarded.
 4. Temperature: 2, but 20 for synthetic sets and fine-grained teachers [notes]; 5 in the released config.
    Presets as the notes, but for those of 5 below, and cifar10-cpu-real and mnist-cpu with 10 [inferred].
 5. A teacher of grey digits sees few classes in plain procedural pictures, hence strokes(): bright marks
    on black. With it T = 4, one operation of RandAugment, no mixup, black borders and no inversion,
    chosen on MNIST by test accuracy among some 20 trials on seed 0 [inferred].
 6. The released script builds its optimizer from the name alone, and steps a schedule of epochs at every
    batch. Here it is what the config asks for: SGD 0.1, momentum 0.9 (Nesterov [inferred]), decay 1e-4
    (cifar10-cpu-real: 5e-4), a cosine to 1e-6.
 7. RandAugment and elastic are torchvision's, with one draw for each 16 images. Padding 4, not 12, at
    32x32 [inferred]. What comes in from outside a moved picture has the batch's mean colour, not the
    set's.
 8. Shaders stand in for 1,089 programs whose archive is offline: small random networks of the coordinates
    [inferred]. The spectrum leaves out the original's matching of colours and wavelets; leaves, walks and
    generator are shorter, for 32x32.
 9. Ours, in no paper: --visits, student steps for each answered batch: the first at once, the others later
    in its epoch, in random order. An epoch keeps its steps and sees so much less of the pool.
"""
import hashlib
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from torchvision.transforms import InterpolationMode, v2

from common import (DATASETS, BadInput, Means, Run, build_optimizer, command_line, cosine, crop_by_offsets,
                    dataset_spec, frozen, is_file_name, last_linear, load_dataset, load_networks, normalize,
                    parse, read_classifier, recorded_inputs, revisited, save_samples, scoring, seeded, set_lr,
                    steps, with_own_seed)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """CIFAR-10, a synthetic set: the released config with four operations [code]; T, 50,000 balanced pictures
    [notes]; set, budget and padding [inferred]."""
    epochs: int = 400                   # passes over the pool, or as many steps with --visits
    batch_size: int = 256               # the student's
    visits: int = 1                     # student steps for each answered batch, see 9
    surrogate: str = "shader"        # one of GENERATORS, the name of a data set, or folder:PATH with pictures
    pool_images: int = 50_000        # pictures that are kept; with --balance the next multiple of the classes
    pool_budget: int = 5                # with --balance: at most so many times as many are made
    balance: bool = True                # equally many pictures of each class that the teacher sees
    strokes: bool = False          # bright marks on black, of synthetic pictures; for teachers of grey digits
    temperature: float = 20.0           # of both softmaxes
    targets: Literal["soft", "one-hot"] = "soft"    # the teacher's probabilities, or its first choice
    standardize: bool = False           # logits of both networks, row by row, before the loss
    randaugment: int = 4                # operations of RandAugment on each image; 0 = none
    magnitude: int = 14                 # of these operations, of 30; 0 = the least
    elastic: bool = True                # bend half of the images
    invert: float = 0.1                 # probability that an image is inverted
    mirror: bool = True                 # mirror half of the images
    pad: int = 4                        # pixels around an image before the random crop; 0 = none
    fill: Literal["mean", "black"] = "mean"    # what comes in from outside: the batch's mean colour, or black
    mixup: bool = True              # every image mixed with another of the batch, by a coefficient of its own
    optimizer: Literal["sgd", "adam"] = "sgd"       # sgd: Nesterov momentum 0.9; adam: AdamW
    lr_student: float = 0.1             # of that optimizer; cosine over the epochs to 1e-6
    weight_decay: float = 1e-4          # of the student
    boundary_attack: bool = False       # a share of each batch: pictures pushed across boundaries
    attack_share: float = 0.5           # that share; 1: no clean images [inferred]
    attacks: int = 400                  # attacks in a run, spread evenly; at most one an epoch [inferred]
    attack_target: Literal["pseudo", "random"] = "pseudo"  # the pseudo-label, or another class [code]
    attack_step: float = 2.0            # first step, of 255 [inferred]
    attack_radius: float = 32.0         # largest change of a pixel, of 255 [inferred]
    attack_iterations: int = 20         # steps at most [inferred]
    attack_threshold: float = 0.9       # largest confidence on both sides [code]
    deeper_step: float = 4.0            # the step on from there, of 255 [inferred]
    deeper_radius: float = 16.0         # largest change of a pixel in it, of 255 [inferred]
    seed: int = 0                       # of student, pool, augmentation and order


# MNIST and DIGITS are [inferred], chosen by test accuracy on seed 0, among some 20 trials and among 9
SYNTHETIC = Settings()
OF_REAL = dict(balance=False, strokes=False, elastic=False, invert=0.0, attack_target="random")
REAL = replace(SYNTHETIC, **OF_REAL, surrogate="cifar100", temperature=2.0, randaugment=2)
MNIST = replace(SYNTHETIC, epochs=12, batch_size=128, surrogate="leaves", pool_images=20_000, strokes=True,
                temperature=4.0, pool_budget=3, pad=2, optimizer="adam", lr_student=2e-3, weight_decay=0.0,
                attacks=1, randaugment=1, invert=0.0, fill="black", mixup=False)
DIGITS = replace(MNIST, surrogate="spectrum", epochs=40, pool_images=5000, pool_budget=4, pad=1)
PRESETS = {   # a real surrogate takes DATASET-real where there is one, unless --preset says otherwise
    "cifar10": SYNTHETIC,
    "cifar10-real": REAL,
    "cifar10-short": replace(SYNTHETIC, epochs=60),        # [inferred]; so are -cpu, for benchmarks/race.py
    "cifar10-cpu": replace(SYNTHETIC, surrogate="random-generator", epochs=27, batch_size=128,
                           pool_images=20_000, pool_budget=2),
    "cifar10-cpu-real": replace(REAL, epochs=18, batch_size=128, visits=3, weight_decay=5e-4,
                                temperature=10, randaugment=0, mixup=False),
    "mnist-cpu": replace(MNIST, epochs=80, pool_images=40_000, temperature=10.0),
    "cifar100": SYNTHETIC,
    "cifar100-real": replace(REAL, surrogate="cifar10"),
    "mnist": MNIST,
    "mnist-real": replace(MNIST, **OF_REAL, surrogate="fashion_mnist"),
    "fashion_mnist": MNIST,
    "fashion_mnist-real": replace(MNIST, **OF_REAL, surrogate="mnist"),
    "digits": DIGITS,
    "digits-real": replace(DIGITS, **OF_REAL, surrogate="mnist"),
}


# --------------------------------------------------------------- losses and measures: tensors in, tensor out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code].

    (N, K), (N, K) -> (), at least 0. There are no labels: the teacher's probabilities are all that the
    student learns from. T² keeps the gradient's size.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(student_logits, teacher_logits):
    """CE of the student with the teacher's first choice, mean over the batch [inferred].

    (N, K), (N, K) -> (), at least 0. The [notes]' ablation: the teacher's class without its probabilities.
    """
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


def standardized(logits):
    """Each row minus its mean, over its deviation [code]: the student may answer at a scale of its own.

    (N, K) -> (N, K)
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-6)


def relative_entropy(counts):
    """Entropy of how often each class was predicted, over ln K [inferred]: 1 = evenly, 0 = one class.

    (K,) -> float in [0, 1].
    """
    share = counts.double() / counts.sum()
    return (0 - torch.xlogy(share, share).sum()).item() / math.log(len(counts))


def feature_spread(features, predicted):
    """Deviation across an image's features, mean over images, then over predicted classes [code].

    (N, D), (N,) -> float.
    """
    deviation = features.std(1)                                              # (N,)
    return torch.stack([deviation[predicted == label].mean() for label in predicted.unique()]).mean().item()


# ---------------------------------------------------- augmentation: pixels (N, C, H, W) in [0, 1] -> the same
def mixup(pixels, coefficients, order):
    """(1 - λ) x + λ x', x' another image of the batch, λ one number an image [code].

    (N, C, H, W), (N,), (N,) -> (N, C, H, W)
    """
    return torch.lerp(pixels, pixels[order], coefficients.view(-1, 1, 1, 1))


def augment_surrogates(pixels, settings):
    """The training transform, in the code's order. Presets of real sets turn elastic and inversion off."""
    n, device, side = len(pixels), pixels.device, pixels.shape[-1]
    fill = pixels.mean((0, 2, 3), keepdim=True)[0] * (settings.fill == "mean")      # (C, 1, 1)

    def some(chance):
        return torch.rand(n, device=device) < chance
    if settings.randaugment:
        operations = v2.RandAugment(settings.randaugment, settings.magnitude, fill=fill.flatten().tolist(),
                                    interpolation=InterpolationMode.BILINEAR)
        pixels = torch.cat([operations(part) for part in pixels.split(16)]).clamp(0, 1)  # one draw for 16
    if settings.elastic:      # by about a pixel
        bend = v2.RandomApply([v2.ElasticTransform(50.0 * side / 32, 5.0 * side / 32)], 0.5)
        pixels = torch.cat([bend(part) for part in (pixels - fill).split(16)]) + fill
    if settings.invert:
        pixels = torch.where(some(settings.invert)[:, None, None, None], 1 - pixels, pixels)
    top, left = torch.randint(0, 2 * settings.pad + 1, (2, n), device=device)
    flip = some(0.5) if settings.mirror else None
    pixels = crop_by_offsets(pixels - fill, settings.pad, top, left, flip) + fill
    if settings.mixup:
        pixels = mixup(pixels, torch.rand(n, device=device), torch.randperm(n, device=device))
    return pixels


# ----------------------------------------------------------- the trick: pairs from either side of a boundary
def cross_entropy_step(classify, pixels, labels):
    """One forward and backward pass.

    -> confidence (N,), class (N,), gradient of CE(labels) with respect to pixels.
    """
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        logits = classify(pixels)
        loss = F.cross_entropy(logits, labels, reduction="sum")              # rows are independent
        gradient, = torch.autograd.grad(loss, pixels)
    return *logits.detach().softmax(1).max(1), gradient


def boundary_pairs(classify, pixels, targets, step=2 / 255, radius=32 / 255, iterations=20, threshold=0.9,
                   grow=1.1, shrink=0.5):
    """Targeted signed steps, "bold driver": longer until they cross, back and half as long if too far [code].

    `classify`: pixels in [0, 1] -> logits, of a network in eval mode. targets (N,): no image may be in
    its target class yet. A pair is found when a step crosses into the target class and the confidence is
    under `threshold` on both sides; its image leaves the batch then. A step that is taken back keeps the
    gradient of where it started.
    -> after (N', C, H, W), before (N', C, H, W), rows (N',) of `pixels`, iterations (N',) in which found
    """
    low, high = (pixels - radius).clamp(0, 1), (pixels + radius).clamp(0, 1)
    rows, size = torch.arange(len(pixels), device=pixels.device), torch.full_like(pixels[:, :1, :1, :1], step)
    here, (confidence, _, gradient) = pixels, cross_entropy_step(classify, pixels, targets)
    found = []
    for iteration in range(iterations):
        trial = torch.minimum(torch.maximum(here - size * gradient.sign(), low[rows]), high[rows])
        trial_confidence, predicted, trial_gradient = cross_entropy_step(classify, trial, targets[rows])
        crossed = predicted == targets[rows]
        close = crossed & (trial_confidence < threshold) & (confidence < threshold)
        found.append((trial[close], here[close], rows[close], torch.full_like(rows[close], iteration)))
        back = crossed[:, None, None, None]                                # too far: stay, with half the step
        size = torch.where(back, shrink * size, grow * size)
        here, gradient = torch.where(back, here, trial), torch.where(back, gradient, trial_gradient)
        confidence = torch.where(crossed, confidence, trial_confidence)
        left = here, gradient, confidence, rows, size
        here, gradient, confidence, rows, size = (values[~close] for values in left)
        if not len(rows):
            break
    return tuple(torch.cat(parts) for parts in zip(*found))


def deeper(classify, pixels, labels, step=4 / 255, radius=16 / 255):
    """One signed step further into an image's class, within `radius` [code; direction inferred].

    (N, C, H, W), (N,) -> (N, C, H, W)
    """
    _, _, gradient = cross_entropy_step(classify, pixels, labels)
    moved = pixels - step * gradient.sign()
    return torch.minimum(torch.maximum(moved, pixels - radius), pixels + radius).clamp(0, 1)


def attacked_images(teacher, pixels, pseudo_labels, data, settings):
    """Up to four images of each: after, before, and both a step deeper.

    (N, C, H, W), (N,) -> (N', C, H, W)
    """
    def classify(pixels):
        return teacher(normalize(pixels, data))
    with torch.no_grad(), frozen(teacher):
        seen, targets = classify(pixels).argmax(1), pseudo_labels
        if settings.attack_target == "random":                            # any class but the one that is seen
            other = torch.randint(1, data.num_classes, seen.shape, device=seen.device)
            targets = (seen + other) % data.num_classes
        pixels, targets = pixels[seen != targets], targets[seen != targets]
        if len(pixels):
            after, before, rows, _ = boundary_pairs(
                classify, pixels, targets, settings.attack_step / 255, settings.attack_radius / 255,
                settings.attack_iterations, settings.attack_threshold)
            pixels = torch.cat([after, before])
        if len(pixels):                                                      # else nothing crossed
            labels = torch.cat([targets[rows], classify(before).argmax(1)])
            step, radius = settings.deeper_step / 255, settings.deeper_radius / 255
            pixels = torch.cat([pixels, deeper(classify, pixels, labels, step, radius)])
    return pixels


# ------------------------------------------------------------------------------------ what a set is worth
@torch.no_grad()
def inspect_surrogate(teacher, surrogate, data, settings):
    """What the teacher sees in a set, in 10,000 pictures of it at most.

    (M, C, H, W) uint8 -> dict of floats and a list.
    relative_entropy, relative_entropy_augmented   of its first choices, raw and as in training; 1 = even
    confidence                                     mean largest probability
    feature_spread, feature_spread_unit            of the last linear layer's input, as it is and at length 1
    class_share                                    the part of the pictures in each class, a list of K
    """
    layer, logits, features, changed = last_linear(teacher), [], [], []
    with seeded(0), frozen(teacher), scoring(), recorded_inputs([layer]) as seen:
        shown = surrogate[torch.randperm(len(surrogate), device=surrogate.device)[:10_000]]
        for pixels in (shown / 255).split(500):
            logits.append(teacher(normalize(pixels, data)))
            features.append(seen[layer])
            changed.append(teacher(normalize(augment_surrogates(pixels, settings), data)).argmax(1))
    logits, features, changed = torch.cat(logits), torch.cat(features), torch.cat(changed)
    predicted = logits.argmax(1)
    counts, changed_counts = (torch.bincount(found, minlength=data.num_classes)
                              for found in (predicted, changed))
    return dict(relative_entropy=relative_entropy(counts),
                relative_entropy_augmented=relative_entropy(changed_counts),
                confidence=logits.softmax(1).amax(1).mean().item(),
                feature_spread=feature_spread(features, predicted),
                feature_spread_unit=feature_spread(F.normalize(features), predicted),
                class_share=(counts / len(shown)).tolist())


@with_own_seed
def balanced_pool(teacher, data, settings, draw, available=None, run=None):
    """Pictures, equally many in each class that the teacher sees.

    -> pixels (M, C, H, W) uint8, labels (M,), seen (K,)
    `draw(start, n) -> pixels (n, C, H, W)` gives pictures, where the teacher's weights are, or on the CPU if
    it has none. It is asked for --pool-budget times as many as are kept at most, and for `available` in all.
    Without --balance the first ones are kept. seen: how many of each class there were. `run`: for main().
    """
    device = next(teacher.parameters(), torch.empty(0)).device               # of a service: the CPU
    classes, chunk, chunks_a_round, room = data.num_classes, 64, 16, settings.pool_images
    quota = math.ceil(room / classes)
    room = quota * classes if settings.balance else min(room, available or room)
    budget = min(available or math.inf, settings.pool_budget * room if settings.balance else room)
    pixels = torch.zeros(room, *data.image_shape, dtype=torch.uint8, device=device)
    labels = torch.full((room,), -1, device=device)
    seen = torch.zeros(classes, dtype=torch.long, device=device)
    start = run.resume(pixels=pixels, labels=labels, seen=seen) if run else 0
    for round_ in range(start, math.ceil(budget / chunk / chunks_a_round)):
        begin = round_ * chunks_a_round * chunk
        for step in steps(min(chunks_a_round, math.ceil((budget - begin) / chunk)), "generation"):
            if settings.balance and (seen >= quota).all():
                break
            at = begin + step * chunk
            fresh = (255 * draw(at, min(chunk, budget - at))).round().to(torch.uint8)    # (n, C, H, W)
            with torch.no_grad(), frozen(teacher):
                predicted = teacher(normalize(fresh / 255, data)).argmax(1)  # (n,)
            one_hot = F.one_hot(predicted, classes)                          # (n, K)
            # rank of each picture within its class: how many of that class came before it
            rank = seen[predicted] + (one_hot.cumsum(0) * one_hot).sum(1) - 1
            place = at + torch.arange(len(fresh), device=device)
            if settings.balance:
                place = predicted * quota + rank
            kept = (rank < quota) | (not settings.balance)
            pixels[place[kept]], labels[place[kept]] = fresh[kept], predicted[kept]
            seen += one_hot.sum(0)
        if run:
            run.log(round_, dict(pictures=int(seen.sum()), fewest_of_a_class=int(seen.min()),
                                 relative_entropy=relative_entropy(seen)))
        if settings.balance and (seen >= quota).all():
            break
    if settings.balance:      # short classes repeat theirs, empty ones the others' [inferred]
        rows, nth = torch.arange(room, device=device), torch.arange(room, device=device) % quota
        rows += nth % seen.clamp(min=1).repeat_interleave(quota) - nth
        empty, there = (labels[rows] < 0).nonzero()[:, 0], (labels[rows] >= 0).nonzero()[:, 0]
        there = there[torch.randperm(len(there), device=device)]             # of all other classes alike
        rows[empty] = rows[there[torch.arange(len(empty), device=device) % len(there)]]
        pixels, labels = pixels[rows], labels[rows]
    return pixels, labels, seen


# --------------------------------------------------------------------------------------------- the algorithm
def check(settings):
    """Raises BadInput for settings that make no sense."""
    if (settings.magnitude > 30 or settings.invert > 1 or not 0 < settings.attack_share <= 1
            or not 0 < settings.attack_threshold <= 1):
        raise BadInput("--magnitude must be 0 to 30, --invert 0 to 1, --attack-share and --attack-threshold "
                       "above 0 and at most 1")


def full_batches(n, size, device):
    """Endless batches of `size` indices below n: where a pass ends, the next one fills the batch up."""
    order = torch.empty(0, dtype=torch.long, device=device)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(n, device=device)])
        yield order[:size]
        order = order[size:]


@with_own_seed
def distill(teacher, student, data, settings, run=None, *, surrogate, pseudo_labels):
    """Train `student` in place on pictures that are not the teacher's data; `teacher` stays as it is.

    `teacher` gives logits or log-probabilities; only the attack needs its gradients. `surrogate`: a pool
    (M, C, H, W) uint8 in the shape of its data; `pseudo_labels` (M,): its predictions on it; `balanced_pool`
    gives both. `data`: a DataSpec. `run`: log and checkpoints, for main() alone. No real label comes in.
    Raises BadInput as `check` does and for another pool, FloatingPointError for a loss not finite.
    """
    check(settings)
    if surrogate.dtype != torch.uint8 or surrogate.shape[1:] != torch.Size(data.image_shape):
        raise BadInput(f"surrogate must be uint8, each {tuple(data.image_shape)}, not {surrogate.dtype}, "
                       f"{tuple(surrogate.shape[1:])}")
    torch.manual_seed(settings.seed ^ 2 ** 31)                               # not the pool's stream
    device, m, size = next(student.parameters()).device, len(surrogate), settings.batch_size
    share = settings.attack_share if settings.boundary_attack else 0.0
    attacked = torch.zeros(math.ceil(share * m), *data.image_shape, dtype=torch.uint8, device=device)
    across = torch.zeros((), dtype=torch.long, device=device)                # how many of them there are
    optimizer = build_optimizer(student, settings.optimizer, settings.lr_student, settings.weight_decay,
                                nesterov=True)
    start = run.resume(student=student, optimizer=optimizer, attacked=attacked, across=across) if run else 0

    for epoch in range(start, settings.epochs):
        set_lr(optimizer, 1e-6 + cosine(settings.lr_student - 1e-6, epoch, settings.epochs))
        # -------- (1) Pixels, now and then: across a boundary of the teacher, min CE(T(x), target)
        due, done = (at * settings.attacks // settings.epochs for at in (epoch, epoch - 1))
        if share and due > done:                                          # four images of each origin at most
            origins = torch.randperm(m, device=device)[:math.ceil(len(attacked) / 4)].split(256)
            across.zero_()
            for rows in steps(len(origins), "boundary", iter(origins)):
                pixels = augment_surrogates(surrogate[rows] / 255, settings)              # (N, C, H, W)
                made = attacked_images(teacher, pixels, pseudo_labels[rows], data, settings)   # (N', C, H, W)
                made = made[:len(attacked) - across]
                attacked[across:across + len(made)] = (255 * made).round().to(torch.uint8)
                across += len(made)
            if run and not across:
                run.note(f"epoch {epoch}: no image crossed a boundary; batches are clean for now")
        # -------- (2) Student: min  T² KL(teacher || student), both on the identical images
        number = math.ceil(share * size) if share and across else 0          # attacked images of a batch
        clean_rows = full_batches(m, size - number, device)
        attacked_rows = full_batches(int(across), number, device) if number else None
        means, answers = Means(), torch.zeros(data.num_classes, dtype=torch.long, device=device)
        student.train()

        def asked():
            """Without end: a batch's pixels and images (N, C, H, W), the teacher's logits (N, K)."""
            while True:
                parts = []
                if number < size:
                    parts.append(augment_surrogates(surrogate[next(clean_rows)] / 255, settings))
                if number:
                    parts.append(attacked[next(attacked_rows)] / 255)        # not augmented again
                pixels = torch.cat(parts)
                images = normalize(pixels, data)
                with torch.no_grad():
                    teacher_logits = teacher(images)
                yield pixels, images, teacher_logits
        count = math.ceil(m / size)                                          # student steps
        batches = revisited(asked(), settings.visits, count)
        with frozen(teacher):
            for pixels, images, teacher_logits in steps(count, "distillation", batches):
                student_logits = student(images)                             # (N, K)
                both = student_logits, teacher_logits
                if settings.standardize:
                    both = standardized(student_logits), standardized(teacher_logits)
                if settings.targets == "soft":
                    loss_kd = kd_loss(*both, settings.temperature)
                else:
                    loss_kd = one_hot_loss(*both)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()
                predicted, p = teacher_logits.argmax(1), teacher_logits.softmax(1)
                answers.index_add_(0, predicted, torch.ones_like(predicted))   # bincount waits for a GPU
                agreed = (student_logits.argmax(1) == predicted).float()
                means.add(loss_kd=loss_kd, surrogate_agreement=agreed.mean(),
                          teacher_entropy=-torch.xlogy(p, p).sum(1).mean())
        terms = dict(means.take(), relative_entropy=relative_entropy(answers), attacked=int(across))
        if run:                                                     # with the epoch's last batch, to be shown
            run.log(epoch, terms, pixels, predicted)


# the settings that shape the pool: a file made with others is refused
OF_POOL = ("seed", "surrogate", "pool_images", "pool_budget", "balance", "strokes")


@command_line
def main(argv=None):
    pairs = dict.fromkeys(("mnist", "fashion_mnist"), ("lenet5_bn", "lenet5_half_bn"))
    options, settings = parse(
        "surrogate_kd", __doc__, Settings, PRESETS, argv, pairs,
        variant=lambda flags: "-real" if flags.get("surrogate", "shader") not in GENERATORS else "",
        pool="the pool's file [checkpoints/TEACHER.SURROGATE-seedN.pt, with -unbalanced for --no-balance]",
        inspect_only=("say what the teacher sees in the set, and stop", bool))
    check(settings)
    name, available, read, pictures = settings.surrogate, None, None, ""
    if name not in GENERATORS:
        if name not in DATASETS and not name.startswith("folder:"):
            raise BadInput(f"unknown surrogate '{name}'; choose from {', '.join(GENERATORS)}, a data set's "
                           "name, or folder:PATH")
        own = options.dataset
        if is_file_name(options.teacher):
            own = read_classifier(options.teacher)["dataset"]
        if same_data(name, own):
            raise BadInput(f"{name} is the teacher's own data; name another --surrogate, or type "
                           "regulated_kd.py --mode kd")
        available, read, pictures = real_pictures(name, options.data_dir)
    data = dataset_spec(options)
    teacher, student = load_networks(options, settings, data, needs=last_linear)
    run = Run(options, settings, teacher, student, data)
    with seeded(settings.seed):
        order = torch.randperm(available or 0)

    def draw(start, n):
        if name in GENERATORS:
            return procedural_pixels(name, n, data, settings, options.device)
        return fit_pixels(read(order[start:start + n], max(data.image_shape[1:])).to(options.device), data)

    kind = re.sub(r"\W+", "_", name) + "-unbalanced" * (not settings.balance)
    path = options.pool or f"checkpoints/{options.teacher_name}.{kind}-seed{settings.seed}.pt"
    pixels, labels, seen = (part.to(options.device) for part in run.cached(
        "pool", path, OF_POOL, lambda stage: balanced_pool(teacher, data, settings, draw, available, stage),
        pictures=pictures))
    found = inspect_surrogate(teacher, pixels, data, settings)
    share = found["class_share"]
    run.note(f"{name}, {len(labels)} pictures: relative entropy of predictions "
             f"{found['relative_entropy']:.3f}, augmented {found['relative_entropy_augmented']:.3f}; class "
             f"{share.index(max(share))} has {100 * max(share):.0f} %, {share.count(0)} of {len(share)} none;"
             f" mean confidence {found['confidence']:.3f}; feature spread {found['feature_spread']:.3f}",
             event="surrogate", relative_entropy_before=relative_entropy(seen), **found)
    if options.inspect_only:
        shown = torch.randperm(len(labels))
        save_samples(run.folder / "samples.png", pixels[shown] / 255, labels[shown], data.num_classes)
        run.finish(f"pictures by predicted class in {run.folder / 'samples.png'}")
        return
    if settings.boundary_attack:
        torch.backends.cudnn.benchmark = False                 # images leave the batch: nothing to compare
    distill(teacher, student, data, settings, run, surrogate=pixels, pseudo_labels=labels)
    run.finish()


# --------------------------------- appendix: pictures from nothing, each (n, 3, s, s) in [0, 1], on `device`
def noise_images(n, size, device="cpu", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
    """Gaussian noise with the mean and deviation of the teacher's data, clamped [notes].   -> (n, C, s, s)"""
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))     # (C, 1, 1)
    return (mean + std * torch.randn(n, len(mean), size, size, device=device)).clamp(0, 1)


def spectrum_magnitude(a, d, size):
    """1 / (|fx|^(a+d) + |fy|^(a-d)), 0 where both are 0 [generators].   (n,), (n,) -> (n, s, s)"""
    f = torch.fft.fftfreq(size, device=a.device, dtype=a.dtype).abs()
    magnitude = 1 / (f ** (a + d)[:, None, None] + (f ** (a - d)[:, None])[:, :, None])
    magnitude[:, 0, 0] = 0
    return magnitude


def spectrum_images(n, size, device="cpu"):
    """Clouds: random phases under a random 1/f spectrum, in three random colours [generators]."""
    normal = partial(torch.randn, device=device)
    slope = 0.5 + 3 * torch.rand(n, device=device)
    magnitude = spectrum_magnitude(slope, 0.05 * normal(n), size)[:, None, :, :size // 2 + 1]
    waves = torch.fft.rfft2(normal(n, 3, size, size))                            # (n, 3, s, s/2 + 1), complex
    image = torch.fft.irfft2(waves / waves.abs().clamp(min=1e-12) * magnitude, s=(size, size))
    image = image / image.std((2, 3), keepdim=True)            # the mean is 0: no wave is constant
    # a random orthogonal mix of the channels, each with a gain [inferred]
    colours = torch.linalg.qr(normal(n, 3, 3)).Q * torch.rand(n, 1, 3, device=device)
    image = torch.einsum("nij,njhw->nihw", colours, image)                                # (n, 3, s, s)
    low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
    return (image - low) / (high - low)


def leaf_radius_cdf(smallest=0.03):
    """200 radii, in sides of the picture, and what part of leaves is smaller: density r^-3 - 1 [generators].

    -> (200,), (200,)
    """
    radii = torch.linspace(smallest, 1, 200)
    density = radii ** -3 - 1
    return radii, density.cumsum(0) / density.sum()


def leaves_images(n, size, device="cpu", leaves=200, smallest=0.1):
    """Dead leaves: discs, squares, rectangles, triangles, quadrilaterals that hide one another [generators].

    Laid from front to back: a leaf takes what is still empty, for all n pictures at once. The last one
    takes what is left.
    """
    uniform = partial(torch.rand, device=device)
    radii, cdf = (values.to(device) for values in leaf_radius_cdf(smallest))
    radius = radii[torch.searchsorted(cdf, uniform(leaves, n)).clamp(max=199)]            # (leaves, n)
    centre_x, centre_y, colour = uniform(leaves, n), uniform(leaves, n), uniform(leaves, n, 3)
    # corners on the circle, counter-clockwise; a triangle's third counts twice
    quarter = math.pi / 2 * torch.arange(4, device=device)
    tilt, free = math.pi / 2 * uniform(leaves, n, 1), uniform(leaves, n, 4)
    square = (quarter + math.pi / 4).expand(leaves, n, 4)                              # angles of the corners
    rectangle = torch.cat([tilt, math.pi - tilt, math.pi + tilt, 2 * math.pi - tilt], 2)  # (leaves, n, 4)
    triangle = 2 * math.pi * free[..., [0, 1, 2]].sort(2).values[..., [0, 1, 2, 2]]
    turned, quadrilateral = square + 2 * math.pi * uniform(leaves, n, 1), 2 * math.pi * free.sort(2).values
    kinds = torch.stack([square, turned, rectangle, triangle, quadrilateral])
    kind = torch.randint(6, (leaves, n), device=device)                    # 5 = a disc
    angle = kinds.gather(0, kind.clamp(max=4)[None, :, :, None].expand(1, -1, -1, 4))[0]  # (leaves, n, 4)
    x = centre_x[..., None] + radius[..., None] * angle.cos()
    y = centre_y[..., None] + radius[..., None] * angle.sin()
    edge_x, edge_y = x.roll(-1, 2) - x, y.roll(-1, 2) - y
    place = (torch.arange(size, device=device) + 0.5) / size                          # (s,) centres of pixels
    first = torch.full((n, size, size), leaves, dtype=torch.long, device=device)       # the leaf that is seen
    for leaf in range(leaves):
        # inside = left of every edge: edge × (p - corner) >= 0, a part by column and a part by row
        by_column = -edge_y[leaf][..., None] * (place - x[leaf][..., None])               # (n, 4, s)
        by_row = edge_x[leaf][..., None] * (place - y[leaf][..., None])                   # (n, 4, s)
        polygon = (by_column[:, :, None, :] + by_row[:, :, :, None]).amin(1) >= 0         # (n, s, s)
        across, down = (place - centre_x[leaf][:, None]) ** 2, (place - centre_y[leaf][:, None]) ** 2
        disc = across[:, None, :] + down[:, :, None] <= (radius[leaf] ** 2)[:, None, None]    # (n, s, s)
        inside = torch.where((kind[leaf] == 5)[:, None, None], disc, polygon)
        first[inside & (first == leaves)] = leaf
        if leaf % 20 == 19 and not (first == leaves).any():
            break
    seen = first.clamp(max=leaves - 1).flatten(1)[..., None].expand(-1, -1, 3)            # (n, s·s, 3)
    return colour.transpose(0, 1).gather(1, seen).transpose(1, 2).unflatten(2, (size, size))


def ifs_points(maps, choices):
    """The chaos game: from the origin, apply the chosen map of a system again and again [generators].

    maps (n, k, 6): x, y -> a x + b y + e, c x + d y + f in the order a b c d e f. choices (steps, n,
    walkers) -> two (steps, n, walkers)
    """
    x = y = torch.zeros(choices.shape[1:], dtype=maps.dtype, device=maps.device)
    xs, ys = torch.empty(2, *choices.shape, dtype=maps.dtype, device=maps.device)
    for step, choice in enumerate(choices):
        a, b, c, d, e, f = maps.gather(1, choice[..., None].expand(-1, -1, 6)).unbind(2)  # (n, walkers) each
        x, y = a * x + b * y + e, c * x + d * y + f
        xs[step], ys[step] = x, y
    return xs, ys


def fractal_images(n, size, device="cpu", background=None, walk=220, least=0.1):
    """Attractors of 2 to 7 contractive affine maps [generators], coloured by density, before `background`.

    The maps' singular values are drawn so that their sum, the smaller one twice, is right for a picture
    that is neither dust nor a blot; pictures of which fewer than `least` of the pixels are hit are drawn
    again.
    """
    found, walkers = torch.empty(0, 4, size, size, device=device), max(64, size ** 2 // 16)
    uniform = partial(torch.rand, device=device)

    def turn(angle):                                                                  # (n, 7) -> (n, 7, 2, 2)
        return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))
    while len(found) < n:
        number = torch.randint(2, 8, (n,), device=device)
        there = torch.arange(7, device=device) < number[:, None]                          # (n, 7)
        wanted, singular = (5 + number + uniform(n)) / 2, torch.zeros(n, 7, 2, device=device)
        while not (done := singular[:, 0, 0] > 0).all():         # rejection: the first map takes what is left
            drawn = uniform(n, 7, 2).sort(2, descending=True).values
            others = ((drawn[..., 0] + 2 * drawn[..., 1]) * there).sum(1) - 2 * drawn[:, 0, 1]
            drawn[:, 0, 1] = (wanted - others) / 2
            fits = (drawn[:, 0, 1] >= 0) & (drawn[:, 0, 1] <= drawn[:, 0, 0])
            singular = torch.where((fits & ~done)[:, None, None], drawn, singular)
        signs = (uniform(n, 7, 1, 2) < 0.5).float() * 2 - 1
        left, right = turn(2 * math.pi * uniform(n, 7)), turn(2 * math.pi * uniform(n, 7))
        linear = left @ (singular[..., None] * right) * signs
        maps = torch.cat([linear.flatten(2), 2 * uniform(n, 7, 2) - 1], 2)                # (n, 7, 6)
        chance = (singular.prod(2) + 1e-3) * there                          # a map's share of the area, |det|
        choices = torch.multinomial(chance, walk * walkers, True).view(n, walk, walkers).transpose(0, 1)
        place = torch.stack([rearrange(points[20:], "steps n walkers -> n (steps walkers)")
                             for points in ifs_points(maps, choices)])       # (2, n, points)
        low, high = place.amin(2, keepdim=True), place.amax(2, keepdim=True)
        place = ((place - low) / (high - low).clamp(min=1e-6) * (size - 1)).round().long()
        where = place[1] * size + place[0]
        count = torch.zeros(n, size * size, device=device)
        count.scatter_add_(1, where, torch.ones_like(where).float())
        density = (count / count.amax(1, keepdim=True)).sqrt()[:, None]                   # (n, 1, s·s)
        saturation, value = 0.3 + 0.7 * uniform(n, 1, 1), 0.5 + 0.5 * uniform(n, 1, 1)
        hue = density + uniform(n, 1, 1)
        sixth = (torch.tensor([5, 3, 1], device=device).view(3, 1) + 6 * hue) % 6         # of the hue circle
        colour = value * (1 - saturation * torch.minimum(sixth, 4 - sixth).clamp(0, 1))   # (n, 3, s·s)
        hit = (count > 0).float()[:, None]                                                # (n, 1, s·s)
        image = torch.cat([colour, hit], 1).unflatten(2, (size, size))
        found = torch.cat([found, image[hit.mean((1, 2)) >= least]])
    background = uniform(n, 3, 1, 1) if background is None else background
    return torch.where(found[:n, 3:] > 0, found[:n, :3], background)


def shader_images(n, size, device="cpu", width=24, layers=4):
    """What a small random network of the coordinates paints, in the place of shader programs [inferred].

    Each picture has its own weights, zoom, turn, offset and time; a layer's units are sines, cosines,
    tanh, bumps, |u| and sawteeth.
    """
    uniform = partial(torch.rand, device=device)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size, device=device)] * 2, indexing="ij")
    x, y, zoom, angle = x.flatten(), y.flatten(), 2 ** (3 * uniform(n, 1)), 2 * math.pi * uniform(n, 1)
    across = zoom * (angle.cos() * x - angle.sin() * y) + 2 * uniform(n, 1) - 1           # (n, s·s)
    down = zoom * (angle.sin() * x + angle.cos() * y) + 2 * uniform(n, 1) - 1
    time = (0.1 + 9.9 * uniform(n, 1)).sin().expand_as(across)
    radius, angle = (across ** 2 + down ** 2).sqrt(), torch.atan2(down, across)
    u = torch.stack([across, down, radius, angle, time, torch.ones_like(time)], 1)
    for layer in range(layers + 1):                                              # the last one is the colours
        fan_in, fan_out = u.shape[1], 3 if layer == layers else width
        u = torch.randn(n, fan_out, fan_in, device=device) @ u * (1.5 / fan_in ** 0.5)       # (n, width, s·s)
        if layer < layers:
            a, b, c, d, e, f = u.tensor_split(6, 1)
            u = torch.cat([a.sin(), b.cos(), c.tanh(), (-d ** 2).exp(), e.abs(), f - f.floor()], 1)
    return u.sigmoid().unflatten(2, (size, size))


def random_generator_images(n, size, device="cpu", widths=(64, 48, 32, 24)):
    """Untrained, StyleGAN-like [generators]; one draw of weights for all n: 400 there; ask for 50 to 100."""
    normal = partial(torch.randn, device=device)
    uniform = partial(torch.rand, device=device)

    def pink(side):                                                # noise of 1/f^α, deviation 1: (n, 1, s, s)
        f = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side) ** 2).sqrt().to(device)
        f[0, 0] = math.inf
        waves = torch.fft.rfft2(normal(n, 1, side, side)) * f ** -(0.5 + uniform(1))
        image = torch.fft.irfft2(waves, s=(side, side))
        return image / image.std((2, 3), keepdim=True)
    x, rgb, side = normal(1, widths[0], 4, 4).expand(n, -1, -1, -1), torch.zeros(n, 3, 4, 4, device=device), 4
    for stage, width in enumerate(widths):
        for first in (True, False):
            if first and stage:
                x, rgb = (F.interpolate(maps, scale_factor=2, mode="bilinear") for maps in (x, rgb))
                side = 2 * side
            weight, style = normal(width, x.shape[1], 3, 3), F.leaky_relu(normal(n, x.shape[1]), 0.2)
            size_of = (style ** 2 @ (weight ** 2).sum((2, 3)).T).sqrt()    # (n, width), of the styled weights
            x = F.conv2d(x * style[..., None, None], weight, padding=1) / size_of[..., None, None]
            x = 2 ** 0.5 * F.relu(x + 0.3 * uniform(1) * pink(side) + 0.4 * uniform(1, width, 1, 1) - 0.2)
        rgb = rgb + F.conv2d(x, normal(3, width, 1, 1) / width ** 0.5)
    rgb = F.interpolate(rgb, (size, size), mode="bilinear", antialias=True)
    rgb = (rgb - rgb.mean((2, 3), keepdim=True)) / rgb.std((2, 3), keepdim=True)
    # colours as photographs have them: mean and deviation of each channel, each with a spread of its own
    photographs = [[.483, .455, .401], [.145, .142, .161], [.219, .213, .213], [.063, .062, .069]]
    mean, mean_spread, std, std_spread = torch.tensor(photographs, device=device)
    mean, std = mean + mean_spread * normal(n, 3), (std + std_spread * normal(n, 3)).abs()
    return (mean[..., None, None] + std[..., None, None] * rgb).clamp(0, 1)


def strokes(pixels):
    """Bright marks on black, for teachers of grey digits and clothes [inferred].

    (n, C, H, W) -> (n, 1, H, W), both in [0, 1]. Random weights make grey, half of them are inverted, and
    a soft threshold leaves 5 to 50 % of a picture bright.
    """
    uniform = partial(torch.rand, device=pixels.device)
    n, weights = len(pixels), uniform(len(pixels), pixels.shape[1], 1, 1)
    grey = (pixels * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)         # (n, 1, H, W)
    grey = torch.where(uniform(n, 1, 1, 1) < 0.5, 1 - grey, grey)                      # half of them inverted
    ordered = grey.flatten(1).sort(1).values
    level = ordered.gather(1, ((0.5 + 0.45 * uniform(n, 1)) * ordered.shape[1]).long())   # (n, 1)
    steepness = 2 ** (1 + 3 * uniform(n, 1, 1, 1))
    deviation = grey.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return torch.sigmoid(steepness * (grey - level[..., None, None]) / deviation)


GENERATORS = {"noise": noise_images, "spectrum": spectrum_images, "leaves": leaves_images,
              "fractal": fractal_images, "shader": shader_images, "random-generator": random_generator_images}


def procedural_pixels(name, n, data, settings, device):
    """n pictures of a generator in the shape of the teacher's data, made at 32x32 or larger.

    -> (n, C, H, W)
    """
    size, more = max(32, *data.image_shape[1:]), {}
    if name == "noise":                                        # made smaller it would be paler
        size, more = max(data.image_shape[1:]), dict(mean=data.mean, std=data.std)
    if name == "fractal":
        more = dict(background=spectrum_images(n, size, device))
    pixels = GENERATORS[name](n, size, device, **more)
    return fit_pixels(strokes(pixels) if settings.strokes else pixels, data)


# ------------------------------------------------------- appendix: pictures that are there, without labels
def real_pictures(name, data_dir="data"):
    """Pictures without their labels, of a data set's training half or of any folder:PATH.

    -> how many; read(rows, size) -> pixels (n, C, H, W) in [0, 1]; a text that changes when a file does.
    Raises BadInput as `load_dataset` does, for a folder without pictures and for a damaged picture.
    """
    if not name.startswith("folder:"):
        (pixels, _, scale), _ = load_dataset(name, True, data_dir)
        return len(pixels), lambda rows, size: pixels[rows] / scale, ""
    path, kinds = name.removeprefix("folder:"), torchvision.datasets.folder.IMG_EXTENSIONS
    names = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in kinds) if path else []
    if not names:
        raise BadInput(f"there is no picture in folder '{path}'; name one with {', '.join(kinds)} files")

    def read(rows, size):
        cut = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
        found = []
        for row in rows:
            try:
                found.append(cut(torchvision.datasets.folder.pil_loader(names[row])))
            except Exception as error:      # PIL has no one exception for what it cannot read
                raise BadInput(f"{names[row]} is no whole image ({error})") from None
        return torch.stack(found) / 255
    content = repr([(str(file), file.stat().st_size) for file in names])
    return len(names), read, hashlib.sha256(content.encode()).hexdigest()[:16]


def fit_pixels(pixels, data):
    """Pixels (N, C', H', W') in the shape of a DataSpec: grey if need be, and resized.

    -> (N, C, H, W), in [0, 1].
    """
    channels, *size = data.image_shape
    if pixels.shape[1] != channels:
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(pixels.shape[2:]) != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels.clamp(0, 1)


def same_data(name, other):
    """Whether two names of data sets name the same images, at whatever size. A folder in a folder does."""
    if name.startswith("folder:") and other.startswith("folder:"):
        paths = (re.sub(r"@\d+$", "", text.removeprefix("folder:")) for text in (name, other))
        one, two = (Path(path).resolve() for path in paths)
        return one == two or one in two.parents or two in one.parents
    return re.sub("28$|-val$", "", name) == re.sub("28$|-val$", "", other)


if __name__ == "__main__":
    main()
