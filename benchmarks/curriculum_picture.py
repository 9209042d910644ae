"""CuDFKD's picture from a log: how hard the images were, what they weighed, what moved both.

    python benchmarks/curriculum_picture.py runs/cudfkd-digits-001/log.jsonl picture.png
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cudfkd
from common import BadInput


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", help="log.jsonl of a run of cudfkd.py")
    parser.add_argument("picture", help="file to draw, .png, .pdf or .svg")
    settings = parser.parse_args(argv)
    rows = [json.loads(line) for line in Path(settings.log).read_text().splitlines()]
    if not any(row["event"] == "curriculum" for row in rows):
        raise BadInput(f"{settings.log} is not a log of cudfkd.py")
    cudfkd.draw_curriculum(rows).savefig(settings.picture, dpi=110)


if __name__ == "__main__":
    main()
