"""regulated_kd.py: golden numbers (1e-6, float64), the limits of the rule, two passes against one, counts, its script."""
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import models
import regulated_kd as rk
import regulated_saving
import run
from conftest import tiny_args, tiny_settings
from test_csd_method import Recorder, same, weights_of
from test_scripts import Killed, assert_same_run, kill_at, rows_of

D = torch.float64
Z = ((torch.arange(24) * 7) % 24).to(D).reshape(6, 4) / 4
ZT = ((torch.arange(24) * 5) % 24).to(D).reshape(6, 4) / 3
Y = torch.tensor([3, 2, 0, 1, 1, 0])
M22 = torch.tensor([0, 0, 1, 1, 1, 1]).bool()
W = torch.tensor([0, 0.1, 0.2, 0.3, 0.4, 1], dtype=D)


def near(value, expected, tolerance=1e-6):
    value = torch.as_tensor(value, dtype=D).detach()
    assert torch.allclose(value, torch.tensor(expected, dtype=D), atol=tolerance, rtol=0), value


# -------------------------------------------------------------------------------------------------------------- golden numbers
def test_golden_1_threshold():
    near([rk.confidence_threshold(n, 0.01) for n in (0, 1, 10, 100)], [0, 0.009950166, 0.095162582, 0.632120559], 1e-9)
    near([rk.confidence_threshold(n, 0.05) for n in (9, 20, 22)], [0.362371848, 0.632120559, 0.667128916], 1e-9)


def test_golden_2_rule():
    assert Z.argmax(1).tolist() == [3, 2, 2, 1, 1, 0]
    near(rk.confidence(Z, Y), [0.683273, 0.678215, 0.678215, 0.650509, 0.650509, 0.336347])
    for epoch, expected in ((0, "001000"), (8, "001000"), (9, "001001"), (20, "001001"), (22, "001111"), (24, "111111")):
        found = rk.participates(Z, Y, rk.confidence_threshold(epoch, 0.05))
        assert "".join(str(int(m)) for m in found) == expected, epoch
    near(rk.confidence(Z, Y, temperature=4), [0.151974, 0.147150, 0.147150, 0.140254, 0.140254, 0.063092])
    near(rk.confidence(Z, Y, temperature=1.5), [0.478667, 0.469330, 0.469330, 0.441664, 0.441664, 0.212202])
    near(rk.confidence(Z, Y, "true"), Z.softmax(1)[torch.arange(6), Y].tolist())


def test_golden_3_significance():
    counts = sum(rk.participates(Z, Y, rk.confidence_threshold(n, 0.05)).float() for n in range(50))
    assert counts.tolist() == [27, 27, 50, 28, 28, 41]
    near(rk.significance_weights(counts, 50), [0.54, 0.54, 1, 0.56, 0.56, 0.82])
    assert counts.sum() / (50 * 6) == pytest.approx(0.67)
    counts = torch.tensor([0.0, 1, 2, 4, 8])
    near(rk.significance_weights(counts, 50), [0, 0.02, 0.04, 0.08, 0.16])
    near(rk.significance_weights(counts, 50, "max"), [0, 0.125, 0.25, 0.5, 1])
    near(rk.significance_weights(counts, 50, "mean1"), [0, 0.266667, 0.533333, 1.066667, 2.133333])
    for kind in ("epochs", "max", "mean1"):
        assert not rk.significance_weights(torch.zeros(3), 5, kind).any()


def test_words_that_are_no_choice_are_refused():
    for call in (lambda: rk.confidence(Z, Y, "Gap"), lambda: rk.significance_weights(torch.ones(3), 5, "sum")):
        with pytest.raises(ValueError, match="must be"):
            call()


def test_golden_4_losses_of_each_image():
    near(rk.kd_losses(Z, ZT, Y, 1, hard=0), [0.000894, 3.446725, 1.749210, 3.192422, 2.343362, 0.978343])
    near(rk.kd_losses(Z, ZT, Y, 4, hard=0), [0.003747, 6.470153, 4.432268, 4.425131, 4.017267, 2.520251])
    near(rk.kd_losses(Z, ZT, Y, 4), [0.060739, 6.529374, 5.541489, 4.496865, 4.089002, 2.655329])
    near(rk.cckd_losses(Z, ZT, Y), [0.513684, 0.228436, 3.467998, 0.781281, 0.317106, 0.456363])


