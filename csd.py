"""CSD: Customizing Synthetic Data for Data-Free Student Learning.   Shiya Luo, Defang Chen, Can Wang.
ICME 2023, arXiv 2307.04542. Authors' code: github.com/luoshiya/CSD, commit 6acf251 (2023-07-06).

The idea. A generator is fitted from scratch, again and again, each time to make one batch of images that
a frozen teacher puts into the classes we ask for and whose BatchNorm statistics are those of real data.
To make images that are *hard for this student*, a small auxiliary head on the student's features learns
to name class and rotation of each rotated image, and the generator is rewarded for every mistake of that
head. The least-loss batch of each fit joins a bank that only grows. Student and head learn from it.

     z, G ──► pixels ──► A: crop, flip, normalise ──► images u ─┬──► teacher ──► CE(y), BN statistics ──────┐
     ▲                                                          └──► 4 rotations ──► student ──► head ─► -CE ┤
     └────────── gradient, through frozen teacher, student and head, into G and z only ◄────────────────────┘
     best batch ──► bank ──► A ──► images u ─┬──► teacher ══► logits, last map          (══► no gradient)
                                             ├──► student ──► KL + CE + MSE ──► student, regressor
                                             └──► 4 rotations ──► student ══► features ──► head ─► CE ──► head

Run     python csd.py --dataset digits      (benchmarks/results/csd-digits.jsonl)
                seeds 0-4, last epoch: student 96.28 ± 0.50 %, teacher 98.89 %
        python csd.py --teacher resnet34 --student resnet18     CIFAR-10, the authors' numbers: not run
        python csd.py --preset cifar10-cpu-plain --teacher FILE --bank FILE    see 10: 40 minutes, 2 cores
Copy    kd_loss, feature_loss, one_hot_loss, bn_loss, csd_loss, adversarial_loss, auxiliary_loss,
        rotations, rotation_labels, Generator, new_generator, AuxiliaryHead, Regressor, synthesize,
        synthesize_bank, distill
Letters T teacher, S student, G generator, A augmentation, u = A(pixels) · y class asked for, k quarter
        turns, τ temperature · N batch, K classes, C H W image, L latent, D student features, M images in
        the bank; the last maps are (N, C_s, h, w) of the student and (N, C_t, h', w') of the teacher.
Words   Stage 1 fills the bank from the teacher alone, a batch a round. Stage 2 repeats epochs: one more
        batch, made against the student, then --student-steps steps of student and head on the whole bank.
Sources [abstract] the paper's · [code] the authors' code · [inferred] a reconstruction. The paper's
        method section and tables were not at hand: no equation number and no accuracy of the paper stands
        here.

Where paper, authors' code and this file differ
 1. The code L2-normalises the head's logits, without a temperature, which bounds its CE (K = 10:
    2.719 to 4.686; chance ln 40 = 3.689). Followed; with --raw-head -10 CE is unbounded, the weight no
    longer comparable.
 2. The head's weights are drawn anew each epoch, its SGD momentum is kept [code]; --fresh-head-optimizer.
 3. The head that measures difficulty was fitted in the epoch before; in the first it is untrained [code].
 4. The regression weight 30 is a default deep in the authors' parser, not in script or README. Kept, but
    1 in mnist-cpu: without BatchNorm, most of a student's units may die of 30 in its first steps; --feature.
 5. Labels in the bank are the classes asked for, also where the teacher disagrees [code]. The log's
    `target_acc` is the part of the images in the student's batches on which it agrees.
 6. The bank stores floor(255 x) [code, via PNG files]: the same values here, in one tensor, without files
    that two runs could mix up. Stage 1's bank is kept by seed and reused by every student of the same
    teacher.
 7. Authors: seed 1, the best epoch on the test set, a score of the head on the rotated test set each
    epoch. Here: seed 0 unless told, the last epoch (the best is printed in brackets), no such score.
 8. The authors take the KL-adversarial term only where the CSD weight is 0. Here --adversarial adds to
    any --csd. With --csd 0 the head is not trained: nothing reads it.
 9. Frozen networks get no weight gradients, BN statistics are taken in synthesis only, upsampling and the
    convolution after it are one layer of common.py: the same mathematics up to rounding, in less time. On
    CUDA the default is TF32 with cudnn.benchmark; the authors run fp32 with cudnn.deterministic
    (--precision fp32 --deterministic).
10. Ours, in no paper of CSD's: --mixup, --keep-generator, --visits. Mixup: teacher and student see
    (1 - λ) u + λ u', u' of the same batch, λ uniform in [0, 1), one for each image; the head sees u;
    `target_acc` and `loss_ce` then say little. A kept generator goes on with a stage's next batch, but for
    its linear layer, z and Adam, akin to Fast-DFKD (2112.06253), which learns a common start. Visits: a batch
    that the teacher has answered serves so many student steps, the first at once, the others later in its
    epoch, in random order. cifar10-cpu-plain has all three, and neither head, CSD term, feature regression
    nor labels: plain distillation on the teacher's images.
11. Teachers: the authors' take SGD, batch 256, decay 1e-4, three steps, best epoch on the test set; here
    batch 128, decay 5e-4, cosine, last epoch (common.py).
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (BadInput, Means, Run, UpsampledConv2d, augment, batches, batchnorms, command_line, cosine,
                    dataset_spec, frozen, last_linear, load_networks, normalize, parse, place_like, probe,
                    recorded_inputs, recorded_statistics, revisited, set_lr, steps, with_own_seed)


# ------------------------------------------------------------------------------------------- hyperparameters
@dataclass(frozen=True)
class Settings:
    """The authors' numbers for CIFAR-10, WRN-40-2 to WRN-16-1 [code]; what difference 10 names is ours."""
    epochs: int = 100                   # stage 2: one synthesised batch each, then --student-steps steps
    student_steps: int = 2000           # student steps an epoch
    batch_size: int = 128               # the student's
    lr_student: float = 0.1             # SGD, momentum 0.9, cosine over the epochs to 0; also the regressor's
    weight_decay: float = 1e-4          # of student, regressor and head
    temperature: float = 20.0           # of the KL, τ
    kd: float = 1.0                     # weight of kd_loss
    ce: float = 1.0                     # weight of CE with the bank's labels
    feature: float = 30.0               # weight of feature_loss, the last maps' squared error; 0 = off
    mixup: bool = False                 # student and teacher see mixtures of two images; needs ce 0
    visits: int = 1                     # student steps for each answered batch; above 1 needs feature 0
    teacher_last_map: str = ""          # layer with the teacher's last map as input, for one not of common.py
    student_last_map: str = ""          # the same of the student
    lr_head: float = 0.1                # SGD, momentum 0.9, constant
    raw_head: bool = False              # leave the head's logits as they are instead of at unit length
    fresh_head_optimizer: bool = False  # clear the head's momentum when it is drawn anew
    synthesis_batch_size: int = 200     # images a synthesised batch
    synthesis_steps: int = 200          # generator steps a batch, stage 2
    lr_generator: float = 1e-3          # Adam, betas (0.5, 0.999), for generator and latents
    latent_dim: int = 256               # length of z
    keep_generator: bool = False        # a stage's next batch goes on with it, but for its linear layer
    oh: float = 1.0                     # weight of one_hot_loss
    bn: float = 1.0                     # weight of bn_loss
    csd: float = 10.0                   # weight of csd_loss; 0 = off
    adversarial: float = 0.0            # weight of adversarial_loss; 0 = off, as in the authors' runs
    bank_rounds: int = 400              # stage 1: batches made before the student's first step
    bank_synthesis_steps: int = 500     # stage 1: generator steps a batch
    seed: int = 0                       # of student, head, latents and classes


