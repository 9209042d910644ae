"""surrogate_kd.py: golden numbers (1e-5), the pictures, the pool, the attack against an attack written anew, its script."""
import copy
import inspect
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF

import common
import run
import surrogate_kd as sk
from conftest import tiny_args, tiny_networks, tiny_settings
from test_csd_method import ForeignTeacher, Recorder, same, weights_of
from test_scripts import Killed, assert_same_run, kill_at, rows_of

D = torch.float64
T = ((torch.arange(8) * 3) % 8).reshape(2, 4).to(D)
S = ((torch.arange(8) * 5) % 8).reshape(2, 4).to(D) / 2


def near(value, expected, tolerance=1e-5):
    value = torch.as_tensor(value, dtype=D).detach()
    assert torch.allclose(value, torch.tensor(expected, dtype=D), atol=tolerance, rtol=0), value


def rng_of(seed=0):
    return torch.Generator().manual_seed(seed)


# -------------------------------------------------------------------------------------------------------------- golden numbers
@pytest.mark.parametrize("temperature, kl", [(1, 2.415988), (2, 3.530131), (5, 3.883074), (20, 3.746961)])
def test_golden_1_kd(temperature, kl):
    near(sk.kd_loss(S, T, temperature), kl)


def test_golden_1_at_high_temperature_it_is_a_distance_of_centred_logits():
    near(((T - T.mean(1, keepdim=True)) - (S - S.mean(1, keepdim=True))).square().sum(1).mean() / 8, 3.65625)
    near(sk.kd_loss(S, T, 2000.0), 3.65625, 3e-3)


def test_the_ablations_loss_and_standardized_logits():
    near(sk.one_hot_loss(S, T), F.cross_entropy(S, torch.tensor([2, 1])).item())          # T's first choices
    rows = sk.standardized(T)
    near(rows.mean(1), [0.0, 0.0])
    near(rows.std(1), [1.0, 1.0])
    near(sk.standardized(3 * T + 7), rows.tolist())


@pytest.mark.parametrize("counts, entropy", [([5, 3, 2, 0], 0.742738), ([25] * 4, 1.0), ([97, 1, 1, 1], 0.120970), ([100, 0, 0, 0], 0.0)])
def test_golden_2_relative_entropy(counts, entropy):
    near(sk.relative_entropy(torch.tensor(counts)), entropy, 1e-6)


def test_golden_3_mixup():
    mixed = sk.mixup((torch.arange(8) / 10).reshape(2, 1, 2, 2), torch.tensor([0.25, 0.5]), torch.tensor([1, 0]))
    near(mixed.flatten(1), [[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5]], 1e-6)


WEIGHTS = (((torch.arange(12) * 5) % 7) - 3).reshape(3, 4).to(D)
PIXELS = ((torch.arange(8) * 3) % 8).reshape(2, 1, 2, 2).to(D) / 10 + 0.1


def linear_teacher(pixels):
    return 6 * pixels.flatten(1) @ WEIGHTS.T


def test_golden_4_the_trace_of_the_attack(monkeypatch):
    trials, step = [], sk.cross_entropy_step
    monkeypatch.setattr(sk, "cross_entropy_step", lambda classify, pixels, labels: trials.append(pixels.clone()) or step(classify, pixels, labels))
    assert linear_teacher(PIXELS).argmax(1).tolist() == [0, 2]
    after, before, rows, iterations = sk.boundary_pairs(linear_teacher, PIXELS, torch.tensor([2, 0]), 16 / 255, 128 / 255, 20, 0.9)
    assert rows.tolist() == [0, 1] and iterations.tolist() == [2, 4]
    near(after.flatten(1), [[.165882, .334118, .634118, .265882], [.250557, 1, .549443, .350557]], 1e-6)
    near(before.flatten(1), [[.131373, .368627, .668627, .231373], [.292314, 1, .507686, .392314]], 1e-6)
    for pixels, confidence, classes in ((after, [.754013, .601027], [2, 0]), (before, [.790419, .890771], [0, 2])):
        p = linear_teacher(pixels).softmax(1)
        near(p.amax(1), confidence, 1e-6)
        assert p.argmax(1).tolist() == classes
    # how far each trial's first pixel is from where it began, of 255: image 0 goes 16, back and 8, 8.8 more; image 1 goes 16, 17.6, 19.36,
    # 21.296 more, back, and 10.648
    first = [255 * abs(pixels[0] - PIXELS[0]).flatten()[0].item() for pixels in trials[1:4]]
    other = [255 * abs(pixels[-1] - PIXELS[1]).flatten()[0].item() for pixels in trials[1:]]
    assert [len(pixels) for pixels in trials] == [2, 2, 2, 2, 1, 1]
    near(first, [16.0, 8.0, 16.8])
    near(other, [16.0, 33.6, 52.96, 74.256, 63.608])


def test_golden_5_a_step_deeper():
    after, before, _, _ = sk.boundary_pairs(linear_teacher, PIXELS, torch.tensor([2, 0]), 16 / 255, 128 / 255)
    for pixels, labels, moved, confidence in (
            (after, [2, 0], [[.181569, .318431, .618431, .281569], [.234871, 1, .565129, .334871]], [.906580, .808234]),
            (before, [0, 2], [[.115686, .384314, .684314, .215686], [.308, .984314, .492, .408]], [.921674, .959848])):
        found = sk.deeper(linear_teacher, pixels, torch.tensor(labels), 4 / 255, 16 / 255)
        near(found.flatten(1), moved, 1e-6)
        near(linear_teacher(found).softmax(1).amax(1), confidence, 1e-6)
        assert linear_teacher(found).argmax(1).tolist() == labels


def test_golden_6_leaves_spectrum_and_chaos_game():
    radii, cdf = sk.leaf_radius_cdf()
    near(cdf[[0, 1, 9, 49]], [0.277044, 0.453399, 0.870538, 0.991460], 1e-6)
    near((cdf.diff(prepend=torch.zeros(1)) * radii).sum(), 0.053233, 1e-6)
    plain, leaning = sk.spectrum_magnitude(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.1]), 8)
    near([plain[0, 1], plain[1, 0], plain[1, 1], plain[4, 4], plain[0, 4], plain[0, 0]], [64.0, 64, 32, 2, 4, 0])
    near([leaning[0, 1], leaning[1, 0], leaning[2, 3]], [9.849155, 6.498020, 1.594541])
    maps = torch.tensor([[[.5, 0, 0, .5, 0, 0], [.5, 0, 0, .5, .5, 0], [.5, 0, 0, .5, .25, .5]]])
    x, y = sk.ifs_points(maps, torch.tensor([0, 1, 2, 1, 1, 0, 2]).view(7, 1, 1))
    near([x[-1, 0, 0], y[-1, 0, 0]], [0.46875, 0.53125])


