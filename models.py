"""models.py: the field's small classifiers, each `forward(images) -> logits (N, K)` and nothing else.

CIFAR ResNet-18/34/50, WRN-d-k by name (`wrn16_2`), VGG-8/11/13 with BN, LeNet-5 and AlexNet with their halves, MobileNetV2 at half
width; any other as torchvision:NAME or package.module:function. Parameter counts as published.

Letters: N batch, K classes, C H W image.
"""
import importlib
import os
import re
import sys

import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common import BadInput


# A model names `last_map`: the module whose *input* is its last feature map. It is a property, so that the module is
# registered once and the state_dict has no double.
class CifarResNet(ResNet):
    """torchvision's ResNet with the stem for small images: 3x3 stride 1, no max-pool. ResNet-18: 11,173,962 parameters."""
    def __init__(self, block, layers, num_classes, channels):
        super().__init__(block, layers, num_classes=num_classes)
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    last_map = property(lambda self: self.avgpool)       # after stage 4 and its ReLU


class WideBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-conv3x3 plus the shortcut. Where the width changes, both branches take the BN-ReLU output."""
    def __init__(self, width_in, width_out, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width_in), nn.BatchNorm2d(width_out)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False) if width_in != width_out else None

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        kept = x if self.shortcut is None else self.shortcut(out)
        return kept + self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True))


class WideResNet(nn.Module):
    """WRN-depth-k, pre-activation. WRN-40-2: 2,243,546 parameters; WRN-16-1: 175,066 (K = 10, C = 3)."""
    def __init__(self, depth, widen, num_classes, channels):
        super().__init__()
        widths, blocks = (16, 16 * widen, 32 * widen, 64 * widen), (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.groups = nn.Sequential(*[
            WideBlock(widths[group] if block == 0 else widths[group + 1], widths[group + 1], 2 if group and not block else 1)
            for group in range(3) for block in range(blocks)])                            # (N, 64k, H/4, W/4)
        self.bn = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")                    # N(0, 2 / (k² C_out))
        nn.init.zeros_(self.fc.bias)

    last_map = property(lambda self: self.bn)            # group 3 *before* the final BN-ReLU: signed values

    def forward(self, x):
        x = F.relu(self.bn(self.groups(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """VGG with BN for small images: five blocks, max-pool before blocks 1, 2 and 3, global average pool, one linear layer."""
    def __init__(self, convolutions, num_classes, channels):
        super().__init__()
        layers, width_in = [], channels
        for block, (width, count) in enumerate(zip((64, 128, 256, 512, 512), convolutions)):
            layers += [nn.MaxPool2d(2)] if block in (1, 2, 3) else []
            for _ in range(count):
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                width_in = width
        self.features = nn.Sequential(*layers)                                            # (N, 512, H/8, W/8)
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
    """LeNet-5 as the data-free papers use it: 61,706 parameters, half width 15,738; with BN 44 and 22 more (C = 1, K = 10).

    No padding at 32x32; the first convolution padded by 2 at 28x28, both at 8x8, so that conv3 always ends in one pixel.
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

    def forward(self, x):                                                                 # at 32x32:
        x = self.pool1(F.relu(self.norm1(self.conv1(x))))                                 # (N, 6, 14, 14)
        x = self.pool2(F.relu(self.norm2(self.conv2(x))))                                 # (N, 16, 5, 5)
        x = F.relu(self.conv3(x)).flatten(1)                                              # (N, 120)
        return self.fc2(F.relu(self.fc1(x)))


class AlexNet(nn.Module):
    """AlexNet for 32x32, BN and ReLU after each convolution, no dropout: 23,474,250 parameters, half width 5,882,922 (K = 10, C = 3)."""
    def __init__(self, divisor, num_classes, channels, size):
        super().__init__()
        if size != 32:
            raise BadInput(f"alexnet takes images of 32x32, not {size}x{size}")
        layers, width_in = [], channels
        for width, kernel, padding, pool in ((64, 5, 0, True), (192, 5, 2, True), (384, 3, 1, False), (256, 3, 1, False),
                                             (256, 3, 1, True)):
            width //= divisor
            layers += [nn.Conv2d(width_in, width, kernel, padding=padding), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(3, 2)] if pool else []
            width_in = width
        self.features = nn.Sequential(*layers[:-1])                                       # (N, 256, 6, 6)
        self.pool = layers[-1]                                                            # (N, 256, 2, 2)
        wide = 4096 // divisor
        self.fc = nn.Sequential(nn.Linear(4 * width_in, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, num_classes))

    last_map = property(lambda self: self.pool)

    def forward(self, x):
        return self.fc(self.pool(self.features(x)).flatten(1))


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project. The expansion is there also where its factor is 1 (torchvision leaves it out)."""
    def __init__(self, width_in, width_out, stride, expand):
        super().__init__()
        hidden = width_in * expand
        self.body = nn.Sequential(
            nn.Conv2d(width_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, width_out, 1, bias=False), nn.BatchNorm2d(width_out))
        self.residual = stride == 1 and width_in == width_out

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 at half width for 32x32 (stem stride 2, last layer 1280 wide): 697,546 parameters (K = 10, C = 3)."""
    def __init__(self, num_classes, channels):
        super().__init__()
        width = 16
        layers = [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        for expand, width_out, count, stride in ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2),
                                                 (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1)):
            for block in range(count):
                layers.append(InvertedResidual(width, width_out, stride if block == 0 else 1, expand))
                width = width_out
        self.features = nn.Sequential(*layers)                                            # (N, 160, 2, 2) at 32x32
        self.conv_last = nn.Conv2d(width, 1280, 1, bias=False)
        self.bn_last = nn.BatchNorm2d(1280)
        self.fc = nn.Linear(1280, num_classes)

    last_map = property(lambda self: self.conv_last)     # before the 1x1 convolution to 1280

    def forward(self, x):
        x = F.relu6(self.bn_last(self.conv_last(self.features(x))))
        return self.fc(x.mean((2, 3)))


MODELS = {  # name: builder(num_classes, channels, size). WRN-d-k is built by name, any depth 6n + 4 and width
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
    "mobilenetv2": lambda k, c, s: MobileNetV2(k, c),
}


def check_model_name(name):
    """Raises BadInput unless `build_model` knows the name; returns it."""
    wide = re.fullmatch(r"wrn([1-9]\d?\d?)_([1-9]\d?)", name)
    if name in MODELS or (wide and int(wide[1]) >= 10 and int(wide[1]) % 6 == 4):
        return name
    raise BadInput(f"unknown model '{name}'; choose from {', '.join(MODELS)}, wrnDEPTH_WIDTH (depth 6n + 4, as in wrn16_2), "
                   "or package.module:function for your own")


def build_model(name, num_classes, image_shape):
    """A fresh classifier with `forward(images) -> logits (N, K)`. Weights are drawn from torch's global generator.

    `name`: one of MODELS, 'wrnDEPTH_WIDTH', 'torchvision:NAME' (untrained) or 'package.module:function' (called without
    arguments). Raises BadInput for an unknown name or an image size that the model does not take.
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
    """The network of 'torchvision:NAME', with torchvision's weights if `pretrained`, or of 'package.module:function'()."""
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
