"""common.py: the helpers that every method file imports. No distillation loss is here.

    1  images and their description    DataSpec, normalisation, crops and flips of whole batches
    2  looking inside a network        inputs and BatchNorm statistics of any layer; freezing; what it answers
    3  inside a long loop              batches, means, learning rates, seeds, progress bars
    4  scores                          accuracy, agreement, calibration; pictures that need no data set
    5  data sets                       whole sets as uint8 tensors on the device
    6  models                          the field's small classifiers by name, torchvision's, your own

The command line, teachers and run folders are in running.py, which only a method's main() uses. If you take a
method into your own project, take this file with it and leave running.py behind.

Two words are kept apart everywhere. *Images* are what a network takes: values after normalisation with the
mean and standard deviation of the data. *Pixels* are values in [0, 1], for cropping, storing and looking at.

Letters: N images in a batch, K classes, D features; an image is C x H x W. Sources: [ours] a choice of this
repository; [leaves] mbaradad/learning_with_noise, the code of arXiv 2106.05963.
"""
import collections
import contextlib
import copy
import functools
import hashlib
import importlib
import inspect
import io
import itertools
import math
import os
import re
import sys
import time
import traceback
import typing
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms import v2
from tqdm import tqdm


class BadInput(ValueError):
    """The user's input cannot be used. Its text is one sentence: what is wrong, and what to type instead."""


# ---------------------------------------------------------------------------- 1. images and their description
class DataSpec(NamedTuple):
    """All that a data-free student may know about the data. It holds no image."""
    image_shape: tuple   # (C, H, W)
    num_classes: int
    mean: tuple          # for each channel, the constants with which the teacher's images were normalised:
    std: tuple           # image = (pixel - mean) / std, with pixels in [0, 1]
    crop: int = 0        # the training data were padded with so many zeros, then cropped back; 0 = not at all
    flip: bool = False   # the training data were mirrored with probability 1/2


class ImageSet(NamedTuple):
    """Real images with labels, all on the device. No data-free `distill` receives one."""
    pixels: torch.Tensor   # (N, C, H, W) uint8; value / scale is in [0, 1]
    labels: torch.Tensor   # (N,) int64
    scale: float = 255.0   # 16 for `digits`, whose files hold 17 grey levels


class Preset(NamedTuple):
    """All that a run needs. `--preset NAME` takes it as it is, and every flag changes one thing in it."""
    dataset: str
    teacher: str         # a model name, torchvision:NAME, a file, or module:function
    student: str
    settings: object     # the method's Settings


@functools.lru_cache           # kept on the device: a copy from the host at every step would make a GPU wait
def _on_device(values, device):
    with torch.inference_mode(False):      # a tensor made in inference mode could not be used in training
        return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _per_channel(values, like):
    return _on_device(tuple(values), like.device)


def row_major(images):
    """The same images, in the plain order of memory that every network takes, also one that calls x.view."""
    return images.contiguous().view(images.shape)       # with one channel contiguous() alone may not do it


def normalize(pixels, data):
    """pixels (N, C, H, W) in [0, 1] -> images: (pixels - mean) / std per channel, in row-major order."""
    return row_major((pixels - _per_channel(data.mean, pixels)) / _per_channel(data.std, pixels))


def sane_spec(data):
    """A DataSpec from somebody else's code, with tuples where she wrote lists or tensors.   -> DataSpec

    Raises BadInput if it is no DataSpec, or if its numbers cannot be what they are said to be.
    """
    try:
        shape, classes, mean, std, crop, flip = data
        if len(shape) != 3 or classes < 2 or any(int(n) != n for n in (*shape, classes, crop)):
            raise ValueError
        data = DataSpec(tuple(map(int, shape)), int(classes), tuple(float(value) for value in mean),
                        tuple(float(value) for value in std), int(crop), bool(flip))
    except (TypeError, ValueError):
        raise BadInput("a DataSpec needs image_shape=(C, H, W), num_classes, mean and std with one number "
                       f"for each channel, and may have crop and flip; this is {short(data)}") from None
    check_spec(data)
    return data


