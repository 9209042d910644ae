"""distill of dafl.py, rdskd.py and zskd.py on tiny networks: who learns, who must not, what is left behind; their scripts."""
import inspect
import json
import math
import re

import pytest
import torch

import common
import csd
import dafl
import models
import rdskd
import run
import zskd
from conftest import tiny_args, tiny_networks, tiny_settings
from test_csd_method import ForeignTeacher, Recorder, same, weights_of
from test_scripts import Killed, assert_same_run, kill_at, rows_of

METHODS = [dafl, rdskd, zskd]
EACH = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
GENERATORS = pytest.mark.parametrize("method", [dafl, rdskd], ids=lambda method: method.__name__)


def trained(method, look=None, teacher=None, **changes):
    """-> student's weights, what distill returned, the recorder"""
    found, student, data = tiny_networks()
    recorder, settings, teacher, first = Recorder(look), tiny_settings(method, **changes), teacher or found, {}
    if method is rdskd:                                        # phase 1 under the same recorder
        first = {"generator": rdskd.train_generator(teacher, data, settings, recorder)}
    result = method.distill(teacher, student, data, settings, recorder, **first)
    return weights_of(student), result, recorder


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


@EACH
def test_distill_trains_the_student_and_leaves_the_teacher_as_it_was(method):
    teacher, student, data = tiny_networks()
    teacher.train()                                            # also its mode must come back
    next(teacher.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in teacher.parameters()]
    teacher_before, student_before, recorder = weights_of(teacher), weights_of(student), Recorder()
    method.distill(teacher, student, data, tiny_settings(method), recorder)
    assert same(teacher_before, teacher) and teacher.training and [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters()) and not same(student_before, student) and student.training
    for network in (teacher, student):
        assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in network.modules())
    assert [row["epoch"] for row in recorder.rows if "loss_kd" in row] == [0, 1]
    assert recorder.state["student_steps"] == 6
    expected = {dafl: (48, 48), rdskd: (48, 48), zskd: (20, 2 * 20 + 2 * 20)}[method]
    assert (recorder.state["images_synthesized"], recorder.state["teacher_queries"]) == (expected[0], expected[1] + 48 * (method is rdskd))


@EACH
def test_distill_is_a_function_of_its_seed_and_draws_from_no_global_stream(method):
    results = []
    for seed, disturb in ((0, 0), (0, 1234), (1, 0)):
        torch.manual_seed(disturb)
        before = torch.get_rng_state()
        results.append(trained(method, seed=seed)[0])
        assert torch.equal(before, torch.get_rng_state())
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@EACH
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_teacher_that_is_not_from_common(method, batch_norm):
    before = weights_of(tiny_networks()[1])
    student, _, recorder = trained(method, teacher=ForeignTeacher(batch_norm))
    assert not equal(before, student) and all(math.isfinite(recorder.rows[-1][key]) for key in recorder.rows[-1] if "loss" in key)


@EACH
def test_distill_sees_no_data(method, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("distill asked for data")
    for name in ("load_dataset", "_read_torchvision", "_read_folder", "predict"):
        monkeypatch.setattr(common, name, forbidden)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", forbidden)
    trained(method)


@EACH
@pytest.mark.parametrize("when", ["synthesis_step", "distillation_step"])
def test_hooks_and_flags_are_back_after_an_exception(method, when):
    if method is dafl and when == "synthesis_step":
        pytest.skip("dafl has one loop")

    def stop(state):
        if state.get(when) == 2:
            raise KeyError
    teacher, student, data = tiny_networks()
    before, settings, networks, more = weights_of(teacher), tiny_settings(method), [teacher, student], {}
    if method is rdskd and when == "distillation_step":
        more = {"generator": rdskd.train_generator(teacher, data, settings)}
        networks.append(more["generator"])
    with pytest.raises(KeyError):
        if method is rdskd and when == "synthesis_step":
            rdskd.train_generator(teacher, data, settings, Recorder(stop))
        method.distill(teacher, student, data, settings, Recorder(stop), **more)
    for network in networks:
        assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in network.modules())
        assert all(p.requires_grad for p in network.parameters())
    assert same(before, teacher) and all(network.training for network in networks)


