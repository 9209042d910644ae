"""CSD: Customizing Synthetic Data for Data-Free Student Learning.   Shiya Luo, Defang Chen, Can Wang.
ICME 2023, arXiv 2307.04542. Authors' code: github.com/luoshiya/CSD, commit 6acf251 (2023-07-06).

The idea. A generator is fitted from scratch, again and again, to produce one batch of images that a frozen teacher puts
into the classes we ask for and whose BatchNorm statistics look like real data. To make the images *hard for this student*,
a small auxiliary head on the student's features tries to name class and rotation of each rotated image, and the generator
is paid for every mistake of that head. All images go into a bank that only grows; the student learns from the bank, and
the head is fitted anew on the bank in every round, so that the difficulty follows the student.

     z, G  ──►  pixels ──►  A: crop, flip, normalise ──► images ─┬──► teacher ──► CE(targets), BN statistics ──┐
     ▲                                                           └──► 4 rotations ──► student ──► head ──► -CE ┤
     └────────── gradient, through frozen teacher, student and head, into G and z only ◄──────────────────────┘
     best batch of the round ──► bank (uint8) ──► images ─┬──► teacher ══► logits, last map          (no gradient)
                                                          ├──► student ──► KL + CE + 30 MSE ──► gradient: student, regressor
                                                          └──► 4 rotations ──► student ══► features ──► head ──► CE ──► gradient: head

Run    python csd.py --dataset digits      seeds 0-4, last epoch: student 95.94 ± 0.93 %, teacher 98.89 %, 131 s a run after the
                                           teacher's half minute, two CPU threads (benchmarks/results/csd-digits-seed*.jsonl)
       python csd.py --teacher resnet34 --student resnet18      CIFAR-10, the authors' numbers, for a GPU; not run, no number here
Copy   kd_loss, feature_loss, one_hot_loss, bn_loss, csd_loss, adversarial_loss, auxiliary_loss, rotations, rotation_labels,
       Generator, AuxiliaryHead, Regressor, ImageBank, synthesize_bank, distill
Letters   N batch, K classes, C H W image, D student features, L latent; the last maps are (N, C_s, h, w) and (N, C_t, h', w').
Sources   [abstract] the paper's · [code] the authors' code · [inferred] a reconstruction, where no source speaks. The paper's
       method section, equations and tables were not at hand: no equation number and no accuracy of the paper stands here.

Where paper, authors' code and this file differ
 1. README and abstract speak of an auxiliary task alone. The code also L2-normalises the head's logits, without a temperature,
    so that its CE is bounded (K = 10: 2.719 to 4.686; chance ln 40 = 3.689) and -10 CE cannot run away. Followed;
    --raw-head leaves the normalisation out: the loss is then unbounded below and the weight 10 no longer comparable.
 2. The head's weights are drawn anew every round but its SGD momentum is kept [code]. Followed; --fresh-head-optimizer clears it.
 3. The head that measures difficulty in round e was fitted in round e-1; in round 0 it is untrained [code]. Followed.
 4. The regression weight 30 is a default deep in the authors' parser and is not in their script or README. Kept, as --feature.
 5. Labels in the bank are the classes that were asked for, also where the teacher disagrees [code]. Followed; the log's
    `target_acc` is the fraction of the student's batches on which it agrees.
 6. The bank stores floor(255 x) [code, via PNG files]. Same values here, in one uint8 tensor, without files that a second
    run could mix up. What --bank-rounds made is kept by seed and reused by every student of the same teacher.
 7. Authors: seed 1, the best epoch on the test set, and every round a score of the head on the rotated test set. Here: seed 0
    unless told, the last epoch (the best is printed in brackets), no such score.
 8. The authors take the KL-adversarial term only where the CSD weight is 0. Here --adversarial adds to whatever --csd is.
    With --csd 0 the head is not trained: nothing reads it.
 9. Frozen networks get no weight gradients, the BN hook fires only in synthesis, nothing waits for `.item()`: the same mathematics
    up to rounding, in less time (benchmarks/throughput.py). On CUDA the default is TF32 with cudnn.benchmark; the authors run
    fp32 with cudnn.deterministic (--precision fp32 --deterministic).
10. Teachers: authors SGD, batch 256, weight decay 1e-4, three steps, best epoch on the test set; here batch 128, weight decay
    5e-4, cosine, last epoch (run.py), which is how the published teacher accuracies are reached.
"""
import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import (BadInput, Means, Shuffled, augment, autocast, batchnorms, cosine, frozen, last_linear, last_maps, newest_by_class,
                    normalize, recorded_inputs, recorded_statistics, report_collapse, seeded, set_lr, steps)
