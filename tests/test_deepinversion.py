"""deepinversion.py: golden numbers (1e-6, float64); synthesis and distill, written anew; what is kept, clipped, refused."""
import math

import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import deepinversion as di
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (D, Foreign, Log, assert_close, bn_distance, bn_inputs, equal, kl, near, refused, rows_of,
                     save_untrained, settings_read, steps_seen, sure, weights_of)

X = (((torch.arange(96) * 37) % 97).to(D) / 50 - 1).reshape(2, 3, 4, 4)
RUNNING = torch.tensor([0.1, 0.2, 0.3], dtype=D), torch.tensor([1, 0.5, 2], dtype=D)
MEAN_VARIANCE = X.mean((0, 2, 3)), X.var((0, 2, 3), correction=0)


def near6(value, expected):
    near(value, expected, 1e-6)


def test_golden_1_priors():
    near6(X[0, 0, 0], [-1, -0.26, 0.48, -0.72])
    near6(di.tv_l1_loss(X), 2.7225000)
    near6(di.tv_loss(X), 25.7642710)
    near6([part.norm().item() for part in di.neighbour_differences(X)], [7.970069, 8.241650, 5.064701, 4.487850])
    near6(di.l2_loss(X), 5.5257941)
    near6(di.l2_loss(X, per_image=True), 3.9069755)


def test_golden_2_bn_by_hooks_and_by_plain_numpy():
    near6(di.bn_loss([MEAN_VARIANCE], [RUNNING]), 2.2638321)
    near6(di.bn_loss([MEAN_VARIANCE], [RUNNING], first=10.0), 22.638321)
    near6(di.bn_loss([MEAN_VARIANCE] * 2, [RUNNING] * 2, first=10.0), 22.638321 + 2.2638321)
    bn, x = nn.BatchNorm2d(3).double().eval(), X.numpy()
    with common.frozen(bn), common.recorded_statistics([bn]) as seen:
        bn(X)
    mean = numpy.array([x[:, c].mean() for c in range(3)])
    variance = numpy.array([((x[:, c] - mean[c]) ** 2).mean() for c in range(3)])
    near6(seen[bn][0], mean), near6(seen[bn][1], variance)
    near6(di.bn_loss([seen[bn]], [RUNNING]), ((variance - RUNNING[1].numpy()) ** 2).sum() ** 0.5
          + ((mean - RUNNING[0].numpy()) ** 2).sum() ** 0.5)


def one_hot(value, index):
    return value * torch.eye(10, dtype=D)[index:index + 1]


@pytest.mark.parametrize("student, teacher, divergence, true", [
    (torch.arange(10, dtype=D).reshape(2, 5) / 2, ((torch.arange(10) * 3) % 10).to(D).reshape(2, 5), 0.0983073, 0.0870027),
    (one_hot(9, 0), one_hot(9, 1), 0.6201507, 0.3641291), (one_hot(0, 0), one_hot(9, 1), 0.2437371, None),
    (one_hot(9, 3), one_hot(9, 3), 0.0, 0.0)])
def test_golden_3_competition(student, teacher, divergence, true):
    near6(di.competition_loss(student, teacher), 1 - divergence)
    if true is not None:
        near6(di.competition_loss(student, teacher, true_js=True), 1 - true)


def test_golden_3_the_codes_form_saturates_and_the_true_one_does_not():
    student, teacher = one_hot(30, 0).requires_grad_(), one_hot(30, 1).requires_grad_()
    loss = di.competition_loss(student, teacher)
    assert loss.item() == 0 and not any(part.any() for part in torch.autograd.grad(loss, (student, teacher)))
    true = di.competition_loss(student, teacher, true_js=True)
    near(true, 1 - 0.6924, 1e-3)
    assert all(part.abs().sum() > 1e-6 for part in torch.autograd.grad(true, (student, teacher)))
    certain = one_hot(1000, 0).float().requires_grad_()        # probabilities that are 0 in float32
    true = di.competition_loss(certain, one_hot(1000, 1).float(), true_js=True)
    assert true.isfinite() and torch.autograd.grad(true, certain)[0].isfinite().all()


def test_golden_4_total_and_kd():
    weight = (((torch.arange(240) * 11) % 13).to(D) / 26 - 0.25).reshape(5, 48)
    ce, cifar10 = di.one_hot_loss(X.reshape(2, 48) @ weight.T, torch.tensor([0, 3])), di.PRESETS["cifar10"]
    near6(ce, 1.8418364)
    near6(ce + cifar10.tv * di.tv_loss(X) + cifar10.bn * di.bn_loss([MEAN_VARIANCE], [RUNNING]) + 3e-8 * di.l2_loss(X),
          24.4808022)
    near6(di.kd_loss(X[0, 0], X[0, 1], 3.0), kl(X[0, 0], X[0, 1], 3.0).mean())


