"""Teachers that no preset was tuned on: the networks of the foreign-teacher tables.

    python common.py --inspect benchmarks.foreign:digit_recognizer
    python common.py --model benchmarks.foreign:mixer --dataset mnist-val --out mixer.pt

Each function returns a network, as --teacher and --model take it. What counts as a foreign teacher, and how
the comparison is run, stands in benchmarks/README.md. The first network comes with its weights, from a
package that somebody else published. The others are trained by commands like the second.
"""
import importlib.util
from pathlib import Path

import torch
import torch.nn as nn

from common import DATASETS


GREY_RACES = {       # {race of race.py: (data set, network)}
    "mnist-digit-recognizer": ("mnist28", "benchmarks.foreign:digit_recognizer"),
    "mnist-wrn": ("mnist-val", "wrn10_1"),
    "mnist-group-norm": ("mnist-val", "benchmarks.foreign:group_norm"),
    "mnist-mixer": ("mnist-val", "benchmarks.foreign:mixer"),
}
COLOUR_RACES = {
    "cifar10-group-norm": ("cifar10-val", "benchmarks.foreign:group_norm_colour"),
    "cifar10-layer-norm": ("cifar10-val", "benchmarks.foreign:layer_norm_colour"),
}
RACES = {**GREY_RACES, **COLOUR_RACES}

# Students of the same structure as their teacher, where the races have a LeNet-5: {race: network}. They have
# half of the channels; there is no narrower WRN, so that student is as large as its teacher.
OWN_KIND = {
    "mnist-digit-recognizer": "benchmarks.foreign:digit_recognizer_half",
    "mnist-wrn": "wrn10_1",
    "mnist-group-norm": "benchmarks.foreign:group_norm_half",
    "mnist-mixer": "benchmarks.foreign:mixer_half",
    "cifar10-group-norm": "benchmarks.foreign:group_norm_colour_half",
    "cifar10-layer-norm": "benchmarks.foreign:layer_norm_colour_half",
}


def digit_recognizer():
    """The CNN of the package digit-recognizer-py 0.1.0, trained by its author on MNIST of 28x28 pixels.

    Three convolutions, no norm, 390,410 weights. It needs: pip install --no-deps digit-recognizer-py
    """
    where = importlib.util.find_spec("digit_recognizer")
    if where is None:
        raise ImportError("run this first: pip install --no-deps digit-recognizer-py")
    folder = Path(where.submodule_search_locations[0])
    # The file of its network alone: the package as a whole imports more than the network needs
    spec = importlib.util.spec_from_file_location("digit_recognizer_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.CNN()
    network.load_state_dict(torch.load(folder / "models/handwriting_model.pth", map_location="cpu"))
    return network, DATASETS["mnist28"]


def digit_recognizer_half():
    """The same structure with half of the channels, untrained: 98,442 weights."""
    return nn.Sequential(*plain_cnn(16, 32, 64, places=9, hidden=128))


def plain_cnn(*widths, places, hidden):
    """Layers for grey images: convolutions that halve the sides, to `places` pixels, then two linear ones."""
    layers = []
    for width_in, width_out in zip((1, *widths), widths):
        layers += [nn.Conv2d(width_in, width_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return [*layers, nn.Flatten(), nn.Linear(places * widths[-1], hidden), nn.ReLU(), nn.Linear(hidden, 10)]


def for_trials():
    """A plain CNN for 32x32 grey images, with which settings may be tried: not a foreign teacher.

    Three convolutions, no norm, 170,858 weights. A factor of 1/3 lets the usual recipe train it.
    """
    return nn.Sequential(*plain_cnn(24, 48, 64, places=16, hidden=128), Third())


def for_trials_half():
    """The same structure with half of the channels: 43,162 weights."""
    return nn.Sequential(*plain_cnn(12, 24, 32, places=16, hidden=64), Third())


def attention_for_trials():
    """A small vision transformer for 32x32 grey images: like `for_trials`, not a foreign teacher.

    Patches of 4x4, two blocks of attention, LayerNorm, 42,394 weights. Structure of arXiv 2010.11929, with
    the mean over the patches instead of a class token.
    """
    patches, width = 64, 48
    block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 4), nn.Flatten(2), Transpose(), Places(patches, width),   # (N, patches, width)
        nn.TransformerEncoder(block, 2, enable_nested_tensor=False),
        nn.LayerNorm(width), Transpose(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10))


class Places(nn.Module):
    """Adds to each patch a vector that says where it is: (N, patches, width) -> the same shape."""
    def __init__(self, patches, width):
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(patches, width))

    def forward(self, x):
        return x + self.place


