"""What frozen BatchNorm and its statistics cost, in PyTorch's layers and in common.py's.   python benchmarks/frozen_batchnorm.py

Maps as in WRN-40-2 with 200 images, channels_last, float32, forward and backward to the input; milliseconds, median of 9.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import frozen, recorded_inputs, recorded_statistics
from run import device_name, versions


def milliseconds(passes, x):
    times = []
    for _ in range(10):
        x.grad = None
        began = time.perf_counter()
        passes(x).backward()
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times[1:]), 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", help="append the rows to this file")
    settings = parser.parse_args(argv)
    print(f"{'map':>18s} {'conv3x3':>9s} {'BN':>9s} {'BN+stat':>9s} {'here: BN':>9s} {'BN+stat':>9s}")
    for channels, size in ((32, 32), (64, 16), (128, 8)):
        x = torch.randn(200, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()
        bn = nn.BatchNorm2d(channels).eval().requires_grad_(False)
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).requires_grad_(False).to(memory_format=torch.channels_last)

        def theirs(x):
            with recorded_inputs([bn]) as seen:
                out = bn(x)
            variance, mean = torch.var_mean(seen[bn], (0, 2, 3), correction=0)
            return out.sum() + variance.norm() + mean.norm()

        def ours(x):
            with frozen(bn), recorded_statistics([bn]) as seen:
                out = bn(x)
            return out.sum() + sum(value.norm() for value in seen[bn])

        def ours_without(x):
            with frozen(bn):
                return bn(x).sum()
        row = dict(variant="frozen_batchnorm", shape=list(x.shape), conv=milliseconds(lambda x: conv(x).sum(), x),
                   torch_bn=milliseconds(lambda x: bn(x).sum(), x), torch_bn_statistics=milliseconds(theirs, x),
                   here_bn=milliseconds(ours_without, x), here_bn_statistics=milliseconds(ours, x),
                   device=device_name(torch.device("cpu")), versions=versions())
        print(f"{str(tuple(x.shape)):>18s} " + " ".join(f"{row[key]:9.1f}" for key in
              ("conv", "torch_bn", "torch_bn_statistics", "here_bn", "here_bn_statistics")), flush=True)
        if settings.log:
            with open(settings.log, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