def check_spec(data):
    """Raises BadInput for a DataSpec with numbers that cannot be right."""
    if not isinstance(data, DataSpec):
        raise BadInput(f"data must be a DataSpec of common.py, not {type(data).__name__}")
    channels, height, width = data.image_shape
    if channels > 16:
        raise BadInput("image_shape is (channels, height, width), with 16 channels at most; this one has "
                       f"{channels}")
    if not (1 <= height <= 1024 and 1 <= width <= 1024 and 2 <= data.num_classes <= 100_000
            and 0 <= data.crop <= min(height, width)):
        raise BadInput("image_shape may have sides of 1 to 1024, num_classes may be 2 to 100,000, and crop 0 "
                       f"to a side; this is {data.image_shape}, {data.num_classes} and {data.crop}")
    if not (len(data.mean) == len(data.std) == channels and all(0 <= mean <= 1 for mean in data.mean)
            and all(0.004 <= std <= 1 for std in data.std)):
        raise BadInput(f"mean {data.mean} and std {data.std} are not those of pixels in [0, 1], one number "
                       f"for each of the {channels} channels; a network that takes other units, such as 0 to "
                       "255, converts them in its forward: x = 255 * (x * std + mean)")


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
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def augment(pixels, data):
    """Crop and mirror every image at random, as the training data were: (N, C, H, W) -> the same shape."""
    if not data.crop and not data.flip:
        return pixels
    n, device = len(pixels), pixels.device
    top, left = torch.randint(0, 2 * data.crop + 1, (2, n), device=device)
    flip = torch.rand(n, device=device) < 0.5 if data.flip else None
    return crop_by_offsets(pixels, data.crop, top, left, flip)


# -------------------------------------------------------------------------------- 2. looking inside a network
@contextlib.contextmanager
def _recorded(modules, what):
    """Inside the block, each pass through a module leaves what(module, input); no hook is left after it."""
    seen, handles = {}, []

    def keep(module, positional, named):
        for value in (*positional, *named.values()):
            if torch.is_tensor(value):                                       # the first tensor is the input
                seen[module] = what(module, value)
                return
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def recorded_inputs(modules):
    """`with recorded_inputs([layer]) as seen: model(images)`; then seen[layer] is the layer's latest input.

    The input is converted to float32 and keeps its graph. This works on any nn.Module.
    """
    # a layer that works in place would overwrite what was recorded
    return _recorded(modules, lambda module, x: (
        x.float().clone() if getattr(module, "inplace", False) else x.float()))


def recorded_statistics(modules):
    """`with recorded_statistics(layers) as seen: model(images)`; then seen[layer] = (mean, variance).

    Both are (channels,), float32, of the layer's *input* over all its other dimensions, and keep their graph.
    The channels of a linear layer's input are its last dimension. Those of other layers are the second.
    """
    return _recorded(modules, lambda module, x: Moments.apply(
        x.movedim(-1, 1) if isinstance(module, nn.Linear) else x))


class Moments(torch.autograd.Function):
    """x (N, C, ...) -> mean (C,), biased variance (C,), float32, with one backward pass for both.

    d mean / dx = 1 / n and d variance / dx = 2 (x - mean) / n: the gradient is slope x + offset. On a CPU,
    torch.var_mean and its backward pass would take a third of CSD's synthesis step.
    """
    @staticmethod
    def forward(ctx, x):
        if x.device.type == "cpu" and x.dtype != torch.float64:
            unused = torch.zeros(x.shape[1])       # in float32, which makes the answer float32 for bf16 too
            mean, variance = torch.ops.aten.batch_norm_update_stats(x, unused, unused, 0.0)
        else:
            variance, mean = torch.var_mean(x.float(), (0, *range(2, x.dim())), correction=0)
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
        model(torch.zeros(2, *data.image_shape, device=next(model.parameters(), torch.empty(0)).device))
    return seen


