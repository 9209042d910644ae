"""How fast a method's steps are, as a fraction of what this machine's matrix products reach in the same minute.

    python benchmarks/throughput.py --method csd [--precision bf16] [--compile] [--log benchmarks/results/NAME.jsonl]

Numerator: the FLOPs of the *frozen* step (no weight gradient that nobody reads), counted once by PyTorch and used for every
variant, so that waste earns nothing. Denominator: the median of 2048 x 2048 matrix products in the same precision, taken
between the timed steps. Seconds are noise on a shared machine; the fractions and the ratio of two variants of one run are not.

Variants:
    authors   their order of work, written anew from its description (below, per method)
    here      the method's own `distill`, timed from one `tick` to the next: frozen passes, channels_last, eval-mode BatchNorm as the
              affine map that it is

    csd         WRN-40-2 to WRN-16-1, 32x32, 200 synthesised images, batch 128. Authors: crops in a Python loop over images, weight
                gradients in every network, a permuted copy of each BN input for its variance in every teacher pass, a graph for
                the head's student pass, one .item() a step. Without their PNG files and loader processes, which would only add.
    dafl        ResNet-34 to ResNet-18, 32x32. Authors: weight gradients in the teacher, one backward pass over the sum, the test
                set (10,000 images) once in 120 steps of 1,024 images.
    dafl-mnist  LeNet-5 to LeNet-5-half, 32x32, batches of 512: the generator is nearly all of the work, so nothing is to be won.
    rdskd       ResNet-34 to ResNet-18, 32x32, batches of 512. Authors, phase 1: two teacher calls with weight gradients, a
                state_dict and four .item() a step; phase 2: graphs of generator and teacher that are thrown away, the whole test
                set every 10 steps.
    deepinversion  one synthesis step, ResNet-34, 32x32, batches of 256. Authors, in their first call (each later call of their script
                registers its hooks once more): weight gradients, a permuted copy of each BN input for its variance, terms of
                weight 0, two .item() a step.
    cudfkd      one round (1 generator step, 10 student steps), WRN-40-2 to WRN-16-1, 32x32, batches of 256. Authors: BN statistics with
                copies in all 11 teacher passes, weight gradients in teacher and student in the generator's step, ten batches one by
                one, two accuracies with .item(), a KL and a sorted batch of images a step. Without their pictures and scoring. Ours on a
                CPU: --images-per-pass 128.
    surrogate_kd  no steps: how many procedural pictures of 32x32 a second each generator makes, on one thread of a CPU unless --threads
                says otherwise, or on a GPU; 64 at a time on a CPU, 1,024 on a GPU. What limits more on a CPU, by a profile:
                element-wise operations for noise, spectrum, leaves (each of 200 leaves is tested at every pixel) and fractals (220 steps of
                the chaos game, one after another, of 64 points a picture), and beside matrix products for shaders; convolutions for the
                generator.
The scoring of the test set is added to a step of dafl and rdskd by its share: the authors' cadence above, and ours, once in 120 steps.
It is not in the numerator. --batch-size sets all batch sizes of all but csd; on a CPU it is 32, cudfkd's 256, with the scoring in proportion.
"""
import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import csd
import cudfkd
import dafl
import deepinversion
import rdskd
import surrogate_kd
from common import DATASETS, autocast, batchnorms, first_linear, frozen, last_linear, normalize, recorded_inputs, seeded
from models import build_model
from run import compile_networks, device_name, set_up_device, versions

SIZE = 2048


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


