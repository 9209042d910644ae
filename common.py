"""common.py: the plumbing that `distill` functions share. It knows nothing of distillation.

Rooms, in reading order:
    1  datasets               whole sets as uint8 tensors on the device; batched crop, flip, RandAugment, elastic
    2  looking inside a model inputs and statistics of any layer of any network, through hooks that live inside a `with`
    3  measuring              accuracy, agreement, calibration
    4  inside a long loop     optimizer, schedule, running means, a counter that survives a kill

The classifiers are in models.py. What only `main()` needs, teachers and the run folder, is in run.py. A copier takes from this file
alone.

Two words that are kept apart everywhere: `images` are what the teacher eats (normalised with its mean and standard
deviation); `pixels` are values in [0, 1], for looking at, cropping and storing.

Letters: N batch, K classes, C H W image, D features.

Train a teacher by itself:   python common.py --model resnet34 --dataset cifar10
"""
import contextlib
import functools
import hashlib
import io
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from tqdm import tqdm


class BadInput(ValueError):
    """Something the user gave cannot be used. The message is one sentence: what is wrong, what is accepted, what to type."""


# ------------------------------------------------------------------------------------------------------- 1. datasets
class DataSpec(NamedTuple):
    """All that a data-free student may know about the data. It travels in the teacher's file and holds no image."""
    image_shape: tuple   # (C, H, W)
    num_classes: int
    mean: tuple          # per channel, of pixels in [0, 1]
    std: tuple           # per channel, of all pixels together (not the mean of per-image deviations) unless noted below
    crop: int = 0        # zero padding in pixels before a random crop back to (H, W); 0 = no crop
    flip: bool = False   # random horizontal flip, p = 1/2


class ImageSet(NamedTuple):
    """Real images with labels, whole, on the device. No data-free `distill` ever receives one."""
    pixels: torch.Tensor   # (N, C, H, W) uint8; value / scale is in [0, 1]
    labels: torch.Tensor   # (N,) int64
    scale: float = 255.0   # 16 for `digits`, whose files hold 17 grey levels


DATASETS = {
    # mean and std of the 1,437 training images, pixel = value / 16
    "digits": DataSpec((1, 8, 8), 10, (0.3054,), (0.3759,), crop=1),
    "mnist": DataSpec((1, 32, 32), 10, (0.1307,), (0.3081,)),            # the usual constants, measured at 28x28
    "mnist28": DataSpec((1, 28, 28), 10, (0.1307,), (0.3081,)),
    "fashion_mnist": DataSpec((1, 32, 32), 10, (0.2860,), (0.3530,)),
    "fashion_mnist28": DataSpec((1, 28, 28), 10, (0.2860,), (0.3530,)),
    "svhn": DataSpec((3, 32, 32), 10, (0.5,) * 3, (0.5,) * 3),           # CMI and CSD normalise it so, without crop or flip
    # 0.2023... is the mean of per-image deviations (the pixel deviation is 0.2470...). Published CIFAR-10 teachers were
    # trained with it, and BatchNorm statistics only mean something with the constants that they were taken with.
    "cifar10": DataSpec((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), crop=4, flip=True),
    "cifar100": DataSpec((3, 32, 32), 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), crop=4, flip=True),
    "imagenet": DataSpec((3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop=28, flip=True),    # no images here
}
NO_DOWNLOAD = "for a run that needs no download, type: --dataset digits"


def dataset_names():
    return ", ".join(DATASETS) + ", folder:PATH[@SIZE], none"