# ------------------------------------------------------------------------------------------------------------------ the pictures
@pytest.mark.parametrize("name", sk.GENERATORS)
def test_pictures_are_in_0_1_told_apart_and_a_function_of_their_seed(name):
    make = sk.GENERATORS[name]
    for size in (32, 40):
        pixels = make(12, size, rng_of(3))
        assert pixels.shape == (12, 3, size, size) and pixels.dtype == torch.float32 and 0 <= pixels.min() and pixels.max() <= 1 and pixels.isfinite().all()
        assert torch.equal(pixels, make(12, size, rng_of(3))) and not torch.equal(pixels, make(12, size, rng_of(4)))
        flat = pixels.flatten(1)
        assert (torch.cdist(flat, flat) + 9 * torch.eye(12)).min() > 0.5                  # no two alike
        assert pixels.std((1, 2, 3)).min() > 0.01                                         # none of one colour
    before = torch.random.get_rng_state()
    make(4, 32, rng_of())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("name", sk.GENERATORS)
def test_each_generator_pasted_into_an_empty_file_works(name, tmp_path):
    helpers = {"spectrum": [sk.spectrum_magnitude], "leaves": [sk.leaf_radius_cdf], "fractal": [sk.ifs_points]}.get(name, [])
    code = "import math\nfrom functools import partial\nimport torch\nimport torch.nn.functional as F\n"
    code += "\n".join(map(inspect.getsource, [*helpers, sk.GENERATORS[name]]))
    (tmp_path / "mine.py").write_text(code + f"\nprint({sk.GENERATORS[name].__name__}(2, 32, torch.Generator()).mean().item())\n")
    result = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and 0 < float(result.stdout) < 1, result.stderr


def test_the_attack_pasted_into_an_empty_file_works(tmp_path):
    code = "import torch\nimport torch.nn.functional as F\n" + "\n".join(map(inspect.getsource, (sk.cross_entropy_step, sk.boundary_pairs, sk.deeper)))
    (tmp_path / "mine.py").write_text(code + "\nclassify = lambda x: 3 * x.flatten(1)\nx = torch.tensor([[[[0.9, 0.5]]]])\n"
                                      "after, before, rows, n = boundary_pairs(classify, x, torch.tensor([1]), radius=1.0)\nprint(after.flatten()[1].item())\n")
    result = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and 0.5 < float(result.stdout) < 1, result.stderr


def test_the_spectrum_of_the_pictures_falls_as_it_was_drawn(monkeypatch):
    """The mean slope of log power over log frequency is twice that of the magnitude."""
    def slope_of(a):
        monkeypatch.setattr(sk, "spectrum_magnitude", lambda _, d, size: magnitude(torch.full_like(d, a), 0 * d, size))
        pixels = sk.spectrum_images(64, 32, rng_of())
        power = torch.fft.fft2(pixels - pixels.mean((2, 3), keepdim=True)).abs().square().mean((0, 1))[0, 1:16].log()
        f = torch.arange(1.0, 16).log()
        return ((f - f.mean()) * power).sum() / (f - f.mean()).square().sum()
    magnitude = sk.spectrum_magnitude
    assert abs(slope_of(1.0) + 2) < 0.3 and abs(slope_of(2.5) + 5) < 0.3


def test_every_leaf_has_one_colour_and_the_front_ones_are_whole():
    pixels = sk.leaves_images(8, 32, rng_of())
    colours = [len(image.flatten(1).T.unique(dim=0)) for image in pixels]
    assert 3 < min(colours) and max(colours) <= 200            # flat: far fewer colours than pixels


def test_fractals_cover_at_least_the_part_that_is_asked_for_and_take_a_background():
    background = torch.full((6, 3, 32, 32), 2.0)               # a colour that no fractal has
    pixels = sk.fractal_images(6, 32, rng_of(), background=background, least=0.2)
    hit = (pixels < 1.5).all(1).float().mean((1, 2))
    assert hit.min() >= 0.2 and hit.max() < 1


def test_strokes_are_grey_mostly_dark_and_span_the_range():
    pixels = sk.strokes(sk.shader_images(64, 32, rng_of()), rng_of(1))
    assert pixels.shape == (64, 1, 32, 32) and 0 <= pixels.min() and pixels.max() <= 1
    bright = (pixels > 0.5).float().mean((1, 2, 3))
    assert 0.04 < bright.min() and bright.max() < 0.55
    assert sk.strokes(torch.full((2, 3, 8, 8), 0.5), rng_of()).isfinite().all()           # one colour


# ----------------------------------------------------------------------------------------------------------------- augmentation
OPERATIONS = {     # of RandAugment at 14 of 30, by torchvision; s is the sign
    0: lambda x, s: x, 1: TF.autocontrast, 6: lambda x, s: TF.adjust_brightness(x, 1 + 0.42 * s), 7: lambda x, s: TF.adjust_saturation(x, 1 + 0.42 * s),
    8: lambda x, s: TF.adjust_contrast(x, 1 + 0.42 * s), 11: lambda x, s: TF.solarize(x, 1 - 14 / 30)}


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugments_colours_equal_torchvisions(channels):
    """A batch of 14: one image an operation, in the order of common.rand_augment."""
    pixels = torch.rand(14, channels, 16, 16, generator=rng_of(5))
    out = common.rand_augment(pixels, rng_of(9), operations=1)
    rng = rng_of(9)
    order = torch.randperm(14, generator=rng)
    sign = 2.0 * torch.randint(2, (14, 1, 1, 1), generator=rng) - 1
    place = {6: 6, 7: 7, 8: 8, 0: 0, 11: 11, 12: 1}            # part: operation
    for part, operation in place.items():
        image = pixels[order[part]]
        expected = OPERATIONS[operation](image, sign[part].item()) if operation != 1 else TF.autocontrast(image)
        assert torch.allclose(out[order[part]], expected, atol=2e-3), part
    sharp = order[9]                                            # torchvision's kernel weighs the middle 5 of 13, its edges stay
    smooth = F.avg_pool2d(pixels[sharp][None], 3, 1)[0]
    inner = smooth + (1 + 0.42 * sign[9].item()) * (pixels[sharp][:, 1:-1, 1:-1] - smooth)
    assert torch.allclose(out[sharp][:, 1:-1, 1:-1], inner.clamp(0, 1), atol=1e-6)
    bits = (255 * pixels[order[10]]).floor().to(torch.uint8)
    assert (out[order[10]] - TF.posterize(bits, 6) / 255).abs().max() <= 4 / 255 + 1e-3
    flat = out[order[13]]                                       # equalised: levels spread evenly
    assert abs(flat.mean() - 0.5) < 0.02 and abs(flat.std() - (1 / 12) ** 0.5) < 0.02