class Stopwatch:
    """A `run` that times the steps between its ticks, with matrix products in between."""
    def __init__(self, device, precision, skip=1):
        self.device, self.skip, self.seconds, self.products = device, skip, {}, []
        self.factors = torch.randn(2, SIZE, SIZE, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        self.before, self.shares = {}, {}

    def product(self):
        wait(self.device)
        began = time.perf_counter()
        for _ in range(20 if self.device.type == "cuda" else 1):
            self.factors[0] @ self.factors[1]
        wait(self.device)
        count = 20 if self.device.type == "cuda" else 1
        self.products.append(2 * SIZE ** 3 * count / (time.perf_counter() - began))

    def start(self):
        for _ in range(3):
            self.product()
        wait(self.device)
        self.began = time.perf_counter()

    def lap(self, name):
        wait(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - self.began)
        self.start()

    def restore(self, state):
        self.start()

    def tick(self, state):
        moved = [key for key in ("synthesis_step", "distillation_step") if key in state and state[key] != self.before.get(key, 0)]
        self.before = {key: state[key] for key in ("synthesis_step", "distillation_step") if key in state}
        self.lap(moved[0].removesuffix("_step"))

    def report(self, **row):
        pass

    def median(self, name):
        """Seconds of one lap, with the share of other work that belongs to it."""
        other, share = self.shares.get(name, (None, 0))
        return statistics.median(self.seconds[name][self.skip:]) + (share * self.median(other) if other else 0)


class FlopWatch(Stopwatch):
    """The same, but a lap's measure is its FLOPs as PyTorch counts them."""
    def __init__(self, device, mode):
        super().__init__(device, "fp32", skip=0)
        self.mode = mode

    def start(self):
        self.began = self.mode.get_total_flops()

    def lap(self, name):
        self.seconds.setdefault(name, []).append(self.mode.get_total_flops() - self.began)
        self.start()


# ---------------------------------------------------------------------------------------------------------------- csd
def csd_setting(settings, device):
    data = DATASETS["cifar10"]
    with seeded(0):
        teacher, student = build_model("wrn40_2", 10, data.image_shape), build_model("wrn16_1", 10, data.image_shape)
    settings = SimpleNamespace(**{**csd.PRESETS["cifar10-wrn40_2-wrn16_1"], **settings}, seed=0)
    settings.lr_student = 1e-3     # an untrained teacher and noise as images: 0.1 would diverge; the arithmetic is the same
    settings.epochs = settings.bank_rounds = settings.bank_synthesis_steps = 1
    bank = csd.ImageBank(data.image_shape, 2 * settings.batch_size, device)
    labels = torch.arange(2 * settings.batch_size, device=device) % 10
    bank.add(torch.rand(2 * settings.batch_size, *data.image_shape, device=device), labels)
    return teacher.to(device).eval(), student.to(device), data, settings, bank


def csd_flops(device):
    """FLOPs of one frozen synthesis step and one frozen distillation step, counted at a 1/40 and 1/32 batch and scaled."""
    counted = {}

    class Counter:
        def restore(self, state):
            self.before = mode.get_total_flops()        # what building the networks took

        def tick(self, state):
            counted["distillation" if state["distillation_step"] else "synthesis"] = mode.get_total_flops() - self.before
            self.before = mode.get_total_flops()

        def report(self, **row):
            pass
    teacher, student, data, settings, bank = csd_setting(dict(synthesis_steps=1, student_steps=1), device)
    settings.synthesis_batch_size, settings.batch_size = 5, 4
    with FlopCounterMode(display=False) as mode:
        csd.distill(teacher, student, data, settings, Counter(), bank)
    return {"synthesis": counted["synthesis"] * 40, "distillation": counted["distillation"] * 32}


def csd_here(watch, options, laps):
    teacher, student, data, settings, bank = csd_setting({**options, "synthesis_steps": laps, "student_steps": laps}, watch.device)
    if options["compile"]:
        compile_networks(teacher, student)
    csd.distill(teacher.to(memory_format=torch.channels_last), student.to(memory_format=torch.channels_last), data, settings, watch, bank)


def csd_authors(watch, options, laps):
    """The same arithmetic in the authors' order of work (see above), without csd.py's frozen passes."""
    teacher, student, data, settings, bank = csd_setting(options, watch.device)
    device, n = watch.device, settings.synthesis_batch_size
    generator = csd.Generator(settings.latent_dim, data.image_shape).to(device)
    head = csd.AuxiliaryHead(64, 10).to(device)
    regressor = csd.Regressor(64, 128, 8).to(device)
    z, targets = torch.randn(n, settings.latent_dim, device=device, requires_grad=True), torch.arange(n, device=device) % 10
    optimizer_g = torch.optim.Adam([*generator.parameters(), z], 1e-3, betas=(0.5, 0.999))
    optimizer_s = torch.optim.SGD([*student.parameters(), *regressor.parameters()], settings.lr_student, momentum=0.9, weight_decay=1e-4)
    optimizer_h = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    distances = {}

    def measure(layer, inputs):
        x = inputs[0]
        variance = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        distances[layer] = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - x.mean((0, 2, 3)), 2)

    def crops(pixels):
        padded, moved = F.pad(pixels, (4,) * 4), []
        for image, (top, left) in zip(padded, torch.randint(0, 9, (len(pixels), 2))):
            image = image[:, top:top + 32, left:left + 32]
            moved.append(image.flip(2) if torch.rand(()) < 0.5 else image)
        return normalize(torch.stack(moved), data).contiguous()
    hooks = [layer.register_forward_pre_hook(measure) for layer in batchnorms(teacher)]
    classifier, best, best_pixels = last_linear(student), 1e6, None
    with recorded_inputs([classifier, student.last_map, teacher.last_map]) as seen:
        watch.start()
        student.eval()
        for _ in range(laps):
            pixels = generator(z)
            images = crops(pixels)
            logits = teacher(images)
            student(csd.rotations(images))
            loss = (F.cross_entropy(logits, targets) + sum(distances.values())
                    + 10 * csd.csd_loss(head(seen[classifier]), csd.rotation_labels(targets)))
            if loss.item() < best:
                best, best_pixels = loss.item(), pixels.detach().clone()
            optimizer_g.zero_grad()
            loss.backward()
            optimizer_g.step()
            watch.lap("synthesis")
        for network in (teacher, student, head):
            network.zero_grad()
        for _ in range(laps):
            pixels, labels = bank.take(torch.arange(settings.batch_size, device=device))
            images = crops(pixels)
            student.train()
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            loss = (csd.kd_loss(logits, teacher_logits, 20) + F.cross_entropy(logits, labels)
                    + 30 * csd.feature_loss(regressor(seen[student.last_map]), seen[teacher.last_map]))
            optimizer_s.zero_grad()
            loss.backward()
            optimizer_s.step()
            student.eval()
            student(csd.rotations(images))
            loss = csd.auxiliary_loss(head(seen[classifier].detach()), csd.rotation_labels(labels))
            optimizer_h.zero_grad()
            loss.backward()
            optimizer_h.step()
            (logits.argmax(1) == labels).float().mean().item()
            watch.lap("distillation")
    for hook in hooks:
        hook.remove()


