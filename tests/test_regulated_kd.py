"""regulated_kd.py: golden numbers (1e-6, float64); both trainings, written anew with a masked loss."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import regulated_kd as rk
from conftest import tiny_args, tiny_settings
from helpers import D, Log, assert_close, in_float64, kl, near, near6, refused, rows_of

Z = ((torch.arange(24) * 7) % 24).to(D).reshape(6, 4) / 4
ZT = ((torch.arange(24) * 5) % 24).to(D).reshape(6, 4) / 3
Y = torch.tensor([3, 2, 0, 1, 1, 0])
M22 = torch.tensor([0, 0, 1, 1, 1, 1]).bool()
W = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 1], dtype=D)
PART = (torch.arange(60) % 3).float()                          # counts of which a third are 0


def test_goldens_1_2_3_threshold_rule_and_significance():
    thresholds = [rk.confidence_threshold(n, 0.01) for n in (0, 1, 10, 100)]
    near(thresholds, [0, 0.009950166, 0.095162582, 0.632120559], 1e-9)
    thresholds = [rk.confidence_threshold(n, 0.05) for n in range(50)]
    near([thresholds[n] for n in (9, 20, 22)], [0.362371848, 0.632120559, 0.667128916], 1e-9)
    near6(rk.confidence(Z, Y), [0.683273, 0.678215, 0.678215, 0.650509, 0.650509, 0.336347])
    near6(rk.confidence(Z, Y, temperature=4), [0.151974, 0.147150, 0.147150, 0.140254, 0.140254, 0.063092])
    near6(rk.confidence(Z, Y, temperature=1.5), [0.478667, 0.469330, 0.469330, 0.441664, 0.441664, 0.212202])
    near6(rk.confidence(Z, Y, "true"), Z.softmax(1)[torch.arange(6), Y])
    chosen = [rk.participates(Z, Y, threshold).int() for threshold in thresholds]
    found = ["".join(map(str, chosen[n].tolist())) for n in (0, 8, 9, 20, 22, 24)]
    assert found == ["001000", "001000", "001001", "001001", "001111", "111111"]
    assert sum(chosen).tolist() == [27, 27, 50, 28, 28, 41]
    near6(rk.significance_weights(sum(chosen), 50), [0.54, 0.54, 1, 0.56, 0.56, 0.82])
    for kind, expected in (("epochs", [0, 0.02, 0.04, 0.08, 0.16]), ("max", [0, 0.125, 0.25, 0.5, 1]),
                           ("mean1", [0, 0.266667, 0.533333, 1.066667, 2.133333])):
        near6(rk.significance_weights(torch.tensor([0.0, 1, 2, 4, 8]), 50, kind), expected)
        assert not rk.significance_weights(torch.zeros(3), 5, kind).any()
    for call in (lambda: rk.confidence(Z, Y, "Gap"), lambda: rk.significance_weights(W, 5, "sum")):
        with pytest.raises(ValueError, match="must be"):
            call()


def test_goldens_4_5_6_losses_of_each_image_reductions_and_gradients():
    near6(rk.kd_losses(Z, ZT, Y, 1, hard=0), [0.000894, 3.446725, 1.749210, 3.192422, 2.343362, 0.978343])
    near6(rk.kd_losses(Z, ZT, Y, 4, hard=0), [0.003747, 6.470153, 4.432268, 4.425131, 4.017267, 2.520251])
    near6(rk.cckd_losses(Z, ZT, Y), [0.513684, 0.228436, 3.467998, 0.781281, 0.317106, 0.456363])
    z = Z.clone().requires_grad_()
    losses = rk.kd_losses(z, ZT, Y, 4)
    near6(losses, [0.060739, 6.529374, 5.541489, 4.496865, 4.089002, 2.655329])
    near6(rk.reduced_loss(losses), 3.895466)                   # kd
    near6(rk.reduced_loss(losses, W), 1.233537)                # significance
    near6(rk.reduced_loss(losses[1:], W[1:]), 1.480245)        # without w = 0
    near6(rk.reduced_loss(losses[M22], W[M22]), 1.687072)      # hybrid
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
        networks = [common.build_model(name, 10, data.image_shape) for name in ("lenet5", student)]
    images = common.ImageSet(train.pixels[:60].clone(), train.labels[:60], train.scale)
    return *networks, data._replace(crop=crop), images


def settings_of(**changes):
    usual = dict(alpha_epochs=1.6, lr_student=1e-3, lr_teacher=1e-3, batch_size=16, epochs=3)
    usual.update(teacher_batch_size=16, scan_batch_size=24, teacher_epochs=3)
    return tiny_settings(rk, **{**usual, **changes})


def trained(counts=None, **changes):
    """-> the student, how often each image took part"""
    teacher, student, data, train = toy()
    return student, rk.distill(teacher, student, data, settings_of(**changes), train=train, counts=counts)[0]


def trained_anew(model, losses_of, masked, data, train, settings, seed, weights):
    """Three epochs, one pass over all with w > 0, times 1 for who takes part.   -> how often each did"""
    rows, counted, decay = weights.nonzero()[:, 0], torch.zeros(60), settings.weight_decay
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=decay)
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=decay)
    with common.seeded(seed):
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * epoch / 3)) / 2)
            for batch in torch.randperm(len(rows)).split(16):
                batch = rows[batch]
                images, y = common.augment(train.pixels[batch] / 16, data), train.labels[batch]
                logits = model(images := common.normalize(images, data))
                p = (logits.detach() / settings.confidence_temperature).softmax(1)
                first, second = p.topk(2).values.T
                confidence = p[range(len(y)), y] if settings.confidence == "true" else first - second
                unsure = confidence < 1 - math.exp(-settings.alpha_epochs / 3 * epoch)
                mask = (logits.argmax(1) != y) | unsure | (not masked)
                counted[batch] += mask
                if mask.any():
                    optimizer.zero_grad()
                    total = (mask * weights[batch] * losses_of(logits, images, y)).sum()
                    (total / (len(y) if settings.reduction == "visited" else mask.sum())).backward()
                    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
                    for p in model.parameters():
                        p.grad *= min(1, settings.clip_norm / norm) if settings.clip_norm else 1
                    optimizer.step()
    return counted


@pytest.mark.parametrize("changes", [
    dict(mode="regulated"), dict(mode="hybrid", reduction="visited", crop=1), dict(mode="kd", crop=1),
    dict(mode="ce"), dict(mode="significance", normalization="mean1"), dict(
        mode="regulated", optimizer="sgd", clip_norm=0.05, crop=1, student_loss="cckd", confidence="true",
        confidence_temperature=2.0, weight_decay=0.01)], ids=lambda changes: changes["mode"])
def test_distill_equals_one_pass_with_a_masked_loss(changes, in_float64):
    """Which without BatchNorm is the same: the same counts, the same student up to rounding."""
    settings = settings_of(**{name: value for name, value in changes.items() if name != "crop"})
    (teacher, student, data, train), other, log = toy(changes.get("crop", 0)), toy()[1], Log()
    used, shares = rk.distill(teacher, student, data, settings, log, train=train, counts=PART)
    weighted, regulated, taught = rk.MODES[settings.mode]

    def losses_of(logits, images, y):
        ce, t = F.cross_entropy(logits, y, reduction="none"), teacher(images).detach()
        hot = settings.temperature
        if taught and settings.student_loss == "kd":
            return kl(logits, t, hot) + settings.hard * ce
        trust = t.softmax(1)[range(len(y)), y]                 # CE is linear in its target
        soft = -((t / hot).softmax(1) * (logits / hot).log_softmax(1)).sum(1)
        ce_hot = F.cross_entropy(logits / hot, y, reduction="none")
        return trust * soft + (1 - trust) * ce_hot if taught else ce
    weights = torch.ones(60)
    if weighted:
        weights = PART / (PART[PART > 0].mean() if settings.normalization == "mean1" else 3)
    counted = trained_anew(other, losses_of, regulated, data, train, settings, settings.seed, weights)
    assert torch.equal(used, counted)
    assert_close(student, other), near([row["share"] for row in log.rows], shares)
    near(shares.sum() * 60, used.sum()), near(log.rows[-1]["data_fraction"], used.sum() / 180)
    assert (log.rows[-1]["sample_uses"], log.rows[-1]["never_used"]) == (used.sum(), (used == 0).sum())
    thresholds = [1 - math.exp(-1.6 * n / 3) for n in range(3)] if regulated else [None] * 3
    assert [row["threshold"] for row in log.rows] == pytest.approx(thresholds)


def test_the_teachers_training_equals_one_pass_with_a_masked_loss_of_seed_0(in_float64):
    (teacher, _, data, train), other, settings, log = toy(1), toy()[0], settings_of(seed=5), Log()
    counts, shares = rk.train_teacher(teacher, data, settings, log, train=train)

    def losses_of(logits, images, y):
        return F.cross_entropy(logits, y, reduction="none")
    assert torch.equal(counts, trained_anew(
        other, losses_of, True, data, train, settings, 0, torch.ones(60)))
    assert 0 < counts.sum() < 180 and log.rows[-1]["sample_uses"] == counts.sum()
    assert log.rows[-1]["never_used"] == (counts == 0).sum()
    assert_close(teacher, other), near([row["share"] for row in log.rows], shares)


def test_a_queue_makes_full_batches_and_with_everybody_in_it_is_plain_distillation(monkeypatch):
    """A third takes part: 8 + 8 + 4 of scans of 24, 24 and 12; or 6, 6, 6, 4 of batches of 16."""
    found, reduced = [], rk.reduced_loss
    monkeypatch.setattr(rk, "reduced_loss", lambda x, *more: found.append(len(x)) or reduced(x, *more))
    monkeypatch.setattr(rk, "participates", lambda logits, *_: torch.arange(len(logits)) % 3 == 0)
    trained(queue=True, epochs=2), trained(queue=False, epochs=1)
    assert found == [16, 4, 16, 4, 6, 6, 6, 4]
    monkeypatch.setattr(rk, "participates", lambda logits, labels, *_: labels >= 0)
    assert_close(trained(queue=True)[0], trained(mode="kd")[0], 1e-5)


@pytest.mark.parametrize("optimizer, queue", [("adam", False), ("sgd", True)])
def test_where_nobody_takes_part_nothing_moves(optimizer, queue, monkeypatch):
    """No momentum, no weight decay, no step count of Adam's, no BatchNorm."""
    class States(Log):
        def log(self, *row):
            moments = [each for kept in self.state["optimizer"].state.values() for each in kept.values()]
            self.rows.append([torch.as_tensor(x).clone() for x in (*student.state_dict().values(), *moments)])
    (teacher, student, data, train), log = toy(student="wrn10_1"), States()
    monkeypatch.setattr(rk, "participates", lambda logits, y, *_: y >= 10 * (len(log.rows) > 0))   # epoch 0
    settings = settings_of(optimizer=optimizer, weight_decay=0.1, queue=queue)
    rk.distill(teacher, student, data, settings, log, train=train)
    assert len(log.rows[0]) > len(student.state_dict()) and all(map(torch.equal, log.rows[0], log.rows[2]))


