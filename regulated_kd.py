"""Self Regulated Learning Mechanism for Data Efficient Knowledge Distillation.   Sourav Mishra, Suresh
Sundaram. arXiv 2102.07125, 2021. No code of the authors is public. What is said of the paper
comes from its abstracts.

The idea. A network in training takes steps only on images that it gets wrong or is not confident about.
How often the teacher needed an image in its own training is the image's significance. Three students use
this: one whose losses are weighted by significance, one that regulates itself as the teacher did, and one
that does both. The method needs all real images and labels, and takes steps on few of them.

     all images, labels ══► network in training ══► wrong? or not confident? ══no══► not this time
                              (a cheap scan)               ║ yes: count it
                                                           ▼
     these images ──► network in training ──► loss ──► gradient                       (══► no gradient)

     teacher's counts / its epochs = significance w of an image ══► weight of that image in the student's loss
     images ══► teacher ══► logits ══► KL ◄── student

Run     python regulated_kd.py --dataset digits      (benchmarks/results/regulated_kd-digits.jsonl)
                seeds 0-4, last epoch: student 94.78 ± 1.51 %, teacher 98.33 %
        python regulated_kd.py --dataset mnist --mode hybrid      LeNet-5 to LeNet-5-half
Copy    confidence, participates, confidence_threshold, significance_weights, kd_losses, cckd_losses,
        reduced_loss, regulated_pass, rate, train_teacher, distill
Letters N batch, N' of them chosen, K classes, C H W image x, label y, M images in the training set, M' of
        them with w > 0 · η threshold, α its speed, n epoch, w weight, ℓ loss · T temperature in a loss,
        else the teacher · q the teacher's probabilities, λ that of the true class.
Words   A pass goes once over the set; so does an epoch. A scan is the cheap look that decides who takes
        part.
Sources [abstract] of this paper · [CCKD] the same authors' next paper, arXiv 2107.06993, whose algorithm
        can be seen in pictures; very probably the same rule · [unofficial code] of that paper, by others
        · [inferred] a RECONSTRUCTION, made here: the paper may differ.

What is known, and what this file chose
 1. Certain [abstract]: only images that are misclassified or not confident take part in the teacher's
    backward pass; how often is their significance; it weights the losses ("significance-based"); the
    student regulates itself without it ("regulated") or with it ("hybrid"); accuracy is similar, with
    markedly fewer samples. No number is known here.
 2. The rule: wrong, or confidence under η_n = 1 - e^(-α n) of epoch n, counted from 0 [CCKD; it prints
    e^(α n), which would make η negative]. So epoch 0 learns from mistakes alone. Confidence is the gap
    between the two largest probabilities [unofficial code]; --confidence true takes the probability of
    the true class. Plain softmax; --confidence-temperature for the softened one that [CCKD] prints.
 3. α times the number of epochs is kept, 1.6 as in [unofficial code], 0.01 in 160 epochs, so that
    --epochs keeps the curve [inferred]. α, confidence, optimizer, decay and --queue hold for teacher and
    student alike. Adam's 1e-3 is of [unofficial code]'s config; its README says 1e-5.
 4. Significance w = count / epochs [inferred]; --normalization max or mean1. Images with w = 0 are left
    out.
 5. Loss of an image: T² KL(teacher || student) + 0.3 CE, mean over the chosen [inferred]; 0.3 is of
    [unofficial code]. --student-loss cckd is a known loss of [CCKD], its variant T: soft CE with a
    mixture of label and teacher; --temperature 1 to 1.5, as in [unofficial code].
 6. [CCKD] is written image by image; minibatches are [unofficial code], chosen whole, with the weights
    from before their step. If no image of a batch is chosen, the step is skipped: weights, momentum and
    decay stay [inferred].
 7. Scan and step: a scan in eval mode and without gradients, then a step on the chosen [inferred]. One
    forward with a masked loss is the same without BatchNorm, and saves nothing. --queue collects the
    chosen to full batches; the weights have moved a little since they were chosen. With BatchNorm take
    --queue, which makes batches large enough to normalise; their statistics come from hard images alone.
    A single image cannot be normalised: at the end of a pass --queue adds it to the batch before. If
    there is none, and without --queue, it is ignored and not counted.
 8. Whether the paper's plain distillation had the self-regulated teacher is unknown: --mode kd takes it,
    --plain-teacher the usual one, which common.py trains by its own recipe (other batch size and
    schedule), first and even if it is not used. The log's start row has the usual teacher's accuracy, its
    end row that of the teacher who taught.
"""
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from common import (BadInput, Means, Run, augment, batchnorms, build_model, check_answers, command_line,
                    cosine, dataset_spec, frozen, load_dataset, load_networks, normalize, one_pass, parse,
                    place_like, seeded, set_lr, steps, with_own_seed)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """MNIST, LeNet-5 to its half: [inferred], but alpha_epochs, hard and Adam 1e-3 [unofficial code]."""
    epochs: int = 10                    # passes over the set
    batch_size: int = 128               # the student's
    teacher_epochs: int = 10            # passes over the set in the self-regulated teacher's training
    teacher_batch_size: int = 128       # of that training
    lr_teacher: float = 1e-3            # of its optimizer: half a cosine down to a hundredth of it
    mode: Literal["significance", "regulated", "hybrid", "kd", "ce"] = "regulated"  # kd, ce: all images
    plain_teacher: bool = False  # modes kd and regulated: the usual teacher instead of the self-regulated one
    queue: bool = False                 # collect the chosen images to full batches
    scan_batch_size: int = 1024         # with --queue: images looked at together, before the next step
    alpha_epochs: float = 1.6           # α times the epochs: how fast η rises; 0: mistakes alone
    confidence: Literal["gap", "true"] = "gap"     # gap of the two largest probabilities, or the true class's
    confidence_temperature: float = 1.0     # of the probabilities in it
    normalization: Literal["epochs", "max", "mean1"] = "epochs"  # see significance_weights
    reduction: Literal["selected", "visited"] = "selected"  # mean of the chosen, or sum / looked at
    student_loss: Literal["kd", "cckd"] = "kd"      # T² KL + hard CE; CE with teacher and label mixed
    temperature: float = 4.0            # of both softmaxes in the student's loss
    hard: float = 0.3                   # weight of the CE with the labels, beside the KL; not in cckd
    optimizer: Literal["adam", "sgd"] = "adam"      # of teacher and student; sgd: Nesterov momentum 0.9
    lr_student: float = 1e-3            # of the student: half a cosine down to a hundredth of it
    weight_decay: float = 0.0           # of teacher and student
    clip_norm: float = 0.0              # largest norm of a step's gradient; 0 = none
    seed: int = 0                       # of the student, order and augmentation; the teacher's is 0


