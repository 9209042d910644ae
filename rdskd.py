"""RDSKD: Robustness and Diversity Seeking Data-Free Knowledge Distillation.   Pengchao Han, Jihong Park, Shiqiang Wang, Yejun Liu.
ICASSP 2021, arXiv 2011.03749. Authors' code: github.com/PengchaoHan/RDSKD, commit 8512a9d.

The idea. As in DAFL (dafl.py), a generator learns to make images of which a frozen teacher is sure and which spread over all classes.
Two things change. The two halves of a batch must differ in their pixels, the more so the more the teacher's answers to them
differ. And the two terms that fight each other, certainty and spread, are not weighed by hand: each enters through the exponential
of its rise above an earlier value, so that the one which is getting worse leads. The generator is trained first and then
stands still; the student, or one student after another, learns from it.

   phase 1   z1, z2 ──► G ──► x1, x2 ──► teacher ─┬─► one class, surely: e^(rise) · all classes: e^(rise) ──┐
                        ▲        └────────────────┴─► ‖P2 - P1‖ / ‖x2 - x1‖, answers over images ───────────┤
                        └──────────── gradient, through the frozen teacher, into G only ◄───────────────────┘
   phase 2   z ══► G, at rest ══► images ─┬══► teacher ══► logits ──┐
                                          └──► student ──► KL ◄─────┘ ──► gradient: student only             (══► no gradient)

Run    python rdskd.py --dataset digits     seeds 0-4, last epoch: student 94.61 ± 2.44 %, teacher 98.89 %, 98 s a run after the
                                            teacher's half minute, two CPU threads (benchmarks/results/rdskd-digits-seed*.jsonl)
       python rdskd.py --teacher resnet34 --student resnet18     CIFAR-10, the authors' numbers, for a GPU; not run, no number here
Copy   kd_loss, one_hot_loss, information_entropy_loss, diversity_loss, mode_seeking_loss, increment_penalty, Generator,
       train_generator, distill
Letters   N batch, K classes, C H W image, L latent.
Sources   [code] the authors' code · [abstract] the paper's · [inferred] a reconstruction or a choice made here. The paper's method
       section and tables were not at hand: no equation number and no accuracy of the paper stands here.

Where paper, authors' code and this file differ
 1. "Exponential penalty on loss increments" [abstract]: the code remembers each loss once an epoch, at its second iteration, and
    uses it until the second iteration of the next; in the first two iterations of all it is 0. Followed; --reference previous
    remembers every iteration, which makes both weights 1 but for noise.
 2. The diversity term is one ratio of whole-batch norms [code], not a mean over pairs. 1 / (ratio + 1e-20) as the code has it has a NaN
    gradient where both halves get one answer, and is 1e20 where both are one image, which is where a collapsed generator stands.
    Here the same up to 1e-8 as d_P / (d_x + 1e-8): finite, with a finite gradient, everywhere.
 3. In phase 2 the generator is in eval mode [code]: its BatchNorms, the last one too, use running statistics, so that a batch of
    images no longer has mean 0 and deviation 1 exactly.
 4. Natural logarithm in the entropy [code]; DAFL's last code takes log10.
 5. No weights: all are 1 [code]. --oh, --ie and --diversity-weight are there for ablations.
 6. MSKD, which the abstract compares with: its code is not in the authors' repository, and no paper of that name was found.
    `--diversity ms --penalty fixed` is a reconstruction [inferred]: certainty and spread (ln) at fixed weight 1, no activation
    term, and MSGAN's mode seeking term. The two switches are apart, so that what each of them is worth can be measured.
 7. The authors score the whole test set every 10 steps, about 27 % of a CIFAR run's multiply-adds. Here once an epoch of 120 steps
    (--eval-every). Both report the last student.
 8. The teacher's two half batches are one pass here, frozen networks get no weight gradients, and phase 2 builds no graph for
    generator and teacher: the same mathematics (benchmarks/throughput.py).
 9. The generator is kept by teacher, seed and kind, and reused for other students: phase 1 does not know the student.
10. Teachers: the authors' are trained for 199 (MNIST, SGD 1e-3 without momentum) or 499 epochs, SVHN's by Adam at 0.01, a left-over of a
    shared schedule; here run.py's recipe. SVHN is normalised with 0.5 here, with its own mean and deviation there.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (BadInput, Means, autocast, build_optimizer, cosine, denormalize, frozen, newest_by_class, report_collapse, seeded,
                    set_lr, steps)
from run import Run, command_line, read_settings, stored_stage


# ------------------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code: T = 10].   (N, K), (N, K) -> (), at least 0

    The student should share the teacher's doubts.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def one_hot_loss(teacher_logits):
    """CE of the teacher's answer with its own first choice, mean over the batch [code].   (N, K) -> (), in [0, ln K]

    The teacher is sure of real images, so an image of which it is sure may pass for one, whatever its class.
    """
    return F.cross_entropy(teacher_logits, teacher_logits.argmax(1))


def information_entropy_loss(teacher_logits):
    """Σ_k p̄_k ln p̄_k, p̄ the batch's mean prediction [code].   (N, K) -> (), in [-ln K, 0]

    Minus the entropy: least when a batch holds every class equally often, 0 when it holds one. ln p̄ comes from a log-sum-exp:
    Σ p̄ ln p̄ as written is NaN as soon as one class has probability 0 in float32 for the whole batch.
    """
    log_p = F.log_softmax(teacher_logits, dim=1).logsumexp(0) - math.log(len(teacher_logits))           # (N, K) -> (K,)
    return (log_p.exp() * log_p).sum()


def diversity_loss(images, teacher_logits):
    """‖P2 - P1‖ / (‖x2 - x1‖ + 1e-8) between the halves of a batch, Frobenius norms of all of it [code].   (2N, C, H, W), (2N, K) -> ()

    At least 0. One ratio a batch: its halves should lie further apart, all pairs alike, the more so the more the answers P differ. It
    falls, too, when the answers grow alike; the entropy stands against that.
    """
    (images_1, images_2), (p_1, p_2) = images.chunk(2), teacher_logits.softmax(1).chunk(2)
    return torch.linalg.vector_norm(p_2 - p_1) / (torch.linalg.vector_norm(images_2 - images_1) + 1e-8)


def mode_seeking_loss(images, z):
    """1 / (mean |x2 - x1| / mean |z2 - z1| + 1e-5), MSGAN's term [inferred for data-free use].   (2N, C, H, W), (2N, L) -> ()

    Above 0. Latents that lie apart should give images that lie apart, whatever the teacher says of them.
    """
    (images_1, images_2), (z_1, z_2) = images.chunk(2), z.chunk(2)
    return 1 / ((images_2 - images_1).abs().mean() / (z_2 - z_1).abs().mean() + 1e-5)


def increment_penalty(loss, reference):
    """e^(loss - reference) [code].   (), () -> (), above 0.   `reference`: an earlier value of that loss, without gradient.

    Its gradient is that of the loss times a weight: 1 at the reference, more when the loss has risen, less when it has fallen.
    """
    return torch.exp(loss - reference)


# ------------------------------------------------------------------------------------------------------------ networks
class Generator(nn.Module):
    """Latents (N, L) -> images (N, C, H, W) as the teacher eats them [code]: DAFL's. 32x32, L = 1000, C = 3: 8,423,939 parameters."""
    def __init__(self, latent_dim, image_shape, width=128):
        super().__init__()
        channels, height, wide = image_shape
        if height % 4 or wide % 4:                                                        # it doubles twice
            raise BadInput(f"the generator needs images with sides that are multiples of 4, not {height}x{wide}")
        half = max(1, width // 2)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, width * (height // 4) * (wide // 4)),
            nn.Unflatten(1, (width, height // 4, wide // 4)),                             # (N, 128, H/4, W/4)
            nn.BatchNorm2d(width),                                                        # no activation before it [code]
            nn.Upsample(scale_factor=2),                                                  # (N, 128, H/2, W/2)
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, eps=0.8), nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),                                                  # (N, 128, H, W)
            nn.Conv2d(width, half, 3, padding=1), nn.BatchNorm2d(half, eps=0.8), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(half, channels, 3, padding=1), nn.Tanh(),                           # (N, C, H, W)
            nn.BatchNorm2d(channels, affine=False))                                       # mean 0, deviation 1: normalised images

    def forward(self, z):
        return self.layers(z)