def batchnorms(model, data):
    """The layers with running statistics that a forward pass uses, in order of registration.

    BatchNorm of one, two or three dimensions, SyncBatchNorm, FrozenBatchNorm2d and others like them. Layers
    of auxiliary classifiers do not run in eval mode, so they are left out. So is InstanceNorm, whose
    statistics are those of single images.
    """
    layers = [layer for layer in model.modules() if torch.is_tensor(getattr(layer, "running_mean", None))
              and not isinstance(layer, nn.modules.instancenorm._InstanceNorm)]
    used = probe(model, layers, data)
    return [layer for layer in layers if layer in used]


def why_no_batchnorm(model):
    """Why `batchnorms` found no layer, in words that follow a colon."""
    if any(torch.is_tensor(getattr(layer, "running_mean", None)) for layer in model.modules()):
        return "its layers keep statistics of single images (InstanceNorm) or do not run in eval mode"
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        return "its BatchNorm layers keep no running statistics"
    return "the teacher has no BatchNorm"


def last_linear(model):
    """The nn.Linear that is registered last; its input is the feature vector (N, D).

    Raises BadInput if there is none.
    """
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
    # a partial of a bound method, not a function of its own, so that copy.deepcopy rebinds it to the copy
    network.forward, network.in_bf16 = functools.partial(_forward_in_bf16, network.forward), True
    return network


def _forward_in_bf16(forward, x):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=not _scoring):
        return logits_of(None, x, forward(x)).float()


def place_like(network, other):
    """Move a fresh network of ours to where `other` is: its device, precision and channels_last order."""
    network.to(next(other.parameters()).device, memory_format=torch.channels_last)
    return in_bf16(network) if getattr(other, "in_bf16", False) else network


def logits_of(network, inputs, answer):
    """A forward hook: the logits in an answer that is a tensor, or an object or a dict that has `logits`."""
    if isinstance(answer, dict):
        return answer.get("logits", answer)
    return getattr(answer, "logits", answer)


def check_answers(model, name, data, training=False, gradient=False):
    """Raises BadInput unless the network turns images of this shape into finite logits (N, K).

    `training`: in train mode, where some give more than logits: answers of auxiliary classifiers. `gradient`:
    its answer must have a gradient for the images. Draws no random number of the caller's.
    """
    try:
        device = next(model.parameters(), torch.empty(0)).device
        with torch.no_grad(), frozen(model), scoring(), seeded(0):
            images = normalize(torch.rand(4, *data.image_shape), data).to(device)
            logits = copy.deepcopy(model).train()(images) if training else model(images)
        if not torch.is_tensor(logits) and not training:
            raise BadInput(f"{name} answers with {describe_answer(logits)}; let it return the logits (N, K)")
        finite = bool(logits.isfinite().all())
    except BadInput:
        raise
    except Exception as error:
        if training:
            raise BadInput(f"{name} cannot be trained on images of shape {data.image_shape}: in train mode "
                           "it fails, or gives more than logits; remove auxiliary classifiers "
                           f"({short(error)})") from None
        kind = next(model.parameters(), torch.empty(0)).dtype
        advice = "" if kind == torch.float32 else f"; its weights are {kind}: call .float() on it"
        raise BadInput(f"{name} does not take images of shape {tuple(data.image_shape)} "
                       f"({short(error)}){advice}") from None
    if logits.shape != (4, data.num_classes) or not finite:
        found = f"{tuple(logits.shape)} for four images" if finite else "numbers that are not finite"
        raise BadInput(f"{name} does not answer images of shape {tuple(data.image_shape)} with finite logits "
                       f"(N, {data.num_classes}), but with {found}")
    if gradient and next(model.parameters(), None) is None:
        raise BadInput(f"{name} has no parameters, which say where to put the generator; let its weights be "
                       "nn.Parameter")
    if gradient:
        with frozen(model), scoring():
            if not model(images.requires_grad_()).requires_grad:
                raise BadInput(f"{name} has no gradient for its images, perhaps because its forward is under "
                               "torch.no_grad(); without one, only surrogate_kd.py and regulated_kd.py can "
                               "use it")
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        raise BadInput(f"{name} answers with probabilities, whose rows sum to 1; let it return what goes "
                       "into its softmax, or the logarithm of the probabilities")


