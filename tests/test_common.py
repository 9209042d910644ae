"""common.py, rooms 1 to 5: data sets, models, looking inside a network, measuring, long loops."""
import copy
import itertools
import math
import time

import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional

import common
import cudfkd
import rdskd
import running
from common import BadInput, build_model, last_linear
from conftest import tiny_networks, tiny_settings
from helpers import equal, in_float64, near, weights_of  # noqa: F401
from test_methods import looks


# ----------------------------------------------------------------------------------------------- 1. data sets
def test_digits_are_the_split_that_the_constants_describe():
    (train, data), (test, same) = (common.load_dataset("digits", train) for train in (True, False))
    assert train.pixels.shape == (1437, 1, 8, 8) and test.pixels.shape == (360, 1, 8, 8) and data == same
    assert len(torch.cat([train.pixels, test.pixels]).flatten(1).unique(dim=0)) == 1797
    pixels = train.pixels.double() / train.scale
    assert train.pixels.dtype == torch.uint8 and pixels.max() == 1 and {*test.labels.tolist()} == {*range(10)}
    assert [pixels.mean().item(), pixels.std().item()] == pytest.approx([*data.mean, *data.std], abs=1e-4)


@pytest.mark.parametrize("name, class_name, stored", [
    ("mnist28", "MNIST", (7, 28, 28)), ("svhn", "SVHN", (7, 3, 32, 32)),
    ("cifar10", "CIFAR10", (7, 32, 32, 3))])
def test_torchvisions_sets_come_in_one_order(name, class_name, stored, monkeypatch):
    values, asked = torch.arange(math.prod(stored)).reshape(stored).to(torch.uint8), []

    class Found:
        data, targets, labels = values.numpy(), [3, 1, 4, 1, 5, 9, 2], [3, 1, 4, 1, 5, 9, 2]

        def __init__(self, folder, **which):
            asked.append((str(folder), *which.items()))
    monkeypatch.setattr(torchvision.datasets, class_name, Found)
    (pixels, labels, _), data = common.load_dataset(name, False, "somewhere")
    which = ("split", "test") if name == "svhn" else ("train", False)
    assert asked == [("somewhere", ("download", False), which)] and labels.tolist() == Found.labels
    expected = values.permute(0, 3, 1, 2) if stored[-1] == 3 else values.reshape(7, -1, *stored[-2:])
    assert torch.equal(pixels, expected) and pixels.shape[1:] == data.image_shape
    if name == "mnist28":
        assert common.load_dataset("mnist", True)[0].pixels.shape == (7, 1, 32, 32)


def test_validation_images_are_the_last_5000_of_the_training_set_and_no_test_image(monkeypatch):
    def read(name, train, data_dir):
        assert train and name == "cifar10"                     # the test set is not even read
        return torch.zeros(6000, 3, 32, 32, dtype=torch.uint8), torch.arange(6000)
    monkeypatch.setattr(common, "_read_torchvision", read)
    (train, data), (held_out, same) = (common.load_dataset("cifar10-val", part) for part in (True, False))
    assert train.labels.tolist() == list(range(1000)) and held_out.labels.tolist() == list(range(1000, 6000))
    assert len(train.pixels) == 1000 and len(held_out.pixels) == 5000
    assert data == same == common.DATASETS["cifar10"]
    assert running.recipe_of("wrn16_2", "cifar10-val") == running.recipe_of("wrn16_2", "cifar10")


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
    for part, label, colour in itertools.product(("train", "test"), ("cat", "dog"), (40, 200)):
        (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (colour, 0, 90)).save(tmp_path / part / label / f"{colour}.png")
    name = f"folder:{tmp_path}@8"
    (train, data), (test, same) = (common.load_dataset(name, train) for train in (True, False))
    assert train.pixels.shape == test.pixels.shape == (4, 3, 8, 8) and test.labels.tolist() == [0, 0, 1, 1]
    assert data == same and data[:2] == ((3, 8, 8), 2) and data[4:] == (1, True)
    assert data.mean == pytest.approx((120 / 255, 0, 90 / 255), abs=1e-3)
    assert data.std == pytest.approx((80 / 255, 4e-3, 4e-3), abs=2e-3)       # no channel is divided by 0
    assert common.load_dataset(f"folder:{tmp_path}", True)[0].pixels.shape == (4, 3, 16, 20)
    odd = tmp_path / "train" / "cat" / "odd.png"
    Image.new("RGB", (9, 9)).save(odd)
    with pytest.raises(BadInput, match="differ in size.*@32"):
        common.load_dataset(f"folder:{tmp_path}", True)
    odd.write_bytes(b"no image")
    with pytest.raises(BadInput, match="no whole image"):
        common.load_dataset(name, True)
    odd.unlink()
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "cow")
    with pytest.raises(BadInput, match="different class folders"):
        common.load_dataset(name, False)


