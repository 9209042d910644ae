"""A few pictures of each surrogate set, as they are kept for a teacher: a row a set, twelve pictures.

    python benchmarks/surrogate_sets.py POOL.pt [POOL.pt ...] --out picture.png

POOL.pt are pools that surrogate_kd.py left in checkpoints/, all for teachers of one image shape. A row's
pictures are in the order of their classes.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import BadInput, Parser, command_line, read_file, save_samples


@command_line
def main(argv=None):
    from PIL import Image, ImageDraw
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pools", nargs="+")
    parser.add_argument("--out", required=True, help="file to draw, a .png")
    options = parser.parse_args(argv)
    rows, names = [], []
    for path in options.pools:
        content = read_file(path, "surrogate pool")
        if "surrogate" not in content.get("made_with", {}):
            raise BadInput(f"{path} is no pool of surrogate_kd.py; they are in checkpoints/, after a run")
        pixels, labels, _ = content["result"]
        order = torch.cat([(labels == label).nonzero()[:2, 0] for label in labels.unique()])
        rows.append(pixels[order[torch.linspace(0, len(order) - 1, 12).long()]] / 255)
        names.append(content["made_with"]["surrogate"])
    if len({row.shape for row in rows}) > 1:
        raise BadInput("the pools' images differ in shape; name pools for teachers of one image shape")
    number, sets = torch.arange(len(rows)).repeat_interleave(12), len(rows)
    save_samples(options.out, torch.cat(rows), number, sets, each=12, most=sets)
    picture = Image.open(options.out)
    for row, name in enumerate(names):                         # a name's first letters in place of the number
        top, bottom = row * picture.height // sets, (row + 1) * picture.height // sets
        ImageDraw.Draw(picture).rectangle((0, top, 23, bottom), fill="white")
        ImageDraw.Draw(picture).text((2, (top + bottom) // 2 - 5), name[:3], fill="black")
    picture.save(options.out, format="PNG")
    print(", ".join(names), "->", options.out)


if __name__ == "__main__":
    main()
