"""How fast the methods' steps are, beside the authors' order of work, and as part of a ceiling.

    python benchmarks/throughput.py --method csd [--precision bf16] [--log benchmarks/results/NAME.jsonl]

"authors" is the order of work in the authors' code, written anew from its description. "here" is the
method's own functions, with a stopwatch in the place of their `steps`. The two take turns in one process,
--laps times. A turn takes two steps of each phase, and the second one counts. --precision bf16 is for ours
alone: the authors' stays in fp32, on a GPU in tf32. With --each, ours takes more turns, each with one measure
switched off, which shows what that measure is worth.

The needed FLOPs are those of a step in which everything that is not trained is frozen. The fraction is the
needed FLOPs a second, divided by what the machine's own 3x3 convolutions reach between the steps. This is
what the authors' code does, with images of 32x32:

    csd            WRN-40-2 to WRN-16-1, 200 images are made, batches of 128. It crops one by one, computes
                   weight gradients in every network, copies each BatchNorm input in every pass of the
                   teacher, keeps a graph of the head's pass through the student, and calls .item() once a
                   step. Its PNG files and loader processes are left out.
    dafl           ResNet-34 to ResNet-18, batches of 1,024. It computes weight gradients in the teacher, one
                   backward pass over the sum of all losses, and scores the test set once in 120 steps.
    dafl-mnist     LeNet-5 to LeNet-5-half, batches of 512. The generator is nearly all of the work.
    rdskd          ResNet-34 to ResNet-18, batches of 512. Phase 1 has two calls of the teacher with weight
                   gradients, a state_dict and four .item() a step. Phase 2 has unused graphs of generator and
                   teacher, and scores the test set every 10 steps.
    deepinversion  A step on the images, ResNet-34, batches of 256. It computes weight gradients, copies as in
                   csd, terms of weight 0, and calls .item() twice a step. The hooks that each call of it adds
                   are left out.
    cudfkd         A round (1 step of the generator, 10 of the student), WRN-40-2 to WRN-16-1, batches of 256.
                   It copies as in csd in all 11 passes of the teacher, computes weight gradients in teacher
                   and student in the generator's step, makes ten batches one by one, and computes two
                   accuracies with .item(), a KL and a sorted batch of images a step.
    surrogate_kd   It has no steps here, but pictures a second of each generator, 64 at a time on a CPU (by
                   one thread, unless --threads says otherwise) and 1,024 on a GPU.

A step of dafl and rdskd includes its share of scoring the test set, as often as the authors do it or as we do
it, once in 120 steps. --batch-size sets all batch sizes; it is 32 on a CPU, except for csd and cudfkd.
"""
import contextlib
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import csd
import cudfkd
import dafl
import deepinversion
import rdskd
import surrogate_kd
from common import (DATASETS, ImageSet, batchnorms, build_model, build_optimizer, denormalize, in_bf16,
                    last_linear, normalize, place_like, predict, recorded_inputs, seeded)
from running import Parser, command_line, device_name, number_type, set_up_device, versions

TEST_SET, COUNTED = 10_000, 4          # images scored; images of a step whose FLOPs are counted


class Stopwatch:
    """Times each step of a loop over `steps`, with convolutions in between. They are the ceiling.

    With a `counter` of FLOPs it counts those of each step instead, and makes no convolutions.
    """
    def __init__(self, device, precision, counter=None):
        self.device, self.laps, self.ceilings, self.counter = device, {}, [], counter
        self.times, images = (20, 256) if device.type == "cuda" else (1, 32)
        like = dict(device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        self.maps, self.weights = (torch.randn(shape, **like).contiguous(memory_format=torch.channels_last)
                                   for shape in ((images, 256, 16, 16), (256, 256, 3, 3)))

    def clock(self):
        if self.counter:
            return self.counter.get_total_flops()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self):
        for _ in range(0 if self.counter else 3):
            began = self.clock()
            for _ in range(self.times):
                F.conv2d(self.maps, self.weights, padding=1)
            work = self.times * 2 * self.weights.numel() * self.maps.numel() / 256       # FLOPs
            self.ceilings.append(work / (self.clock() - began))
        self.began = self.clock()

    def lap(self, name):
        self.laps.setdefault(name, []).append(self.clock() - self.began)

    def steps(self, total, name, order=None):
        self.start()                             # before `order`, which may ask the teacher for its step
        for step in itertools.islice(order or itertools.count(), total):
            yield step
            self.lap(name)
            self.start()

    def rounds(self, total, name):
        """The same for cudfkd: a lap is a round, with what lies between its two loops."""
        if name == "synthesis":
            self.start()
        yield from range(total)
        if name == "distillation":
            self.lap(name)