@GENERATORS
def test_a_generators_loss_that_is_not_finite_is_named_too(method):
    with pytest.raises(FloatingPointError, match="loss_oh became"):
        trained(method, lr_generator=float("inf"))


@EACH
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(method):
    with pytest.raises(FloatingPointError, match="loss_kd became"):
        trained(method, lr_student=float("inf"))


@EACH
def test_the_student_learns_from_this_teacher_and_not_from_itself(method):
    """Replace the teacher's answers by one class: the student's bias follows."""
    teacher = tiny_networks()[0]
    with torch.no_grad():
        teacher.fc.weight.zero_(), teacher.fc.bias.copy_(10 * torch.eye(10)[3])
    teacher.fc.weight.data += 1e-9 * torch.randn(10, len(teacher.fc.weight[0]), generator=torch.Generator().manual_seed(0))
    student, _, _ = trained(method, teacher=teacher, epochs=4, student_steps=10, lr_student=0.05)
    assert student["fc.bias"].argmax() == 3


def test_dafl_the_generator_never_sees_the_student_and_the_other_way_round():
    """Another student, another rate, no student's step at all: the generator ends with the same weights."""
    slow = weights_of(trained(dafl, lr_student=1e-12)[1])
    assert equal(slow, weights_of(trained(dafl, lr_student=0.1)[1]))
    # and the student's first step is the same whatever the generator's loss is: it learns on the images made before that step
    first = []
    for changes in ({}, dict(oh=0.0, ie=0.0, act=0.0), dict(lr_generator=0.5)):
        weights = []
        trained(dafl, lambda state: weights.append(weights_of(state["student"])), **changes)
        first.append(weights)
    assert equal(first[0][0], first[1][0]) and equal(first[0][0], first[2][0]) and not equal(first[0][1], first[2][1])


def test_dafl_separate_batches_come_from_the_updated_generator():
    weights = []
    for lr_generator in (1e-3, 0.5):
        seen = []
        _, _, recorder = trained(dafl, lambda state: seen.append(weights_of(state["student"])), separate_batches=True, lr_generator=lr_generator)
        weights.append(seen)
        assert recorder.state["teacher_queries"] == 2 * recorder.state["images_synthesized"]
    assert not equal(weights[0][0], weights[1][0])


@pytest.mark.parametrize("changes", [dict(oh=0.0), dict(ie=0.0), dict(act=0.0), dict(natural_log=True), dict(sum_activation=True),
                                     dict(warmup=0.9), dict(generator_weight_decay=0.5)], ids=str)
def test_dafl_every_term_and_reading_reaches_the_generator(changes):
    assert not equal(weights_of(trained(dafl)[1]), weights_of(trained(dafl, **changes)[1]))


@pytest.mark.parametrize("changes", [dict(temperature=4.0), dict(student_optimizer="adam"), dict(weight_decay=0.1), dict(schedule="constant")], ids=str)
def test_dafl_every_setting_of_the_student_reaches_it(changes):
    assert not equal(trained(dafl)[0], trained(dafl, **changes)[0])


@pytest.mark.parametrize("changes", [dict(temperature=4.0), dict(student_optimizer="adam"), dict(weight_decay=0.1), dict(schedule="constant"),
                                     dict(lr_student=0.01)], ids=str)
def test_rdskd_every_setting_of_the_student_reaches_it(changes):
    assert not equal(trained(rdskd)[0], trained(rdskd, **changes)[0])


