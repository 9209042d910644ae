"""Sufficient sampling, drawn: where surrogate pictures lie in a teacher's plane of decisions.

    python benchmarks/sampling_picture.py --dataset mnist --surrogates noise leaves --out picture.png

Teacher and student end in two features, a plane that can be drawn whole. Colour is the class of a point of
the plane, dots are the pictures of the set. Left the teacher's plane, right the student's after
distillation; one row a set. A set that leaves parts of the teacher's plane empty says nothing of them. The
picture's idea is of surrogate_kd.py's authors; networks, training and colours are not.
"""
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import surrogate_kd
from common import (BadInput, number_type, Parser, accuracy, batches, command_line, cosine, load_dataset,
                    normalize, predict, seeded, set_lr, set_up_device, steps)


class PlaneNet(nn.Module):
    """Three convolutions, a fourth to two channels, their mean, a linear layer.   (N, C, H, W) -> (N, K)"""
    def __init__(self, channels, num_classes, width=32):
        super().__init__()
        layers = []
        for width_in, width_out in ((channels, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(width_in, width_out, 3, padding=1), nn.BatchNorm2d(width_out), nn.ReLU(),
                       nn.MaxPool2d(2)]
        self.body, self.fc = nn.Sequential(*layers, nn.Conv2d(2 * width, 2, 1)), nn.Linear(2, num_classes)

    def features(self, images):
        return self.body(images).mean((2, 3))                                # (N, 2)

    def forward(self, images):
        return self.fc(self.features(images))


def train_teacher(model, train, data, epochs):
    """Cross-entropy on the real training set; Adam, cosine."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for epoch in range(epochs):
        set_lr(optimizer, cosine(2e-3, epoch, epochs))
        order = batches(len(train.labels), 128, train.labels.device)
        for batch in steps(math.ceil(len(train.labels) / 128), "training", order):
            images = normalize(train.pixels[batch] / train.scale, data)
            loss = F.cross_entropy(model(images), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.no_grad()
def draw(axes, model, pixels, data, title, points=2000):
    """The classes of the plane, 500 x 500 points, and where `points` of the pixels (M, C, H, W) uint8 lie."""
    model.eval()
    chosen = pixels[torch.linspace(0, len(pixels) - 1, min(points, len(pixels))).long()]
    features = model.features(normalize(chosen / 255, data)).cpu()           # (points, 2)
    side = 1.1 * features.abs().quantile(0.99).item()
    line = torch.linspace(-side, side, 500, device=pixels.device)
    plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)       # (500, 500, 2), rows from below
    classes = model.fc(plane).argmax(2).cpu()                                # (500, 500)
    axes.imshow(classes.numpy(), origin="lower", extent=(-side, side, -side, side), cmap="tab10", vmin=0,
                vmax=9, alpha=0.55, interpolation="nearest")
    axes.scatter(*features.T.numpy(), s=1.5, color="black", linewidths=0)
    axes.set(xlim=(-side, side), ylim=(-side, side), xticks=[], yticks=[], title=title)


@command_line
def main(argv=None):
    from matplotlib.figure import Figure
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--surrogates", nargs="+", default=["noise", "leaves"],
                        choices=surrogate_kd.GENERATORS)
    parser.add_argument("--teacher-epochs", type=number_type(int, True), default=4)
    parser.add_argument("--epochs", type=number_type(int, True), default=30, help="of the student")
    parser.add_argument("--pool-images", type=number_type(int, True), default=10_000)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    parser.add_argument("--threads", type=number_type(int, True), help="CPU threads [as PyTorch chooses]")
    parser.add_argument("--out", required=True, help="file to draw, as picture.png")
    parser.set_defaults(precision=None, deterministic=False)
    options = parser.parse_args(argv)
    set_up_device(options)
    device = options.device
    (train, data), (test, _) = (load_dataset(options.dataset, part, options.data_dir, device)
                                for part in (True, False))

    def network(width):
        model = PlaneNet(data.image_shape[0], data.num_classes, width)
        return model.to(device, memory_format=torch.channels_last)

    def percent(model):
        return 100 * accuracy(predict(model, test, data), test.labels)
    with seeded(0):
        teacher = network(32)
        train_teacher(teacher, train, data, options.teacher_epochs)
    print(f"teacher {percent(teacher):.2f} %", flush=True)
    figure = Figure(figsize=(7, 3.6 * len(options.surrogates)), layout="constrained")
    rows = figure.subplots(len(options.surrogates), 2, squeeze=False)
    for (left, right), name in zip(rows, options.surrogates):
        settings = replace(surrogate_kd.PRESETS[options.dataset], surrogate=name, epochs=options.epochs,
                           pool_images=options.pool_images)
        pixels, labels, seen = surrogate_kd.balanced_pool(
            teacher, data, settings,
            lambda start, n: surrogate_kd.procedural_pixels(name, n, data, settings, device))
        with seeded(0):
            student = network(16)
        surrogate_kd.distill(teacher, student, data, settings, surrogate=pixels, pseudo_labels=labels)
        print(f"{name}: relative entropy before balancing {surrogate_kd.relative_entropy(seen):.3f}, student "
              f"{percent(student):.2f} %", flush=True)
        draw(left, teacher, pixels, data, f"{name}: teacher, {percent(teacher):.1f} %")
        draw(right, student, pixels, data, f"student, {percent(student):.1f} %")
    try:
        figure.savefig(options.out, dpi=90)
    except (OSError, ValueError) as error:
        raise BadInput(f"{options.out} cannot be drawn ({error})") from None


if __name__ == "__main__":
    main()
