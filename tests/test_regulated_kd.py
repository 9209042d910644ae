"""regulated_kd.py: golden numbers (1e-6, float64); both trainings, written anew with a masked loss; what a
run says and shows of the images that it used."""
import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import regulated_kd as rk
from conftest import tiny_args, tiny_settings
from helpers import (D, Log, assert_close, equal, in_float64, kl, near, near6, refused, rows_of,
                     weights_of)

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


def test_mean1_makes_the_mean_weight_1_and_not_the_mean_loss_the_same():
    weights = rk.significance_weights(torch.tensor([0.0, 1, 2, 4, 8]), 9, "mean1")
    near6(weights[weights > 0].mean(), 1)
    losses = torch.tensor([0.1, 0.2, 0.4, 0.8])            # images that are needed often have large losses
    assert rk.reduced_loss(losses, weights[1:]) > 1.4 * rk.reduced_loss(losses)


def test_in_cckd_the_trust_in_the_teacher_is_taken_at_temperature_1_and_its_answer_at_tau():
    for tau in (1.0, 1.5, 4.0):
        trust = ZT.softmax(1)[range(6), Y][:, None]
        target = trust * (ZT / tau).softmax(1) + (1 - trust) * torch.eye(4, dtype=D)[Y]
        near6(rk.cckd_losses(Z, ZT, Y, tau), F.cross_entropy(Z / tau, target, reduction="none"))


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
    pixels, labels = rk.needed_most(PART if weighted and not regulated else used, train, 10)
    assert torch.equal(log.shown[-1][0], pixels) and torch.equal(log.shown[-1][1], labels)


def test_normalization_is_one_factor_that_adam_cancels_and_that_scales_the_steps_of_sgd(in_float64):
    start = toy()[1]

    def steps_of(optimizer, normalization):
        student, _ = trained(PART, mode="significance", optimizer=optimizer, normalization=normalization,
                             epochs=1, batch_size=64)          # one step
        return torch.cat([(one - other).flatten() for one, other in zip(student.parameters(),
                                                                         start.parameters())]).detach()
    adam, sgd = ({name: steps_of(optimizer, name) for name in ("epochs", "max", "mean1")}
                 for optimizer in ("adam", "sgd"))
    for name, factor in (("max", 3 / 2), ("mean1", 2)):        # w is 1/3 and 2/3; 1/2 and 1; 2/3 and 4/3
        near(sgd[name], factor * sgd["epochs"], 1e-12)
        assert (adam[name] - adam["epochs"]).norm() < 0.01 * adam["epochs"].norm()
    assert sgd["epochs"].norm() > 0


def test_the_teachers_training_equals_one_pass_with_a_masked_loss_of_seed_0(in_float64):
    (teacher, _, data, train), other, settings, log = toy(1), toy()[0], settings_of(seed=5), Log()
    counts, shares = rk.train_regulated_teacher(teacher, data, settings, log, train=train)

    def losses_of(logits, images, y):
        return F.cross_entropy(logits, y, reduction="none")
    assert torch.equal(counts, trained_anew(
        other, losses_of, True, data, train, settings, 0, torch.ones(60)))
    assert 0 < counts.sum() < 180 and log.rows[-1]["sample_uses"] == counts.sum()
    assert log.rows[-1]["never_used"] == (counts == 0).sum()
    assert torch.equal(log.shown[-1][0], rk.needed_most(counts, train, 10)[0])
    assert_close(teacher, other), near([row["share"] for row in log.rows], shares)


class Killed(Exception):
    pass


class Interrupted(Log):
    """A run that keeps the state of the first epoch and dies; the next one goes on with it."""
    def __init__(self, kept=None):
        super().__init__()
        self.kept = kept

    def resume(self, **state):
        self.state = state
        if self.kept is None:
            return 0
        for name, value in state.items():
            (value.copy_ if torch.is_tensor(value) else value.load_state_dict)(self.kept[name])
        torch.set_rng_state(self.kept["rng"])
        return 1

    def log(self, *row):
        super().log(*row)
        if self.kept is None:
            state = {name: value if torch.is_tensor(value) else value.state_dict()
                     for name, value in self.state.items()}
            self.kept = {**copy.deepcopy(state), "rng": torch.get_rng_state()}
            raise Killed


