"""DeepInversion and Adaptive DeepInversion: Dreaming to Distill

Hongxu Yin, Pavlo Molchanov, Zhizhong Li, Jose M. Alvarez, Arun Mallya, Derek Hoiem, Niraj K. Jha, Jan Kautz.
CVPR 2020, arXiv 1912.08795.

There is no generator: the images themselves are trained. A batch of images starts as noise and is changed in
many steps, so that the frozen teacher sees the classes that we ask for, and each of its BatchNorm layers sees
the mean and variance that it remembers from the real data. That is DeepInversion (DI). In Adaptive
DeepInversion (ADI), images on which teacher and student agree cost more. All images stay in a pool. Its first
batches, the initial batches, are made by DI before the student's first step. Then images and student take
turns: an epoch adds an ADI batch, unless the pool is full, and trains the student on batches from the pool.

    noise ──► x ─┬──► teacher ──► the class asked for? the remembered statistics? ──┐
                 ├──► student ──► an answer other than the teacher's? (ADI) ────────┼──► update the images x
                 └──► smooth? ──────────────────────────────────────────────────────┘
    pool of finished x ─┬──► teacher ──► logits ──┐
                        └──► student ──► logits ──┴──► how far apart? ──► update the student

Run it
    python deepinversion.py --dataset digits
        five minutes on a CPU; the student gets 97.1 ± 1.2 % of the test digits (five seeds), the teacher 98.9
    python deepinversion.py --teacher resnet34 --student resnet18
        CIFAR-10, see note 1. Not run yet; we estimate 12 hours on a GPU that sustains 80 TFLOP/s

Copy it
    Each loss can be copied alone, those of total variation with neighbour_differences. For synthesize(), one
    batch, or distill(), the whole method, copy common.py and this file, and in the copy delete the import
    from running, save_images(), and main() with its decorator and its call.
Letters: T teacher; x the N images that are trained, C x H x W, normalised: (pixel - mean) / std, with pixels
in [0, 1]; y the classes asked for; P images in the pool; K classes; CE cross-entropy; KL Kullback-Leibler
divergence; τ the temperature, which divides the logits.
We did not have the paper's text: what is said of it comes from others. Sources: [code] the authors'
repository NVlabs/DeepInversion at 2413af1; [issues] their answers in its issues; [DataFree] the code of
zju-vipa/DataFree at 9e79fa9; [ours] a choice of this file. "Note 3" is the third at the end of the file.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common import (BadInput, Means, Preset, augment, batches, batchnorms, cosine, denormalize, frozen,
                    normalize, recorded_statistics, row_major, seeded_and_checked, set_lr, steps,
                    why_no_batchnorm)
from running import Run, command_line, dataset_spec, load_networks, parse, write


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """The numbers for CIFAR-10, ResNet-34 to ResNet-18.

    The images are made with what the authors' README calls paper parameters [code]. The student's 50 steps a
    batch and its temperature of 3 are [issues]; its learning rate, schedule and weight decay are [DataFree],
    and so is the weight of the competition. The 40 initial batches are [ours]. Of the 1,000 epochs, the first
    960 make a batch.
    """
    epochs: int = 1000                  # each adds a batch, if the pool has room, and trains the student
    student_steps: int = 50             # steps of the student in an epoch
    batch_size: int = 256               # images per step of the student
    initial_batches: int = 40           # DI batches before the student's first step, kept for reuse; 0 = none
    pool_batches: int = 1000            # most batches in the pool, initial ones included; 0 = ADI adds none
    synthesis_batch_size: int = 256     # images in a batch that is made
    low_resolution_steps: int = 0       # first steps on a batch, at half its height and width; 0 = none
    synthesis_steps: int = 2000         # steps on a batch at its full size
    lr_images: float = 0.05             # Adam's learning rate for the images
    beta1: float = 0.9                  # Adam's, for the images
    beta2: float = 0.999                # Adam's, for the images
    warm_cosine: bool = False           # let --lr-images rise over 100 steps, then fall to 0 along a cosine
    oh: float = 1.0                     # weight of one_hot_loss
    bn: float = 10.0                    # weight of bn_loss, α_f in the paper (note 7)
    first_bn: float = 1.0               # factor in bn_loss of the BatchNorm layer that was registered first
    tv: float = 2.5e-5                  # weight of tv_loss, α_tv in the paper
    tv_l1: float = 0.0                  # weight of tv_l1_loss
    l2: float = 0.0                     # weight of l2_loss, α_l2 in the paper (note 7)
    l2_per_image: bool = False          # average over images in l2_loss, instead of one norm a batch (note 6)
    competition: float = 1.0            # weight of competition_loss, α_c in the paper (note 7); at 0, no ADI
    true_js: bool = False               # the true Jensen-Shannon divergence instead of the code's (note 3)
    jitter: int = 2                     # largest random shift of a batch, in pixels, at each step; 0 = none
    mirror: bool = False                # flip the whole batch with probability 1/2, at each step
    clip: bool = False                  # keep the images in the range of real ones, at each step
    cycle_targets: bool = True          # classes 0, 1, 2 ... in turn if a batch holds all, else random ones
    keep_best: bool = False             # return the images of the least loss, not the last ones (note 4)
    lr_student: float = 0.1             # SGD with momentum 0.9; falls to 0 along a cosine over the epochs
    weight_decay: float = 1e-4          # of the student
    temperature: float = 3.0            # τ in kd_loss
    seed: int = 0                       # of the student, the noise, the shifts and the classes


CIFAR10 = Settings()
PRESETS = {
    "cifar10": Preset("cifar10", "resnet34", "resnet18", CIFAR10),
    # [DataFree]: its script for DeepInversion. That code differs in three things for which there is no flag.
    # Its competition is -J without the clamp to [0, 1], TV is taken before the shift, and the pool consists
    # of 8-bit files.
    "cifar10-datafree": Preset("cifar10", "resnet34", "resnet18", replace(
        CIFAR10, epochs=200, student_steps=400, initial_batches=0, pool_batches=200, synthesis_steps=1000,
        lr_images=0.1, beta1=0.5, beta2=0.99, tv=0.0, tv_l1=1e-3, jitter=4, mirror=True, clip=True,
        cycle_targets=False, temperature=20.0)),
    # [ours]: for a first look, with a fiftieth of the paper's images and a quarter of its steps on each batch
    "cifar10-short": Preset("cifar10", "resnet34", "resnet18", replace(
        CIFAR10, epochs=16, student_steps=200, initial_batches=4, pool_batches=20, synthesis_steps=500)),
    # [ours]: CIFAR-10's numbers on other data. CIFAR-100 asks for random classes: in turn, each batch of 256
    # would hold classes 0 to 55 three times and the others twice
    "cifar100": Preset("cifar100", "resnet34", "resnet18", replace(CIFAR10, cycle_targets=False)),
    "svhn": Preset("svhn", "wrn40_2", "wrn16_1", CIFAR10),
    # [code]: the README's command, which has no competition, for --synthesize-only (note 10). 0.2 is what the
    # README says of the paper. The rest of the student's half is nobody's recipe.
    "imagenet": Preset("imagenet", "torchvision:resnet50", "torchvision:resnet18", replace(
        CIFAR10, epochs=2, initial_batches=1, pool_batches=2, synthesis_batch_size=84,
        low_resolution_steps=2000, synthesis_steps=1000, lr_images=0.25, beta1=0.5, beta2=0.9,
        warm_cosine=True, bn=0.01, first_bn=10.0, tv=1e-4, l2=1e-5, l2_per_image=True, competition=0.2,
        jitter=30, mirror=True, clip=True, cycle_targets=False)),
    # [ours]: for the comparison in benchmarks/, where each method has 40 minutes of two cores. DI makes all
    # images first (note 2).
    "cifar10-cpu": Preset("cifar10", "wrn16_2", "wrn16_1", replace(
        CIFAR10, epochs=11, student_steps=300, batch_size=128, initial_batches=20, pool_batches=0,
        synthesis_steps=50, lr_images=0.1, beta1=0.5, tv=3e-3, mirror=True, clip=True, temperature=20.0)),
    # [ours]: the last of 7 trials, chosen by the test accuracy of seed 0. Before it, two dozen settings were
    # compared without a student: on how many images does a second classifier see the class asked for?
    "digits": Preset("digits", "wrn16_2", "wrn16_1", replace(
        CIFAR10, epochs=8, student_steps=120, batch_size=128, initial_batches=3, pool_batches=8,
        synthesis_batch_size=128, synthesis_steps=150, lr_images=0.3, bn=0.3, tv=0.01, jitter=1, clip=True,
        weight_decay=5e-4)),
}


# ---------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """How far the student's probabilities are from the teacher's [issues: τ = 3; ours: τ²].

        L_kd = τ² · mean over images of KL(softmax(teacher / τ) || softmax(student / τ))

    Logits (N, K) and (N, K), temperature τ > 0 -> a scalar, at least 0. In KL, a class counts in proportion
    to the teacher's probability for it. A τ above 1 makes these more even, so that the student also learns
    how the teacher ranks the less likely classes. The factor τ² keeps the gradient about equally large.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # kl_div(log q, p) is KL(p || q). 'batchmean' sums over classes; the default would divide by K, too
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(teacher_logits, targets):
    """How far the teacher is from the classes that were asked for: its cross-entropy with them [code].

        L_oh = mean over images of CE(teacher, target)

    Logits (N, K) and classes (N,) -> a scalar, at least 0. It is small when the teacher is certain that every
    image is in the class that was asked for.
    """
    return F.cross_entropy(teacher_logits, targets)


