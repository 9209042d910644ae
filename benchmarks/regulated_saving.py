"""What choosing images saves: plain distillation and the self-regulated student, in one process, on the same images.

    python benchmarks/regulated_saving.py --dataset mnist --epochs 3 [--log benchmarks/results/NAME.jsonl]

An untimed epoch to warm up, then plain, regulated, regulated with a queue for batches of several sizes, plain again. All ask the usual
teacher, whose answers are cached where the set has no augmentation (on digits it is asked at each step). Prints the part of the visits
that was used, and the student's seconds as a fraction of plain distillation's.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import regulated_kd
from common import accuracy, load_dataset, predict, seeded
from models import build_model
from run import device_name, load_teacher, set_up_device, versions

VARIANTS = {"kd": dict(mode="kd"), "regulated": {}, "regulated, queued": dict(queue=True),
            **{f"regulated, queued in {size}s": dict(queue=True, batch_size=size) for size in (64, 32, 16)}}


class Stopwatch:
    """A `run` that adds up the seconds of the student's steps."""
    seconds, share = 0.0, 0.0

    def restore(self, state):
        self.state = state

    def tick(self, state):
        pass

    def report(self, **row):
        self.seconds, self.share = self.state["seconds_distillation"], row["data_fraction"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--log", help="append the result to this file, one JSON line a variant")
    given = parser.parse_args(argv)
    given = SimpleNamespace(**vars(given), precision=None, deterministic=False, teacher="lenet5")
    device = set_up_device(given)
    teacher, data, _, _ = load_teacher(given, device)
    train, _ = load_dataset(given.dataset, True, given.data_dir, device)
    test, _ = load_dataset(given.dataset, False, given.data_dir, device)
    found = {}
    for number, name in enumerate(["kd", *VARIANTS, "kd"]):
        settings = SimpleNamespace(**{**regulated_kd.PRESETS[given.dataset], "epochs": given.epochs if number else 1, **VARIANTS[name]}, seed=0)
        with seeded(0):
            student = build_model("lenet5_half", data.num_classes, data.image_shape).to(device, memory_format=torch.channels_last)
        watch = Stopwatch()
        regulated_kd.distill(teacher, student, data, settings, watch, train=train)
        if number:
            found.setdefault(name, []).append((watch.seconds, watch.share, accuracy(predict(student, test, data), test.labels)))
    plain = statistics.mean(seconds for seconds, _, _ in found["kd"])
    print(f"{given.dataset}, {given.epochs} epochs, {device_name(device)}\n{'':>24s} {'used':>8s} {'seconds':>9s} {'of plain':>9s} {'accuracy':>9s}")
    for name, runs in found.items():
        seconds, share, acc = (statistics.mean(values) for values in zip(*runs))
        print(f"{name:>24s} {share:8.3f} {seconds:9.2f} {seconds / plain:9.2f} {acc:9.4f}")
        row = dict(variant="saving", kind=name, dataset=given.dataset, epochs=given.epochs, used=round(share, 4), seconds=round(seconds, 2),
                   of_plain=round(seconds / plain, 3), student_acc=acc, device=device_name(device), versions=versions())
        if given.log:
            with open(given.log, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