# ------------------------------------------------------------------------------------------------ phase 1: the generator
def train_generator(teacher, data, settings, run=None):
    """Phase 1: a generator from the teacher alone. It serves every student of this teacher. -> Generator, in train mode"""
    if settings.synthesis_batch_size % 2:
        raise BadInput(f"--synthesis-batch-size must be even, not {settings.synthesis_batch_size}: its halves are compared")
    device = next(teacher.parameters()).device
    with seeded(settings.seed):
        generator = Generator(settings.latent_dim, data.image_shape, settings.generator_width)
        generator.to(device, memory_format=torch.channels_last).train()
    rng = torch.Generator(device).manual_seed(settings.seed)
    generator_optimizer = torch.optim.Adam(generator.parameters(), settings.lr_generator)
    state = dict(generator=generator, generator_optimizer=generator_optimizer, rng=rng,
                 means=Means("loss_oh", "loss_ie", "loss_diversity", device=device),
                 reference_oh=torch.zeros((), device=device), reference_ie=torch.zeros((), device=device),
                 low_entropy_steps=torch.zeros((), device=device),
                 pixels=torch.zeros(settings.synthesis_batch_size, *data.image_shape, device=device),    # an epoch's last batch
                 pseudo_labels=torch.zeros(settings.synthesis_batch_size, dtype=torch.long, device=device),
                 epoch=0, synthesis_step=0, seconds_synthesis=0.0, teacher_queries=0)
    if run:
        run.restore(state)
    reference_oh, reference_ie = state["reference_oh"], state["reference_ie"]
    largest_entropy = math.log(data.num_classes)
    penalty = increment_penalty if settings.penalty == "exp" else lambda loss, reference: loss
    nothing = torch.zeros((), device=device)

    for epoch in range(state["epoch"], settings.generator_epochs):
        with frozen(teacher):
            for step in steps(state, "synthesis", settings.generator_steps, run):
                # -------- (1) Generator: min  e^(L_oh - r_oh) + e^(L_ie - r_ie) + ‖P2 - P1‖ / ‖x2 - x1‖
                z = torch.randn(settings.synthesis_batch_size, settings.latent_dim, generator=rng, device=device)
                with autocast(settings, device):
                    images = generator(z).float().contiguous(memory_format=torch.channels_last)         # (N, L) -> (N, C, H, W)
                    teacher_logits = teacher(images).float()                              # (N, K)
                loss_oh = one_hot_loss(teacher_logits)
                loss_ie = information_entropy_loss(teacher_logits)
                loss_diversity = (diversity_loss(images, teacher_logits) if settings.diversity == "ds" else
                                  mode_seeking_loss(images, z) if settings.diversity == "ms" else nothing)
                generator_optimizer.zero_grad()
                (settings.oh * penalty(loss_oh, reference_oh) + settings.ie * penalty(loss_ie, reference_ie)
                 + settings.diversity_weight * loss_diversity).backward()
                generator_optimizer.step()
                if step == min(1, settings.generator_steps - 1) or settings.reference == "previous":    # the second step of an epoch
                    reference_oh.copy_(loss_oh.detach()), reference_ie.copy_(loss_ie.detach())

                state["low_entropy_steps"].add_(1).mul_(loss_ie.detach() > -0.5 * largest_entropy)       # how long it has been low
                state["means"].add(loss_oh, loss_ie, loss_diversity)
                state["teacher_queries"] += len(z)
                if step == settings.generator_steps - 1:
                    state["pixels"].copy_(denormalize(images.detach(), data).clamp(0, 1))
                    state["pseudo_labels"].copy_(teacher_logits.argmax(1))

        means = state["means"].take()
        state.update(epoch=epoch + 1, synthesis_step=0)
        if run:
            pixel_std = report_collapse(run, state["pixels"], state["pseudo_labels"], state["low_entropy_steps"], generator_epoch=epoch)
            run.report(event="generator", generator_epoch=epoch, **means, pixel_std=pixel_std)
    generator.teacher_queries = state["teacher_queries"]
    return generator