@GENERATORS
@pytest.mark.parametrize("schedule", ["constant", "steps", "cosine"])
def test_the_rate_that_each_step_takes_is_the_schedules(method, schedule):
    rates, modes, epochs = [], [], 5

    def look(state):
        if "generator_optimizer" in state:
            modes.append(state["generator"].training)
        if "student" in state:
            groups = [state[name].param_groups[0]["lr"] for name in ("optimizer", "generator_optimizer") if name in state]
            rates.append((state["epoch"], state["distillation_step"] - 1, *groups))
    more = dict(warmup=0.4) if method is dafl else {}
    trained(method, look, epochs=epochs, schedule=schedule, lr_student=0.1, lr_generator=1e-3, **more)
    assert len(rates) == 15 and modes and all(modes)           # the generator trains in train mode
    for epoch, step, rate, *of_generator in rates:
        warm = min(1, (3 * epoch + step + 1) / 6) if method is dafl else 1
        assert rate == pytest.approx(warm * method.learning_rate(0.1, schedule, epoch / epochs))
        assert not of_generator or of_generator[0] == pytest.approx(warm * 1e-3)


@pytest.mark.parametrize("changes", [dict(oh=0.0), dict(ie=0.0), dict(diversity="none"), dict(diversity="ms"), dict(penalty="fixed"),
                                     dict(diversity_weight=3.0), dict(reference="previous"), dict(lr_generator=0.01)], ids=str)
def test_rdskd_every_term_and_reading_reaches_the_generator(changes):
    assert not equal(weights_of(trained(rdskd)[1]), weights_of(trained(rdskd, **changes)[1]))


@pytest.mark.parametrize("method, weight, term", [
    (dafl, "oh", "loss_oh"), (dafl, "ie", "loss_ie"), (dafl, "act", "loss_act"),
    (rdskd, "oh", "loss_oh"), (rdskd, "ie", "loss_ie"), (rdskd, "diversity_weight", "loss_diversity")])
def test_a_generators_term_alone_falls(method, weight, term):
    """Its sign in distill's sum: the mean of the last epoch is under that of the first."""
    teacher = tiny_networks()[0]
    with torch.no_grad():
        teacher.fc.weight.mul_(30)                             # answers that are far from uniform
    weights = {"oh": 0.0, "ie": 0.0, **({"act": 0.0} if method is dafl else {"diversity_weight": 0.0, "penalty": "fixed"}), weight: 1.0}
    length = dict(student_steps=30, batch_size=32) if method is dafl else dict(generator_steps=30, synthesis_batch_size=32, generator_epochs=2)
    _, _, recorder = trained(method, teacher=teacher, lr_generator=1e-2, **weights, **length)
    first, *_, last = [row[term] for row in recorder.rows if term in row]
    assert last < first


def test_rdskd_phase_2_leaves_the_generator_alone_and_runs_it_in_eval_mode():
    teacher, student, data = tiny_networks()
    generator = rdskd.train_generator(teacher, data, tiny_settings(rdskd))
    before, modes = weights_of(generator), []
    generator.zero_grad()
    returned = rdskd.distill(teacher, student, data, tiny_settings(rdskd), Recorder(lambda state: modes.append(generator.training)), generator)
    assert returned is generator and same(before, generator) and modes == [False] * 6 and generator.training
    assert all(p.grad is None for p in generator.parameters())


def test_rdskd_references_change_after_the_second_step_of_every_epoch_and_at_no_other():
    teacher, _, data = tiny_networks()
    seen, losses, certain = [], [], []
    entropy, one_hot = rdskd.information_entropy_loss, rdskd.one_hot_loss

    def look(state):
        seen.append((state["epoch"], state["synthesis_step"], state["reference_oh"].item(), state["reference_ie"].item()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rdskd, "information_entropy_loss", lambda logits: losses.append(entropy(logits)) or losses[-1])
        patch.setattr(rdskd, "one_hot_loss", lambda logits: certain.append(one_hot(logits)) or certain[-1])
        rdskd.train_generator(teacher, data, tiny_settings(rdskd, generator_epochs=4, generator_steps=5), Recorder(look))
    assert seen[0][2:] == (0, 0) and len(seen) == 20
    changed = [now[:2] for before, now in zip([(0, 0, 0.0, 0.0), *seen], seen) if now[2:] != before[2:]]
    assert changed == [(epoch, 2) for epoch in range(4)]       # the counter after the second step, i = 1
    for epoch in range(4):
        assert seen[5 * epoch + 1][2:] == (certain[5 * epoch + 1].item(), losses[5 * epoch + 1].item())     # of that step, before its update


def test_rdskd_phases_draw_from_different_streams():
    drawn, randn = [], torch.randn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, **kw: drawn.append(randn(*size, **kw)) or drawn[-1])
        trained(rdskd)
        trained(rdskd, seed=1)
    latents = [z for z in drawn if z.shape == (8, 6)]
    assert len(latents) == 24 and len({tuple(z.flatten().tolist()) for z in latents}) == 24