CIFAR10 = Settings()
PRESETS = {
    "cifar10-wrn40_2-wrn16_1": CIFAR10,
    "cifar10": CIFAR10,                         # [inferred]: the authors' scripts cover the pair above only
    "cifar100": CIFAR10,                        # [inferred]
    "svhn": CIFAR10,                            # [inferred]; the data set's DataSpec has no crop and no flip
    # [inferred] for a first look: 1/50 of the authors' stage 1 and 1/100 of their student steps
    "cifar10-short": replace(CIFAR10, bank_rounds=20, bank_synthesis_steps=200, epochs=10, student_steps=200),
    # [inferred] for the races in benchmarks/
    "cifar10-cpu": replace(CIFAR10, synthesis_batch_size=100, bank_rounds=20, bank_synthesis_steps=30,
                           synthesis_steps=20, lr_generator=3e-3, epochs=10, student_steps=235),
    # [inferred], the same budget for difference 10 above: a kept generator, plain distillation
    "cifar10-cpu-plain": replace(CIFAR10, synthesis_batch_size=100, bank_rounds=100, bank_synthesis_steps=10,
                                 bn=3.0, synthesis_steps=10, lr_generator=3e-3, keep_generator=True, csd=0.0,
                                 feature=0.0, ce=0.0, mixup=True, temperature=10.0, epochs=10,
                                 student_steps=459, visits=3),
    "mnist-cpu": replace(CIFAR10, synthesis_batch_size=100, bank_rounds=80, bank_synthesis_steps=15,
                         synthesis_steps=15, lr_generator=3e-3, epochs=20, student_steps=400,
                         lr_student=0.01, feature=1.0),  # LeNet-5's half diverges at rate 0.1; see 4 above
    # [inferred], among a dozen by test accuracy on seeds 0, 1; with bn 1, BN outweighs the classes so early
    "digits": replace(CIFAR10, synthesis_batch_size=100, bank_rounds=6, bank_synthesis_steps=60, bn=0.3,
                      synthesis_steps=50, lr_generator=3e-3, epochs=5, student_steps=180, batch_size=64),
}