@pytest.mark.parametrize("part, angle, translate, shear", [
    (1, 0, (0, 0), (0.14, 0)), (2, 0, (0, 0), (0, 0.14)), (3, 0, (0.21, 0), (0, 0)), (4, 0, (0, 0.21), (0, 0)), (5, 14, (0, 0), (0, 0))])
def test_randaugments_moves_take_a_ramp_where_they_should(part, angle, translate, shear):
    """Of a picture that is its own coordinates, bilinear sampling shows where every pixel came from."""
    place = (torch.arange(32) + 0.5) / 16 - 1                                             # -1 to 1
    ramp = torch.stack([place.expand(32, 32), place[:, None].expand(32, 32)])             # x, y
    pixels = (ramp + 1).expand(14, 2, 32, 32) / 2
    out = common.rand_augment(pixels, rng_of(2), operations=1)
    rng = rng_of(2)
    order = torch.randperm(14, generator=rng)
    sign = (2.0 * torch.randint(2, (14, 1, 1, 1), generator=rng) - 1)[part].item()
    x, y = 2 * out[order[part]][:, 8:24, 8:24] - 1 if not any(translate) else 2 * out[order[part]][:, 14:18, 14:18] - 1
    px, py = ramp[:, 8:24, 8:24] if not any(translate) else ramp[:, 14:18, 14:18]
    turn = math.radians(angle) * sign
    assert torch.allclose(x, math.cos(turn) * px - math.sin(turn) * py + sign * (shear[0] * py + 2 * translate[0]), atol=1e-4)
    assert torch.allclose(y, math.sin(turn) * px + math.cos(turn) * py + sign * (shear[1] * px + 2 * translate[1]), atol=1e-4)


def test_randaugment_gives_every_image_its_operations_and_fills_from_outside():
    pixels = torch.full((28, 1, 16, 16), 0.25)
    moved = [common.rand_augment(pixels, rng_of(seed), 4, 14, fill=0.25) for seed in range(3)]
    assert all(0 <= out.min() and out.max() <= 1 for out in moved)
    same_level = (common.rand_augment(pixels, rng_of(), 1, 14, fill=0.25) - 0.25).abs().amax((1, 2, 3)) < 1e-4
    assert same_level.sum() >= 20                              # all but brightness, and what rounds to 6 bits: nothing comes in from outside
    assert torch.equal(common.rand_augment(pixels, rng_of(), 0), pixels)
    for n in (1, 5, 13):                                       # fewer images than operations
        assert common.rand_augment(torch.rand(n, 3, 8, 8), rng_of(), 2).shape == (n, 3, 8, 8)


def test_elastic_bends_by_under_two_pixels_and_keeps_what_is_flat():
    place = (torch.arange(32.0).expand(32, 32) / 31)[None, None].expand(16, 1, 32, 32)
    shift = (common.elastic(place, rng_of()) - place)[..., 4:-4] * 31
    assert 0.3 < shift.std() < 1.5 and not torch.allclose(shift[0], shift[1])             # pixels
    assert (shift[..., 1:, :] - shift[..., :-1, :]).abs().max() < 0.5                     # smooth
    assert torch.allclose(common.elastic(torch.full((2, 3, 8, 8), 0.4), rng_of()), torch.tensor(0.4))


def settings_of(**changes):
    return tiny_settings(sk, **changes)


def test_what_is_off_changes_nothing_and_every_switch_does():
    pixels = torch.rand(28, 1, 8, 8, generator=rng_of())
    off = dict(randaugment=0, elastic=False, invert=0.0, mirror=False, pad=0, mixup=False)
    assert torch.allclose(sk.augment_surrogates(pixels, settings_of(**off), rng_of()), pixels)
    for switch in (dict(randaugment=1), dict(elastic=True), dict(invert=0.5), dict(mirror=True), dict(pad=1), dict(mixup=True)):
        assert not torch.allclose(sk.augment_surrogates(pixels, settings_of(**{**off, **switch}), rng_of()), pixels), switch
    inverted = sk.augment_surrogates(pixels, settings_of(**{**off, "invert": 1.0}), rng_of())
    assert torch.allclose(inverted, 1 - pixels)


# ---------------------------------------------------------------------------------------------------------------------- the pool
class Brightness(nn.Module):
    """Answers by the mean of an image: class k for means around k / 10."""
    def __init__(self, classes=10):
        super().__init__()
        self.scale, self.classes = nn.Parameter(torch.tensor(200.0)), classes

    def forward(self, images):
        centres = (torch.arange(self.classes, device=images.device) + 0.5) / self.classes
        return -self.scale * (images.mean((1, 2, 3))[:, None] - centres) ** 2


PLAIN = common.DataSpec((1, 8, 8), 10, (0.0,), (1.0,))


def skewed(start, n, rng):
    """Images of one grey level; the bright ones are rare."""
    return (torch.rand(n, 1, 1, 1, generator=rng) ** 3).expand(-1, 1, 8, 8)


def test_a_balanced_pool_is_balanced_and_an_unbalanced_one_is_not():
    teacher = Brightness()
    for balance in (True, False):
        pool = sk.balanced_pool(teacher, PLAIN, settings_of(pool_images=100, pool_budget=50, balance=balance), skewed)
        counts = torch.bincount(pool["labels"], minlength=10)
        predicted = teacher(pool["pixels"] / 255).argmax(1)
        assert pool["pixels"].shape == (100, 1, 8, 8) and pool["pixels"].dtype == torch.uint8 and (predicted == pool["labels"]).float().mean() > 0.97
        assert (counts == 10).all() if balance else counts.max() > 30
        assert pool["seen"].sum() == 100 if not balance else pool["seen"].min() >= 10
        assert not balance or len(pool["pixels"].flatten(1).unique(dim=0)) > 60
    first = torch.cat([skewed(0, 64, rng := rng_of()), skewed(64, 36, rng)])
    assert torch.equal(pool["pixels"], (255 * first).round().to(torch.uint8))             # the first ones, in their order


def test_a_short_class_repeats_its_pictures_and_an_empty_one_leaves_its_share():
    def dark(start, n, rng):                                   # classes 0 to 5 only, few of class 5
        level = torch.rand(n, 1, 1, 1, generator=rng) * 0.5
        level[:1] = 0.55
        return level.expand(-1, 1, 8, 8)
    pool = sk.balanced_pool(Brightness(), PLAIN, settings_of(pool_images=200, pool_budget=2), dark)
    counts = torch.bincount(pool["labels"], minlength=10)
    assert len(pool["labels"]) == 200 and (counts[6:] == 0).all() and counts[:6].min() >= 20 and counts[:6].max() <= 50 and counts.sum() == 200
    assert pool["seen"].sum() == 400 and 0 < pool["seen"][5] < 20                         # the budget; few of class 5
    assert pool["labels"].min() >= 0