# -------------------------------------------------------------------------------------------------------- dafl and rdskd
TEST_SET = 10_000


def generator_setting(method, preset, options, device):
    """Teacher, student, data and settings of a generator method, at `options["batch"]`, with constant schedules."""
    dataset = preset.partition("-")[0]
    data = DATASETS[dataset]
    names = ("lenet5", "lenet5_half") if dataset == "mnist" else ("resnet34", "resnet18")
    with seeded(0):
        teacher, student = (build_model(name, 10, data.image_shape).to(device) for name in names)
    settings = SimpleNamespace(**{**method.PRESETS[preset], **options, "epochs": 1, "generator_epochs": 1}, seed=0)
    settings.lr_student, settings.schedule, full = 1e-4, "constant", settings.batch_size      # untrained teacher: keep it tame
    settings.batch_size = settings.synthesis_batch_size = options["batch"] or (full if device.type == "cuda" else 32)
    return teacher.eval(), student, data, settings, full


def generator_here(method, preset):
    def variant(watch, options, laps):
        options = {**options, "student_steps": laps, "generator_steps": laps}
        teacher, student, data, settings, full = generator_setting(method, preset, options, watch.device)
        if options["compile"]:
            compile_networks(teacher, student)
        teacher, student = teacher.to(memory_format=torch.channels_last), student.to(memory_format=torch.channels_last)
        if method is rdskd:
            generator = rdskd.train_generator(teacher, data, settings, watch)
            watch.before = {}
            rdskd.distill(teacher, student, data, settings, watch, generator)
        else:
            dafl.distill(teacher, student, data, settings, watch)
        watch.start()
        with frozen(student):
            for _ in range(laps):
                score(watch, student, data, settings, full, 120)
    return variant


