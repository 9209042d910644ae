"""What holds for every method: who learns, what is left behind, what a run keeps, and that a kill changes nothing."""
import contextlib
import copy
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import sklearn.datasets
import torch
import torch.nn as nn
import torchvision

import common
from conftest import METHODS, ROOT, THREADS, TINY, real_images, tiny_args, tiny_networks, tiny_settings
from conftest import csd, deepinversion, rdskd, regulated_kd, surrogate_kd
from helpers import equal, refused, rows_of, weights_of

EACH = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
WITHOUT_LABELS = pytest.mark.parametrize("method", [method for method in METHODS if method is not regulated_kd],
                                         ids=lambda method: method.__name__)
# what a method makes once for all students of a teacher: its event in the log, its maker, the settings that shape it,
# and those that are read there without effect: weights of terms that need a student; a seed that is always 0
STAGES = {csd: ("bank", "synthesize_bank", "OF_BANK", {"csd", "adversarial"}),
          rdskd: ("generator", "train_generator", "OF_GENERATOR", set()),
          deepinversion: ("pool", "synthesize_pool", "OF_POOL", {"competition"}),
          regulated_kd: ("significance", "train_teacher", "OF_TEACHER", {"seed"}),
          surrogate_kd: ("pool", "balanced_pool", "OF_POOL", set())}
STAGED = pytest.mark.parametrize("method", STAGES, ids=lambda method: method.__name__)


def trained(method, teacher=None, student=None, **changes):
    """The student's weights after `distill` without a run."""
    usual_teacher, usual_student, data = tiny_networks()
    teacher, student, settings = teacher or usual_teacher, student or usual_student, tiny_settings(method, **changes)
    method.distill(teacher, student, data, settings, **real_images(method, teacher, data, settings))
    return weights_of(student)


def looks(network):
    """All that a pass could leave on a network, but its weights."""
    return {name: (module.training, len(module._forward_pre_hooks), len(module._forward_hooks),
                   "forward" in vars(module), [p.requires_grad for p in module.parameters(recurse=False)])
            for name, module in network.named_modules()}


# ------------------------------------------------------------------------------------------ distill, without a run
@EACH
def test_the_student_moves_and_all_else_is_as_it_was(method, in_tmp, capsys, monkeypatch):
    """The teacher bit by bit, the random stream, the disk, the screen; and every way to real data raises meanwhile."""
    teacher, student, data = tiny_networks()
    teacher.groups[0].eval()                                   # a mode and a flag that must come back
    teacher.conv1.weight.requires_grad_(False)
    settings = tiny_settings(method)
    images = real_images(method, teacher, data, settings)
    before = copy.deepcopy((weights_of(teacher), looks(teacher), weights_of(student), looks(student)))
    stream = torch.get_rng_state()

    def forbidden(*args, **more):
        raise AssertionError("distill asked for data")
    places = [(common, name) for name in ("load_dataset", "_read_torchvision", "_read_folder", "predict")]
    places += [(method, "load_dataset"), (sklearn.datasets, "load_digits")]
    for place, name in places + [(torchvision.datasets, name) for name in torchvision.datasets.__all__]:
        monkeypatch.setattr(place, name, forbidden, raising=False)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", forbidden)
    method.distill(teacher, student, data, settings, **images)
    assert equal(before[0], weights_of(teacher)) and before[1] == looks(teacher)
    assert all(p.grad is None for p in teacher.parameters()) and before[3] == looks(student)
    assert not any(torch.equal(before[2][name], value) for name, value in weights_of(student).items())
    assert torch.equal(stream, torch.get_rng_state())
    assert not list(in_tmp.iterdir()) and capsys.readouterr() == ("", "")


