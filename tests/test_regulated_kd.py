"""regulated_kd.py: golden numbers (1e-6, float64); both trainings, written anew in one pass with a masked loss; counts."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import regulated_kd as rk
from conftest import tiny_args, tiny_settings
from helpers import D, Log, assert_close, equal, kl, near, refused, rows_of, weights_of

Z = ((torch.arange(24) * 7) % 24).to(D).reshape(6, 4) / 4
ZT = ((torch.arange(24) * 5) % 24).to(D).reshape(6, 4) / 3
Y = torch.tensor([3, 2, 0, 1, 1, 0])
M22 = torch.tensor([0, 0, 1, 1, 1, 1]).bool()
W = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 1], dtype=D)
PART = (torch.arange(60) % 3).float()                          # counts of which a third are 0


def near6(value, expected):
    near(value, expected, 1e-6)


def test_golden_1_and_2_threshold_and_rule():
    near([rk.confidence_threshold(n, 0.01) for n in (0, 1, 10, 100)], [0, 0.009950166, 0.095162582, 0.632120559], 1e-9)
    near([rk.confidence_threshold(n, 0.05) for n in (9, 20, 22)], [0.362371848, 0.632120559, 0.667128916], 1e-9)
    assert Z.argmax(1).tolist() == [3, 2, 2, 1, 1, 0]
    near6(rk.confidence(Z, Y), [0.683273, 0.678215, 0.678215, 0.650509, 0.650509, 0.336347])
    for epoch, expected in ((0, "001000"), (8, "001000"), (9, "001001"), (20, "001001"), (22, "001111"), (24, "111111")):
        found = rk.participates(Z, Y, rk.confidence_threshold(epoch, 0.05))
        assert "".join(str(int(m)) for m in found) == expected, epoch
    near6(rk.confidence(Z, Y, temperature=4), [0.151974, 0.147150, 0.147150, 0.140254, 0.140254, 0.063092])
    near6(rk.confidence(Z, Y, temperature=1.5), [0.478667, 0.469330, 0.469330, 0.441664, 0.441664, 0.212202])
    near6(rk.confidence(Z, Y, "true"), Z.softmax(1)[torch.arange(6), Y])


def test_golden_3_significance():
    counts = sum(rk.participates(Z, Y, rk.confidence_threshold(n, 0.05)).float() for n in range(50))
    assert counts.tolist() == [27, 27, 50, 28, 28, 41] and counts.sum() / (50 * 6) == pytest.approx(0.67)
    near6(rk.significance_weights(counts, 50), [0.54, 0.54, 1, 0.56, 0.56, 0.82])
    counts = torch.tensor([0.0, 1, 2, 4, 8])
    near6(rk.significance_weights(counts, 50), [0, 0.02, 0.04, 0.08, 0.16])
    near6(rk.significance_weights(counts, 50, "max"), [0, 0.125, 0.25, 0.5, 1])
    near6(rk.significance_weights(counts, 50, "mean1"), [0, 0.266667, 0.533333, 1.066667, 2.133333])
    for kind in ("epochs", "max", "mean1"):
        assert not rk.significance_weights(torch.zeros(3), 5, kind).any()
    for call in (lambda: rk.confidence(Z, Y, "Gap"), lambda: rk.significance_weights(counts, 5, "sum")):
        with pytest.raises(ValueError, match="must be"):
            call()


def test_golden_4_losses_of_each_image():
    near6(rk.kd_losses(Z, ZT, Y, 1, hard=0), [0.000894, 3.446725, 1.749210, 3.192422, 2.343362, 0.978343])
    near6(rk.kd_losses(Z, ZT, Y, 4, hard=0), [0.003747, 6.470153, 4.432268, 4.425131, 4.017267, 2.520251])
    near6(rk.kd_losses(Z, ZT, Y, 4), [0.060739, 6.529374, 5.541489, 4.496865, 4.089002, 2.655329])
    near6(rk.cckd_losses(Z, ZT, Y), [0.513684, 0.228436, 3.467998, 0.781281, 0.317106, 0.456363])


def test_golden_5_and_6_reductions_and_gradients():
    z = Z.clone().requires_grad_()
    losses = rk.kd_losses(z, ZT, Y, 4)
    near6(rk.reduced_loss(losses), 3.895466)                                              # kd
    near6(rk.reduced_loss(losses, W), 1.233537)                                           # significance, all six
    near6(rk.reduced_loss(losses[1:], W[1:]), 1.480245)                                   # without w = 0
    near6(rk.reduced_loss(losses[M22], W[M22]), 1.687072)                                 # hybrid
    near6(rk.reduced_loss(losses[M22], visited=6), 4.195671 * 4 / 6)
    regulated = rk.reduced_loss(losses[M22])
    near6(regulated, 4.195671)
    near6(torch.autograd.grad(regulated, z)[0], [[0.0] * 4] * 2 + [
        [-0.203002, -0.180759, 0.382484, 0.001277], [0.076784, 0.093119, -0.297319, 0.127416],
        [0.145449, 0.197276, -0.139323, -0.203402], [0.221467, -0.054366, -0.075505, -0.091595]])


def toy(crop=0, student="lenet5_half"):
    """Teacher, student, DataSpec and 60 real digits."""
    train, data = common.load_dataset("digits", True)
    with common.seeded(0):
        teacher, student = (common.build_model(name, 10, data.image_shape) for name in ("lenet5", student))
    return teacher, student, data._replace(crop=crop), common.ImageSet(train.pixels[:60], train.labels[:60], train.scale)


def settings_of(**changes):
    return tiny_settings(rk, **{**dict(alpha_epochs=1.6, lr_student=1e-3, lr_teacher=1e-3, batch_size=16, teacher_batch_size=16,
                                       scan_batch_size=24, epochs=3, teacher_epochs=3), **changes})


def trained(crop=0, counts=None, **changes):
    """-> student's weights, how often each image took part, the log"""
    (teacher, student, data, train), log = toy(crop), Log()
    used, _ = rk.distill(teacher, student, data, settings_of(**changes), log, train=train, counts=counts)
    return weights_of(student), used, log