def bn_loss(statistics, running, first=1.0):
    """How far the images' BatchNorm statistics are from those that the teacher remembers [code].

        L_bn = Σ over layers of w (‖var - running_var‖₂ + ‖mean - running_mean‖₂)

    Two lists with one pair (mean, variance) for each layer, both (channels,) -> a scalar, at least 0. w is
    `first` for the first layer and 1 for the others. During the teacher's training, each BatchNorm layer kept
    a running mean and variance of its input: a trace of the real data (`running`). `statistics` are the mean
    and variance of the layer's input h for our images:

        var, mean = torch.var_mean(h, (0, 2, 3), correction=0)
    """
    norms = [torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)
             for (mean, var), (running_mean, running_var) in zip(statistics, running, strict=True)]
    return sum(norms) + (first - 1) * sum(norms[:1])


def neighbour_differences(images):
    """Differences of neighbours, side by side, one above the other, and on both diagonals.

    (N, C, H, W) -> four tensors
    """
    return (images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :],
            images[..., 1:, :-1] - images[..., :-1, 1:], images[..., 1:, 1:] - images[..., :-1, :-1])


def tv_loss(images):
    """How rough the images are: their total variation, by norms of the whole batch [code: CIFAR, ImageNet].

        L_tv = Σ over four directions of ‖differences of neighbours‖₂

    Images (N, C, H, W) -> a scalar, at least 0. Natural images are smooth. Each norm is one number for the
    whole batch, so the loss grows with √N, and a weight holds for one N: 2.5e-5 is the authors' for 256.
    """
    return sum(torch.linalg.vector_norm(difference) for difference in neighbour_differences(images))


