"""What choosing images saves: plain distillation and the self-regulated student, in one process.

    python benchmarks/regulated_saving.py --dataset mnist --epochs 3 [--log benchmarks/results/NAME.jsonl]

First an untimed epoch to warm up, then plain, regulated, regulated with a queue for batches of several
sizes, plain again. All learn from the usual teacher, which answers once for all epochs where the set has
no augmentation (on digits it answers at each step). Prints the part of the visits that was used, and the
student's seconds as a fraction of plain distillation's.
"""
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import regulated_kd
from common import (COSTS, DATASETS, number_type, Parser, accuracy, build_model, command_line, device_name,
                    load_dataset, load_networks, place_like, predict, seeded, set_up_device, versions)

VARIANTS = {"kd": dict(mode="kd"), "regulated": {}, "regulated, queued": dict(queue=True),
            **{f"regulated, queued in {size}s": dict(queue=True, batch_size=size) for size in (64, 32, 16)}}


class Clock:
    """A run that adds up the seconds of the student's steps."""
    def __init__(self):
        self.seconds = 0.0

    def resume(self, **state):
        COSTS.clear()
        return 0

    def log(self, epoch, means):
        self.seconds, self.used = self.seconds + COSTS.pop("seconds_distillation"), means["data_fraction"]


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--epochs", type=number_type(int, True), default=3)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    parser.add_argument("--threads", type=number_type(int, True), help="CPU threads [as PyTorch chooses]")
    parser.add_argument("--log", help="append the result to this file, one JSON line a variant")
    parser.set_defaults(precision=None, deterministic=False, teacher="lenet5", student="lenet5_half")
    options = parser.parse_args(argv)
    set_up_device(options)
    preset, data = regulated_kd.PRESETS[options.dataset], DATASETS[options.dataset]
    teacher, _ = load_networks(options, preset, data)
    train, test = (load_dataset(options.dataset, part, options.data_dir, options.device)[0]
                   for part in (True, False))
    found = {}
    for number, name in enumerate(["kd", *VARIANTS, "kd"]):
        settings = replace(preset, epochs=options.epochs if number else 1, **VARIANTS[name])
        with seeded(0):
            student = build_model(options.student, data.num_classes, data.image_shape)
        clock = Clock()
        regulated_kd.distill(teacher, place_like(student, teacher), data, settings, clock, train=train)
        if number:                                             # the first one warms up
            acc = accuracy(predict(student, test, data), test.labels)
            found.setdefault(name, []).append((clock.used, clock.seconds, acc))
    plain = statistics.mean(seconds for _, seconds, _ in found["kd"])
    print(f"{options.dataset}, {options.epochs} epochs, {device_name(options.device)}\n"
          f"{'':>24s}     used  seconds of plain accuracy")
    for name, runs in found.items():
        used, seconds, acc = (statistics.mean(values) for values in zip(*runs))
        print(f"{name:>24s} {used:8.3f} {seconds:8.2f} {seconds / plain:8.2f} {acc:8.4f}")
        row = dict(variant="saving", kind=name, dataset=options.dataset, epochs=options.epochs,
                   used=round(used, 4), seconds=round(seconds, 2), of_plain=round(seconds / plain, 3),
                   student_acc=acc, device=device_name(options.device), versions=versions())
        if options.log:
            with open(options.log, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