def load_dataset(name, train, data_dir="data", device="cpu"):
    """The whole training or test set. Returns (ImageSet, DataSpec).

    `digits`: 1,797 real 8x8 digits inside scikit-learn, split 1,437 / 360 by a fixed permutation; no download.
    `folder:PATH[@SIZE]`: PATH/train/CLASS/*.png and PATH/test/CLASS/*.png, shorter side resized to SIZE and centre-cropped.
    The others come through torchvision, from `data_dir` or, if they are not there, from the internet.
    Raises BadInput if the set is unknown, or can neither be found nor downloaded.
    """
    if name.startswith("folder:"):
        return _read_folder(name, train, device)
    if name not in DATASETS:
        raise BadInput(f"unknown data set '{name}'; choose from {dataset_names()}")
    data = DATASETS[name]
    if name == "imagenet":
        raise BadInput("ImageNet's images are not read here; the name is for synthesis with a teacher of torchvision's")
    if name == "digits":
        import numpy
        from sklearn.datasets import load_digits
        values, labels = load_digits(return_X_y=True)
        order = numpy.random.RandomState(0).permutation(1797)
        order = order[:1437] if train else order[1437:]
        pixels = torch.tensor(values[order], dtype=torch.uint8).reshape(-1, 1, 8, 8)
        return ImageSet(pixels.to(device), torch.tensor(labels[order]).long().to(device), scale=16.0), data
    pixels, labels = _read_torchvision(name.removesuffix("28"), train, Path(data_dir))
    if pixels.shape[2:] != data.image_shape[1:]:                                          # (N, 1, 28, 28) -> (N, 1, 32, 32)
        pixels = F.interpolate(pixels.float(), data.image_shape[1:], mode="bilinear").round().to(torch.uint8)
    return ImageSet(pixels.contiguous().to(device), labels.long().to(device)), data


def _read_torchvision(name, train, data_dir):
    """(N, C, H, W) uint8 and (N,) labels of a torchvision set; downloads it if it is not in `data_dir`."""
    class_name, folder = {"mnist": ("MNIST", "MNIST/raw"), "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
                          "svhn": ("SVHN", "."), "cifar10": ("CIFAR10", "cifar-10-batches-py"),
                          "cifar100": ("CIFAR100", "cifar-100-python")}[name]
    build = getattr(torchvision.datasets, class_name)
    which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        found = build(data_dir, download=False, **which)
    except Exception:   # not there, incomplete or damaged: torchvision has no one exception for it
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
        pixels = pixels[:, None]                                                          # (N, H, W) -> (N, 1, H, W)
    elif pixels.shape[-1] == 3:
        pixels = pixels.permute(0, 3, 1, 2)                                               # (N, H, W, C) -> (N, C, H, W)
    return pixels, labels