def trained_anew(model, losses_of, masked, data, train, settings, seed, rows=torch.arange(60), weights=torch.ones(60)):
    """Three epochs: one pass over all images, times 1 for who takes part and 0 for the others.   -> how often each did"""
    sgd, counted = settings.optimizer == "sgd", torch.zeros(60)
    optimizer = (torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=settings.weight_decay)
                 if sgd else torch.optim.Adam(model.parameters(), weight_decay=settings.weight_decay))
    with common.seeded(seed):
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * epoch / 3)) / 2)
            for batch in torch.randperm(len(rows)).split(16):
                batch = rows[batch]
                images, y = common.normalize(common.augment(train.pixels[batch] / 16, data), data), train.labels[batch]
                logits = model(images)
                p = (logits.detach() / settings.confidence_temperature).softmax(1)
                first, second = p.topk(2).values.T
                confidence = p[range(len(y)), y] if settings.confidence == "true" else first - second
                mask = (logits.argmax(1) != y) | (confidence < 1 - math.exp(-settings.alpha_epochs / 3 * epoch)) | (not masked)
                counted[batch] += mask
                total = (mask * weights[batch] * losses_of(logits, images, y)).sum()
                if mask.any():
                    optimizer.zero_grad()
                    (total / (len(y) if settings.reduction == "visited" else mask.sum())).backward()
                    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
                    for p in model.parameters():
                        p.grad *= min(1, settings.clip_norm / norm) if settings.clip_norm else 1
                    optimizer.step()
    return counted


@pytest.mark.parametrize("changes", [
    dict(mode="regulated"), dict(mode="hybrid", reduction="visited", crop=1), dict(mode="kd", crop=1), dict(mode="ce"),
    dict(mode="significance", normalization="mean1"), dict(mode="regulated", optimizer="sgd", clip_norm=0.05, crop=1,
         student_loss="cckd", confidence="true", confidence_temperature=2.0, weight_decay=0.01)], ids=str)
def test_distill_equals_one_pass_with_a_masked_loss(changes):
    """Which without BatchNorm is the same: the same counts, the same student up to rounding."""
    crop, settings = changes.pop("crop", 0), settings_of(**changes)
    (teacher, student, data, train), other, log = toy(crop), toy()[1], Log()
    used, shares = rk.distill(teacher, student, data, settings, log, train=train, counts=PART)
    weighted, regulated, taught = rk.MODES[settings.mode]

    def losses_of(logits, images, y):
        ce, t = F.cross_entropy(logits, y, reduction="none"), teacher(images).detach()
        if not taught:
            return ce
        if settings.student_loss == "kd":
            return kl(logits, t, settings.temperature) + settings.hard * ce
        trust = t.softmax(1)[range(len(y)), y]                 # CE is linear in its target
        soft = -((t / settings.temperature).softmax(1) * (logits / settings.temperature).log_softmax(1)).sum(1)
        return trust * soft + (1 - trust) * F.cross_entropy(logits / settings.temperature, y, reduction="none")
    w = PART / (PART[PART > 0].mean() if settings.normalization == "mean1" else 3) if weighted else torch.ones(60)
    counted = trained_anew(other, losses_of, regulated, data, train, settings, settings.seed, w.nonzero()[:, 0], w)
    assert torch.equal(used, counted)
    assert_close(student, other)
    near([row["share"] for row in log.rows], shares), near(shares.sum() * 60, used.sum())
    assert (log.rows[-1]["sample_uses"], log.rows[-1]["never_used"]) == (used.sum(), (used == 0).sum())
    assert log.rows[-1]["data_fraction"] == pytest.approx(used.sum().item() / 180)
    assert [row["threshold"] for row in log.rows] == (
        pytest.approx([1 - math.exp(-1.6 * n / 3) for n in range(3)]) if regulated else [None] * 3)