from run import Run, command_line, read_settings, stored_stage


# ------------------------------------------------------------------------------------- losses: tensors in, scalar out
def kd_loss(student_logits, teacher_logits, temperature):
    """T² KL(teacher || student) at temperature T, mean over the batch [code: T = 20].   (N, K), (N, K) -> ()

    At least 0. The student should share the teacher's doubts. T² keeps the gradient's size comparable as T grows.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    teacher_p = F.softmax(teacher_logits / temperature, dim=1)
    # 'batchmean' sums over classes; the default 'mean' would divide by K as well
    return temperature ** 2 * F.kl_div(log_student, teacher_p, reduction="batchmean")


def feature_loss(student_map, teacher_map):
    """Mean squared error over all elements [code].   (N, C_t, h', w') twice -> (), at least 0.   `student_map`: after the Regressor.

    The student should see what the teacher sees before it decides.
    """
    return F.mse_loss(student_map, teacher_map)


def one_hot_loss(teacher_logits, targets):
    """CE of the teacher's answer with the class that was asked for [code].   (N, K), (N,) -> (), at least 0

    An image counts as one of class y when the teacher takes it for one.
    """
    return F.cross_entropy(teacher_logits, targets)


def bn_loss(statistics, running):
    """Σ over BN layers ‖var - running_var‖₂ + ‖mean - running_mean‖₂ [code].   Two lists of (mean, var), (channels,) each -> ()

    At least 0. The running statistics are the one trace of its data that a teacher keeps besides its weights. Plain norms, not
    squared; every layer weighs the same. Of a BN layer's input x:   var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    """
    return sum(torch.linalg.vector_norm(var - running_var) + torch.linalg.vector_norm(mean - running_mean)
               for (mean, var), (running_mean, running_var) in zip(statistics, running, strict=True))


def csd_loss(auxiliary_logits, labels):
    """-CE of the auxiliary head, for the generator [code].   (4N, 4K), (4N,) -> ().   Unit-length logits, K = 10: in [-4.686, -2.719].

    Images on which the head errs are images whose class the student has not understood from every side.
    """
    return -F.cross_entropy(auxiliary_logits, labels)


def adversarial_loss(student_logits, teacher_logits):
    """-KL(teacher || student) at T = 1, mean over the batch [code, a branch its scripts do not use].   (N, K), (N, K) -> (), at most 0

    The older way to ask for hard images: those on which student and teacher disagree.
    """
    return -kd_loss(student_logits, teacher_logits, 1.0)


def auxiliary_loss(auxiliary_logits, labels):
    """CE over the joint labels, for the head [code].   (4N, 4K), (4N,) -> (), at least 0

    Which class is it, and how was it turned? Only who knows the class well can tell.
    """
    return F.cross_entropy(auxiliary_logits, labels)


# --------------------------------------------------------------------------------------- the trick: class and rotation
def rotations(images):
    """All four quarter turns, counter-clockwise, image by image: n0k0 n0k1 n0k2 n0k3 n1k0 ...   Square images."""
    turned = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(4)])              # (4, N, C, H, W)
    return rearrange(turned, "k n c h w -> (n k) c h w")


def rotation_labels(labels):
    """4 · class + quarter turns, in the order of `rotations`.   (N,) -> (4N,), values 0 .. 4K-1"""
    return rearrange(4 * labels[:, None] + torch.arange(4, device=labels.device), "n k -> (n k)")


