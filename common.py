"""common.py: what the methods share. It contains no distillation loss and no method.

The file has two parts. Copy part A whole if you take a method into your own project; nothing in it reads a
file, a flag or a data set.

    A  for algorithms        A1 images and their description    A2 looking inside a network
                             A3 inside a long loop              A4 scores
    B  for running           B1 data sets      B2 models        B3 teachers
                             B4 the command line                B5 runs, stages and their files

Two words are kept apart everywhere. *Images* are what a network takes: values after normalisation with the
mean and standard deviation of the data. *Pixels* are values in [0, 1], for cropping, storing and looking at.

Letters: N images in a batch, K classes, D features; an image is C x H x W.

Train a teacher by itself:         python common.py --model resnet34 --dataset cifar10
Ask what a network has inside:     python common.py --inspect torchvision:swin_t
"""
import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import time
import timeit
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms import v2
from tqdm import tqdm


class BadInput(ValueError):
    """The user's input cannot be used. Its text is one sentence: what is wrong, and what to type instead."""


# ============================================================================================================
#                                          Part A: for algorithms
# ============================================================================================================
# ------------------------------------------------------------------------- A1. images and their description
class DataSpec(NamedTuple):
    """All that a data-free student may know about the data. It holds no image."""
    image_shape: tuple   # (C, H, W)
    num_classes: int
    mean: tuple          # of each channel, of pixels in [0, 1]
    std: tuple           # of each channel, over all pixels of the data set
    crop: int = 0        # the training data were padded with so many zeros, then cropped back; 0 = not at all
    flip: bool = False   # the training data were mirrored with probability 1/2


class ImageSet(NamedTuple):
    """Real images with labels, all on the device. No data-free `distill` receives one."""
    pixels: torch.Tensor   # (N, C, H, W) uint8; value / scale is in [0, 1]
    labels: torch.Tensor   # (N,) int64
    scale: float = 255.0   # 16 for `digits`, whose files hold 17 grey levels


@functools.lru_cache           # kept on the device: a copy from the host at every step would make a GPU wait
def _on_device(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _per_channel(values, like):
    return _on_device(tuple(values), like.device)


def normalize(pixels, data):
    """pixels (N, C, H, W) in [0, 1] -> images: (pixels - mean) / std per channel, in channels_last order."""
    images = (pixels - _per_channel(data.mean, pixels)) / _per_channel(data.std, pixels)
    return images.contiguous(memory_format=torch.channels_last)


def denormalize(images, data):
    """images (N, C, H, W) -> pixels. They are not clamped to [0, 1]."""
    return images * _per_channel(data.std, images) + _per_channel(data.mean, images)


def crop_by_offsets(pixels, padding, top, left, flip=None):
    """Pad each image with zeros, cut (H, W) out of it again, and mirror it where `flip` says so.

    pixels (N, C, H, W); `padding` on every side; row `top` (N,) and column `left` (N,) of the upper left
    corner, in [0, 2 padding]; `flip` (N,) of booleans or None -> (N, C, H, W). The whole batch is one gather.
    It is differentiable, and a GPU does not wait for it.
    """
    height, width = pixels.shape[2:]
    rows = torch.arange(height, device=pixels.device) + top[:, None]         # (N, H)
    columns = torch.arange(width, device=pixels.device).expand(len(pixels), -1)      # (N, W)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    columns = columns + left[:, None]
    which = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    padded = F.pad(pixels, (padding,) * 4)
    # the result is (N, H, W, C); seen as (N, C, H, W) it is in channels_last order, which convolutions prefer
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(pixels, data):
    """Crop and mirror every image at random, as the training data were: (N, C, H, W) -> the same shape."""
    if not data.crop and not data.flip:
        return pixels
    n, device = len(pixels), pixels.device
    top, left = torch.randint(0, 2 * data.crop + 1, (2, n), device=device)
    flip = torch.rand(n, device=device) < 0.5 if data.flip else None
    return crop_by_offsets(pixels, data.crop, top, left, flip)


# ------------------------------------------------------------------------------ A2. looking inside a network
@contextlib.contextmanager
def _recorded(modules, what):
    """Inside the block, every forward pass leaves what(input) of each module; no hook is left after it."""
    seen, handles = {}, []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(
                lambda module, inputs: seen.__setitem__(module, what(inputs[0]))))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def recorded_inputs(modules):
    """`with recorded_inputs([layer]) as seen: model(images)`; then seen[layer] is the layer's latest input.

    The input is converted to float32 and keeps its graph. This works on any nn.Module.
    """
    return _recorded(modules, torch.Tensor.float)


def recorded_statistics(modules):
    """`with recorded_statistics(layers) as seen: model(images)`; then seen[layer] = (mean, variance).

    Both are (channels,), float32, of the layer's *input* over (N, H, W), and keep their graph.
    """
    return _recorded(modules, Moments.apply)


class Moments(torch.autograd.Function):
    """x (N, C, H, W) -> mean (C,), biased variance (C,), float32, with one backward pass for both.

    d mean / dx = 1 / n and d variance / dx = 2 (x - mean) / n: the gradient is slope x + offset. On a CPU,
    torch.var_mean and its backward pass would take a third of CSD's synthesis step.
    """
    @staticmethod
    def forward(ctx, x):
        if x.device.type == "cpu" and x.dtype != torch.float64:
            unused = torch.zeros(x.shape[1])       # in float32, which makes the answer float32 for bf16 too
            mean, variance = torch.ops.aten.batch_norm_update_stats(x, unused, unused, 0.0)
        else:
            variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx, grad_mean, grad_variance):
        x, mean = ctx.saved_tensors
        # x in bf16 wants a float32 slope, float64 a float64 one; 1 + 1e-30 is 1, PyTorch 2.11 refuses eps=0
        slope = (grad_variance * (2 * x.shape[1] / x.numel())).to(torch.promote_types(x.dtype, torch.float32))
        offset = grad_mean * (x.shape[1] / x.numel()) - slope * mean
        return F.batch_norm(x, torch.zeros_like(slope), torch.ones_like(slope), slope, offset, eps=1e-30)


def probe(model, modules, data):
    """What a forward pass on blank images feeds to these modules: {module: input}, in the order they ran."""
    with torch.no_grad(), frozen(model), scoring(), recorded_inputs(modules) as seen:
        model(torch.zeros(2, *data.image_shape, device=next(model.parameters()).device))
    return seen


def batchnorms(model, data):
    """The nn.BatchNorm2d layers with running statistics that a forward pass uses, in order of registration.

    Layers of auxiliary classifiers do not run in eval mode, so they are left out.
    """
    layers = [layer for layer in model.modules()
              if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None]
    used = probe(model, layers, data)
    return [layer for layer in layers if layer in used]


def last_linear(model):
    """The last nn.Linear of a model; its input is the feature vector (N, D). Raises BadInput without one."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise BadInput(f"{type(model).__name__} has no nn.Linear layer, whose input is the feature vector")
    return found[-1]


@contextlib.contextmanager
def frozen(*models):
    """Inside the block: eval mode, and no gradients of weights. Afterwards everything is as it was before.

    Gradients still flow *through* the networks to their input. Those of the weights, which nobody reads,
    would be a third of a step's work.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for model in models:
            model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


def in_bf16(network):
    """Makes a network run its forward passes in bfloat16, except while it is scored.   -> the same network

    Its weights and its outputs stay float32.
    """
    plain = network.forward

    def forward(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=not _scoring):
            return plain(x).float()
    network.forward, network.in_bf16 = forward, True
    return network


def place_like(network, other):
    """Move a fresh network to where `other` is: its device and precision, and channels_last order."""
    network.to(next(other.parameters()).device, memory_format=torch.channels_last)
    return in_bf16(network) if getattr(other, "in_bf16", False) else network


class UpsampledConv2d(nn.Conv2d):
    """nn.Upsample(scale_factor=2), then nn.Conv2d(width_in, width_out, 3, padding=1), in 4/9 of the work.

    (N, C, H, W) -> (N, width_out, 2H, 2W), the same up to rounding. Each pixel stands four times in the
    enlarged image, so kernel elements that meet the same pixel may be added first. What is left is a
    transposed convolution of stride 2 with a 4x4 kernel.
    """
    def __init__(self, width_in, width_out, bias=True):
        super().__init__(width_in, width_out, 3, padding=1, bias=bias)

    def forward(self, x):
        kernel = self.weight.flip(2, 3).transpose(0, 1)                      # (C, width_out, 3, 3)
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))               # (C, width_out, 3, 4)
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))   # (C, width_out, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


# ------------------------------------------------------------------------------------ A3. inside a long loop
COSTS = collections.Counter()      # of the run: seconds_<phase> in this epoch, teacher_queries in all


@contextlib.contextmanager
def timed(name):
    """The seconds that the block takes go to the log as seconds_<name>."""
    began = time.perf_counter()
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        COSTS[f"seconds_{name}"] += time.perf_counter() - began


def steps(total, name, order=None):
    """`range(total)`, or the first `total` items of `order`, with a progress bar, and timed as `name`."""
    each = range(total) if order is None else itertools.islice(order, total)
    with timed(name):
        yield from tqdm(each, name, total, leave=False, disable=None)