def score(watch, student, data, settings, full, every):
    """One lap of scoring some images; the whole test set every `every` steps of `full` images is what belongs to one step."""
    scored = 1024 if watch.device.type == "cuda" else 64
    images = torch.randn(scored, *data.image_shape, device=watch.device)
    mode = student.training
    watch.start()
    student.eval()
    with torch.no_grad(), autocast(settings, watch.device):
        student(images).argmax(1).eq(0).sum().item()
    watch.lap("evaluation")
    student.train(mode)
    watch.shares["distillation"] = "evaluation", TEST_SET / every * settings.batch_size / full / scored


def dafl_authors(preset):
    def variant(watch, options, laps):
        teacher, student, data, settings, full = generator_setting(dafl, preset, options, watch.device)
        generator = dafl.Generator(settings.latent_dim, data.image_shape, settings.generator_width).to(watch.device)
        optimizer_g = torch.optim.Adam(generator.parameters(), settings.lr_generator)
        optimizer_s = (torch.optim.SGD(student.parameters(), settings.lr_student, 0.9, weight_decay=5e-4)
                       if settings.student_optimizer == "sgd" else torch.optim.Adam(student.parameters(), settings.lr_student))
        layer = first_linear(teacher)
        with recorded_inputs([layer]) as seen:
            watch.start()
            for _ in range(laps):
                z = torch.randn(settings.batch_size, settings.latent_dim).to(watch.device)
                optimizer_g.zero_grad(), optimizer_s.zero_grad()
                with autocast(settings, watch.device):
                    images = generator(z).float()
                    logits = teacher(images).float()
                    student_logits = student(images.detach()).float()
                loss = (settings.oh * dafl.one_hot_loss(logits) + settings.ie * dafl.information_entropy_loss(logits)
                        + settings.act * dafl.activation_loss(seen[layer].float()) + dafl.kd_loss(student_logits, logits.detach(), 1.0))
                loss.backward()
                optimizer_g.step(), optimizer_s.step()
                watch.lap("distillation")
                score(watch, student, data, settings, full, 120)
    return variant


def rdskd_authors(watch, options, laps):
    teacher, student, data, settings, full = generator_setting(rdskd, "cifar10", options, watch.device)
    generator = rdskd.Generator(settings.latent_dim, data.image_shape, settings.generator_width).to(watch.device)
    optimizer_g = torch.optim.Adam(generator.parameters(), settings.lr_generator)
    optimizer_s = torch.optim.Adam(student.parameters(), settings.lr_student)
    watch.start()
    for _ in range(laps):
        generator.state_dict(), optimizer_g.zero_grad()
        with autocast(settings, watch.device):
            images = generator(torch.randn(settings.batch_size, settings.latent_dim).to(watch.device)).float()
            logits = torch.cat([teacher(half).float() for half in images.chunk(2)])
        terms = rdskd.one_hot_loss(logits), rdskd.information_entropy_loss(logits), rdskd.diversity_loss(images, logits)
        loss = terms[0].exp() + terms[1].exp() + terms[2]
        loss.backward()
        optimizer_g.step()
        [term.item() for term in (*terms, loss)]
        watch.lap("synthesis")
    generator.eval()
    for _ in range(laps):
        optimizer_s.zero_grad()
        with autocast(settings, watch.device):
            images = generator(torch.randn(settings.batch_size, settings.latent_dim).to(watch.device)).float().detach()
            teacher_logits, student_logits = teacher(images).float().detach(), student(images).float()
        rdskd.kd_loss(student_logits, teacher_logits, settings.temperature).backward()
        optimizer_s.step()
        watch.lap("distillation")
        score(watch, student, data, settings, full, 10)


