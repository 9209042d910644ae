"""A few pictures of each surrogate set, as they are kept for a teacher: one row a set, twelve pictures, in the order of their classes.

    python benchmarks/surrogate_sets.py POOL.pt [POOL.pt ...] --out picture.png

POOL.pt are pools that surrogate_kd.py left in checkpoints/, all for teachers of one image shape.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from run import read_file, save_samples


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pools", nargs="+")
    parser.add_argument("--out", required=True)
    given = parser.parse_args(argv)
    rows, names = [], []
    for path in given.pools:
        content = read_file(path, "surrogate pool")
        pixels, labels = content["result"]["pixels"], content["result"]["labels"]
        order = torch.cat([(labels == label).nonzero()[:2, 0] for label in labels.unique()])
        rows.append(pixels[order[torch.linspace(0, len(order) - 1, 12).long()]])
        names.append(content["made_with"]["surrogate"][:3])
    save_samples(given.out, torch.stack(rows), names)
    print(", ".join(names), "->", given.out)


if __name__ == "__main__":
    main()