def test_normalize_crop_and_flip_equal_torchvisions():
    data, pixels = common.DATASETS["cifar10"], torch.rand(5, 3, 8, 8)
    images = common.normalize(pixels, data)
    assert torch.allclose(images, functional.normalize(pixels, data.mean, data.std), atol=1e-6)
    assert torch.allclose(common.denormalize(images, data), pixels, atol=1e-6)
    top, left = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([4, 3, 2, 1, 0])
    for flip in (torch.tensor([True, False, True, False, True]), None):
        out = common.crop_by_offsets(pixels, 2, top, left, flip)
        for i in range(5):
            expected = functional.crop(functional.pad(pixels[i], [2]), top[i], left[i], 8, 8)
            expected = functional.hflip(expected) if flip is not None and flip[i] else expected
            assert torch.equal(out[i], expected)
    assert images.is_contiguous() and common.normalize(out, data).is_contiguous()    # for any network's view
    once = data._replace(mean=(0.3,) * len(data.mean))
    with torch.inference_mode():
        common.normalize(pixels, once)
    common.normalize(pixels.clone().requires_grad_(), once).sum().backward()    # and training goes on


@pytest.mark.parametrize("bias", [True, False])
def test_an_upsampled_convolution_is_the_two_layers_in_one(bias, in_float64):
    one, x = common.UpsampledConv2d(3, 5, bias), torch.randn(2, 3, 4, 6, requires_grad=True)
    two = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 3, padding=1, bias=bias))
    two[1].load_state_dict(one.state_dict())
    weights = torch.randn(2, 5, 8, 12)
    found, wanted = ([network(x), *torch.autograd.grad(network(x), [x, *network.parameters()], weights)]
                     for network in (one, two))
    for mine, theirs in zip(found, wanted, strict=True):
        near(mine, theirs)
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        one(x), (less := mode.get_total_flops()), two(x)
    assert less / (mode.get_total_flops() - less) == pytest.approx(4 / 9)


def test_augment_draws_for_each_image_reaches_every_offset_and_passes_gradients():
    data, pixels = common.DATASETS["cifar10"], torch.zeros(4000, 3, 32, 32)
    pixels[:, :, 10, 12] = 1
    where = common.augment(pixels, data)[:, 0].nonzero()[:, 1:]
    rows, columns = where[:, 0].unique().tolist(), where[:, 1].unique().tolist()
    assert rows == list(range(6, 15)) and columns == list(range(8, 24))
    pixels = torch.rand(64, 3, 32, 32, requires_grad=True)
    common.augment(pixels, data).sum().backward()
    assert set(pixels.grad.unique().tolist()) == {0.0, 1.0}    # a pixel is cut off, or shown once
    assert common.augment(pixels, common.DATASETS["svhn"]) is pixels


# -------------------------------------------------------------------------------------------------- 2. models
C, G = (3, 32, 32), (1, 32, 32)


# parameters as published, BN layers, shape of the last map, features
@pytest.mark.parametrize("name, shape, parameters, layers, map_shape, features", [
    ("resnet18", C, 11_173_962, 20, (512, 4, 4), 512), ("resnet34", C, 21_282_122, 36, (512, 4, 4), 512),
    ("resnet50", C, 23_520_842, 53, (2048, 4, 4), 2048), ("wrn16_1", C, 175_066, 13, (64, 8, 8), 64),
    ("wrn16_2", C, 691_674, 13, (128, 8, 8), 128), ("wrn40_1", C, 563_930, 37, (64, 8, 8), 64),
    ("wrn40_2", C, 2_243_546, 37, (128, 8, 8), 128), ("wrn16_2", (1, 8, 8), 691_386, 13, (128, 2, 2), 128),
    ("vgg8", C, 3_918_858, 5, (512, 4, 4), 512), ("vgg11", C, 9_231_114, 8, (512, 4, 4), 512),
    ("vgg13", C, 9_416_010, 10, (512, 4, 4), 512), ("lenet5", G, 61_706, 0, (16, 10, 10), 84),
    ("lenet5_half", G, 15_738, 0, (8, 10, 10), 42), ("lenet5", (1, 8, 8), 21_386, 0, (16, 4, 4), 84),
    ("lenet5_bn", (1, 28, 28), 61_750, 2, (16, 10, 10), 84), ("alexnet", C, 23_474_250, 5, (256, 6, 6), 4096),
    ("lenet5_half_bn", (1, 28, 28), 15_760, 2, (8, 10, 10), 42),
    ("alexnet_half", C, 5_882_922, 5, (128, 6, 6), 2048)])