def describe_answer(answer):
    keys = f" with the keys {', '.join(map(str, answer))}" if isinstance(answer, dict) else ""
    return f"a {type(answer).__name__}{keys}"


def short(error):
    """An exception's text in one line, without a terminal's colours."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())[:160]


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


# -------------------------------------------------------------------------------------- 3. inside a long loop
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


def to_bytes(pixels):
    """pixels in [0, 1] -> uint8, rounded down."""
    return (255 * pixels.clamp(0, 1)).to(torch.uint8)


def fill_bank(synthesize, rounds, n, data, device, run=None, **state):
    """A bank of images as one tensor of bytes: `rounds` batches of n, each from a call of `synthesize`.

    `synthesize()` -> pixels (n, C, H, W), the classes asked for (n,), mean losses. `run` writes log and
    checkpoints, which keep `state`, too.   -> pixels (rounds n, C, H, W) uint8, classes (rounds n,)
    """
    pixels = torch.zeros(rounds * n, *data.image_shape, dtype=torch.uint8, device=device)
    labels = torch.zeros(len(pixels), dtype=torch.long, device=device)
    for number in range(run.resume(pixels=pixels, labels=labels, **state) if run else 0, rounds):
        made, targets, losses = synthesize()
        rows = slice(number * n, (number + 1) * n)
        pixels[rows], labels[rows] = to_bytes(made), targets
        if run:
            run.log(number, losses, made, targets)
    return pixels, labels


class Means:
    """Means of named terms over a phase. The sums stay on the device, so no step waits for a GPU."""
    def __init__(self):
        self.sums, self.counts = {}, collections.Counter()

    def add(self, **terms):
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + (
                value.detach().float() if torch.is_tensor(value) else value)
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


def check_words(settings):
    """Raises BadInput for a setting that is none of the words that it may be, its Literal."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        words = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        if words and getattr(settings, name) not in words:
            raise BadInput(f"{name} must be one of {', '.join(words)}, not {getattr(settings, name)!r}")