def denominators(watch):
    """{name: GFLOP/s} of convolutions at a WRN-40-2's three sizes, 64 images, and of a matrix product."""
    found, like, product = {}, dict(device=watch.device, dtype=watch.maps.dtype), 2048

    def rate(work, function):
        times = []
        for _ in range(4):
            began = watch.clock()
            for _ in range(watch.times):
                function()
            times.append((watch.clock() - began) / watch.times)
        return round(work / statistics.median(times[1:]) / 1e9, 1)
    for width, side in ((32, 32), (64, 16), (128, 8)):
        maps, weights = (torch.randn(shape, **like).contiguous(memory_format=torch.channels_last)
                         for shape in ((64, width, side, side), (width, width, 3, 3)))
        found[f"conv_{width}x{side}x{side}_gflops"] = rate(
            2 * weights.numel() * 64 * side ** 2, lambda: F.conv2d(maps, weights, padding=1))
    matrix = torch.randn(product, product, **like)
    return {**found, "matmul_2048_gflops": rate(2 * product ** 3, lambda: matrix @ matrix)}


# ------------------------------------------------------------------------------- the authors' order of work
def descend(loss, *optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def upsample_then_convolve(width_in, width_out, bias=True):
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width_in, width_out, 3, padding=1, bias=bias))


def theirs(build, teacher, *arguments):
    """A network of ours on the teacher's device and in its precision, in PyTorch's usual layers and order."""
    with mock.patch.object(sys.modules[build.__module__], "UpsampledConv2d", upsample_then_convolve):
        network = build(*arguments)
    return place_like(network, teacher).to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def copied_statistics(teacher, data):
    """Yields {layer: distance of its BN statistics}, which each pass of the teacher fills."""
    distances = {}

    def measure(layer, inputs):
        x = inputs[0].float()
        variance = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        mean = x.mean((0, 2, 3))
        distances[layer] = torch.norm(layer.running_var - variance) + torch.norm(layer.running_mean - mean)
    hooks = [layer.register_forward_pre_hook(measure) for layer in batchnorms(teacher, data)]
    yield distances
    for hook in hooks:
        hook.remove()


def csd_bank(data, settings, device):
    shape = 2 * settings.batch_size, *data.image_shape
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device)
    return pixels, torch.arange(len(pixels), device=device) % data.num_classes


def csd_authors(watch, teacher, student, data, settings):
    device, classifier = watch.device, last_linear(student)
    teacher_map, shape = csd.last_map(teacher, "", data)
    student_map, (channels, *_) = csd.last_map(student, "", data)
    generator = theirs(csd.Generator, teacher, settings.latent_dim, data.image_shape)
    head = csd.AuxiliaryHead(classifier.in_features, data.num_classes).to(device)
    regressor = theirs(csd.Regressor, teacher, channels, *shape[:2])
    z = torch.randn(settings.synthesis_batch_size, settings.latent_dim, device=device, requires_grad=True)
    targets = torch.arange(len(z), device=device) % data.num_classes
    optimizer_g = torch.optim.Adam([*generator.parameters(), z], 1e-3, betas=(0.5, 0.999))
    optimizer_s = build_optimizer(torch.nn.ModuleList([student, regressor]), "sgd", 1e-4, 1e-4)
    optimizer_h = build_optimizer(head, "sgd", 0.1, 1e-4)
    pixels, labels = (part[:settings.batch_size] for part in csd_bank(data, settings, device))

    def crops(pixels):
        padded, cut = F.pad(pixels, (data.crop,) * 4), []
        for image, (top, left) in zip(padded, torch.randint(0, 2 * data.crop + 1, (len(pixels), 2))):
            image = image[:, top:top + pixels.shape[2], left:left + pixels.shape[3]]
            cut.append(image.flip(2) if torch.rand(()) < 0.5 else image)
        return normalize(torch.stack(cut), data).contiguous()
    best, layers = 1e6, [classifier, student_map, teacher_map]
    student.eval()
    with copied_statistics(teacher, data) as distances, recorded_inputs(layers) as seen:
        for _ in watch.steps(settings.synthesis_steps, "synthesis"):
            made = generator(z)
            images = crops(made)
            logits = teacher(images)
            student(csd.rotations(images))
            loss = (F.cross_entropy(logits, targets) + sum(distances.values())
                    + 10 * csd.csd_loss(head(seen[classifier]), csd.rotation_labels(targets)))
            if loss.item() < best:
                best, _ = loss.item(), made.detach().clone()
            descend(loss, optimizer_g)
        for _ in watch.steps(settings.student_steps, "distillation"):
            images = crops(pixels / 255)
            student.train()
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            descend(csd.kd_loss(logits, teacher_logits, 20) + F.cross_entropy(logits, labels)
                    + 30 * csd.feature_loss(regressor(seen[student_map]), seen[teacher_map]), optimizer_s)
            student.eval()
            student(csd.rotations(images))
            answers = head(seen[classifier].detach())
            descend(csd.auxiliary_loss(answers, csd.rotation_labels(labels)), optimizer_h)
            (logits.argmax(1) == labels).float().mean().item()


