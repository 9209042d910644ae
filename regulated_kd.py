"""Self Regulated Learning Mechanism for Data Efficient Knowledge Distillation.   Sourav Mishra, Suresh Sundaram. arXiv 2102.07125, 2021.
No code of the authors is public. What is said of the paper here comes from its abstracts; its text could not be read.

The idea. A network in training takes steps only on images that it still gets wrong or of which it is not sure enough. How often an
image was needed by the teacher is its significance. Three students use that: one whose losses are weighted by significance, one that
regulates itself as the teacher did, and one that does both. All real images and labels must be there; fewer of them cost a step.

     all images, labels ══► network in training ══► wrong? or not sure enough? ══no══► not this time
                              (a cheap pass)               ║ yes: count it
                                                           ▼
     these images ──► network in training ──► loss ──► gradient                                              (══► no gradient)

     teacher's counts / its epochs = significance w of an image ══► weight of that image in the student's loss
     images ══► teacher ══► logits ══► KL ◄── student

Run    python regulated_kd.py --dataset digits      seeds 0-4, last epoch: student 95.56 ± 0.79 %, teacher 97.22 %, 37 s a run with
                                                    both trainings, one CPU thread (benchmarks/results/regulated_kd-digits-seed*.jsonl)
       python regulated_kd.py --dataset mnist --mode hybrid      LeNet-5 to LeNet-5-half; the README's table has all modes
Copy   confidence, participates, confidence_threshold, significance_weights, kd_losses, cckd_losses, reduced_loss, pass_state,
       regulated_pass, rate, check, train_teacher, distill
Letters   N batch, N' of them chosen, K classes, C H W image, M images in the training set · η threshold, w weight.
Sources   [abstract] of this paper · [CCKD] the same authors' next paper, arXiv 2107.06993, whose algorithm can be seen in pictures; very
       probably the same rule · [unofficial code] of that paper, by others · [inferred] a RECONSTRUCTION, made here: the paper may differ.

What is known, and what this file chose
 1. Certain [abstract]: only images that are misclassified or not confident take part in the teacher's backward pass; how often is their
    significance; it weights the losses ("significance-based"); the student regulates itself without it ("regulated") or with it
    ("hybrid"); accuracy is similar, with markedly fewer samples. No number of the paper is known here.
 2. The rule: wrong, or confidence under η_n = 1 - e^(-α n) of epoch n, counted from 0 [CCKD; it prints e^(α n), which would make η
    negative]. So epoch 0 learns from mistakes alone. Confidence is the gap between the two largest probabilities [unofficial code];
    --confidence true takes the probability of the true class. Plain softmax; --confidence-temperature for the softened one that
    [CCKD] prints.
 3. α times the number of epochs is kept, 1.6 as in [unofficial code], 0.01 in 160 epochs, so that --epochs keeps the curve [inferred].
    α, the measure of confidence, optimizer, decay and --queue hold for teacher and student alike.
 4. Significance w = count / epochs [inferred]; --normalization max or mean1. Images with w = 0 are left out of the student's set.
 5. Loss of an image: T² KL(teacher || student) + 0.3 CE, mean over the chosen [inferred]; 0.3 is of [unofficial code].
    --student-loss cckd is a known loss of [CCKD], its variant T: soft CE with a mixture of label and teacher; --temperature 1 to 1.5 there.
 6. [CCKD] is written image by image; minibatches are [unofficial code], chosen whole, with the weights from before their step. A batch
    without a chosen image makes no step at all: weights, momentum and decay stay [inferred].
 7. Two passes: a forward pass in eval mode and without gradients over all, then a full pass over the chosen [inferred]. One pass with a
    masked loss is the same mathematics where no BatchNorm is, and saves nothing. --queue collects the chosen to full batches; the
    weights have moved a little since they were chosen then. With BatchNorm take --queue, so that there is a batch to normalise;
    its statistics come from hard images alone.
 8. Whether the paper's plain distillation had the self-regulated teacher is unknown: --mode kd takes it, --plain-teacher the usual
    one, which run.py trains by its own recipe (other batch size and schedule), and first in any case. The log's start row has
    the usual teacher's accuracy, its end row that of the teacher who taught.
"""
import importlib.util
import io
import math