def _read_folder(name, train, device):
    path, _, size = name.removeprefix("folder:").rpartition("@") if re.search(r"@\d+$", name) else (name.removeprefix("folder:"), "", "")
    root = Path(path) / ("train" if train else "test")
    if not root.is_dir():
        raise BadInput(f"'{name}' needs the folder {root} with one folder a class in it; {NO_DOWNLOAD}")
    if size and not 1 <= int(size) <= 1024:
        raise BadInput(f"'{name}': the size after @ must be 1 to 1024 pixels")

    def read(root):
        steps = [torchvision.transforms.PILToTensor()]
        if size:
            steps = [torchvision.transforms.Resize(int(size)), torchvision.transforms.CenterCrop(int(size)), *steps]
        try:
            found = torchvision.datasets.ImageFolder(root, torchvision.transforms.Compose(steps))
            return torch.stack([image for image, _ in found]), torch.tensor(found.targets), found.classes
        except FileNotFoundError as error:
            raise BadInput(f"{root} holds no class folders with images ({error})") from None
        except OSError as error:
            raise BadInput(f"{root} holds a file that is no whole image ({error})") from None
        except RuntimeError:
            raise BadInput(f"the images in {root} differ in size; give one, for example {name}@32") from None
    pixels, labels, classes = read(root)
    reference, _, train_classes = (pixels, labels, classes) if train else read(Path(path) / "train")
    if classes != train_classes:
        raise BadInput(f"{path}/train and {path}/test hold different class folders")
    reference = reference.double() / 255
    mean, std = reference.mean((0, 2, 3)), reference.std((0, 2, 3)).clamp(min=1e-3)
    data = DataSpec(tuple(pixels.shape[1:]), len(classes), tuple(round(v, 4) for v in mean.tolist()),
                    tuple(round(v, 4) for v in std.tolist()), crop=pixels.shape[-1] // 8, flip=True)
    return ImageSet(pixels.to(device), labels.to(device)), data


def picture_names(path):
    """All pictures under a folder, whatever their names, as sorted paths. Raises BadInput if there is none."""
    kinds = torchvision.datasets.folder.IMG_EXTENSIONS
    found = sorted(name for name in Path(path).rglob("*") if name.suffix.lower() in kinds) if path else []
    if not found:
        raise BadInput(f"there is no picture in folder '{path}'; name one with {', '.join(kinds)} files, in folders of their own or not")
    return found


def read_pictures(names, size):
    """Picture files -> (M, 3, size, size) uint8: shorter side resized to `size`, centre cut out. Raises BadInput for a damaged one."""
    from PIL import Image
    cut = torchvision.transforms.Compose([torchvision.transforms.Resize(size), torchvision.transforms.CenterCrop(size),
                                          torchvision.transforms.PILToTensor()])
    found = []
    for name in names:
        try:
            with Image.open(name) as picture:
                found.append(cut(picture.convert("RGB")))
        except Exception as error:   # PIL has no one exception for what it cannot read
            raise BadInput(f"{name} is no whole image ({error})") from None
    return torch.stack(found)


def real_pictures(name, data_dir="data"):
    """Pictures without their labels, of a data set's training half or of any folder:PATH, which need not hold classes.

    Returns how many there are, read(rows, size) -> pixels (n, C, H, W) in [0, 1] of some of them, and a text that changes when a folder's
    files do. Raises BadInput as `load_dataset` and `picture_names` do.
    """
    if name.startswith("folder:"):
        names = picture_names(name.removeprefix("folder:"))
        content = hashlib.sha256(repr([(str(path), path.stat().st_size) for path in names]).encode()).hexdigest()[:16]
        return len(names), lambda rows, size: read_pictures([names[row] for row in rows], size) / 255, content
    (pixels, _, scale), _ = load_dataset(name, True, data_dir)
    return len(pixels), lambda rows, size: pixels[rows] / scale, ""


def fit_pixels(pixels, data):
    """Pixels (N, C', H', W') in the shape that a DataSpec names: grey, or grey three times, and resized.   -> (N, C, H, W), in [0, 1]"""
    channels, *size = data.image_shape
    if pixels.shape[1] != channels:
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(pixels.shape[2:]) != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels.clamp(0, 1)


def same_data(name, other):
    """Whether two names of data sets, as `load_dataset` takes them, name the same images, at whatever size; a folder in a folder does."""
    if name.startswith("folder:") and other.startswith("folder:"):
        one, two = (Path(re.sub(r"@\d+$", "", text.removeprefix("folder:"))).resolve() for text in (name, other))
        return one == two or one in two.parents or two in one.parents
    return re.sub("(mnist)28$", r"\1", name) == re.sub("(mnist)28$", r"\1", other)


@functools.lru_cache
def _on_device(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _per_channel(values, like):
    return _on_device(tuple(values), like.device)            # kept: a copy from the host a step would make a GPU wait


def normalize(pixels, data):
    """pixels (N, C, H, W) in [0, 1] -> images: (pixels - mean) / std per channel, in channels_last, the faster order."""
    images = (pixels - _per_channel(data.mean, pixels)) / _per_channel(data.std, pixels)
    return images.contiguous(memory_format=torch.channels_last)


def denormalize(images, data):
    """images (N, C, H, W) -> pixels, not clamped."""
    return images * _per_channel(data.std, images) + _per_channel(data.mean, images)


def crop_by_offsets(pixels, padding, top, left, flip=None):
    """Zero-pad (N, C, H, W) by `padding`, cut (H, W) out at row `top` (N,) and column `left` (N,), mirror where `flip` (N,).

    One gather for the whole batch, differentiable. A Python loop over images, as in kornia's slicing mode, costs a
    synchronisation per image on a GPU.
    """
    height, width = pixels.shape[2:]
    rows = torch.arange(height, device=pixels.device) + top[:, None]                      # (N, H)
    columns = torch.arange(width, device=pixels.device).expand(len(pixels), -1)           # (N, W)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    columns = columns + left[:, None]
    which = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    padded = F.pad(pixels, (padding,) * 4)
    # the indexed dimensions come first, (N, H, W, C): as (N, C, H, W) that is channels_last, which convolutions like
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(pixels, data, rng):
    """The training transform of the data set, in pixel space, before normalisation: random crop and flip as `data` says.

    pixels (N, C, H, W) -> the same shape. Differentiable; an independent draw from `rng` for every image.
    """
    if not data.crop and not data.flip:
        return pixels
    n, device = len(pixels), pixels.device
    top, left = torch.randint(0, 2 * data.crop + 1, (2, n), generator=rng, device=device)
    flip = torch.rand(n, generator=rng, device=device) < 0.5 if data.flip else None
    return crop_by_offsets(pixels, data.crop, top, left, flip)


def rand_augment(pixels, rng, operations=2, magnitude=14, fill=0.0):
    """RandAugment (Cubuk et al. 2020) on the device: `operations` times, each of 14 operations takes an equal part of the batch.

    pixels (N, C, H, W) in [0, 1] -> the same. One call an operation, whatever N is; under 14 images some have no part. Magnitude of
    30: at 14 shear 0.14, translate 0.21 of the side, turn 14 degrees, factors 1 ± 0.42, 6 bits, invert above 0.533. `fill`, a number
    or (C, 1, 1), is what comes in from outside. Bilinear.
    """
    level, device = magnitude / 30, pixels.device
    sizes = torch.tensor([0.3, 0.3, 0.9, 0.9, math.radians(30)], device=device) * level   # a side is 2: from -1 to 1
    for _ in range(operations):
        order = torch.randperm(len(pixels), generator=rng, device=device)
        sign = 2.0 * torch.randint(2, (len(pixels), 1, 1, 1), generator=rng, device=device) - 1
        parts, signs = pixels[order].tensor_split(14), sign.tensor_split(14)
        moved, kinds = torch.cat(parts[1:6]), torch.eye(5, device=device).split(1)
        if len(moved):                                         # one sampling for shear in x and y, translation in x and y, rotation
            amount = torch.cat([kind * sign.view(-1, 1) for kind, sign in zip(kinds, signs[1:6])]) * sizes        # (N', 5)
            shear_x, shear_y, shift_x, shift_y, turn = amount.unbind(1)
            come_from = torch.stack([turn.cos(), shear_x - turn.sin(), shift_x, shear_y + turn.sin(), turn.cos(), shift_y], 1)
            grid = F.affine_grid(come_from.view(-1, 2, 3), moved.shape, align_corners=False)
            moved = F.grid_sample(moved - fill, grid, align_corners=False) + fill
        bright, colour, contrast, sharp, bits, solar, stretched, flat = parts[6:]
        factor = [1 + 0.9 * level * part for part in signs]
        smooth = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, 1)
        step = 2 ** round(4 * level) / 255                     # so many bits fewer than 8
        even = _grey(contrast).mean((2, 3), keepdim=True)
        pixels = torch.cat([parts[0], moved, bright * factor[6], torch.lerp(_grey(colour), colour, factor[7]),
                            torch.lerp(even, contrast, factor[8]), torch.lerp(smooth, sharp, factor[9]),
                            (bits / step + 1e-4).floor() * step, torch.where(solar > 1 - level, 1 - solar, solar), _autocontrast(stretched),
                            _equalized(flat)])[order.argsort()].clamp(0, 1)
    return pixels


def _grey(pixels):
    """Luminance.   (N, C, H, W) -> (N, 1, H, W)"""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    return (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _autocontrast(pixels):
    """Each channel of each image stretched to [0, 1]; a flat one stays as it is."""
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    return torch.where(high > low, (pixels - low) / (high - low).clamp(min=1e-6), pixels)


def _equalized(pixels):
    """Each channel of each image with its grey levels spread evenly: a level becomes the part of the pixels under it."""
    level = (255 * pixels).round().long().flatten(0, 1).flatten(1)                        # (N·C, H·W)
    counts = level.new_zeros(len(level), 256).scatter_add_(1, level, torch.ones_like(level))          # whole numbers: exact on a GPU too
    below, largest = counts.cumsum(1) - counts, level.amax(1, keepdim=True)
    flat = largest == level.amin(1, keepdim=True)              # one level only: as it is
    spread = (below / (level.shape[1] - counts.gather(1, largest)).clamp(min=1)).gather(1, level)
    return torch.where(flat, level / 255, spread).view_as(pixels)


def elastic(pixels, rng, alpha=50.0, sigma=5 / 32):
    """Every picture bent by a field of random shifts, uniform in ±alpha/32 half sides before it is smoothed over `sigma` sides.

    pixels (N, C, H, W) -> the same. What remains of a shift is about a pixel at 32x32, as in torchvision's ElasticTransform(50, 5).
    """
    def smoothing(side):                                       # (side, side), Gaussian rows of sum 1
        place = torch.arange(side, device=pixels.device) / side
        return (-((place[:, None] - place) / sigma) ** 2 / 2).softmax(1)
    n, _, height, width = pixels.shape
    field = 2 * torch.rand(n, 2, height, width, generator=rng, device=pixels.device) - 1
    shift = (smoothing(height) @ field @ smoothing(width).T) * alpha / 32                 # (N, 2, H, W)
    still = F.affine_grid(torch.eye(2, 3, device=pixels.device).expand(n, -1, -1), pixels.shape, align_corners=False)
    return F.grid_sample(pixels, still + shift.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


class Shuffled:
    """Batches of indices 0..n-1: without replacement, reshuffled when used up, the short last batch of a pass kept.

    Its position and order are part of a run's state, so that a resumed run sees the same batches.
    """
    def __init__(self, rng):
        self.rng, self.order, self.position = rng, torch.empty(0, dtype=torch.long), 0

    def restart(self):
        """Forget the pass in progress; the next batch starts a new one."""
        self.order, self.position = self.order[:0], 0

    def next(self, n, batch_size):
        if self.position >= len(self.order):
            self.order, self.position = torch.randperm(n, generator=self.rng, device=self.rng.device), 0
        batch = self.order[self.position:self.position + batch_size]
        self.position += len(batch)
        return batch

    def full(self, n, batch_size):
        """The same, but where a pass ends the next one fills the batch up."""
        batch = self.next(n, batch_size)
        while len(batch) < batch_size:
            batch = torch.cat([batch, self.next(n, batch_size - len(batch))])
        return batch

    def state_dict(self):
        return {"order": self.order.clone(), "position": self.position}

    def load_state_dict(self, state):
        self.order, self.position = state["order"].to(self.rng.device), state["position"]


# ------------------------------------------------------------------------------------------ 2. looking inside a model
@contextlib.contextmanager
def recorded_inputs(modules):
    """`with recorded_inputs([layer]) as seen: model(images)`; then seen[layer] is the layer's latest first input, with its graph.

    Works on any nn.Module. The hooks are gone when the block ends, also after an exception.
    """
    seen, handles = {}, []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs[0])))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def last_linear(model):
    """The last nn.Linear of a model; its input is the feature vector (N, D). Raises BadInput if there is none."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise BadInput(f"{type(model).__name__} has no nn.Linear layer, so its feature vector cannot be found")
    return found[-1]


def first_linear(model):
    """The first nn.Linear after the last nn.Conv2d, LeNet-5: fc1; its input (N, D) is what the convolutions made of an image.

    Without a convolution the last nn.Linear. Raises BadInput if there is none.
    """
    found, layers = last_linear(model), [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    last = max((place for place, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)), default=len(layers))
    return next(iter(layers[last + 1:]), found)


def batchnorms(model):
    """All nn.BatchNorm2d of a model with running statistics, in order of registration."""
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None]


def last_map(model, name=""):
    """The module whose input is the last feature map (N, C, H, W): the one called `name`, else `model.last_map`, else None."""
    if name:
        modules = dict(model.named_modules())
        if name not in modules:
            raise BadInput(f"{type(model).__name__} has no layer '{name}'; its last ones are {', '.join(list(modules)[-5:])}")
        return modules[name]
    return getattr(model, "last_map", None)


def last_maps(teacher, student, data, settings):
    """The layers whose inputs are the last maps of teacher and student, and the shapes of those maps, None if one is unknown.

    Raises BadInput if a layer named in `settings` is not there, or if what it takes is no map.
    """
    layers = [last_map(teacher, getattr(settings, "teacher_last_map", "")), last_map(student, getattr(settings, "student_last_map", ""))]
    if None in layers:
        return *layers, None
    images = torch.zeros(2, *data.image_shape, device=next(teacher.parameters()).device)
    with torch.no_grad(), frozen(teacher, student), recorded_inputs(layers) as seen:
        teacher(images), student(images)
    shapes = [tuple(seen[layer].shape) if layer in seen else () for layer in layers]
    if any(len(shape) != 4 for shape in shapes):
        raise BadInput(f"the last maps must be (N, C, H, W), but the layers named take {shapes[0]} and {shapes[1]}")
    return *layers, shapes


class _FrozenBatchNorm(torch.autograd.Function):
    """Eval-mode BN as the affine map that it is, plus the batch mean and variance of its input, in one backward pass.

    Why not nn.BatchNorm2d and torch.var_mean: on a CPU in channels_last, for a map of (200, 32, 32, 32), both together took
    191 ms forward and backward, and 14 ms here, on the same numbers (benchmarks/results/frozen-batchnorm.jsonl).
    """
    @staticmethod
    def forward(ctx, x, scale, shift, with_statistics):
        out = torch.addcmul(shift, x, scale).to(x.dtype)
        if not with_statistics:
            mean = variance = None
        elif x.device.type == "cpu" and x.dtype == torch.float32:
            mean, variance = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)   # variance is the biased one
        else:
            variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        ctx.save_for_backward(x if with_statistics else None, scale, mean)
        return out, mean, variance

    @staticmethod
    def backward(ctx, grad_out, grad_mean, grad_variance):
        x, scale, mean = ctx.saved_tensors
        if x is None:
            return (grad_out * scale).to(grad_out.dtype), None, None, None
        count = x.numel() / x.shape[1]
        slope = grad_variance * (2 / count)                    # d variance / dx = 2 (x - mean) / count
        offset = grad_mean / count - slope * mean              # d mean / dx = 1 / count
        grad = torch.addcmul(offset.view(1, -1, 1, 1), x, slope.view(1, -1, 1, 1)).addcmul_(grad_out, scale)
        return grad.to(x.dtype), None, None, None


def _frozen_forward(module, seen, x):
    """What a frozen nn.BatchNorm2d computes; its statistics go to seen[module] unless `seen` is None."""
    scale = (module.running_var + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight
    shift = -module.running_mean * scale
    shift = shift if module.bias is None else shift + module.bias
    out, mean, variance = _FrozenBatchNorm.apply(x, scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1), seen is not None)
    if seen is not None:
        seen[module] = (mean, variance)
    return out


@contextlib.contextmanager
def _replaced_forwards(modules, seen):
    """Inside, these BN layers compute `_frozen_forward`. Layers with a forward of their own are left alone."""
    before = [(module, module.__dict__.get("forward")) for module in modules if type(module) is nn.BatchNorm2d]
    try:
        for module, _ in before:
            module.forward = functools.partial(_frozen_forward, module, seen)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextlib.contextmanager
def frozen(*models):
    """Inside: eval mode, no weight gradients (a third of a step's work), BN as an affine map. Afterwards: all as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    try:
        for model in models:
            model.eval().requires_grad_(False)
        with _replaced_forwards([module for model in models for module in batchnorms(model)], None):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def recorded_statistics(modules):
    """`with frozen(model), recorded_statistics(batchnorms(model)) as seen: model(images)`; then seen[bn] = (mean, variance).

    Both (channels,), float32, of the layer's *input* over (N, H, W), the variance biased, with their graph. For frozen
    networks only: weights get no gradient. Nothing stays on the model when the block ends.
    """
    seen, handles = {}, []

    def from_input(module, inputs):
        seen[module] = torch.var_mean(inputs[0].float(), (0, 2, 3), correction=0)[::-1]
    try:
        for module in modules:
            if type(module) is not nn.BatchNorm2d:             # a subclass computes its own forward; only look at its input
                handles.append(module.register_forward_pre_hook(from_input))
        with _replaced_forwards(modules, seen):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def seeded(seed):
    """Inside, torch's global generators start from `seed`; afterwards they are as before. For drawing initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def autocast(settings, device):
    """Forward passes in bfloat16 with --precision bf16, else in float32. Losses and statistics are taken in float32 anyway."""
    return torch.autocast(device.type, torch.bfloat16, enabled=getattr(settings, "precision", "fp32") == "bf16")


# ------------------------------------------------------------------------------------------------------ 3. measuring
@torch.no_grad()
def predict(model, images, data, batch_size=500):
    """Logits (N, K), float32, of an ImageSet; the model in eval mode meanwhile. Draws no random number."""
    with frozen(model):
        return torch.cat([model(normalize(pixels / images.scale, data)).float()
                          for pixels in images.pixels.split(batch_size)])


def accuracy(logits, labels):
    """Fraction of rows whose largest logit is the label. logits (N, K), labels (N,) -> float in [0, 1]."""
    return (logits.argmax(1) == labels).float().mean().item()


def agreement(logits, other_logits):
    """Fraction of rows on which two classifiers name the same class, right or wrong. In [0, 1]."""
    return accuracy(logits, other_logits.argmax(1))


def expected_calibration_error(logits, labels, bins=15):
    """Mean |confidence - accuracy| over `bins` equal confidence bins, weighted by their size (Guo et al. 2017). In [0, 1]."""
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == labels).float()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1                          # (N,) bin (b/15, (b+1)/15]
    gap = torch.zeros(bins, device=logits.device).index_add_(0, which, confidence - correct)
    return gap.abs().sum().item() / len(labels)


# ----------------------------------------------------------------------------------------------- 4. inside a long loop
def cosine(value, step, steps):
    """`value` at step 0, falling to 0 at step `steps` along half a cosine."""
    return value * (1 + math.cos(math.pi * step / steps)) / 2


def build_optimizer(model, name, lr, weight_decay, nesterov=False):
    """'sgd' with momentum 0.9, or 'adam': AdamW, which without weight decay is Adam."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=weight_decay, nesterov=nesterov)
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


class Means:
    """Running means of loss terms, kept on the device: no synchronisation a step. Remembers the first step that was not finite."""
    def __init__(self, *names, device):
        self.names, self.count = names, 0
        self.sums = torch.zeros(len(names), device=device)
        self.first_bad = torch.full((len(names),), -1, device=device)

    def add(self, *values):
        values = torch.stack([value.detach().float() for value in values])
        self.first_bad = torch.where(~values.isfinite() & (self.first_bad < 0), self.count, self.first_bad)
        self.sums += values
        self.count += 1

    def check(self):
        """Raises FloatingPointError naming the first term and step (counted from 0 in this phase) that was not finite."""
        for name, step, total in zip(self.names, self.first_bad.tolist(), self.sums.tolist()):
            if step >= 0:
                raise FloatingPointError(f"{name} became {total} at step {step} of its phase")

    def take(self):
        """{name: mean} since the last `take`; checks first."""
        self.check()
        means = dict(zip(self.names, (self.sums / max(self.count, 1)).tolist()))
        self.sums.zero_()
        self.count = 0
        return means

    def state_dict(self):
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state):
        self.sums.copy_(state["sums"])
        self.count = state["count"]