def seeded_and_checked(function):
    """Decorates what a method offers: a function of `teacher`, `data` and `settings`, perhaps of `student`.

    Before it runs, networks or data that cannot work are refused in one sentence (BadInput). While it runs,
    torch's generators start from settings.seed, and a network that answers with an object or a dict answers
    with the logits in it. A network from torch.compile is used as it was before, because compiled ones may
    ignore hooks. Afterwards everything is as it was, also the caller's random numbers.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        with contextlib.ExitStack() as stack:
            networks = {name: getattr(given[name], "_orig_mod", given[name])
                        for name in ("teacher", "student") if name in given}
            given.update(networks)
            for name, network in networks.items():
                if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
                    raise BadInput(f"the {name} must be a torch.nn.Module, not {type(network).__name__}")
                stack.callback(network.register_forward_hook(logits_of).remove)
            check_spec(given["data"])
            check_words(given["settings"])
            made = not {"train", "draw", "surrogate"} & {*signature.parameters}    # images from the teacher
            for name, network in networks.items():
                check_answers(network, f"the {name}", given["data"], gradient=made and name == "teacher")
            if "student" in networks:
                check_answers(networks["student"], "the student", given["data"], training=True)
            with seeded(given["settings"].seed):
                return function(*call.args, **call.kwargs)
    return wrapped


# -------------------------------------------------------------------------------------------------- 4. scores
_scoring = False


@contextlib.contextmanager
def scoring():
    """Inside the block, `in_bf16` has no effect and no teacher query is counted: for scores and probes."""
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
    """The share of rows on which two classifiers name the same class, right or wrong -> float in [0, 1].

    Also called fidelity, or top-1 agreement.
    """
    return accuracy(logits, other_logits.argmax(1))


def balanced_agreement(logits, teacher_logits):
    """`agreement`, taken for each class that the teacher names, and averaged over these [ours].

    logits (N, K) and (N, K) -> float in [0, 1]. This is the balanced accuracy with the teacher's classes as
    labels. Where the teacher names one class in most pictures, a student that always names this class agrees
    with it most of the time. Its balanced agreement is only 1 divided by the number of classes that the
    teacher names.
    """
    named = teacher_logits.argmax(1)                                         # (N,)
    same = (logits.argmax(1) == named).float()
    return torch.stack([same[named == label].mean() for label in named.unique()]).mean().item()


def expected_calibration_error(logits, labels, bins=15):
    """Mean |confidence - accuracy| over equal bins of confidence, weighted by their size -> float in [0, 1].

    logits (N, K), labels (N,). Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == labels).float()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1             # (N,) bin (b/15, (b+1)/15]
    gap = confidence.new_zeros(bins).index_add_(0, which, confidence - correct)
    return gap.abs().sum().item() / len(labels)


# Drawn pictures: a score for those who have no test images. The same for all students of a teacher.
@functools.cache
def drawn_pictures(data, n=None):
    """n dead leaves in the shape of the data, as bright strokes on black where images are grey; an ImageSet.

    n is 2,000, or 200 where images are larger than 64x64, so that drawing and scoring them stays quick.

    How often a student agrees with its teacher on them compares students of one teacher. It is no accuracy.
    They are always the same ones, drawn with one fixed seed, and nothing is trained on them, except
    by surrogate_kd.py --surrogate leaves, which draws others of the same kind.
    """
    size = max(32, *data.image_shape[1:])
    n = n or (2000 if size <= 64 else 200)
    at_once, parts = 2000 if size <= 64 else 20, []                          # a bound on memory
    with seeded(2 ** 31):
        for start in range(0, n, at_once):
            pixels = leaves_images(min(at_once, n - start), size)
            pixels = fit_pixels(strokes(pixels) if data.image_shape[0] == 1 else pixels, data)
            parts.append(to_bytes(pixels))
    return ImageSet(torch.cat(parts), None)


def leaf_radius_cdf(smallest):
    """How large leaves are: small ones are frequent, with density r^-3 - 1 for radius r [leaves].

    -> 200 radii from `smallest` to 1, where 1 is the side of the picture, and for each radius the part of the
    leaves that is not larger, (200,)
    """
    radii = torch.linspace(smallest, 1, 200)
    density = radii ** -3 - 1
    return radii, density.cumsum(0) / density.sum()


