"""deepinversion.py: golden numbers (1e-6, float64); synthesis and distill, written anew; what is refused."""
import dataclasses
import math

import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import deepinversion as di
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (D, Foreign, Log, assert_close, bn_distances, bn_inputs, in_float64, kl, near, near6,
                     refused, rows_of, save_untrained, sure)

X = (((torch.arange(96) * 37) % 97).to(D) / 50 - 1).reshape(2, 3, 4, 4)
RUNNING = torch.tensor([0.1, 0.2, 0.3], dtype=D), torch.tensor([1, 0.5, 2], dtype=D)


def test_goldens_1_2_4_5_priors_bn_total_and_rate():
    near6(X[0, 0, 0], [-1, -0.26, 0.48, -0.72])
    near6(di.tv_l1_loss(X), 2.7225000), near6(di.tv_loss(X), 25.7642710)
    near6([part.norm() for part in di.neighbour_differences(X)], [7.970069, 8.241650, 5.064701, 4.487850])
    near6(di.l2_loss(X), 5.5257941), near6(di.l2_loss(X, per_image=True), 3.9069755)
    bn, x = nn.BatchNorm2d(3).double().eval(), X.numpy()
    with common.frozen(bn), common.recorded_statistics([bn]) as seen:
        bn(X)
    mean = numpy.array([x[:, c].mean() for c in range(3)])     # not by torch
    variance = numpy.array([((x[:, c] - mean[c]) ** 2).mean() for c in range(3)])
    near6(seen[bn][0], mean), near6(seen[bn][1], variance)
    loss_bn = di.bn_loss([seen[bn]], [RUNNING])
    near6(loss_bn, 2.2638321), near6(di.bn_loss([seen[bn]], [RUNNING], first=10.0), 22.638321)
    near6(di.bn_loss([seen[bn]] * 2, [RUNNING] * 2, first=10.0), 22.638321 + 2.2638321)
    weight = (((torch.arange(240) * 11) % 13).to(D) / 26 - 0.25).reshape(5, 48)
    cifar10 = di.PRESETS["cifar10"].settings
    ce = di.one_hot_loss(X.reshape(2, 48) @ weight.T, torch.tensor([0, 3]))
    near6(ce, 1.8418364)
    near6(ce + cifar10.tv * di.tv_loss(X) + cifar10.bn * loss_bn + 3e-8 * di.l2_loss(X), 24.4808022)
    near6(di.kd_loss(X[0, 0], X[0, 1], 3.0), kl(X[0, 0], X[0, 1], 3.0).mean())
    for step, rate in ((0, 0.0025), (49, 0.125), (99, 0.25), (100, 0.25), (500, 0.14670602)):
        near6(di.warm_cosine(0.25, step, 1000), rate)
    near(di.warm_cosine(0.25, 999, 1000), 7.6e-7, 1e-8), near6(di.warm_cosine(0.25, 1000, 2000), 0.13532242)
    # between what --clip keeps the pixels
    ends = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 3, -1, -1)
    near(common.normalize(ends, common.DATASETS["cifar10"]).flatten(1),
         [[-2.42907, -2.41825, -2.22139], [2.51409, 2.59679, 2.75373]], 1e-4)


def one_hot(value, index):
    return value * torch.eye(10, dtype=D)[index:index + 1]


@pytest.mark.parametrize("student, teacher, divergence, true", [
    (torch.arange(10.).view(2, 5) / 2, (torch.arange(10.) * 3 % 10).view(2, 5), 0.0983073, 0.0870027),
    (one_hot(9, 0), one_hot(9, 1), 0.6201507, 0.3641291), (one_hot(0, 0), one_hot(9, 1), 0.2437371, None),
    (one_hot(9, 3), one_hot(9, 3), 0.0, 0.0)], ids=["mixed", "certain", "unsure student", "alike"])
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


def test_golden_6_a_batch_is_rolled(monkeypatch):
    """By 1 row down and 1 column to the left: what leaves on one side enters on the other."""
    drawn, seen, teacher = iter([2, 0]), [], Foreign()
    monkeypatch.setattr(di, "random_int", lambda below: next(drawn))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.arange(16.).reshape(shape).requires_grad_())
    teacher.register_forward_pre_hook(lambda teacher, x: seen.append(x[0][0, 0].tolist()))
    settings = tiny_settings(di, synthesis_batch_size=1, synthesis_steps=1, jitter=1)
    di.synthesize(teacher, common.DataSpec((1, 4, 4), 10, (0.5,), (0.5,)), settings)
    assert seen[-1][:2] == [[13, 14, 15, 12], [1, 2, 3, 0]]