def test_golden_5_reductions():
    losses = rk.kd_losses(Z, ZT, Y, 4)
    near(rk.reduced_loss(losses), 3.895466)                                               # kd
    near(rk.reduced_loss(losses, W), 1.233537)                                            # significance, all six
    near(rk.reduced_loss(losses[1:], W[1:]), 1.480245)                                    # without w = 0
    near(rk.reduced_loss(losses[M22]), 4.195671)                                          # regulated
    near(rk.reduced_loss(losses[M22], W[M22]), 1.687072)                                  # hybrid
    near(rk.reduced_loss(losses[M22], visited=6), 4.195671 * 4 / 6)


def test_golden_6_gradients():
    z = Z.clone().requires_grad_()
    gradient, = torch.autograd.grad(rk.reduced_loss(rk.kd_losses(z[M22], ZT[M22], Y[M22], 4)), z)
    near(gradient, [[0.0] * 4] * 2 + [[-0.203002, -0.180759, 0.382484, 0.001277], [0.076784, 0.093119, -0.297319, 0.127416],
                                      [0.145449, 0.197276, -0.139323, -0.203402], [0.221467, -0.054366, -0.075505, -0.091595]])
    near(gradient.sum(1), [0.0] * 6)


# --------------------------------------------------------------------------------------------------------------------- trainings
def toy(count=60, crop=0, names=("lenet5", "lenet5_half")):
    """Teacher, student, DataSpec, ImageSet: some real digits, no augmentation unless asked for."""
    train, data = common.load_dataset("digits", True)
    data = data._replace(crop=crop)
    train = common.ImageSet(train.pixels[:count], train.labels[:count], train.scale)
    with common.seeded(0):
        return *(models.build_model(name, 10, data.image_shape) for name in names), data, train


def settings_of(**changes):
    return tiny_settings(rk, **{"alpha_epochs": 1.6, "lr_student": 1e-3, "lr_teacher": 1e-3, "batch_size": 16, "teacher_batch_size": 16, "scan_batch_size": 24, "epochs": 3, "teacher_epochs": 3, **changes})


def trained(look=None, counts=None, toys=None, **changes):
    """-> student's weights, how often each image took part, the recorder"""
    teacher, student, data, train = toys or toy()
    recorder = Recorder(look)
    used, _ = rk.distill(teacher, student, data, settings_of(**changes), recorder, train=train, counts=counts)
    return weights_of(student), used, recorder


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def close(one, other, tolerance=1e-5):
    return all(torch.allclose(one[key], other[key], atol=tolerance) for key in one)


ONES = torch.full((60,), 3.0)


@pytest.mark.parametrize("mode", rk.MODES)
@pytest.mark.parametrize("crop", [0, 1])
def test_distill_trains_the_student_and_leaves_the_teacher_as_it_was(mode, crop):
    teacher, student, data, train = toy(crop=crop)
    teacher.train()
    before, student_before, recorder = weights_of(teacher), weights_of(student), Recorder()
    used, curve = rk.distill(teacher, student, data, settings_of(mode=mode), recorder, train=train, counts=ONES)
    assert same(before, teacher) and teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert not same(student_before, student) and student.training and len(curve) == 3 and len(used) == 60
    rows = [row for row in recorder.rows if "share" in row]
    assert [row["share"] for row in rows] == curve and rows[-1]["sample_uses"] == used.sum() and rows[-1]["never_used"] == (used == 0).sum()
    assert rows[-1]["data_fraction"] == pytest.approx(used.sum().item() / 180)
    queries = {"ce": 0}.get(mode, 60 if not crop else used.sum().item())
    assert recorder.state["teacher_queries"] == queries
    if mode in ("kd", "ce", "significance"):
        assert (used == 3).all() and rows[0]["threshold"] is None and recorder.state["student_steps"] == 12
    else:
        assert rows[0]["threshold"] == 0 and rows[-1]["threshold"] == pytest.approx(1 - math.exp(-1.6 * 2 / 3))