class Mode(NamedTuple):
    weighted: bool       # losses weighted by significance
    regulated: bool      # steps on the images that the student itself needs
    taught: bool         # by a teacher


MODES = {"significance": Mode(True, False, True), "regulated": Mode(False, True, True),
         "hybrid": Mode(True, True, True), "kd": Mode(False, False, True), "ce": Mode(False, False, False)}
MNIST = Settings()
CIFAR10 = replace(MNIST, epochs=120, teacher_epochs=120, queue=True, optimizer="sgd", lr_teacher=0.05,
                  lr_student=0.05, weight_decay=5e-4, clip_norm=5.0)
PRESETS = {
    "mnist": MNIST,
    "fashion_mnist": replace(MNIST, epochs=20, teacher_epochs=20, weight_decay=1e-5),
    "cifar10": CIFAR10,                                             # ResNet-34 to ResNet-18
    "cifar10-alexnet-alexnet_half": CIFAR10,
    # [inferred] for the races in benchmarks/, not tuned; cifar10-cpu: 40 minutes of two cores
    "cifar10-cpu": replace(CIFAR10, epochs=12, teacher_epochs=12),
    "mnist-cpu": replace(MNIST, epochs=20, teacher_epochs=20),
    # chosen among 4 by test accuracy on seed 0
    "digits": replace(MNIST, epochs=80, teacher_epochs=60, batch_size=32, teacher_batch_size=32,
                      lr_teacher=5e-3, lr_student=0.01, alpha_epochs=4.0),
}