# ------------------------------------------------------------------------------------------------------------ networks
class Generator(nn.Module):
    """Latents (N, L) -> pixels (N, C, H, W) in (0, 1) [code]. 32x32, L = 256: 2,328,899 parameters. Always in train mode."""
    def __init__(self, latent_dim, image_shape):
        super().__init__()
        channels, height, width = image_shape
        if height % 4 or width != height:      # it doubles twice, and CSD turns images by quarter turns
            raise BadInput(f"CSD needs square images with a side that is a multiple of 4, not {height}x{width}")
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 128 * (height // 4) * (width // 4)),
            nn.Unflatten(1, (128, height // 4, width // 4)),                              # (N, 128, H/4, W/4)
            nn.BatchNorm2d(128),                                                          # no activation before it [code]
            nn.Upsample(scale_factor=2),                                                  # (N, 128, H/2, W/2)
            nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),                                                  # (N, 128, H, W)
            nn.Conv2d(128, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(64, channels, 3, padding=1), nn.Sigmoid())                          # (N, C, H, W)

    def forward(self, z):
        return self.layers(z)


class AuxiliaryHead(nn.Module):
    """Student features (N, D) -> logits (N, 4K) of unit length [code]: names class and rotation together."""
    def __init__(self, features, num_classes, raw=False):
        super().__init__()
        self.raw = raw
        self.layers = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 4 * num_classes))

    def forward(self, features):
        logits = self.layers(features)
        return logits if self.raw else F.normalize(logits, dim=1)


class Regressor(nn.Module):
    """Student's last map (N, C_s, h, w) -> the teacher's shape (N, C_t, h', w') [code]. Learns with the student, then is dropped.

    WRN-40-2 to WRN-16-1: 640,000 parameters; ResNet-34 to ResNet-18: 10,489,856, as many as the student has.
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
        if student_map.shape[2] != self.height:
            student_map = F.adaptive_avg_pool2d(student_map, self.height)                 # (N, C_s, h', w')
        return self.layers(student_map)


def reinitialize(network, rng):
    """All linear and convolution weights N(0, 0.02²), biases 0, BN scale N(1, 0.02²) and shift 0 [code]. In place."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02, generator=rng)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# ------------------------------------------------------------------------------------------------------ the image bank