def test_distill_is_a_function_of_its_seed_and_draws_from_no_global_stream():
    results = []
    for seed, disturb in ((0, 0), (0, 1234), (1, 0)):
        torch.manual_seed(disturb)
        before = torch.get_rng_state()
        results.append(trained(seed=seed)[0])
        assert torch.equal(before, torch.get_rng_state())
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


def test_alpha_0_only_mistakes_ever_train():
    seen, found = [], rk.participates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rk, "participates", lambda logits, labels, *a: seen.append((logits.argmax(1) != labels, found(logits, labels, *a))) or seen[-1][1])
        trained(alpha_epochs=0.0, epochs=6)
    assert all(torch.equal(wrong, chosen) for wrong, chosen in seen) and any(chosen.any() for _, chosen in seen)


def test_alpha_huge_all_take_part_but_in_epoch_0():
    _, _, recorder = trained(alpha_epochs=1e9)
    shares = [row["share"] for row in recorder.rows]
    assert shares[0] < 1 and shares[1:] == [1.0, 1.0]


def test_hybrid_with_weights_1_equals_regulated():
    assert equal(trained(mode="hybrid", counts=ONES)[0], trained(mode="regulated")[0])
    assert not equal(trained(mode="hybrid", counts=torch.arange(60.0) % 4)[0], trained(mode="regulated")[0])


def test_regulated_with_the_mask_forced_to_1_equals_kd(monkeypatch):
    plain = trained(mode="kd")[0]
    monkeypatch.setattr(rk, "participates", lambda logits, labels, *a: torch.ones_like(labels, dtype=torch.bool))
    assert equal(trained(mode="regulated")[0], plain) and equal(trained(mode="regulated", reduction="visited")[0], plain)
    assert close(trained(mode="regulated", queue=True)[0], plain)          # the same images in the same order, whatever was looked at together


def test_a_queue_makes_full_batches(monkeypatch):
    monkeypatch.setattr(rk, "participates", lambda logits, labels, *a: torch.arange(len(labels)) % 3 == 0)
    sizes, reduced = [], rk.reduced_loss
    monkeypatch.setattr(rk, "reduced_loss", lambda losses, *a: sizes.append(len(losses)) or reduced(losses, *a))
    trained(queue=True, epochs=2)
    assert sizes == [16, 4] * 2                                # 8 + 8 + 4 of looks at 24, 24 and 12
    sizes.clear()
    trained(epochs=2)
    assert sizes == [6, 6, 6, 4] * 2


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("queue", [False, True])
def test_a_batch_in_which_nobody_takes_part_moves_nothing(optimizer, queue, monkeypatch):
    """Not even momentum, weight decay or Adam's step count."""
    snapshots = []

    def look(state):
        moments = {f"{place} {name}": torch.as_tensor(value).clone() for place, kept in state["optimizer"].state_dict()["state"].items()
                   for name, value in kept.items()}
        snapshots.append((weights_of(state["model"]), moments))
    monkeypatch.setattr(rk, "participates", lambda logits, labels, *a: torch.full_like(labels, len(snapshots) < 3, dtype=torch.bool))
    trained(look, optimizer=optimizer, weight_decay=0.1, queue=queue)
    last = snapshots[2]
    assert equal(snapshots[-1][0], last[0]) and last[1] and equal(last[1], snapshots[-1][1]) and len(snapshots) > 6
    assert not equal(snapshots[0][0], snapshots[1][0])