@pytest.mark.parametrize("queue, chosen, expected", [
    (True, [7, 5, 5], [17]), (True, [16, 16, 1], [16, 17]), (True, [17, 0, 0], [17]), (True, [1, 0, 0], []),
    (False, [1, 5, 0, 1], [5])], ids=str)
def test_with_batchnorm_no_step_takes_a_single_image(queue, chosen, expected, monkeypatch):
    """A 1x1 map of one image has no deviation: it joins the batch before, or is ignored and not counted."""
    teacher, _, data, train = toy()
    student = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 10))
    first, sizes = iter(chosen), []
    monkeypatch.setattr(rk, "participates", lambda logits, *_: torch.arange(len(logits)) < next(first))
    student[1].register_forward_pre_hook(lambda layer, x: sizes.append(len(x[0])) if layer.training else None)
    used, _ = rk.distill(teacher, student, data, settings_of(queue=queue, epochs=1), train=train)
    assert sizes == expected and used.sum() == sum(sizes)


def test_the_script(teacher_file, in_tmp, capsys):
    """The note on BatchNorm; which mode trains a self-regulated teacher, its file; whose accuracy counts."""
    both = ["toy.regulated-queue.pt", "toy.regulated.pt"]
    for out, flags, kept in (("hybrid", ["--mode", "hybrid"], both[1:]), ("queue", ["--queue"], both),
                             ("kd", ["--mode", "kd", "--plain-teacher"], both)):
        rk.main([*tiny_args(rk, teacher_file), *flags, "--out", out])
        rows = rows_of(out)
        self_regulated = "self-regulated teacher: test accuracy" in capsys.readouterr().out
        notes = [row["text"] for row in rows if row["event"] == "note" and "BatchNorm" in row["text"]]
        assert len(notes) == (out == "hybrid") and self_regulated == (out != "kd")
        assert sorted(path.name for path in teacher_file.parent.glob("*regulated*")) == kept
        assert (rows[-1]["teacher_acc"] != rows[0]["teacher_acc"]) == self_regulated


