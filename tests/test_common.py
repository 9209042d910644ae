"""common.py, rooms 1 to 5: data sets, models, looking inside a network, measuring, long loops."""
import copy
import itertools
import math
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms.functional import crop, hflip, pad

import common
from common import BadInput, build_model, last_linear
from conftest import tiny_networks
from helpers import equal, weights_of
from test_methods import looks


# ------------------------------------------------------------------------------------------------------- 1. data sets
def test_digits_are_the_split_that_the_constants_describe():
    (train, data), (test, same) = common.load_dataset("digits", True), common.load_dataset("digits", False)
    assert train.pixels.shape == (1437, 1, 8, 8) and test.pixels.shape == (360, 1, 8, 8) and data == same
    pixels = train.pixels.double() / train.scale
    assert train.pixels.dtype == torch.uint8 and pixels.max() == 1
    assert pixels.mean().item() == pytest.approx(data.mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(data.std[0], abs=1e-4)
    everything = torch.cat([train.pixels, test.pixels]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797 and set(test.labels.tolist()) == set(range(10))


@pytest.mark.parametrize("name, class_name, stored, shape", [
    ("mnist", "MNIST", (7, 28, 28), (1, 32, 32)), ("mnist28", "MNIST", (7, 28, 28), (1, 28, 28)),
    ("fashion_mnist", "FashionMNIST", (7, 28, 28), (1, 32, 32)), ("svhn", "SVHN", (7, 3, 32, 32), (3, 32, 32)),
    ("cifar10", "CIFAR10", (7, 32, 32, 3), (3, 32, 32)), ("cifar100", "CIFAR100", (7, 32, 32, 3), (3, 32, 32))])
def test_torchvisions_sets_come_in_one_order(name, class_name, stored, shape, monkeypatch):
    values, asked = torch.arange(math.prod(stored)).reshape(stored).to(torch.uint8), []

    class Found:
        def __init__(self, folder, download, **which):
            asked.append((str(folder), download, which))
            self.data = values.numpy() if class_name != "MNIST" else values
            self.targets = self.labels = [3, 1, 4, 1, 5, 9, 2]
    monkeypatch.setattr(torchvision.datasets, class_name, Found)
    found, data = common.load_dataset(name, False, "somewhere")
    assert asked == [("somewhere", False, {"split": "test"} if name == "svhn" else {"train": False})]
    assert found.pixels.shape == (7, *shape) and found.labels.tolist() == [3, 1, 4, 1, 5, 9, 2]
    assert found.pixels.dtype == torch.uint8 and found.labels.dtype == torch.int64 and data.image_shape == shape
    expected = values[:, None] if values.dim() == 3 else values.permute(0, 3, 1, 2) if stored[-1] == 3 else values
    if shape[1] == stored[2]:
        assert torch.equal(found.pixels, expected)


def test_unknown_and_missing_data_are_refused_with_the_way_out(tmp_path, monkeypatch):
    def no_network(*args, download, **more):
        raise OSError("no route to host" if download else "not found")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
    for name, words in (("cifar11", ["unknown data set", "digits"]), ("imagenet", ["not read here"]),
                        ("cifar10", [str(tmp_path), "no route to host", "--dataset digits"]),
                        ("folder:nowhere", ["nowhere/train", "one folder a class", "--dataset digits"]),
                        ("folder:x@0", ["1 to 1024"]), ("folder:x@99999", ["1 to 1024"])):
        with pytest.raises(BadInput) as error:
            common.load_dataset(name, True, tmp_path)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_folder_of_images(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for label, colour in (("cat", 40), ("dog", 200)):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20, 16), (colour, colour, number)).save(tmp_path / part / label / f"{number}.png")
    train, data = common.load_dataset(f"folder:{tmp_path}@8", True)
    test, same = common.load_dataset(f"folder:{tmp_path}@8", False)
    assert train.pixels.shape == (6, 3, 8, 8) and test.labels.tolist() == [0, 0, 1, 1] and data == same
    assert data.num_classes == 2 and data.mean[0] == pytest.approx(120 / 255, abs=1e-3)
    assert data.std[0] == pytest.approx(80 / 255, abs=2e-3) and data.flip and data.crop == 1
    assert common.load_dataset(f"folder:{tmp_path}", True)[0].pixels.shape == (6, 3, 16, 20)
    odd = tmp_path / "train" / "cat" / "odd.png"
    Image.new("RGB", (9, 9)).save(odd)
    with pytest.raises(BadInput, match="differ in size.*@32"):
        common.load_dataset(f"folder:{tmp_path}", True)
    odd.write_bytes(b"no image")
    with pytest.raises(BadInput, match="no whole image"):
        common.load_dataset(f"folder:{tmp_path}@8", True)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "cow")
    odd.unlink()
    with pytest.raises(BadInput, match="different class folders"):
        common.load_dataset(f"folder:{tmp_path}@8", False)


