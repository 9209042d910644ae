"""surrogate_kd.py: golden numbers (1e-5), pictures, pool, attack, against a search image by image, script."""
import copy
import dataclasses
import json
import math
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

import common
import running
import surrogate_kd as sk
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (D, Log, assert_close, equal, in_float64, kl, near, near6, refused, rows_of,
                     save_untrained, sure)

T = ((torch.arange(8) * 3) % 8).reshape(2, 4).to(D)
S = ((torch.arange(8) * 5) % 8).reshape(2, 4).to(D) / 2
WEIGHTS = (((torch.arange(12) * 5) % 7) - 3).reshape(3, 4).to(D)
PIXELS = ((torch.arange(8) * 3) % 8).reshape(2, 1, 2, 2).to(D) / 10 + 0.1
PLAIN = common.DataSpec((1, 8, 8), 10, (0.0,), (1.0,))         # pixels are images
OFF = dict(randaugment=0, elastic=False, invert=0.0, mirror=False, pad=0, mixup=False)
ATTACK = dict(boundary_attack=True, attack_target="random", attack_radius=255.0, attack_step=32.0,
              attack_threshold=1.0)


def made(function, *args, seed=0, **more):
    with common.seeded(seed):
        return function(*args, **more)


def bytes_of(*shape):
    return made(torch.randint, 256, shape).to(torch.uint8)


def settings_of(**changes):
    return tiny_settings(sk, **changes)


def test_goldens_1_2_3_losses_measures_and_mixup():
    for temperature, expected in ((1, 2.415988), (2, 3.530131), (5, 3.883074), (20, 3.746961)):
        near(sk.kd_loss(S, T, temperature), expected)
    centred = (T - T.mean(1, keepdim=True)) - (S - S.mean(1, keepdim=True))    # the limit is a distance
    near(centred.square().sum(1).mean() / 8, 3.65625), near(sk.kd_loss(S, T, 2000.0), 3.65625, 3e-3)
    near(sk.one_hot_loss(S, T), F.cross_entropy(S, torch.tensor([2, 1])))      # T's first choices
    rows = sk.standardized(T)
    near(rows.mean(1), [0.0, 0.0]), near(rows.std(1), [1.0, 1.0]), near(sk.standardized(3 * T + 7), rows)
    certain = sk.standardized(50 * torch.eye(10, dtype=D))     # the figures of note 9
    near((certain / 20).softmax(1)[0, :2], [0.115, 0.098], 5e-4)
    near((certain / 2).softmax(1)[0, 0], 0.35, 2e-3)
    counts = torch.tensor([[5, 3, 2, 0], [25] * 4, [97, 1, 1, 1], [100, 0, 0, 0]])
    near6([sk.evenness(row) for row in counts], [0.742738, 1, 0.120970, 0])
    x = (torch.arange(8) / 10).reshape(2, 1, 2, 2)
    mixed = sk.mixup(x, torch.tensor([0.25, 0.5]), torch.tensor([1, 0]))
    near6(mixed.flatten(1), [[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5]])


def linear_teacher(pixels):
    return 6 * pixels.flatten(1) @ WEIGHTS.T


def test_goldens_4_and_5_the_trace_of_the_attack_and_a_step_deeper(monkeypatch):
    trials, step, targets = [], sk.cross_entropy_step, torch.tensor([2, 0])
    monkeypatch.setattr(sk, "cross_entropy_step", lambda *args: trials.append(args[1]) or step(*args))
    assert linear_teacher(PIXELS).argmax(1).tolist() == [0, 2]
    after, before, rows, iterations = sk.boundary_pairs(
        linear_teacher, PIXELS, targets, 16 / 255, 128 / 255, 20, 0.9)
    assert rows.tolist() == [0, 1] and iterations.tolist() == [2, 4]
    # how far the first pixel is from where it began, of 255. Image 0 goes 16, back and 8, 8.8 more; image 1
    # goes 16, 17.6, 19.36, 21.296 more, back, and 10.648
    assert [len(x) for x in trials] == [2, 2, 2, 2, 1, 1]
    near([255 * abs(x[0] - PIXELS[0]).flatten()[0] for x in trials[1:4]], [16.0, 8.0, 16.8])
    near([255 * abs(x[-1] - PIXELS[1]).flatten()[0] for x in trials[1:]], [16.0, 33.6, 52.96, 74.256, 63.608])
    for found, expected, confidence, classes, moved, surer in (
            (after, [[.165882, .334118, .634118, .265882], [.250557, 1, .549443, .350557]],
             [.754013, .601027], [2, 0],
             [[.181569, .318431, .618431, .281569], [.234871, 1, .565129, .334871]], [.906580, .808234]),
            (before, [[.131373, .368627, .668627, .231373], [.292314, 1, .507686, .392314]],
             [.790419, .890771], [0, 2],
             [[.115686, .384314, .684314, .215686], [.308, .984314, .492, .408]], [.921674, .959848])):
        further = sk.deeper(linear_teacher, found, torch.tensor(classes), 4 / 255)
        for pixels, values, sureness in ((found, expected, confidence), (further, moved, surer)):
            p = linear_teacher(pixels).softmax(1)
            near6(pixels.flatten(1), values), near6(p.amax(1), sureness)
            assert p.argmax(1).tolist() == classes