def test_what_is_refused(teacher_file, capsys):
    for flags, message in ((["--mode", "hybrid", "--plain-teacher"], "leave out --plain-teacher"),
                           (["--queue", "--reduction", "visited"], "no meaning with it"),
                           (["--confidence-temperature", "0"], "must be above 0"),
                           (["--mode", "all"], "choose from significance"),
                           (["--dataset", "none", "--preset", "digits"], "needs real images and labels")):
        assert message in refused(rk, [*tiny_args(rk, teacher_file), *flags], capsys)
    with pytest.raises(common.BadInput, match="no meaning with it"):
        trained(queue=True, reduction="visited")
    for mode in ("significance", "hybrid"):
        for counts in (None, torch.ones(59), torch.zeros(60)):
            with pytest.raises(common.BadInput, match=f"--mode {mode} needs"):
                trained(counts, mode=mode)


@pytest.mark.parametrize("argv, expected", [
    (["--dataset", "digits"], ("lenet5", "lenet5_half", "digits")), (
        ["--teacher", "alexnet", "--student", "alexnet_half"],
        ("alexnet", "alexnet_half", "cifar10-alexnet-alexnet_half"))], ids=["digits", "alexnet"])
def test_networks_and_preset_of_a_data_set_and_of_a_pair(argv, expected, monkeypatch):
    def stop(options, *_, **more):
        raise KeyError(options.teacher, options.student, options.preset)
    monkeypatch.setattr(rk, "load_networks", stop)
    with pytest.raises(KeyError) as stopped:
        rk.main(argv)
    assert stopped.value.args == expected