# ------------------------------------------------------------------------------------------------------ deepinversion
def deepinversion_setting(options, device):
    data = DATASETS["cifar10"]
    with seeded(0):
        teacher = build_model("resnet34", 10, data.image_shape)
    settings = SimpleNamespace(**{**deepinversion.PRESETS["cifar10"], **options, "initial_batches": 1}, seed=0)
    settings.synthesis_batch_size = options["batch"] or (256 if device.type == "cuda" else 32)
    return teacher.to(device).eval(), data, settings


def deepinversion_here(watch, options, laps):
    teacher, data, settings = deepinversion_setting({**options, "synthesis_steps": laps}, watch.device)
    if options["compile"]:
        compile_networks(teacher)
    deepinversion.synthesize_pool(teacher.to(memory_format=torch.channels_last), data, settings, watch)


def deepinversion_authors(watch, options, laps):
    teacher, data, settings = deepinversion_setting(options, watch.device)
    x = torch.randn(settings.synthesis_batch_size, *data.image_shape, device=watch.device, requires_grad=True)
    targets = torch.arange(len(x), device=watch.device) % 10
    optimizer, distances = torch.optim.Adam([x], settings.lr_images), {}

    def measure(layer, inputs):
        h = inputs[0].float()
        variance = h.permute(1, 0, 2, 3).contiguous().view(h.shape[1], -1).var(1, unbiased=False)
        distances[layer] = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - h.mean((0, 2, 3)), 2)
    hooks = [layer.register_forward_pre_hook(measure) for layer in batchnorms(teacher)]
    watch.start()
    for _ in range(laps):
        images = torch.roll(x, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        optimizer.zero_grad(), teacher.zero_grad()
        with autocast(settings, watch.device):
            logits = teacher(images).float()
        loss = (F.cross_entropy(logits, targets) + settings.tv * deepinversion.tv_loss(images) + settings.bn * sum(distances.values())
                + 0.0 * deepinversion.l2_loss(images))
        loss.item(), loss.item()
        loss.backward()
        optimizer.step()
        watch.lap("synthesis")
    for hook in hooks:
        hook.remove()


# ------------------------------------------------------------------------------------------------------------- cudfkd
class Rounds:
    """A `run` that hands a lap to the watch whenever a round is over."""
    def __init__(self, watch, round_steps):
        self.watch, self.round_steps, self.done = watch, round_steps, 0

    def restore(self, state):
        self.watch.start()

    def tick(self, state):
        if state["distillation_step"] == self.done + self.round_steps:
            self.done += self.round_steps
            self.watch.lap("distillation")

    def report(self, **row):
        pass


def cudfkd_setting(options, device):
    data = DATASETS["cifar10"]
    with seeded(0):
        teacher, student = build_model("wrn40_2", 10, data.image_shape), build_model("wrn16_1", 10, data.image_shape)
    settings = SimpleNamespace(**{**cudfkd.PRESETS["cifar10-wrn40_2-wrn16_1"], **options, "epochs": 1}, seed=0)
    settings.lr_student = 1e-4                                 # untrained teacher: keep it tame
    settings.batch_size = settings.synthesis_batch_size = options["batch"] or 256
    return teacher.to(device).eval(), student.to(device), data, settings


def cudfkd_here(watch, options, laps):
    options = {"images_per_pass": 128 if watch.device.type == "cpu" else 2048, **options}
    teacher, student, data, settings = cudfkd_setting(options, watch.device)
    settings.student_steps = laps * settings.round_steps
    if options["compile"]:
        compile_networks(teacher, student)
    teacher, student = teacher.to(memory_format=torch.channels_last), student.to(memory_format=torch.channels_last)
    cudfkd.distill(teacher, student, data, settings, Rounds(watch, settings.round_steps))


def cudfkd_authors(watch, options, laps):
    teacher, student, data, settings = cudfkd_setting(options, watch.device)
    device, n, distances = watch.device, settings.batch_size, {}
    generator = cudfkd.Generator(settings.latent_dim, data.image_shape).to(device)
    optimizer_g = torch.optim.Adam(generator.parameters(), settings.lr_generator, betas=(0.9, 0.99))
    optimizer_s = torch.optim.SGD(student.parameters(), settings.lr_student, 0.9, weight_decay=1e-4)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (data.mean, data.std))

    def measure(layer, inputs):
        h = inputs[0].float()
        variance = h.permute(1, 0, 2, 3).contiguous().view(h.shape[1], -1).var(1, unbiased=False)
        distances[layer] = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - h.mean((0, 2, 3)), 2)
    hooks = [layer.register_forward_pre_hook(measure) for layer in batchnorms(teacher)]
    watch.start()
    for lap in range(laps):
        generator.train(), student.eval()
        z = torch.randn(n, settings.latent_dim).to(device)
        with autocast(settings, device):
            images = (generator(z).float() - mean) / std
            teacher_logits, student_logits = teacher(images).float(), student(images).float()
        images.detach() * std + mean                           # made and not used
        loss = (cudfkd.one_hot_loss(teacher_logits) + sum(distances.values()) + 20 * cudfkd.information_entropy_loss(teacher_logits, 20)
                + 0.5 * cudfkd.adversarial_loss(student_logits, teacher_logits))
        optimizer_g.zero_grad()
        loss.backward()
        optimizer_g.step()
        loss.item()
        generator.eval(), student.train()
        for step in range(settings.round_steps):
            with torch.no_grad(), autocast(settings, device):
                images = (generator(torch.randn(n, settings.latent_dim).to(device)).float() - mean) / std
                torch.sort(images)                             # made and not used
                teacher_logits = teacher(images).float()
            with autocast(settings, device):
                student_logits = student(images).float()
            loss = cudfkd.curriculum_loss(cudfkd.kd_losses(student_logits, teacher_logits, 20), 2.0, granularity="batch")
            optimizer_s.zero_grad()
            loss.backward()
            optimizer_s.step()
            with torch.no_grad():
                top = student_logits.topk(5, 1).indices == teacher_logits.argmax(1)[:, None]
                top[:, 0].float().mean().item(), top.any(1).float().mean().item()
                F.kl_div(student_logits.log_softmax(1), teacher_logits.softmax(1), reduction="sum")
        watch.lap("distillation")
    for hook in hooks:
        hook.remove()


