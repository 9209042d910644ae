"""Which networks can teach in which method: torchvision's, with random weights, on small images.

    python benchmarks/any_teacher.py [--log benchmarks/results/measurements.jsonl] [NETWORK ...]

Each pair runs the method's own script for one epoch of a few steps. It works, or the script refuses
the teacher in one sentence. Anything else, a traceback for example, stops this script.
"""
import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import csd
import cudfkd
import dafl
import deepinversion
import rdskd
import regulated_kd
import surrogate_kd
from common import device_name, seeded, versions

NETWORKS = ("resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_small", "regnet_y_400mf", "efficientnet_b0",
            "convnext_tiny", "vit_b_16", "swin_t", "inception_v3", "googlenet")
SIZES = {"inception_v3": 80}                                   # the others take 32
MORE = {"vit_b_16": dict(image_size=32), "inception_v3": dict(init_weights=True),
        "googlenet": dict(init_weights=True)}
# settings with which a run takes seconds
TINY = {csd: "student-steps 2 synthesis-batch-size 10 synthesis-steps 2 bank-rounds 1 bank-synthesis-steps 2 "
             "latent-dim 8",
        cudfkd: "student-steps 2 round-steps 2 synthesis-batch-size 8 latent-dim 8 generator-width 8",
        dafl: "student-steps 2 latent-dim 8 generator-width 8",
        deepinversion: "student-steps 2 initial-batches 1 pool-batches 2 synthesis-batch-size 8 "
                       "synthesis-steps 2",
        rdskd: "student-steps 2 generator-epochs 1 generator-steps 2 synthesis-batch-size 8 latent-dim 8 "
               "generator-width 8",
        regulated_kd: "teacher-epochs 1 teacher-batch-size 8",
        surrogate_kd: "pool-images 20 pool-budget 1"}


def __getattr__(name):
    """`any_teacher:resnet18` is a network as --teacher takes it: the function that builds it."""
    if name not in NETWORKS:
        raise AttributeError(name)
    return lambda: torchvision.models.get_model(name, num_classes=10, **MORE.get(name, {}))


def make_images(folder, side):
    """Two random pictures a class, for training and test: scores mean nothing here."""
    with seeded(0):
        pixels = torch.randint(256, (2, 10, 2, side, side, 3), dtype=torch.uint8)
    for part, classes in zip(("train", "test"), pixels):
        for label, pictures in enumerate(classes):
            path = Path(folder, part, str(label))
            path.mkdir(parents=True, exist_ok=True)
            for number, picture in enumerate(pictures):
                Image.fromarray(picture.numpy()).save(path / f"{number}.png")
    return f"folder:{folder}"


def tried(method, network, folder):
    """'works', or the sentence of refusal."""
    flags = " ".join("--" + part if not part[0].isdigit() else part for part in TINY[method].split())
    argv = ["--teacher", f"any_teacher:{network}", "--student", "wrn10_1", "--preset", "cifar10",
            "--dataset", make_images(folder, SIZES.get(network, 32)), "--epochs", "1", "--batch-size", "8",
            "--out", f"{folder}/{method.__name__}", *flags.split()]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            method.main(argv)
    except SystemExit as stop:
        if stop.code != 2:
            raise RuntimeError(said.getvalue()) from None
        return said.getvalue().removeprefix("error: ").strip()
    return "works"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="[all]")
    parser.add_argument("--log", help="add the rows to this file")
    options = parser.parse_args(argv)
    log, here = Path(options.log).absolute() if options.log else None, os.getcwd()
    for network in options.networks:
        row = dict(variant="any teacher", network=network, size=SIZES.get(network, 32), methods={},
                   device=device_name(torch.device("cpu")), versions=versions())
        for method in TINY:
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)                                        # for checkpoints/
                try:
                    row["methods"][method.__name__] = tried(method, network, folder)
                finally:
                    os.chdir(here)
            print(f"{network:20s} {method.__name__:15s} {row['methods'][method.__name__]}", flush=True)
        if log:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.modules.setdefault("any_teacher", sys.modules["__main__"])
    main()
