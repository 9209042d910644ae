"""What every preset costs, before anyone runs it: FLOPs, teacher queries, memory.

    python benchmarks/costs.py "csd.py --teacher resnet34"         # some command
    python benchmarks/costs.py                                     # every preset of every method
    python benchmarks/costs.py --log benchmarks/results/costs.jsonl

One step of each phase runs on a CPU, with 4 images and with 8. PyTorch's FlopCounterMode counts its FLOPs
(convolutions and matrix products, forward and backward), and autograd's saved tensors tell how much memory
the step holds until its backward pass. Both grow in a straight line with the images of a step, and the preset
says how many steps and images there are.

These are not counted: the teacher's own training (also that of a self-regulated teacher), scoring, boundary
attacks, the drawing of surrogate_kd's pictures, and the generator's weights in the memory. These are counted
in full, although a run may need less: all draws that surrogate_kd's --pool-budget allows, CuDFKD's
adversarial term from the start, and a step of plain distillation on every image of regulated_kd.
"""
import contextlib
import itertools
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import csd
import cudfkd
import dafl
import deepinversion
import foreign
import plain_inversion
import race
import rdskd
import regulated_kd
import surrogate_kd
from common import VALIDATION, BadInput, DataSpec, ImageSet, build_model, frozen, seeded
from running import Parser, command_line, dataset_spec, is_file_name, read_classifier

FEW, MORE = 4, 8                       # images of a counted step
MODULES = (csd, cudfkd, dafl, deepinversion, plain_inversion, rdskd, regulated_kd, surrogate_kd)
SETS = {"tiny-imagenet": DataSpec((3, 64, 64), 200, (0.5,) * 3, (0.5,) * 3, 8, True)}    # a folder, elsewhere
TRAINING_IMAGES = {"digits": 1437, "cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257}    # else 60,000
ONE_STEP = dict(epochs=1, student_steps=1, round_steps=1, synthesis_steps=1, low_resolution_steps=0,
                generator_epochs=1, generator_steps=1, bank_rounds=1, bank_synthesis_steps=1,
                initial_batches=1, pool_batches=2, ramp=False, adversarial_start=1.0,
                plain_teacher=True, queue=False)


class Planned(Exception):
    """Raised in the place of a run's start: a script's own options, settings and data."""


def planned(command):
    """What the command would run.   -> module, options, settings, DataSpec

    Raises BadInput as the script does.
    """
    script, *argv = shlex.split(command) if isinstance(command, str) else command
    module = {f"{module.__name__}.py": module for module in MODULES}.get(script)
    if not module:
        raise BadInput(f"'{script}' is none of {', '.join(module.__name__ + '.py' for module in MODULES)}")

    def stop(options, settings, data, *rest, **more):
        raise Planned(options, settings, data)

    def spec(options):
        return SETS.get(options.preset) or dataset_spec(options)
    fakes = dict(load_networks=stop, dataset_spec=spec, real_pictures=lambda *args: (1, None, ""))
    with contextlib.ExitStack() as patches:
        for name, fake in fakes.items():
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, fake))
        try:
            module.main.__wrapped__([*argv, "--device", "cpu"])
        except Planned as found:
            options, settings, data = found.args
    return module, options, settings, data


def phases_of(module, settings, images):
    """{phase: (steps, images a step)}.   images: of a real set or a pool"""
    s = settings
    if module in (csd, plain_inversion):
        return {"bank": (s.bank_rounds * s.bank_synthesis_steps, s.synthesis_batch_size),
                "synthesis": (s.epochs * s.synthesis_steps, s.synthesis_batch_size),
                "distillation": (s.epochs * s.student_steps, s.batch_size)}
    if module is deepinversion:
        adaptive = min(s.epochs, max(0, s.pool_batches - s.initial_batches))
        steps = s.synthesis_steps + s.low_resolution_steps
        return {"bank": (s.initial_batches * steps, s.synthesis_batch_size),
                "synthesis": (adaptive * steps, s.synthesis_batch_size),
                "distillation": (s.epochs * s.student_steps, s.batch_size)}
    if module is rdskd:
        return {"synthesis": (s.generator_epochs * s.generator_steps, s.synthesis_batch_size),
                "distillation": (s.epochs * s.student_steps, s.batch_size)}
    if module is cudfkd:
        rounds = s.epochs * s.student_steps // s.round_steps
        return {"synthesis": (rounds * s.generator_steps, s.synthesis_batch_size),
                "distillation": (rounds * s.round_steps, s.batch_size)}
    if module is dafl:
        return {"distillation": (s.epochs * s.student_steps, s.batch_size)}
    phases = {"distillation": (s.epochs * math.ceil(images / s.batch_size), s.batch_size)}
    if module is surrogate_kd:
        phases["pool"] = ((s.pool_budget if s.balance else 1) * images, 1)
    return phases