def test_normalize_and_back():
    data, pixels = common.DATASETS["cifar10"], torch.rand(4, 3, 32, 32)
    images = common.normalize(pixels, data)
    assert torch.allclose(images, torchvision.transforms.functional.normalize(pixels, data.mean, data.std), atol=1e-6)
    assert torch.allclose(common.denormalize(images, data), pixels, atol=1e-6)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_crop_and_flip_equal_torchvisions():
    pixels, top, left = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4]), torch.tensor([4, 3, 2, 1, 0])
    for flip in (torch.tensor([True, False, True, False, True]), None):
        out = common.crop_by_offsets(pixels, 2, top, left, flip)
        for i in range(5):
            expected = crop(pad(pixels[i], [2]), top[i], left[i], 8, 8)
            assert torch.equal(out[i], hflip(expected) if flip is not None and flip[i] else expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_augment_draws_for_each_image_reaches_every_offset_and_passes_gradients():
    data = common.DATASETS["cifar10"]
    pixels = torch.zeros(4000, 3, 32, 32)
    pixels[:, :, 10, 12] = 1
    where = common.augment(pixels, data)[:, 0].nonzero()[:, 1:]
    rows, columns = where[:, 0].unique().tolist(), where[:, 1].unique().tolist()
    assert rows == list(range(6, 15)) and columns == sorted({*range(8, 17), *range(15, 24)})
    pixels = torch.rand(64, 3, 32, 32, requires_grad=True)
    common.augment(pixels, data).sum().backward()
    assert set(pixels.grad.unique().tolist()) == {0.0, 1.0}    # a pixel is cut off, or shown once
    assert common.augment(pixels, common.DATASETS["svhn"]) is pixels


# ---------------------------------------------------------------------------------------------------------- 2. models
C, G = (3, 32, 32), (1, 32, 32)


# parameters as published, BN layers, last map, features; of the golden images: three logits of the first one, the last
# logit of the second one, mean |feature|
@pytest.mark.parametrize("name, classes, shape, parameters, layers, map_shape, features, logits, logit, feature", [
    ("resnet18", 10, C, 11_173_962, 20, (512, 4, 4), 512, [-0.10076, -0.136371, 0.408339], 0.127899, 1.00615),
    ("resnet18", 100, C, 11_220_132, 20, (512, 4, 4), 512, None, None, None),
    ("resnet34", 10, C, 21_282_122, 36, (512, 4, 4), 512, [-34956.8, -13375.8, 41134.0], None, None),
    ("resnet34", 100, C, 21_328_292, 36, (512, 4, 4), 512, None, None, None),
    ("resnet50", 10, C, 23_520_842, 53, (2048, 4, 4), 2048, None, None, None),
    ("wrn16_1", 10, C, 175_066, 13, (64, 8, 8), 64, [-0.271763, -0.201114, 0.341237], -0.0186454, 0.0890505),
    ("wrn16_2", 10, C, 691_674, 13, (128, 8, 8), 128, None, None, None),
    ("wrn40_1", 10, C, 563_930, 37, (64, 8, 8), 64, None, None, None),
    ("wrn40_2", 10, C, 2_243_546, 37, (128, 8, 8), 128, [6.28833, -2.67168, -0.340514], -80.2471, 50.1877),
    ("wrn16_2", 10, (1, 8, 8), 691_386, 13, (128, 2, 2), 128, None, None, None),
    ("vgg8", 10, C, 3_918_858, 5, (512, 4, 4), 512, None, None, None),
    ("vgg11", 10, C, 9_231_114, 8, (512, 4, 4), 512, None, None, None),
    ("vgg13", 10, C, 9_416_010, 10, (512, 4, 4), 512, None, None, None),
    ("lenet5", 10, G, 61_706, 0, (16, 10, 10), 84, [0.000876312, -0.00151199, 0.0076674], 0.015885, 0.00563552),
    ("lenet5_half", 10, G, 15_738, 0, (8, 10, 10), 42, None, -0.0108802, 0.00542896),
    ("lenet5", 10, (1, 28, 28), 61_706, 0, (16, 10, 10), 84, None, None, None),
    ("lenet5", 10, (1, 8, 8), 21_386, 0, (16, 4, 4), 84, None, None, None),
    ("lenet5_bn", 10, (1, 28, 28), 61_750, 2, (16, 10, 10), 84, None, None, None),
    ("lenet5_half_bn", 10, (1, 28, 28), 15_760, 2, (8, 10, 10), 42, None, None, None),
    ("alexnet", 10, C, 23_474_250, 5, (256, 6, 6), 4096, None, None, None),
    ("alexnet_half", 10, C, 5_882_922, 5, (128, 6, 6), 2048, None, None, None)])
def test_models_have_the_published_sizes_and_compute_what_the_official_ones_compute(
        name, classes, shape, parameters, layers, map_shape, features, logits, logit, feature):
    """Weights w_i = (((7919 i) mod 1009) / 1009 - 0.5) 5 / sqrt(fan_in), biases 0, BN as it is, in float64."""
    model, data = build_model(name, classes, shape).eval(), common.DataSpec(shape, classes, (0.5,), (0.5,))
    norms = common.batchnorms(model, data)
    assert sum(p.numel() for p in model.parameters()) == parameters and len(norms) == layers
    seen = common.probe(model, [model.last_map, last_linear(model)], data)
    assert seen[model.last_map].shape == (2, *map_shape) and seen[last_linear(model)].shape == (2, features)
    if feature is None and logits is None:
        return
    affine = {id(p) for norm in norms for p in norm.parameters()}
    with torch.no_grad():
        for p in model.double().parameters():
            if p.dim() >= 2:
                values = ((torch.arange(p.numel()) * 7919) % 1009).double() / 1009 - 0.5
                p.copy_((values * 5 / p[0].numel() ** 0.5).reshape(p.shape))
            elif id(p) not in affine:
                p.zero_()
        layer = model.fc1 if name.startswith("lenet") else last_linear(model)    # DAFL's feature of LeNet has 120
        with common.recorded_inputs([layer]) as seen:
            out = model(torch.linspace(-1, 1, 2 * math.prod(shape), dtype=torch.float64).reshape(2, *shape))
    golden = [(out[0, :3], logits), (out[1, 9], logit), (seen[layer].abs().mean(), feature)]
    for value, expected in golden:
        assert expected is None or value.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name, shape, message", [
    *((name, C, "unknown model|could not be built|returned|not a torch") for name in (
        "resnet19", "wrn17_2", "wrn4_1", "wrn16_0", "", "vgg", "mobilenetv2", "nonsense:function", "torchvision:nothing",
        "common:BadInput")),
    ("lenet5", (1, 16, 16), "32x32, 28x28 or 8x8"), ("alexnet", (3, 64, 64), "32x32"), ("vgg8", (3, 32, 16), "square")])