# ------------------------------------------------------------------------------------------------------- the algorithm
def learning_rate(lr, schedule, progress):
    """`lr` at `progress` in [0, 1) of phase 2: 'constant', 'steps' (a tenth at 0.8 [code, CIFAR]) or 'cosine' to 0."""
    if schedule == "cosine":
        return cosine(lr, progress, 1)
    return lr * 0.1 ** sum(progress >= at for at in (0.8,) if schedule == "steps")


def distill(teacher, student, data, settings, run=None, generator=None):
    """Train `student` in place on images made from `teacher`, which stays as it is. No real image is passed in.

    `data`: a DataSpec. `settings`: the fields of a preset and `seed`; optionally `precision`. `generator`: that of phase 1; made
    here, without checkpoints, if it is None. Returns it as it was; the student comes back in train mode. Raises
    FloatingPointError when a loss is not finite.
    """
    device = next(teacher.parameters()).device
    generator = generator or train_generator(teacher, data, settings)
    rng = torch.Generator(device).manual_seed(settings.seed ^ 2 ** 31)         # not phase 1's stream, nor that of another small seed
    optimizer = build_optimizer(student, settings.student_optimizer, settings.lr_student, settings.weight_decay)
    state = dict(student=student, generator=generator, optimizer=optimizer, rng=rng, means=Means("loss_kd", device=device),
                 pixels=torch.zeros(settings.batch_size, *data.image_shape, device=device),    # an epoch's last batch, to be shown
                 pseudo_labels=torch.zeros(settings.batch_size, dtype=torch.long, device=device),
                 epoch=0, distillation_step=0, seconds_synthesis=0.0, seconds_distillation=0.0,
                 images_synthesized=0, student_steps=0, teacher_queries=getattr(generator, "teacher_queries", 0))
    if run:
        run.restore(state)
    for epoch in range(state["epoch"], settings.epochs):
        student.train()
        set_lr(optimizer, learning_rate(settings.lr_student, settings.schedule, epoch / settings.epochs))
        with frozen(teacher, generator):                       # eval mode: the generator's BN by running statistics
            for step in steps(state, "distillation", settings.student_steps, run):
                # -------- (2) Student: min  T² KL(teacher || student)  on new images from the generator at rest
                z = torch.randn(settings.batch_size, settings.latent_dim, generator=rng, device=device)
                with torch.no_grad(), autocast(settings, device):
                    images = generator(z).float().contiguous(memory_format=torch.channels_last)         # (N, L) -> (N, C, H, W)
                    teacher_logits = teacher(images).float()                              # (N, K)
                with autocast(settings, device):
                    student_logits = student(images).float()                              # (N, K)
                loss_kd = kd_loss(student_logits, teacher_logits, settings.temperature)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()

                state["means"].add(loss_kd)
                state["images_synthesized"] += len(images)
                state["student_steps"] += 1
                state["teacher_queries"] += len(images)
                if step == settings.student_steps - 1:
                    state["pixels"].copy_(denormalize(images, data).clamp(0, 1))
                    state["pseudo_labels"].copy_(teacher_logits.argmax(1))

        means = state["means"].take()
        state.update(epoch=epoch + 1, distillation_step=0)
        if run:
            pixel_std = report_collapse(run, state["pixels"], state["pseudo_labels"], epoch=epoch)
            samples = newest_by_class((255 * state["pixels"]).to(torch.uint8), state["pseudo_labels"], data.num_classes)
            run.report(epoch=epoch, **means, pixel_std=pixel_std, samples=samples)
    return generator