class Meter:
    """Stands in the place of a module's `steps`: one step of each phase, with what it took."""
    def __init__(self, counter, teacher):
        self.counter, self.found, self.asked = counter, {}, 0
        teacher.register_forward_pre_hook(lambda module, inputs: self.ask(len(inputs[0])))

    def ask(self, images):
        self.asked += images

    def now(self):
        return self.counter.get_total_flops(), self.asked

    @contextlib.contextmanager
    def phase(self, name):
        kept = {}          # storages that autograd keeps; held here, so that no address is used twice

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor
        began = getattr(self, "ended", None) or self.now()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.ended = self.now()
        flops, asked = (after - before for before, after in zip(began, self.ended))
        held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()
                   if not isinstance(tensor, torch.nn.Parameter))
        self.found[name] = dict(gflop=flops / 1e9, queries=asked, mb=held / 2 ** 20)

    def steps(self, total, name, order=None):
        self.ended = getattr(self, "ended", None) or self.now()             # `order` may ask the teacher
        for step in itertools.islice(order or itertools.count(), 1):
            with self.phase(name):
                yield step


def distilled(module, teacher, student, data, settings, images):
    """Calls a module's `distill`, with so many random images where it needs a bank, a pool or a data set."""
    device = next(teacher.parameters()).device
    pixels = torch.randint(256, (images, *data.image_shape), dtype=torch.uint8, device=device)
    labels, more = torch.arange(images, device=device) % data.num_classes, {}
    if module in (csd, plain_inversion):
        more = dict(bank=(pixels, labels))
    elif module is deepinversion:
        more = dict(pool=(torch.zeros(images, *data.image_shape, dtype=torch.float16, device=device), labels))
    elif module is regulated_kd:
        more = dict(train=ImageSet(pixels, labels))
    elif module is surrogate_kd:
        more = dict(surrogate=pixels, pseudo_labels=labels)
    module.distill(teacher, student, data, settings, **more)


def step_costs(module, settings, data, names, images):
    """-> {phase: GFLOP, teacher queries and MB of one step with so many images}; weights of both networks"""
    few = dict(ONE_STEP, batch_size=images, synthesis_batch_size=images)
    few["mode"] = "ce" if getattr(settings, "mode", "") == "ce" else "kd"
    tiny = replace(settings, **{name: value for name, value in few.items() if hasattr(settings, name)})
    found = {}
    with FlopCounterMode(display=False) as counter, seeded(0):
        teacher, student = (build_model(name, data.num_classes, data.image_shape) for name in names)
        teacher.eval()
        meter = Meter(counter, teacher)
        with mock.patch.object(module, "steps", meter.steps):
            if module in (csd, plain_inversion):
                module.synthesize_bank(teacher, data, tiny)
            elif module is deepinversion:
                deepinversion.synthesize(teacher, data, tiny)
            if meter.found:
                found["bank"], meter.ended = meter.found["synthesis"], None
            distilled(module, teacher, student, data, tiny, images)
            if module is surrogate_kd:
                meter.ended = None
                with meter.phase("pool"), torch.no_grad(), frozen(teacher):
                    teacher(torch.zeros(images, *data.image_shape))
    weights = [sum(weight.numel() for weight in network.parameters()) for network in (teacher, student)]
    return {**found, **meter.found}, weights