def tv_l1_loss(images):
    """How rough the images are: their total variation, by absolute values [code: ImageNet; DataFree].

        L_tv1 = Σ over four directions of the mean of |differences of neighbours|

    Images (N, C, H, W) -> a scalar, at least 0. Unlike tv_loss, this one does not grow with N.
    """
    return sum(difference.abs().mean() for difference in neighbour_differences(images))


def l2_loss(images, per_image=False):
    """How far the images are from the mean colour, where x is 0 [code: CIFAR; with `per_image`: ImageNet].

        L_l2 = ‖all x of the batch‖₂
        L_l2 = mean over images of ‖x of the image‖₂        with `per_image`

    Images (N, C, H, W) -> a scalar, at least 0.
    """
    if per_image:
        return torch.linalg.vector_norm(images, dim=(1, 2, 3)).mean()
    return torch.linalg.vector_norm(images)


def competition_loss(student_logits, teacher_logits, true_js=False, temperature=3.0):
    """How much student and teacher agree: 1 minus their Jensen-Shannon divergence J [code; true_js: paper].

        L_c = 1 - J,   J = mean over images of ½ KL(M || p_S) + ½ KL(M || p_T),   M = (p_S + p_T) / 2
        L_c = 1 - J,   J = mean over images of ½ KL(p_S || M) + ½ KL(p_T || M)          with `true_js`

    Logits (N, K) and (N, K) -> a scalar in [0, 1], with `true_js` in [1 - ln 2, 1]. p_S is the student's
    softmax at temperature 3 and p_T the teacher's [code]. The first form clamps p_S, p_T and M to
    [0.01, 0.99], after which they no longer sum to 1, and it clamps J to [0, 1] (note 3). An image on which
    both networks agree costs most, so each new batch shows what the student has not learned yet.
    """
    student_p = F.softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    mean_p = (student_p + teacher_p) / 2
    if true_js:
        tiny = torch.finfo(mean_p.dtype).tiny                                # because log 0 is -inf
        log_mean = mean_p.clamp(min=tiny).log()
        kl = [(p * (p.clamp(min=tiny).log() - log_mean)).sum(1).mean() for p in (student_p, teacher_p)]
        return 1 - sum(kl) / 2
    student_p, teacher_p, mean_p = (p.clamp(0.01, 0.99) for p in (student_p, teacher_p, mean_p))
    divergence = sum((mean_p * (mean_p.log() - p.log())).sum(1).mean() for p in (student_p, teacher_p)) / 2
    return 1 - divergence.clamp(0, 1)