@pytest.mark.parametrize("mode", ["significance", "regulated", "hybrid", "kd"])
def test_a_state_without_the_teachers_counts_is_enough_to_resume_exactly(mode):
    settings, straight = settings_of(mode=mode), Log()
    teacher, student, data, train = toy(1)
    used, _ = rk.distill(teacher, student, data, settings, straight, train=train, counts=PART)
    first, again = Interrupted(), toy(1)[1]
    with pytest.raises(Killed):
        rk.distill(teacher, toy(1)[1], data, settings, first, train=train, counts=PART)
    second = Interrupted(first.kept)
    rest, _ = rk.distill(teacher, again, data, settings, second, train=train, counts=PART)
    assert "counts" not in second.state and first.rows + second.rows == straight.rows
    assert torch.equal(used, rest) and equal(weights_of(student), weights_of(again))


def test_the_images_needed_most_at_most_eight_of_a_class_and_no_random_number():
    train, _ = common.load_dataset("digits", True)
    before, used = torch.get_rng_state(), (torch.arange(1437) * 7 % 11).float()        # many ties, some 0
    pixels, labels = rk.needed_most(used, train, 10)
    assert torch.equal(before, torch.get_rng_state()) and torch.bincount(labels).tolist() == [8] * 10
    assert 0 <= pixels.min() and pixels.max() == 1
    expected = sorted(range(1437), key=lambda i: (-used[i], i))
    for label in range(10):
        first = [i for i in expected if train.labels[i] == label][:8]
        assert torch.equal(pixels[labels == label], train.pixels[first] / 16)
    few = torch.zeros(1437)
    few[[5, 9]] = torch.tensor([1.0, 2.0])                     # one that was never needed is not shown
    pixels, labels = rk.needed_most(few, train, 10)
    assert torch.equal(pixels, train.pixels[[9, 5]] / 16) and torch.equal(labels, train.labels[[9, 5]])
    assert rk.needed_most(few * 0, train, 10) == (None, None)


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


@pytest.mark.usefixtures("unchecked")
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
    """The note on BatchNorm; which mode trains a self-regulated teacher, in which folder; whose accuracy
    counts; the share of images that was used; a picture, but of modes that use all images alike."""
    both = ["toy.regulated", "toy.regulated-queue"]
    for out, flags, kept in (("hybrid", ["--mode", "hybrid"], both[:1]), ("queue", ["--queue"], both),
                             ("kd", ["--mode", "kd", "--plain-teacher"], both)):
        rk.main([*tiny_args(rk, teacher_file), *flags, "--out", out])
        rows, said = rows_of(out), capsys.readouterr().out
        self_regulated = "self-regulated teacher: test accuracy" in said
        notes = [row["text"] for row in rows if row["event"] == "note" and "BatchNorm" in row["text"]]
        assert len(notes) == (out == "hybrid") and self_regulated == (out != "kd")
        assert sorted(path.name for path in teacher_file.parent.glob("*regulated*")) == kept
        assert (rows[-1]["teacher_acc"] != rows[0]["teacher_acc"]) == self_regulated
        share = [row for row in rows if row["event"] == "epoch"][-1]["data_fraction"]
        sentence = f"took steps on {100 * share:.1f} % of the image visits; plain distillation (--mode kd)"
        assert (sentence in said) == ("took steps" in said) == (out != "kd")
        assert Path(out, "samples.png").exists() and (share < 1) == (out != "kd")
    assert (teacher_file.parent / "toy.regulated/samples.png").exists()


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
    (["--dataset", "digits"], ("lenet5", "lenet5_half", "digits")),
    (["--preset", "mnist-cpu"], ("lenet5", "lenet5_half", "mnist-cpu")),
    (["--dataset", "fashion_mnist"], ("lenet5", "lenet5_half", "fashion_mnist")),
    (["--preset", "cifar10-cpu"], ("wrn16_2", "wrn16_1", "cifar10-cpu")),
    ([], ("resnet34", "resnet18", "cifar10")),
    (["--teacher", "alexnet", "--student", "alexnet_half"],
     ("alexnet", "alexnet_half", "cifar10-alexnet-alexnet_half"))], ids=str)
def test_networks_and_preset_of_a_data_set_and_of_a_pair(argv, expected, monkeypatch):
    def stop(options, *_, **more):
        raise KeyError(options.teacher, options.student, options.preset)
    monkeypatch.setattr(rk, "load_networks", stop)
    with pytest.raises(KeyError) as stopped:
        rk.main(argv)
    assert stopped.value.args == expected