def synthesized_anew(teacher, data, settings, student=None):
    """One batch, as it is described; draws as they come.   -> images, targets, if the last was the best"""
    x, seen = torch.randn(10, *data.image_shape).requires_grad_(), bn_inputs(teacher)
    y = torch.arange(10) % 10 if settings.cycle_targets else torch.randint(10, (10,))
    for total, side in ((settings.low_resolution_steps, 4), (settings.synthesis_steps, 8)):
        adam, tried = torch.optim.Adam([x], betas=(settings.beta1, settings.beta2)), []
        for step in range(total):
            warm = (step + 1) / 100 if settings.warm_cosine else 1
            adam.param_groups[0]["lr"] = settings.lr_images * warm
            image = x.reshape(10, 1, side, 8 // side, side, 8 // side).mean((3, 5))
            reach = settings.jitter * side // 8
            down, right = (int(torch.randint(2 * reach + 1, ())) - reach for _ in range(2))
            image = image[:, :, [(row - down) % side for row in range(side)]]
            image = image[..., [(column - right) % side for column in range(side)]]
            if settings.mirror and int(torch.randint(2, ())):
                image = image[..., list(range(side))[::-1]]
            t = teacher(image)
            first, *others = bn_distances(seen)
            loss = (settings.oh * F.cross_entropy(t, y)
                    + settings.bn * (settings.first_bn * first + sum(others))
                    + settings.tv * di.tv_loss(image) + settings.tv_l1 * di.tv_l1_loss(image)
                    + settings.l2 * di.l2_loss(image, settings.l2_per_image))
            if student:
                loss += settings.competition * di.competition_loss(student(image), t, settings.true_js)
            tried.append((loss.item(), x.detach().clone()))
            adam.zero_grad(), loss.backward(), adam.step()
            if settings.clip:
                x.data.clamp_(-data.mean[0] / data.std[0], (1 - data.mean[0]) / data.std[0])
    best = min(tried, key=lambda pair: pair[0])
    return (best[1] if settings.keep_best else x.detach()).half(), y, best is tried[-1]


@pytest.mark.parametrize("changes", [
    dict(low_resolution_steps=3, mirror=True, cycle_targets=False, first_bn=3.0, clip=False, l2=0.01),
    dict(warm_cosine=True, keep_best=True, l2=0.01, l2_per_image=True, true_js=True, lr_images=90.0)],
    ids=["small first, mirrored", "best, clipped"])
def test_distill_equals_the_algorithm_written_anew(changes, in_float64):
    """A pool that is full after one of two epochs: the same images and the same student, up to rounding."""
    usual = dict(synthesis_steps=5, pool_batches=3, jitter=2, lr_images=0.1, beta1=0.5, tv_l1=0.1)
    settings = tiny_settings(di, **{**usual, "competition": 2.0, "lr_student": 0.02, **changes})
    (teacher, student, data), (_, other, _), log = tiny_networks(), tiny_networks(), Log()
    pool = di.synthesize_pool(sure(teacher), data, settings)
    passed = pool if settings.clip else None                   # it makes the same
    images, targets = di.distill(teacher, student, data, settings, log, passed)
    teacher.eval()
    with common.seeded(settings.seed):
        made = [synthesized_anew(teacher, data, settings) for _ in range(2)]
    near6(pool[0], torch.cat([x for x, *_ in made]))
    with common.seeded(settings.seed ^ 2 ** 31):
        made.append(synthesized_anew(teacher, data, settings, other.eval()))
        x, y = (torch.cat(parts) for parts in list(zip(*made))[:2])
        sgd = torch.optim.SGD(other.parameters(), momentum=0.9, weight_decay=settings.weight_decay)
        for epoch, rate in enumerate((0.02, 0.01)):
            sgd.param_groups[0]["lr"], hits = rate, 0
            for batch in torch.randperm(30).split(8)[:3]:
                image = common.augment(x[batch].float() * data.std[0] + data.mean[0], data)
                image = (image - data.mean[0]) / data.std[0]
                loss = kl(other.train()(image), teacher(image).detach(), settings.temperature).mean()
                sgd.zero_grad(), loss.backward(), sgd.step()
                hits += (teacher(image).argmax(1) == y[batch]).sum().item()
            near(log.rows[epoch]["target_acc"], hits / 24)
    near6(images, x), assert_close(student, other, 1e-5)
    assert torch.equal(targets, y) and images.dtype == torch.float16
    assert not all(last for _, _, last in made) or not settings.keep_best
    assert ["loss_oh" in row for row in log.rows] == [True, False] and torch.equal(log.shown[-1][1], y[-10:])


def test_a_pool_may_begin_empty_or_stay_as_it_is_and_a_prior_makes_its_own_term_small():
    for first, batches, made in ((0, 2, 2), (2, 0, 0)):
        (teacher, student, data), log = tiny_networks(), Log()
        settings = tiny_settings(di, initial_batches=first, pool_batches=batches)
        images, _ = di.distill(teacher, student, data, settings, log)
        assert len(images) == 20 and images.flatten(1).any(1).all()
        assert sum("loss_oh" in row for row in log.rows) == made
    for weight, loss in (("tv", di.tv_loss), ("tv_l1", di.tv_l1_loss), ("l2", di.l2_loss)):
        changes = dict(synthesis_steps=20, lr_images=0.1, tv=0.0, bn=0.0)
        found = [loss(di.synthesize(teacher, data, tiny_settings(di, **{**changes, weight: value}))[0])
                 for value in (0.0, 1e3)]
        assert found[1] < 0.8 * found[0]


def test_what_cannot_be_done_is_refused(teacher_file, in_tmp, capsys):
    _, student, data = tiny_networks()
    with pytest.raises(common.BadInput, match="no BatchNorm; rdskd.py and surrogate_kd.py need none"):
        di.distill(Foreign(nn.Identity), student, data, tiny_settings(di))
    with pytest.raises(common.BadInput, match="no image to learn from"):
        di.distill(Foreign(), student, data, tiny_settings(di, initial_batches=0, pool_batches=0))
    for teacher in (save_untrained(in_tmp / "plain.pt", "lenet5"), "lenet5"):  # before it is trained
        assert "rdskd.py" in refused(di, ["--dataset", "digits", "--teacher", teacher], capsys)
    assert "must be under 1" in refused(di, [*tiny_args(di, teacher_file), "--beta2", "1"], capsys)


def pictures_network():
    """What `--teacher test_deepinversion:pictures_network` builds."""
    with common.seeded(0):
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), nn.Linear(8, 10))