def test_models_have_the_published_sizes(name, shape, parameters, layers, map_shape, features):
    model, data = build_model(name, 10, shape), common.DataSpec(shape, 10, (0.5,), (0.5,))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(common.batchnorms(model, data)) == layers
    seen = common.probe(model, [model.last_map, last_linear(model)], data)
    assert seen[model.last_map].shape == (2, *map_shape) and seen[last_linear(model)].shape == (2, features)
    more = build_model(name, 100, shape)
    assert sum(p.numel() for p in more.parameters()) == parameters + 90 * (last_linear(model).in_features + 1)


@pytest.mark.parametrize("name, channels, logits, logit, feature", [
    ("lenet5", 1, [0.000876312, -0.00151199, 0.0076674], 0.015885, 0.00563552),
    ("lenet5_half", 1, None, -0.0108802, 0.00542896),
    ("resnet18", 3, [-0.10076, -0.136371, 0.408339], 0.127899, 1.00615),
    ("resnet34", 3, [-34956.8, -13375.8, 41134.0], None, None),
    ("wrn16_1", 3, [-0.271763, -0.201114, 0.341237], -0.0186454, 0.0890505),
    ("wrn40_2", 3, [6.28833, -2.67168, -0.340514], -80.2471, 50.1877)])
def test_models_compute_what_the_official_ones_compute(name, channels, logits, logit, feature):
    """Golden: weights w_i = (((7919 i) mod 1009) / 1009 - 0.5) 5 / sqrt(fan_in), biases 0, in float64."""
    model = build_model(name, 10, (channels, 32, 32)).double().eval()
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    norms = {id(p) for layer in norms for p in layer.parameters()}
    layer = model.fc1 if name.startswith("lenet") else last_linear(model)      # LeNet's feature in DAFL: fc1
    with torch.no_grad(), common.recorded_inputs([layer]) as seen:
        for p in model.parameters():
            if p.dim() >= 2:
                values = ((torch.arange(p.numel()) * 7919) % 1009).double() / 1009 - 0.5
                p.copy_((values * 5 / p[0].numel() ** 0.5).reshape(p.shape))
            elif id(p) not in norms:
                p.zero_()
        images = torch.linspace(-1, 1, 2 * channels * 1024, dtype=torch.float64).reshape(2, channels, 32, 32)
        out = model(images)
    for value, golden in ((out[0, :3], logits), (out[1, 9], logit), (seen[layer].abs().mean(), feature)):
        assert golden is None or value.tolist() == pytest.approx(golden, rel=1e-4)


def test_models_are_found_by_name_or_refused_in_words(monkeypatch):
    for name in ("resnet19", "wrn17_2", "wrn4_1", "wrn16_0", "", "vgg", "mobilenetv2"):
        with pytest.raises(BadInput, match=f"unknown model '{name}'; choose from resnet18"):
            build_model(name, 10, C)
    for name, shape, words in (
            ("nonsense:function", C, "could not be built"), ("torchvision:nothing", C, "could not be built"),
            ("builtins:int", C, "int, not a torch.nn.Module"), ("vgg8", (3, 32, 16), "square images"),
            ("lenet5", (1, 16, 16), "32x32, 28x28 or 8x8"), ("alexnet", (3, 64, 64), "images of 32x32")):
        with pytest.raises(BadInput, match=words):
            build_model(name, 10, shape)
    assert build_model("torchvision:resnet18", 7, C).fc.out_features == 7
    assert isinstance(build_model("torch.nn:Identity", 10, C), nn.Identity)
    asked = []
    monkeypatch.setattr(torchvision.models, "get_model",
                        lambda *name, **options: asked.append((*name, options)) or nn.Identity())
    common.from_function("torchvision:x", 10, pretrained=True), common.from_function("torchvision:x", 7)
    assert asked == [("x", {"weights": "DEFAULT"}), ("x", {"num_classes": 7})]