import torch
import torch.nn.functional as F

from common import (BadInput, Means, Shuffled, accuracy, augment, autocast, batchnorms, cosine, frozen, load_dataset, normalize, predict,
                    seeded, set_lr, steps)
from models import build_model
from run import Run, command_line, is_file_name, read_classifier, read_settings, stored_stage, teacher_path, write_atomically


# --------------------------------------------------------------------------------- the rule: tensors in, tensor out
def confidence(logits, labels, measure="gap", temperature=1.0):
    """How sure a network is of each image.   (N, K), (N,) -> (N,), in [0, 1]

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
    """Which images take part: those that are wrong, or whose confidence is under the threshold [CCKD].   (N, K), (N,) -> (N,) bool"""
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


# ------------------------------------------------------------------------------------- losses: tensors in, tensor out
def kd_losses(student_logits, teacher_logits, labels, temperature, hard=0.3):
    """T² KL(teacher || student) at temperature T + hard · CE(labels), of each image [inferred].   (N, K), (N, K), (N,) -> (N,)

    At least 0. The student should share the teacher's doubts, and be right.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    kl = F.kl_div(log_student, teacher_p, reduction="none").sum(1)
    return temperature ** 2 * kl + hard * F.cross_entropy(student_logits, labels, reduction="none")


def cckd_losses(student_logits, teacher_logits, labels, temperature=1.0):
    """CE with λ q + (1 - λ) onehot(y), λ the teacher's probability of the true class [CCKD, variant T].   (N, K), (N, K), (N,) -> (N,)

    At least 0. Listen to the teacher as far as it is right.
    """
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    trust = F.softmax(teacher_logits, dim=1).gather(1, labels[:, None])                   # (N, 1)
    target = trust * teacher_p + (1 - trust) * F.one_hot(labels, teacher_logits.shape[1])  # sums to 1 as it is
    return -(target * F.log_softmax(student_logits / temperature, dim=1)).sum(1)


def reduced_loss(losses, weights=None, visited=None):
    """Mean of w ℓ over the images that take part, or their sum over `visited` images [inferred, both].   (N,), (N,) or None -> ()

    The mean keeps the size of a step as fewer take part.
    """
    losses = losses if weights is None else weights * losses
    return losses.mean() if visited is None else losses.sum() / visited


# --------------------------------------------------------------------------------------- the trick: choose, then learn
def pass_state(model, lr, batch_size, data, settings, seed):
    """What `regulated_pass` needs between its steps, part of a run's state."""
    device = next(model.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    room = batch_size + (settings.scan_batch_size if settings.queue else 0)               # the queue never holds more
    optimizer = (torch.optim.Adam(model.parameters(), lr, weight_decay=settings.weight_decay) if settings.optimizer == "adam" else
                 torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=settings.weight_decay, nesterov=True))
    return dict(model=model, optimizer=optimizer, rng=rng, batches=Shuffled(rng),
                means=Means("loss", device=device), queued=0, queue_images=torch.zeros(room, *data.image_shape, device=device),
                queue_rows=torch.zeros(room, dtype=torch.long, device=device), epoch_uses=0, sample_uses=0)