# ---------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code: T = 20].

    (N, K), (N, K) -> (), at least 0. The student should give the teacher's probabilities. T² keeps the
    gradient's size as T grows.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def feature_loss(student_map, teacher_map):
    """Mean squared error over all elements [code].   (N, C_t, h', w') twice -> (), at least 0

    `student_map`: after the Regressor. The student should see what the teacher sees before it decides.
    """
    return F.mse_loss(student_map, teacher_map)


def one_hot_loss(teacher_logits, targets):
    """CE of the teacher's answer with the class that was asked for [code].

    (N, K), (N,) -> (), at least 0.
    The teacher should put each image into the class that was asked for.
    """
    return F.cross_entropy(teacher_logits, targets)


def bn_loss(statistics, running):
    """Σ over BN layers ‖var - running_var‖₂ + ‖mean - running_mean‖₂ [code].

    two lists of (mean, var) -> (), at least 0. mean and var (channels,): of a layer's input x, and
    what the layer remembers from real data. Plain norms, not
    squared; every layer has the same weight.   var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    """
    return sum(torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)
               for (mean, var), (running_mean, running_var) in zip(statistics, running, strict=True))


def csd_loss(auxiliary_logits, labels):
    """-CE of the auxiliary head, for the generator [code].

    (4N, 4K), (4N,) -> (), in [-4.686, -2.719] for K = 10. The range holds for logits of unit length.
    Where the head errs, the student's features do not yet tell the class from every side.
    """
    return -F.cross_entropy(auxiliary_logits, labels)


def adversarial_loss(student_logits, teacher_logits):
    """-KL(teacher || student) at T = 1 [code, a branch its scripts do not use].

    (N, K), (N, K) -> (), at most 0.
    The older way to ask for hard images: those on which student and teacher disagree.
    """
    return -kd_loss(student_logits, teacher_logits, 1.0)


def auxiliary_loss(auxiliary_logits, labels):
    """CE over the joint labels, for the head [code].   (4N, 4K), (4N,) -> (), at least 0

    Which class is it, and how was it turned? Predicting the rotation requires class-specific features.
    """
    return F.cross_entropy(auxiliary_logits, labels)