def dafl_authors(watch, teacher, student, data, settings):
    generator = theirs(dafl.Generator, teacher, settings.latent_dim, data.image_shape)
    optimizer_g = torch.optim.Adam(generator.parameters(), settings.lr_generator)
    optimizer_s = build_optimizer(student, settings.student_optimizer, 1e-4, settings.weight_decay)
    layer = dafl.feature_layer(teacher, data)
    with recorded_inputs([layer]) as seen:
        for _ in watch.steps(settings.student_steps, "distillation"):
            images = generator(torch.randn(settings.batch_size, settings.latent_dim).to(watch.device))
            logits, student_logits = teacher(images), student(images.detach())
            loss_oh, loss_ie = dafl.one_hot_loss(logits), dafl.information_entropy_loss(logits)
            descend(settings.oh * loss_oh + settings.ie * loss_ie
                    + settings.act * dafl.activation_loss(seen[layer])
                    + dafl.kd_loss(student_logits, logits.detach(), 1.0), optimizer_g, optimizer_s)


def rdskd_authors(watch, teacher, student, data, settings):
    generator = theirs(rdskd.Generator, teacher, settings.latent_dim, data.image_shape)
    optimizer_g = torch.optim.Adam(generator.parameters(), settings.lr_generator)
    optimizer_s = torch.optim.Adam(student.parameters(), 1e-4)
    for _ in watch.steps(settings.generator_steps, "synthesis"):
        generator.state_dict()
        z = torch.randn(settings.synthesis_batch_size, settings.latent_dim).to(watch.device)
        images = generator(z)                                                # (N, L) -> (N, C, H, W)
        logits = torch.cat([teacher(half) for half in images.chunk(2)])
        loss_oh, loss_ie = rdskd.one_hot_loss(logits), rdskd.information_entropy_loss(logits)
        loss_diversity = rdskd.diversity_loss(images, logits)
        loss = loss_oh.exp() + loss_ie.exp() + loss_diversity
        descend(loss, optimizer_g)
        loss_oh.item(), loss_ie.item(), loss_diversity.item(), loss.item()
    generator.eval()
    for _ in watch.steps(settings.student_steps, "distillation"):
        z = torch.randn(settings.batch_size, settings.latent_dim).to(watch.device)
        images = generator(z).detach()
        teacher_logits, student_logits = teacher(images).detach(), student(images)
        descend(rdskd.kd_loss(student_logits, teacher_logits, settings.temperature), optimizer_s)