# method: (FLOPs of the frozen steps or None = count `here`, variants)
METHODS = {
    "csd": (csd_flops, {"authors": csd_authors, "here": csd_here}),
    "dafl": (None, {"authors": dafl_authors("cifar10"), "here": generator_here(dafl, "cifar10")}),
    "dafl-mnist": (None, {"authors": dafl_authors("mnist"), "here": generator_here(dafl, "mnist")}),
    "rdskd": (None, {"authors": rdskd_authors, "here": generator_here(rdskd, "cifar10")}),
    "deepinversion": (None, {"authors": deepinversion_authors, "here": deepinversion_here}),
    "cudfkd": (None, {"authors": cudfkd_authors, "here": cudfkd_here}),
}


def count_flops(variant, batch, device):
    """{phase: (FLOPs of one lap, with its share of scoring)} of a variant at `batch`, counted at a batch of 8 and scaled."""
    with FlopCounterMode(display=False) as mode:
        watch = FlopWatch(device, mode)
        variant(watch, dict(precision="fp32", compile=False, batch=8), 1)
    return {phase: (laps[0] * batch / 8, watch.median(phase) * batch / 8) for phase, laps in watch.seconds.items() if phase != "evaluation"}


def generation_rates(settings, device):
    """Pictures a second of each generator of surrogate_kd, the median of the laps."""
    count, rng = 1024 if device.type == "cuda" else 64, torch.Generator(device).manual_seed(0)
    print(f"surrogate_kd on {device_name(device)}, {count} pictures of 32x32 at a time\n{'generator':>18s} {'images/s':>10s}")
    for name, make in surrogate_kd.GENERATORS.items():
        seconds = []
        for _ in range(settings.laps + 1):                     # the first one warms up
            wait(device)
            began = time.perf_counter()
            make(count, 32, rng)
            wait(device)
            seconds.append(time.perf_counter() - began)
        rate = count / statistics.median(seconds[1:])
        print(f"{name:>18s} {rate:10.0f}", flush=True)
        write_row(settings.log, dict(method="surrogate_kd", variant="generation", generator=name, images_per_second=round(rate, 1), size=32,
                                     count=count, device=device_name(device), versions=versions()))