def test_two_passes_equal_one_pass_with_a_masked_loss():
    """Without BatchNorm: forward all, multiply by the mask, divide by its sum."""
    teacher, student, data, train = toy()
    _, other, _, _ = toy()
    settings = settings_of(epochs=4)
    used, _ = rk.distill(teacher, student, data, settings, train=train)
    rng = torch.Generator().manual_seed(0)
    batches, adam, counted = common.Shuffled(rng), torch.optim.Adam(other.parameters(), settings.lr_student), torch.zeros(60)
    for epoch in range(4):
        common.set_lr(adam, rk.rate(settings.lr_student, epoch, 4))
        for _ in range(4):
            batch = batches.next(60, 16)
            images = common.normalize(train.pixels[batch] / train.scale, data)
            logits = other(images)
            mask = rk.participates(logits.detach(), train.labels[batch], 1 - math.exp(-1.6 / 4 * epoch)).float()
            counted[batch] += mask
            with torch.no_grad():
                answers = teacher(images)
            losses = 16 * F.kl_div((logits / 4).log_softmax(1), (answers / 4).softmax(1), reduction="none").sum(1)
            losses = losses + 0.3 * F.cross_entropy(logits, train.labels[batch], reduction="none")
            if mask.any():
                adam.zero_grad(), ((mask * losses).sum() / mask.sum()).backward(), adam.step()
    assert torch.equal(counted, used) and close(weights_of(student), weights_of(other), 1e-4)


def test_counts_belong_to_the_original_image_under_shuffling_and_augmentation(monkeypatch):
    """The rule sees pixels; who takes part is decided here by a mark in the image, and must be counted at the image's own place."""
    teacher, student, data, train = toy()
    pixels = train.pixels.clone()
    marked = torch.arange(60) % 7 == 3
    pixels[:, 0, 0, 0] = 16 * marked
    train = common.ImageSet(pixels, train.labels, train.scale)
    seen = []
    augment = rk.augment
    monkeypatch.setattr(rk, "augment", lambda batch, *a: seen.append(batch[:, 0, 0, 0] > 0.5) or augment(batch, *a))
    monkeypatch.setattr(rk, "participates", lambda *a: seen[-1])
    for crop in (0, 1):
        result = rk.train_teacher(models.build_model("lenet5", 10, data.image_shape), data._replace(crop=crop), settings_of(queue=bool(crop)), train=train)
        assert torch.equal(result["counts"], 3.0 * marked) and result["curve"] == [9 / 60] * 3


def test_the_teachers_training_counts_and_its_curve_falls():
    teacher, _, data, train = toy(300)
    recorder = Recorder()
    result = rk.train_teacher(teacher, data, settings_of(teacher_epochs=12, lr_teacher=5e-3), recorder, train=train)
    rows = recorder.rows
    assert [row["teacher_epoch"] for row in rows] == list(range(12)) and {row["event"] for row in rows} == {"teacher"}
    assert result["curve"][-1] < result["curve"][0] / 2 and result["counts"].sum() == rows[-1]["sample_uses"] and result["counts"].max() <= 12
    assert common.accuracy(teacher(common.normalize(train.pixels / 16, data)), train.labels) > 0.9
    assert equal(result["weights"], weights_of(teacher)) and "student_steps" not in recorder.state


def test_significance_leaves_out_whom_nobody_needed():
    counts = torch.arange(60.0) % 3
    _, used, recorder = trained(mode="significance", counts=counts)
    assert torch.equal(used > 0, counts > 0) and recorder.state["student_steps"] == 3 * 3


@pytest.mark.parametrize("mode", ["significance", "hybrid"])
def test_counts_that_are_missing_or_of_another_set_are_refused(mode):
    for counts in (None, torch.ones(59), torch.zeros(60)):
        with pytest.raises(common.BadInput, match=f"--mode {mode} needs"):
            trained(mode=mode, counts=counts)


@pytest.mark.parametrize("changes", [
    dict(alpha_epochs=5.0), dict(confidence="true"), dict(confidence_temperature=4.0), dict(queue=True), dict(reduction="visited"), dict(temperature=1.0),
    dict(hard=2.0), dict(student_loss="cckd"), dict(optimizer="sgd"), dict(lr_student=0.01), dict(weight_decay=0.1), dict(clip_norm=0.01)], ids=str)
def test_every_reading_reaches_the_student(changes):
    base = dict(epochs=12, lr_student=5e-3, hard=10.0)         # long enough to be sure of some images, the untrained teacher drowned
    assert not equal(trained(**base)[0], trained(**{**base, **changes})[0])