def deepinversion_authors(watch, teacher, student, data, settings):
    x = torch.randn(settings.synthesis_batch_size, *data.image_shape, device=watch.device, requires_grad=True)
    targets = torch.arange(len(x), device=watch.device) % data.num_classes
    optimizer = torch.optim.Adam([x], settings.lr_images)
    with copied_statistics(teacher, data) as distances:
        for _ in watch.steps(settings.synthesis_steps, "synthesis"):
            images = torch.roll(x, tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            teacher.zero_grad()
            logits = teacher(images)
            loss = (F.cross_entropy(logits, targets) + settings.tv * deepinversion.tv_loss(images)
                    + settings.bn * sum(distances.values()) + 0.0 * deepinversion.l2_loss(images))
            loss.item(), loss.item()
            descend(loss, optimizer)


def cudfkd_authors(watch, teacher, student, data, settings):
    generator = theirs(cudfkd.Generator, teacher, settings.latent_dim, data.image_shape)
    optimizer_g = torch.optim.Adam(generator.parameters(), settings.lr_generator, betas=(0.9, 0.99))
    optimizer_s = build_optimizer(student, "sgd", 1e-4, 1e-4)

    def draw():
        z = torch.randn(settings.batch_size, settings.latent_dim).to(watch.device)
        return normalize(generator(z), data).contiguous()
    with copied_statistics(teacher, data) as distances:
        for _ in watch.steps(settings.student_steps // settings.round_steps, "distillation"):
            generator.train(), student.eval()
            images = draw()
            teacher_logits, student_logits = teacher(images), student(images)
            agreed = student_logits.argmax(1) == teacher_logits.argmax(1)
            denormalize(images.detach(), data)                               # made and not used
            loss = (cudfkd.one_hot_loss(teacher_logits) + sum(distances.values())
                    + 20 * cudfkd.information_entropy_loss(teacher_logits, 20)
                    + 0.5 * cudfkd.adversarial_loss(student_logits, teacher_logits, agreed))
            descend(loss, optimizer_g)
            loss.item()
            generator.eval(), student.train()
            for _ in range(settings.round_steps):
                with torch.no_grad():
                    images = draw()
                    torch.sort(images)                                       # made and not used
                    teacher_logits = teacher(images)
                student_logits = student(images)
                losses = cudfkd.kd_losses(student_logits, teacher_logits, 20)
                difficulty = cudfkd.difficulties(losses, "batch")
                weight = cudfkd.curriculum_weights(difficulty.detach(), 2.0)
                descend(cudfkd.curriculum_loss(difficulty, weight), optimizer_s)
                with torch.no_grad():
                    top = student_logits.topk(5, 1).indices == teacher_logits.argmax(1)[:, None]
                    top[:, 0].float().mean().item(), top.any(1).float().mean().item()
                    F.kl_div(student_logits.log_softmax(1), teacher_logits.softmax(1), reduction="sum")


# ------------------------------------------------------------------------ ours, with one measure switched off
@contextlib.contextmanager
def only_in_eval_mode(*models):
    """What `frozen` does, but for the weight gradients."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    yield
    for module, mode in modes:
        module.training = mode


@contextlib.contextmanager
def statistics_of_copies(modules):
    """What `recorded_statistics` gives, with PyTorch's own var_mean and its backward pass."""
    seen = {}
    hooks = [module.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(
        module, torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)[::-1])) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


def crops_one_by_one(pixels, data):
    padded, size = F.pad(pixels, (data.crop,) * 4), pixels.shape[2]
    places = torch.randint(0, 2 * data.crop + 1, (len(pixels), 2)).tolist()
    cut = (image[:, top:top + size, left:left + size] for image, (top, left) in zip(padded, places))
    return torch.stack([image.flip(2) if torch.rand(()) < 0.5 else image for image in cut])


BATCH = "crops of a whole batch"       # deepinversion's synthesis has none
MEASURES = {   # {measure: what stands in its place in a method's file}
    "frozen networks": dict(frozen=only_in_eval_mode),
    "moments in one backward pass": dict(recorded_statistics=statistics_of_copies),
    "channels_last": {},               # in the place of torch's own word, everywhere
    "upsampling inside the convolution": dict(UpsampledConv2d=upsample_then_convolve),
    BATCH: dict(augment=crops_one_by_one),
}


# ------------------------------------------------------------------------------------------ what is measured
class Method(NamedTuple):
    module: object           # the method's file
    preset: str
    networks: tuple          # teacher, student
    images: dict             # {phase: images of a full step}
    steps: tuple             # the settings that say how many steps a phase has
    authors: object          # a function
    every: int = 0           # after so many steps the authors score the test set; ours: 120


WIDE, RESNETS = ("wrn40_2", "wrn16_1"), ("resnet34", "resnet18")
METHODS = {
    "csd": Method(csd, "cifar10-wrn40_2-wrn16_1", WIDE, {"synthesis": 200, "distillation": 128},
                  ("synthesis_steps", "student_steps"), csd_authors),
    "dafl": Method(dafl, "cifar10", RESNETS, {"distillation": 1024}, ("student_steps",), dafl_authors, 120),
    "dafl-mnist": Method(dafl, "mnist", ("lenet5", "lenet5_half"), {"distillation": 512}, ("student_steps",),
                         dafl_authors, 120),
    "rdskd": Method(rdskd, "cifar10", RESNETS, {"synthesis": 512, "distillation": 512},
                    ("generator_steps", "student_steps"), rdskd_authors, 10),
    "deepinversion": Method(deepinversion, "cifar10", RESNETS, {"synthesis": 256}, ("synthesis_steps",),
                            deepinversion_authors),
    "cudfkd": Method(cudfkd, "cifar10-wrn40_2-wrn16_1", WIDE, {"distillation": 256}, ("student_steps",),
                     cudfkd_authors),
}


def settings_of(method, steps, images, device):
    """The preset, for so many steps (cudfkd: rounds) of so many images; its own rate could diverge here."""
    preset, sizes = method.module.PRESETS[method.preset].settings, [*images.values()]
    values = dict(lr_student=1e-4, schedule="constant", epochs=1, generator_epochs=1, batch_size=sizes[-1],
                  synthesis_batch_size=sizes[0], images_per_pass=128 if device.type == "cpu" else 2048)
    values.update(dict.fromkeys(method.steps, steps * getattr(preset, "round_steps", 1)))
    return replace(preset, **{name: value for name, value in values.items() if hasattr(preset, name)})


def take_turn(method, variant, watch, precision, steps, images, scored=True):
    """Some steps of a variant.   images: {phase: images of a step} -> {phase: the measure of each step}"""
    module, here, device = method.module, variant != "authors", watch.device
    off = {name: value for name, value in MEASURES.get(variant.removeprefix("without "), {}).items()
           if hasattr(module, name)}
    data = DATASETS[module.PRESETS[method.preset].dataset]
    settings = settings_of(method, steps, images, device)
    laps = watch.laps = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(0))
        if off:
            stack.enter_context(mock.patch.multiple(module, **off))
        if variant == "without channels_last":
            stack.enter_context(mock.patch.object(torch, "channels_last", torch.contiguous_format))
        layout = torch.channels_last if here else torch.contiguous_format
        teacher, student = (build_model(name, data.num_classes, data.image_shape).to(
            device, memory_format=layout) for name in method.networks)
        if precision == "bf16" and here:
            in_bf16(teacher), in_bf16(student)
        teacher.eval()
        if not here:
            method.authors(watch, teacher, student, data, settings)
        with mock.patch.object(module, "steps", watch.rounds if module is cudfkd else watch.steps):
            if here and module is deepinversion:
                deepinversion.synthesize(teacher, data, settings)
            elif here:
                more = dict(bank=csd_bank(data, settings, device)) if module is csd else {}
                module.distill(teacher, student, data, settings, **more)
        if method.every and scored:
            count = 32 if device.type == "cpu" else 1024
            pixels = torch.randint(256, (count, *data.image_shape), dtype=torch.uint8, device=device)
            for _ in watch.steps(steps, "evaluation"):
                with torch.no_grad():
                    logits = (predict(student, ImageSet(pixels, None), data) if here else
                              student.eval()(normalize(pixels / 255, data).contiguous()))
                    logits.argmax(1).eq(0).sum().item()
            part = images["distillation"] / method.images["distillation"]    # of a full step
            share = part * TEST_SET / (120 if here else method.every) / count
            laps["distillation"] = [step + share * scoring for step, scoring in zip(
                laps["distillation"], laps.pop("evaluation"))]
    return laps