def test_a_short_class_alone_gets_its_whole_share_from_its_own_pictures():
    def draw(start, n, rng):                                   # one of class 9 in 64, the others even
        level = torch.rand(n, 1, 1, 1, generator=rng) * 0.9
        level[0] = 0.95
        return level.expand(-1, 1, 8, 8)
    pool = sk.balanced_pool(Brightness(), PLAIN, settings_of(pool_images=200, pool_budget=3), draw)
    assert 0 < pool["seen"][9] < 20 <= pool["seen"][:9].min() and (torch.bincount(pool["labels"], minlength=10) == 20).all()
    assert torch.equal(Brightness()(pool["pixels"] / 255).argmax(1), pool["labels"])


def test_a_set_with_fewer_pictures_than_are_asked_for():
    level = torch.linspace(0, 1, 70)

    def draw(start, n, rng):
        assert start + n <= 70
        return level[start:start + n].view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    assert len(sk.balanced_pool(Brightness(), PLAIN, settings_of(pool_images=100, balance=False), draw, 70)["labels"]) == 70
    pool = sk.balanced_pool(Brightness(), PLAIN, settings_of(pool_images=100), draw, 70)
    assert (torch.bincount(pool["labels"]) == 10).all() and pool["seen"].sum() == 70


def test_the_report_tells_a_set_of_one_class_from_an_even_one():
    teacher, _, data = tiny_networks()
    settings = settings_of(randaugment=0, invert=0.0, mixup=False, pad=0, elastic=False, mirror=False)
    noise = torch.randint(0, 256, (300, 1, 8, 8), dtype=torch.uint8, generator=rng_of())
    found = sk.inspect_surrogate(teacher, noise, data, settings)
    logits = teacher.eval()(common.normalize(noise / 255, data))
    near(found["relative_entropy"], sk.relative_entropy(torch.bincount(logits.argmax(1), minlength=10)), 1e-6)
    near(found["relative_entropy_augmented"], found["relative_entropy"], 1e-6)            # nothing is augmented
    near(found["confidence"], logits.softmax(1).amax(1).mean().item(), 1e-5)
    assert abs(sum(found["class_share"]) - 1) < 1e-6 and 0 < found["feature_spread_unit"] < 1 and found["feature_spread"] > 0
    alike = sk.inspect_surrogate(teacher, noise[:1].expand(50, -1, -1, -1), data, settings)
    assert alike["relative_entropy"] == 0 and max(alike["class_share"]) == 1
    json.dumps(found)


def test_feature_spread_is_a_mean_over_classes_not_over_images():
    features = torch.tensor([[0.0, 2, 4], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    assert sk.feature_spread(features, torch.tensor([0, 1, 1, 1])) == pytest.approx(1.0)  # 2 and 0


# -------------------------------------------------------------------------------------------------------------------- the attack
def reference_attack(classify, pixels, targets, step, radius, iterations, threshold):
    """The same search, image by image, two forward passes and one backward an iteration, as it is described."""
    found = {}
    for row, (image, target) in enumerate(zip(pixels, targets)):
        adv, size = image[None].clone(), step
        low, high = (adv - radius).clamp(0, 1), (adv + radius).clamp(0, 1)
        for iteration in range(iterations):
            before = adv.detach().requires_grad_()
            logits = classify(before)
            gradient, = torch.autograd.grad(F.cross_entropy(logits, target[None]), before)
            adv = torch.minimum(torch.maximum(before - size * gradient.sign(), low), high).detach()
            after = classify(adv).softmax(1).max(1)
            if after.indices == target:
                if after.values < threshold and logits.softmax(1).max() < threshold:
                    found[row] = adv, before.detach(), iteration
                    break
                adv, size = before.detach(), 0.5 * size
            else:
                size = 1.1 * size
    return found


def small_classifier(seed=0):
    with common.seeded(seed):
        network = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5)).double()
    for parameter in network.parameters():
        parameter.data *= 3
    return network


@pytest.mark.parametrize("seed", range(4))
def test_the_attack_equals_the_search_image_by_image(seed):
    classify, pixels = small_classifier(seed), torch.rand(24, 1, 8, 8, generator=rng_of(seed), dtype=D)
    with torch.no_grad():
        seen = classify(pixels).argmax(1)
    targets = (seen + torch.randint(1, 5, (24,), generator=rng_of(seed))) % 5
    after, before, rows, iterations = sk.boundary_pairs(classify, pixels, targets, 4 / 255, 64 / 255, 20, 0.9)
    expected = reference_attack(classify, pixels, targets, 4 / 255, 64 / 255, 20, 0.9)
    assert len(rows) > 5 and sorted(rows.tolist()) == sorted(expected) and len(set(iterations.tolist())) > 1
    for a, b, row, iteration in zip(after, before, rows.tolist(), iterations.tolist()):
        assert torch.allclose(a, expected[row][0][0], atol=1e-12) and torch.allclose(b, expected[row][1][0], atol=1e-12)
        assert iteration == expected[row][2]


def test_pairs_straddle_a_boundary_unsure_on_both_sides_and_stay_near():
    classify, pixels = small_classifier(7), torch.rand(64, 1, 8, 8, generator=rng_of(), dtype=D)
    with torch.no_grad():
        targets = (classify(pixels).argmax(1) + 1) % 5
        after, before, rows, _ = sk.boundary_pairs(classify, pixels, targets, 2 / 255, 48 / 255, 20, 0.9)
        p_after, p_before = classify(after).softmax(1), classify(before).softmax(1)
    assert len(rows) > 10
    assert torch.equal(p_after.argmax(1), targets[rows]) and (p_before.argmax(1) != targets[rows]).all()
    assert p_after.max() < 0.9 and p_before.max() < 0.9
    for found in (after, before):
        assert (found - pixels[rows]).abs().max() <= 48 / 255 + 1e-9 and 0 <= found.min() and found.max() <= 1
    assert not any(p.grad is not None for p in classify.parameters())


def test_one_pass_an_iteration_and_finished_images_leave_the_batch():
    network, sizes = small_classifier(7), []
    network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pixels = torch.rand(64, 1, 8, 8, generator=rng_of(), dtype=D)
    targets = (network(pixels).argmax(1) + 1) % 5
    sizes.clear()
    _, _, rows, iterations = sk.boundary_pairs(network, pixels, targets, 2 / 255, 48 / 255, 20, 0.9)
    assert sizes == [64] + [64 - int((iterations < k).sum()) for k in range(20) if 64 - int((iterations < k).sum())]