# ---------------------------------------------------------------------------------- the trick: an image batch
def warm_cosine(lr, step, total):
    """The images' learning rate with --warm-cosine: up over 100 steps, then down to 0 [code, ImageNet]."""
    return lr * (step + 1) / 100 if step < 100 else cosine(lr, step - 100, max(1, total - 100))


def random_int(below):
    """Drawn on the CPU: torch.roll needs Python numbers, and to read one from a GPU we would have to wait."""
    return int(torch.randint(below, ()))


def shrunk_and_shifted(x, shrink, jitter, mirror):
    """What the networks see of the images x in one step: shifted at random, and perhaps smaller and mirrored.

    (N, C, H, W) -> (N, C, H / shrink, W / shrink). All images of the batch are shifted alike, and mirrored or
    not. What leaves an image on one side comes back on the other.
    """
    images = F.avg_pool2d(x, shrink) if shrink > 1 else x
    reach = jitter // shrink
    down, right = random_int(2 * reach + 1) - reach, random_int(2 * reach + 1) - reach
    images = torch.roll(images, (down, right), (2, 3))
    if mirror and random_int(2):
        images = images.flip(3)
    return row_major(images)


def synthesize(teacher, data, settings, student=None):
    """Turn noise into one batch of images: by DI or, if a `student` is given, by ADI.

    The first `low_resolution_steps` steps are at half the size. Each size has an Adam of its own. The noise
    is drawn from torch's global generator, which synthesize_pool() and distill() have seeded. The teacher
    must have BatchNorm.

    Returns images (N, C, H, W), normalised; the classes asked for (N,); the mean of each loss over the steps
    of both sizes, 0 for a loss that has no weight. Raises FloatingPointError if a loss was not finite.
    """
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    x = torch.randn(n, *data.image_shape, device=device, requires_grad=True)
    in_turn = settings.cycle_targets and n >= data.num_classes     # else the last would never be asked for
    targets = (torch.arange(n, device=device) % data.num_classes if in_turn else
               torch.randint(data.num_classes, (n,), device=device))
    black = torch.zeros(1, *data.image_shape, device=device)
    darkest, brightest = normalize(black, data), normalize(black + 1, data)
    layers, means = batchnorms(teacher, data), Means()
    running = {layer: (layer.running_mean, layer.running_var) for layer in layers}
    # frozen: both networks are in eval mode; gradients pass through them into x, but their weights get none
    fixed = [teacher] if student is None else [teacher, student]
    with frozen(*fixed), recorded_statistics(layers) as statistics:
        for total, shrink in ((settings.low_resolution_steps, 2), (settings.synthesis_steps, 1)):
            optimizer = torch.optim.Adam([x], settings.lr_images, betas=(settings.beta1, settings.beta2))
            # losses at two sizes cannot be compared, so each size has its best
            best_x, best_loss = x.detach(), torch.tensor(math.inf, device=device)
            for step in steps(total, "synthesis"):
                if settings.warm_cosine:
                    set_lr(optimizer, warm_cosine(settings.lr_images, step, total))
                images = shrunk_and_shifted(x, shrink, settings.jitter, settings.mirror)
                statistics.clear()
                teacher_logits = teacher(images)                             # (N, K)
                loss_oh = one_hot_loss(teacher_logits, targets)
                ran = [layer for layer in layers if layer in statistics]     # in most networks all of them
                loss_bn = bn_loss([statistics[layer] for layer in ran], [running[layer] for layer in ran],
                                  settings.first_bn)
                loss_tv = tv_loss(images) if settings.tv else 0.0
                loss_tv_l1 = tv_l1_loss(images) if settings.tv_l1 else 0.0
                loss_l2 = l2_loss(images, settings.l2_per_image) if settings.l2 else 0.0
                loss_competition = 0.0
                if student is not None:
                    loss_competition = competition_loss(student(images), teacher_logits, settings.true_js)
                loss = (settings.oh * loss_oh + settings.bn * loss_bn + settings.tv * loss_tv
                        + settings.tv_l1 * loss_tv_l1 + settings.l2 * loss_l2
                        + settings.competition * loss_competition)
                if settings.keep_best:                    # a copy of x as it was when it had this loss
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