def training_gflop(name, image_shape, classes=10):
    """GFLOP of one image's forward and backward pass in a network's training"""
    with FlopCounterMode(display=False) as counter, seeded(0):
        build_model(name, classes, image_shape)(torch.randn(FEW, *image_shape)).sum().backward()
    return counter.get_total_flops() / FEW / 1e9


def forward_gflop(name, image_shape, classes):
    """GFLOP of one image's forward pass"""
    with FlopCounterMode(display=False) as counter, seeded(0), torch.no_grad():
        build_model(name, classes, image_shape).eval()(torch.randn(FEW, *image_shape))
    return counter.get_total_flops() / FEW / 1e9


def images_of(options):
    """Real training images of the command's data set."""
    images = TRAINING_IMAGES.get(options.dataset.removesuffix("-val"), 60_000)
    return images - VALIDATION * options.dataset.endswith("-val")


def cost(command):
    """A row for the log."""
    module, options, settings, data = planned(command)
    file = read_classifier(options.teacher) if is_file_name(options.teacher) else {}
    names, images = (file.get("arch", options.teacher), options.student), images_of(options)
    phases = phases_of(module, settings, getattr(settings, "pool_images", images))
    few, weights = step_costs(module, settings, data, names, FEW)
    more, _ = step_costs(module, settings, data, names, MORE)
    row = dict(variant="cost", method=module.__name__, preset=options.preset, dataset=options.dataset,
               changed=options.changed, networks=f"{options.teacher} → {options.student}", phases={},
               pflop=0.0, queries=0, memory_gb=0.0)
    for phase, (steps, size) in phases.items():
        if steps:
            each = {name: (more[phase][name] - few[phase][name]) / (MORE - FEW) for name in few[phase]}
            if phase == "distillation" and getattr(settings, "visits", 1) > 1:   # asked only at the first
                an_epoch = steps // settings.epochs
                spared = 1 - math.ceil(an_epoch / settings.visits) / an_epoch
                each["gflop"] -= spared * forward_gflop(names[0], data.image_shape, data.num_classes)
                each["queries"] -= spared
            full = steps                                       # a step at half the side is a quarter
            if module is deepinversion and phase != "distillation":
                low = settings.low_resolution_steps
                full *= (settings.synthesis_steps + low / 4) / (settings.synthesis_steps + low)
            row["phases"][phase] = dict(steps=steps, images=size, gflop_a_step=round(each["gflop"] * size, 2))
            row["pflop"] += each["gflop"] * full * size / 1e6
            row["queries"] += round(each["queries"] * steps * size)
            held = few[phase]["mb"] + each["mb"] * (size - FEW)
            row["memory_gb"] = max(row["memory_gb"], round(
                (held + (weights[0] + 3 * weights[1]) * 4 / 2 ** 20) / 1024, 2))
    if module is regulated_kd and not data.crop and not data.flip:           # asked once for all epochs
        row["queries"] += images
    return row


def every_command():
    """Each preset, and the rows of the races with our own teachers whose flags leave their preset.

    Rows that vary the weight of a loss are left out, because they all cost the same.
    """
    found = [f"{module.__name__}.py --preset {preset}" for module in MODULES for preset in module.PRESETS]
    for name, rows in race.RACES.items():
        if name in (*foreign.RACES, "mnist-weights"):
            continue
        found += [f"{row} --teacher {race.TEACHERS[name][1]}" for row in rows.values()
                  if len(row.split()) > 3 and "zskd" not in row]
    return found


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", help='such as "csd.py --preset cifar10-short" [every preset]')
    parser.add_argument("--log", help="write the rows to this file, anew")
    options = parser.parse_args(argv)
    rows = []
    for command in options.commands or every_command():
        rows.append(cost(command))
        row = rows[-1]
        print(f"{command:<60s} {row['pflop']:12.4f} PFLOP {row['queries'] / 1e6:10.2f} M queries "
              f"{row['memory_gb']:8.2f} GB", flush=True)
    if options.log:
        Path(options.log).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