def one_pass(n, size, device="cpu"):
    """The indices below n in random order, in batches of `size`; the last one may be shorter.   -> list

    A single index that is left over joins the batch before it, because BatchNorm cannot normalise one image.
    """
    *parts, last = torch.randperm(n, device=device).split(size)
    if parts and len(last) == 1:
        last = torch.cat([parts.pop(), last])
    return [*parts, last]


def batches(n, size, device="cpu"):
    """The batches of one pass after another, without end."""
    while True:
        yield from one_pass(n, size, device)


def revisited(items, visits, total):
    """The first `total / visits` items as they come, then the same ones again and again in random order.

    This is for batches with a network's answers, when the answers cost more than the step that learns from
    them. All items that came are kept, unless `visits` is 1.
    """
    if visits == 1:
        yield from items
        return
    kept = []
    for item in itertools.islice(items, math.ceil(total / visits)):
        kept.append(item)
        yield item
    while kept:
        for index in torch.randperm(len(kept)).tolist():
            yield kept[index]


class Means:
    """Means of named terms over a phase. The sums stay on the device, so no step waits for a GPU."""
    def __init__(self):
        self.sums, self.counts = {}, collections.Counter()

    def add(self, **terms):
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value.detach() if torch.is_tensor(value) else value)
            self.counts[name] += 1

    def take(self):
        """{name: mean}. Raises FloatingPointError that names the first term that is not finite."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise FloatingPointError(f"{name} became {mean}")
        return means


def cosine(value, step, total):
    """`value` at step 0, falling to 0 at step `total` along half a cosine."""
    return value * (1 + math.cos(math.pi * step / total)) / 2


def build_optimizer(model, name, lr, weight_decay, nesterov=False):
    """'sgd' is SGD with momentum 0.9; 'adam' is AdamW, which without weight decay is Adam."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=weight_decay, nesterov=nesterov)
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextlib.contextmanager
def seeded(seed):
    """Inside the block, torch's global generators start from `seed`; afterwards they are as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield


def with_own_seed(function):
    """Decorates a function with an argument `settings`: torch's generators start from settings.seed in it.

    Afterwards they are as they were, so the caller's random numbers do not depend on the call.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with seeded(signature.bind(*args, **kwargs).arguments["settings"].seed):
            return function(*args, **kwargs)
    return wrapped


# ------------------------------------------------------------------------------------------------ A4. scores
_scoring = False


@contextlib.contextmanager
def scoring():
    """Inside the block, networks run in float32 and no teacher query is counted: for scores and probes."""
    global _scoring
    before, _scoring = _scoring, True
    try:
        yield
    finally:
        _scoring = before


@torch.no_grad()
def predict(model, images, data, batch_size=500):
    """Logits (N, K), float32, for an ImageSet, in eval mode. It draws no random number."""
    with frozen(model), scoring():
        return torch.cat([model(normalize(pixels / images.scale, data)).float()
                          for pixels in images.pixels.split(batch_size)])


def accuracy(logits, labels):
    """The share of rows whose largest logit is the label. logits (N, K), labels (N,) -> float in [0, 1]."""
    return (logits.argmax(1) == labels).float().mean().item()


def agreement(logits, other_logits):
    """The share of rows on which two classifiers name the same class, right or wrong -> float in [0, 1]."""
    return accuracy(logits, other_logits.argmax(1))