def leaves_images(n, size, device="cpu", leaves=200, smallest=0.1):
    """Dead leaves: discs and polygons of one colour each that cover one another [leaves].

    A leaf is a disc, a square, a rotated square, a rectangle, a triangle or a quadrilateral. We lay
    them from front to back, in all n pictures at once, so each leaf gets the pixels that are still empty.
    Pixels that are empty after the last leaf get that leaf's colour.
    """
    uniform = functools.partial(torch.rand, device=device)
    radii, cdf = (values.to(device) for values in leaf_radius_cdf(smallest))
    radius = radii[torch.searchsorted(cdf, uniform(leaves, n)).clamp(max=199)]            # (leaves, n)
    centre_x, centre_y, colour = uniform(leaves, n), uniform(leaves, n), uniform(leaves, n, 3)
    # The corners of a polygon lie on a circle, counter-clockwise. Each polygon has four angles; a triangle
    # has its third one twice.
    quarter = math.pi / 2 * torch.arange(4, device=device)
    tilt, free = math.pi / 2 * uniform(leaves, n, 1), uniform(leaves, n, 4)
    square = (quarter + math.pi / 4).expand(leaves, n, 4)
    rectangle = torch.cat([tilt, math.pi - tilt, math.pi + tilt, 2 * math.pi - tilt], 2)  # (leaves, n, 4)
    triangle = 2 * math.pi * free[..., [0, 1, 2]].sort(2).values[..., [0, 1, 2, 2]]
    turned, quadrilateral = square + 2 * math.pi * uniform(leaves, n, 1), 2 * math.pi * free.sort(2).values
    kinds = torch.stack([square, turned, rectangle, triangle, quadrilateral])
    kind = torch.randint(6, (leaves, n), device=device)                                # 5 is a disc
    angle = kinds.gather(0, kind.clamp(max=4)[None, :, :, None].expand(1, -1, -1, 4))[0]  # (leaves, n, 4)
    x = centre_x[..., None] + radius[..., None] * angle.cos()
    y = centre_y[..., None] + radius[..., None] * angle.sin()
    edge_x, edge_y = x.roll(-1, 2) - x, y.roll(-1, 2) - y
    place = (torch.arange(size, device=device) + 0.5) / size                       # (s,), the pixels' centres
    first = torch.full((n, size, size), leaves, dtype=torch.long, device=device)       # the leaf that is seen
    for leaf in range(leaves):
        # a pixel p is inside if it is left of every edge: edge × (p - corner) >= 0. The product is a number
        # for the column plus a number for the row
        by_column = -edge_y[leaf][..., None] * (place - x[leaf][..., None])               # (n, 4, s)
        by_row = edge_x[leaf][..., None] * (place - y[leaf][..., None])                   # (n, 4, s)
        polygon = (by_column[:, :, None, :] + by_row[:, :, :, None]).amin(1) >= 0         # (n, s, s)
        across, down = (place - centre_x[leaf][:, None]) ** 2, (place - centre_y[leaf][:, None]) ** 2
        disc = across[:, None, :] + down[:, :, None] <= (radius[leaf] ** 2)[:, None, None]    # (n, s, s)
        inside = torch.where((kind[leaf] == 5)[:, None, None], disc, polygon)
        first[inside & (first == leaves)] = leaf
        if leaf % 20 == 19 and not (first == leaves).any():
            break
    seen = first.clamp(max=leaves - 1).flatten(1)[..., None].expand(-1, -1, 3)            # (n, s·s, 3)
    return colour.transpose(0, 1).gather(1, seen).transpose(1, 2).unflatten(2, (size, size))


def strokes(pixels):
    """Bright marks on black, for teachers of grey digits and clothes [ours].

    Each picture is turned to grey with random weights of its channels, and half of the pictures are inverted.
    Then a soft threshold leaves 5 to 50 % of a picture bright.
    (n, C, H, W) -> (n, 1, H, W), both in [0, 1]
    """
    uniform = functools.partial(torch.rand, device=pixels.device)
    n, weights = len(pixels), uniform(len(pixels), pixels.shape[1], 1, 1)
    grey = (pixels * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)         # (n, 1, H, W)
    grey = torch.where(uniform(n, 1, 1, 1) < 0.5, 1 - grey, grey)                  # half of the pictures
    ordered = grey.flatten(1).sort(1).values
    level = ordered.gather(1, ((0.5 + 0.45 * uniform(n, 1)) * ordered.shape[1]).long())   # (n, 1)
    steepness = 2 ** (1 + 3 * uniform(n, 1, 1, 1))
    deviation = grey.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return torch.sigmoid(steepness * (grey - level[..., None, None]) / deviation)


def fit_pixels(pixels, data):
    """Pixels of any shape in the shape of the teacher's data: grey if that is grey, and resized.

    (N, C', H', W') -> (N, C, H, W), in [0, 1]
    """
    channels, *size = data.image_shape
    if pixels.shape[1] != channels:
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(pixels.shape[2:]) != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels.clamp(0, 1)