def test_unknown_models_and_sizes_are_refused_in_words(name, shape, message):
    with pytest.raises(BadInput, match=message):
        build_model(name, 10, shape)


def test_torchvision_and_own_functions_build_networks(monkeypatch):
    assert build_model("torchvision:resnet18", 7, C).fc.out_features == 7
    assert isinstance(build_model("torch.nn:Identity", 10, C), nn.Identity)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **options: nn.Linear(1, 1) if options == {
        "weights": "DEFAULT"} else None)
    assert isinstance(common.foreign_model("torchvision:x", 10, pretrained=True), nn.Linear)


# --------------------------------------------------------------------------------------- 3. looking inside a network
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_a_network(fails):
    model, _, data = tiny_networks()
    next(model.parameters()).requires_grad_(False)             # a flag and a mode that must come back
    model.bn.eval()
    before, weights, stream = looks(model), weights_of(model), torch.get_rng_state()
    layers = common.batchnorms(model, data)
    with pytest.raises(KeyError):
        with common.recorded_inputs([model.bn]), common.frozen(model), common.recorded_statistics(layers):
            model(torch.randn(3, 1, 8, 8, generator=torch.Generator()))
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            raise KeyError
    common.predict(model, common.load_dataset("digits", False)[0], data)
    assert looks(model) == before and equal(weights, weights_of(model)) and torch.equal(stream, torch.get_rng_state())