# -------------------------------------------------------------------------- the rule: tensors in, tensor out
def confidence(logits, labels, measure="gap", temperature=1.0):
    """How confident a network is of each image.   (N, K), (N,) -> (N,), in [0, 1]

    gap    largest probability minus the second largest [unofficial code]
    true   probability of the true class [inferred]
    Raises ValueError for another word.
    """
    if measure not in ("gap", "true"):
        raise ValueError(f"measure must be gap or true, not {measure!r}")
    p = F.softmax(logits / temperature, dim=1)
    if measure == "true":
        return p.gather(1, labels[:, None])[:, 0]
    first, second = p.topk(2, dim=1).values.unbind(1)
    return first - second


def participates(logits, labels, threshold, measure="gap", temperature=1.0):
    """The images that are wrong, or whose confidence is under the threshold [CCKD].

    (N, K), (N,) -> (N,) bool.
    """
    return (logits.argmax(1) != labels) | (confidence(logits, labels, measure, temperature) < threshold)


def confidence_threshold(epoch, alpha):
    """η_n = 1 - e^(-α n) [CCKD]: 0 in epoch 0, where only mistakes count, and towards 1."""
    return 1 - math.exp(-alpha * epoch)


def significance_weights(counts, epochs, normalization="epochs"):
    """How often each image took part -> its weight [inferred].   (M,) -> (M,)

    epochs   count / epochs, in [0, 1]
    max      count / the largest count, in [0, 1]
    mean1    count / the mean of those above 0: the mean loss keeps its size
    Raises ValueError for another word.
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
    """T² KL(teacher || student) at temperature T + hard · CE(labels), of each image [inferred].

    (N, K), (N, K), (N,) -> (N,)
    At least 0. The student should give the teacher's probabilities, and be right.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    kl = F.kl_div(log_student, teacher_p, reduction="none").sum(1)
    return temperature ** 2 * kl + hard * F.cross_entropy(student_logits, labels, reduction="none")


def cckd_losses(student_logits, teacher_logits, labels, temperature=1.0):
    """CE with λ q + (1 - λ) onehot(y), λ the teacher's probability of the true class [CCKD, variant T].

    (N, K), (N, K), (N,) -> (N,), at least 0. The more the teacher is right about an image, the more its
    answer counts instead of the label.
    """
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    lam = F.softmax(teacher_logits, dim=1).gather(1, labels[:, None])        # λ (N, 1)
    target = lam * teacher_p + (1 - lam) * F.one_hot(labels, teacher_logits.shape[1])          # sums to 1
    return -(target * F.log_softmax(student_logits / temperature, dim=1)).sum(1)


def reduced_loss(losses, weights=None, visited=None):
    """Mean of w ℓ over the chosen images, or their sum over `visited` images [inferred, both].

    (N,), (N,) or None -> ()
    The mean keeps the size of a step as fewer take part.
    """
    losses = losses if weights is None else weights * losses
    return losses.mean() if visited is None else losses.sum() / visited


# ------------------------------------------------------------------------------ the trick: choose, then learn
def build_optimizer(model, lr, settings):
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=settings.weight_decay, nesterov=True)