# ----------------------------------------------------------------------------------------------- 5. data sets
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
    centre cropped; its DataSpec has flips, and crops by an eighth of a side. `cifar10-val` and its like: the
    last 5,000 training images are the test set, the rest is the training set. All sets but `digits` and
    folders are read from `data_dir`, or downloaded into it if they are not there. Raises BadInput if the set
    is unknown, or can neither be found nor downloaded.
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


def real_pictures(name, data_dir="data"):
    """The pictures, without labels, of a data set's training images or of all that is in folder:PATH.

    -> how many there are; read(rows, size) -> pixels (n, C, H, W) in [0, 1]; a text that changes if a file is
    added, renamed or has another length
    Raises BadInput as `load_dataset` does, for a folder without pictures, and for a picture that is damaged
    or has 16 bits for a grey level.
    """
    if not name.startswith("folder:"):
        (pixels, _, scale), _ = load_dataset(name, True, data_dir)
        return len(pixels), lambda rows, size: pixels[rows] / scale, ""
    path, kinds = name.removeprefix("folder:"), torchvision.datasets.folder.IMG_EXTENSIONS
    names = [file for file in Path(path).rglob("*") if file.suffix.lower() in kinds and file.is_file()]
    names = sorted(names) if path else []
    if not names:
        raise BadInput(f"there is no picture in folder '{path}'; name one with {', '.join(kinds)} files")

    def read(rows, size):
        cut = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
        found = []
        for row in rows:
            try:
                found.append(cut(_read_picture(names[row])))
            except BadInput:
                raise
            except Exception as error:      # PIL raises many kinds of exception for what it cannot read
                raise BadInput(f"{names[row]} is no whole image ({error})") from None
        return torch.stack(found) / 255
    content = repr([(str(file), file.stat().st_size) for file in names])
    return len(names), read, hashlib.sha256(content.encode()).hexdigest()[:16]


def _read_picture(path, mode="RGB"):
    """A picture file in this mode of PIL. A conversion of 16 bits to 8 would turn most grey levels white."""
    from PIL import Image, ImageOps
    with Image.open(path) as picture:
        if picture.mode[0] in "IF":                                          # integers or floats
            raise BadInput(f"{path} has more than 8 bits for a grey level; save it with 8")
        return ImageOps.exif_transpose(picture).convert(mode)                # as the camera was held


def some_pictures(name, n, data):
    """At most n of the pictures `name` of `real_pictures`, at random: pixels (n, C, H, W) in [0, 1].

    Each is shrunk, cut to its middle square, and given the shape of the data.
    """
    available, read, _ = real_pictures(name)
    return fit_pixels(read(torch.randperm(available)[:n], max(data.image_shape[1:])), data)


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


def _all_grey(files):
    """Whether every one of these pictures has one channel, so that they should keep it."""
    from PIL import Image

    def mode(file):
        with Image.open(file) as image:
            return image.mode
    return all(mode(file) in ("1", "L") for file in files)