class Third(nn.Module):
    def forward(self, x):
        return x / 3


class Residual(nn.Sequential):
    """x + f(x)"""
    def forward(self, x):
        return x + super().forward(x)


def normed(width_in, width_out, stride):
    """A 3x3 convolution and GroupNorm after it, as a list of two layers."""
    return [nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.GroupNorm(8, width_out)]


def group_norm(width=64):
    """A small residual network with GroupNorm, for 32x32 grey images: 130,538 weights."""
    return nn.Sequential(
        *normed(1, width // 2, 2), nn.ReLU(),                                # (N, 32, 16, 16)
        *normed(width // 2, width, 2), nn.ReLU(),                            # (N, 64, 8, 8)
        *block(width), Residual(*normed(width, width, 1), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def group_norm_half():
    """The same structure with half of the channels: 33,018 weights."""
    return group_norm(32)


def block(width):
    """Two such convolutions, to whose output their input is added, and ReLU."""
    return [Residual(*normed(width, width, 1), nn.ReLU(), *normed(width, width, 1)), nn.ReLU()]


def group_norm_colour(width=128):
    """A residual network with GroupNorm, for 32x32 colour images: 538,154 weights.

    The one in teachers/ was trained with --dataset cifar10-val --epochs 25 --precision bf16 --threads 1.
    """
    half, quarter = width // 2, width // 4
    return nn.Sequential(
        *normed(3, quarter, 1), nn.ReLU(),                                   # (N, 32, 32, 32)
        *normed(quarter, half, 2), nn.ReLU(), *block(half), *block(half),    # (N, 64, 16, 16)
        *normed(half, width, 2), nn.ReLU(), *block(width),                   # (N, 128, 8, 8)
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def group_norm_colour_half():
    """The same structure with half of the channels: 135,450 weights."""
    return group_norm_colour(64)


def layer_norm_colour(width=48):
    """A CNN without shortcuts, each convolution followed by LayerNorm over all of an image's maps.

    For 32x32 colour images, 626,554 weights. The one in teachers/ was trained with --dataset cifar10-val
    --epochs 25 --precision bf16 --threads 1.
    """
    layers, widths = [], (3, width, 2 * width, 2 * width, 4 * width, 4 * width)
    for width_in, width_out in zip(widths, widths[1:]):
        layers += [nn.Conv2d(width_in, width_out, 3, padding=1, bias=False), nn.GroupNorm(1, width_out),
                   nn.ReLU()]
        if width_out > width_in:
            layers += [nn.MaxPool2d(2)]                                      # to 16x16, 8x8 and 4x4
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def layer_norm_colour_half():
    """The same structure with half of the channels: 157,762 weights."""
    return layer_norm_colour(24)


class MixTokens(nn.Module):
    """Layer norm, then two linear layers over the patches, the same for every channel."""
    def __init__(self, patches, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(patches, hidden), nn.GELU(), nn.Linear(hidden, patches))

    def forward(self, x):                                                    # (N, patches, width)
        return self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)


def mixer(width=64):
    """A small MLP-Mixer for 32x32 grey images: patches of 4x4, no convolution over pixels, LayerNorm.

    77,322 weights. Structure of arXiv 2105.01601.
    """
    patches = 64
    blocks = [block for _ in range(3) for block in (
        Residual(MixTokens(patches, width, width)),
        Residual(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)))]
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 4), nn.Flatten(2), Transpose(), *blocks,      # (N, patches, width)
        nn.LayerNorm(width), Transpose(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 10))


def mixer_half():
    """The same structure with half of the width: 26,474 weights."""
    return mixer(32)


class Transpose(nn.Module):
    """(N, a, b) -> (N, b, a)"""
    def forward(self, x):
        return x.transpose(1, 2)
