"""CIFAR-10 in one small file, for machines without a network.

    python benchmarks/pack_data.py cifar10.zip                                  # data/ -> cifar10.zip
    python benchmarks/pack_data.py cifar10.zip --run csd.py --teacher resnet34  # a script that reads it

The test images are lossless (WebP). The training images are JPEG of quality 95 without subsampling, about
a third of their size; a number that was made with them must say so, and the first line that is printed
does. The images lie in sheets of 1,000, forty to a row: JPEG's blocks of 8x8 pixels never cross the
border of an image.
"""
import contextlib
import io
import runpy
import sys
import zipfile
from pathlib import Path

import numpy
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
from common import BadInput, Parser, command_line, load_dataset

SHEET, ACROSS, SIDE = 1000, 40, 32     # images of a sheet, images in its row, pixels of an image
KINDS = {"train": dict(format="JPEG", quality=95, subsampling=0), "test": dict(format="WEBP", lossless=True)}


def to_sheet(pixels):
    """(1000, 3, 32, 32) uint8 -> an image of 40 x 25 of them"""
    rows = pixels.unflatten(0, (SHEET // ACROSS, ACROSS)).permute(0, 3, 1, 4, 2)         # (25, 32, 40, 32, 3)
    return Image.fromarray(rows.reshape(SHEET // ACROSS * SIDE, ACROSS * SIDE, 3).numpy())


def from_sheet(image):
    """The inverse of `to_sheet`"""
    pixels = torch.from_numpy(numpy.array(image)).view(SHEET // ACROSS, SIDE, ACROSS, SIDE, 3)
    return pixels.permute(0, 2, 4, 1, 3).reshape(SHEET, 3, SIDE, SIDE)


def pack(path, data_dir):
    with zipfile.ZipFile(path, "w") as file:
        for part, how in KINDS.items():
            (pixels, labels, _), _ = load_dataset("cifar10", part == "train", data_dir)
            file.writestr(f"{part}-labels", labels.to(torch.uint8).numpy().tobytes())
            for number, sheet in enumerate(pixels.split(SHEET)):
                written = io.BytesIO()
                to_sheet(sheet).save(written, **how)
                file.writestr(f"{part}-{number:02d}", written.getvalue())
    print(f"{path}: {Path(path).stat().st_size / 2 ** 20:.1f} MB")


def unpack(path, train):
    """-> pixels (N, 3, 32, 32) uint8, labels (N,). Raises BadInput for a file missing or damaged."""
    part = "train" if train else "test"
    try:
        with zipfile.ZipFile(path) as file:
            labels = torch.frombuffer(bytearray(file.read(f"{part}-labels")), dtype=torch.uint8).long()
            sheets = [from_sheet(Image.open(io.BytesIO(file.read(f"{part}-{number:02d}"))))
                      for number in range(len(labels) // SHEET)]
        return torch.cat(sheets), labels
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is no pack of images ({error}); make one with: python "
                       f"benchmarks/pack_data.py {path}") from None


def read_cifar10(path, name, train):
    """What common.py's reader returns, from the pack."""
    if name != "cifar10":
        raise BadInput(f"{path} holds CIFAR-10 alone, not {name}")
    return unpack(path, train)


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", help="the file")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 is [data]")
    parser.add_argument("--run", nargs="...", metavar="SCRIPT", help="a script and its flags; comes last")
    options = parser.parse_args(argv)
    if not options.run:
        if Path(options.pack).exists():
            raise BadInput(f"{options.pack} is there already; name another file, or move it away")
        pack(options.pack, options.data_dir)
        return
    unpack(options.pack, train=False)                          # refuses a damaged file now
    script, *flags = options.run
    print("CIFAR-10's training images are JPEG of quality 95 here", flush=True)
    with contextlib.ExitStack() as after:
        after.callback(setattr, common, "_read_torchvision", common._read_torchvision)
        common._read_torchvision = lambda name, train, data_dir: read_cifar10(options.pack, name, train)
        after.callback(setattr, sys, "argv", sys.argv)
        sys.argv = [script, *flags]
        if script == "common.py":                              # the module that is patched, not a second one
            common.main(flags)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