def gflop(method, variant, images, device, scored=True):
    """{phase: GFLOP of a step}, counted at a few images, to which they are proportional."""
    with FlopCounterMode(display=False) as mode:
        watch, few = Stopwatch(device, "fp32", mode), dict.fromkeys(images, COUNTED)
        laps = take_turn(method, variant, watch, "fp32", 1, few, scored)
    return {phase: laps[phase][0] * count / COUNTED / 1e9 for phase, count in images.items()}


def measure(options):
    """Prints a line for each variant and phase.   -> a row for each variant"""
    method, device, precision = METHODS[options.method], options.device, options.precision
    whole = device.type == "cuda" or options.method in ("csd", "cudfkd")
    images = {phase: options.batch_size or (full if whole else 32) for phase, full in method.images.items()}
    variants = ["authors", "here", *(f"without {name}" for name, parts in MEASURES.items()
                                     if options.each and (name, options.method) != (BATCH, "deepinversion")
                                     and (not parts or any(hasattr(method.module, part) for part in parts)))]
    needed, laps = gflop(method, "here", images, device, scored=False), {variant: {} for variant in variants}
    watch = Stopwatch(device, precision)
    for _ in range(options.laps):
        for variant, found in laps.items():
            for phase, values in take_turn(method, variant, watch, precision, 2, images).items():
                found.setdefault(phase, []).append(values[1])
    ceiling = statistics.median(watch.ceilings) / 1e9
    print(f"{options.method}, {images}, {precision}, {device_name(device)}, ceiling {ceiling:.0f} GFLOP/s")
    shared = dict(method=options.method, device=device_name(device), precision=precision, versions=versions(),
                  laps=options.laps, ceiling="3x3 convolutions", ceiling_gflops=round(ceiling, 1),
                  batch_size=", ".join(map(str, dict.fromkeys(images.values()))), **denominators(watch))
    print(", ".join(f"{key} {value}" for key, value in shared.items() if key.endswith("gflops")))
    for variant, found in laps.items():
        without_bf16 = f", in {'tf' if device.type == 'cuda' else 'fp'}32"
        row = dict(shared, variant=variant + without_bf16 * (variant == "authors" and precision == "bf16"))
        for phase, done in gflop(method, variant, images, device).items():
            times, seconds = found[phase], statistics.median(found[phase])
            ratios = [mine / theirs for mine, theirs in zip(times, laps["authors"][phase])]
            row[phase] = dict(seconds=round(seconds, 4), least=round(min(times), 4),
                              most=round(max(times), 4), of_authors=round(statistics.median(ratios), 3),
                              fraction=round(needed[phase] / seconds / ceiling, 3),
                              gflop_done=round(done, 1), gflop=round(needed[phase], 1))
            shown = ", ".join(f"{key} {value}" for key, value in row[phase].items())
            print(f"{variant:>42s}  {phase:>12s}  {shown}", flush=True)
        yield row