@pytest.mark.parametrize("normalization", ["max", "mean1"])
def test_the_normalization_reaches_the_loss(normalization):
    counts, more = torch.arange(60.0) % 3, dict(optimizer="sgd", lr_student=0.05)
    assert not equal(trained(mode="significance", counts=counts, **more)[0], trained(mode="significance", counts=counts, normalization=normalization, **more)[0])


def test_a_gradient_is_cut_to_its_largest_norm(monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, norm):
        parameters = list(parameters)
        total = clip(parameters, norm)
        norms.append((total.item(), torch.stack([p.grad.norm() for p in parameters]).norm().item()))
        return total
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    trained(clip_norm=0.02)
    assert max(before for before, _ in norms) > 0.05 and max(after for _, after in norms) <= 0.02001


def test_with_batchnorm_the_look_moves_no_running_statistics():
    teacher, student, data, train = toy(names=("wrn10_1", "wrn10_1"))
    before = weights_of(student)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rk, "participates", lambda logits, labels, *a: torch.zeros_like(labels, dtype=torch.bool))
        rk.distill(teacher, student, data, settings_of(), train=train)
    assert same(before, student)


@pytest.mark.parametrize("queue", [False, True])
def test_with_batchnorm_a_single_chosen_image_does_not_stop_the_run(queue, monkeypatch):
    """A last map of 1x1 and one image: BatchNorm refuses to normalise it. It waits in the queue, or is passed over."""
    _, _, data, train = toy()
    student = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4, 10))
    counts = iter([17, 0, 0, 16, 0, 0, 15, 0, 0] if queue else [1, 5, 0, 1] * 5)          # chosen in each batch of 24, or of 16

    def some(logits, *a):
        return torch.arange(len(logits)) < next(counts)
    monkeypatch.setattr(rk, "participates", some)
    teacher, _, _, _ = toy()
    sizes = []
    student[1].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None)
    used, _ = rk.distill(teacher, student, data, settings_of(queue=queue, batch_size=16), train=train)
    assert min(sizes) > 1 and used.sum() == (48 if queue else 15)
    assert sizes == ([16, 16, 16] if queue else [5, 5, 5])


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named():
    with pytest.raises(FloatingPointError, match="loss became"):
        trained(mode="kd", lr_student=float("inf"))


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_hooks_and_flags_are_back_after_an_exception(whose):
    """Raised inside a network: the teacher's answers, or the student's look at who takes part."""
    toys, calls = toy(), []

    def stop(network, inputs):
        calls.append(network.training)
        if len(calls) == 4:
            raise KeyError
    for network in toys[:1 if whose == "teacher" else 2][-1:]:
        network.register_forward_pre_hook(stop)
    with pytest.raises(KeyError):
        trained(toys=(toys[0], toys[1], toys[2]._replace(crop=1), toys[3]))
    assert not calls[-1] or whose == "student"
    assert all(p.requires_grad for network in toys[:2] for p in network.parameters()) and toys[1].training


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("queue", [False, True])
def test_distill_on_a_gpu(queue):
    teacher, student, data, train = toy()
    before = weights_of(student)
    train = common.ImageSet(train.pixels.cuda(), train.labels.cuda(), train.scale)
    rk.distill(teacher.cuda(), student.cuda(), data, settings_of(queue=queue), train=train)
    assert not same(before, student.cpu())


# ---------------------------------------------------------------------------------------------------------------------- script
def test_a_run_leaves_what_it_promises(teacher_file, in_tmp, capsys):
    rk.main([*tiny_args(rk, teacher_file), "--mode", "hybrid", "--out", "out"])
    rows = rows_of(in_tmp / "out", without_seconds=False)
    assert [row["event"] for row in rows] == ["start", "teacher", "teacher", "note", "epoch", "epoch", "end"]
    assert "BatchNorm" in rows[3]["text"]                      # the toy has some, and there is no queue
    assert {"student_acc", "agreement", "seconds_distillation", "seconds_evaluation", "student_steps", "teacher_queries", "share", "sample_uses",
            "data_fraction", "never_used", "threshold"} <= set(rows[-2]) and rows[1]["seconds_training"] > 0
    assert {path.name for path in (in_tmp / "out").iterdir()} == {"log.jsonl", "student.pt", "checkpoint.pt", "regulation.png"}
    assert "self-regulated teacher: test accuracy" in capsys.readouterr().out
    assert (in_tmp / "checkpoints" / "toy.regulated.pt").exists()


