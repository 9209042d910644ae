"""Which networks can teach and learn in which method: torchvision's, with random weights, two steps each.

    python benchmarks/architectures.py --log benchmarks/results/architectures.jsonl
    python benchmarks/architectures.py resnet50 swin_t

Each network is the teacher of a WRN-10-1 and the student of one, in every method's `distill`, on images of
32x32 or the smallest size that it takes. A pair works, or the method refuses the network or stops with one
sentence. Anything else, a traceback for example, stops this script.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import costs
from common import BadInput, DataSpec, build_model, seeded
from running import Parser, command_line, versions

NETWORKS = """
    alexnet convnext_tiny convnext_small densenet121 densenet161 densenet169 densenet201 efficientnet_b0
    efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_v2_s googlenet inception_v3 mnasnet0_5
    mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf
    regnet_x_800mf regnet_x_1_6gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf resnet18 resnet34 resnet50
    resnet101 resnext50_32x4d wide_resnet50_2 shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
    shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vgg13_bn vit_b_16
""".split()
SIZES = {"alexnet": 64, "inception_v3": 80}                    # the others take 32
MORE = {"vit_b_16": dict(image_size=32), "inception_v3": dict(init_weights=True),
        "googlenet": dict(init_weights=True)}
TWO = dict(student_steps=2, round_steps=2, synthesis_steps=2, generator_steps=2, batch_size=8,
           synthesis_batch_size=8, images_per_pass=8, mode="kd")


def tried(module, network, role):
    """-> 'works', or the sentence with which the method refuses the network or stops"""
    side = SIZES.get(network, 32)
    data = DataSpec((3, side, side), 10, (0.5,) * 3, (0.25,) * 3)
    values = {name: value for name, value in {**costs.ONE_STEP, **TWO}.items()
              if hasattr(module.Settings, name)}
    settings = replace(module.PRESETS["cifar10"].settings, **values)
    with seeded(0):
        found = torchvision.models.get_model(network, num_classes=10, **MORE.get(network, {}))
        other = build_model("wrn10_1", 10, data.image_shape)
        teacher, student = (found, other) if role == "teacher" else (other, found)
        try:
            costs.distilled(module, teacher.eval(), student, data, settings, 16)
        except BadInput as error:
            return str(error)
        except FloatingPointError as error:                    # untrained and deep: it may diverge at once
            return f"stopped: {error}"
    return "works"


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="[all that are listed in the script]")
    parser.add_argument("--log", help="append the rows to this file")
    options = parser.parse_args(argv)
    for network in options.networks:
        for role in ("teacher", "student"):
            row = dict(variant="architecture", network=network, role=role, versions=versions(), methods={
                module.__name__: tried(module, network, role) for module in costs.MODULES})
            refused = {name: said for name, said in row["methods"].items() if said != "works"}
            print(f"{network:20s} as {role}: {len(row['methods']) - len(refused)} work"
                  + "".join(f"\n    {name}: {said}" for name, said in refused.items()), flush=True)
            if options.log:
                with open(options.log, "a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