# -------------------------------------------------------------------------------------- hyperparameters, command line
MNIST = dict(     # [code] the defaults of its parsers and its README
    epochs=1000, student_steps=120, batch_size=512, latent_dim=100, generator_width=128, lr_generator=1e-3,
    generator_epochs=20, generator_steps=120, synthesis_batch_size=512,
    student_optimizer="adam", lr_student=2e-3, weight_decay=0.0, schedule="constant", temperature=10.0,
    oh=1.0, ie=1.0, diversity_weight=1.0, diversity="ds", penalty="exp", reference="epoch")
PRESETS = {
    "cifar10": {**MNIST, "latent_dim": 1000, "schedule": "steps"},            # [code]
    "cifar100": {**MNIST, "latent_dim": 1000, "schedule": "steps"},           # [inferred]: the code has no recipe for it
    "svhn": {**MNIST, "latent_dim": 1000},                                    # [code]
    "mnist": MNIST,
    # [inferred] for a CPU
    "mnist-short": {**MNIST, "epochs": 20, "batch_size": 128, "schedule": "cosine", "synthesis_batch_size": 128, "generator_width": 32},
    # [inferred]
    "digits": {**MNIST, "epochs": 16, "batch_size": 128, "student_optimizer": "sgd", "lr_student": 0.1, "weight_decay": 5e-4,
               "schedule": "cosine", "generator_epochs": 4, "generator_steps": 30, "synthesis_batch_size": 128, "generator_width": 64,
               "lr_generator": 1e-4},
}
FLAGS = {
    "student_steps": "student steps an epoch",
    "latent_dim": "length of z",
    "generator_width": "channels of the generator's first layers; the last has half of them",
    "lr_generator": "Adam, constant",
    "generator_epochs": "phase 1: its epochs; a reference is remembered once in each",
    "generator_steps": "phase 1: generator steps an epoch",
    "synthesis_batch_size": "phase 1: batch size, both halves together",
    "student_optimizer": ("adam (AdamW, which without weight decay is Adam) or sgd (momentum 0.9)", ("adam", "sgd")),
    "lr_student": "of the student's optimizer, at the start",
    "weight_decay": "of the student",
    "schedule": ("of the student's lr: constant; steps, a tenth at 0.8 of the epochs; cosine to 0", ("constant", "steps", "cosine")),
    "temperature": "of the student's KL",
    "oh": "weight of the teacher's CE with its own first choice",
    "ie": "weight of the class entropy of a batch",
    "diversity_weight": "weight of the diversity term",
    "diversity": ("ds: answers over images, RDSKD; ms: latents over images, mode seeking; none", ("ds", "ms", "none")),
    "penalty": ("exp: e^(rise) of certainty and spread, RDSKD; fixed: the losses themselves", ("exp", "fixed")),
    "reference": ("what a rise is measured from: the loss at the latest second step of an epoch, or at the previous step",
                  ("epoch", "previous")),
}
TEXT_FLAGS = {"generator": "phase 1's file [checkpoints/TEACHER.rdskd-DIVERSITY-PENALTY-seedN.pt]"}
GENERATOR_SETTINGS = ("seed", "generator_epochs", "generator_steps", "synthesis_batch_size", "latent_dim", "generator_width",
                      "lr_generator", "diversity", "penalty", "reference", "oh", "ie", "diversity_weight", "precision")