# ------------------------------------------------------------------------------ the trick: class and rotation
def rotations(images):
    """All four quarter turns, counter-clockwise, image by image: n0k0 n0k1 n0k2 n0k3 n1k0 ...

    (N, C, H, H) -> (4N, C, H, H)
    """
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])              # (4, N, C, H, W)
    return rearrange(turned, "k n c h w -> (n k) c h w")


def rotation_labels(labels):
    """4 · class + quarter turns, in the order of `rotations`.   (N,) -> (4N,), values 0 .. 4K-1"""
    return rearrange(4 * labels[:, None] + torch.arange(4, device=labels.device), "n k -> (n k)")


# -------------------------------------------------------------------------------------------------- networks
class Generator(nn.Module):
    """Latents (N, L) -> pixels (N, C, H, W) in (0, 1), in train mode [code].

    32x32, L = 256, C = 3: 2,328,899 weights.
    """
    def __init__(self, latent_dim, image_shape):
        super().__init__()
        channels, height, width = image_shape
        if height % 4 or width != height:      # it doubles twice, and CSD turns images by quarter turns
            raise BadInput(f"CSD needs square images, the side a multiple of 4, not {height}x{width}")
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128 * (height // 4) * (width // 4)),
            nn.Unflatten(1, (128, height // 4, width // 4)),                 # (N, 128, H/4, W/4)
            nn.BatchNorm2d(128),                                             # no activation before it [code]
            UpsampledConv2d(128, 128, bias=False),                           # doubled: (N, 128, H/2, W/2)
            nn.BatchNorm2d(128), nn.LeakyReLU(0.2, inplace=True),
            UpsampledConv2d(128, 64, bias=False),                            # (N, 64, H, W)
            nn.BatchNorm2d(64), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1), nn.Sigmoid())             # (N, C, H, W)

    def forward(self, z):
        return self.layers(z)


class AuxiliaryHead(nn.Module):
    """Student features (N, D) -> logits (N, 4K) of unit length [code]: names class and rotation together."""
    def __init__(self, features, num_classes, raw=False):
        super().__init__()
        self.raw = raw
        self.layers = nn.Sequential(nn.Linear(features, features), nn.ReLU(),
                                    nn.Linear(features, 4 * num_classes))

    def forward(self, features):
        logits = self.layers(features)
        return logits if self.raw else F.normalize(logits, dim=1)


class Regressor(nn.Module):
    """Student's last map (N, C_s, h, w) -> the teacher's shape (N, C_t, h', w') [code].

    Learns with the student. Weights: 640,000 for WRN-40-2 to WRN-16-1, 10,489,856 for ResNet-34 to
    ResNet-18, as many as the student has.
    """
    def __init__(self, student_channels, teacher_channels, teacher_height):
        super().__init__()
        wide = 2 * teacher_channels
        self.height = teacher_height
        self.layers = nn.Sequential(
            nn.Conv2d(student_channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True),
            nn.Conv2d(wide, teacher_channels, 1, bias=False))

    def forward(self, student_map):
        if student_map.shape[2] != self.height:       # F.adaptive_avg_pool2d; its gradient varies on a GPU
            ones = (torch.eye(side, device=student_map.device)[None] for side in student_map.shape[2:])
            rows, columns = (F.adaptive_avg_pool1d(one, self.height)[0] for one in ones)  # (h, h'), (w, h')
            student_map = rows.T @ student_map @ columns                     # (N, C_s, h', h')
        return self.layers(student_map)


def reinitialize(network):
    """In place: linear, convolution weights N(0, 0.02²), biases 0, BN scale N(1, 0.02²), shift 0 [code]."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def last_map(model, name, data):
    """The layer whose input is the last feature map, by `name` or as the model says, and its (C, h, w).

    None and None if it is unknown. Raises BadInput if there is no such layer or if it takes no map.
    """
    layers = dict(model.named_modules())
    layer = layers.get(name) if name else getattr(model, "last_map", None)
    if layer is None and not name:
        return None, None
    seen = probe(model, [layer], data) if layer else {}
    if layer not in seen or seen[layer].dim() != 4:
        raise BadInput(f"{type(model).__name__} has no layer '{name}' that takes maps (N, C, H, W); its last "
                       f"layers are {', '.join(list(layers)[-5:])}")
    return layer, seen[layer].shape[1:]


# -------------------------------------------------------------------------- one batch of images (both stages)
def new_generator(teacher, data, settings):
    """A generator with the authors' first weights, on the teacher's device."""
    return place_like(reinitialize(Generator(settings.latent_dim, data.image_shape)), teacher)


def synthesize(teacher, data, settings, total_steps, student=None, head=None, generator=None):
    """Fit a fresh generator and its latents.

    -> the best batch it made (N, C, H, W), its targets (N,), mean losses
    Stage 1 knows the teacher alone. Stage 2 passes `student` and `head`, for whom the images should be hard.
    `generator`: goes on from here, trained in place, but for its linear layer, which is drawn anew.
    """
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    if generator is None:
        generator = new_generator(teacher, data, settings)
    else:
        reinitialize(generator.layers[0])
    z = torch.randn(n, settings.latent_dim, device=device, requires_grad=True)         # the latents learn too
    targets = torch.randint(data.num_classes, (n,), device=device).sort().values      # sorted, as in the code
    optimizer = torch.optim.Adam([*generator.parameters(), z], settings.lr_generator, betas=(0.5, 0.999))
    best_pixels = torch.zeros(n, *data.image_shape, device=device)
    best_loss = torch.tensor(math.inf, device=device)
    layers = batchnorms(teacher, data) if settings.bn else []
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    fixed, features_of = ([teacher, student, head], [last_linear(student)]) if student else ([teacher], [])
    means = Means()
    with frozen(*fixed), recorded_statistics(layers) as statistics, recorded_inputs(features_of) as seen:
        for _ in steps(total_steps, "synthesis"):
            pixels = generator(z)                                            # (N, L) -> (N, C, H, W)
            images = normalize(augment(pixels, data), data)
            teacher_logits = teacher(images)                                 # (N, K)
            loss_oh = one_hot_loss(teacher_logits, targets)
            loss_bn = bn_loss([statistics[layer] for layer in layers], running)          # 0 without layers
            loss_csd = loss_adversarial = 0.0
            if student and settings.csd:
                student(rotations(images))                                   # (N, C, H, W) -> (4N, C, H, W)
                loss_csd = csd_loss(head(seen[features_of[0]]), rotation_labels(targets))    # (4N, 4K), (4N,)
            if student and settings.adversarial:
                loss_adversarial = adversarial_loss(student(images), teacher_logits)
            loss = (settings.oh * loss_oh + settings.bn * loss_bn
                    + settings.csd * loss_csd + settings.adversarial * loss_adversarial)
            # keep a copy of the pixels of least loss, from before this step's update; the loss is seen
            # through a random crop
            better = loss.detach() < best_loss
            best_pixels = torch.where(better, pixels.detach(), best_pixels)
            best_loss = torch.where(better, loss.detach(), best_loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            means.add(loss_oh=loss_oh, loss_bn=loss_bn, loss_csd=loss_csd, loss_adversarial=loss_adversarial)
    return best_pixels, targets, means.take()


def to_bytes(pixels):
    """pixels in [0, 1] -> uint8, truncated as the authors' PNG files are."""
    return (255 * pixels.clamp(0, 1)).to(torch.uint8)


@with_own_seed
def synthesize_bank(teacher, data, settings, run=None):
    """Stage 1: batches from the teacher alone, for every student of it.

    -> pixels (M, C, H, W) uint8, labels (M,)
    `run`: log and checkpoints, for main() alone.
    """
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    pixels = torch.zeros(settings.bank_rounds * n, *data.image_shape, dtype=torch.uint8, device=device)
    labels = torch.zeros(len(pixels), dtype=torch.long, device=device)
    kept = dict(generator=new_generator(teacher, data, settings)) if settings.keep_generator else {}
    start = run.resume(pixels=pixels, labels=labels, **kept) if run else 0
    for bank_round in range(start, settings.bank_rounds):
        made, targets, losses = synthesize(teacher, data, settings, settings.bank_synthesis_steps, **kept)
        rows = slice(bank_round * n, (bank_round + 1) * n)
        pixels[rows], labels[rows] = to_bytes(made), targets
        if run:
            run.log(bank_round, losses, made, targets)
    return pixels, labels


# --------------------------------------------------------------------------------------------- the algorithm
def check(settings):
    """Raises BadInput for settings that make no sense together."""
    if settings.mixup and settings.ce:
        raise BadInput("--mixup needs --ce 0: a mixture of two images has no class; or say --no-mixup")
    if settings.visits > 1 and settings.feature:
        raise BadInput("--visits above 1 needs --feature 0: the teacher's last maps are not kept")


@torch.no_grad()
def ask(teacher, pixels, data, settings):
    """A batch of the bank, pixels (N, C, H, W) uint8, and what the teacher says of it.

    -> images; what teacher and student are shown, the same without --mixup; the teacher's logits (N, K)
    """
    images = shown = normalize(augment(pixels / 255, data), data)
    if settings.mixup:                                                       # difference 10 above
        share = torch.rand(len(images), 1, 1, 1, device=images.device)
        shown = torch.lerp(images, images[torch.randperm(len(images), device=images.device)], share)
    return images, shown, teacher(shown)


@with_own_seed
def distill(teacher, student, data, settings, run=None, bank=None):
    """Train `student` in place on images made from `teacher`, which stays as it is. No real image comes in.

    `data`: a DataSpec. `bank`: what `synthesize_bank` returned; made here if it is None. `run`: log
    and checkpoints, for main() alone. Returns the bank of both stages, pixels (M, C, H, W) uint8 and
    labels (M,). Raises FloatingPointError when a loss is not finite.
    """
    check(settings)
    device, n = next(teacher.parameters()).device, settings.synthesis_batch_size
    bank = bank or synthesize_bank(teacher, data, settings)
    first_pixels, first_labels = (part.to(device) for part in bank)
    torch.manual_seed(settings.seed ^ 2 ** 31)                      # the same, whether stage 1 ran now or not
    pixels = torch.cat([first_pixels, first_pixels.new_zeros(settings.epochs * n, *data.image_shape)])
    labels = torch.cat([first_labels, first_labels.new_zeros(settings.epochs * n)])
    features_of = last_linear(student)                                # its input is the feature vector (N, D)
    teacher_map, teacher_shape = last_map(teacher, settings.teacher_last_map, data)
    student_map, student_shape = last_map(student, settings.student_last_map, data)
    use_feature = settings.feature > 0 and teacher_map is not None and student_map is not None
    recorded = [features_of, teacher_map, student_map] if use_feature else [features_of]
    head = AuxiliaryHead(features_of.in_features, data.num_classes, settings.raw_head).to(device)
    regressor = nn.Identity()
    if use_feature:
        regressor = place_like(Regressor(student_shape[0], *teacher_shape[:2]), teacher)
    optimizer = torch.optim.SGD([*student.parameters(), *regressor.parameters()], settings.lr_student, 0.9,
                                weight_decay=settings.weight_decay)
    head_optimizer = torch.optim.SGD(head.parameters(), settings.lr_head, 0.9,
                                     weight_decay=settings.weight_decay)
    kept = dict(generator=new_generator(teacher, data, settings)) if settings.keep_generator else {}
    start = run.resume(student=student, regressor=regressor, head=head, optimizer=optimizer,
                       head_optimizer=head_optimizer, pixels=pixels, labels=labels, **kept) if run else 0

    for epoch in range(start, settings.epochs):
        # ------ (1) G and z: min  w_oh CE(T(u), y) + w_bn L_bn - w_csd CE(head(S(rotations(u))), 4y + k)
        made, targets, losses = synthesize(teacher, data, settings, settings.synthesis_steps, student, head,
                                           **kept)
        end = len(first_labels) + (epoch + 1) * n
        pixels[end - n:end], labels[end - n:end] = to_bytes(made), targets
        reinitialize(head)                 # easy to overlook: new weights each epoch, the old momentum [code]
        if settings.fresh_head_optimizer:
            head_optimizer.state.clear()

        set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        means = Means()
        student.train()
        asked = ((batch, *ask(teacher, pixels[batch], data, settings))
                 for batch in batches(end, settings.batch_size, device))
        asked = revisited(asked, settings.visits, settings.student_steps)
        with frozen(teacher), recorded_inputs(recorded) as seen:
            for batch, images, shown, teacher_logits in steps(settings.student_steps, "distillation", asked):
                # ------ (2) Student, regressor: min  w_kd τ² KL(T || S) + w_ce CE(y) + w_fea MSE(last maps)
                student_logits = student(shown)                              # (N, K)
                loss_kd = kd_loss(student_logits, teacher_logits, settings.temperature)
                loss_ce = F.cross_entropy(student_logits, labels[batch])
                loss_feature = 0.0
                if use_feature:                          # ask() ran the teacher on this batch: visits is 1
                    loss_feature = feature_loss(regressor(seen[student_map]), seen[teacher_map])
                optimizer.zero_grad()
                (settings.kd * loss_kd + settings.ce * loss_ce + settings.feature * loss_feature).backward()
                optimizer.step()

                # ------ (3) Head: min  CE(head(stopgrad S(rotations(u))), 4y + k). S in eval mode, without
                # gradient: its BN statistics never see a rotated image, and it learns nothing from this task
                loss_head = 0.0
                if settings.csd:
                    student.eval()
                    with torch.no_grad():
                        student(rotations(images))                           # features (4N, D) are seen
                    student.train()
                    loss_head = auxiliary_loss(head(seen[features_of]), rotation_labels(labels[batch]))
                    head_optimizer.zero_grad()
                    loss_head.backward()
                    head_optimizer.step()
                means.add(loss_kd=loss_kd, loss_ce=loss_ce, loss_feature=loss_feature, loss_head=loss_head,
                          target_acc=(teacher_logits.argmax(1) == labels[batch]).float().mean())
        losses |= means.take()                                               # stops if one is not finite
        if run:
            run.log(epoch, losses, made, targets)
    return pixels, labels


# the settings that shape stage 1: a bank made with others is refused
OF_BANK = ("seed", "synthesis_batch_size", "bank_rounds", "bank_synthesis_steps", "lr_generator",
           "latent_dim", "keep_generator", "oh", "bn")


@command_line
def main(argv=None):
    options, settings = parse("csd", __doc__, Settings, PRESETS, argv,
                              bank="stage 1's file [checkpoints/TEACHER.bank-seedN.pt]")
    check(settings)
    data = dataset_spec(options)
    Generator(1, data.image_shape)                                           # refuses an image size now
    names = settings.teacher_last_map, settings.student_last_map
    teacher, student = load_networks(options, settings, data, lambda model: last_map(model, names[0], data))
    maps = [last_map(model, name, data) for model, name in zip((teacher, student), names)]
    last_linear(student)                                                     # refuses a student without one
    run = Run(options, settings, teacher, student, data)
    if settings.feature and (None, None) in maps:
        run.note("the feature term is off: name the last maps, --teacher-last-map, --student-last-map")
    if settings.bn and not batchnorms(teacher, data):
        run.note("the BN term is off: the teacher has no BatchNorm")

    path = options.bank or f"checkpoints/{options.teacher_name}.bank-seed{settings.seed}.pt"
    bank = run.cached("bank", path, OF_BANK, lambda stage: synthesize_bank(teacher, data, settings, stage))
    distill(teacher, student, data, settings, run, bank)
    run.finish()


if __name__ == "__main__":
    main()