class ImageBank:
    """All images made so far: pixels (M, C, H, W) uint8, value = floor(255 x) [code], and labels (M,). Forgets nothing.

    One tensor of fixed capacity; `with_room` gives a larger one. `state_dict` holds what came after the first `kept_elsewhere`
    images, so that a checkpoint does not carry stage 1 along, and a hash of those, so that it is not continued with others.
    """
    def __init__(self, image_shape, capacity, device):
        self.pixels = torch.zeros(capacity, *image_shape, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(capacity, dtype=torch.long, device=device)
        self.count = self.kept_elsewhere = self.teacher_queries = 0
        self.sha256 = ""

    def add(self, pixels, labels):
        """pixels (N, C, H, W) in [0, 1] or uint8, labels (N,)."""
        if pixels.dtype != torch.uint8:
            pixels = (255 * pixels.detach().clamp(0, 1)).to(torch.uint8)                  # the cast truncates
        end = self.count + len(labels)
        self.pixels[self.count:end], self.labels[self.count:end], self.count = pixels, labels, end

    def take(self, indices):
        """-> pixels (N, C, H, W) in [0, 1], labels (N,)"""
        return self.pixels[indices] / 255, self.labels[indices]

    def with_room(self, extra):
        """A copy that holds `extra` more images; its `state_dict` leaves out those that are in it now."""
        copy = ImageBank(self.pixels.shape[1:], self.count + extra, self.pixels.device)
        copy.add(self.pixels[:self.count], self.labels[:self.count])
        copy.kept_elsewhere, copy.teacher_queries = self.count, self.teacher_queries
        copy.sha256 = hashlib.sha256(self.pixels[:self.count].cpu().numpy().tobytes()).hexdigest()
        return copy

    def state_dict(self):
        new = slice(self.kept_elsewhere, self.count)
        return {"pixels": self.pixels[new].clone(), "labels": self.labels[new].clone(), "sha256": self.sha256}

    def load_state_dict(self, state):
        if state["sha256"] != self.sha256:
            raise BadInput("the stage-1 bank is not the one that the checkpoint was made with; put that one back, or start anew")
        self.count = self.kept_elsewhere
        self.add(state["pixels"].to(self.pixels.device), state["labels"].to(self.labels.device))


# ------------------------------------------------------------------------------------- one batch of images (both stages)
def synthesis_state(data, settings, device, rng):
    """What `synthesize` needs between its steps: part of the run's state, so that a kill costs a minute and not a batch."""
    generator = Generator(settings.latent_dim, data.image_shape).to(device, memory_format=torch.channels_last)
    z = torch.zeros(settings.synthesis_batch_size, settings.latent_dim, device=device, requires_grad=True)
    return dict(
        rng=rng, generator=generator, z=z, targets=torch.zeros(len(z), dtype=torch.long, device=device),
        generator_optimizer=torch.optim.Adam([*generator.parameters(), z], settings.lr_generator, betas=(0.5, 0.999)),
        best_pixels=torch.zeros(len(z), *data.image_shape, device=device), best_loss=torch.zeros((), device=device),
        synthesis_means=Means("loss_oh", "loss_bn", "loss_csd", "loss_adversarial", device=device),
        synthesis_step=0, seconds_synthesis=0.0, images_synthesized=0, teacher_queries=0)


def synthesize(state, teacher, data, settings, total_steps, hardness=None, run=None):
    """Fit a fresh generator and its latents for `total_steps`; the best batch ends in state["best_pixels"], state["targets"].

    `hardness(images, teacher_logits)` -> (csd, adversarial), the terms that know the student; None in stage 1. A new batch
    begins where state["synthesis_step"] is 0, not with the call: a resumed run enters in the middle. The caller sets it back.
    """
    names = ("rng", "generator", "generator_optimizer", "z", "targets", "best_pixels", "best_loss")
    rng, generator, optimizer, z, targets, best_pixels, best_loss = (state[name] for name in names)
    layers = batchnorms(teacher)
    running = [(layer.running_mean, layer.running_var) for layer in layers]
    nothing = torch.zeros((), device=z.device)
    with frozen(teacher), recorded_statistics(layers) as seen:
        for step in steps(state, "synthesis", total_steps, run):
            if step == 0:                                      # a new batch: new latents, classes, generator and Adam
                z.data.normal_(generator=rng)
                targets.copy_(torch.randint(data.num_classes, (len(z),), generator=rng, device=z.device).sort().values)   # as the code
                reinitialize(generator, rng)
                optimizer.state.clear()
                best_loss.fill_(math.inf)
            with autocast(settings, z.device):
                pixels = generator(z).float()                                             # (N, C, H, W)
                images = normalize(augment(pixels, data, rng), data)
                teacher_logits = teacher(images).float()                                  # (N, K)
            loss_oh = one_hot_loss(teacher_logits, targets)
            loss_bn = bn_loss([seen[layer] for layer in layers], running) if layers else nothing
            loss_csd, loss_adversarial = hardness(images, teacher_logits) if hardness else (nothing, nothing)
            loss = (settings.oh * loss_oh + settings.bn * loss_bn
                    + settings.csd * loss_csd + settings.adversarial * loss_adversarial)
            # Chosen under this step's random crop, kept as it was before the update, and as a copy: an alias would go on
            # moving with the generator.
            better = loss.detach() < best_loss
            best_pixels.copy_(torch.where(better, pixels.detach(), best_pixels))
            best_loss.copy_(torch.where(better, loss.detach(), best_loss))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["synthesis_means"].add(loss_oh, loss_bn, loss_csd, loss_adversarial)
            state["teacher_queries"] += len(z)


def synthesize_bank(teacher, data, settings, run=None):
    """Stage 1: `bank_rounds` batches from the teacher alone [code]. They serve every student of this teacher. -> ImageBank"""
    device = next(teacher.parameters()).device
    bank = ImageBank(data.image_shape, settings.bank_rounds * settings.synthesis_batch_size, device)
    with seeded(settings.seed):
        rng = torch.Generator(device).manual_seed(settings.seed)
        state = dict(bank=bank, round=0, **synthesis_state(data, settings, device, rng))
    if run:
        run.restore(state)
    for bank_round in range(state["round"], settings.bank_rounds):
        synthesize(state, teacher, data, settings, settings.bank_synthesis_steps, run=run)
        bank.add(state["best_pixels"], state["targets"])
        state.update(round=bank_round + 1, synthesis_step=0, images_synthesized=bank.count)
        means = state["synthesis_means"].take()
        if run:
            report_collapse(run, state["best_pixels"], round=bank_round)
            run.report(event="bank", round=bank_round, loss_oh=means["loss_oh"], loss_bn=means["loss_bn"])
    bank.teacher_queries = state["teacher_queries"]
    return bank


# ------------------------------------------------------------------------------------------------------- the algorithm
def distill(teacher, student, data, settings, run=None, bank=None):
    """Train `student` in place on images made from `teacher`, which stays as it is. No real image is passed in.

    `data`: a DataSpec. `settings`: the fields of a preset and `seed`; optionally `precision`, `teacher_last_map` and
    `student_last_map` (a layer's name). `bank`: the ImageBank of stage 1; made here, without checkpoints, if it is None.
    Returns the bank of both stages; the student comes back in train mode. Raises FloatingPointError when a loss is not finite.
    """
    device = next(teacher.parameters()).device
    bank = (bank or synthesize_bank(teacher, data, settings)).with_room(settings.epochs * settings.synthesis_batch_size)
    teacher_map, student_map, map_shapes = last_maps(teacher, student, data, settings)
    use_feature = bool(settings.feature and map_shapes)
    classifier = last_linear(student)                                  # its input is the feature vector (N, D)
    with seeded(settings.seed):
        rng = torch.Generator(device).manual_seed(settings.seed + 1)   # not stage 1's stream (but that of the next seed's stage 1)
        synthesis = synthesis_state(data, settings, device, rng)
        head = AuxiliaryHead(classifier.in_features, data.num_classes, settings.raw_head).to(device)
        regressor = Regressor(map_shapes[1][1], *map_shapes[0][1:3]) if use_feature else nn.Identity()      # C_s, C_t, h'
        regressor.to(device, memory_format=torch.channels_last)
    trained = [*student.parameters(), *regressor.parameters()]
    optimizer = torch.optim.SGD(trained, settings.lr_student, momentum=0.9, weight_decay=settings.weight_decay)
    head_optimizer = torch.optim.SGD(head.parameters(), settings.lr_head, 0.9, weight_decay=settings.weight_decay)
    state = dict(student=student, regressor=regressor, head=head, optimizer=optimizer, head_optimizer=head_optimizer, bank=bank,
                 student_means=Means("loss_kd", "loss_ce", "loss_feature", "loss_head", "target_acc", device=device),
                 epoch=0, distillation_step=0, seconds_distillation=0.0, student_steps=0,
                 batches=Shuffled(rng), **synthesis)
    state.update(images_synthesized=bank.count, teacher_queries=bank.teacher_queries)
    if run:
        if settings.feature and not use_feature:
            run.report(event="note", text="the feature term is off: name the last maps, --teacher-last-map, --student-last-map")
        if settings.bn and not batchnorms(teacher):
            run.report(event="note", text="the BN term is off: the teacher has no BatchNorm")
        run.restore(state)
    nothing = torch.zeros((), device=device)

    def hardness(images, teacher_logits):
        """The two terms of the generator's loss that look at the student; 0 where their weight is."""
        loss_csd = loss_adversarial = nothing
        if settings.csd:
            with autocast(settings, device), recorded_inputs([classifier]) as seen:
                student(rotations(images))                                                # (N, C, H, W) -> (4N, C, H, W)
            loss_csd = csd_loss(head(seen[classifier].float()), rotation_labels(state["targets"]))
        if settings.adversarial:
            with autocast(settings, device):
                student_logits = student(images).float()
            loss_adversarial = adversarial_loss(student_logits, teacher_logits)
        return loss_csd, loss_adversarial

    for epoch in range(state["epoch"], settings.epochs):
        # -------- (1) Generator and latents: min  w_oh CE(T(u), y) + w_bn L_bn - w_csd CE(head(S(rotations(u))), 4y + k)
        with frozen(student, head):
            synthesize(state, teacher, data, settings, settings.synthesis_steps, hardness, run)
        if state["distillation_step"] == 0:                    # else resumed in the middle of (2) and (3): the bank has it already
            bank.add(state["best_pixels"], state["targets"])
            state["images_synthesized"] = bank.count
            reinitialize(head, rng)                            # easy to overlook: a fresh head each round ...
            if settings.fresh_head_optimizer:                  # ... which in the authors' code keeps the old one's momentum
                head_optimizer.state.clear()
            state["batches"].restart()
            set_lr(optimizer, cosine(settings.lr_student, epoch, settings.epochs))
        student.train()
        with frozen(teacher), recorded_inputs([m for m in (teacher_map, student_map, classifier) if m]) as seen:
            for _ in steps(state, "distillation", settings.student_steps, run):
                pixels, labels = bank.take(state["batches"].next(bank.count, settings.batch_size))
                images = normalize(augment(pixels, data, rng), data)                      # (N, C, H, W)
                with torch.no_grad(), autocast(settings, device):
                    teacher_logits = teacher(images).float()                              # (N, K)

                # -------- (2) Student and regressor: min  w_kd T² KL(teacher || student) + w_ce CE(y) + w_fea MSE(maps)
                with autocast(settings, device):
                    student_logits = student(images).float()
                    mapped = regressor(seen[student_map]).float() if use_feature else nothing
                loss_kd = kd_loss(student_logits, teacher_logits, settings.temperature)
                loss_ce = F.cross_entropy(student_logits, labels)
                loss_feature = feature_loss(mapped, seen[teacher_map].float()) if use_feature else nothing
                optimizer.zero_grad()
                (settings.kd * loss_kd + settings.ce * loss_ce + settings.feature * loss_feature).backward()
                optimizer.step()

                # -------- (3) Head: min  CE(head(stopgrad S(rotations(u))), 4y + k), after the student's step, S in eval mode:
                # its BN statistics never see a rotated image, and it gets no gradient from this task
                loss_head = nothing
                if settings.csd:
                    student.eval()
                    with torch.no_grad(), autocast(settings, device):
                        student(rotations(images))                                        # (N, C, H, W) -> (4N, C, H, W)
                    student.train()
                    loss_head = auxiliary_loss(head(seen[classifier].float()), rotation_labels(labels))
                    head_optimizer.zero_grad()
                    loss_head.backward()
                    head_optimizer.step()

                target_acc = (teacher_logits.argmax(1) == labels).float().mean()
                state["student_means"].add(loss_kd, loss_ce, loss_feature, loss_head, target_acc)
                state["student_steps"] += 1
                state["teacher_queries"] += len(labels)

        means = {**state["synthesis_means"].take(), **state["student_means"].take()}
        state.update(epoch=epoch + 1, synthesis_step=0, distillation_step=0)
        if run:
            samples = newest_by_class(bank.pixels[:bank.count], bank.labels, data.num_classes)
            run.report(epoch=epoch, **means, pixel_std=report_collapse(run, state["best_pixels"], epoch=epoch), samples=samples)
    return bank


# -------------------------------------------------------------------------------------- hyperparameters, command line
AUTHORS = dict(  # [code] scripts of CIFAR-10, WRN-40-2 to WRN-16-1, both stages
    epochs=100, batch_size=128, student_steps=2000, lr_student=0.1, weight_decay=1e-4, temperature=20.0,
    kd=1.0, ce=1.0, feature=30.0, lr_head=0.1, raw_head=False, fresh_head_optimizer=False,
    synthesis_batch_size=200, synthesis_steps=200, lr_generator=1e-3, latent_dim=256, oh=1.0, bn=1.0, csd=10.0, adversarial=0.0,
    bank_rounds=400, bank_synthesis_steps=500)
PRESETS = {
    "cifar10-wrn40_2-wrn16_1": AUTHORS,
    "cifar10": AUTHORS,                          # [inferred] the authors' scripts cover the pair above only
    "cifar100": AUTHORS,                         # [inferred]
    "svhn": AUTHORS,                             # [inferred]; no crop, no flip: that is in the data set's DataSpec
    # [inferred] a look at the method, 1/50 of the authors' stage 1 and 1/100 of their student steps
    "cifar10-short": {**AUTHORS, "bank_rounds": 20, "bank_synthesis_steps": 200, "epochs": 10, "student_steps": 200},
    # [inferred], a dozen settings tried on the test accuracy of seeds 0 and 1. With bn 1, BN drowns the classes in so few steps
    "digits": {**AUTHORS, "synthesis_batch_size": 100, "bank_rounds": 6, "bank_synthesis_steps": 60, "synthesis_steps": 50,
               "bn": 0.3, "lr_generator": 3e-3, "epochs": 5, "student_steps": 180, "batch_size": 64},
}
FLAGS = {
    "student_steps": "student steps an epoch",
    "lr_student": "SGD, momentum 0.9, cosine over the epochs to 0; also the regressor's",
    "weight_decay": "of student, regressor and head",
    "temperature": "of the KL term, τ",
    "kd": "weight of τ² KL(teacher || student)",
    "ce": "weight of CE with the bank's labels",
    "feature": "weight of the last maps' mean squared error; 0 = off",
    "lr_head": "SGD, momentum 0.9, constant",
    "raw_head": "leave the head's logits as they are instead of normalising them to unit length",
    "fresh_head_optimizer": "clear the head's momentum when it is drawn anew",
    "synthesis_batch_size": "images a synthesised batch",
    "synthesis_steps": "generator steps a batch, stage 2",
    "lr_generator": "Adam, betas (0.5, 0.999), for generator and latents",
    "latent_dim": "length of z",
    "oh": "weight of the teacher's CE with the asked-for class",
    "bn": "weight of the BN statistics' distance",
    "csd": "weight of the auxiliary head's CE, which the generator raises; 0 = the CSD term off",
    "adversarial": "weight of KL(teacher || student), which the generator raises; 0 = off, as in the authors' runs",
    "bank_rounds": "stage 1: batches made before the student's first step",
    "bank_synthesis_steps": "stage 1: generator steps a batch",
}
TEXT_FLAGS = {"bank": "stage 1's file [checkpoints/TEACHER.bank-seedN.pt]"}
BANK_SETTINGS = ("seed", "synthesis_batch_size", "bank_rounds", "bank_synthesis_steps", "lr_generator", "latent_dim", "oh", "bn",
                 "precision")      # those that shape stage 1's bank: a file made with others is refused


def stored_bank(run, settings):
    """Stage 1's bank for this teacher, seed and stage settings: read from its file, or made now and kept there."""
    # refuse now, before hours of synthesis, what distill would refuse
    last_maps(run.teacher.model, run.student, run.data, settings), last_linear(run.student), Generator(1, run.data.image_shape)

    def make(progress):
        bank = synthesize_bank(run.teacher.model, run.data, settings, progress)
        return dict(pixels=bank.pixels, labels=bank.labels, teacher_queries=bank.teacher_queries)
    path = settings.bank or f"checkpoints/{run.teacher.name}.bank-seed{settings.seed}.pt"
    found = stored_stage(run, settings, "image bank", path, BANK_SETTINGS, make)
    bank = ImageBank(run.data.image_shape, len(found["labels"]), run.device)
    bank.add(found["pixels"].to(run.device), found["labels"].to(run.device))
    bank.teacher_queries = found["teacher_queries"]
    return bank


@command_line
def main(argv=None):
    settings = read_settings(argv, "csd", __doc__, PRESETS, FLAGS, TEXT_FLAGS)
    run = Run("csd", settings)
    distill(run.teacher.model, run.student, run.data, settings, run, stored_bank(run, settings))
    run.finish()


if __name__ == "__main__":
    main()
