"""How busy a GPU is in the methods' steps: the share of the time in which one of its kernels runs.

    python benchmarks/busy.py --networks wrn40_2 wrn16_1 --precision bf16
    python benchmarks/busy.py --networks resnet34 resnet18 --methods csd cudfkd --log NAME.jsonl

Each phase of a method makes ten steps of its usual size: three to warm up, three that are timed, three under
torch.profiler, and one that ends them. The busy share is the time in which at least one kernel ran in the
traced three, divided by the time of the three before, because the profiler slows the steps down. If it is
well under 1, the GPU waits for Python to start its kernels. On a CPU there are no kernels, and the steps are
only timed.
CuDFKD makes the images of ten steps before them, so that its student's steps are without that work.
"""
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import costs
from common import DATASETS, build_model, in_bf16, seeded
from running import Parser, command_line, device_name, number_type, set_up_device, versions

PART = 3                               # steps that warm up, that are timed, that are traced
# one more, so that the work between two steps is in each of the three parts
STEPS = dict.fromkeys(("student_steps", "round_steps", "generator_steps", "synthesis_steps"), 3 * PART + 1)


def busy_seconds(events):
    """-> the time in which at least one kernel among the profiler's events ran, and how many kernels ran"""
    spans = sorted((event.time_range.start, event.time_range.end) for event in events
                   if event.device_type == DeviceType.CUDA)
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e6, len(spans)


class Tracer:
    """Stands in the place of a module's `steps`."""
    def __init__(self, device):
        self.device, self.found = device, {}

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def steps(self, total, name, order=None):
        tracing, began, seconds, busy, kernels = None, None, None, 0.0, 0
        for number, step in enumerate(range(total) if order is None else itertools.islice(order, total)):
            if number == PART:
                began = self.now()
            if number == 3 * PART and tracing:
                self.now()
                tracing.stop()
                busy, kernels = busy_seconds(tracing.events())
            if number == 2 * PART:
                seconds = (self.now() - began) / PART
                if self.device.type == "cuda":
                    tracing = profile(activities=[ProfilerActivity.CUDA])
                    tracing.start()
            yield step
        if seconds:
            self.found.setdefault(name, dict(
                milliseconds=round(1000 * seconds, 3), kernels=kernels // PART,
                busy=round(busy / PART / seconds, 3) if kernels else None))


def trace(module, preset, networks, options):
    """-> {phase: dict of milliseconds of a step, kernels in it, the share of the time in which one ran}"""
    data, sizes = DATASETS["cifar10"], {}
    if options.images:
        sizes = dict(batch_size=options.images, synthesis_batch_size=options.images)
    values = {**costs.ONE_STEP, **STEPS, **sizes, "mode": "kd", "visits": 1}
    values = {name: value for name, value in values.items() if hasattr(preset.settings, name)}
    settings, tracer = replace(preset.settings, **values), Tracer(options.device)
    with seeded(0):
        teacher, student = (build_model(name, data.num_classes, data.image_shape).to(
            options.device, memory_format=torch.channels_last) for name in networks)
        if options.precision == "bf16":
            in_bf16(teacher), in_bf16(student)
        with mock.patch.object(module, "steps", tracer.steps):
            costs.distilled(module, teacher.eval(), student, data, settings,
                            (3 * PART + 1) * settings.batch_size)
    return tracer.found


@command_line
def main(argv=None):
    names = [module.__name__ for module in costs.MODULES]
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs=2, default=("wrn40_2", "wrn16_1"), metavar=("TEACHER", "STUDENT"),
                        help="[wrn40_2 wrn16_1]")
    parser.add_argument("--methods", nargs="+", choices=names, default=names, help="[all]")
    parser.add_argument("--images", type=number_type(int, True), help="in a step [as in the preset cifar10]")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="[tf32 on CUDA, else fp32]")
    parser.add_argument("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    parser.add_argument("--threads", type=number_type(int, True), help="CPU threads [as PyTorch chooses]")
    parser.add_argument("--log", help="append the results to this file, as JSON lines")
    options = parser.parse_args(argv)
    options.deterministic = False
    set_up_device(options)
    print(f"{device_name(options.device)}, {' to '.join(options.networks)}, {options.precision}")
    for module in costs.MODULES:
        if module.__name__ not in options.methods:
            continue
        found = trace(module, module.PRESETS["cifar10"], options.networks, options)
        for phase, row in found.items():
            share = f"  busy {100 * row['busy']:3.0f} %, {row['kernels']} kernels" if row["kernels"] else ""
            print(f"{module.__name__:>16s} {phase:12s} {row['milliseconds']:9.2f} ms a step{share}",
                  flush=True)
        if options.log:
            row = dict(variant="gpu-busy", method=module.__name__, networks=" → ".join(options.networks),
                       precision=options.precision, images=options.images, device=device_name(options.device),
                       versions=versions(), phases=found)
            with open(options.log, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