def regulated_pass(state, name, batch_size, train, rows, losses_of, threshold, counts, data, settings, run=None, weights=None):
    """One pass of state["model"] over `rows` (M',) of the training set; with a `threshold` it learns from those that take part.

    `losses_of(logits, images, rows) -> (N,)`. `counts` (M,), of every image how often it took part, is kept up to date: indexed by
    the image's place in the set, whatever the order and augmentation. A batch without a chosen image moves nothing; with BatchNorm nor
    does a single one, which waits for the next pass in the queue, and does not count without.
    """
    model, optimizer, size = state["model"], state["optimizer"], batch_size

    def learn(images, rows, visited=None):
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(settings, images.device):
            logits = model(images).float()                                                # (N', K)
        losses = losses_of(logits, images, rows)                                          # (N',)
        loss = reduced_loss(losses, None if weights is None else weights[rows], visited)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        state["means"].add(loss)
        if "student_steps" in state:
            state["student_steps"] += 1

    model.train()
    least = 2 if batchnorms(model) else 1                      # BatchNorm cannot normalise one image whose last map is 1x1
    queueing = threshold is not None and settings.queue
    visit = settings.scan_batch_size if queueing else size
    total = math.ceil(len(rows) / visit)
    for step in steps(state, name, total, run):
        batch = rows[state["batches"].next(len(rows), visit)]                             # (N,) places in the set
        images = normalize(augment(train.pixels[batch] / train.scale, data, state["rng"]), data)        # (N, C, H, W)
        if threshold is None:
            chosen = batch
        else:
            # -------- pass 1, no gradient: who takes part?
            with torch.no_grad(), frozen(model), autocast(settings, images.device):
                logits = model(images).float()                                            # (N, K)
            takes_part = participates(logits, train.labels[batch], threshold, settings.confidence, settings.confidence_temperature)
            chosen, images = batch[takes_part], images[takes_part]                        # (N',) (N', C, H, W)
            if len(chosen) < least and not queueing:
                chosen = chosen[:0]
        counts[chosen] += 1                                    # an image comes once in a batch
        state["epoch_uses"] += len(chosen)
        # -------- pass 2, of the chosen: the loss, its gradient, a step
        if not queueing:
            if len(chosen):
                learn(images, chosen, len(batch) if settings.reduction == "visited" else None)
            continue
        queue_images, queue_rows, waiting = state["queue_images"], state["queue_rows"], state["queued"]
        queue_images[waiting:waiting + len(chosen)], queue_rows[waiting:waiting + len(chosen)] = images, chosen
        waiting += len(chosen)
        while waiting >= size or (waiting >= least and step == total - 1):                # full batches; what is left when the pass ends
            now = min(size, waiting)
            learn(queue_images[:now], queue_rows[:now])
            waiting -= now
            for queue in (queue_images, queue_rows):
                queue[:waiting] = queue[now:now + waiting].clone()
        state["queued"] = waiting


def rate(lr, epoch, epochs):
    """Half a cosine down to a hundredth of the rate [inferred]."""
    return 0.01 * lr + cosine(0.99 * lr, epoch, epochs)


# --------------------------------------------------------------------------------------------- the algorithm: two trainings
def check(settings):
    """Raises BadInput for settings that make no sense together."""
    if settings.queue and settings.reduction == "visited":
        raise BadInput("--queue collects images of many visits, so that --reduction visited has no meaning with it")
    if settings.confidence_temperature <= 0:
        raise BadInput("--confidence-temperature must be above 0")


def train_teacher(teacher, data, settings, run=None, *, train):
    """Train `teacher` in place on the images that it needs. -> dict(weights, counts, curve)

    `train`: an ImageSet, the real training set. counts (M,): how often each image took part; curve: the part of the set that did, by
    epoch. Always seed 0, as all teachers here. Raises BadInput where `check` does, FloatingPointError when a loss is not finite.
    """
    check(settings)
    device, m = next(teacher.parameters()).device, len(train.labels)
    counts, rows = torch.zeros(m, device=device), torch.arange(m, device=device)
    state = dict(counts=counts, epoch=0, training_step=0, seconds_training=0.0, curve=[],
                 **pass_state(teacher, settings.lr_teacher, settings.teacher_batch_size, data, settings, seed=0))
    if run:
        run.restore(state)
    alpha = settings.alpha_epochs / settings.teacher_epochs

    def losses_of(logits, images, rows):
        return F.cross_entropy(logits, train.labels[rows], reduction="none")
    for epoch in range(state["epoch"], settings.teacher_epochs):
        set_lr(state["optimizer"], rate(settings.lr_teacher, epoch, settings.teacher_epochs))
        threshold = confidence_threshold(epoch, alpha)
        # -------- Teacher: min  mean over {i: wrong, or less sure than η} of CE(T(x_i), y_i)
        regulated_pass(state, "training", settings.teacher_batch_size, train, rows, losses_of, threshold, counts, data, settings, run)
        share = state["epoch_uses"] / m
        state["curve"].append(share)
        state["sample_uses"] += state["epoch_uses"]
        state.update(epoch=epoch + 1, training_step=0, epoch_uses=0)
        loss = state["means"].take()["loss"] if share else None
        if run:
            run.report(event="teacher", teacher_epoch=epoch, loss_ce=loss, threshold=threshold, share=share,
                       sample_uses=state["sample_uses"], never_used=int((counts == 0).sum()))
    return dict(weights=teacher.state_dict(), counts=counts, curve=state["curve"])