def test_golden_6_leaves_spectrum_and_chaos_game():
    radii, cdf = common.leaf_radius_cdf(0.03)
    near6(cdf[[0, 1, 9, 49]], [0.277044, 0.453399, 0.870538, 0.991460])
    near6((cdf.diff(prepend=torch.zeros(1)) * radii).sum(), 0.053233)
    plain, leaning = sk.spectrum_magnitude(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 0.1]), 8)
    near(plain[[0, 1, 1, 4, 0, 0], [1, 0, 1, 4, 4, 0]], [64.0, 64, 32, 2, 4, 0])
    near(leaning[[0, 1, 2], [1, 0, 3]], [9.849155, 6.498020, 1.594541])
    maps = torch.tensor([[[.5, 0, 0, .5, 0, 0], [.5, 0, 0, .5, .5, 0], [.5, 0, 0, .5, .25, .5]]])
    x, y = sk.ifs_points(maps, torch.tensor([0, 1, 2, 1, 1, 0, 2]).view(7, 1, 1))
    near([x[-1, 0, 0], y[-1, 0, 0]], [0.46875, 0.53125])


# ---------------------------------------------------------------------------------- pictures and augmentation
@pytest.mark.parametrize("name", sk.GENERATORS)
def test_pictures_are_in_0_1_told_apart_and_a_function_of_the_seed(name):
    for size in (32, 40):
        pixels, again, others = (made(sk.GENERATORS[name], 12, size, seed=seed) for seed in (3, 3, 4))
        assert pixels.shape == (12, 3, size, size) and pixels.dtype == torch.float32
        assert 0 <= pixels.min() and pixels.max() <= 1
        assert torch.equal(pixels, again) and not torch.equal(pixels, others)
        assert torch.pdist(pixels.flatten(1)).min() > 0.5      # no two alike
        assert pixels.std((1, 2, 3)).min() > 0.01              # none of one colour
    grey = made(sk.procedural_pixels, name, 5, PLAIN, settings_of(strokes=True), "cpu")
    assert grey.shape == (5, 1, 8, 8) and 0 <= grey.min() and grey.max() <= 1


def test_pictures_are_what_they_are_called(monkeypatch):
    noise = made(sk.noise_images, 200, 32, mean=(0.2, 0.5), std=(0.05, 0.1))
    near(noise.mean((0, 2, 3)), [0.2, 0.5], 2e-3), near(noise.std((0, 2, 3)), [0.05, 0.1], 2e-3)
    colours = [len(image.flatten(1).T.unique(dim=0)) for image in made(sk.leaves_images, 8, 32)]
    assert 3 < min(colours) and max(colours) <= 200            # flat: far fewer colours than pixels
    background = torch.full((6, 3, 32, 32), 2.0)               # a colour that no fractal has
    hit = made(sk.fractal_images, 6, 32, background=background, least=0.2).amax(1) < 1.5
    assert hit.float().mean((1, 2)).min() >= 0.2 and (~hit).flatten(1).any(1).all()
    bright = (made(sk.strokes, made(sk.shader_images, 64, 32)) > 0.5).float().mean((1, 2, 3))
    assert 0.04 < bright.min() and bright.max() < 0.55
    assert sk.strokes(torch.full((2, 3, 8, 8), 0.5)).isfinite().all()                     # one colour
    magnitude, f = sk.spectrum_magnitude, torch.arange(1.0, 16).log()
    for a in (1.0, 2.5):       # the mean slope of log power over log frequency is twice that of the magnitude
        monkeypatch.setattr(sk, "spectrum_magnitude", lambda _, d, size: magnitude(0 * d + a, 0 * d, size))
        pixels = made(sk.spectrum_images, 64, 32)
        waves = torch.fft.fft2(pixels - pixels.mean((2, 3), keepdim=True))
        power = waves.abs().square().mean((0, 1))[0, 1:16].log()
        assert abs(((f - f.mean()) * power).sum() / (f - f.mean()).square().sum() + 2 * a) < 0.3


@pytest.mark.parametrize("shape", [(28, 1, 8, 8), (13, 3, 16, 16)])
def test_what_is_off_changes_nothing_every_switch_does_and_pixels_stay_pixels(shape):
    pixels = made(torch.rand, *shape)
    near6(sk.augment_surrogates(pixels, settings_of(**OFF)), pixels)
    near6(sk.augment_surrogates(pixels, settings_of(**{**OFF, "invert": 1.0})), 1 - pixels)
    for switch in ("randaugment", "elastic", "invert", "mirror", "pad", "mixup"):
        value = {"randaugment": 2, "invert": 0.5, "pad": 1}.get(switch, True)
        out = made(sk.augment_surrogates, pixels, settings_of(**{**OFF, switch: value}))
        assert out.shape == shape and out.min() >= -1e-6 and out.max() <= 1 + 1e-6
        assert not torch.allclose(out, pixels, atol=1e-3), switch


