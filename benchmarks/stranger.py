"""Would a classifier that had no part in making the images see the classes that were asked for?

    python deepinversion.py --dataset digits --synthesize-only 512 --out runs/images
    python benchmarks/stranger.py runs/images/images.pt --dataset digits --model wrn16_1 --seed 1 [--log benchmarks/results/NAME.jsonl]

Trains a classifier of another width and seed on the real training set, by the teachers' recipe, and prints its test accuracy and
the fraction of images whose target it names.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (BadInput, DataSpec, Shuffled, accuracy, augment, cosine, frozen, load_dataset, normalize, predict,  # noqa: E402
                    seeded, set_lr)
from models import build_model  # noqa: E402
from run import device_name, read_file, recipe_of, versions  # noqa: E402


def stranger(arch, dataset, data_dir, seed, device):
    """-> (model, test accuracy)"""
    train, data = load_dataset(dataset, True, data_dir, device)
    test, _ = load_dataset(dataset, False, data_dir, device)
    recipe = recipe_of(arch, dataset)
    if recipe["optimizer"] != "sgd":
        raise BadInput(f"{arch} has no BatchNorm and another recipe; take a wrnDEPTH_WIDTH, resnet or vgg")
    with seeded(seed):
        model = build_model(arch, data.num_classes, data.image_shape).to(device, memory_format=torch.channels_last)
    rng = torch.Generator(device).manual_seed(seed)
    batches, optimizer = Shuffled(rng), torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=recipe["weight_decay"])
    for epoch in range(recipe["epochs"]):
        set_lr(optimizer, cosine(0.1, epoch, recipe["epochs"]))
        for _ in range(math.ceil(len(train.labels) / recipe["batch_size"])):
            batch = batches.next(len(train.labels), recipe["batch_size"])
            loss = F.cross_entropy(model(normalize(augment(train.pixels[batch] / train.scale, data, rng), data)), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, accuracy(predict(model, test, data), test.labels)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="images.pt of a run with --synthesize-only")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="wrn16_1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--flags", default="", help="those that the images were made with, for the log")
    parser.add_argument("--log")
    settings = parser.parse_args(argv)
    device, content = torch.device("cuda" if torch.cuda.is_available() else "cpu"), read_file(settings.images, "image file")
    model, test_acc = stranger(settings.model, settings.dataset, settings.data_dir, settings.seed, device)
    with torch.no_grad(), frozen(model):
        data = DataSpec(**content["data"])
        logits = torch.cat([model(normalize(pixels.to(device) / 255, data)) for pixels in content["pixels"].split(500)])
    row = dict(variant="stranger", dataset=settings.dataset, model=settings.model, seed=settings.seed, flags=settings.flags, test_acc=test_acc,
               images=len(logits), target_acc=accuracy(logits.cpu(), content["targets"]), device=device_name(device), versions=versions())
    print(f"{settings.model}, seed {settings.seed}: test accuracy {test_acc:.4f}; sees the asked-for class in {row['target_acc']:.4f} of "
          f"{len(logits)} images")
    if settings.log:
        with open(settings.log, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