# ------------------------------------------------------------------------------- 3. looking inside a network
def test_nothing_stays_on_a_network_and_frozen_saves_its_gradients():
    model, _, data = tiny_networks()
    next(model.parameters()).requires_grad_(False)             # a flag and a mode that must come back
    model.bn.eval()
    before, weights, images = looks(model), weights_of(model), torch.randn(3, 1, 8, 8, requires_grad=True)
    layers, stream = common.batchnorms(model, data), torch.get_rng_state()
    with pytest.raises(KeyError):
        with common.recorded_inputs([model.bn]), common.frozen(model), common.recorded_statistics(layers):
            assert not any(module.training for module in model.modules())
            model(images).sum().backward()
            raise KeyError
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())
    common.predict(model, common.load_dataset("digits", False)[0], data)
    assert looks(model) == before and equal(weights, weights_of(model))
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_recorded_statistics_and_their_gradients_equal_var_mean(dtype, tol, order, monkeypatch):
    torch.manual_seed(0)                                       # next: eps=0 is refused, as by PyTorch 2.11
    monkeypatch.setattr(torch, "batch_norm", lambda *args, real=torch.batch_norm: args[7] > 0 and real(*args))
    x = (3 * torch.randn(6, 5, 7, 4) + 20).to(dtype, memory_format=order)  # E[x²] - E[x]² would lose digits
    layer, weights, results = nn.BatchNorm2d(5), torch.randn(2, 5), []
    layer.to(torch.promote_types(dtype, torch.float32))
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        with common.recorded_statistics([layer]) as seen:
            layer(leaf)
        mean, variance = seen[layer] if ours else torch.var_mean(leaf.float(), (0, 2, 3), correction=0)[::-1]
        (weights[0] * mean.cos() + weights[1] * variance.sqrt()).sum().backward()
        assert mean.dtype == variance.dtype == torch.float32 and leaf.grad.dtype == dtype
        results.append((mean.detach(), variance.detach(), leaf.grad.float()))
    for (one, other), near in zip(zip(*results), (1e-5, 1e-5, tol)):
        assert torch.allclose(one, other, rtol=near, atol=near * other.abs().max().item())
    assert not layer._forward_pre_hooks


class Branches(nn.Module):
    """As GoogLeNet: an auxiliary layer that runs in training alone. A BatchNorm that remembers nothing."""
    def __init__(self):
        super().__init__()
        self.auxiliary, self.plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.late, self.norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        x = self.late(self.plain(self.norm(self.conv(x))))
        return self.fc((self.auxiliary(x) if self.training else x).mean((2, 3)))


def test_layers_that_a_pass_in_eval_mode_uses_are_found_in_their_order():
    model, data, images = Branches(), common.DATASETS["digits"], torch.randn(2, 1, 8, 8, requires_grad=True)
    assert common.batchnorms(model, data) == [model.late, model.norm] and model.training
    ran = common.probe(model, [model.fc, model.auxiliary, model.conv, model.norm], data)
    assert list(ran) == [model.conv, model.norm, model.fc] and not ran[model.conv].any()
    with common.recorded_inputs([last_linear(model)]) as seen:
        model(images)
    seen[model.fc].sum().backward()                            # it has its graph
    assert images.grad is not None and last_linear(model) is model.fc
    with pytest.raises(BadInput, match="no nn.Linear"):
        last_linear(nn.Conv2d(1, 1, 1))


def test_bf16_is_for_training_and_scores_are_float32():
    plain, _, data = tiny_networks()
    network, images, kinds = common.in_bf16(copy.deepcopy(plain)).eval(), torch.randn(4, 1, 8, 8), []
    network.conv1.register_forward_hook(lambda layer, inputs, out: kinds.append(out.dtype))
    out, expected = network(images), plain.eval()(images)
    assert out.dtype == torch.float32 and not torch.equal(out, expected)
    assert torch.allclose(out, expected, atol=0.05)
    with common.scoring(), common.scoring():
        pass
    network(images)
    test = common.ImageSet(torch.ones(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3))
    assert torch.equal(common.predict(network, test, data), common.predict(plain, test, data))
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]
    placed, kinds = common.place_like(nn.Conv2d(1, 1, 1), network), []
    assert placed.in_bf16 and placed(images).dtype == torch.float32
    other = copy.deepcopy(network)
    torch.nn.init.zeros_(other.fc.weight), torch.nn.init.zeros_(other.fc.bias)
    assert not other(images).any() and network(images).any()   # a copy answers with its own weights