@pytest.mark.parametrize("switch", [dict(pad=3), dict(elastic=True)], ids=["pad", "elastic"])
def test_what_comes_in_from_outside_is_black_or_the_mean_colour(switch):
    colours = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1).expand(40, 2, 8, 8)
    mean, black = (made(sk.augment_surrogates, colours, settings_of(**{**OFF, **switch}, fill=fill))
                   for fill in ("mean", "black"))
    near(mean, colours)
    assert 0 <= black.min() < 0.01 and black.amax((0, 2, 3)).tolist() == pytest.approx([0.25, 0.75])


# ------------------------------------------------------------------------------------------------------- pool
class Brightness(nn.Module):
    """Answers by the mean of an image: class k for means around k / 10."""
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(200.0))

    def forward(self, images):
        return -self.scale * (images.mean((1, 2, 3))[:, None] - (torch.arange(10) + 0.5) / 10) ** 2


def pictures(levels):
    return levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def pool_of(level_of, available=None, **changes):
    """A pool from pictures of one grey level.   -> their bytes, how many of each class, seen, all levels"""
    draws = []

    def draw(start, n):
        level = (255 * level_of(start, n)).round().clamp(1, 254)
        draws.append((start, (level + (level % 51 == 0)) / 255))               # on no boundary of classes
        return pictures(draws[-1][1])
    settings = settings_of(**{**dict(pool_images=200, pool_budget=2), **changes})
    pixels, labels, seen = sk.balanced_pool(Brightness(), PLAIN, settings, draw, available)
    assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (1, 8, 8)
    assert torch.equal(Brightness()(pixels / 255).argmax(1), labels)
    assert [start for start, _ in draws] == [64 * chunk for chunk in range(len(draws))]
    levels = torch.cat([level for _, level in draws])
    assert torch.equal(seen, torch.bincount(Brightness()(pictures(levels)).argmax(1), minlength=10))
    return pixels[:, 0, 0, 0], torch.bincount(labels, minlength=10), seen, levels


def test_a_balanced_pool_is_balanced_and_an_unbalanced_one_holds_the_first_ones():
    def skewed(start, n):
        return torch.rand(n) ** 3                              # bright ones are rare
    found, counts, seen, levels = pool_of(skewed, pool_images=100, pool_budget=50)
    assert (counts == 10).all() and seen.min() >= 10 and len(found.unique()) > 50
    before = torch.bincount(Brightness()(pictures(levels[:-64])).argmax(1), minlength=10)
    assert before.min() < 10                                   # it stopped when it had enough
    found, counts, seen, levels = pool_of(skewed, pool_images=100, balance=False)
    assert counts.max() > 30 and seen.sum() == 100
    assert torch.equal(found, (255 * levels).round().to(torch.uint8))


def test_a_short_class_repeats_its_pictures_an_empty_one_leaves_its_share_and_a_set_may_be_small():
    def rare(level, below):                                    # one of `level` in 64, the others even
        return lambda start, n: torch.cat([torch.tensor([level]), torch.rand(n - 1) * below])
    _, counts, seen, _ = pool_of(rare(0.55, 0.49))             # classes 0 to 5 only, few of class 5
    assert (counts[6:] == 0).all() and counts[:6].min() >= 20 and counts[:6].max() <= 50
    assert counts.sum() == 200 and seen.sum() == 400 and 0 < seen[5] < 20              # the budget
    _, counts, seen, _ = pool_of(rare(0.95, 0.89), pool_budget=3)
    assert 0 < seen[9] < 20 <= seen[:9].min() and (counts == 20).all()         # alone: its whole share
    level = torch.linspace(0.01, 0.99, 70)
    for balance, total in ((True, 100), (False, 70)):
        sizes = dict(pool_images=100, balance=balance)
        _, counts, seen, _ = pool_of(lambda start, n: level[start:start + n], 70, **sizes)
        assert counts.sum() == total and seen.sum() == 70 and ((counts == 10).all() or not balance)


def test_the_report_tells_a_set_of_one_class_from_an_even_one():
    (teacher, _, data), noise = tiny_networks(), bytes_of(300, 1, 8, 8)
    found = sk.inspect_surrogate(sure(teacher), noise, data, settings_of(**OFF))
    logits = teacher.eval()(common.normalize(noise / 255, data))
    predicted = logits.argmax(1)
    share = torch.bincount(predicted, minlength=10) / 300
    near(found["evenness"], -torch.xlogy(share, share).sum() / math.log(10))
    near(found["evenness_augmented"], found["evenness"])       # nothing is augmented
    near(found["confidence"], logits.softmax(1).amax(1).mean()), near(found["class_share"], share)
    alike = sk.inspect_surrogate(teacher, noise[:1].expand(50, -1, -1, -1), data, settings_of(**OFF))
    assert alike["evenness"] == 0 and max(alike["class_share"]) == 1 and json.dumps(found)