@pytest.mark.parametrize("mode", ["kd", "ce"])
def test_a_run_without_a_self_regulated_teacher(mode, teacher_file, in_tmp):
    rk.main([*tiny_args(rk, teacher_file), "--mode", mode, "--plain-teacher", "--out", "out"])
    assert [row["event"] for row in rows_of(in_tmp / "out")] == ["start", "epoch", "epoch", "end"]       # no seconds in that file
    assert not list((in_tmp / "checkpoints").glob("*regulated*")) and (in_tmp / "out" / "regulation.png").exists()


def test_the_picture_shows_the_counts_and_the_images():
    _, _, data, train = toy(200)
    counts = torch.arange(200.0) % 13
    figure = rk.draw_regulation(counts, 12, {"teacher": [0.5, 0.25], "student": [0.1]}, train)
    left, middle, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[50, 25], [10]]
    assert [bar.get_height() for bar in middle.patches] == torch.bincount(counts.long()).tolist()
    sheet = torch.as_tensor(right.images[0].get_array())                                  # 8 x 8 images: the most above, the least below
    first, last = 12, 0
    assert counts[first] == 12 and counts[last] == 0
    assert torch.allclose(sheet[:8, :8, 0].float(), train.pixels[first, 0] / 16) and torch.allclose(sheet[32:40, :8, 0].float(), train.pixels[last, 0] / 16)
    figure.savefig(io.BytesIO(), format="png")
    few = common.ImageSet(torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8), torch.arange(20))     # few images, in colour
    rk.draw_regulation(torch.arange(20.0), 19, {"student": [1.0]}, few, "the student").savefig(io.BytesIO(), format="png")


TICKS = 12      # 2 + 2 epochs of 3 steps


@pytest.mark.parametrize("queue", [False, True])
@pytest.mark.parametrize("saves", [[1], [4], [6], [7], [9], [12], [13], list(range(1, TICKS + 2))], ids=str)
def test_a_killed_run_ends_like_one_that_was_not(saves, queue, in_tmp, monkeypatch):
    """Teacher, counts, queue and student."""
    data = common.DATASETS["digits"]
    with common.seeded(0):
        run.save_classifier(in_tmp / "plain.pt", models.build_model("lenet5", 10, data.image_shape), "lenet5", data, "digits")

    def args(folder):
        return [*tiny_args(rk, "./plain.pt"), "--student", "lenet5_half", "--mode", "hybrid", "--significance", f"{folder}.pt", *["--queue"] * queue,
                "--batch-size", "100" if queue else "480", "--out", folder, "--resume"]
    rk.main(args("straight"))
    assert rows_of(in_tmp / "straight")[-2]["epoch"] == 1
    kill_at(monkeypatch, saves)
    for _ in saves:
        with pytest.raises(Killed):
            rk.main(args("killed"))
    rk.main(args("killed"))
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    one, other = (torch.load(in_tmp / f"{name}.pt", weights_only=True)["result"] for name in ("straight", "killed"))
    assert torch.equal(one["counts"], other["counts"]) and one["curve"] == other["curve"] and equal(one["weights"], other["weights"])


@pytest.mark.parametrize("mode", ["kd", "ce", "regulated"])
def test_a_killed_run_with_the_usual_teacher_ends_like_one_that_was_not(mode, in_tmp, monkeypatch):
    data = common.DATASETS["digits"]
    with common.seeded(0):
        run.save_classifier(in_tmp / "plain.pt", models.build_model("lenet5", 10, data.image_shape), "lenet5", data, "digits", seconds=7.0)

    def args(folder):
        return [*tiny_args(rk, "./plain.pt"), "--student", "lenet5_half", "--mode", mode, "--plain-teacher", "--out", folder, "--resume"]
    rk.main(args("straight"))
    kill_at(monkeypatch, [2, 6])
    for _ in range(2):
        with pytest.raises(Killed):
            rk.main(args("killed"))
    rk.main(args("killed"))
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    assert sum(row.get("teacher_seconds") == 7 for row in rows_of(in_tmp / "killed")) == (mode != "ce")