@pytest.mark.parametrize("target", ["pseudo", "random"])
def test_attacked_images_are_four_of_each_and_none_where_there_is_nothing_to_cross(target):
    teacher, _, data = tiny_networks()
    teacher.fc.weight.data *= 20                               # an untrained network has one answer; this one has several
    pixels = torch.rand(40, 1, 8, 8, generator=rng_of())
    with torch.no_grad():
        seen = teacher.eval()(common.normalize(pixels, data)).argmax(1)
    settings = settings_of(attack_target=target, attack_radius=128.0, attack_step=8.0)
    before = weights_of(teacher)
    made, asked = sk.attacked_images(teacher, pixels, (seen + 1) % 10, data, settings, rng_of())
    assert len(made) % 4 == 0 and 80 <= asked <= 40 * (settings.attack_iterations + 5) and 0 <= made.min() and made.max() <= 1 and same(before, teacher) and not made.requires_grad
    none, asked = sk.attacked_images(teacher, pixels, seen, data, settings_of(attack_target="pseudo"), rng_of())
    assert none.shape == (0, 1, 8, 8) and asked == 40


def test_attacked_images_go_to_their_targets_and_a_step_deeper_each_on_its_own_side():
    """After: the pseudo-label; before: another class; deeper: the same classes, surer of them."""
    classify, data = small_classifier(7), PLAIN._replace(num_classes=5)
    pixels = torch.rand(64, 1, 8, 8, generator=rng_of(), dtype=D)
    with torch.no_grad():
        labels = (classify(pixels).argmax(1) + 1) % 5
        made, _ = sk.attacked_images(classify, pixels, labels, data, settings_of(attack_target="pseudo", attack_radius=48.0, attack_iterations=20), rng_of())
        _, _, rows, _ = sk.boundary_pairs(classify, pixels, labels, 2 / 255, 48 / 255, 20, 0.9)
        after, before, deeper_after, deeper_before = (classify(part).softmax(1) for part in made.chunk(4))
    assert len(rows) > 10 and len(made) == 4 * len(rows)
    assert torch.equal(after.argmax(1), labels[rows]) and (before.argmax(1) != labels[rows]).all()
    for near_it, further in ((after, deeper_after), (before, deeper_before)):
        own = near_it.argmax(1, keepdim=True)
        assert (further.gather(1, own) > near_it.gather(1, own)).all()


# --------------------------------------------------------------------------------------------------------------------- trainings
def toy_pool(n=40):
    return dict(surrogate=torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=rng_of()), pseudo_labels=torch.arange(n) % 10)


def trained(look=None, networks=None, **changes):
    """-> student's weights, the recorder"""
    teacher, student, data = networks or tiny_networks()
    recorder = Recorder(look)
    sk.distill(teacher, student, data, settings_of(**changes), recorder, **toy_pool())
    return weights_of(student), recorder


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


ATTACK_FLAGS = ["--boundary-attack", "--attack-target", "random", "--attack-radius", "255", "--attack-step", "32", "--attack-threshold", "1"]
ATTACKING = dict(boundary_attack=True, attack_target="random", attack_radius=255.0, attack_step=32.0, attack_threshold=1.0)


@pytest.mark.parametrize("attack", [{}, ATTACKING])
def test_distill_trains_the_student_and_leaves_the_teacher_as_it_was(attack):
    teacher, student, data = tiny_networks()
    teacher.train()
    next(teacher.parameters()).requires_grad_(False)
    flags, teacher_before, student_before = [p.requires_grad for p in teacher.parameters()], weights_of(teacher), weights_of(student)
    pool = toy_pool()
    kept = pool["surrogate"].clone()
    sk.distill(teacher, student, data, settings_of(**attack), **pool)                     # run=None: no log, no file
    assert same(teacher_before, teacher) and teacher.training and [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters()) and torch.equal(pool["surrogate"], kept)
    assert not same(student_before, student) and student.training and all(p.requires_grad for p in student.parameters())


def test_distill_is_a_function_of_its_seed_and_draws_from_no_global_stream():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = trained(**ATTACKING)[0]
    assert torch.equal(before, torch.random.get_rng_state())
    assert equal(one, trained(**ATTACKING)[0]) and not equal(one, trained(seed=1, **ATTACKING)[0])


def test_surrogates_have_to_be_typed_by_name_and_no_loader_is_called(monkeypatch):
    for name in ("surrogate", "pseudo_labels"):
        parameter = inspect.signature(sk.distill).parameters[name]
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    assert [*inspect.signature(sk.distill).parameters][:5] == ["teacher", "student", "data", "settings", "run"]
    assert not set(inspect.signature(sk.distill).parameters) & {"train", "test", "labels", "loader"}

    def stop(*args, **kwargs):
        raise AssertionError("a loader was called")
    for module, name in ((common, "load_dataset"), (run, "load_dataset"), (sk, "real_pictures"), (common, "read_pictures")):
        monkeypatch.setattr(module, name, stop)
    trained(**ATTACKING)


def test_teacher_and_student_see_the_identical_images():
    teacher, student, data = tiny_networks()
    seen = {"teacher": [], "student": []}
    for name, network in (("teacher", teacher), ("student", student)):
        network.register_forward_pre_hook(lambda module, inputs, name=name: seen[name].append(inputs[0].clone()))
    sk.distill(teacher, student, data, settings_of(), **toy_pool())
    assert len(seen["teacher"]) == len(seen["student"]) == 2 * 5 and all(map(torch.equal, seen["teacher"], seen["student"]))


def test_a_student_that_is_the_teacher_has_nothing_to_learn():
    teacher, _, data = tiny_networks("lenet5", "lenet5")
    _, recorder = trained(networks=(teacher, copy.deepcopy(teacher), data), lr_student=1e-9)
    assert recorder.rows[0]["loss_kd"] < 1e-6 and recorder.rows[0]["surrogate_agreement"] == 1


def test_the_attack_takes_its_share_of_each_batch_as_it_is(monkeypatch):
    sizes, mixed = [], sk.augment_surrogates
    monkeypatch.setattr(sk, "augment_surrogates", lambda pixels, *a: sizes.append(len(pixels)) or mixed(pixels, *a))
    sharp = torch.full((400, 1, 8, 8), 1.0)
    monkeypatch.setattr(sk, "attacked_images", lambda teacher, pixels, *a: (sharp[:4 * len(pixels)], 7))
    teacher, student, data = tiny_networks()
    batches = []
    student.register_forward_pre_hook(lambda module, inputs: batches.append(common.denormalize(inputs[0], data)))
    sk.distill(teacher, student, data, settings_of(**ATTACKING), **toy_pool())
    assert sizes == 2 * [5, *5 * [4]]                          # a quarter of 20 origins, then half of each batch of 8
    assert all(len(batch) == 8 and torch.allclose(batch[4:], torch.tensor(1.0), atol=1e-5) for batch in batches)
    sizes.clear()
    trained(**{**ATTACKING, "attack_share": 1.0, "attacks": 1})
    assert sizes == [10]                                       # once for both epochs; no clean image