def generation_rates(options):
    """Prints a line for each generator of surrogate_kd.   -> a row each"""
    device, count = options.device, 1024 if options.device.type == "cuda" else 64
    print(f"surrogate_kd, {device_name(device)}, {count} pictures of 32x32 at a time; pictures a second:")
    watch = Stopwatch(device, "fp32")
    for name, make in surrogate_kd.GENERATORS.items():
        with seeded(0):
            for _ in watch.steps(options.laps + 1, name):                    # the first one warms up
                make(count, 32, device)
        rate = count / statistics.median(watch.laps[name][1:])
        print(f"{name:>18s} {rate:10.0f}", flush=True)
        yield dict(method="surrogate_kd", variant="generation", generator=name, size=32, count=count,
                   images_per_second=round(rate, 1), device=device_name(device), versions=versions())


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=[*METHODS, "surrogate_kd"], required=True)
    parser.add_argument("--laps", type=number_type(int, True), default=4, help="timed steps a variant [4]")
    parser.add_argument("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], help="[tf32 on CUDA, else fp32]")
    parser.add_argument("--threads", type=number_type(int, True), help="CPU threads [as PyTorch chooses]")
    parser.add_argument("--batch-size", type=number_type(int, True), help="images of a step [see above]")
    parser.add_argument("--each", action="store_true", help="also with each measure switched off by itself")
    parser.add_argument("--log", help="append the result to this file, one JSON line a variant")
    parser.set_defaults(deterministic=False)
    options = parser.parse_args(argv)
    options.threads = options.threads or (1 if options.method == "surrogate_kd" else None)
    set_up_device(options)
    for row in generation_rates(options) if options.method == "surrogate_kd" else measure(options):
        if options.log:
            with open(options.log, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