class Pooled(nn.Module):
    """A network without nn.Linear: its head is a 1x1 convolution and the mean over the map."""
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 10, 1))

    def forward(self, images):
        return self.layers(images).mean((2, 3))


def pooled():
    return made(Pooled)


def test_a_teacher_without_a_linear_layer_teaches(in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooled", types.SimpleNamespace(teacher=pooled))
    argv = tiny_args(sk, "pooled:teacher", boundary_attack=True)
    sk.main([*argv, "--out", "out"])
    assert rows_of("out")[-1]["event"] == "end"


# ----------------------------------------------------------------------------------------------------- attack
def attack_of_each_image(classify, pixels, targets, step, radius, iterations, threshold):
    """The same search, image by image, with two forward passes and one backward an iteration."""
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
                    found[row] = adv[0], before.detach()[0], iteration
                    break
                adv, size = before.detach(), 0.5 * size
            else:
                size = 1.1 * size
    return found


def small_classifier(seed):
    """With five classes and, per seed, 64 pictures, what it sees in them, and the class after that."""
    with common.seeded(seed):
        network = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 5))
        pixels = torch.rand(64, 1, 8, 8, dtype=D)
    for parameter in network.double().parameters():
        parameter.data *= 3
    seen = network(pixels).argmax(1)
    return network, pixels, seen, (seen + 1) % 5


@pytest.mark.parametrize("seed", range(4))
def test_the_attack_equals_the_search_image_by_image(seed):
    """One pass an iteration, from which found images are gone; pairs straddle a boundary, unsure and near."""
    network, pixels, _, targets = small_classifier(seed)
    expected, sizes = attack_of_each_image(network, pixels, targets, 4 / 255, 64 / 255, 20, 0.9), []
    network.register_forward_pre_hook(lambda network, x: sizes.append(len(x[0])))
    pairs = sk.boundary_pairs(network, pixels, targets, 4 / 255, 64 / 255, 20, 0.9)
    left = [64 - int((pairs[3] < k).sum()) for k in range(20)]
    assert sizes == [64, *(n for n in left if n)] and len(pairs[2]) > 5 and len(pairs[3].unique()) > 1
    assert sorted(pairs[2].tolist()) == sorted(expected) and all(p.grad is None for p in network.parameters())
    for after, before, row, iteration in zip(*pairs):
        near(after, expected[int(row)][0], 1e-12), near(before, expected[int(row)][1], 1e-12)
        assert iteration == expected[int(row)][2]
    (sure_after, after), (sure_before, before) = (network(part).softmax(1).max(1) for part in pairs[:2])
    assert torch.equal(after, targets[pairs[2]]) and (before != after).all()
    assert max(sure_after.max(), sure_before.max()) < 0.9
    for part in pairs[:2]:
        assert (part - pixels[pairs[2]]).abs().max() <= 64 / 255 + 1e-9
        assert 0 <= part.min() and part.max() <= 1


@pytest.mark.parametrize("target", ["pseudo", "random"])
def test_attacked_images_are_four_of_each_and_a_step_deeper_each_on_its_own_side(target):
    """After: the pseudo-label, or another class than is seen; before: another; deeper: surer of the same."""
    network, pixels, seen, labels = small_classifier(7)
    settings = settings_of(attack_target=target, attack_radius=48.0, attack_iterations=20)
    data, pseudo = PLAIN._replace(num_classes=5), settings_of(attack_target="pseudo")
    images = made(sk.attacked_images, network, pixels, labels, data, settings)
    parts = [network(part).softmax(1) for part in images.chunk(4)]
    assert 4 * 10 < len(images) <= 4 * 64 and len(images) % 4 == 0 and not images.requires_grad
    after, before, *_ = [part.argmax(1) for part in parts]
    for near_it, further, own in zip(parts[:2], parts[2:], (after, before)):
        assert (further.gather(1, own[:, None]) > near_it.gather(1, own[:, None])).all()
    _, _, rows, _ = sk.boundary_pairs(network, pixels, labels, 2 / 255, 48 / 255, 20, 0.9)
    assert (before != after).all() and torch.equal(after, labels[rows]) == (target == "pseudo")
    assert sk.attacked_images(network, pixels, seen, data, pseudo).shape == (0, 1, 8, 8)     # none to cross