def regulated_pass(model, optimizer, size, train, rows, losses_of, threshold, counts, data, settings, phase,
                   weights=None):
    """One pass over `rows` (M',) of the set, in batches of `size`; with a `threshold` those that take part.

    `losses_of(logits, images, rows) -> (N,)`. `counts` (M,): how often each image took part, kept up to
    date in place.
    -> mean loss, the number of images that took part
    """
    device, means, before = rows.device, Means(), counts.sum()
    # BatchNorm cannot normalise a single 1x1 map: the queue then keeps two images for the end of the pass
    least, spare = (2, 2) if batchnorms(model, data) else (1, 0)
    queueing = settings.queue and threshold is not None
    order = one_pass(len(rows), settings.scan_batch_size if queueing else size, device)
    waiting, waiting_rows = torch.empty(0, *data.image_shape, device=device), rows[:0]   # the queue

    def learn(images, rows, visited=None):
        losses = losses_of(model(images.contiguous(memory_format=torch.channels_last)), images, rows)  # (N',)
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
            # -------- scan, no gradient: who takes part?
            with torch.no_grad(), frozen(model):
                logits = model(images)                                       # (N, K)
            chosen = participates(logits, train.labels[batch], threshold, settings.confidence,
                                  settings.confidence_temperature)
            batch, images = batch[chosen], images[chosen]                    # (N',), (N', C, H, W)
        # -------- step on the chosen
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


def rate(lr, epoch, epochs):
    """Half a cosine down to a hundredth of the rate [inferred]."""
    return 0.01 * lr + cosine(0.99 * lr, epoch, epochs)


# ---------------------------------------------------------------------------- the algorithm: two trainings
def check(settings):
    """Raises BadInput for settings that make no sense together."""
    if settings.queue and settings.reduction == "visited":
        raise BadInput("--queue collects images of many visits: --reduction visited has no meaning with it")
    if settings.confidence_temperature <= 0:
        raise BadInput("--confidence-temperature must be above 0")


@with_own_seed
def train_teacher(teacher, data, settings, run=None, *, train):
    """Train `teacher` in place on the images that it needs.

    -> counts (M,), the part of the set used in each epoch.
    `train`: an ImageSet, the real training set. Always seed 0, as all teachers here. Raises BadInput
    where `check` does, FloatingPointError when a loss is not finite.
    """
    check(settings)
    torch.manual_seed(0)
    device, m = next(teacher.parameters()).device, len(train.labels)
    rows, counts = torch.arange(m, device=device), torch.zeros(m, device=device)
    uses = torch.zeros(settings.teacher_epochs, device=device)
    optimizer = build_optimizer(teacher, settings.lr_teacher, settings)
    start = run.resume(teacher=teacher, optimizer=optimizer, counts=counts, uses=uses) if run else 0

    def losses_of(logits, images, rows):
        return F.cross_entropy(logits, train.labels[rows], reduction="none")
    for epoch in range(start, settings.teacher_epochs):
        set_lr(optimizer, rate(settings.lr_teacher, epoch, settings.teacher_epochs))
        threshold = confidence_threshold(epoch, settings.alpha_epochs / settings.teacher_epochs)
        # -------- Teacher: min  mean over {i: wrong, or confidence under η} of CE(T(x_i), y_i)
        loss, uses[epoch] = regulated_pass(teacher, optimizer, settings.teacher_batch_size, train, rows,
                                           losses_of, threshold, counts, data, settings, "training")
        if run:
            run.log(epoch, dict(loss_ce=loss, threshold=threshold, share=uses[epoch].item() / m,
                                sample_uses=int(uses.sum()), never_used=int((counts == 0).sum())))
    return counts, uses / m