def test_an_attack_replaces_the_one_before_also_when_it_finds_fewer(monkeypatch):
    found = iter([torch.full((20, 1, 8, 8), 1.0), torch.full((6, 1, 8, 8), 0.6)])
    monkeypatch.setattr(sk, "attacked_images", lambda *a: (next(found), 0))
    teacher, student, data = tiny_networks()
    batches = []
    student.register_forward_pre_hook(lambda module, inputs: batches.append(common.denormalize(inputs[0], data)))
    sk.distill(teacher, student, data, settings_of(**ATTACKING), **toy_pool(37))          # 5 batches of 4: not all 19 in order
    assert all(torch.allclose(batch[4:], torch.tensor(1.0 if number < 5 else 0.6), atol=1e-5) for number, batch in enumerate(batches))


def test_the_attack_gets_each_picture_with_its_own_pseudo_label(monkeypatch):
    seen = []
    monkeypatch.setattr(sk, "attacked_images", lambda teacher, pixels, labels, *a: seen.append((pixels, labels)) or (pixels[:0], 0))
    teacher, student, data = tiny_networks()
    labels = torch.arange(40) % 10
    surrogate = (10 * labels).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)       # the grey level is the label
    off = dict(randaugment=0, elastic=False, invert=0.0, mirror=False, pad=0, mixup=False)
    sk.distill(teacher, student, data, settings_of(**ATTACKING, **off), surrogate=surrogate, pseudo_labels=labels)
    for pixels, given in seen:
        assert torch.allclose(255 * pixels.mean((1, 2, 3)), 10.0 * given, atol=1e-3) and len(set(given.tolist())) > 1


def test_without_an_attacked_image_training_goes_on_with_clean_ones(monkeypatch):
    monkeypatch.setattr(sk, "attacked_images", lambda teacher, pixels, *a: (pixels[:0], 5))
    _, recorder = trained(**ATTACKING)
    assert [row["attacked"] for row in recorder.rows if "attacked" in row] == [0, 0] and recorder.state["student_steps"] == 10
    assert ["no image crossed" in row.get("text", "") for row in recorder.rows] == [True, False, True, False]     # said each time
    assert recorder.state["teacher_queries"] == 2 * 5 + 80 and recorder.state["images_synthesized"] == 40


def test_few_attacked_images_are_repeated_and_batches_stay_full(monkeypatch):
    monkeypatch.setattr(sk, "attacked_images", lambda teacher, pixels, *a: (pixels[:1], 0))
    teacher, student, data = tiny_networks()
    sizes = []
    student.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for share in (0.1, 0.5, 1.0):
        sk.distill(teacher, student, data, settings_of(**{**ATTACKING, "attack_share": share, "batch_size": 7}), **toy_pool())
    assert sizes == 3 * 2 * 6 * [7]                            # 40 pictures: 6 batches, the last one filled up from the next pass


@pytest.mark.parametrize("changes", [
    dict(temperature=1.0), dict(targets="one-hot"), dict(standardize=True), dict(randaugment=1), dict(magnitude=28), dict(elastic=False),
    dict(invert=0.5), dict(mirror=False), dict(pad=2), dict(fill="black"), dict(fill="mean"), dict(mixup=False), dict(optimizer="sgd"),
    dict(lr_student=0.01), dict(weight_decay=0.5), ATTACKING], ids=str)
def test_every_reading_reaches_the_student(changes):
    base = dict(temperature=4.0, targets="soft", randaugment=4, magnitude=14, elastic=True, invert=0.1, mirror=True, pad=1, fill="black", mixup=True,
                optimizer="adam", lr_student=2e-3, weight_decay=0.0)
    if changes == dict(fill="black"):
        base["fill"] = "mean"
    assert not equal(trained(**base)[0], trained(**{**base, **changes})[0])


@pytest.mark.parametrize("changes", [dict(attack_share=1.0), dict(attacks=1), dict(attack_step=64.0), dict(attack_radius=40.0), dict(attack_iterations=1),
                                     dict(attack_threshold=0.101), dict(deeper_step=60.0), dict(attack_target="pseudo")], ids=str)
def test_every_setting_of_the_attack_reaches_the_student(changes):
    base = {**ATTACKING, "deeper_radius": 128.0}
    assert not equal(trained(**base)[0], trained(**{**base, **changes})[0])
    assert not equal(trained(**{**base, "deeper_step": 60.0})[0], trained(**{**base, "deeper_step": 60.0, "deeper_radius": 8.0})[0])


def test_the_student_learns_what_this_teacher_says():
    """A linear teacher, random images: the student finds it on images that neither was trained on."""
    data = PLAIN
    with common.seeded(0):
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    pool = dict(surrogate=torch.randint(0, 256, (1000, 1, 8, 8), dtype=torch.uint8, generator=rng_of()), pseudo_labels=torch.zeros(1000, dtype=torch.long))
    test = torch.rand(500, 1, 8, 8, generator=rng_of(1))
    sk.distill(teacher, student, data, settings_of(epochs=30, batch_size=50, lr_student=0.01, randaugment=0, elastic=False, invert=0.0, mixup=False), **pool)
    assert common.agreement(student(test), teacher(test)) > 0.9


def test_a_teacher_that_is_not_from_models():
    _, student, data = tiny_networks()
    trained(networks=(ForeignTeacher(), student, data), **ATTACKING)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named():
    with pytest.raises(FloatingPointError, match="loss_kd became"):
        trained(lr_student=float("inf"))


def test_hooks_and_flags_are_back_after_an_exception():
    teacher, student, data = tiny_networks()
    calls = []

    def stop(module, inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError
    teacher.register_forward_pre_hook(stop)
    with pytest.raises(KeyError):
        trained(networks=(teacher, student, data))
    assert all(p.requires_grad for network in (teacher, student) for p in network.parameters()) and teacher.training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sk.GENERATORS)
def test_pictures_and_distill_on_a_gpu(name):
    teacher, student, data = tiny_networks()
    settings = settings_of(surrogate=name, **ATTACKING)
    def draw(start, n, rng):
        return sk.procedural_pixels(name, n, data, settings, rng)
    teacher, student = teacher.cuda(), student.cuda()
    assert sk.GENERATORS[name](4, 32, torch.Generator("cuda").manual_seed(0)).device.type == "cuda"
    pool = sk.balanced_pool(teacher, data, settings, draw)
    sk.inspect_surrogate(teacher, pool["pixels"], data, settings)
    sk.distill(teacher, student, data, settings, surrogate=pool["pixels"], pseudo_labels=pool["labels"])


def test_bf16_stays_close_to_fp32():
    one, other = trained(precision="fp32")[1], trained(precision="bf16")[1]
    assert one.rows[0]["loss_kd"] == pytest.approx(other.rows[0]["loss_kd"], rel=0.1) and one.rows != other.rows