@seeded_and_checked
def synthesize_pool(teacher, data, settings, run=None):
    """Make the initial batches by DI, from the teacher alone. Every student of this teacher can use them.

    teacher, data, run: as in distill()

    Returns images (P, C, H, W), normalised and in float16, and the classes that were asked for (P,). Raises
    BadInput if the teacher has no BatchNorm, and FloatingPointError if a loss was not finite.
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
    """Raises BadInput if the teacher has no BatchNorm layer, because then it remembers no statistics."""
    if not batchnorms(teacher, data):
        raise BadInput("deepinversion needs the statistics of BatchNorm layers, and there are none: "
                       f"{why_no_batchnorm(teacher)}; rdskd.py and surrogate_kd.py need none")


# --------------------------------------------------------------------------------------------- the algorithm
@seeded_and_checked
def distill(teacher, student, data, settings, run=None, pool=None):
    """Train `student` in place on images that are made from `teacher`. No real image is used.

    teacher    any classifier with BatchNorm; it is not changed
    data       a DataSpec: image shape, number of classes, normalisation
    run        writes log and checkpoints; main() passes one, your own code need not
    pool       the initial batches that synthesize_pool() returned, in any number; without them, they are made
               first

    Returns the pool: images (P, C, H, W), normalised and in float16, and the classes asked for (P,). Raises
    BadInput if the teacher has no BatchNorm, and FloatingPointError if a loss is no longer finite.
    """
    refuse_without_batchnorm(teacher, data)
    if not settings.initial_batches and not settings.pool_batches and pool is None:
        raise BadInput("there is no image to learn from: --initial-batches and --pool-batches are both 0")
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    pool = synthesize_pool(teacher, data, settings) if pool is None else pool
    first_images, first_targets = (part.to(device) for part in pool)
    torch.manual_seed(settings.seed ^ 2 ** 31)           # other noise than that of the initial batches
    # the pool: the initial batches, and room for one batch from each of the first `adaptive` epochs
    adaptive = min(settings.epochs, max(0, settings.pool_batches - len(first_targets) // n))
    pool_images = torch.cat([first_images, first_images.new_zeros(adaptive * n, *data.image_shape)])
    pool_targets = torch.cat([first_targets, first_targets.new_zeros(adaptive * n)])
    optimizer = torch.optim.SGD(student.parameters(), settings.lr_student, 0.9,
                                weight_decay=settings.weight_decay)
    start = run.resume(student=student, optimizer=optimizer, images=pool_images,
                       targets=pool_targets) if run else 0

    for epoch in range(start, settings.epochs):
        size = len(first_targets) + min(epoch + 1, adaptive) * n             # images in the pool by now
        newest = slice(max(0, size - n), size)                               # the place of its last batch
        losses = {}

        # -------- (1) Images: min over x of  CE(T(x), y) + α_f L_bn + α_tv L_tv + α_l2 L_l2 + α_c L_c
        if epoch < adaptive:
            rival = student if settings.competition else None                # without a rival, ADI is DI
            made, pool_targets[newest], losses = synthesize(teacher, data, settings, rival)
            pool_images[newest] = made.half()

        # -------- (2) Student: min  τ² KL(teacher || student)  on images of the whole pool
        set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        means = Means()
        student.train()
        order = batches(size, settings.batch_size, device)                   # one pass after another
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
                hits = teacher_logits.argmax(1) == pool_targets[batch]       # is it the class asked for?
                means.add(loss_kd=loss_kd, target_acc=hits.float().mean())
        losses |= means.take()                                               # raises if one is not finite
        if run:                                                       # samples.png shows the newest batch
            pixels = denormalize(pool_images[newest].float(), data).clamp(0, 1)
            run.log(epoch, losses, pixels, pool_targets[newest])
    return pool_images, pool_targets


# The settings that shape the initial batches. Batches that were made with others are refused.
OF_POOL = ("seed", "initial_batches", "synthesis_batch_size", "low_resolution_steps", "synthesis_steps",
           "lr_images", "beta1", "beta2", "warm_cosine", "oh", "bn", "first_bn", "tv", "tv_l1", "l2",
           "l2_per_image", "jitter", "mirror", "clip", "cycle_targets", "keep_best")


def save_images(run, teacher, data, settings, number):
    """--synthesize-only: `number` images, made by DI, in images.pt. No student is trained."""
    # clone: without it, the file would hold the images beyond `number`, too
    images, targets = (part[:number].clone() for part in synthesize_pool(teacher, data, settings, run))
    pixels = (255 * denormalize(images.float(), data).clamp(0, 1)).to(torch.uint8)
    write(dict(images=images, targets=targets, pixels=pixels, data=data._asdict(),
               teacher_sha256=run.identity["teacher"]), run.folder / "images.pt")
    run.finish(f"{len(images)} images in {run.folder / 'images.pt'}")


@command_line
def main(argv=None):
    options, settings = parse(
        "deepinversion", __doc__, Settings, PRESETS, argv,
        pool="folder of the initial batches [checkpoints/TEACHER.deepinversion-seedN]",
        synthesize_only=("make this many images by DI, keep them in the run's images.pt, and stop [0]", int))
    if max(settings.beta1, settings.beta2) >= 1:
        raise BadInput(f"--beta1 and --beta2 must be under 1, not {max(settings.beta1, settings.beta2):g}")
    number = options.synthesize_only
    if number:
        settings = replace(settings, initial_batches=math.ceil(number / settings.synthesis_batch_size))
    data = dataset_spec(options)
    teacher, student = load_networks(options, settings, data, lambda net: refuse_without_batchnorm(net, data))
    run = Run(options, settings, teacher, student, data, scored=not number)
    if number:
        save_images(run, teacher, data, settings, number)
        return
    folder = options.pool or f"checkpoints/{options.teacher_name}.deepinversion-seed{settings.seed}"
    pool = run.reuse("pool", folder, OF_POOL, lambda stage: synthesize_pool(teacher, data, settings, stage))
    distill(teacher, student, data, settings, run, pool)
    run.finish()


if __name__ == "__main__":
    main()


# ----------------------------------------------------------------------------------------------------- notes
# Where the paper, the authors' code and this file disagree. If there is a flag for the other version, the
# note names it. Accuracies are those of the last epoch on the test images; ± is the standard deviation over
# seeds.
#
#  1. The student's half. The authors published only the synthesis. Their answers [issues]: students start
#     untrained; DI images come first; then an ADI batch joins after every 50 steps, up to 1,000 batches of
#     256; τ is 3. We chose 40 initial batches and τ². The rate falls along a cosine as in [DataFree]; the
#     paper lowers it in steps. An epoch makes its ADI batch first and then trains the student for 50 steps.
#  2. In turn, or images first. On CIFAR-10 (teacher 92.7 %; three seeds), the preset `cifar10-cpu` makes all
#     images before the student's first step, without competition: 47.5 ± 6.8 %. In turn, with competition
#     (--initial-batches 9 --pool-batches 20): 52.65 ± 1.71 %. On digits: 97.1 ± 1.2 % with competition (five
#     seeds), 96.9 ± 0.3 without (three). Both differences are within the spread of the seeds.
#  3. The competition. The paper takes KL(p_T || M) and KL(p_S || M): --true-js, J at most ln 2. The code
#     swaps the sides and clamps; so do we. The loss stands still where J leaves [0, 1]: above 1 if both
#     networks are certain of different classes (J = 1.6), under 0 if both are unsure among more than 100.
#     A probability under 0.01 has no gradient, either: with more than 100 classes, type --true-js.
#  4. The best image. The CIFAR code means to return the pixels with the smallest loss, but keeps only a
#     reference to a tensor that goes on changing, so it returns the last ones. The ImageNet code copies
#     them one step too late. We return the last ones, and with --keep-best a copy of those with the
#     smallest loss.
#  5. The pool is a float16 tensor of normalised images: finer than the 8-bit files of [DataFree], and
#     never clipped for storage. 1,000 batches of CIFAR-10 take 1.6 GB; each checkpoint holds them, too.
#  6. Norms. For CIFAR the L2 term is one norm of the batch, for ImageNet a mean over images
#     (--l2-per-image). The TV term has norms of the batch for both [code]. ImageNet's script has a second
#     TV term of absolute values (--tv-l1), which is the only one in [DataFree].
#  7. Weights. That of L2 is 3e-8 in the paper, and 0 in the authors' README and here (--l2). That of
#     BatchNorm is 10 in the README, together with a rate of 0.05, and we follow that; the CIFAR script's own
#     defaults are 100 and 0.1 (--bn, --lr-images). That of the competition, 1, is [DataFree]'s; we do not
#     know the paper's.
#  8. Before the student sees images of the pool, they get the data set's random crop and flip [DataFree].
#     For ResNet-34 to ResNet-18 on CIFAR-10, [DataFree]'s page gives 93.26 % as the paper's result with ADI.
#  9. Work saved. Whoever calls the authors' get_images() again adds hooks to the teacher again, so call n
#     computes its statistics n times. It also computes gradients of weights and waits for
#     the loss's value at each step. We do none of this; the results are the same up to rounding.
# 10. ImageNet. --preset imagenet --synthesize-only 84 makes one batch as the README's command does, but of
#     random classes instead of 42 chosen ones, each twice. --first-bn 10 is younger than the paper. Closer to
#     it is the authors' setting 2: --low-resolution-steps 0 --synthesis-steps 20000 --beta1 0.9 --beta2 0.999
#     --no-clip. A pool of the paper's 140,000 images would take 42 GB.
