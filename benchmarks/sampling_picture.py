"""Sufficient sampling, drawn: where the pictures of a surrogate set lie in a teacher's plane of decisions, and what a student makes of them.

    python benchmarks/sampling_picture.py --dataset mnist --surrogates noise leaves --out picture.png

Teacher and student end in two features, a plane that can be drawn whole: colour is the class that a point of the plane gets, dots are the
pictures of the set. Left the teacher's plane, right the student's after distillation; one row a set. A set that leaves parts of the
teacher's map empty says nothing of them. The picture's idea is of surrogate_kd.py's authors; networks, training and colours are not.
"""
import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import surrogate_kd
from common import Shuffled, accuracy, cosine, load_dataset, normalize, predict, seeded, set_lr
from run import set_up_device, write_atomically


class PlaneNet(nn.Module):
    """Three convolutions, a fourth to two channels, their mean: two features, and a linear layer.   (N, C, H, W) -> (N, K)"""
    def __init__(self, channels, num_classes, width=32):
        super().__init__()
        layers = []
        for width_in, width_out in ((channels, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(width_in, width_out, 3, padding=1), nn.BatchNorm2d(width_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.body, self.fc = nn.Sequential(*layers, nn.Conv2d(2 * width, 2, 1)), nn.Linear(2, num_classes)

    def features(self, images):
        return self.body(images).mean((2, 3))                                             # (N, 2)

    def forward(self, images):
        return self.fc(self.features(images))


def train(model, train_set, data, epochs, device):
    """Cross-entropy on the real training set; Adam, cosine."""
    optimizer, rng = torch.optim.Adam(model.parameters(), 2e-3), torch.Generator(device).manual_seed(0)
    batches = Shuffled(rng)
    model.train()
    for epoch in range(epochs):
        set_lr(optimizer, cosine(2e-3, epoch, epochs))
        for _ in range(math.ceil(len(train_set.labels) / 128)):
            batch = batches.next(len(train_set.labels), 128)
            loss = F.cross_entropy(model(normalize(train_set.pixels[batch] / train_set.scale, data)), train_set.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def draw(axis, model, pixels, data, title, points=2000):
    """The classes of the plane, 500 x 500 points, and where `points` pictures of a pool (M, C, H, W) uint8 lie in it."""
    model.eval()
    chosen = pixels[torch.linspace(0, len(pixels) - 1, min(points, len(pixels))).long()]
    features = model.features(normalize(chosen / 255, data)).cpu()
    side = 1.1 * features.abs().quantile(0.99).item()
    line = torch.linspace(-side, side, 500)
    plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)      # (250000, 2), rows from below
    classes = model.fc(plane.to(next(model.parameters()).device)).argmax(1).view(500, 500).cpu()
    axis.imshow(classes.numpy(), origin="lower", extent=(-side, side, -side, side), cmap="tab10", vmin=0, vmax=9, alpha=0.55, interpolation="nearest")
    axis.scatter(*features.T.numpy(), s=1.5, color="black", linewidths=0)
    axis.set(xlim=(-side, side), ylim=(-side, side), xticks=[], yticks=[], title=title)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--surrogates", nargs="+", default=["noise", "leaves"], choices=surrogate_kd.GENERATORS)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--pool-images", type=int, default=10_000)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", required=True)
    given = SimpleNamespace(**vars(parser.parse_args(argv)), precision=None, deterministic=False)
    device = set_up_device(given)
    from matplotlib.figure import Figure
    (train_set, data), (test, _) = (load_dataset(given.dataset, part, given.data_dir, device) for part in (True, False))
    with seeded(0):
        teacher = PlaneNet(data.image_shape[0], data.num_classes).to(device, memory_format=torch.channels_last)
    train(teacher, train_set, data, given.teacher_epochs, device)
    teacher_acc = accuracy(predict(teacher, test, data), test.labels)
    print(f"teacher {teacher_acc:.4f}", flush=True)
    figure = Figure(figsize=(7, 3.6 * len(given.surrogates)), layout="constrained")
    for row, name in zip(figure.subplots(len(given.surrogates), 2, squeeze=False), given.surrogates):
        settings = SimpleNamespace(**{**surrogate_kd.PRESETS[given.dataset], "surrogate": name, "pool_images": given.pool_images,
                                      "epochs": given.epochs}, seed=0)
        pool = surrogate_kd.balanced_pool(teacher, data, settings, lambda start, n, rng: surrogate_kd.procedural_pixels(name, n, data, settings, rng))
        with seeded(0):
            student = PlaneNet(data.image_shape[0], data.num_classes, 16).to(device, memory_format=torch.channels_last)
        surrogate_kd.distill(teacher, student, data, settings, surrogate=pool["pixels"], pseudo_labels=pool["labels"])
        student_acc = accuracy(predict(student, test, data), test.labels)
        print(f"{name}: relative entropy before balancing {surrogate_kd.relative_entropy(pool['seen']):.3f}, student {student_acc:.4f}", flush=True)
        draw(row[0], teacher, pool["pixels"], data, f"{name}: teacher, {100 * teacher_acc:.1f} %")
        draw(row[1], student, pool["pixels"], data, f"student, {100 * student_acc:.1f} %")
    write_atomically(given.out, lambda file: figure.savefig(file, format="png", dpi=90))


if __name__ == "__main__":
    main()