@GENERATORS
def test_a_collapsed_generator_is_named_and_the_run_goes_on(method, monkeypatch):
    forward = method.Generator.forward
    monkeypatch.setattr(method.Generator, "forward", lambda self, z: 0.1 + 0 * forward(self, z))
    _, _, recorder = trained(method)
    events = [row for row in recorder.rows if row.get("event") == "collapse"]
    assert len(events) == (2 if method is dafl else 4)
    assert "hardly differ" in events[0]["text"] and "whole batch in class" in events[0]["text"] and recorder.rows[-1]["epoch"] == 1


@GENERATORS
def test_low_entropy_for_long_is_named_and_a_recovery_ends_it(method, monkeypatch):
    streaks, low = [], [True]
    entropy = method.information_entropy_loss
    monkeypatch.setattr(method, "information_entropy_loss", lambda *args: entropy(*args) * (0.01 if low[0] else 1) - (0 if low[0] else 5))

    def look(state):
        if "low_entropy_steps" in state:
            streaks.append(state["low_entropy_steps"].item())
            low[0] = len(streaks) < 60
    trained(method, look, **({"student_steps": 59, "epochs": 2} if method is dafl else {"generator_steps": 59}))
    assert streaks[:60] == list(range(1, 61)) and streaks[60] == 0
    rows = trained(method, **({"student_steps": 59} if method is dafl else {"generator_steps": 59}))[2].rows
    assert not [row for row in rows if row.get("event") == "collapse" and "entropy" in row["text"]]
    low[0] = True
    rows = trained(method, **({"student_steps": 59, "epochs": 1} if method is dafl else {"generator_steps": 59, "generator_epochs": 1}))[2].rows
    assert any("entropy of its classes is under half of the largest for 59 steps" in row.get("text", "") for row in rows)


def test_zskd_impressions_move_towards_their_targets():
    teacher, student, data = tiny_networks()
    losses = []
    for synthesis_steps in (1, 40):
        recorder = Recorder()
        zskd.distill(teacher, student, data, tiny_settings(zskd, synthesis_steps=synthesis_steps, epochs=1, temperature=1.0), recorder)
        losses.append(recorder.rows[-1]["loss_ce"])
        pixels = recorder.state["pixels"]
        assert pixels.shape == (20, 1, 8, 8) and pixels.min() >= 0 and pixels.max() <= 1
    assert losses[1] < losses[0]


def test_zskd_augmentation_moves_pixels_and_strength_0_moves_none():
    pixels, rng = torch.rand(3, 1, 8, 8), torch.Generator().manual_seed(0)
    assert torch.allclose(zskd.moved(pixels, rng, 0.0), pixels, atol=1e-6)
    assert (zskd.moved(pixels, rng, 1.0) - pixels).abs().mean() > 0.05