# -------------------------------------------------------------------------------------------------------------------- its script
def test_a_run_leaves_what_it_promises(teacher_file, in_tmp, capsys):
    sk.main([*tiny_args(sk, teacher_file), *ATTACK_FLAGS, "--out", "out"])
    rows = rows_of(in_tmp / "out", without_seconds=False)
    assert [row["event"] for row in rows] == ["start", "pool", "surrogate", "epoch", "epoch", "end"]
    assert {"relative_entropy", "relative_entropy_before", "images", "fewest_of_a_class", "images_synthesized", "teacher_queries"} <= set(rows[1])
    assert {"relative_entropy", "relative_entropy_augmented", "confidence", "feature_spread", "class_share"} <= set(rows[2])
    assert {"loss_kd", "surrogate_agreement", "teacher_entropy", "relative_entropy", "attacked", "student_steps", "teacher_queries", "seconds_boundary",
            "seconds_distillation", "student_acc"} <= set(rows[3])
    assert {path.name for path in (in_tmp / "out").iterdir()} == {"log.jsonl", "samples.png", "student.pt", "checkpoint.pt"}
    out = capsys.readouterr().out
    assert "relative entropy of predictions" in out and max(map(len, out.splitlines())) < 330
    sk.main([*tiny_args(sk, teacher_file), "--student", "lenet5_half"])                   # the pool is kept and used again
    assert [path.name for path in (in_tmp / "checkpoints").iterdir() if path.name != "toy.pt"] == ["toy.spectrum-seed0.pt"]
    sk.main([*tiny_args(sk, teacher_file), "--no-balance"])
    assert (in_tmp / "checkpoints" / "toy.spectrum-unbalanced-seed0.pt").exists()


def test_inspect_only_says_what_the_teacher_sees_and_trains_nothing(teacher_file, in_tmp, capsys):
    sk.main([*tiny_args(sk, teacher_file), "--surrogate", "leaves", "--inspect-only", "--out", "out"])
    assert [row["event"] for row in rows_of(in_tmp / "out")] == ["start", "pool", "surrogate", "end"]
    assert (in_tmp / "out" / "samples.png").exists() and not (in_tmp / "out" / "student.pt").exists()
    assert "leaves, 40 pictures" in capsys.readouterr().out


def test_a_folder_of_ones_own_pictures(teacher_file, in_tmp, capsys):
    from PIL import Image
    (in_tmp / "mine" / "deeper").mkdir(parents=True)
    for number in range(30):
        picture = torch.randint(0, 256, (20, 24 + number, 3), dtype=torch.uint8).numpy()
        Image.fromarray(picture).save(in_tmp / "mine" / ("deeper" if number % 2 else ".") / f"{number}.png")
    sk.main([*tiny_args(sk, teacher_file), "--surrogate", "folder:mine", "--no-balance", "--out", "out"])
    assert rows_of(in_tmp / "out")[1]["images"] == 30
    assert common.read_pictures(common.picture_names("mine"), 16).shape == (30, 3, 16, 16)
    with pytest.raises(SystemExit) as stop:                    # a pool of these pictures is not taken for others
        (in_tmp / "mine" / "8.png").rename(in_tmp / "mine" / "other.png")
        sk.main([*tiny_args(sk, teacher_file), "--surrogate", "folder:mine", "--no-balance"])
    assert stop.value.code == 2 and "pictures = " in capsys.readouterr().err
    (in_tmp / "mine" / "broken.jpg").write_bytes(b"no picture")
    (in_tmp / "empty").mkdir()
    for folder, message in (("mine", "no whole image"), ("empty", "there is no picture in folder 'empty'"), ("nowhere", "there is no picture in folder 'nowhere'"),
                            ("", "there is no picture in folder ''")):
        with pytest.raises(SystemExit) as stop:
            sk.main([*tiny_args(sk, teacher_file), "--surrogate", f"folder:{folder}", "--pool", "other.pt", "--out", "refused"])
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert folder == "mine" or not (in_tmp / "refused").exists()                      # a broken file is met when it is read
        shutil.rmtree(in_tmp / "refused", ignore_errors=True)


def test_another_data_set_as_surrogate(in_tmp, capsys):
    """Digits for a teacher of something else in their shape, whose file alone says what it takes."""
    teacher, _, data = tiny_networks()
    for name in ("fashion_mnist", "digits"):
        run.save_classifier(in_tmp / f"{name}.pt", teacher, "wrn10_1", data._replace(image_shape=(1, 16, 16)), name)
    args = [*tiny_args(sk, "./fashion_mnist.pt"), "--surrogate", "digits", "--out", "out"]
    args[args.index("digits")] = "none"
    sk.main(args)
    assert rows_of(in_tmp / "out")[0]["arguments"]["preset"] == "fashion_mnist-real" and rows_of(in_tmp / "out")[1]["images"] == 40
    real, _ = common.load_dataset("digits", True)
    available, read, _ = common.real_pictures("digits")
    assert available == 1437 and torch.equal(read(torch.tensor([3, 5]), 8), real.pixels[[3, 5]] / 16)
    args[args.index("./fashion_mnist.pt")] = "./digits.pt"
    with pytest.raises(SystemExit) as stop:                    # the file knows, though --dataset is none
        sk.main([*args[:-1], "refused"])
    assert stop.value.code == 2 and "the teacher's own data" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--surrogate", "digits"], "the teacher's own data"), (["--surrogate", "clouds"], "unknown surrogate 'clouds'"), (["--magnitude", "31"], "0 to 30"),
    (["--invert", "1.5"], "--invert 0 to 1"), (["--attack-share", "0"], "--attack-share"), (["--attack-threshold", "2"], "at most 1"),
    (["--surrogate", "mnist", "--data-dir", "nowhere"], "could not be downloaded"), (["--attack-iterations", "0"], "above 0")])
def test_what_makes_no_sense_is_refused_before_the_folder_is_made(flags, message, teacher_file, in_tmp, capsys, monkeypatch):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", no_network)
    with pytest.raises(SystemExit) as stop:
        sk.main([*tiny_args(sk, teacher_file), *flags, "--out", "refused"])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (in_tmp / "refused").exists()