def test_frozen_saves_the_weights_gradients_and_passes_those_of_the_images():
    model, images = tiny_networks()[0], torch.randn(2, 1, 8, 8, requires_grad=True)
    with common.frozen(model):
        model(images).sum().backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_recorded_statistics_and_their_gradients_equal_var_mean(dtype, tolerance, channels_last):
    torch.manual_seed(0)
    x = (3 * torch.randn(6, 5, 7, 4) + 20).to(dtype)           # far from 0, where E[x²] - E[x]² would lose digits
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    layer, weights = nn.BatchNorm2d(5), torch.randn(2, 5)
    results = []
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        with common.recorded_statistics([layer]) as seen:
            layer(leaf)
        variance, mean = torch.var_mean(leaf.float(), (0, 2, 3), correction=0)
        mean, variance = seen[layer] if ours else (mean, variance)
        (weights[0] * mean.cos() + weights[1] * variance.sqrt()).sum().backward()
        assert mean.dtype == variance.dtype == torch.float32 and leaf.grad.dtype == dtype
        results.append((mean.detach(), variance.detach(), leaf.grad.float()))
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())
    assert not layer._forward_pre_hooks


class Branches(nn.Module):
    """As GoogLeNet: an auxiliary classifier that runs in training alone; two linear layers, one of them at random."""
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.auxiliary = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 10)

    def forward(self, x):
        x = self.plain(self.norm(self.conv(x)))
        if self.training:
            self.auxiliary(x)
        x = x.mean((2, 3))
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


def test_batchnorms_are_those_that_a_pass_in_eval_mode_uses():
    model, data = Branches(), common.DATASETS["digits"]
    assert common.batchnorms(model, data) == [model.norm] and model.training
    images = torch.randn(2, 1, 8, 8, requires_grad=True)
    with common.recorded_inputs([last_linear(model)]) as seen:
        model(images)
    seen[model.b].sum().backward()
    assert images.grad is not None and last_linear(model) is model.b
    ran = common.probe(model, [model.b, model.conv, model.norm], data)
    assert list(ran) == [model.conv, model.norm, model.b] and ran[model.conv].abs().max() == 0
    with pytest.raises(BadInput, match="no nn.Linear"):
        last_linear(nn.Conv2d(1, 1, 1))


def test_bf16_is_for_training_and_scores_are_float32():
    plain, _, data = tiny_networks()
    network, images = common.in_bf16(copy.deepcopy(plain)), torch.randn(4, 1, 8, 8)
    kinds = []
    network.conv1.register_forward_hook(lambda layer, inputs, out: kinds.append(out.dtype))
    out, expected = network.eval()(images), plain.eval()(images)
    assert out.dtype == torch.float32 and not torch.equal(out, expected) and torch.allclose(out, expected, atol=0.05)
    with common.scoring(), common.scoring():
        pass
    network(images)
    test = common.load_dataset("digits", False)[0]
    assert torch.equal(common.predict(network, test, data), common.predict(plain, test, data))
    assert kinds == [torch.bfloat16] * 2 + [torch.float32] and not common._scoring
    placed = common.place_like(nn.Conv2d(1, 1, 1), network)
    assert placed.in_bf16 and placed(images).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- 4. measuring
