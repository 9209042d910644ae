"""Would a classifier that had no part in making the images see the classes that were asked for?

    python deepinversion.py --dataset digits --synthesize-only 512 --out runs/images
    python benchmarks/stranger.py runs/images/images.pt --dataset digits --model wrn16_1 --seed 1

Trains a classifier of another width and seed on the real training set, by the teachers' recipe. Prints its
test accuracy and the fraction of images whose target it names. --log benchmarks/results/NAME.jsonl keeps
both.
"""
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (BadInput, DataSpec, ImageSet, Parser, accuracy, augment, batches, build_model,
                    build_optimizer, command_line, cosine, device_name, load_dataset, normalize, number_type,
                    predict, read_file, recipe_of, seeded, set_lr, set_up_device, steps, versions)


def train_stranger(arch, train, data, recipe, seed):
    """-> a classifier in eval mode"""
    device, size = train.labels.device, recipe["batch_size"]
    with seeded(seed):
        model = build_model(arch, data.num_classes, data.image_shape)
        model.to(device, memory_format=torch.channels_last)
        optimizer = build_optimizer(model, recipe["optimizer"], recipe["lr"], recipe["weight_decay"])
        for epoch in range(recipe["epochs"]):
            set_lr(optimizer, cosine(recipe["lr"], epoch, recipe["epochs"]))
            order = batches(len(train.labels), size, device)
            for batch in steps(math.ceil(len(train.labels) / size), f"epoch {epoch + 1}", order):
                images = normalize(augment(train.pixels[batch] / train.scale, data), data)
                loss = F.cross_entropy(model(images), train.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="images.pt of a run with --synthesize-only")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="wrn16_1")
    parser.add_argument("--seed", type=number_type(int, False), default=1)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    parser.add_argument("--threads", type=number_type(int, True), help="CPU threads [as PyTorch chooses]")
    parser.add_argument("--flags", default="", help="those that the images were made with, for the log")
    parser.add_argument("--log", help="append the result to this file, as a JSON line")
    parser.set_defaults(precision=None, deterministic=False)
    options = parser.parse_args(argv)
    set_up_device(options)
    device, content = options.device, read_file(options.images, "image file")
    if not {"pixels", "targets", "data"} <= set(content):
        raise BadInput(f"{options.images} holds no images; make some with deepinversion.py --synthesize-only")
    train, data = load_dataset(options.dataset, True, options.data_dir, device)
    test, _ = load_dataset(options.dataset, False, options.data_dir, device)
    if data != DataSpec(**content["data"]):
        raise BadInput(f"{options.images} is not of {options.dataset}; name its data set with --dataset")
    recipe = recipe_of(options.model, options.dataset)
    model = train_stranger(options.model, train, data, recipe, options.seed)
    made = ImageSet(content["pixels"].to(device), content["targets"].to(device))
    test_acc, target_acc = (accuracy(predict(model, images, data), images.labels) for images in (test, made))
    print(f"{options.model}, seed {options.seed}: test accuracy {test_acc:.4f}; sees the asked-for class in "
          f"{target_acc:.4f} of {len(made.labels)} images")
    row = dict(variant="stranger", dataset=options.dataset, model=options.model, seed=options.seed,
               flags=options.flags, test_acc=test_acc, images=len(made.labels), target_acc=target_acc,
               device=device_name(device), versions=versions())
    if options.log:
        with open(options.log, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