def newest_by_class(pixels, labels, num_classes, each=8):
    """The latest `each` of uint8 pixels (M, C, H, W) in every class, black where there are fewer.   -> (K, each, C, H, W)"""
    shown = pixels.new_zeros(num_classes, each, *pixels.shape[1:])
    for label in range(num_classes):
        found = (labels[:len(pixels)] == label).nonzero()[-each:, 0]
        shown[label, :len(found)] = pixels[found]
    return shown


def report_collapse(run, pixels, pseudo_labels=None, low_entropy_steps=0, **where):
    """A row of its own when a batch, `pixels` in [0, 1], shows that its synthesis collapsed. -> the deviation between its images

    One image (2 or 3 of 255 grey levels apart), one class for the teacher (`pseudo_labels`, (N,)), or the entropy of the batch's mean
    prediction under half of log K for the last 50 steps or more: `low_entropy_steps`, which the caller counts.
    """
    pixel_std, found = pixels.std(0, correction=0).mean().item(), []
    if pixel_std < 0.01:
        found.append("its images hardly differ")
    if pseudo_labels is not None and len(set(pseudo_labels.tolist())) == 1:
        found.append(f"the teacher sees a whole batch in class {pseudo_labels[0].item()}")
    if low_entropy_steps >= 50:
        found.append(f"the entropy of its classes is under half of the largest for {int(low_entropy_steps)} steps")
    if found:
        at = " ".join(f"{key.replace('_', ' ')} {value}" for key, value in where.items())
        run.report(event="collapse", **where, pixel_std=pixel_std, text=f"{at}: the synthesis collapsed: {', '.join(found)}")
    return pixel_std


def steps(state, name, total, run=None):
    """`range(total)` whose counter is state[name + "_step"], so that a stopped run goes on in the middle of a loop.

    Adds the loop's seconds to state["seconds_" + name] and calls run.tick(state) after every step.
    """
    step, seconds = f"{name}_step", f"seconds_{name}"
    with tqdm(total=total, initial=state[step], desc=name, leave=False, disable=None) as bar:
        while state[step] < total:
            began = time.perf_counter()
            yield state[step]
            if state[step] == total - 1 and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            state[step] += 1
            state[seconds] += time.perf_counter() - began
            bar.update()
            if run:
                run.tick(state)


if __name__ == "__main__":     # python common.py --model resnet34 --dataset cifar10: train a teacher by itself
    from run import train_main
    train_main()