def test_resume_goes_on_with_the_counts_it_began_with(in_tmp, monkeypatch):
    """Also when the teacher's file was put there anew meanwhile."""
    data = common.DATASETS["digits"]
    with common.seeded(0):
        run.save_classifier(in_tmp / "plain.pt", models.build_model("lenet5", 10, data.image_shape), "lenet5", data, "digits")
    args = [*tiny_args(rk, "./plain.pt"), "--student", "lenet5_half", "--mode", "significance", "--significance", "s.pt", "--resume", "--out"]
    rk.main([*args, "straight"])
    kill_at(monkeypatch, [2])
    with pytest.raises(Killed):
        rk.main([*args, "killed"])
    content = torch.load(in_tmp / "s.pt", weights_only=True)
    content["result"]["counts"] = content["result"]["counts"].flip(0)
    torch.save(content, in_tmp / "s.pt")
    rk.main([*args, "killed"])
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")


def test_the_teachers_file_is_told_apart_by_every_setting_that_shaped_it():
    import inspect
    import re
    read = {name for function in (rk.train_teacher, rk.regulated_pass, rk.pass_state) for name in re.findall(r"settings\.(\w+)", inspect.getsource(function))}
    assert read | {"dataset", "precision"} <= set(rk.SIGNIFICANCE_SETTINGS), read - set(rk.SIGNIFICANCE_SETTINGS)


@pytest.mark.parametrize("flags, message", [
    (["--mode", "hybrid", "--plain-teacher"], "needs the counts"), (["--queue", "--reduction", "visited"], "no meaning with it"),
    (["--confidence-temperature", "0"], "must be above 0"), (["--mode", "all"], "choose from significance")])
def test_settings_that_make_no_sense_are_refused_before_the_folder_is_made(flags, message, teacher_file, in_tmp, capsys):
    with pytest.raises(SystemExit) as stop:
        rk.main([*tiny_args(rk, teacher_file), *flags])
    error = capsys.readouterr().err.replace("'", "")
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not (in_tmp / "runs").exists()


def test_without_images_it_is_refused(teacher_file, in_tmp, capsys):
    with pytest.raises(SystemExit) as stop:
        rk.main(["--teacher", str(teacher_file), "--dataset", "none", "--preset", "digits"])
    assert stop.value.code == 2 and "needs real images and labels" in capsys.readouterr().err


def test_what_it_saves_is_measured_against_plain_distillation(in_tmp, monkeypatch, capsys):
    teacher, _, data, _ = toy()
    monkeypatch.setattr(regulated_saving, "load_teacher", lambda *args: (teacher, data, "toy", ""))
    regulated_saving.main(["--dataset", "digits", "--epochs", "1", "--threads", "2", "--log", "log.jsonl"])
    rows = [json.loads(line) for line in (in_tmp / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["kd", "regulated", "regulated, queued", *(f"regulated, queued in {n}s" for n in (64, 32, 16))] and "of plain" in capsys.readouterr().out
    assert rows[0]["used"] == 1 and rows[0]["of_plain"] == 1 and all(0 < row["used"] <= 1 and row["seconds"] > 0 for row in rows)


def test_the_digits_pair_is_lenet5_and_presets_are_whole():
    settings = run.read_settings(["--dataset", "digits"], "regulated_kd", rk.__doc__, rk.PRESETS, rk.FLAGS, rk.TEXT_FLAGS, {"digits": ("lenet5", "lenet5_half")})
    assert (settings.teacher, settings.student) == ("lenet5", "lenet5_half")
    settings = run.read_settings(["--teacher", "alexnet", "--student", "alexnet_half"], "regulated_kd", rk.__doc__, rk.PRESETS, rk.FLAGS, rk.TEXT_FLAGS)
    assert settings.preset == "cifar10-alexnet-alexnet_half" and settings.queue