def test_the_teachers_training_equals_one_pass_with_a_masked_loss_of_seed_0():
    (teacher, _, data, train), other, settings, log = toy(1), toy()[0], settings_of(seed=5), Log()
    counts, shares = rk.train_teacher(teacher, data, settings, log, train=train)
    counted = trained_anew(other, lambda logits, images, y: F.cross_entropy(logits, y, reduction="none"), True, data, train,
                           settings, 0)
    assert torch.equal(counts, counted) and 0 < counts.sum() < 180 and log.rows[-1]["sample_uses"] == counts.sum()
    assert_close(teacher, other), near([row["share"] for row in log.rows], shares)


def test_limits_of_the_rule(monkeypatch):
    """α huge: all take part but in epoch 0. Weights 1: hybrid is regulated. All chosen: regulated is kd, also with a queue."""
    assert [row["share"] == 1 for row in trained(alpha_epochs=1e9)[2].rows] == [False, True, True]
    hybrid, regulated, kd = trained(counts=torch.full((60,), 3.0), mode="hybrid"), trained(), trained(mode="kd")
    assert equal(hybrid[0], regulated[0]) and not equal(regulated[0], kd[0])
    monkeypatch.setattr(rk, "participates", lambda logits, labels, *_: labels >= 0)
    assert equal(trained()[0], kd[0]) and equal(trained(reduction="visited")[0], kd[0])
    for name, value in trained(queue=True)[0].items():
        assert torch.allclose(value, kd[0][name], atol=1e-5)


@pytest.mark.parametrize("queue, sizes", [(True, [16, 4]), (False, [6, 6, 6, 4])])
def test_a_queue_makes_full_batches(queue, sizes, monkeypatch):
    """A third takes part: 8 + 8 + 4 of scans of 24, 24 and 12; or 6, 6, 6, 4 of batches of 16."""
    found, reduced = [], rk.reduced_loss
    monkeypatch.setattr(rk, "participates", lambda logits, *_: torch.arange(len(logits)) % 3 == 0)
    monkeypatch.setattr(rk, "reduced_loss", lambda losses, *more: found.append(len(losses)) or reduced(losses, *more))
    trained(queue=queue, epochs=2)
    assert found == 2 * sizes


@pytest.mark.parametrize("optimizer, queue", [("adam", False), ("sgd", True)])
def test_where_nobody_takes_part_nothing_moves(optimizer, queue, monkeypatch):
    """Not even momentum, weight decay or Adam's step count."""
    class States(Log):
        def log(self, *row):
            moments = [torch.as_tensor(value).clone() for kept in self.state["optimizer"].state.values() for value in kept.values()]
            self.rows.append([*weights_of(self.state["student"]).values(), *moments])
    (teacher, student, data, train), log = toy(), States()
    monkeypatch.setattr(rk, "participates", lambda logits, labels, *_: labels >= 10 * (len(log.rows) > 0))     # in epoch 0
    rk.distill(teacher, student, data, settings_of(optimizer=optimizer, weight_decay=0.1, queue=queue), log, train=train)
    first, _, last = log.rows
    assert len(first) > len(weights_of(student)) and all(map(torch.equal, first, last))


def test_counts_belong_to_the_original_image_under_shuffling_and_augmentation(monkeypatch):
    """Who takes part is decided by a mark in the image, before it is augmented, and counted at the image's own place."""
    (_, _, data, train), marked, seen, augment = toy(), torch.arange(60) % 7 == 3, [], rk.augment
    train.pixels[:] = train.pixels.clone()
    train.pixels[:, 0, 0, 0] = 16 * marked
    monkeypatch.setattr(rk, "augment", lambda pixels, *more: seen.append(pixels[:, 0, 0, 0] > 0.5) or augment(pixels, *more))
    monkeypatch.setattr(rk, "participates", lambda *_: seen[-1])
    for crop in (0, 1):
        counts, shares = rk.train_teacher(toy()[0], data._replace(crop=crop), settings_of(queue=bool(crop)), train=train)
        assert torch.equal(counts, 3.0 * marked)
        near(shares, [9 / 60] * 3)