def stored_generator(run, settings):
    """Phase 1's generator for this teacher, seed and kind: read from its file, or made now and kept there."""
    generator = Generator(settings.latent_dim, run.data.image_shape, settings.generator_width)          # refuse bad shapes now

    def make(progress):
        trained = train_generator(run.teacher.model, run.data, settings, progress)
        return dict(weights=trained.state_dict(), teacher_queries=trained.teacher_queries)
    kind = f"{settings.diversity}-{settings.penalty}"
    path = settings.generator or f"checkpoints/{run.teacher.name}.rdskd-{kind}-seed{settings.seed}.pt"
    found = stored_stage(run, settings, "trained generator", path, GENERATOR_SETTINGS, make)
    generator.load_state_dict(found["weights"])
    generator.teacher_queries = found["teacher_queries"]
    return generator.to(run.device, memory_format=torch.channels_last)


@command_line
def main(argv=None):
    settings = read_settings(argv, "rdskd", __doc__, PRESETS, FLAGS, TEXT_FLAGS)
    if settings.synthesis_batch_size % 2:
        raise BadInput(f"--synthesis-batch-size must be even, not {settings.synthesis_batch_size}: its halves are compared")
    run = Run("rdskd", settings)
    distill(run.teacher.model, run.student, run.data, settings, run, stored_generator(run, settings))
    run.finish()


if __name__ == "__main__":
    main()
