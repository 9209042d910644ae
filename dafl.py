"""DAFL: Data-Free Learning of Student Networks.   Hanting Chen, Yunhe Wang, Chang Xu, Zhaohui Yang, Chuanjian Liu, Boxin Shi,
Chunjing Xu, Chao Xu, Qi Tian. ICCV 2019, arXiv 1904.01186. Authors' code: github.com/huawei-noah/Data-Efficient-Model-Compression,
commit 5e8f4e4, folder DAFL (moved to huawei-noah/Efficient-Computing).

The idea. A frozen teacher takes the place of a GAN's discriminator: an image is "real" when the teacher is sure of it. A generator
learns to make images of which the teacher is sure, that excite its features, and that spread over all classes within a batch.
The student learns to answer like the teacher on the very images that the generator is making. The generator never looks at
the student: nothing asks for images on which the student is still wrong, or for images that differ from one another (rdskd.py).

     z ──► G ──► images ─┬──► teacher ─┬─► logits ──► one class, surely · all classes in a batch ──┐
           ▲             │             ├─► features ──► strong ────────────────────────────────────┤
           └─────────────│─────────────│─ gradient, through the frozen teacher, into G only ◄──────┘
                         │             └══► logits ──┐
                         └══► student ──► KL ◄───────┘ ──► gradient: student only                             (══► no gradient)

Run    python dafl.py --dataset digits      seeds 0-4, last epoch: student 94.78 ± 1.75 %, teacher 98.89 %, 134 s a run after the
                                            teacher's half minute, two CPU threads (benchmarks/results/dafl-digits-seed*.jsonl)
       python dafl.py --teacher resnet34 --student resnet18      CIFAR-10, the authors' numbers, for a GPU; not run, no number here
Copy   kd_loss, one_hot_loss, information_entropy_loss, activation_loss, Generator, distill
Letters   N batch, K classes, C H W image, D features, L latent.
Sources   [code] the authors' code · [paper] the paper, through others' notes · [memory] unverified · [inferred] a reconstruction or a
       choice made here. No equation number stands here: the paper's text was not at hand.

Where paper, authors' code and this file differ
 1. Activation: the paper takes the L1 norm of each feature vector [paper], the code the mean over all N·D elements: 120 to 512 times
    less, and its weights are tuned for that. Code followed; --sum-activation takes the norm.
 2. Information entropy: the code takes log10 and no 1/K; the paper has 1/K [paper] and, presumably, ln. Code followed; with
    --natural-log the same weight counts 2.3 times as much. For the 1/K divide --ie.
 3. The code trains generator and student on one batch: the student sees the images of the generator as it was before its step, and
    one teacher pass serves both. The paper's algorithm draws a second batch for the student [memory]. Code followed;
    --separate-batches.
 4. Two of the generator's four BatchNorms are called with 0.8 as second argument, which is eps, not momentum. Followed: it damps
    the normalisation. The last one, without weights, gives each batch mean 0 and deviation 1 per channel, which is why no
    `normalize` stands between generator and teacher. Never in eval mode here, as in the code.
 5. The weights of the three terms changed in the code between 2019-11 (ln, entropy 10) and 2020-09. Those of its last state are
    taken. Its README calls the activation weight --act, its parser --a, so that the README's commands fail; here it is --act.
 6. Authors: the best epoch on the test set. Here: the last one (the best is printed in brackets).
 7. A collapsed generator (all images alike, on MNIST: the authors advise to restart) is named in the log and on the screen.
 8. The student's soft cross-entropy [paper] and KL [code] have the same gradient; KL is reported: 0 is a perfect copy.
 9. The teacher's weights get no gradient here; in the code they do, and nobody reads it. The same mathematics
    (benchmarks/throughput.py).
10. Teachers: the authors' CIFAR ones take SGD for 199 epochs, a tenth at 80 and at 120, MNIST's Adam 1e-3 for 9; the last state. Here
    run.py's recipe. CIFAR-100 is normalised with its own constants, where the authors take CIFAR-10's.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (BadInput, Means, autocast, build_optimizer, cosine, denormalize, first_linear, frozen, newest_by_class, recorded_inputs,
                    report_collapse, seeded, set_lr, steps)
from run import Run, command_line, read_settings


# ------------------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code: T = 1].   (N, K), (N, K) -> (), at least 0

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


def information_entropy_loss(teacher_logits, natural_log=False):
    """Σ_k p̄_k log p̄_k, p̄ the batch's mean prediction, log to base 10 [code] or e.   (N, K) -> (), in [-log K, 0]

    Minus the entropy: least when a batch holds every class equally often, 0 when it holds one. log p̄ comes from a log-sum-exp:
    Σ p̄ log p̄ as written is NaN as soon as one class has probability 0 in float32 for the whole batch.
    """
    log_p = F.log_softmax(teacher_logits, dim=1).logsumexp(0) - math.log(len(teacher_logits))           # (N, K) -> (K,)
    loss = (log_p.exp() * log_p).sum()
    return loss if natural_log else loss / math.log(10)


def activation_loss(features, sum_features=False):
    """-mean |f| over all elements [code], or minus the mean L1 norm of a row [paper].   (N, D) -> (), at most 0

    Filters that learned to answer to real images should have something to answer to.
    """
    return -features.abs().sum(1).mean() if sum_features else -features.abs().mean()


# ------------------------------------------------------------------------------------------------------------ networks
class Generator(nn.Module):
    """Latents (N, L) -> images (N, C, H, W) as the teacher eats them [code]. 32x32, L = 1000, C = 3: 8,423,939 parameters."""
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


# ------------------------------------------------------------------------------------------------------- the algorithm
def learning_rate(lr, schedule, progress):
    """`lr` at `progress` in [0, 1) of the run: 'constant', 'steps' (a tenth at 0.4, again at 0.8 [code]) or 'cosine' to 0."""
    if schedule == "cosine":
        return cosine(lr, progress, 1)
    return lr * 0.1 ** sum(progress >= at for at in (0.4, 0.8) if schedule == "steps")


def distill(teacher, student, data, settings, run=None):
    """Train `student` in place on images made from `teacher`, which stays as it is. No real image is passed in.

    `data`: a DataSpec. `settings`: the fields of a preset and `seed`; optionally `precision`. Returns the generator; it and the
    student come back in train mode. Raises FloatingPointError when a loss is not finite.
    """
    device = next(teacher.parameters()).device
    with seeded(settings.seed):
        generator = Generator(settings.latent_dim, data.image_shape, settings.generator_width)
        generator.to(device, memory_format=torch.channels_last).train()
    rng = torch.Generator(device).manual_seed(settings.seed)
    # AdamW without weight decay is Adam, which is what the authors take
    generator_optimizer = torch.optim.AdamW(generator.parameters(), settings.lr_generator, weight_decay=settings.generator_weight_decay)
    optimizer = build_optimizer(student, settings.student_optimizer, settings.lr_student, settings.weight_decay)
    state = dict(student=student, generator=generator, optimizer=optimizer, generator_optimizer=generator_optimizer, rng=rng,
                 means=Means("loss_oh", "loss_ie", "loss_act", "loss_kd", device=device),
                 low_entropy_steps=torch.zeros((), device=device),
                 pixels=torch.zeros(settings.batch_size, *data.image_shape, device=device),    # an epoch's last batch, to be shown
                 pseudo_labels=torch.zeros(settings.batch_size, dtype=torch.long, device=device),
                 epoch=0, distillation_step=0,
                 seconds_synthesis=0.0, seconds_distillation=0.0,                              # one loop trains both
                 images_synthesized=0, student_steps=0, teacher_queries=0)
    if run:
        run.restore(state)
    features_of = first_linear(teacher)                        # its input is f (N, D)
    largest_entropy = math.log(data.num_classes, math.e if settings.natural_log else 10)
    total_steps = settings.epochs * settings.student_steps

    def draw():
        """A batch from the generator as it is now, and what the teacher says of it."""
        z = torch.randn(settings.batch_size, settings.latent_dim, generator=rng, device=device)
        with autocast(settings, device):
            images = generator(z).float().contiguous(memory_format=torch.channels_last)   # (N, L) -> (N, C, H, W)
            teacher_logits = teacher(images).float()                                      # (N, K)
        state["teacher_queries"] += len(z)
        return images, teacher_logits

    for epoch in range(state["epoch"], settings.epochs):
        student.train()
        with frozen(teacher), recorded_inputs([features_of]) as seen:
            for step in steps(state, "distillation", settings.student_steps, run):
                warm = min(1, (epoch * settings.student_steps + step + 1) / max(1, settings.warmup * total_steps))
                set_lr(generator_optimizer, warm * settings.lr_generator)
                set_lr(optimizer, warm * learning_rate(settings.lr_student, settings.schedule, epoch / settings.epochs))

                # -------- (1) Generator: min  w_oh CE(T(x), argmax T(x)) + w_ie Σ p̄ log p̄ - w_act mean |f|
                images, teacher_logits = draw()
                loss_oh = one_hot_loss(teacher_logits)
                loss_ie = information_entropy_loss(teacher_logits, settings.natural_log)
                if features_of not in seen:
                    raise BadInput(f"the last linear layer of {type(teacher).__name__} is never called as a module; its input is not seen")
                loss_act = activation_loss(seen[features_of].float(), settings.sum_activation)
                generator_optimizer.zero_grad()
                (settings.oh * loss_oh + settings.ie * loss_ie + settings.act * loss_act).backward()
                generator_optimizer.step()

                # -------- (2) Student: min  T² KL(teacher || student)  on images made before that step, or after it
                if settings.separate_batches:
                    with torch.no_grad():
                        images, teacher_logits = draw()
                with autocast(settings, device):
                    student_logits = student(images.detach()).float()                     # (N, K)
                loss_kd = kd_loss(student_logits, teacher_logits.detach(), settings.temperature)
                optimizer.zero_grad()
                loss_kd.backward()
                optimizer.step()

                state["low_entropy_steps"].add_(1).mul_(loss_ie.detach() > -0.5 * largest_entropy)       # how long it has been low
                state["means"].add(loss_oh, loss_ie, loss_act, loss_kd)
                state["images_synthesized"] += len(images)
                state["student_steps"] += 1
                if step == settings.student_steps - 1:
                    state["pixels"].copy_(denormalize(images.detach(), data).clamp(0, 1))
                    state["pseudo_labels"].copy_(teacher_logits.argmax(1))

        means = state["means"].take()
        state.update(epoch=epoch + 1, distillation_step=0)
        if run:
            pixel_std = report_collapse(run, state["pixels"], state["pseudo_labels"], state["low_entropy_steps"], epoch=epoch)
            samples = newest_by_class((255 * state["pixels"]).to(torch.uint8), state["pseudo_labels"], data.num_classes)
            run.report(epoch=epoch, **means, pixel_std=pixel_std, samples=samples)
    return generator


# -------------------------------------------------------------------------------------- hyperparameters, command line
MNIST = dict(     # [code] the defaults of its parser
    epochs=200, student_steps=120, batch_size=512, latent_dim=100, generator_width=128, lr_generator=0.2, generator_weight_decay=0.0,
    student_optimizer="adam", lr_student=2e-3, weight_decay=0.0, schedule="constant", warmup=0.0, temperature=1.0,
    oh=1.0, ie=5.0, act=0.1, natural_log=False, sum_activation=False, separate_batches=False)
CIFAR10 = {**MNIST, "epochs": 2000, "batch_size": 1024, "latent_dim": 1000, "lr_generator": 0.02, "student_optimizer": "sgd",   # [code]
           "lr_student": 0.1, "weight_decay": 5e-4, "schedule": "steps", "oh": 0.05, "ie": 5.0, "act": 0.01}
PRESETS = {
    "cifar10": CIFAR10,
    "cifar100": {**CIFAR10, "oh": 0.5, "ie": 20.0, "act": 0.1},               # [code]
    "svhn": CIFAR10,                                                          # [inferred]; the paper does not treat it
    "mnist": MNIST,
    # The recipe of OpenMMLab's mmrazor, an eighth of the authors' steps, for which it prints 93.27 % (teacher 95.34 %): batch 256 on
    # each of 8 GPUs with p̄ gathered over them; one batch of 2048 here, so BN sees all of it. [inferred]: log10, T², AdamW's decay 0.01
    "cifar10-short": {**CIFAR10, "epochs": 250, "batch_size": 2048, "lr_generator": 1e-3, "generator_weight_decay": 0.01,
                      "student_optimizer": "adam", "weight_decay": 0.01, "warmup": 1 / 60, "temperature": 6.0},
    # [inferred] for a CPU
    "mnist-short": {**MNIST, "epochs": 30, "batch_size": 128, "generator_width": 32, "lr_generator": 1e-3, "schedule": "cosine"},
    # [inferred]
    "digits": {**MNIST, "epochs": 10, "batch_size": 128, "latent_dim": 1000, "lr_generator": 5e-5, "student_optimizer": "sgd",
               "lr_student": 0.1, "weight_decay": 5e-4, "schedule": "cosine", "temperature": 10.0},
}
FLAGS = {
    "student_steps": "iterations an epoch: one step of generator and student each",
    "latent_dim": "length of z",
    "generator_width": "channels of the generator's first layers; the last has half of them",
    "lr_generator": "Adam (AdamW with a decay), constant after --warmup",
    "generator_weight_decay": "decoupled, as in AdamW",
    "student_optimizer": ("adam (AdamW, which without weight decay is Adam) or sgd (momentum 0.9)", ("adam", "sgd")),
    "lr_student": "of the student's optimizer, at the start",
    "weight_decay": "of the student",
    "schedule": ("of the student's lr: constant; steps, a tenth at 0.4 and again at 0.8 of the epochs; cosine to 0",
                 ("constant", "steps", "cosine")),
    "warmup": "part of the run, in [0, 1), in which both rates rise linearly from 0",
    "temperature": "of the student's KL",
    "oh": "weight of the teacher's CE with its own first choice",
    "ie": "weight of the class entropy of a batch",
    "act": "weight of the features' strength, α",
    "natural_log": "ln in the entropy instead of log10",
    "sum_activation": "L1 norm of a feature vector instead of the mean of its elements",
    "separate_batches": "a batch of its own for the student, from the updated generator, as the paper's algorithm is remembered",
}


@command_line
def main(argv=None):
    settings = read_settings(argv, "dafl", __doc__, PRESETS, FLAGS)
    if settings.warmup >= 1:
        raise BadInput(f"--warmup is a part of the run, under 1, not {settings.warmup:g}")
    run = Run("dafl", settings)
    first_linear(run.teacher.model), Generator(1, run.data.image_shape)        # refuse now, in words, what distill would refuse
    distill(run.teacher.model, run.student, run.data, settings, run)
    run.finish()


if __name__ == "__main__":
    main()