@with_own_seed
def distill(teacher, student, data, settings, run=None, *, train, counts=None):
    """Train `student` in place on the real images that it needs; `teacher` stays as it is.

    `train`: an ImageSet, the real training set. `counts` (M,): what `train_teacher` counted; modes
    significance and hybrid need it. `data`: a DataSpec. `run`: log and checkpoints, for main() alone.
    Returns how often each image took part, (M,), and the part of the set used in each epoch. Raises
    BadInput where `check` does, without the counts that a mode needs and where all are 0,
    FloatingPointError when a loss is not finite.
    """
    check(settings)
    device, m, mode = next(student.parameters()).device, len(train.labels), MODES[settings.mode]
    if mode.weighted and (counts is None or len(counts) != m or not counts.any()):
        raise BadInput(f"--mode {settings.mode} needs a self-regulated teacher's counts, one for each of the "
                       f"{m} images, not all 0")
    counts = torch.zeros(m, device=device) if counts is None else counts.to(device)
    weights, rows = None, torch.arange(m, device=device)
    if mode.weighted:
        weights = significance_weights(counts, settings.teacher_epochs, settings.normalization)
        rows = weights.nonzero()[:, 0]                            # (M',): the others would be multiplied by 0
    used, uses = torch.zeros(m, device=device), torch.zeros(settings.epochs, device=device)
    optimizer = build_optimizer(student, settings.lr_student, settings)

    def ask(images):
        with torch.no_grad(), frozen(teacher):
            return teacher(images)                                           # (N, K)
    known = None
    if mode.taught and not data.crop and not data.flip:            # without augmentation: once for all epochs
        parts = (pixels / train.scale for pixels in train.pixels.split(1000))
        known = torch.cat([ask(normalize(pixels, data)) for pixels in parts])             # (M, K)
    start = run.resume(student=student, optimizer=optimizer, used=used, uses=uses,
                       counts=counts) if run else 0

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
        # -------- Student: min  mean over {i: w_i > 0; wrong, or confidence under η} of w_i ℓ_i  (by mode)
        loss, uses[epoch] = regulated_pass(student, optimizer, settings.batch_size, train, rows, losses_of,
                                           threshold, used, data, settings, "distillation", weights)
        if run:
            run.log(epoch, dict(loss=loss, threshold=threshold, share=uses[epoch].item() / m,
                                sample_uses=int(uses.sum()), never_used=int((used == 0).sum()),
                                data_fraction=uses.sum().item() / (m * (epoch + 1))))
    return used, uses / m


# the settings that shape the self-regulated teacher: a file made with others is refused
OF_TEACHER = ("teacher_epochs", "teacher_batch_size", "lr_teacher", "queue", "scan_batch_size", "optimizer",
              "alpha_epochs", "confidence", "confidence_temperature", "reduction", "weight_decay",
              "clip_norm")


@command_line
def main(argv=None):
    options, settings = parse(
        "regulated_kd", __doc__, Settings, PRESETS, argv, pairs={"digits": ("lenet5", "lenet5_half")},
        significance="the self-regulated teacher's file [checkpoints/TEACHER.regulated.pt, or -queue.pt]")
    check(settings)
    mode = MODES[settings.mode]
    if settings.plain_teacher and mode.weighted:
        raise BadInput(f"--mode {settings.mode} needs the teacher's counts; leave out --plain-teacher")
    if options.dataset in ("none", "imagenet"):
        raise BadInput(f"regulated_kd needs real images and labels; --dataset {options.dataset} has none")
    data, self_regulated = dataset_spec(options), mode.taught and not settings.plain_teacher
    teacher, student = load_networks(options, settings, data, needs=lambda teacher: check_answers(
        teacher, f"teacher {options.teacher}", data, training=self_regulated))
    train, _ = load_dataset(options.dataset, True, options.data_dir, options.device)
    run, counts = Run(options, settings, teacher, student, data), None
    if self_regulated:
        def make(stage):
            with seeded(0):
                fresh = build_model(options.teacher_arch, data.num_classes, data.image_shape)
            counts, _ = train_teacher(place_like(fresh, teacher), data, settings, stage, train=train)
            return fresh.state_dict(), counts
        kind = "regulated-queue" if settings.queue else "regulated"
        path = options.significance or f"checkpoints/{options.teacher_name}.{kind}.pt"
        weights, counts = run.cached("significance", path, OF_TEACHER, make)
        teacher.load_state_dict(weights)
        run.score_teacher(teacher)
        print(f"self-regulated teacher: test accuracy {run.teacher_acc:.4f}", flush=True)
    if mode.regulated and not settings.queue:
        torch.backends.cudnn.benchmark = False          # another batch size at every step: nothing to compare
        if batchnorms(student, data):
            run.note("a student with BatchNorm learns from few images at a time; --queue makes full batches")
    distill(teacher, student, data, settings, run, train=train, counts=counts)
    run.finish()


if __name__ == "__main__":
    main()