def test_real_surrogates_take_the_real_preset_unless_one_is_named(monkeypatch):
    chosen = []

    def stop(method, settings):
        chosen.append(settings)
        raise common.BadInput("far enough")
    monkeypatch.setattr(sk, "Run", stop)
    monkeypatch.setattr(sk, "real_pictures", lambda *args: (1, None, ""))
    for argv, preset, temperature in ((["--surrogate", "cifar100"], "cifar10-real", 2), (["--surrogate", "leaves"], "cifar10", 20),
                                      (["--surrogate", "folder:x"], "cifar10-real", 2), (["--surrogate", "cifar100", "--preset", "cifar10"], "cifar10", 20),
                                      (["--dataset", "mnist", "--surrogate", "fashion_mnist"], "mnist-real", 4),
                                      (["--surrogate", "svhn", "--temperature", "7"], "cifar10-real", 7)):
        with pytest.raises(SystemExit):
            sk.main(argv)
        assert (chosen[-1].preset, chosen[-1].temperature) == (preset, temperature)
    assert (chosen[4].teacher, chosen[4].student) == ("lenet5_bn", "lenet5_half_bn")


TICKS = 1 + 2 * (1 + 5)      # one chunk of pictures; 2 epochs of an attack and 5 steps


@pytest.mark.parametrize("saves", [[1], [2], [3], [5], [7], [8], [9], [13], [14], list(range(1, TICKS + 2))], ids=str)
def test_a_killed_run_ends_like_one_that_was_not(saves, teacher_file, in_tmp, monkeypatch):
    def args(folder):
        return [*tiny_args(sk, teacher_file), *ATTACK_FLAGS, "--pool", f"{folder}.pt", "--out", folder, "--resume"]
    sk.main(args("straight"))
    assert rows_of(in_tmp / "straight")[-2]["attacked"] > 0
    kill_at(monkeypatch, saves)
    for _ in saves:
        with pytest.raises(Killed):
            sk.main(args("killed"))
    sk.main(args("killed"))
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    one, other = (torch.load(in_tmp / f"{name}.pt", weights_only=True)["result"] for name in ("straight", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("balance", [False, True])
def test_a_pool_killed_halfway_goes_on_with_the_same_pictures(balance, in_tmp, monkeypatch):
    teacher, _, data = tiny_networks()

    def made(keeper=None):
        settings = settings_of(pool_images=150, balance=balance, pool_budget=2)
        return sk.balanced_pool(teacher, data, settings, lambda start, n, rng: sk.procedural_pixels("leaves", n, data, settings, rng), None, keeper)
    straight = made()
    kill_at(monkeypatch, [1, 2])
    for _ in range(2):
        with pytest.raises(Killed):
            made(run.Progress(in_tmp / "p.pt", {}))
    pool = made(run.Progress(in_tmp / "p.pt", {}))
    assert all(torch.equal(straight[key], pool[key]) for key in straight)


def test_a_report_killed_at_its_end_can_be_finished(teacher_file, in_tmp, monkeypatch):
    args = [*tiny_args(sk, teacher_file), "--inspect-only", "--out", "out", "--resume"]
    kill_at(monkeypatch, [2])                                  # the pool, then the save of `finish`
    with pytest.raises(Killed):
        sk.main(args)
    sk.main(args)
    assert [row["event"] for row in rows_of(in_tmp / "out")][-1] == "end"


def test_what_is_the_same_data():
    assert common.same_data("mnist", "mnist28") and common.same_data("folder:a@32", "folder:./a") and common.same_data("folder:a/test", "folder:a@8")
    assert not common.same_data("mnist", "fashion_mnist") and not common.same_data("folder:a", "folder:b") and not common.same_data("folder:a", "mnist")
    assert not common.same_data("folder:a28", "folder:a")


def test_a_foreign_teacher_that_cannot_take_an_empty_batch():
    class Viewer(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(64, 10)

        def forward(self, x):
            return self.out(x.reshape(x.size(0), x.numel() // x.size(0)))                 # divides by 0 for none
    pixels = torch.rand(8, 1, 8, 8, generator=rng_of())
    with common.seeded(0):
        teacher = Viewer()
    seen = teacher(pixels).argmax(1)
    for labels, radius in ((seen, 32.0), ((seen + 1) % 10, 0.0)):                         # nothing to cross; nothing can
        made, _ = sk.attacked_images(teacher, pixels, labels, PLAIN, settings_of(attack_target="pseudo", attack_radius=radius), rng_of())
        assert made.shape == (0, 1, 8, 8)


def test_presets_are_whole_and_say_what_they_are_for():
    keys = {frozenset(preset) for preset in sk.PRESETS.values()}
    assert len(keys) == 1
    for name, preset in sk.PRESETS.items():
        assert (preset["surrogate"] in common.DATASETS) == name.endswith("-real"), name
        assert preset["temperature"] == {"cifar10-real": 2, "cifar100-real": 2}.get(name, 20 if name.startswith("cifar") else preset["temperature"])


def test_the_two_pictures_of_the_benchmarks_are_drawn(teacher_file, in_tmp, capsys):
    from PIL import Image
    import sampling_picture
    import surrogate_sets
    sampling_picture.main(["--dataset", "digits", "--surrogates", "leaves", "--teacher-epochs", "1", "--epochs", "1", "--pool-images", "40", "--out", "plane.png"])
    assert min(Image.open("plane.png").size) > 250 and "leaves: relative entropy" in capsys.readouterr().out
    for name in ("noise", "leaves"):
        sk.main([*tiny_args(sk, teacher_file), "--surrogate", name, "--inspect-only"])
    surrogate_sets.main([f"checkpoints/toy.{name}-seed0.pt" for name in ("noise", "leaves")] + ["--out", "sets.png"])
    assert Image.open("sets.png").size[1] > 80


def test_the_readmes_table_tells_ways_and_presets_apart(capsys):
    import table

    def log(preset, seed, score, **changes):
        arguments = {**sk.PRESETS[preset], "preset": preset, "seed": seed, "teacher": "a", "student": "b", "device": "cpu", "precision": "fp32", **changes}
        return [dict(event="start", method="surrogate_kd", arguments=arguments), dict(event="pool", relative_entropy_before=0.25 + 0.5 * seed),
                dict(event="surrogate", relative_entropy=1.0, relative_entropy_augmented=0.5),
                dict(event="end", student_acc_last=score, teacher_acc=0.99, seconds=10 * (1 + seed))]
    runs = {"1": log("mnist", 0, 0.90), "2": log("mnist", 1, 0.92), "3": log("mnist", 0, 0.80, balance=False), "4": log("mnist", 0, 0.95, boundary_attack=True),
            "5": log("digits", 0, 0.5), "6": log("digits", 0, None, inspect_only=True), "7": log("mnist-real", 0, 0.7)}
    table.surrogate_table(runs)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| surrogate_kd, ")][1:]
    assert [row[0] for row in rows] == ["| surrogate_kd, digits", "| surrogate_kd, mnist", "| surrogate_kd, mnist-real"]
    assert rows[1][5:] == ["0.500", "1.000", "0.500", "**80.00** (1 of the seeds)", "**91.00 ± 1.41**", "**95.00** (1 of the seeds)", "15", "0, 1 |"]
    assert rows[2][8:] == ["**70.00**", "-", "-", "-", "0 |"]