# ----------------------------------------------------------------------------------------------- 4. measuring
def test_scores_equal_slow_ones():
    torch.manual_seed(0)
    logits, other, labels = 2 * torch.randn(400, 5), torch.randn(400, 5), torch.randint(5, (400,))
    best, second = logits.argmax(1).tolist(), other.argmax(1).tolist()
    right = [a == b for a, b in zip(best, labels.tolist())]
    assert common.accuracy(logits, labels) == pytest.approx(sum(right) / 400)
    assert common.agreement(logits, other) == pytest.approx(sum(a == b for a, b in zip(best, second)) / 400)
    confidence, expected = logits.softmax(1).amax(1).tolist(), 0
    for bin_ in range(15):
        rows = [i for i in range(400) if bin_ / 15 < confidence[i] <= (bin_ + 1) / 15]
        expected += abs(sum(confidence[i] - right[i] for i in rows)) / 400
    assert common.expected_calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    assert common.expected_calibration_error(1e3 * torch.eye(5), torch.arange(5)) == 0


# ---------------------------------------------------------------------------------------------- 5. long loops
def test_batches_visit_all_once_a_pass_and_keep_the_short_one():
    passes = list(itertools.islice(common.batches(10, 4), 6))
    first, second = torch.cat(passes[:3]).tolist(), torch.cat(passes[3:]).tolist()
    assert [len(batch) for batch in passes] == [4, 4, 2] * 2
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_revisited_items_come_once_in_order_and_then_again_at_random():
    for visits, total, asked in ((1, 7, 7), (3, 60, 20), (2, 41, 21)):
        items = itertools.count()
        with common.seeded(0):
            came = list(itertools.islice(common.revisited(items, visits, total), total))
        assert came[:asked] == list(range(asked)) and next(items) == asked         # no item more was taken
        again = [came[start:start + asked] for start in range(asked, total, asked)]
        assert all(len({*part}) == len(part) and {*part} <= {*range(asked)} for part in again)
        assert not again or again[0] != sorted(again[0])
    assert [*common.revisited([], 2, 4)] == [] and [*common.revisited("ab", 1, 4)] == ["a", "b"]


def test_means_average_and_name_the_bad_term():
    means = common.Means()
    for a, b in ((1.0, 2.0), (3.0, 4.0)):
        means.add(loss_a=torch.tensor(a, requires_grad=True), loss_b=b)
    means.add(now_and_then=5)
    assert means.take() == {"loss_a": 2.0, "loss_b": 3.0, "now_and_then": 5.0}
    for bad in (math.nan, math.inf):
        means.add(loss_b=torch.tensor(bad))
        with pytest.raises(FloatingPointError, match=f"loss_b became {bad}"):
            means.take()
        means = common.Means()


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

    data = common.DATASETS["digits"]

    @common.seeded_and_checked
    def draw(fails, data, settings):
        return 1 / 0 if fails else torch.rand(3)
    before = torch.get_rng_state()
    with common.seeded(5):
        expected = torch.rand(3)
    for drawn in (draw(0, data, Settings), draw(settings=Settings, fails=0, data=data)):
        assert torch.equal(drawn, expected)
    with pytest.raises(ZeroDivisionError):
        draw(1, data, Settings)
    assert torch.equal(before, torch.get_rng_state())


def test_a_rate_falls_along_half_a_cosine_and_adam_has_decoupled_decay():
    values = [common.cosine(0.1, epoch, 100) for epoch in (0, 1, 50, 99)]
    assert values == pytest.approx([0.1, 0.099975, 0.05, 2.467e-5], abs=1e-6)
    sgd, adam = (common.build_optimizer(nn.Linear(1, 1), name, 0.1, 0.01) for name in ("sgd", "adam"))
    common.set_lr(sgd, 0.5)
    assert [sgd.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")] == [0.5, 0.9, 0.01]
    assert type(adam) is torch.optim.AdamW and adam.defaults["weight_decay"] == 0.01


def test_a_setting_that_is_none_of_its_words_is_refused():
    teacher, student, data = tiny_networks()
    for method, changes in ((cudfkd, dict(student_loss="l2")), (rdskd, dict(penalty="none"))):
        with pytest.raises(BadInput, match="must be one of"):
            method.distill(teacher, student, data, tiny_settings(method, **changes))


def test_balanced_agreement_does_not_reward_a_student_that_always_names_one_class():
    teacher = torch.eye(4)[torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])]             # it never names class 3
    constant, copy_ = torch.eye(4)[torch.zeros(8, dtype=torch.long)], teacher.clone()
    assert common.agreement(constant, teacher) == 0.75
    assert common.balanced_agreement(constant, teacher) == pytest.approx(1 / 3)
    assert common.balanced_agreement(copy_, teacher) == 1
    half = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 1, 1, 3])]
    assert common.balanced_agreement(half, teacher) == pytest.approx(0.5)      # of (1/2, 1, 0)