MODES = ("significance", "regulated", "hybrid", "kd", "ce")


def distill(teacher, student, data, settings, run=None, *, train, counts=None):
    """Train `student` in place on the real images that it needs; `teacher` stays as it is.

    `data`: a DataSpec. `settings`: the fields of a preset and `seed`; optionally `precision`. `train`: an ImageSet, the real training
    set. `counts` (M,): what `train_teacher` counted; modes significance and hybrid need it. Returns how often each image took part in
    the student's training, (M,), and the part of the set that did, by epoch. Raises BadInput where `check` does, without the counts
    that a mode needs and where all are 0, FloatingPointError when a loss is not finite.
    """
    check(settings)
    device, m, mode = next(student.parameters()).device, len(train.labels), settings.mode
    weighted = mode in ("significance", "hybrid")
    if weighted and (counts is None or len(counts) != m or not counts.any()):
        raise BadInput(f"--mode {mode} needs a self-regulated teacher's counts, one for each of the {m} images, not all 0")
    counts = counts.to(device).clone() if weighted else torch.zeros(m, device=device)
    used = torch.zeros(m, device=device)
    state = dict(used=used, teacher=teacher, counts=counts, epoch=0, distillation_step=0, seconds_distillation=0.0, student_steps=0,
                 teacher_queries=0, curve=[],
                 **pass_state(student, settings.lr_student, settings.batch_size, data, settings, settings.seed))

    def ask(images):
        with torch.no_grad(), frozen(teacher), autocast(settings, device):
            return teacher(images).float()                                                # (N, K)
    answers_once = mode != "ce" and not data.crop and not data.flip                        # without augmentation, for all epochs
    state["teacher_queries"] += m * answers_once
    if run:
        run.restore(state)
    weights, rows = None, torch.arange(m, device=device)
    if weighted:
        weights = significance_weights(counts, settings.teacher_epochs, settings.normalization)
        rows = weights.nonzero()[:, 0]                         # (M',): the others would be multiplied by 0
    known = None
    if answers_once:
        known = torch.cat([ask(normalize(pixels / train.scale, data)) for pixels in train.pixels.split(1000)])          # (M, K)

    def losses_of(logits, images, rows):
        if mode == "ce":
            return F.cross_entropy(logits, train.labels[rows], reduction="none")
        if known is None:
            state["teacher_queries"] += len(rows)
        teacher_logits = ask(images) if known is None else known[rows]
        if settings.student_loss == "cckd":
            return cckd_losses(logits, teacher_logits, train.labels[rows], settings.temperature)
        return kd_losses(logits, teacher_logits, train.labels[rows], settings.temperature, settings.hard)

    alpha = settings.alpha_epochs / settings.epochs
    for epoch in range(state["epoch"], settings.epochs):
        set_lr(state["optimizer"], rate(settings.lr_student, epoch, settings.epochs))
        threshold = confidence_threshold(epoch, alpha) if mode in ("regulated", "hybrid") else None
        # -------- Student: min  mean over {i: w_i > 0; wrong, or less sure than η} of w_i ℓ_i   (each condition where the mode has it)
        regulated_pass(state, "distillation", settings.batch_size, train, rows, losses_of, threshold, used, data, settings, run, weights)
        share = state["epoch_uses"] / m
        state["curve"].append(share)
        state["sample_uses"] += state["epoch_uses"]
        state.update(epoch=epoch + 1, distillation_step=0, epoch_uses=0)
        loss = state["means"].take()["loss"] if share else None
        if run:
            run.report(epoch=epoch, loss=loss, threshold=threshold, share=share, sample_uses=state["sample_uses"],
                       data_fraction=state["sample_uses"] / (m * (epoch + 1)), never_used=int((used == 0).sum()))
    return used, state["curve"]