# --------------------------------------------------------------------------------------------------------------- scripts
@EACH
def test_a_run_leaves_what_it_promises(method, teacher_file, in_tmp, capsys):
    method.main([*tiny_args(method, teacher_file), "--out", "out"])
    rows = rows_of(in_tmp / "out", without_seconds=False)
    stages = ["generator"] * 2 if method is rdskd else []
    assert [row["event"] for row in rows if row["event"] != "collapse"] == ["start", *stages, "epoch", "epoch", "end"]
    assert {"student_acc", "agreement", "seconds_distillation", "seconds_evaluation", "images_synthesized", "student_steps",
            "teacher_queries", "loss_kd", "pixel_std"} <= set(rows[-2])
    assert {path.name for path in (in_tmp / "out").iterdir()} == {"log.jsonl", "samples.png", "student.pt", "checkpoint.pt"}
    assert "test accuracy" in capsys.readouterr().out and run.read_classifier("out/student.pt")["test_acc"] == rows[-1]["student_acc_last"]


TICKS = {dafl: 6, rdskd: 12, zskd: 10}


@EACH
@pytest.mark.parametrize("which", ["first", "third", "middle", "last", "end", "every"])
def test_a_killed_run_ends_like_one_that_was_not(method, which, teacher_file, in_tmp, monkeypatch):
    ticks = TICKS[method]
    saves = {"first": [1], "third": [3], "middle": [ticks // 2], "last": [ticks], "end": [ticks + 1],
             "every": list(range(1, ticks + 2))}[which]

    def args(folder):
        text = ["--generator", f"{folder}.pt"] if method is rdskd else []
        return [*tiny_args(method, teacher_file), *text, "--out", folder, "--resume"]
    method.main(args("straight"))
    kill_at(monkeypatch, saves)
    for _ in saves:
        with pytest.raises(Killed):
            method.main(args("killed"))                        # with no checkpoint yet it starts from the beginning
    method.main(args("killed"))
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    if method is rdskd:
        one, other = (torch.load(in_tmp / f"{name}.pt", weights_only=True)["result"]["weights"] for name in ("straight", "killed"))
        assert equal(one, other)


def test_rdskd_a_generator_is_kept_reused_and_never_overwritten(teacher_file, in_tmp, capsys):
    args = tiny_args(rdskd, teacher_file)
    rdskd.main(args)
    kept = in_tmp / "checkpoints" / "toy.rdskd-ds-exp-seed0.pt"
    before = kept.read_bytes()
    rdskd.main([*args, "--student", "wrn16_1", "--temperature", "4"])          # another student, another phase 2
    assert kept.read_bytes() == before and "trained generator from" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        rdskd.main([*args, "--generator-epochs", "3"])
    assert stop.value.code == 2 and "generator_epochs = 2" in capsys.readouterr().err and kept.read_bytes() == before
    rdskd.main([*args, "--diversity", "ms", "--penalty", "fixed"])             # another kind lies beside it
    assert {path.name for path in kept.parent.iterdir()} == {"toy.pt", kept.name, "toy.rdskd-ms-fixed-seed0.pt"}
    rdskd.main(args)                                           # the reused run equals the one that made the generator
    assert_same_run(in_tmp / "runs" / "rdskd-digits-001", in_tmp / "runs" / "rdskd-digits-004")


def test_rdskd_resume_goes_on_with_the_generator_it_began_with(teacher_file, in_tmp, monkeypatch):
    """Also when the file of phase 1 was put there anew meanwhile."""
    args = [*tiny_args(rdskd, teacher_file), "--generator", "g.pt", "--resume", "--out"]
    rdskd.main([*args, "straight"])
    kill_at(monkeypatch, [2])
    with pytest.raises(Killed):
        rdskd.main([*args, "killed"])
    content = torch.load(in_tmp / "g.pt", weights_only=True)
    content["result"]["weights"]["layers.0.weight"] += 1
    torch.save(content, in_tmp / "g.pt")
    rdskd.main([*args, "killed"])
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")


@pytest.mark.parametrize("method, build, listed", [
    (rdskd, ["train_generator"], "GENERATOR_SETTINGS"), (csd, ["synthesize_bank", "synthesize", "synthesis_state"], "BANK_SETTINGS")])
def test_a_stages_file_is_told_apart_by_every_setting_that_shaped_it(method, build, listed):
    read = {name for function in build for name in re.findall(r"settings\.(\w+)", inspect.getsource(getattr(method, function)))}
    assert read - {"csd", "adversarial"} <= set(getattr(method, listed)), read      # those two weights are of stage 2


@pytest.mark.parametrize("method", [csd, *METHODS], ids=lambda method: method.__name__)
def test_every_preset_holds_choices_and_types_that_its_flags_accept(method):
    for name, text in method.FLAGS.items():
        values = [preset[name] for preset in method.PRESETS.values()]
        assert len({type(value) for value in values}) == 1, name
        assert isinstance(text, tuple) == isinstance(values[0], str) and (isinstance(text, str) or set(values) <= set(text[1])), name


@pytest.mark.parametrize("method, flags, message", [
    (rdskd, ["--synthesis-batch-size", "7"], "must be even"), (dafl, ["--warmup", "1"], "under 1"), (zskd, ["--impressions", "3"], "at least one a class")])
def test_numbers_that_make_no_sense_are_refused_before_the_folder_is_made(method, flags, message, teacher_file, in_tmp, capsys):
    with pytest.raises(SystemExit) as stop:
        method.main([*tiny_args(method, teacher_file), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not (in_tmp / "runs").exists()


@pytest.mark.parametrize("flags, message", [(["--diversity", "lots"], "choose from ds, ms, none"), (["--penalty", "2"], "choose from exp, fixed"),
                                            (["--channels", "3"], "unrecognized arguments: --channels 3")])
def test_words_that_are_no_choice_are_refused(flags, message, teacher_file, capsys):
    with pytest.raises(SystemExit) as stop:
        rdskd.main([*tiny_args(rdskd, teacher_file), *flags])
    error = capsys.readouterr().err.replace("'", "")
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@GENERATORS
def test_images_that_the_generator_cannot_make_are_refused_before_any_work(method, in_tmp, capsys):
    data = common.DataSpec((1, 10, 10), 3, (0.5,), (0.5,))
    run.save_classifier(in_tmp / "odd.pt", models.build_model("wrn10_1", 3, data.image_shape), "wrn10_1", data, "folder:x")
    with pytest.raises(SystemExit) as stop:
        method.main(["--teacher", "./odd.pt", "--student", "wrn10_1", "--dataset", "none", "--preset", "digits"])
    assert stop.value.code == 2 and "multiples of 4, not 10x10" in capsys.readouterr().err and not (in_tmp / "runs").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EACH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distill_on_a_gpu(method, precision):
    teacher, student, data = tiny_networks()
    before = weights_of(student)
    method.distill(teacher.cuda(), student.cuda(), data, tiny_settings(method, precision=precision))
    assert not same(before, student.cpu())


@EACH
def test_bf16_stays_close_to_fp32(method):
    found = [trained(method, epochs=1, precision=precision) for precision in ("fp32", "bf16")]
    assert not equal(found[0][0], found[1][0])
    rows = [recorder.rows[-1] for _, _, recorder in found]
    for key, value in rows[0].items():
        if key.startswith("loss_"):
            assert rows[1][key] == pytest.approx(value, rel=0.15, abs=0.1), key


class NoModuleAtItsEnd(ForeignTeacher):
    """Its last linear layer is applied as a function, as some attention blocks do it."""
    def forward(self, x):
        return torch.nn.functional.linear(self.pool(self.body(x)).flatten(1), self.out.weight, self.out.bias)


def test_dafl_a_teacher_whose_features_cannot_be_seen_is_refused_in_words():
    with pytest.raises(common.BadInput, match="NoModuleAtItsEnd is never called as a module"):
        trained(dafl, teacher=NoModuleAtItsEnd())


def test_logs_are_json(teacher_file, in_tmp):
    dafl.main([*tiny_args(dafl, teacher_file), "--out", "out"])
    assert all(json.loads(line) for line in (in_tmp / "out" / "log.jsonl").read_text().splitlines())