@pytest.mark.parametrize("mode", ["significance", "hybrid"])
@pytest.mark.parametrize("counts", [None, torch.ones(59), torch.zeros(60)], ids=["none", "others", "all 0"])
def test_counts_that_are_missing_or_of_another_set_are_refused(mode, counts):
    with pytest.raises(common.BadInput, match=f"--mode {mode} needs"):
        trained(mode=mode, counts=counts)


def test_with_batchnorm_the_scan_moves_no_running_statistics(monkeypatch):
    teacher, student, data, train = toy(student="wrn10_1")
    before = weights_of(student)
    monkeypatch.setattr(rk, "participates", lambda logits, labels, *_: labels > 10)
    rk.distill(teacher, student, data, settings_of(), train=train)
    assert equal(before, weights_of(student))


@pytest.mark.parametrize("queue, chosen, expected", [
    (True, [7, 5, 5], [17]), (True, [16, 16, 1], [16, 17]), (True, [17, 0, 0], [17]), (True, [1, 0, 0], []),
    (False, [1, 5, 0, 1], [5])], ids=str)
def test_with_batchnorm_no_step_takes_a_single_image(queue, chosen, expected, monkeypatch):
    """A 1x1 map of one image cannot be normalised: it joins the batch before it, or is passed over and not counted."""
    teacher, _, data, train = toy()
    student = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10))
    first, sizes = iter(chosen), []
    monkeypatch.setattr(rk, "participates", lambda logits, *_: torch.arange(len(logits)) < next(first))
    student[1].register_forward_pre_hook(lambda layer, x: sizes.append(len(x[0])) if layer.training else None)
    used, _ = rk.distill(teacher, student, data, settings_of(queue=queue, epochs=1), train=train)
    assert sizes == expected and used.sum() == sum(sizes)


def test_the_script(teacher_file, in_tmp, capsys):
    """The note on BatchNorm; which mode trains a self-regulated teacher, where it goes, and whose accuracy is logged."""
    for out, flags, kept in (("hybrid", ["--mode", "hybrid"], ["toy.regulated.pt"]),
                             ("queue", ["--queue"], ["toy.regulated-queue.pt", "toy.regulated.pt"]),
                             ("kd", ["--mode", "kd", "--plain-teacher"], ["toy.regulated-queue.pt", "toy.regulated.pt"])):
        rk.main([*tiny_args(rk, teacher_file), *flags, "--out", out])
        notes, end = [row["text"] for row in rows_of(out) if row["event"] == "note"], rows_of(out)[-1]
        assert sum("BatchNorm" in text and "--queue" in text for text in notes) == (out == "hybrid")
        assert sorted(path.name for path in teacher_file.parent.glob("*regulated*")) == kept
        assert (end["teacher_acc"] == rows_of(out)[0]["teacher_acc"]) == (out == "kd")
        assert ("self-regulated teacher: test accuracy" in capsys.readouterr().out) == (out != "kd")


def test_what_the_script_refuses(teacher_file, capsys):
    for flags, message in ((["--mode", "hybrid", "--plain-teacher"], "leave out --plain-teacher"),
                           (["--queue", "--reduction", "visited"], "no meaning with it"),
                           (["--confidence-temperature", "0"], "must be above 0"), (["--mode", "all"], "choose from significance"),
                           (["--dataset", "none", "--preset", "digits"], "needs real images and labels")):
        assert message in refused(rk, [*tiny_args(rk, teacher_file), *flags], capsys)
    with pytest.raises(common.BadInput, match="no meaning with it"):
        trained(queue=True, reduction="visited")


def test_presets_are_found():
    def parsed(*argv):
        return common.parse("regulated_kd", rk.__doc__, rk.Settings, rk.PRESETS, argv, {"digits": ("lenet5", "lenet5_half")})
    assert (parsed("--dataset", "digits")[0].teacher, parsed("--dataset", "digits")[0].student) == ("lenet5", "lenet5_half")
    options, settings = parsed("--teacher", "alexnet", "--student", "alexnet_half")
    assert options.preset == "cifar10-alexnet-alexnet_half" and settings.queue