def test_a_teacher_that_cannot_take_an_empty_batch_is_not_given_one():
    class Viewer(nn.Linear):
        def forward(self, x):
            return super().forward(x.reshape(x.size(0), x.numel() // x.size(0)))       # divides by 0 for none
    pixels, teacher = made(torch.rand, 8, 1, 8, 8), made(Viewer, 64, 10)
    seen = teacher(pixels).argmax(1)
    for labels, radius in ((seen, 32.0), ((seen + 1) % 10, 0.0)):              # nothing to cross; nothing can
        settings = settings_of(attack_target="pseudo", attack_radius=radius)
        assert sk.attacked_images(teacher, pixels, labels, PLAIN, settings).shape == (0, 1, 8, 8)


# --------------------------------------------------------------------------------------------------- training
def trained(n=40, teacher=None, pixels=None, **changes):
    """-> the student, what it was shown (pixels), the log"""
    (usual, student, data), log, shown = tiny_networks(), Log(), []
    student.register_forward_pre_hook(lambda student, x: shown.append(common.denormalize(x[0], data)))
    pixels = bytes_of(n, 1, 8, 8) if pixels is None else pixels
    sk.distill(teacher or usual, student, data, settings_of(**changes), log, surrogate=pixels,
               pseudo_labels=torch.arange(n) % 10)
    return student, shown, log


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("changes", [
    {}, dict(ATTACK, standardize=True, weight_decay=0.01), dict(visits=2),
    dict(optimizer="sgd", targets="one-hot", lr_student=0.02, weight_decay=0.01)], ids=str)
def test_distill_equals_the_algorithm_written_anew_on_the_images_that_it_was_shown(changes, in_float64):
    (teacher, other, data), settings = tiny_networks(), settings_of(**changes)
    student, shown, log = trained(teacher=sure(teacher), **changes)
    optimizer = torch.optim.AdamW(other.parameters(), weight_decay=settings.weight_decay)
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(other.parameters(), momentum=0.9, nesterov=True, weight_decay=0.01)
    teacher.eval()
    for step, pixels in enumerate(shown):
        optimizer.param_groups[0]["lr"] = (settings.lr_student, (settings.lr_student + 1e-6) / 2)[step // 5]
        s, t = other(common.normalize(pixels, data)), teacher(common.normalize(pixels, data)).detach()
        if settings.standardize:
            s, t = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6) for x in (s, t))
        loss = kl(s, t, settings.temperature).mean()
        if settings.targets == "one-hot":
            loss = F.cross_entropy(s, t.argmax(1))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert len(shown) == 10 and log.rows[0]["loss_kd"] > 0.01 and all(len(pixels) == 8 for pixels in shown)
    assert len({pixels.numpy().tobytes() for pixels in shown}) == 2 * math.ceil(5 / settings.visits)
    assert_close(student, other, 1e-5)


def test_a_service_that_gives_probabilities_alone_teaches_the_same(in_float64):
    network = sure(tiny_networks()[0]).eval()

    class Service(nn.Module):
        def forward(self, images):
            return network(images).detach().softmax(1).log()
    assert_close(*(trained(teacher=teacher)[0] for teacher in (network, Service())), 1e-5)
    pools = [sk.balanced_pool(teacher, PLAIN, settings_of(), lambda start, n: made(torch.rand, n, 1, 8, 8))
             for teacher in (network, Service())]
    assert all(torch.equal(*parts) for parts in zip(*pools))


@pytest.mark.usefixtures("unchecked")
def test_the_attack_takes_its_share_of_each_batch_and_replaces_the_one_before(monkeypatch):
    """As it is, not augmented; also when it finds fewer, which come in several batches."""
    augment, sizes = sk.augment_surrogates, []
    found = iter([torch.full((20, 1, 8, 8), 1.0), torch.full((6, 1, 8, 8), 0.6)])
    monkeypatch.setattr(sk, "augment_surrogates", lambda x, *more: sizes.append(len(x)) or augment(x, *more))
    monkeypatch.setattr(sk, "attacked_images", lambda *_: next(found))
    _, shown, log = trained(37, **ATTACK)                      # 5 batches of 4 and 4: not all 19 in order
    assert sizes == 2 * [5, *5 * [4]]                          # a quarter of 19 origins, half of each batch
    for number, batch in enumerate(shown):
        near(batch[4:], torch.full((4, 1, 8, 8), 1.0 if number < 5 else 0.6))
    assert [row["attacked"] for row in log.rows] == [19, 6]
    assert [text.partition(":")[0] for text in log.notes] == ["epoch 1"] and "found 6 images" in log.notes[0]
    sizes.clear()
    monkeypatch.setattr(sk, "attacked_images", lambda teacher, pixels, *_: torch.cat(4 * [pixels]))
    _, shown, log = trained(**{**ATTACK, "attack_share": 1.0, "attacks": 1, "batch_size": 7})
    assert sizes == [10] and all(len(batch) == 7 for batch in shown)           # once, and no clean one
    assert not log.notes and [row["attacked"] for row in log.rows] == [40, 40]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("share, size, number", [(0.5, 8, 3), (1.0, 7, 3), (0.25, 8, 2)])
def test_no_batch_has_an_attacked_image_twice_however_few_were_found(share, size, number, monkeypatch):
    """Three are found: each batch has as many of them as it has room for, and clean images besides."""
    levels = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    found = iter([levels, levels[:0]])
    monkeypatch.setattr(sk, "attacked_images", lambda *_: next(found, levels[:0]))
    _, shown, log = trained(pixels=bytes_of(40, 1, 8, 8), **OFF, **{
        **ATTACK, "attack_share": share, "batch_size": size})
    batches = len(shown) // 2
    for at, batch in enumerate(shown):
        attacked = [round(image.mean().item(), 4) for image in batch if image.std() < 1e-3]
        assert len(batch) == size and len(attacked) == len({*attacked}) == (number if at < batches else 0)
    assert {round(image.mean().item(), 1) for batch in shown for image in batch if image.std() < 1e-3} == {
        0.2, 0.4, 0.6}
    needed = math.ceil(share * 40)
    assert log.notes == [f"epoch {epoch}: the attack found {count} images, where a pass over the pool needs "
                         f"{needed}" for epoch, count in ((0, 3), (1, 0))]


@pytest.mark.parametrize("n, size", [(20, 4), (19, 4), (7, 7), (5, 4), (9, 5), (151, 17)])
def test_batches_without_repeats_are_the_plain_ones_until_one_of_those_has_a_repeat(n, size):
    """So runs in which the attack finds enough keep their numbers."""
    repeats = 0
    for seed in range(10):
        plain, distinct = (made(lambda: [next(batches) for _ in range(2 * n)], seed=seed) for batches in (
            sk.full_batches(n, size, "cpu"), sk.full_batches(n, size, "cpu", distinct=True)))
        same = next((at for at, batch in enumerate(plain) if len(batch.unique()) < size), len(plain))
        assert all(torch.equal(*pair) for pair in zip(plain[:same], distinct[:same])) and same >= n // size
        assert all(len(batch.unique()) == size for batch in distinct)
        passes = torch.cat(distinct).view(-1, n)                               # each has every index once
        assert torch.equal(passes.sort(1).values, torch.arange(n).expand(len(passes), -1))
        repeats += same < len(plain)
    assert (repeats == 0) == (n % size == 0)


@pytest.mark.usefixtures("unchecked")
def test_the_attack_gets_each_picture_with_its_own_pseudo_label(monkeypatch):
    """None crosses here, which is said each time: training goes on with clean images."""
    seen, levels = [], (10 * torch.arange(40) % 100).to(torch.uint8)           # the grey level is the label
    monkeypatch.setattr(sk, "attacked_images", lambda teacher, x, y, *_: seen.append((x, y)) or x[:0])
    _, shown, log = trained(pixels=levels.view(-1, 1, 1, 1).expand(-1, 1, 8, 8), **ATTACK, **OFF)
    for pixels, labels in seen:
        near(255 * pixels.mean((1, 2, 3)), 10.0 * labels, 1e-3)
        assert len(labels.unique()) > 1
    assert ["found 0 images" in text for text in log.notes] == [True, True] and len(shown) == 10
    assert [row["attacked"] for row in log.rows] == [0, 0]


# ----------------------------------------------------------------------------------------------------- script
def test_inspect_only_says_what_the_teacher_sees_and_trains_nothing(teacher_file, in_tmp, capsys):
    sk.main([*tiny_args(sk, teacher_file), "--surrogate", "leaves", "--inspect-only", "--out", "out"])
    rows = {row["event"]: row for row in rows_of("out")}
    assert list(rows) == ["start", "warning", "pool", "surrogate", "end"]
    assert "leaves, 40 pictures" in capsys.readouterr().out
    assert {"evenness", "evenness_augmented", "evenness_before", "class_share"} <= set(rows["surrogate"])
    assert rows_of(rows["pool"]["path"])[1]["pictures"] == 40 == rows["end"]["teacher_queries"]
    assert {path.name for path in (in_tmp / "out").iterdir()} >= {"log.jsonl", "samples.png"}
    assert not (in_tmp / "out" / "student.pt").exists()
    sk.main([*tiny_args(sk, teacher_file), "--no-balance"])
    kept = {path.name for path in teacher_file.parent.iterdir()}
    assert kept == {"toy.pt", "toy.leaves-seed0", "toy.spectrum-unbalanced-seed0"}


def test_a_folder_of_ones_own_pictures(teacher_file, in_tmp, capsys):
    (in_tmp / "mine" / "deeper").mkdir(parents=True)
    for number in range(30):
        picture = torch.randint(0, 256, (20, 24 + number, 3), dtype=torch.uint8).numpy()
        Image.fromarray(picture).save(in_tmp / "mine" / ("deeper" if number % 2 else ".") / f"{number}.png")
    argv = [*tiny_args(sk, teacher_file), "--surrogate", "folder:mine", "--no-balance"]
    sk.main([*argv, "--out", "out"])
    pool, = (row for row in rows_of("out") if row["event"] == "pool")
    assert [row["pictures"] for row in rows_of(pool["path"]) if row["event"] == "round"] == [30]
    available, read, _ = sk.real_pictures("folder:mine")
    assert available == 30 and read(range(30), 16).shape == (30, 3, 16, 16)
    (in_tmp / "mine" / "8.png").rename(in_tmp / "mine" / "other.png")
    assert "pictures = " in refused(sk, argv, capsys)          # a pool of these is not taken for others
    (in_tmp / "empty").mkdir()
    for folder in ("empty", "nowhere", ""):
        argv[argv.index("--surrogate") + 1] = f"folder:{folder}"
        assert f"there is no picture in folder {folder}" in refused(sk, argv, capsys)
    (in_tmp / "mine" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(common.BadInput, match="broken.jpg is no whole image"):
        available, read, _ = sk.real_pictures("folder:mine")
        read(range(available), 16)
    (in_tmp / "mine" / "broken.jpg").unlink()
    Image.fromarray(torch.full((20, 20), 999, dtype=torch.uint16).numpy()).save(in_tmp / "mine" / "deep.png")
    with pytest.raises(common.BadInput, match="deep.png has more than 8 bits"):     # PIL would make it white
        available, read, _ = sk.real_pictures("folder:mine")
        read(range(available), 16)


def test_another_data_set_as_surrogate_and_the_teachers_own(in_tmp, capsys):
    """Digits for a teacher whose file alone says what it takes and what it was trained on."""
    data = common.DATASETS["digits"]._replace(image_shape=(1, 16, 16))
    argv = tiny_args(sk, save_untrained(in_tmp / "other.pt", "wrn10_1", data, "fashion_mnist"))
    argv[argv.index("digits")] = "none"
    sk.main([*argv, "--surrogate", "digits", "--out", "out"])
    rows = rows_of("out")
    assert rows[0]["arguments"]["preset"] == "fashion_mnist-real" and rows[-2]["loss_kd"] > 0
    (available, read, _), (real, _) = sk.real_pictures("digits"), common.load_dataset("digits", True)
    assert available == 1437 and torch.equal(read(torch.tensor([3, 5]), 8), real.pixels[[3, 5]] / 16)
    argv[argv.index("--teacher") + 1] = save_untrained(in_tmp / "own.pt", "wrn10_1", data, "digits")
    assert "the teachers own data" in refused(sk, [*argv, "--surrogate", "digits"], capsys)
    for one, other in (("mnist", "mnist28"), ("folder:a@32", "folder:./a"), ("folder:a/test", "folder:a@8")):
        assert sk.same_data(one, other) and sk.same_data(other, one)
    for one, other in (("mnist", "fashion_mnist"), ("folder:a", "folder:b"), ("folder:a28", "folder:a")):
        assert not sk.same_data(one, other)


def test_what_makes_no_sense_is_refused(teacher_file, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.datasets, "MNIST", no_network)
    for flag, value, message in (
            ("--surrogate", "digits", "the teachers own data"), ("--surrogate", "x", "unknown surrogate x"),
            ("--surrogate", "digits", "type regulated_kd.py --mode kd --plain-teacher\n"),
            ("--magnitude", "31", "0 to 30"), ("--invert", "2", "0 to 1"), ("--attack-share", "0", "above 0"),
            ("--attack-threshold", "2", "at most 1"), ("--surrogate", "mnist", "could not be downloaded")):
        assert message in refused(sk, [*tiny_args(sk, teacher_file), flag, value], capsys)
    for pool in (torch.zeros(20, 1, 8, 8), bytes_of(20, 3, 8, 8)):
        with pytest.raises(common.BadInput, match="surrogate must be uint8"):
            trained(pixels=pool)
    teacher, student, data = tiny_networks()
    for pixels, labels in ((bytes_of(20, 1, 8, 8), torch.zeros(19)), (bytes_of(0, 1, 8, 8), torch.zeros(0))):
        with pytest.raises(common.BadInput, match="a pseudo-label for each"):
            sk.distill(teacher, student, data, settings_of(), surrogate=pixels, pseudo_labels=labels)
    for drawn in (bytes_of(64, 1, 8, 8), torch.rand(64, 3, 8, 8), torch.rand(5, 1, 8, 8),
                  torch.rand(64, 1, 8, 8) - 0.5):
        with pytest.raises(common.BadInput, match=r"must give 64 pictures \(1, 8, 8\), floats"):
            sk.balanced_pool(teacher, data, settings_of(pool_images=200), lambda start, n: drawn)


@pytest.mark.parametrize("argv, preset, temperature", [
    ("--surrogate cifar100", "cifar10-real", 2), ("--surrogate leaves", "cifar10", 20), ("", "cifar10", 20),
    ("--surrogate folder:x", "cifar10-real", 2), ("--surrogate cifar100 --preset cifar10", "cifar10", 20),
    ("--dataset mnist --surrogate fashion_mnist", "mnist-real", 4), ("--dataset mnist", "mnist", 4),
    ("--dataset mnist --teacher lenet5", "mnist-cpu", 10),
    ("--teacher wrn16_2 --student wrn16_1", "cifar10-cpu", 20),
    ("--teacher wrn16_2 --surrogate svhn", "cifar10-cpu-real", 10),
    ("--surrogate svhn --temperature 7", "cifar10-real", 7)])
def test_real_surrogates_take_the_real_preset_unless_one_is_named(argv, preset, temperature, monkeypatch):
    def stop(options, settings, *_, **__):
        raise KeyError(options.preset, settings.temperature, options.teacher, options.student)
    monkeypatch.setattr(sk, "load_networks", stop)
    monkeypatch.setattr(sk, "real_pictures", lambda *_: (1, None, ""))
    with pytest.raises(KeyError) as stopped:
        sk.main(argv.split())
    assert stopped.value.args == (preset, temperature, sk.PRESETS[preset].teacher, sk.PRESETS[preset].student)


def test_a_preset_fits_by_what_surrogate_names():
    computed, real = (sk.PRESETS[name].settings for name in ("cifar10", "cifar10-real"))
    for flags in ({}, {"epochs": 3}, *({"surrogate": name} for name in sk.GENERATORS)):
        assert sk.fits(computed, flags) and not sk.fits(real, flags)
    for name in ("cifar100", "svhn", "folder:leaves", "folder:"):
        assert sk.fits(real, {"surrogate": name}) and not sk.fits(computed, {"surrogate": name})


@pytest.mark.parametrize("name, preset", sk.PRESETS.items())
def test_presets_say_what_they_are_for(name, preset):
    settings, real = preset.settings, name.endswith("-real")
    sk.check(settings)
    assert (settings.surrogate in common.DATASETS) == real and preset.dataset == name.partition("-")[0]
    usual = 4 if not name.startswith("cifar") else 2 if real else 20
    assert settings.temperature == (10 if name in ("cifar10-cpu-real", "mnist-cpu") else usual)
    assert (settings.balance, settings.attack_target) == ((False, "random") if real else (True, "pseudo"))
    pair = {"mnist": "lenet5_bn lenet5_half_bn", "fashion_mnist": "lenet5_bn lenet5_half_bn",
            "digits": "wrn16_2 wrn16_1"}.get(preset.dataset, "resnet34 resnet18")
    if "-cpu" in name:
        pair = "lenet5 lenet5_half" if preset.dataset == "mnist" else "wrn16_2 wrn16_1"
    assert f"{preset.teacher} {preset.student}" == pair


# --------------------------------------------------------------------------- a teacher that adapts to a batch
def test_batch_statistics_normalise_each_batch_by_itself_and_leave_the_teacher_as_it_was(teacher_file):
    with common.seeded(0):
        teacher = common.build_model("wrn10_1", 10, PLAIN.image_shape)
        images = torch.randn(16, *PLAIN.image_shape)
        teacher(3 + 2 * torch.randn(64, *PLAIN.image_shape))                  # so that it remembers something
    before = copy.deepcopy(teacher.state_dict())
    in_train_mode = copy.deepcopy(teacher).train()(images)
    settings = dataclasses.replace(sk.Settings(), teacher_statistics="batch")
    with torch.no_grad(), common.frozen(teacher):
        usual = teacher(images)
        with sk.chosen_statistics(teacher, PLAIN, settings):
            assert torch.allclose(teacher(images), in_train_mode, atol=1e-5)
        with sk.chosen_statistics(teacher, PLAIN, sk.Settings()):
            assert torch.equal(teacher(images), usual)
    assert not torch.allclose(usual, in_train_mode, atol=0.1) and equal(teacher.state_dict(), before)
    with pytest.raises(common.BadInput, match="the teacher has no BatchNorm"), sk.chosen_statistics(
            common.build_model("lenet5", 10, PLAIN.image_shape), PLAIN, settings):
        pass
    sk.main([*tiny_args(sk, teacher_file), "--teacher-statistics", "batch", "--out", "out"])
    rows = rows_of("out")
    assert rows[0]["changed"]["teacher_statistics"] == "batch"
    score, = (row["student_acc"] for row in rows if row["event"] == "batch_statistics")
    student, data = running.load_classifier("out/student.pt")
    test, _ = common.load_dataset("digits", False)
    for layer in common.batchnorms(student, data):
        layer.running_mean = layer.running_var = None
    assert score == common.accuracy(common.predict(student, test, data), test.labels) and score != rows[-1][
        "student_acc_last"]