def test_accuracy_and_agreement_by_hand():
    logits, labels = torch.tensor([[2., 0, 0], [0, 2, 0], [0, 0, 2], [0, 3, 0]]), torch.tensor([0, 1, 0, 1])
    assert common.accuracy(logits, labels) == 0.75
    assert common.agreement(logits, logits.roll(1, 0)) == 0 and common.agreement(logits, 2 * logits) == 1


def test_calibration_error_equals_a_slow_one():
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(400, 5), torch.randint(5, (400,))
    confidence, predicted = logits.softmax(1).max(1)
    expected = 0.0
    for bin_ in range(15):
        rows = [i for i in range(400) if bin_ / 15 < confidence[i] <= (bin_ + 1) / 15]
        expected += abs(sum(confidence[i].item() - (predicted[i] == labels[i]).item() for i in rows)) / 400
    assert common.expected_calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    assert common.expected_calibration_error(100 * F.one_hot(labels, 5).float(), labels) == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------------ 5. long loops
def test_batches_visit_all_once_a_pass_and_keep_the_short_one():
    passes = list(itertools.islice(common.batches(10, 4), 6))
    assert [len(batch) for batch in passes] == [4, 4, 2] * 2
    first, second = torch.cat(passes[:3]).tolist(), torch.cat(passes[3:]).tolist()
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_means_average_and_name_the_bad_term():
    means = common.Means()
    for a, b in ((1.0, 2.0), (3.0, 4.0)):
        means.add(loss_a=torch.tensor(a, requires_grad=True), loss_b=b)
    means.add(now_and_then=5)
    assert means.take() == {"loss_a": 2.0, "loss_b": 3.0, "now_and_then": 5.0}
    for bad in (math.nan, math.inf):
        means = common.Means()
        means.add(loss_a=1.0, loss_b=torch.tensor(bad))
        means.add(loss_a=1.0, loss_b=torch.tensor(1.0))
        with pytest.raises(FloatingPointError, match=f"loss_b became {bad}"):
            means.take()


def test_steps_add_their_seconds_also_when_left_early():
    common.COSTS.clear()
    for step in common.steps(3, "a"):
        time.sleep(0.01)
    assert step == 2 and 0.03 <= common.COSTS["seconds_a"] < 1
    steps = common.steps(9, "a")
    next(steps), time.sleep(0.02), steps.close()
    assert common.COSTS["seconds_a"] >= 0.05 and list(common.steps(2, "b", "xyz")) == ["x", "y"]


def test_seeds_inside_and_the_callers_stream_outside():
    class Settings:
        seed = 5

    @common.with_own_seed
    def draw(first, settings):
        if first:
            raise KeyError
        return torch.rand(3)
    with common.seeded(5):
        expected = torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(draw(0, Settings), expected) and torch.equal(draw(settings=Settings, first=0), expected)
    with pytest.raises(KeyError):
        draw(1, Settings)
    assert torch.equal(before, torch.get_rng_state())


def test_rates_and_optimizers():
    values = [common.cosine(0.1, epoch, 100) for epoch in (0, 1, 50, 99)]
    assert values == pytest.approx([0.1, 0.099975, 0.05, 2.467e-5], abs=1e-6)
    sgd, adam = (common.build_optimizer(nn.Linear(1, 1), name, 0.1, 0.01) for name in ("sgd", "adam"))
    common.set_lr(sgd, 0.5)
    assert sgd.param_groups[0]["lr"] == 0.5 and sgd.defaults["momentum"] == 0.9
    assert isinstance(adam, torch.optim.AdamW) and adam.defaults["weight_decay"] == sgd.defaults["weight_decay"] == 0.01