def write_row(path, row):
    """Append one JSON line to the log, if there is one."""
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=[*METHODS, "surrogate_kd"], required=True)
    parser.add_argument("--laps", type=int, default=4, help="timed steps a variant and phase, plus one to warm up")
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--log", help="append the result to this file, one JSON line a variant")
    parser.add_argument("--batch-size", type=int, default=0, help="of all methods but csd [cudfkd 256; 32 on a CPU, else the preset's]")
    settings = parser.parse_args(argv)
    settings.deterministic = False
    if settings.method == "surrogate_kd":
        settings.threads = settings.threads or 1
        generation_rates(settings, set_up_device(settings))
        return
    device = set_up_device(settings)
    count, variants = METHODS[settings.method]
    full = {"rdskd": 512, "dafl-mnist": 512, "deepinversion": 256, "cudfkd": 256}.get(settings.method, 1024)
    batch = settings.batch_size or (full if device.type == "cuda" or settings.method == "cudfkd" else 32)
    done = {} if count else {name: count_flops(variant, batch, device) for name, variant in variants.items()}
    flops = count(device) if count else {phase: work for phase, (work, _) in done["here"].items()}
    print(f"{settings.method} on {device_name(device)}, {settings.precision}: " +
          ", ".join(f"one {name} step = {value / 1e9:.0f} GFLOP frozen" for name, value in flops.items()))
    print(f"{'variant':>10s} {'phase':>13s} {'seconds':>9s} {'GFLOP/s':>9s} {'products':>9s} {'fraction':>9s} {'GFLOP done':>11s}")
    for name, variant in variants.items():
        watch = Stopwatch(device, settings.precision)
        options = dict(precision=settings.precision, compile=settings.compile, **({} if count else {"batch": batch}))
        variant(watch, options, settings.laps + 1)
        ceiling = statistics.median(watch.products)
        row = dict(method=settings.method, variant=name, device=device_name(device), precision=settings.precision,
                   compile=settings.compile and name == "here",      # the authors' code is never compiled
                   versions=versions(), ceiling_gflops=round(ceiling / 1e9, 1), **({} if count else {"batch_size": batch}))
        for phase, work in flops.items():
            seconds = watch.median(phase)
            row[phase] = dict(seconds=round(seconds, 4), gflop=round(work / 1e9, 1), fraction=round(work / seconds / ceiling, 3))
            if done:
                row[phase]["gflop_done"] = round(done[name][phase][1] / 1e9, 1)
            print(f"{name:>10s} {phase:>13s} {seconds:9.3f} {work / seconds / 1e9:9.1f} {ceiling / 1e9:9.1f} "
                  f"{work / seconds / ceiling:9.2f} {row[phase].get('gflop_done', math.nan):11.1f}", flush=True)
        write_row(settings.log, row)


if __name__ == "__main__":
    main()