# ------------------------------------------------------------------------------------------- what the method is about, shown
def draw_regulation(counts, epochs, curves, train, whose="the teacher"):
    """-> a matplotlib Figure: who took part by epoch, how often, and the most and least needed images.

    counts (M,) of `whose` training of `epochs` epochs; curves: {label: part of the set in each epoch}; train: the ImageSet.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for label, curve in curves.items():
        left.plot(range(1, len(curve) + 1), [100 * share for share in curve], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="images that take part, %", ylim=(0, None))
    left.legend(fontsize=7)
    middle.hist(counts.cpu().numpy(), bins=torch.arange(-0.5, epochs + 1).tolist(), color="tab:blue")
    middle.set(xlabel=f"epochs of {epochs} in which {whose} needed an image", ylabel="images", yscale="log")
    counts, first = counts.cpu(), torch.arange(32).clamp(max=len(counts) - 1)             # among equals the first ones of the set
    shown = torch.cat([counts.argsort(stable=True, descending=True)[first], counts.argsort(stable=True)[first]])        # (64,)
    sheet = train.pixels[shown.to(train.pixels.device)].cpu() / train.scale               # (64, C, H, W)
    height, width = sheet.shape[2:]
    sheet = sheet.reshape(8, 8, -1, height, width).permute(0, 3, 1, 4, 2).reshape(8 * height, 8 * width, -1)     # (8H, 8W, C)
    right.imshow(sheet.expand(-1, -1, 3).numpy(), interpolation="nearest")
    right.axhline(4 * height - 0.5, color="tab:red")
    right.set(xticks=[], yticks=[2 * height, 6 * height], yticklabels=["most", "least"], title=f"needed by {whose}")
    return figure


# -------------------------------------------------------------------------------------- hyperparameters, command line
MNIST = dict(     # [inferred] but for alpha_epochs and hard [unofficial code]: no number of the paper is known
    epochs=10, batch_size=128, teacher_epochs=10, teacher_batch_size=128, lr_teacher=1e-3, mode="regulated", plain_teacher=False,
    queue=False, scan_batch_size=1024,
    alpha_epochs=1.6, confidence="gap", confidence_temperature=1.0, normalization="epochs", reduction="selected",
    student_loss="kd", temperature=4.0, hard=0.3, optimizer="adam", lr_student=1e-3, weight_decay=0.0, clip_norm=0.0)
CIFAR10 = {**MNIST, "epochs": 120, "teacher_epochs": 120, "queue": True, "optimizer": "sgd", "lr_teacher": 0.05, "lr_student": 0.05,
           "weight_decay": 5e-4, "clip_norm": 5.0}
PRESETS = {
    "mnist": MNIST,
    "fashion_mnist": {**MNIST, "epochs": 20, "teacher_epochs": 20, "weight_decay": 1e-5},
    "cifar10": CIFAR10,                                                       # ResNet-34 to ResNet-18
    "cifar10-alexnet-alexnet_half": CIFAR10,
    "digits": {**MNIST, "epochs": 80, "teacher_epochs": 60, "batch_size": 32, "teacher_batch_size": 32, "lr_teacher": 5e-3,
               "lr_student": 0.01, "alpha_epochs": 4.0},
}
FLAGS = {
    "teacher_epochs": "passes over the set in the self-regulated teacher's training",
    "teacher_batch_size": "of that training",
    "lr_teacher": "of its optimizer: half a cosine down to a hundredth of it",
    "mode": ("significance: weighted losses; regulated: a choice of its own; hybrid: both; kd, ce: all images, with a teacher or without",
             MODES),
    "plain_teacher": "modes kd and regulated: the usual teacher instead of the self-regulated one",
    "queue": "collect the chosen images to full batches; for networks with BatchNorm, and faster",
    "scan_batch_size": "with --queue: images looked at together, before the next step",
    "alpha_epochs": "α, times the number of epochs: how fast the confidence that excuses an image rises; 0 = mistakes alone",
    "confidence": ("gap of the two largest probabilities, or the one of the true class", ("gap", "true")),
    "confidence_temperature": "of the probabilities in it",
    "normalization": ("of the significance: by epochs, by the largest count, or to mean 1", ("epochs", "max", "mean1")),
    "reduction": ("mean loss of the images that take part, or their sum over all that were visited", ("selected", "visited")),
    "student_loss": ("kd: T² KL + hard CE; cckd: CE with a mixture of teacher and label", ("kd", "cckd")),
    "temperature": "of both softmaxes in the student's loss",
    "hard": "weight of the CE with the labels, beside the KL; not in cckd",
    "optimizer": ("adam, or sgd with Nesterov momentum 0.9; of teacher and student", ("adam", "sgd")),
    "lr_student": "of that optimizer, for the student: half a cosine down to a hundredth of it",
    "weight_decay": "of teacher and student",
    "clip_norm": "largest norm of a step's gradient; 0 = none",
}
TEXT_FLAGS = {"significance": "the self-regulated teacher's file [checkpoints/TEACHER.regulated.pt, -queue with --queue]"}
SIGNIFICANCE_SETTINGS = ("dataset", "teacher_epochs", "teacher_batch_size", "lr_teacher", "queue", "scan_batch_size", "alpha_epochs",
                         "confidence", "confidence_temperature", "reduction", "optimizer", "weight_decay", "clip_norm", "precision")


def stored_teacher(run, settings, train):
    """The self-regulated teacher, of the architecture of --teacher, and its counts: read from their file, or made now and kept there."""
    arch = read_classifier(settings.teacher)["arch"] if is_file_name(settings.teacher) else settings.teacher

    def make(progress):
        with seeded(0):
            model = build_model(arch, run.data.num_classes, run.data.image_shape).to(run.device, memory_format=torch.channels_last)
        return train_teacher(model, run.data, settings, progress, train=train)
    path = settings.significance or f"checkpoints/{run.teacher.name}.regulated{'-queue' if settings.queue else ''}.pt"
    return stored_stage(run, settings, "self-regulated teacher's significance", path, SIGNIFICANCE_SETTINGS, make)


@command_line
def main(argv=None):
    settings = read_settings(argv, "regulated_kd", __doc__, PRESETS, FLAGS, TEXT_FLAGS, {"digits": ("lenet5", "lenet5_half")})
    check(settings)
    if settings.plain_teacher and settings.mode in ("significance", "hybrid"):
        raise BadInput(f"--mode {settings.mode} needs the counts of a self-regulated teacher; leave out --plain-teacher")
    if settings.dataset in ("none", "imagenet"):
        raise BadInput(f"regulated_kd needs real images and labels; --dataset {settings.dataset} has none here")
    if importlib.util.find_spec("matplotlib") is None:         # not after hours of training
        raise BadInput("matplotlib, which draws regulation.png, is not installed; type: pip install -r requirements.txt")
    run = Run("regulated_kd", settings)
    train, _ = load_dataset(settings.dataset, True, settings.data_dir, run.device)
    found = dict(counts=None, curve=None)
    if settings.mode != "ce" and not settings.plain_teacher:
        found = stored_teacher(run, settings, train)
        run.teacher.model.load_state_dict(found["weights"])
        run.teacher_logits = predict(run.teacher.model, run.test, run.data)
        run.teacher_acc = accuracy(run.teacher_logits, run.test.labels)
        print(f"self-regulated teacher: test accuracy {run.teacher_acc:.4f}", flush=True)
    elif settings.mode != "ce" and ":" not in settings.teacher:
        path = settings.teacher if is_file_name(settings.teacher) else teacher_path(settings.dataset, settings.teacher)
        seconds = read_classifier(path).get("seconds")
        if seconds is not None:
            run.report(event="note", text=f"the usual teacher took {seconds:.0f} s to train", teacher_seconds=seconds)
    if settings.mode in ("regulated", "hybrid") and not settings.queue:
        torch.backends.cudnn.benchmark = False                 # another batch size at every step: nothing to be tried out
        if batchnorms(run.student):
            run.report(event="note", text="a student with BatchNorm learns from batches of a few hard images; --queue makes full ones")
    used, curve = distill(run.teacher.model, run.student, run.data, settings, run, train=train, counts=found["counts"])
    curves = {"student": curve, **({"teacher": found["curve"]} if found["curve"] else {})}
    counts, epochs = (found["counts"], settings.teacher_epochs) if found["curve"] else (used, settings.epochs)
    picture = io.BytesIO()
    whose = "the teacher" if found["curve"] else "the student"
    draw_regulation(counts, epochs, curves, train, whose).savefig(picture, format="png", dpi=110)
    write_atomically(run.folder / "regulation.png", lambda file: file.write(picture.getvalue()))
    run.finish()


if __name__ == "__main__":
    main()