def expected_calibration_error(logits, labels, bins=15):
    """Mean |confidence - accuracy| over equal bins of confidence, weighted by their size -> float in [0, 1].

    logits (N, K), labels (N,). Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == labels).float()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1             # (N,) bin (b/15, (b+1)/15]
    gap = torch.zeros(bins, device=logits.device).index_add_(0, which, confidence - correct)
    return gap.abs().sum().item() / len(labels)


# ============================================================================================================
#                                            Part B: for running
# ============================================================================================================
# ---------------------------------------------------------------------------------------------- B1. data sets
DATASETS = {
    # mean and std of the 1,437 training images, pixel = value / 16
    "digits": DataSpec((1, 8, 8), 10, (0.3054,), (0.3759,), crop=1),
    "mnist": DataSpec((1, 32, 32), 10, (0.1307,), (0.3081,)),       # the usual constants, measured at 28x28
    "mnist28": DataSpec((1, 28, 28), 10, (0.1307,), (0.3081,)),
    "fashion_mnist": DataSpec((1, 32, 32), 10, (0.2860,), (0.3530,)),
    "fashion_mnist28": DataSpec((1, 28, 28), 10, (0.2860,), (0.3530,)),
    "svhn": DataSpec((3, 32, 32), 10, (0.5,) * 3, (0.5,) * 3),      # as CMI and CSD: no crop, no flip
    # 0.2023... is the mean of the images' own deviations (that of all pixels is 0.2470). Published CIFAR-10
    # teachers were trained with it, and BatchNorm statistics depend on the constants they were taken with.
    "cifar10": DataSpec((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 4, flip=True),
    "cifar100": DataSpec((3, 32, 32), 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 4, flip=True),
    "imagenet": DataSpec((3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 28, flip=True),
}
# settings are chosen on these: trained on all but the last 5,000 training images, scored on those 5,000
VALIDATION = 5000
DATASETS.update({f"{name}-val": DATASETS[name] for name in ("mnist", "fashion_mnist", "cifar10", "cifar100")})
NO_DOWNLOAD = "for a run that needs no download, type: --dataset digits"


def dataset_names():
    return ", ".join(DATASETS) + ", folder:PATH[@SIZE], none"


def load_dataset(name, train, data_dir="data", device="cpu"):
    """The whole training or test set.   -> ImageSet, DataSpec

    `digits`: 1,797 real 8x8 digits inside scikit-learn, split 1,437 / 360 by a fixed permutation.
    `folder:PATH@SIZE`: PATH/train/CLASS/*.png and PATH/test/CLASS/*.png, shorter side resized to SIZE,
    centre cropped. `cifar10-val` and its like: the last 5,000 training images are the test set, and the
    others the training set. The others come from `data_dir` or, if they are not there, from the internet.
    Raises BadInput if the set is unknown, or can neither be found nor downloaded.
    """
    if name.startswith("folder:"):
        return _read_folder(name, train, device)
    if name not in DATASETS:
        raise BadInput(f"unknown data set '{name}'; choose from {dataset_names()}")
    if name == "imagenet":
        raise BadInput("ImageNet's images are not read here; its name is for synthesis alone")
    data = DATASETS[name]
    if name.endswith("-val"):
        images, _ = load_dataset(name.removesuffix("-val"), True, data_dir, device)
        part = slice(None, -VALIDATION) if train else slice(-VALIDATION, None)
        return images._replace(pixels=images.pixels[part], labels=images.labels[part]), data
    if name == "digits":
        import numpy
        from sklearn.datasets import load_digits
        values, labels = load_digits(return_X_y=True)
        order = numpy.random.RandomState(0).permutation(1797)
        order = order[:1437] if train else order[1437:]
        pixels = torch.tensor(values[order], dtype=torch.uint8).reshape(-1, 1, 8, 8)
        return ImageSet(pixels.to(device), torch.tensor(labels[order]).long().to(device), scale=16.0), data
    pixels, labels = _read_torchvision(name.removesuffix("28"), train, Path(data_dir))
    if pixels.shape[2:] != data.image_shape[1:]:                            # (N, 1, 28, 28) -> (N, 1, 32, 32)
        pixels = F.interpolate(pixels.float(), data.image_shape[1:], mode="bilinear").round().to(torch.uint8)
    return ImageSet(pixels.contiguous().to(device), labels.long().to(device)), data


def _read_torchvision(name, train, data_dir):
    """(N, C, H, W) uint8 and (N,) labels of a torchvision set, downloaded if it is not in `data_dir`."""
    class_name, folder = {
        "mnist": ("MNIST", "MNIST/raw"), "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
        "svhn": ("SVHN", "."), "cifar10": ("CIFAR10", "cifar-10-batches-py"),
        "cifar100": ("CIFAR100", "cifar-100-python")}[name]
    build = getattr(torchvision.datasets, class_name)
    which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        found = build(data_dir, download=False, **which)
    except Exception:      # missing, incomplete or damaged: torchvision has no one exception for it
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = build(data_dir, download=True, **which)
        except Exception as error:
            where = (data_dir / folder).resolve()
            raise BadInput(f"data set '{name}' is not in {where} and could not be downloaded ({error}); "
                           f"put it there or name another --data-dir; {NO_DOWNLOAD}") from None
    pixels = torch.as_tensor(found.data)
    labels = torch.as_tensor(found.labels if name == "svhn" else found.targets)
    if pixels.dim() == 3:
        pixels = pixels[:, None]                                             # (N, H, W) -> (N, 1, H, W)
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)                                  # (N, H, W, C) -> (N, C, H, W)
    return pixels, labels


def _read_folder(name, train, device):
    """Images in class folders; mean and std are always those of PATH/train."""
    path, _, size = re.fullmatch(r"folder:(.*?)(@(\d+))?", name, re.S).groups()
    if size and not 1 <= int(size) <= 1024:
        raise BadInput(f"'{name}': the size after @ must be 1 to 1024 pixels")

    def read(part):
        root, resize = Path(path, part), []
        if not root.is_dir():
            raise BadInput(f"'{name}' needs the folder {root} with one folder a class in it; {NO_DOWNLOAD}")
        if size:
            resize = [v2.Resize(int(size)), v2.CenterCrop(int(size))]
        try:
            found = torchvision.datasets.ImageFolder(root, v2.Compose([*resize, v2.PILToTensor()]))
            if len(found.classes) < 2:
                raise BadInput(f"{root} holds one class folder; at least two are needed")
            return torch.stack([image for image, _ in found]), torch.tensor(found.targets), found.classes
        except FileNotFoundError as error:
            raise BadInput(f"{root} holds no class folders with images ({error})") from None
        except OSError as error:
            raise BadInput(f"{root} holds a file that is no whole image ({error})") from None
        except RuntimeError:
            raise BadInput(f"the images in {root} differ in size; give one, for example {name}@32") from None
    pixels, labels, classes = read("train" if train else "test")
    reference, _, train_classes = (pixels, labels, classes) if train else read("train")
    if classes != train_classes:
        raise BadInput(f"{path}/train and {path}/test hold different class folders")
    reference = reference.double() / 255
    mean, std = (tuple(round(v, 4) for v in values.tolist())
                 for values in (reference.mean((0, 2, 3)), reference.std((0, 2, 3)).clamp(min=1e-3)))
    data = DataSpec(tuple(pixels.shape[1:]), len(classes), mean, std, crop=pixels.shape[-1] // 8, flip=True)
    return ImageSet(pixels.to(device), labels.to(device)), data


# ------------------------------------------------------------------------------------------------ B2. models
# A model names `last_map`: the module whose *input* is its last feature map. A property registers nothing.
class CifarResNet(ResNet):
    """torchvision's ResNet with a small stem: 3x3 stride 1, no max-pool. ResNet-18: 11,173,962 weights."""
    def __init__(self, block, layers, num_classes, channels):
        super().__init__(block, layers, num_classes=num_classes)
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    last_map = property(lambda self: self.avgpool)       # after stage 4 and its ReLU


class WideBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3 plus shortcut; it starts after the first ReLU if the width changes."""
    def __init__(self, width_in, width_out, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if width_in != width_out:
            self.shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        kept = x if self.shortcut is None else self.shortcut(out)
        return kept + self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True))


class WideResNet(nn.Module):
    """WRN-depth-k, pre-activation. WRN-40-2: 2,243,546 weights; WRN-16-1: 175,066 (K = 10, C = 3)."""
    def __init__(self, depth, widen, num_classes, channels):
        super().__init__()
        widths, blocks = (16, 16 * widen, 32 * widen, 64 * widen), (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.groups = nn.Sequential(*[                                       # (N, 64k, H/4, W/4)
            WideBlock(widths[group + bool(block)], widths[group + 1], 2 if group and not block else 1)
            for group in range(3) for block in range(blocks)])
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")       # N(0, 2 / (k² C_out))
        nn.init.zeros_(self.fc.bias)

    last_map = property(lambda self: self.bn)            # group 3 *before* the final BN-ReLU: signed values

    def forward(self, x):
        x = F.relu(self.bn(self.groups(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG with BN for small images: max-pool before blocks 1, 2, 3 of five, average pool, linear layer."""
    def __init__(self, convolutions, num_classes, channels):
        super().__init__()
        layers, width_in = [], channels
        for block, (width, count) in enumerate(zip((64, 128, 256, 512, 512), convolutions)):
            layers += [nn.MaxPool2d(2)] if block in (1, 2, 3) else []
            for _ in range(count):
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                width_in = width
        self.features = nn.Sequential(*layers)                               # (N, 512, H/8, W/8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                nn.init.zeros_(module.bias)

    last_map = property(lambda self: self.pool)

    def forward(self, x):
        return self.fc(self.pool(self.features(x)).flatten(1))


class LeNet5(nn.Module):
    """LeNet-5 as the data-free papers use it: 61,706 weights, half width 15,738 (C = 1; BN adds 44 and 22).

    The padding depends on the image size, 32x32, 28x28 or 8x8, so that conv3 always ends in one pixel.
    """
    def __init__(self, widths, batch_norm, num_classes, channels, size):
        super().__init__()
        if size not in (8, 28, 32):
            raise BadInput(f"lenet5 takes images of 32x32, 28x28 or 8x8, not {size}x{size}")
        first, second, third, fourth = widths
        norm = nn.BatchNorm2d if batch_norm else lambda width: nn.Identity()
        self.conv1, self.norm1 = nn.Conv2d(channels, first, 5, padding=0 if size == 32 else 2), norm(first)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2, self.norm2 = nn.Conv2d(first, second, 5, padding=2 if size == 8 else 0), norm(second)
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(second, third, 2 if size == 8 else 5)
        self.fc1, self.fc2 = nn.Linear(third, fourth), nn.Linear(fourth, num_classes)

    last_map = property(lambda self: self.pool2)

    def forward(self, x):                                                    # at 32x32:
        x = self.pool1(F.relu(self.norm1(self.conv1(x))))                    # (N, 6, 14, 14)
        x = self.pool2(F.relu(self.norm2(self.conv2(x))))                    # (N, 16, 5, 5)
        x = F.relu(self.conv3(x)).flatten(1)                                 # (N, 120)
        return self.fc2(F.relu(self.fc1(x)))


class AlexNet(nn.Module):
    """AlexNet for 32x32 with BN, no dropout: 23,474,250 weights, half width 5,882,922 (K = 10, C = 3)."""
    def __init__(self, divisor, num_classes, channels, size):
        super().__init__()
        if size != 32:
            raise BadInput(f"alexnet takes images of 32x32, not {size}x{size}")
        layers, width_in = [], channels
        for width, kernel, padding, pool in ((64, 5, 0, True), (192, 5, 2, True), (384, 3, 1, False),
                                             (256, 3, 1, False), (256, 3, 1, True)):
            width //= divisor
            layers += [nn.Conv2d(width_in, width, kernel, padding=padding), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(3, 2)] if pool else []
            width_in = width
        self.features = nn.Sequential(*layers[:-1])                          # (N, 256, 6, 6)
        self.pool = layers[-1]                                               # (N, 256, 2, 2)
        wide = 4096 // divisor
        self.fc = nn.Sequential(nn.Linear(4 * width_in, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(),
                                nn.Linear(wide, num_classes))

    last_map = property(lambda self: self.pool)

    def forward(self, x):
        return self.fc(self.pool(self.features(x)).flatten(1))


MODELS = {  # name: builder(num_classes, channels, size); WRN-d-k is built by name, any depth 6n + 4 and width
    "resnet18": lambda k, c, s: CifarResNet(BasicBlock, [2, 2, 2, 2], k, c),
    "resnet34": lambda k, c, s: CifarResNet(BasicBlock, [3, 4, 6, 3], k, c),
    "resnet50": lambda k, c, s: CifarResNet(Bottleneck, [3, 4, 6, 3], k, c),
    "vgg8": lambda k, c, s: VGG((1, 1, 1, 1, 1), k, c),
    "vgg11": lambda k, c, s: VGG((1, 1, 2, 2, 2), k, c),
    "vgg13": lambda k, c, s: VGG((2, 2, 2, 2, 2), k, c),
    "lenet5": lambda k, c, s: LeNet5((6, 16, 120, 84), False, k, c, s),
    "lenet5_half": lambda k, c, s: LeNet5((3, 8, 60, 42), False, k, c, s),
    "lenet5_bn": lambda k, c, s: LeNet5((6, 16, 120, 84), True, k, c, s),
    "lenet5_half_bn": lambda k, c, s: LeNet5((3, 8, 60, 42), True, k, c, s),
    "alexnet": lambda k, c, s: AlexNet(1, k, c, s),
    "alexnet_half": lambda k, c, s: AlexNet(2, k, c, s),
}


def check_model_name(name):
    """Returns a name that `build_model` knows. Raises BadInput for any other."""
    wide = re.fullmatch(r"wrn([1-9]\d?\d?)_([1-9]\d?)", name)
    if name in MODELS or (wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4):
        return name
    raise BadInput(f"unknown model '{name}'; choose from {', '.join(MODELS)}, wrnDEPTH_WIDTH (depth 6n + 4, "
                   "as in wrn16_2), torchvision:NAME, or package.module:function for your own")


def build_model(name, num_classes, image_shape):
    """A fresh classifier with `forward(images) -> logits (N, K)`. Weights come from torch's global generator.

    `name`: one of MODELS, 'wrnDEPTH_WIDTH', 'torchvision:NAME' (untrained) or 'package.module:function'.
    Raises BadInput for an unknown name or an image size that the model does not take.
    """
    channels, height, width = image_shape
    if ":" in name:
        return foreign_model(name, num_classes)
    check_model_name(name)
    if height != width:
        raise BadInput(f"model '{name}' takes square images, not {height}x{width}")
    wide = re.fullmatch(r"wrn(\d+)_(\d+)", name)
    if wide:
        return WideResNet(int(wide[1]), int(wide[2]), num_classes, channels)
    return MODELS[name](num_classes, channels, height)


def foreign_model(name, num_classes, pretrained=False):
    """'torchvision:NAME', with its weights if `pretrained`, or 'package.module:function'()."""
    module_name, _, function = name.partition(":")
    try:
        if module_name == "torchvision":
            options = {"weights": "DEFAULT"} if pretrained else {"num_classes": num_classes}
            return torchvision.models.get_model(function, **options)
        sys.path.insert(0, os.getcwd())
        try:
            model = getattr(importlib.import_module(module_name), function)()
        finally:
            sys.path.remove(os.getcwd())
    except Exception as error:
        raise BadInput(f"'{name}' could not be built ({type(error).__name__}: {error}); "
                       "accepted are torchvision:NAME and package.module:function") from None
    if not isinstance(model, nn.Module):
        raise BadInput(f"'{name}' returned {type(model).__name__}, not a torch.nn.Module")
    return model


# ----------------------------------------------------------------------------------------------- B3. teachers
CLASSIFIER_FORMAT = "distillation-classifier-1"
# epochs, batch size. SGD 0.1, momentum 0.9, weight decay 5e-4, cosine to 0; LeNet-5 without BN: Adam 1e-3.
# Users of the published recipe (decay 1e-4, three steps) report CIFAR-10 teachers 1 to 3 points too low.
RECIPES = {"digits": (40, 128), "mnist": (10, 256), "mnist28": (10, 256), "fashion_mnist": (20, 256),
           "fashion_mnist28": (20, 256), "svhn": (100, 128), "cifar10": (200, 128), "cifar100": (200, 128),
           "folder": (100, 128)}


def write(content, path, save=torch.save):
    """`save(content, file)` under another name, then rename: a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:               # torch.save has a RuntimeError for a full disk
        raise OSError(f"{path} could not be written ({_short(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, what):
    """The dict in a file of torch.save. Runs no code from it. Raises BadInput for damage or other content."""
    try:
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:
        raise BadInput(f"{path} is not a readable {what} ({type(error).__name__}): damaged, or made by "
                       "something else; move it away") from None


def require_same(saved, wanted, path, advice):
    """Raises BadInput naming the first entry in which two dicts differ."""
    for key in [*wanted, *saved]:
        if key not in saved or key not in wanted or saved[key] != wanted[key]:
            raise BadInput(f"{path} was made with {key} = {saved.get(key)}, this command has {key} = "
                           f"{wanted.get(key)}; {advice}")


def digest(content):
    """A short text that changes when a tensor does, in a state_dict or a tuple of tensors and state_dicts."""
    if torch.is_tensor(content):
        found = content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        parts = content.items() if isinstance(content, dict) else enumerate(content)
        found = "".join(f"{key} {digest(value)} " for key, value in parts).encode()
    return hashlib.sha256(found).hexdigest()[:16]


def is_file_name(name):
    return name.endswith(".pt") or "/" in name


def teacher_path(dataset, arch):
    """checkpoints/<dataset>_<name>.pt, where every method looks for the teacher of that name."""
    return Path("checkpoints", f"{re.sub(r'[^A-Za-z0-9_@-]+', '_', dataset)}_{arch}.pt")


def recipe_of(arch, dataset, epochs=None, batch_size=None):
    """How `arch` is trained on `dataset`: a dict that is kept in the teacher's file and compared on reuse."""
    if dataset.partition(":")[0].removesuffix("-val") not in RECIPES:
        raise BadInput(f"no teacher is trained on {dataset} here; name a file or torchvision:resnet50")
    usual_epochs, usual_batch = RECIPES[dataset.partition(":")[0].removesuffix("-val")]
    plain = re.fullmatch("lenet5(_half)?", arch)
    return dict(epochs=epochs or usual_epochs, batch_size=batch_size or usual_batch,
                optimizer="adam" if plain else "sgd", lr=1e-3 if plain else 0.1,
                weight_decay=0.0 if plain else 5e-4, schedule="cosine")


def train_teacher(arch, dataset, path, options, recipe):
    """Train `arch` on the real training set, always with seed 0, into `path`. Goes on after a kill.

    If another process trains the same teacher, this one waits and uses that one's file.
    """
    test, _ = load_dataset(dataset, False, options.data_dir, options.device)
    train, data = load_dataset(dataset, True, options.data_dir, options.device)
    epochs, size, lr = recipe["epochs"], recipe["batch_size"], recipe["lr"]
    identity = dict(arch=arch, dataset=dataset, threads=options.threads, precision=options.precision,
                    **recipe)
    folder = path.with_suffix(".partial")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock, seeded(0):
        _lock(folder, lock, wait=True)
        if path.exists():
            shutil.rmtree(folder, ignore_errors=True)
            return
        print(f"training teacher {arch} on {dataset}: {recipe} -> {path}", flush=True)
        model = place(build_model(arch, data.num_classes, data.image_shape), options)
        optimizer = (torch.optim.Adam(model.parameters(), lr) if recipe["optimizer"] == "adam" else
                     torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=recipe["weight_decay"]))
        loop = Loop(folder, identity, dict(event="start", arguments=identity, versions=versions(),
                                           device=device_name(options.device)))
        loop.load()
        for epoch in range(loop.resume(model=model, optimizer=optimizer), epochs):
            set_lr(optimizer, cosine(lr, epoch, epochs))
            means, order = Means(), one_pass(len(train.labels), size, options.device)
            model.train()
            for batch in steps(len(order), "training", order):
                images = normalize(augment(train.pixels[batch] / train.scale, data), data)
                loss = F.cross_entropy(model(images), train.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                means.add(loss=loss)
            loop.log(epoch, means.take())
        save_classifier(path, model, arch, data, dataset, recipe=recipe, seed=0, precision=options.precision,
                        test_acc=accuracy(predict(model, test, data), test.labels),
                        seconds=loop.seconds(), device=device_name(options.device))
        shutil.rmtree(folder, ignore_errors=True)          # before a process that waits may go on


def save_classifier(path, model, arch, data, dataset, **more):
    """One file with all that a data-free student may know: weights, architecture, DataSpec, accuracy."""
    write(dict(format=CLASSIFIER_FORMAT, weights=model.state_dict(), arch=arch, data=data._asdict(),
               dataset=dataset, versions=versions(), **more), path)


def read_classifier(path):
    """The content of a file of `save_classifier`. Raises BadInput if it is missing, damaged or foreign."""
    if not Path(path).is_file():
        raise BadInput(f"there is no teacher file {path}; give a file, a model name as in --teacher "
                       "resnet34, or module:function")
    content = read_file(path, "teacher file")
    try:
        data = DataSpec(**content["data"])
        channels, height, width = data.image_shape
        sane = (content["format"] == CLASSIFIER_FORMAT and isinstance(content["dataset"], str)
                and content["weights"] and type(data.num_classes) is type(data.crop) is int
                and all(map(math.isfinite, (*data.mean, *data.std)))
                and 2 <= data.num_classes <= 100_000 and 1 <= channels <= 16
                and 1 <= height <= 1024 and 1 <= width <= 1024 and 0 <= data.crop <= height
                and len(data.mean) == len(data.std) == channels and min(data.std) > 0)
        if ":" not in content["arch"]:
            check_model_name(content["arch"])
    except (KeyError, TypeError, ValueError, AttributeError):
        sane = False
    if not sane:
        raise BadInput(f"{path} is not a teacher file of this project; make one with: python common.py "
                       "--model NAME --dataset NAME")
    return content


def load_classifier(path):
    """A teacher or student from its file, in eval mode on the CPU.   -> network, DataSpec

    Raises BadInput if the file is missing, damaged or foreign, or if its weights do not fit its network.
    """
    file = read_classifier(path)
    data = DataSpec(**file["data"])
    network = build_model(file["arch"], data.num_classes, data.image_shape)
    try:
        network.load_state_dict(file["weights"])
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BadInput(f"the weights in {path} do not fit {file['arch']}: {_short(error)}") from None
    return network.eval(), data


def dataset_spec(options):
    """The DataSpec of the teacher's file, if --teacher names one, else of the data set."""
    if is_file_name(options.teacher):
        return DataSpec(**read_classifier(options.teacher)["data"])
    return _spec_of(options.dataset)


def _spec_of(dataset):
    return load_dataset(dataset, True)[1] if dataset.startswith("folder:") else DATASETS[dataset]


def place(network, options):
    network.to(options.device, memory_format=torch.channels_last)
    return in_bf16(network) if options.precision == "bf16" else network


def load_networks(options, settings, data, needs=lambda teacher: None):
    """The networks that --teacher and --student name, on their device.   -> teacher, student

    `needs(teacher)` may refuse the teacher's architecture; it is asked before a teacher is trained.
    """
    with seeded(settings.seed):
        student = place(build_model(options.student, data.num_classes, data.image_shape), options)
    for training in (False, True):
        check_answers(student, f"student {options.student}", data, training)
    teacher = load_teacher(options, data, needs)
    check_answers(place(teacher, options), f"teacher {options.teacher}", data)
    needs(teacher)
    return teacher.eval(), student


def load_teacher(options, data, needs):
    """The network that --teacher names: a model (trained if need be), a file, or somebody else's network.

    It leaves in `options` the teacher's name for what is made from it, its architecture, and how long its
    training took.
    """
    wanted, dataset = options.teacher, options.dataset
    if ":" in wanted and not is_file_name(wanted):
        options.teacher_name, options.teacher_arch = re.sub(r"\W+", "_", wanted), wanted
        options.teacher_seconds = None
        return foreign_model(wanted, data.num_classes, pretrained=True)
    path = Path(wanted)
    if not is_file_name(wanted):
        path, recipe = teacher_path(dataset, wanted), recipe_of(wanted, dataset)
        if not path.exists():
            with seeded(0):
                needs(build_model(wanted, data.num_classes, data.image_shape))
            train_teacher(wanted, dataset, path, options, recipe)
        file = read_classifier(path)
        require_same({key: file.get(key) for key in ("dataset", "recipe")},
                     dict(dataset=dataset, recipe=recipe), path,
                     f"to use that file as it is, type --teacher {path}; to train anew, move it away")
    file, (teacher, of_file) = read_classifier(path), load_classifier(path)
    asked = of_file if dataset == "none" else _spec_of(dataset)
    for what, here, there in (("classes", of_file.num_classes, asked.num_classes),
                              ("image shape", tuple(of_file.image_shape), tuple(asked.image_shape))):
        if here != there:
            raise BadInput(f"teacher {wanted} is for {what} {here}, data set '{dataset}' has {there}; "
                           "name the data set that the teacher was trained on with --dataset")
    options.teacher_name, options.teacher_arch = path.stem, file["arch"]
    options.teacher_seconds = file.get("seconds")
    return teacher


def check_answers(model, name, data, training=False):
    """Raises BadInput unless the network turns images of this shape into finite logits (N, K).

    `training`: in train mode, where some have answers of auxiliary classifiers beside the logits.
    """
    try:
        images = torch.zeros(2, *data.image_shape, device=next(model.parameters()).device)
        with torch.no_grad(), frozen(model), scoring(), seeded(0):
            logits = copy.deepcopy(model).train()(images) if training else model(images)
        fits = logits.shape == (2, data.num_classes) and bool(logits.isfinite().all())
    except Exception as error:
        if training:
            raise BadInput(f"{name} cannot be trained on images of shape {data.image_shape}: in train mode "
                           "it fails, or gives more than logits; remove auxiliary classifiers") from None
        raise BadInput(f"{name} does not take images of shape {data.image_shape} ({_short(error)})") from None
    if not fits:
        raise BadInput(f"{name} does not answer images of shape {data.image_shape} with finite logits "
                       f"(N, {data.num_classes})")


def _short(error):
    return " ".join(str(error).split())[:160]


def inspect_network(name):
    """What a network has that a method may ask for, found by running it on blank images.   -> lines of text

    `name`: as --teacher takes it. Raises BadInput for a network that cannot be built or answers no image.
    """
    classes, sides = 10, (8, 28, 32, 64, 224, 299)
    shapes = [(channels, side, side) for channels in (1, 3) for side in sides]
    if is_file_name(name):
        file = read_classifier(name)
        name, data = file["arch"], DataSpec(**file["data"])
        classes, shapes = data.num_classes, [tuple(data.image_shape)]
    usual = shapes[0] if len(shapes) == 1 else (1 if name.startswith("lenet5") else 3, 32, 32)
    model, taken = build_model(name, classes, usual), []
    for shape in shapes:
        with contextlib.suppress(Exception), torch.no_grad(), frozen(model):
            answer = model(torch.zeros(2, *shape))                           # which may raise anything
            if answer.dim() == len(answer) == 2:
                taken, classes = [*taken, shape], answer.shape[1]
    if not taken:
        raise BadInput(f"{name} answers no blank images of {', '.join(map(str, shapes))} with logits (N, K)")
    data = DataSpec(taken[-1], classes, (0.5,) * taken[-1][0], (0.5,) * taken[-1][0])
    names = {layer: name for name, layer in model.named_modules()}
    seen = probe(model, [layer for layer in names if not list(layer.children())], data)   # as they ran
    vectors = [layer for layer, x in seen.items() if isinstance(layer, nn.Linear) and x.dim() == 2]
    maps = [layer for layer, x in seen.items()
            if x.dim() == 4 and x.shape[2] > 1 and tuple(x.shape[1:]) != data.image_shape]
    last_map = getattr(model, "last_map", None) or [None, *maps][-1]

    def input_of(layer):
        return f"input of {names[layer]}, (N, {', '.join(map(str, seen[layer].shape[1:]))})"
    counts = len(batchnorms(model, data)), sum(isinstance(layer, nn.BatchNorm2d) for layer in names)
    return [f"{name}: {sum(weight.numel() for weight in model.parameters()):,} weights, {classes} classes",
            f"images             {', '.join('x'.join(map(str, shape)) for shape in taken)}, of those tried",
            f"BatchNorm          {counts[0]} layers that run, of {counts[1]}",
            f"feature vectors    {input_of(vectors[-1]) if vectors else 'none'}",
            f"last feature map   {input_of(last_map) if last_map else 'none'}"
            + ("" if hasattr(model, "last_map") else ": a guess, from what ran last")]


# --------------------------------------------------------------------------------------- B4. the command line
class Preset(NamedTuple):
    """All that a run needs. `--preset NAME` takes it as it is, and every flag changes one thing in it."""
    dataset: str
    teacher: str         # a model name, torchvision:NAME, a file, or module:function
    student: str
    settings: object     # the method's Settings


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message + "; --help lists the flags")


def number_type(kind, above_0, below=10 ** 9):
    """An argparse type: an int or float, above 0 or at least 0, and under `below`."""
    def convert(text):
        value = kind(text)
        if not 0 <= value < below or (above_0 and value == 0):               # NaN is refused, too
            least = "above" if above_0 else "at least"
            raise argparse.ArgumentTypeError(f"must be {least} 0 and under {below}, not {text[:40]}")
        return value
    convert.__name__ = "whole number" if kind is int else "number"       # argparse: invalid number value: 'x'
    return convert


def shared_flags(parser):
    add = parser.add_argument
    add("--data-dir", default="data", help="where the data sets are, or are downloaded to [data]")
    add("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="of forward passes [tf32 on CUDA, else fp32]")
    add("--deterministic", action="store_true", help="bit-equal runs on CUDA too, slower")
    add("--threads", type=number_type(int, True, 1025), help="CPU threads [as PyTorch chooses]")


def parse(method, doc, Settings, presets, argv=None, fits=lambda settings, flags: True, **own):
    """The command line of a method: a preset's Settings, changed by flags.

    Every field of Settings is a flag, and its trailing comment is the help text. A whole number may be 0
    where the comment explains "0 = "; a rate or a temperature may not. `presets`: {name: Preset}.
    `fits(settings, flags)` says whether a preset may be taken when none is named. `own`: {name: help} of
    flags that are no hyperparameters, or (help, type) if the flag is not a text.
    -> the run's options, the method's Settings. Raises BadInput.
    """
    parser = Parser(prog=f"{method}.py", description=doc.strip().splitlines()[0], allow_abbrev=False,
                    epilog="benchmarks/costs.py counts FLOPs, queries and memory of a run before it starts")
    add = parser.add_argument
    add("--teacher", help="model name (trained if need be), file, torchvision:NAME, module:function")
    add("--student", help="model name, torchvision:NAME or module:function")
    add("--dataset", help=f"{dataset_names()} [cifar10]")
    add("--preset", help=f"{', '.join(presets)} [the first that fits data set and networks]")
    add("--out", help=f"run folder [the next free runs/{method}-DATASET-001]")
    add("--resume", action="store_true", help="go on with the run in --out; repeat its other flags")
    add("--eval-every", type=number_type(int, True), default=1, help="epochs between scores [1]")
    add("--keep-epochs", action="store_true", help="keep the student of each epoch, for benchmarks/epochs.py")
    shared_flags(parser)
    kinds = {str: dict(default=""), bool: dict(action="store_true"),
             int: dict(type=number_type(int, False), default=0)}
    for name, text in own.items():
        text, kind = text if isinstance(text, tuple) else (text, str)
        add("--" + name.replace("_", "-"), help=text, **kinds[kind])
    said = dict(re.findall(r"^    (\w+):.*?# (.*)$", inspect.getsource(Settings), re.M))    # fields' comments
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for name, field in fields.items():
        values = {key: getattr(preset.settings, name) for key, preset in presets.items()}
        shown, text = next(iter(values.values())), said.get(name, "")
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{key} {value}" for key, value in values.items())
        above_0 = name.startswith("lr_") or name == "temperature"
        if field.type is int and name != "seed":
            above_0 = "0 = " not in text
        how = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else
               dict(choices=get_args(field.type)) if get_origin(field.type) is Literal else
               dict(type=str) if field.type is str else
               dict(type=number_type(field.type, above_0, 2 ** 32 if name == "seed" else 10 ** 9)))
        text = f"{text} [{shown}]".replace("%", "%%")
        add("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    flags = {name: given.pop(name) for name in fields if name in given}
    options = argparse.Namespace(method=method, **given)
    settings = choose_preset(options, presets, flags, fits)
    options.changed = {key: value for key, value in flags.items()
                       if value != getattr(settings, key) and key != "seed"}
    set_up_device(options)
    _check_folder(options)
    return options, dataclasses.replace(settings, **flags)


def choose_preset(options, presets, flags, fits):
    """Fill in preset, data set and networks, where they were not given.   -> the preset's Settings

    Without --preset, the first one is taken that has every one of data set, teacher and student that was
    given; else the data set's first preset, with the given networks in it. A teacher's file counts as the
    network and the data set that it says it is.
    """
    if options.preset and options.preset not in presets:
        raise BadInput(f"{options.method} has no preset '{options.preset}'; choose from {', '.join(presets)}")
    file = read_classifier(options.teacher) if options.teacher and is_file_name(options.teacher) else {}
    usual = presets[options.preset].dataset if options.preset else file.get("dataset", "cifar10")
    options.dataset = name = options.dataset or usual
    if name not in (*DATASETS, "none") and not name.startswith("folder:"):
        raise BadInput(f"unknown data set '{name}'; choose from {dataset_names()}")
    if name == "none" and not file:
        raise BadInput("--dataset none needs a --teacher file, which knows shape and normalisation")
    if not options.preset:
        known = (file["dataset"] if name == "none" else name).removesuffix("-val")       # the same numbers
        of_set = [key for key, preset in presets.items()
                  if preset.dataset == known and fits(preset.settings, flags)]
        wanted = file.get("arch", options.teacher), options.student
        exact = [key for key in of_set if all(want in (None, has) for want, has in zip(
            wanted, (presets[key].teacher, presets[key].student)))]
        if not of_set:
            raise BadInput(f"{options.method} has no preset for data set '{known}'; take another's numbers "
                           f"with --preset: {', '.join(presets)}")
        options.preset = [*exact, *of_set][0]
    preset = presets[options.preset]
    options.teacher, options.student = options.teacher or preset.teacher, options.student or preset.student
    for network in [options.student] if file else [options.teacher, options.student]:
        if ":" not in network:
            check_model_name(network)
    return preset.settings


def set_up_device(options):
    """Fill in device, precision and threads, and set PyTorch's global switches. Raises BadInput."""
    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise BadInput(f"unknown device '{wanted}'; choose cpu, cuda or cuda:N")
    if wanted != "cpu" and int(wanted.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise BadInput(f"there is no device '{wanted}' here ({torch.cuda.device_count()} CUDA devices); type "
                       "--device cpu")
    options.device = torch.device(wanted)
    options.precision = options.precision or ("fp32" if wanted == "cpu" else "tf32")
    if wanted == "cpu" and options.precision == "tf32":
        raise BadInput("tf32 is for CUDA; leave it out on a CPU")
    if wanted != "cpu":
        torch.cuda.set_device(int(wanted.partition(":")[2] or 0))
    if options.threads:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    if wanted == "cpu" and options.precision == "bf16" and (factor := bf16_slowdown()) > 1.1:
        print(f"note: on this processor a convolution in bf16 takes {factor:.1f} times as long as in fp32; "
              "leave out --precision bf16", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision != "fp32"
    torch.backends.cudnn.benchmark = not options.deterministic    # shapes are static: compare algorithms once
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(options.deterministic)


def bf16_slowdown():
    """A 3x3 convolution's time in bf16 over its time in fp32, on this CPU: under 1 where bf16 pays."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        images, weights = (torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
                           for shape in ((16, 64, 16, 16), (64, 64, 3, 3)))
        found.append(min(timeit.repeat(lambda: F.conv2d(images, weights, padding=1), number=1, repeat=9)))
    return found[1] / found[0]


def _check_folder(options):
    """Raises BadInput if the run folder cannot be used; makes nothing."""
    out = options.out
    if options.resume and not out:
        raise BadInput("--resume needs --out FOLDER, the folder of the run to go on with")
    try:
        holds = out and any(Path(out, name).exists() for name in RUN_FILES)
    except OSError as error:
        raise BadInput(f"--out cannot be a run folder: {error.strerror}") from None
    if holds and not options.resume:
        raise BadInput(f"{out} holds a run already; name another folder, or go on with it by --resume")
    if out and Path(out, "log.jsonl").is_file() and '"event": "end"' in Path(out, "log.jsonl").read_text():
        raise BadInput(f"the run in {out} is finished; its result is the last line of its log.jsonl")
    folder = Path(out or "runs").absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput(f"{out or 'runs'} cannot be a run folder: {folder} is "
                       f"{'read-only' if folder.is_dir() else 'a file'}")


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__)}


def device_name(device):
    """'NVIDIA H200', or 'AMD EPYC AVX512, 2 threads': a CPU, its instructions if beyond AVX2, threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    name += f" {instructions}" * (instructions not in ("DEFAULT", "AVX2"))
    return f"{name}, {torch.get_num_threads()} threads"


# --------------------------------------------------------------------- B5. runs, stages and what they leave
class Loop:
    """A long loop in a folder of its own: log.jsonl, samples.png, and checkpoint.pt while it goes on.

    The loop calls `resume` once and `log` at the end of each epoch (or round). The checkpoint holds the state
    as it was then, random streams included, and the length of the log: a loop that goes on after a kill cuts
    its log back to that length. `identity` is a dict of all that the state depends on; a checkpoint with
    another one is refused by the name of the first difference. `first` is the log's first row.
    """
    counter = "epoch"
    latest = None      # the loop that was saved or resumed last, for messages

    def __init__(self, folder, identity, first=None, num_classes=0):
        self.path, self.identity = Path(folder, "checkpoint.pt"), {"format": 3, **identity}
        self.first, self.num_classes, self.rows, self.columns = first, num_classes, [], None
        self.started, self.saved, self.next = False, None, 0
        self.began, self.before = time.monotonic(), 0.0

    folder = property(lambda self: self.path.parent)

    def log_bytes(self):
        log = self.folder / "log.jsonl"
        return log.stat().st_size if log.exists() else 0

    def load(self):
        """Read the checkpoint, if there is one, and refuse it now if it does not fit."""
        if self.path.exists() and self.saved is None:
            saved = read_file(self.path, "checkpoint")
            if not {"identity", "state", "epoch", "log_bytes", "seconds", "rng", "cuda_rng",
                    "costs"} <= {*saved}:
                raise BadInput(f"{self.path} is not a checkpoint of this version of the program; start anew "
                               "elsewhere")
            require_same(saved["identity"], {**saved["identity"], **self.identity}, self.path,
                         "type the settings of then, or start anew elsewhere, or move it away")
            if saved["log_bytes"] > self.log_bytes():
                raise BadInput(f"the log beside {self.path} is shorter than it was when that was saved; put "
                               "it back, or start anew elsewhere")
            self.saved = saved

    def begin(self):
        """Make the folder and start its log, or go on with the log that is there."""
        self.started = True
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:                                   # of a process that was killed while it wrote
            for leftover in self.folder.glob(f".{name}.*.tmp"):
                leftover.unlink()
        if self.saved is None:
            (self.folder / "log.jsonl").unlink(missing_ok=True)    # of one that was killed before it saved
            self.write(self.first)

    def write(self, row):
        """Add a row to the log and a line to the screen."""
        if not self.started:
            self.begin()
        if self.saved is None:              # else this is a loop that goes on: its log has the row already
            self.rows.append(row)
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if "text" in row:
            print(f"{row['event']}: {row['text']}", flush=True)
        elif row["event"] == self.counter:
            self._print(row)

    def note(self, text, event="note", **more):
        self.write(dict(event=event, text=text, **more))

    def resume(self, **state):
        """Fill modules, optimizers and tensors in place from the checkpoint, if there is one.

        -> the first epoch or round to do
        """
        if not self.started:
            self.begin()
        self.state, saved, Loop.latest = state, self.saved, self
        if saved is None:
            return 0
        require_same(saved["identity"], self.identity, self.path, "put it back as it was, or start anew")
        if set(saved["state"]) != set(state):
            raise BadInput(f"{self.path} holds the state of another version of this program; start anew")
        for name, value in state.items():
            if torch.is_tensor(value):
                value.copy_(saved["state"][name])
            else:
                value.load_state_dict(saved["state"][name])
        torch.set_rng_state(saved["rng"])
        if torch.cuda.is_initialized() and len(saved["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        COSTS.clear()
        COSTS.update(saved["costs"])
        self.before, self.began, self.saved = saved["seconds"], time.monotonic(), None
        log, self.next = self.folder / "log.jsonl", saved["epoch"] + 1
        os.truncate(log, saved["log_bytes"])
        self.rows[:] = [json.loads(line) for line in log.read_text().splitlines()]
        self.write({**self.first, "event": "resume"})
        for what in ("versions", "device"):
            if self.rows[0][what] != self.first[what]:
                self.note(f"resumed with {what} {self.first[what]}, begun with {self.rows[0][what]}: the end "
                          "may differ by rounding")
        return self.next

    def log(self, number, means, pixels=None, labels=None):
        """An epoch or a round is over: write a row and a line, draw its images, keep the state.

        `means`: {name: number}. `pixels` (N, C, H, W) in [0, 1] and `labels` (N,): images to be shown.
        """
        *warnings, row = describe(self.counter, number, means, pixels, labels, self.num_classes)
        self.score(number, row)
        for each in (*warnings, row):
            self.write(each)
        if pixels is not None:
            save_samples(self.folder / "samples.png", pixels, labels, self.num_classes)
        self.save(number)

    def score(self, number, row):
        """A run adds its student's scores to the row."""

    def save(self, number):
        state = {name: value if torch.is_tensor(value) else value.state_dict()
                 for name, value in self.state.items()}
        write(dict(identity=self.identity, state=state, epoch=number, log_bytes=self.log_bytes(),
                   seconds=self.seconds(), rng=torch.get_rng_state(), costs=dict(COSTS),
                   cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []), self.path)
        Loop.latest, self.next = self, number + 1

    def seconds(self):
        """Since the loop began, without the pauses in which it did not run."""
        return self.before + time.monotonic() - self.began

    def cost(self):
        return dict(seconds=round(self.seconds(), 1), peak_memory_mb=peak_memory_mb(),
                    teacher_queries=COSTS["teacher_queries"])

    def _print(self, row):
        """One aligned line; names when they change. Lists, counters and terms that are 0 are left out."""
        shown = {key.removeprefix("loss_"): value for key, value in row.items() if key != "teacher_queries"
                 and not key.startswith("seconds_") and not isinstance(value, (list, str))}
        shown["seconds"] = round(sum(value for key, value in row.items() if key.startswith("seconds_")), 1)
        if not self.columns or shown.keys() != self.columns[0]:
            self.columns = shown.keys(), [key for key in shown if shown[key] != 0 or f"loss_{key}" not in row]
            print(" ".join(f"{key:>{max(8, len(key))}s}" for key in self.columns[1]))
        print(" ".join(f"{_shown(shown[key]):>{max(8, len(key))}s}" for key in self.columns[1]), flush=True)


class Stage(Loop):
    """What is made once for all students of a teacher, as CSD's bank: a loop of rounds, and result.pt."""
    counter = "round"

    def __init__(self, folder, kind, made_with, run):
        arguments = {**made_with, "threads": run.options.threads}
        first = dict(event="start", method=run.options.method, stage=kind, arguments=arguments,
                     versions=versions(), device=device_name(run.options.device))
        super().__init__(folder, arguments, first, run.data.num_classes)
        self.made_with, self.run = made_with, run

    def make(self, make):
        """Keep what `make(self)` returns, with what it was made with and what it cost, in result.pt."""
        self.began = time.monotonic()
        COSTS.clear()
        result = make(self)
        cost = self.cost()
        self.write(dict(event="end", **cost))
        write(dict(made_with=self.made_with, result=result, seconds=cost["seconds"],
                   teacher_queries=cost["teacher_queries"]), self.folder / "result.pt")
        self.path.unlink(missing_ok=True)


class Run(Loop):
    """The run of a student: log.jsonl, samples.png, curves.png, checkpoint.pt, student.pt in one folder.

    Only the run sees the test set. `distill` calls `resume` once and `log` at the end of each epoch; main()
    may call `reuse`, `note` and `finish`. The folder is made with the first row of the log, when everything
    that can be refused was accepted.
    """
    def __init__(self, options, settings, teacher, student, data, scored=True):
        self.options, self.settings, self.student, self.data = options, settings, student, data
        self.test = None
        if scored and options.dataset not in ("none", "imagenet"):
            self.test, _ = load_dataset(options.dataset, False, options.data_dir, options.device)
        self.score_teacher(teacher)
        teacher.register_forward_pre_hook(      # counts the images that the teacher is asked about
            lambda module, inputs: COSTS.update(teacher_queries=0 if _scoring else len(inputs[0])))
        same = ("method", "dataset", "student", "precision", "deterministic", "threads", "eval_every")
        super().__init__(options.out or "runs", dict(
            {key: getattr(options, key) for key in same}, teacher=digest(teacher.state_dict()),
            **dataclasses.asdict(settings)), num_classes=data.num_classes)
        if options.resume:
            self.load()
        COSTS.clear()

    def score_teacher(self, teacher):
        self.teacher_logits = predict(teacher, self.test, self.data) if self.test else None
        self.teacher_acc = accuracy(self.teacher_logits, self.test.labels) if self.test else None

    def begin(self):
        """Choose and lock the folder; print what holds."""
        options = self.options
        hidden = "method", "changed", "resume", "teacher_name", "teacher_arch", "teacher_seconds"
        self.path = _make_folder(options) / "checkpoint.pt"
        _lock(self.folder, _locks)
        arguments = {key: value for key, value in vars(options).items() if key not in hidden}
        arguments.update(dataclasses.asdict(self.settings), device=str(options.device))
        self.first = dict(
            event="start", method=options.method, arguments=arguments, changed=options.changed,
            versions=versions(), device=device_name(options.device), teacher_sha256=self.identity["teacher"],
            teacher_acc=self.teacher_acc, teacher_seconds=options.teacher_seconds)
        shown = " ".join(f"{key}={arguments[key]}" for key in sorted(arguments)
                         if arguments[key] not in ("", None))
        print(textwrap.fill(shown, 110, initial_indent=f"{options.method}: ", subsequent_indent="    "))
        print(f"teacher {options.teacher}: test accuracy {_shown(self.teacher_acc)}; student "
              f"{options.student}; {self.first['device']}; {self.folder}", flush=True)
        super().begin()

    def reuse(self, kind, folder, shaped_by, make, **more):
        """What `make(stage)` returned when it was called once: tensors, kept in `folder` for other students.

        `kind`: bank, pool, ...; also the flag that names another folder. `shaped_by`: the settings that
        shape the result. `more`: what else it depends on. A result or a half-made one of other settings is
        refused by the name of the first difference. Its seconds and teacher queries count as this run's.
        """
        folder = Path(folder)
        made_with = dict(format=f"{self.options.method}-{kind}-6", teacher=self.identity["teacher"],
                         precision=self.options.precision, **self.data._asdict(), **more,
                         **{name: getattr(self.settings, name) for name in shaped_by})
        if folder.is_file():
            raise BadInput(f"{folder} is a file; --{kind} names a folder, in which the {kind} is kept")
        result = folder / "result.pt"
        if not result.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as lock:
                _lock(folder, lock, wait=True)
                stage = Stage(folder, kind, made_with, self)
                if not result.exists():                    # else another process has made it meanwhile
                    stage.load()
                    if not self.started:
                        self.begin()
                    print(f"{kind} -> {folder}", flush=True)
                    stage.make(make)
        else:
            print(f"{kind} from {folder}", flush=True)
        kept = read_file(result, kind)
        require_same(kept.get("made_with", {}), made_with, result,
                     f"name another folder with --{kind}, or move this one away")
        cost = {name: kept[name] for name in ("seconds", "teacher_queries")}
        self.identity[kind] = digest(kept["result"])
        self.write(dict(event=kind, path=str(folder), sha256=self.identity[kind], **cost))
        COSTS.clear()
        COSTS["teacher_queries"] = cost["teacher_queries"]
        self.before, self.began = self.before + cost["seconds"], time.monotonic()
        return kept["result"]

    def score(self, epoch, row):
        row.update(student_acc=None, agreement=None)
        if self.test and (epoch == self.settings.epochs - 1 or (epoch + 1) % self.options.eval_every == 0):
            logits = predict(self.student, self.test, self.data)
            row["student_acc"] = accuracy(logits, self.test.labels)
            row["agreement"] = agreement(logits, self.teacher_logits)

    def log(self, epoch, means, pixels=None, labels=None):
        """An epoch is over: score the student, write a row and a line, draw the images, keep the state."""
        first = epoch == self.next
        super().log(epoch, means, pixels, labels)
        if self.options.keep_epochs:
            shown = None if pixels is None else (255 * pixels[:200].clamp(0, 1)).byte().contiguous()
            write(dict(student=self.student.state_dict(), pixels=shown), self.folder / f"epochs/{epoch}.pt")
        left = (self.settings.epochs - 1 - epoch) * sum(
            value for key, value in self.rows[-1].items() if key.startswith("seconds_"))
        if first and left > 60:
            print(f"at this speed the other epochs take {left / 60:.0f} minutes", flush=True)

    def finish(self, result=None):
        """Write curves.png, student.pt and the end row, and print the result of the last epoch.

        In this order: a run that is killed in between ends the same when it is resumed. `result`: a line
        for the screen, of a run that trained no student.
        """
        cost = self.cost()
        if result:
            self.write(dict(event="end", teacher_acc=self.teacher_acc, **cost))
            print(f"{result}, {cost['seconds']:.0f} s", flush=True)
            return
        epochs = [row for row in self.rows if row["event"] == "epoch"]
        scores = [row["student_acc"] for row in epochs if row["student_acc"] is not None]
        last, best, ece = epochs[-1]["student_acc"], max(scores, default=None), None
        if self.test:
            ece = expected_calibration_error(predict(self.student, self.test, self.data), self.test.labels)
        row = dict(event="end", teacher_acc=self.teacher_acc, student_acc_last=last, student_acc_best=best,
                   agreement=epochs[-1]["agreement"], ece=ece, **cost)
        save_curves(self.folder / "curves.png", epochs, self.teacher_acc)
        save_classifier(self.folder / "student.pt", self.student, self.options.student, self.data,
                        self.options.dataset, test_acc=last, method=self.options.method,
                        teacher_sha256=self.identity["teacher"])
        self.write(row)
        print(f"last epoch: student {_shown(last)}, teacher {_shown(self.teacher_acc)} on the test images; "
              f"agreement {_shown(row['agreement'])}; calibration error {_shown(ece)}; {row['seconds']:.0f} s"
              f"   [best epoch, chosen on the test set: {_shown(best)}]")
        there = [name for name in RUN_FILES if Path(self.folder, name).exists() and name != "checkpoint.pt"]
        print(f"{self.folder}: {', '.join(there)}", flush=True)


RUN_FILES = "student.pt", "samples.png", "curves.png", "log.jsonl", "images.pt", "checkpoint.pt"


def describe(counter, number, means, pixels, labels, num_classes):
    """The rows of an epoch or a round: its means, after a warning if its images (pixels in [0, 1]) collapsed.

    There are three signs of a collapse: the images hardly differ (by 2 or 3 of 255 grey levels); all are in
    one class; the entropy of their classes is under half of what it can be.
    """
    row, found = {"event": counter, counter: number, **means}, []
    if pixels is not None:
        row["pixel_std"] = pixels.std(0, correction=0).mean().item()
        if row["pixel_std"] < 0.01:
            found.append("its images hardly differ")
    if labels is not None:
        counts = torch.bincount(labels, minlength=num_classes)
        share = counts.double() / counts.sum()
        entropy = -torch.xlogy(share, share).sum().item() / math.log(max(2, min(num_classes, len(labels))))
        row["class_counts"] = counts.tolist() if num_classes <= 100 else None
        if entropy < 0.5:
            found.append(f"all its images are in class {counts.argmax()}" if counts.max() == len(labels) else
                         f"the entropy of its classes is {entropy:.2f} of the largest")
    seconds = {key: round(COSTS.pop(key), 3) for key in list(COSTS) if key.startswith("seconds_")}
    row.update(seconds, teacher_queries=COSTS["teacher_queries"])
    warning = {"event": "collapse", counter: number, "text": f"{counter} {number}: {', '.join(found)}"}
    return [warning, row] if found else [row]


def _make_folder(options):
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        return Path(options.out)
    for number in itertools.count(1):   # mkdir, not exists: two runs started together must not get one folder
        folder = Path("runs", f"{options.method}-{options.dataset.partition(':')[0]}-{number:03d}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def _shown(value):
    """For the screen: '-' for None, four digits after the point, fewer for large numbers."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return "-" if value is None else str(value)


def peak_memory_mb():
    """Most memory held so far: on CUDA by PyTorch's tensors, else by the process."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    try:
        import resource
    except ImportError:        # Windows
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def save_samples(path, pixels, labels, num_classes, each=8, most=20):
    """The last `each` of pixels (N, C, H, W) in [0, 1] of each class, a PNG row a class, at most `most`."""
    from PIL import Image, ImageDraw
    pixels, labels = (255 * pixels.clamp(0, 1)).to(torch.uint8).cpu(), labels.cpu()
    classes = list(range(num_classes)) if num_classes <= most else labels.unique().tolist()[:most]
    sheet = pixels.new_zeros(len(classes), each, *pixels.shape[1:])          # black where a class has fewer
    for row, label in enumerate(classes):
        found = pixels[labels == label][-each:]
        sheet[row, :len(found)] = found
    scale = max(1, 40 // pixels.shape[2])                                # small images enlarged, not smoothed
    sheet = sheet.repeat_interleave(scale, -1).repeat_interleave(scale, -2).expand(-1, -1, 3, -1, -1)
    grid = torchvision.utils.make_grid(sheet.flatten(0, 1), nrow=each, padding=2, pad_value=255)   # (3, h, w)
    picture = Image.new("RGB", (grid.shape[2] + 24, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (24, 0))
    for row, label in enumerate(classes):
        place = 4, row * (sheet.shape[3] + 2) + sheet.shape[3] // 2 - 4
        ImageDraw.Draw(picture).text(place, str(label), fill="black")
    write(picture, path, save=lambda picture, file: picture.save(file, format="PNG"))


def save_curves(path, epochs, teacher_acc=None):
    """A PNG with the student's scores on the left and the losses on the right, over the epochs.

    `epochs`: the rows of the log that end an epoch. Every loss is drawn over its largest absolute value, so
    that terms of different sizes can be seen in one picture; its first and last values stand in the legend.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("student_acc", "student"), ("agreement", "agreement with the teacher")):
        points = [(row["epoch"] + 1, 100 * row[name]) for row in epochs if row.get(name) is not None]
        if points:
            left.plot(*zip(*points), label=label, marker="." if len(points) < 30 else None)
    if teacher_acc is not None:
        left.axhline(100 * teacher_acc, color="gray", linestyle=":", label="teacher")
        left.legend(frameon=False, fontsize=8)
        left.set(title="on the test images, %", xlabel="epoch")
    else:
        left.set(title="no test images, no score", xlabel="epoch")
    losses = {name: [(row["epoch"] + 1, row[name]) for row in epochs if row.get(name) is not None]
              for name in dict.fromkeys(key for row in epochs for key in row if key.startswith("loss"))}
    for name, points in losses.items():
        largest = max((abs(value) for _, value in points), default=0)
        if largest:
            label = f"{name}: {points[0][1]:.3g} to {points[-1][1]:.3g}"
            right.plot([epoch for epoch, _ in points], [value / largest for _, value in points], label=label,
                       marker="." if len(points) < 30 else None)
    right.set(title="losses, each over its largest absolute value", xlabel="epoch")
    if any(max((abs(value) for _, value in points), default=0) for points in losses.values()):
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    write(figure, path, save=lambda figure, file: figure.savefig(file, format="png", dpi=100))


_locks = contextlib.ExitStack()      # of run folders; they go with the process, however it ends


def _lock(folder, stack, wait=False):
    """Hold the folder until `stack` is closed. If another process holds it, wait, or raise BadInput."""
    try:
        import fcntl
    except ImportError:        # Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise BadInput(f"another process writes to {folder}; wait, or name another --out") from None
        print(f"another process makes {folder}; waiting for it", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:            # a file system without locks
        pass


def command_line(main):
    """Decorates `main(argv=None)`. Bad input: one sentence, status 2. Ctrl-C: how to go on, status 130."""
    @functools.wraps(main)
    def wrapped(argv=None):
        Loop.latest = None
        try:
            with _locks:
                return main(argv)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                error = "the GPU's memory is full; lower --batch-size, or another batch size of --help"
            last = Loop.latest
            where = f" in {last.counter} {last.next}" if last else ""
            where += f"; its last checkpoint: {last.path}" if last and last.path.exists() else ""
            print(f"stopped: {error}{where}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            last = Loop.latest
            run = last.run if isinstance(last, Stage) else last
            folder = f" with --resume --out {run.folder}" if isinstance(run, Run) else ""
            print(f"stopped; to go on, type the same command again{folder}", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapped


@command_line
def main(argv=None):
    parser = Parser(prog="common.py", allow_abbrev=False,
                     description="Train a teacher on the real data and keep it in one file.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model name")
    what.add_argument("--inspect", help="a network, as --teacher takes it: say what it has, and stop")
    parser.add_argument("--dataset", default="cifar10", help=f"{dataset_names()} [cifar10]")
    parser.add_argument("--epochs", type=number_type(int, True), help="passes over the set [by data set]")
    parser.add_argument("--batch-size", type=number_type(int, True), help="[by data set]")
    parser.add_argument("--out", help="file [checkpoints/DATASET_MODEL.pt, where the methods look for it]")
    shared_flags(parser)
    options = parser.parse_args(argv)
    if options.inspect:
        print("\n".join(inspect_network(options.inspect)))
        return
    set_up_device(options)
    check_model_name(options.model)
    if options.dataset not in DATASETS and not options.dataset.startswith("folder:"):
        raise BadInput(f"unknown data set '{options.dataset}'; choose from {dataset_names()}")
    path = Path(options.out) if options.out else teacher_path(options.dataset, options.model)
    if path.exists():
        raise BadInput(f"{path} is there already; name another file with --out, or move it away")
    recipe = recipe_of(options.model, options.dataset, options.epochs, options.batch_size)
    train_teacher(options.model, options.dataset, path, options, recipe)
    print(f"{path}: test accuracy {_shown(read_classifier(path)['test_acc'])}")


if __name__ == "__main__":     # python common.py --model resnet34 --dataset cifar10
    main()