def _read_folder(name, train, device):
    """Images in class folders; mean and std are always those of PATH/train."""
    path, _, size = re.fullmatch(r"folder:(.*?)(@(\d+))?", name, re.S).groups()
    if size and not 1 <= int(size) <= 1024:
        raise BadInput(f"'{name}': the size after @ must be 1 to 1024 pixels")
    resize = [v2.Resize(int(size)), v2.CenterCrop(int(size))] if size else []
    sets = {}
    for part in ("train", "test"):
        root = Path(path, part)
        if not root.is_dir():
            raise BadInput(f"'{name}' needs the folder {root} with one folder a class in it; {NO_DOWNLOAD}")
        try:
            sets[part] = torchvision.datasets.ImageFolder(root, v2.Compose([*resize, v2.PILToTensor()]))
        except FileNotFoundError as error:
            raise BadInput(f"{root} holds no class folders with images ({error})") from None
        if len(sets[part].classes) < 2:
            raise BadInput(f"{root} holds one class folder; at least two are needed")
    classes = sets["train"].classes
    if classes != sets["test"].classes:
        raise BadInput(f"{path}/train and {path}/test hold different class folders")

    def read(part):
        try:
            return torch.stack([image for image, _ in sets[part]])
        except RuntimeError:
            raise BadInput(f"the images in {path} differ in size; give one, for example {name}@32") from None
    try:
        grey = _all_grey(file for each in sets.values() for file, _ in each.samples)
        for each in sets.values():
            each.loader = functools.partial(_read_picture, mode="L" if grey else "RGB")
        if not size and sets["train"][0][0].shape != sets["test"][0][0].shape:
            raise BadInput(f"the images in {path} differ in size; give one, for example {name}@32")
        reference = read("train")
        pixels = reference if train else read("test")
    except BadInput:
        raise
    except Exception as error:              # PIL raises many kinds of exception for what it cannot read
        raise BadInput(f"{path} holds a file that is no whole image ({error})") from None
    # by counting the levels of each channel, because all pixels in float64 would need eight times the memory
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256)
                          for channel in reference.transpose(0, 1)]).double()               # (C, 256)
    p, level = counts / counts.sum(1, keepdim=True), torch.arange(256) / 255
    mean = (p * level).sum(1, keepdim=True)
    std = (p * (level - mean) ** 2).sum(1).sqrt().clamp(min=4e-3)
    mean, std = (tuple(round(value, 4) for value in values.flatten().tolist()) for values in (mean, std))
    data = DataSpec(tuple(pixels.shape[1:]), len(classes), mean, std, crop=pixels.shape[-1] // 8, flip=True)
    labels = torch.tensor(sets["train" if train else "test"].targets)
    return ImageSet(pixels.to(device), labels.to(device)), data


# -------------------------------------------------------------------------------------------------- 6. models
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
        return from_function(name, num_classes)[0]
    check_model_name(name)
    if height != width:
        raise BadInput(f"model '{name}' takes square images, not {height}x{width}")
    wide = re.fullmatch(r"wrn(\d+)_(\d+)", name)
    if wide:
        return WideResNet(int(wide[1]), int(wide[2]), num_classes, channels)
    return MODELS[name](num_classes, channels, height)


def from_function(name, num_classes=None, pretrained=False):
    """'torchvision:NAME', with its weights if `pretrained`, or what 'package.module:function' returns.

    -> the network, which answers with logits, also if it was written to answer with an object or a dict that
    has them; and the DataSpec if the function returns a pair, else None
    Raises BadInput if the function cannot be called, or returns something else.
    """
    module_name, _, function = name.partition(":")
    try:
        if module_name == "torchvision":
            options = {"weights": "DEFAULT"} if pretrained else {"num_classes": num_classes}
            found = torchvision.models.get_model(function, **options)
        else:
            sys.path.insert(0, os.getcwd())
            try:
                found = getattr(importlib.import_module(module_name), function)()
            finally:
                sys.path.remove(os.getcwd())
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(f"'{name}' could not be built ({type(error).__name__}: {short(error)}; line "
                       f"{where.lineno} of {Path(where.filename).name}); it must be torchvision:NAME or "
                       "package.module:function, a function without arguments") from None
    network, data = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    network = getattr(network, "_orig_mod", network)     # torch.compile's ignores hooks
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        forgotten = "; is a `return` missing?" if network is None else ""
        raise BadInput(f"'{name}' returned {type(network).__name__}, not a torch.nn.Module{forgotten}")
    network.cpu().register_forward_hook(logits_of)
    return network, data if data is None else sane_spec(data)


if __name__ == "__main__":     # python common.py --model resnet34 --dataset cifar10
    from running import main
    main()