def test_synthesis_alone_keeps_its_images_in_a_file_and_trains_nothing(in_tmp, capsys):
    """The ImageNet setting at a small size, from a network that is not common.py's."""
    argv = ["--dataset", "cifar10", "--preset", "imagenet", "--student", "wrn10_1", "--synthesize-only", "5",
            "--teacher", "test_deepinversion:pictures_network", "--synthesis-batch-size", "3",
            "--low-resolution-steps", "2", "--synthesis-steps", "2", "--out", "made"]
    di.main(argv)
    content, rows = torch.load("made/images.pt", weights_only=True), rows_of("made")
    assert content["images"].shape == (5, 3, 32, 32) and len(content["targets"]) == 5
    assert content["images"].untyped_storage().nbytes() == 5 * 3 * 32 * 32 * 2         # not a view of more
    again = common.denormalize(content["images"].float(), common.DataSpec(**content["data"])).clamp(0, 1)
    assert torch.equal((255 * again).to(torch.uint8), content["pixels"])
    assert not (in_tmp / "made" / "student.pt").exists() and (in_tmp / "made" / "samples.png").exists()
    assert [row["event"] for row in rows if row["event"] != "collapse"] == ["start", "epoch", "epoch", "end"]
    assert rows[-1]["teacher_queries"] == 2 * 3 * 4 and "5 images in" in capsys.readouterr().out
    assert "holds a run already" in refused(di, argv, capsys)


def test_every_class_is_asked_for_and_a_pool_of_any_size_is_used():
    """A batch of fewer images than classes asks for random ones; a given pool counts as what it is."""
    teacher, student, data = tiny_networks()
    settings = tiny_settings(di, synthesis_batch_size=6, cycle_targets=True)
    asked = torch.cat([di.synthesize(teacher, data, settings)[1] for _ in range(20)])
    assert data.num_classes == 10 and {*asked.tolist()} == {*range(10)}
    small = di.synthesize_pool(teacher, data, dataclasses.replace(settings, initial_batches=1))
    settings = dataclasses.replace(settings, initial_batches=3, pool_batches=2, epochs=2)
    images, _ = di.distill(teacher, student, data, settings, pool=small)
    assert len(images) == 12
    alone = dataclasses.replace(settings, initial_batches=0, pool_batches=0)
    assert len(di.distill(teacher, student, data, alone, pool=small)[0]) == 6