def test_golden_5_rate():
    near6([di.warm_cosine(0.25, step, 1000) for step in (0, 49, 99, 100, 500)], [0.0025, 0.125, 0.25, 0.25, 0.14670602])
    near(di.warm_cosine(0.25, 999, 1000), 7.6e-7, 1e-8)
    near6(di.warm_cosine(0.25, 1000, 2000), 0.13532242)


def test_golden_6_a_batch_is_rolled(monkeypatch):
    """By 1 row down and 1 column to the left: what leaves on one side enters on the other."""
    drawn, seen = iter([2, 0]), []
    monkeypatch.setattr(di, "random_int", lambda below: next(drawn))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.arange(16.).reshape(shape).requires_grad_())
    teacher, data = Foreign(), common.DataSpec((1, 4, 4), 10, (0.5,), (0.5,))
    teacher.register_forward_pre_hook(lambda teacher, x: seen.append(x[0]))
    di.synthesize(teacher, data, tiny_settings(di, synthesis_batch_size=1, synthesis_steps=1, jitter=1))
    assert seen[-1][0, 0, 0].tolist() == [13, 14, 15, 12] and seen[-1][0, 0, 1].tolist() == [1, 2, 3, 0]


def synthesized_anew(teacher, data, settings, student=None):
    """One batch, as it is described; draws as they come."""
    x = torch.randn(10, *data.image_shape).requires_grad_()
    y = torch.arange(10) % 10 if settings.cycle_targets else torch.randint(10, (10,))
    low, high = -data.mean[0] / data.std[0], (1 - data.mean[0]) / data.std[0]
    for total, side in ((settings.low_resolution_steps, 4), (settings.synthesis_steps, 8)):
        adam, best = torch.optim.Adam([x], betas=(settings.beta1, settings.beta2)), (math.inf, None)
        for step in range(total):
            adam.param_groups[0]["lr"] = settings.lr_images * (1 if not settings.warm_cosine else (step + 1) / 100)
            image = x.reshape(10, 1, side, 8 // side, side, 8 // side).mean((3, 5))
            reach = settings.jitter * side // 8
            down, right = (int(torch.randint(2 * reach + 1, ())) - reach for _ in range(2))
            image = image[:, :, [(row - down) % side for row in range(side)]]
            image = image[..., [(column - right) % side for column in range(side)]]
            if settings.mirror and int(torch.randint(2, ())):
                image = image[..., list(range(side))[::-1]]
            with bn_inputs(teacher) as seen:
                t = teacher(image)
                first, *others = bn_distance(seen)
            loss = (settings.oh * F.cross_entropy(t, y) + settings.bn * (settings.first_bn * first + sum(others))
                    + settings.tv * di.tv_loss(image) + settings.tv_l1 * di.tv_l1_loss(image)
                    + settings.l2 * di.l2_loss(image, settings.l2_per_image))
            if student:
                loss = loss + settings.competition * di.competition_loss(student(image), t, settings.true_js)
            best = min(best, (loss.item(), x.detach().clone()), key=lambda pair: pair[0])
            adam.zero_grad(), loss.backward(), adam.step()
            if settings.clip:
                x.data.clamp_(low, high)
    return (best[1] if settings.keep_best else x.detach()).half(), y


@pytest.mark.parametrize("changes", [
    dict(low_resolution_steps=3, mirror=True, cycle_targets=False, first_bn=3.0, clip=False, l2=0.01),
    dict(warm_cosine=True, keep_best=True, l2=0.01, l2_per_image=True, true_js=True, lr_images=8.0)], ids=str)
def test_distill_equals_the_algorithm_written_anew(changes):
    """A pool that is full after one of two epochs: the same images and the same student, up to rounding."""
    settings = tiny_settings(di, **{**dict(synthesis_steps=5, pool_batches=3, jitter=2, lr_images=0.1, tv_l1=0.1, beta1=0.5,
                                           competition=2.0, lr_student=0.02), **changes})
    (teacher, student, data), (_, other, _) = tiny_networks(), tiny_networks()
    pool = di.synthesize_pool(sure(teacher), data, settings)
    images, targets = di.distill(teacher, student, data, settings, pool=None if settings.clip else pool)      # the same
    teacher.eval()
    with common.seeded(settings.seed):
        made = [synthesized_anew(teacher, data, settings) for _ in range(2)]
    near(torch.cat([x for x, _ in made]), pool[0], 5e-3)
    with common.seeded(settings.seed ^ 2 ** 31):
        sgd = torch.optim.SGD(other.parameters(), momentum=0.9, weight_decay=settings.weight_decay)
        for epoch, rate in enumerate((0.02, 0.01)):
            if epoch == 0:
                made.append(synthesized_anew(teacher, data, settings, other.eval()))
            x, y = (torch.cat(parts) for parts in zip(*made))
            sgd.param_groups[0]["lr"] = rate
            for batch in torch.randperm(30).split(8)[:3]:
                pixels = x[batch].float() * data.std[0] + data.mean[0]
                image = (common.augment(pixels, data) - data.mean[0]) / data.std[0]
                loss = kl(other.train()(image), teacher(image).detach(), settings.temperature).mean()
                sgd.zero_grad(), loss.backward(), sgd.step()
    near(images, x, 5e-3)
    assert torch.equal(targets, y) and images.dtype == torch.float16
    assert_close(student, other, 3e-3)


def batch_of(teacher, student=None, **changes):
    """One synthesised batch, images, targets and mean losses, of seed 0, without priors unless asked for."""
    with common.seeded(0):
        settings = tiny_settings(di, **{"tv": 0.0, "clip": False, "lr_images": 0.1, **changes})
        return di.synthesize(teacher, common.DATASETS["digits"], settings, student)


@pytest.mark.parametrize("keep_best", [False, True])
def test_what_is_kept_is_the_last_iterate_or_a_copy_of_the_best(keep_best, monkeypatch):
    """With a rate so large that the loss rises again. An alias of x would equal the last iterate in both cases."""
    teacher, losses, iterates, tv_loss = tiny_networks()[0], [], [], di.tv_loss
    teacher.register_forward_pre_hook(lambda teacher, x: iterates.append(x[0].detach().clone()))
    monkeypatch.setattr(di, "tv_loss", lambda x: losses.append(tv_loss(x)) or losses[-1])
    kept, _, _ = batch_of(teacher, synthesis_steps=5, lr_images=1.5, oh=0.0, bn=0.0, tv=1.0, jitter=0, keep_best=keep_best)
    best = min(range(5), key=lambda step: losses[step].item())
    iterates = iterates[-5:]                                   # the first pass is common.batchnorms'
    assert 0 < best < 4 and torch.equal(kept, iterates[best]) == keep_best and not kept.requires_grad
    assert keep_best or all((kept - x).abs().max() > 0.1 for x in iterates)    # the last iterate, which nobody saw yet


def test_two_resolutions_have_their_own_adam_and_the_smaller_one_comes_first():
    teacher, sides, adams = tiny_networks()[0], [], []
    teacher.register_forward_pre_hook(lambda teacher, x: sides.append(x[0].shape[-1]))
    with steps_seen(lambda adam: adams.append(next(iter(adam.state.values()))["step"].item())):
        batch_of(teacher, low_resolution_steps=3, synthesis_steps=2)
    assert sides[1:] == [4, 4, 4, 8, 8] and adams == [1, 2, 3, 1, 2]


def test_clip_keeps_the_valid_range():
    x, _, _ = batch_of(sure(tiny_networks()[0]), clip=True, lr_images=1.0, synthesis_steps=5, bn=0.0)
    pixels = common.denormalize(x, common.DATASETS["digits"])
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6 and (pixels < 1e-6).any() and (pixels > 0.999999).any()
    low, high = (common.normalize(torch.full((1, 3, 1, 1), value), common.DATASETS["cifar10"]) for value in (0.0, 1.0))
    near(low.flatten(), [-2.42907, -2.41825, -2.22139], 1e-4), near(high.flatten(), [2.51409, 2.59679, 2.75373], 1e-4)


def test_images_move_towards_the_teachers_statistics_and_the_classes():
    teacher = sure(tiny_networks()[0])
    teacher.groups[0].bn1.running_mean.add_(0.5)               # statistics that noise does not have
    first, last = (batch_of(teacher, synthesis_batch_size=32, bn=1.0, synthesis_steps=steps)[2] for steps in (1, 100))
    assert last["loss_oh"] < 0.8 * first["loss_oh"] and last["loss_bn"] < 0.95 * first["loss_bn"]     # means of all steps


@pytest.mark.parametrize("weight, loss", [("tv", di.tv_loss), ("tv_l1", di.tv_l1_loss), ("l2", di.l2_loss)])
def test_a_prior_with_a_large_weight_makes_its_own_term_small(weight, loss):
    without, with_it = (batch_of(tiny_networks()[0], synthesis_steps=20, bn=0.0, **{weight: value})[0] for value in (0.0, 1e3))
    assert loss(with_it) < 0.8 * loss(without)


def test_the_competition_pushes_teacher_and_student_apart_and_moves_neither():
    teacher, student, _ = tiny_networks()
    before = weights_of(sure(teacher)), weights_of(student)
    apart, alike = (batch_of(teacher, student, competition=weight, synthesis_steps=40)[2]["loss_competition"]
                    for weight in (1e3, 1e-6))
    assert apart < alike - 0.01 and equal(before[0], weights_of(teacher)) and equal(before[1], weights_of(student))


@pytest.mark.parametrize("changes, batches, made", [
    (dict(initial_batches=2, pool_batches=3, epochs=4), 3, [0]), (dict(initial_batches=0, pool_batches=2), 2, [0, 1]),
    (dict(initial_batches=2, pool_batches=0), 2, [])])
def test_the_pool_stops_growing_when_it_is_full_and_may_begin_empty(changes, batches, made):
    (teacher, student, data), log = tiny_networks(), Log()
    images, targets = di.distill(teacher, student, data, tiny_settings(di, **changes), log)
    assert len(images) == len(targets) == 10 * batches and images.flatten(1).any(1).all()
    assert [row["epoch"] for row in log.rows if "loss_oh" in row] == made and len(log.rows) == changes.get("epochs", 2)
    assert torch.equal(log.shown[-1][1], targets[-10:])        # the newest batch is shown


def test_what_cannot_be_done_is_refused(teacher_file, in_tmp, capsys):
    _, student, data = tiny_networks()
    with pytest.raises(common.BadInput, match="no BatchNorm.*dafl.py and rdskd.py"):
        di.distill(Foreign(False), student, data, tiny_settings(di))
    with pytest.raises(common.BadInput, match="no image to learn from"):
        di.distill(Foreign(), student, data, tiny_settings(di, initial_batches=0, pool_batches=0))
    plain = save_untrained(in_tmp / "plain.pt", "lenet5", data)
    assert "dafl.py" in refused(di, ["--dataset", "digits", "--teacher", plain, "--student", "lenet5_half"], capsys)
    assert "dafl.py" in refused(di, ["--dataset", "digits", "--teacher", "lenet5", "--student", "lenet5_half"], capsys)
    assert "must be under 1" in refused(di, [*tiny_args(di, teacher_file), "--beta2", "1"], capsys)


def test_the_pools_file_is_told_apart_by_every_setting_that_shaped_it():
    read = settings_read(di.synthesize_pool, di.synthesize)
    assert read - {"competition", "true_js"} == set(di.OF_POOL) - {"seed"}     # those two ask for a student


def test_synthesis_alone_keeps_its_images_in_a_file_and_trains_nothing(in_tmp, capsys):
    """The ImageNet setting at a small size, from a network that is not common.py's."""
    argv = ["--dataset", "cifar10", "--preset", "imagenet", "--student", "wrn10_1", "--teacher",
            "test_deepinversion:pictures_network"]
    di.main([*argv, "--synthesize-only", "5", "--synthesis-batch-size", "3", "--low-resolution-steps", "2",
             "--synthesis-steps", "2", "--jitter", "4", "--out", "made"])
    content = torch.load("made/images.pt", weights_only=True)
    assert content["images"].shape == (5, 3, 32, 32) and len(content["targets"]) == 5
    again = common.denormalize(content["images"].float(), common.DataSpec(**content["data"])).clamp(0, 1)
    assert torch.equal((255 * again).to(torch.uint8), content["pixels"])
    assert {path.name for path in (in_tmp / "made").iterdir()} == {"log.jsonl", "samples.png", "images.pt", "checkpoint.pt"}
    rows = rows_of("made")
    assert [row["event"] for row in rows if row["event"] != "collapse"] == ["start", "epoch", "epoch", "end"]
    assert rows[-1]["teacher_queries"] == 2 * 3 * 4 and "5 images in" in capsys.readouterr().out
    with pytest.raises(SystemExit):                            # a run is there already
        di.main([*argv, "--synthesize-only", "5", "--out", "made"])


def pictures_network():
    """What `--teacher test_deepinversion:pictures_network` builds."""
    with common.seeded(0):
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(8, 10))