@EACH
def test_the_seed_of_the_settings_decides_and_no_other(method):
    results = []
    for seed, of_the_caller in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(of_the_caller)
        results.append(trained(method, seed=seed))
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@EACH
@pytest.mark.parametrize("whose", [0, 1], ids=["teacher", "student"])
def test_hooks_and_flags_are_back_after_an_exception(method, whose):
    """Raised in the first, second, middle and last forward pass of the network."""
    def calls_until(last):
        calls = []

        def stop(module, inputs):
            calls.append(module)
            if len(calls) == last:
                raise KeyError
        networks = tiny_networks()[:2]
        networks[whose].register_forward_pre_hook(stop)
        before, weights, stream = [looks(each) for each in networks], weights_of(networks[0]), torch.get_rng_state()
        with contextlib.suppress(KeyError):
            trained(method, *networks)
        if len(calls) == last:                                 # the student, which is trained, may be in another mode
            assert before[0] == looks(networks[0]) and equal(weights, weights_of(networks[0]))
            assert [v[1:] for v in before[1].values()] == [v[1:] for v in looks(networks[1]).values()]
            assert torch.equal(stream, torch.get_rng_state())
        return len(calls)
    total = calls_until(math.inf)
    for last in sorted({1, 2, total // 2, total}):
        assert calls_until(last) == last


@EACH
def test_a_loss_that_is_not_finite_stops_and_is_named(method):
    with pytest.raises(FloatingPointError, match=r"^loss\w* became (nan|inf)$"):
        trained(method, lr_student=math.inf)


@EACH
def test_networks_that_are_not_of_common(method):
    def foreign():
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(4),
                             nn.Flatten(), nn.Linear(32, 10))
    with common.seeded(0):
        teacher, student = foreign(), foreign()
    before = copy.deepcopy((weights_of(teacher), weights_of(student)))
    after = trained(method, teacher, student)
    assert equal(before[0], weights_of(teacher)) and not any(torch.equal(before[1][name], after[name]) for name in after)


# --------------------------------------------------------------------------------------------------- every setting
# The other value of a setting is twice as large, one more, another choice, or what stands here.
OTHER = dict(teacher_last_map="groups", student_last_map="groups", beta1=0.5, beta2=0.5, pool_batches=3, round_steps=4,
             student_steps=6, synthesis_batch_size=12, surrogate="leaves", magnitude=28, attacks=1, attack_iterations=1,
             attack_threshold=0.11, deeper_step=20.0, normalization="mean1", ramp_begin=0.5, ramp_end=1.0)
# What else has to be set, so that a setting matters.
RAMP = dict(epochs=4, adversarial_end=50.0)
ATTACK = dict(boundary_attack=True, attack_step=20.0, deeper_step=60.0, deeper_radius=30.0)
COMPANY = dict(
    fresh_head_optimizer=dict(epochs=3), l2_per_image=dict(l2=1.0),
    **dict.fromkeys(("adversarial_end", "ramp", "ramp_begin", "ramp_end"), RAMP),
    **dict.fromkeys(("alpha_epochs", "confidence", "confidence_temperature"), dict(alpha_epochs=0.2)),
    scan_batch_size=dict(queue=True), normalization=dict(mode="significance"),
    teacher_epochs=dict(mode="significance", optimizer="sgd"),
    **{name: ATTACK for name in ("attack_share", "attacks", "attack_target", "attack_step", "attack_radius",
                                 "attack_iterations", "attack_threshold", "deeper_step", "deeper_radius")})
UNSEEN = {"images_per_pass"}     # cuts a pass of networks in eval mode into parts: the same images, up to rounding


@EACH
def test_every_setting_changes_the_student(method, teacher_file):
    """In `distill`, or in the script where distill does not read it."""
    def other(field, value):
        if field.name in OTHER:
            return OTHER[field.name]
        if get_args(field.type):
            return next(choice for choice in get_args(field.type) if choice != value)
        return not value if field.type is bool else value + 1 if field.type is int else 2 * value or 0.5
    results, dead = {}, []

    def weights(by_script, changes):
        key = by_script, tuple(sorted(changes.items()))
        if key not in results and not by_script:
            results[key] = trained(method, sure(), **changes)
        elif key not in results:
            shutil.rmtree("run", ignore_errors=True)
            shutil.rmtree("checkpoints", ignore_errors=True)
            common.save_classifier(teacher_file, *saved)
            method.main([*tiny_args(method, teacher_file, **changes), "--out", "run"])
            results[key] = common.read_classifier("run/student.pt")["weights"]
        return results[key]

    def sure():
        teacher = tiny_networks()[0]
        with torch.no_grad():
            teacher.fc.weight.mul_(30)                         # answers that differ from image to image
        return teacher
    saved = sure(), "wrn10_1", tiny_networks()[2], "digits"
    for field in fields(method.Settings):
        company = COMPANY.get(field.name, {})
        changes = {**company, field.name: other(field, getattr(tiny_settings(method, **company), field.name))}
        if all(equal(weights(by_script, company), weights(by_script, changes)) for by_script in (False, True)):
            dead.append(field.name)
    assert set(dead) <= UNSEEN


# ------------------------------------------------------------------------------------------------------ by script
def files_of(folder):
    """{file: bytes} of all files below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@EACH
def test_a_run_leaves_what_it_promises(method, teacher_file, in_tmp, capsys):
    method.main([*tiny_args(method, teacher_file), "--out", "out"])
    rows, out = rows_of("out"), capsys.readouterr().out
    start, *epochs, end = [row for row in rows if row["event"] in ("start", "epoch", "end")]
    assert (rows[0], rows[-1], rows[-2]) == (start, end, epochs[-1]) and [row["epoch"] for row in epochs] == [0, 1]
    assert {"arguments", "changed", "versions", "device", "teacher_sha256", "teacher_acc"} <= set(start)
    assert start["arguments"]["epochs"] == 2 and start["arguments"]["preset"] == "digits"
    assert start["changed"] == {name: value for name, value in TINY[method].items()
                                if value != getattr(method.PRESETS["digits"], name)}
    for row in epochs:
        assert {"student_acc", "agreement", "teacher_queries", "seconds_distillation"} <= set(row)
        assert any(name.startswith("loss") and math.isfinite(value) for name, value in row.items())
    assert set(end) == {"event", "teacher_acc", "student_acc_last", "student_acc_best", "agreement", "ece", "seconds",
                        "peak_memory_mb", "teacher_queries"}
    assert 0 <= end["student_acc_last"] == epochs[-1]["student_acc"] <= end["student_acc_best"] <= 1
    assert end["seconds"] >= sum(v for row in rows for k, v in row.items() if k.startswith("seconds_")) - 0.05
    pictures = set() if method is regulated_kd else {"samples.png"}
    assert {path.name for path in Path("out").iterdir()} == {"log.jsonl", "student.pt", "checkpoint.pt"} | pictures
    if pictures:
        from PIL import Image
        width, height = Image.open("out/samples.png").size
        assert height > 10 * 40 and width > 8 * 40                               # a row a class, eight images in it
    assert "test accuracy" in out and "chosen on the test set" in out and max(map(len, out.splitlines())) < 330
    method.main([*tiny_args(method, Path("out/student.pt")), "--out", "next"])  # the student teaches
    assert rows_of("next")[0]["teacher_acc"] == end["student_acc_last"]


@WITHOUT_LABELS
def test_scores_change_nothing(method, teacher_file, in_tmp):
    """Every epoch, every second one, never: the same student, bit by bit. The last epoch is always scored."""
    args = tiny_args(method, teacher_file, epochs=3)
    method.main([*args, "--out", "every"])
    method.main([*args, "--eval-every", "2", "--out", "second"])
    method.main([*args, "--dataset", "none", "--out", "never"])
    for folder, scored in (("every", [True] * 3), ("second", [False, True, True]), ("never", [False] * 3)):
        rows = rows_of(folder)
        assert [row["student_acc"] is not None for row in rows if row["event"] == "epoch"] == scored
        assert (rows[-1]["ece"] is not None) == (rows[0]["teacher_acc"] is not None) == any(scored)
        assert equal(*(common.read_classifier(f"{name}/student.pt")["weights"] for name in ("every", folder)))


@EACH
def test_teacher_queries_are_the_images_that_the_teacher_was_asked_about(method, in_tmp, monkeypatch):
    """Counted here by the class of the teacher, of which there is a single one that is asked."""
    data, asked, forward = common.DATASETS["digits"], [], common.LeNet5.forward
    with common.seeded(0):
        common.save_classifier("toy.pt", common.build_model("lenet5_bn", 10, data.image_shape), "lenet5_bn", data, "digits")
    monkeypatch.setattr(common.LeNet5, "forward", lambda self, x: asked.append(
        (id(self), 0 if common._scoring else len(x))) or forward(self, x))
    method.main([*tiny_args(method, "./toy.pt"), "--out", "out"])
    assert rows_of("out")[-1]["teacher_queries"] == sum(number for who, number in asked if who == asked[0][0]) > 0


@EACH
def test_bf16_stays_close_to_fp32(method, teacher_file, in_tmp):
    for precision in ("fp32", "bf16"):
        for stage in Path("checkpoints").glob("toy.*.pt"):     # made for the other precision: it would be refused
            stage.unlink()
        method.main([*tiny_args(method, teacher_file, epochs=1), "--precision", precision, "--out", precision])
    one, other = (next(row for row in rows_of(name) if row["event"] == "epoch") for name in ("fp32", "bf16"))
    losses = [name for name in one if name.startswith("loss")]
    assert any(one[name] != other[name] for name in losses)
    for name in losses:
        assert other[name] == pytest.approx(one[name], rel=0.15, abs=0.1), name


# ----------------------------------------------------------------------------------------------- killed, resumed
class Killed(BaseException):
    """Caught by nothing, as a kill is not."""


@contextlib.contextmanager
def killed(moment):
    """Inside, the process dies: 'before save N' of this session, 'after save N', or 'before the end'."""
    save, write, saves = common.Checkpoint.save, common.Run.write, []

    def save_or_die(self, *args):
        saves.append(1)
        if moment == f"before save {len(saves)}":
            raise Killed
        save(self, *args)
        if moment == f"after save {len(saves)}":
            raise Killed

    def write_or_die(self, row):
        if moment == "before the end" and row["event"] == "end":
            raise Killed
        write(self, row)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Checkpoint, "save", save_or_die)
        patch.setattr(common.Run, "write", write_or_die)
        yield


def cleaned(value):
    """Without what differs from one sitting to the next: times, memory, and whether a stage was made or read."""
    if isinstance(value, dict):
        return {key: cleaned(each) for key, each in value.items()
                if not str(key).startswith(("seconds", "peak_memory"))}
    if isinstance(value, (list, tuple)):
        return [cleaned(each) for each in value if not (isinstance(each, dict) and each.get("event") == "resume")]
    if torch.is_tensor(value):
        return value.dtype, value.shape, value.flatten().tolist()
    return value.replace(" from ", " -> ") if isinstance(value, str) else value


def results_in(folder):
    """All that runs left in a folder, so that == compares it bit by bit."""
    found = {}
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
        else:
            content = rows_of(path.parent) if path.suffix == ".jsonl" else path.read_bytes()
        found[str(path.relative_to(folder))] = cleaned(content)
    return found


def assert_same_results(one, other):
    one, other = results_in(one), results_in(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name] == other[name], name


@EACH
@pytest.mark.parametrize("moment", ["before save 2", "after save 1"])
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_was_not(method, moment, teacher_file, monkeypatch):
    """Each session gets one epoch or one round of a stage further, then dies; the last but one dies at the very end."""
    args = [*tiny_args(method, teacher_file, epochs=3), "--out", "run", "--resume"]
    for folder in ("straight", "killed"):
        (teacher_file.parent / folder).mkdir()
    monkeypatch.chdir(teacher_file.parent / "straight")
    method.main(args)
    rows = rows_of("run")
    saves = sum(row["event"] == "epoch" or "round" in row for row in rows if row["event"] != "collapse")
    monkeypatch.chdir(teacher_file.parent / "killed")
    with killed("before save 1"):
        method.main(args)
    for _ in range(saves - (moment == "before save 2")):
        with killed(moment):
            method.main(args)
        (Path("run") / f".checkpoint.pt.{os.getpid()}0.tmp").write_bytes(b"half")       # of a write that was cut off
    with killed("before the end"):
        method.main(args)
    method.main(args)
    assert "resume" in [row["event"] for row in rows_of("run")]
    assert_same_results("../straight", ".")


@EACH
def test_resume_refuses_other_settings_by_name_and_a_run_that_is_finished(method, teacher_file, in_tmp, capsys):
    args = [*tiny_args(method, teacher_file), "--out", "out"]
    method.main(args)
    before = files_of(".")
    for more, message in (([], "out holds a run already"), (["--resume"], "the run in out is finished")):
        assert message in refused(method, [*args, *more], capsys) and files_of(".") == before
    shutil.rmtree("out")
    with killed("after save 1"):                               # its stage is read from the file of the run before
        method.main(args)
    before, whole = files_of("."), teacher_file.read_bytes()
    for flag, value in (("--epochs", 5), ("--seed", 1), ("--batch-size", 7), ("--student", "wrn16_1"), ("--eval-every", 2),
                        ("--threads", THREADS + 1), ("--precision", "bf16")):
        error = refused(method, [*args, "--resume", flag, str(value)], capsys)
        assert f" {flag[2:].replace('-', '_')} = " in error and files_of(".") == before
    content = torch.load(teacher_file, weights_only=True)
    content["weights"]["fc.bias"] += 1
    torch.save(content, teacher_file)
    assert " teacher = " in refused(method, [*args, "--resume"], capsys)
    teacher_file.write_bytes(whole)
    method.main([*args, "--resume"])
    assert rows_of("out")[-1]["event"] == "end"


@STAGED
def test_a_stage_is_made_once_counted_in_every_run_and_never_replaced(method, teacher_file, in_tmp, capsys):
    args, event = tiny_args(method, teacher_file), STAGES[method][0]
    method.main([*args, "--out", "one"])
    stage, = (path for path in Path("checkpoints").iterdir() if path.name != "toy.pt")
    made = stage.read_bytes()
    method.main([*args, "--out", "two"])
    method.main([*args, "--out", "other", "--student", "wrn16_1"])
    assert f"{event} from {stage}" in capsys.readouterr().out and stage.read_bytes() == made
    one, two = rows_of("one"), rows_of("two")
    assert cleaned(one[1:]) == cleaned(two[1:]) and cleaned(one[-1])["teacher_queries"] > 0
    assert two[-1]["seconds"] >= sum(v for row in two for k, v in row.items() if k.startswith("seconds_")) - 0.05
    assert equal(*(common.read_classifier(f"{name}/student.pt")["weights"] for name in ("one", "two")))
    before = files_of(".")
    other = next(name for name in getattr(method, STAGES[method][2]) if name in TINY[method])
    for damage in (made[:999], b"", b"no file of torch\n"):
        stage.write_bytes(damage)
        assert f"{stage} is not a readable {event}" in refused(method, args, capsys) and stage.read_bytes() == damage
    stage.write_bytes(made)
    flags = ["--" + other.replace("_", "-"), str(2 * TINY[method][other])]
    assert f" {other} = {TINY[method][other]}" in refused(method, [*args, *flags], capsys)
    assert files_of(".") == before
    method.main([*args, *flags, f"--{event}", "mine.pt", "--out", "three"])
    assert Path("mine.pt").exists() and stage.read_bytes() == made
    content = torch.load(teacher_file, weights_only=True)
    content["weights"]["fc.bias"] += 1
    torch.save(content, teacher_file)
    assert " teacher = " in refused(method, args, capsys) and stage.read_bytes() == made


def shifted(value):
    """The same with 1 added to every tensor."""
    if isinstance(value, dict):
        return {key: shifted(each) for key, each in value.items()}
    return value + 1 if torch.is_tensor(value) else type(value)(map(shifted, value))


@STAGED
def test_a_stage_of_other_settings_half_made_or_replaced_meanwhile_is_refused(method, teacher_file, in_tmp, capsys):
    args, (event, _, names, _) = [*tiny_args(method, teacher_file), "--out", "out", "--resume"], STAGES[method]
    with killed("after save 1"):
        method.main(args)
    name = next(name for name in getattr(method, names) if name in TINY[method])
    flags = ["--" + name.replace("_", "-"), str(2 * TINY[method][name])]
    assert f" {name} = {TINY[method][name]}" in refused(method, [*args, *flags], capsys)
    method.main(args)
    shutil.rmtree("out")
    with killed("after save 1"):                               # an epoch: the stage is read from its file
        method.main(args)
    stage, = (path for path in Path("checkpoints").iterdir() if path.name != "toy.pt")
    content = torch.load(stage, weights_only=True)
    torch.save(dict(content, result=shifted(content["result"])), stage)
    before = files_of(".")
    assert f" {event} = " in refused(method, args, capsys) and files_of(".") == before


@STAGED
def test_a_stages_file_is_told_apart_by_every_setting_that_shaped_it(method):
    read = set()

    class Watched:
        def __getattr__(self, name):
            read.add(name)
            return getattr(settings, name)
    _, maker, names, unused = STAGES[method]
    teacher, _, data = tiny_networks()
    for queue in (False, True):
        settings = tiny_settings(method, **(dict(queue=queue) if method is regulated_kd else {}))
        more = {}
        if method is regulated_kd:
            more = dict(train=real_images(method, teacher, data, settings)["train"])
        if method is surrogate_kd:
            more = dict(draw=lambda start, n: method.procedural_pixels(settings.surrogate, n, data, Watched(), "cpu"))
        getattr(method, maker)(teacher, data, Watched(), **more)
    assert len(read) > 3 and read - unused <= set(getattr(method, names))


@pytest.mark.slow
@EACH
def test_sigkill_at_random_moments(method, teacher_file, in_tmp):
    """Real processes and signals: whatever the moment, the run that is continued ends like the straight one."""
    command = [sys.executable, str(ROOT / f"{method.__name__}.py"), *tiny_args(method, teacher_file, epochs=12),
               "--out", "run", "--resume"]

    def begun(folder):
        process = subprocess.Popen(command, cwd=in_tmp / folder, stdout=subprocess.PIPE, text=True)
        while not process.stdout.readline().startswith("teacher ") and process.poll() is None:
            pass
        return process, time.monotonic()
    for folder in ("straight", "killed"):
        (in_tmp / folder).mkdir()
    process, since = begun("straight")
    process.communicate()
    whole, kills, wait = time.monotonic() - since, 0, random.Random(method.__name__).uniform
    for _ in range(4):
        process, _ = begun("killed")
        time.sleep(wait(0, 0.3) * whole)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    if '"event": "end"' not in (in_tmp / "killed" / "run" / "log.jsonl").read_text():
        subprocess.run(command, cwd=in_tmp / "killed", check=True, capture_output=True)
    assert_same_results(in_tmp / "straight", in_tmp / "killed")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EACH
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu(method, precision, teacher_file, monkeypatch):
    """Killed and resumed with --deterministic as on a CPU; the GPU's random stream is the caller's again afterwards."""
    args = [*tiny_args(method, teacher_file), "--device", "cuda", "--precision", precision, "--deterministic",
            "--out", "run", "--resume"]
    stream = torch.cuda.get_rng_state()
    for folder in ("straight", "killed"):
        (teacher_file.parent / folder).mkdir()
        monkeypatch.chdir(teacher_file.parent / folder)
        if folder == "killed":
            with killed("after save 1"):
                method.main(args)
        method.main(args)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(stream, torch.cuda.get_rng_state())
    assert_same_results("../straight", ".")
