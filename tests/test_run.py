"""common.py, rooms 6 and 7: files that are whole at every moment, teachers, flags, run folders, refusals in a sentence."""
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torchvision
from PIL import Image

import common
from common import BadInput
from conftest import METHODS, THREADS, csd, cudfkd, dafl, deepinversion, regulated_kd, surrogate_kd
from conftest import tiny_args, tiny_networks
from helpers import equal, refused, rows_of, save_untrained
from test_methods import Killed, files_of, killed

DIGITS, CPU = common.DATASETS["digits"], torch.device("cpu")


# --------------------------------------------------------------------------------------------------- files, checkpoints
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    common.write({"a": 1}, path)

    def disk_full(*args):
        raise OSError("disk full")
    for place, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(place, name, disk_full)
            common.write({"a": 2}, path, torch.save)
        assert torch.load(path) == {"a": 1} and [each.name for each in tmp_path.iterdir()] == ["file.pt"]


class Anything:
    """A pickle of this would run code where torch.load lets it."""


def damages(path):
    """Bytes that are not what they should be."""
    whole = path.read_bytes()
    for content in (Anything(), torch.ones(3), {"weights": {}}):
        torch.save(content, path)
        yield path.read_bytes()
    yield from (whole[:len(whole) // 2], b"", b"no file of torch\n" * 9)


def test_damaged_hostile_and_foreign_files_are_refused_and_kept(teacher_file, in_tmp, capsys):
    """A teacher's file, a checkpoint, a bank. Stages and other settings: test_methods.py."""
    args = [*tiny_args(csd, teacher_file), "--out", "out", "--resume"]
    with killed("after save 3"):                               # two rounds of the bank, an epoch
        csd.main(args)
    for path in (teacher_file, in_tmp / "checkpoints" / "toy.bank-seed0.pt", in_tmp / "out" / "checkpoint.pt"):
        whole = path.read_bytes()
        for damage in damages(path):
            path.write_bytes(damage)
            before = files_of(in_tmp)
            assert path.name in refused(csd, args, capsys) and files_of(in_tmp) == before
        path.write_bytes(whole)
    csd.main(args)
    assert rows_of("out")[-1]["event"] == "end"


@pytest.mark.parametrize("change", [
    {"num_classes": 1}, {"num_classes": 10 ** 9}, {"num_classes": 10.0}, {"image_shape": (1, 8)}, {"image_shape": (1, -8, 8)},
    {"image_shape": (10 ** 9, 8, 8)}, {"image_shape": (1, 8.0, 8.0)}, {"std": (0.0,)}, {"std": ("1",)}, {"mean": (0.0, 0.0)},
    {"mean": (math.nan,)}, {"crop": -1}, {"crop": 1.5}], ids=str)
def test_a_teachers_file_with_impossible_data_is_refused(change, in_tmp, capsys):
    save_untrained("toy.pt", "wrn10_1", DIGITS)
    content = torch.load("toy.pt", weights_only=True)
    torch.save({**content, "data": {**content["data"], **change}}, "toy.pt")
    assert "not a teacher file" in refused(dafl, tiny_args(dafl, "./toy.pt"), capsys)


def test_a_checkpoint_restores_everything_in_place(tmp_path):
    def state_of(seed):
        torch.manual_seed(seed)
        layer, z = nn.Linear(2, 2), torch.rand(3)
        optimizer = torch.optim.Adam(layer.parameters(), lr=seed + 1)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return dict(layer=layer, optimizer=optimizer, z=z)
    keeper, state = common.Checkpoint(tmp_path / "c.pt", {"a": 1}), state_of(0)
    assert keeper.resume(**state) == 0
    common.COSTS["teacher_queries"] = 7
    keeper.rows.append({"x": 1})
    keeper.save(4)
    drawn = torch.rand(2)
    keeper, other = common.Checkpoint(tmp_path / "c.pt", {"a": 1}), state_of(1)
    weight, z = other["layer"].weight, other["z"]
    assert keeper.resume(**other) == 5 and keeper.rows == [{"x": 1}] and common.COSTS["teacher_queries"] == 7
    assert torch.equal(weight, state["layer"].weight) and torch.equal(z, state["z"]) and torch.equal(drawn, torch.rand(2))
    assert other["optimizer"].param_groups[0]["lr"] == 1 and len(other["optimizer"].state) == 2
    for identity, more, message in (({"a": 2}, {}, "a = 1, this command has a = 2"), ({"a": 1}, {"new": z}, "another version")):
        with pytest.raises(BadInput, match=message):
            common.Checkpoint(tmp_path / "c.pt", identity).resume(**other, **more)


# ------------------------------------------------------------------------------------------------------------- teachers
def load(**options):
    """Teacher and student as a script gets them, and its options."""
    options = SimpleNamespace(**{**dict(teacher="wrn10_1", student="wrn10_1", dataset="digits", data_dir="data", device=CPU,
                                        precision="fp32", threads=THREADS), **options})
    networks = common.load_networks(options, SimpleNamespace(seed=0), common.dataset_spec(options))
    return *networks, options


@pytest.fixture
def short_recipe(monkeypatch):
    monkeypatch.setitem(common.RECIPES, "digits", (3, 256))


def test_a_teacher_is_trained_once_and_its_file_says_all(in_tmp, short_recipe, monkeypatch, capsys):
    first, student, options = load()
    path = in_tmp / "checkpoints" / "digits_wrn10_1.pt"
    kept = path.read_bytes()
    second, _, _ = load()
    assert path.read_bytes() == kept and equal(first.state_dict(), second.state_dict())
    assert options.teacher_name == "digits_wrn10_1" and not first.training and student.training
    content = common.read_classifier(path)
    assert common.DataSpec(**content["data"]) == DIGITS and content["dataset"] == "digits" and content["seed"] == 0
    assert {"arch", "recipe", "versions", "device", "precision"} <= set(content) and content["seconds"] > 0
    test, _ = common.load_dataset("digits", False)
    assert common.accuracy(common.predict(first, test, DIGITS), test.labels) == pytest.approx(content["test_acc"]) > 0.3
    assert [each.name for each in path.parent.iterdir()] == [path.name] and "training teacher" in capsys.readouterr().out
    monkeypatch.setitem(common.RECIPES, "digits", (4, 256))
    with pytest.raises(BadInput, match="--teacher checkpoints/digits_wrn10_1.pt"):
        load()
    assert equal(load(teacher="checkpoints/digits_wrn10_1.pt")[0].state_dict(), first.state_dict())


def test_a_killed_teacher_goes_on_bit_for_bit(in_tmp, short_recipe):
    load()
    path = in_tmp / "checkpoints" / "digits_wrn10_1.pt"
    straight = common.read_classifier(path)
    path.unlink()
    for moment in ("after save 1", "before save 2", "after save 2"):
        with killed(moment):
            load()
        assert not path.exists() and len(list(path.parent.iterdir())) == 1
    load()
    content = common.read_classifier(path)
    assert equal(straight["weights"], content["weights"]) and straight["test_acc"] == content["test_acc"]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_teacher_by_itself_is_never_replaced(in_tmp, capsys):
    argv = ["--model", "wrn10_1", "--dataset", "digits", "--epochs", "1", "--batch-size", "512"]
    common.main(argv)
    assert "test accuracy" in capsys.readouterr().out
    assert "is there already" in refused(common, argv, capsys)
    assert common.read_classifier("checkpoints/digits_wrn10_1.pt")["recipe"]["epochs"] == 1
    for flags, message in ((["--dataset", "mnist99"], "unknown data set"), (["--model", "x"], "unknown model x"),
                           (["--dataset", "imagenet"], "no teacher is trained on imagenet")):
        assert message in refused(common, [*argv, *flags, "--out", "new.pt"], capsys)


def test_recipes_are_the_ones_that_reach_published_accuracies():
    sgd = dict(epochs=200, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="cosine")
    assert common.recipe_of("resnet34", "cifar10") == sgd and common.recipe_of("lenet5_bn", "mnist")["optimizer"] == "sgd"
    adam = dict(epochs=10, batch_size=256, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="cosine")
    assert common.recipe_of("lenet5", "mnist") == adam == common.recipe_of("lenet5_half", "mnist")


OWN = """
import torch.nn as nn
def network(classes=10):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, classes))
def seven():
    return network(7)
def large():
    return nn.Sequential(nn.Flatten(), nn.Linear(999, 10))
def number():
    return 3
"""


def test_networks_of_the_users_own_module(in_tmp, capsys):
    (in_tmp / "my_nets.py").write_text(OWN)
    teacher, student, options = load(teacher="my_nets:network", student="my_nets:network")
    assert options.teacher_name == "my_nets_network" and not teacher.training
    for name, message in (("my_nets:seven", "finite logits"), ("my_nets:large", "does not take images of shape"),
                          ("my_nets:number", "not a torch.nn.Module"), ("my_nets:none", "could not be built"),
                          ("no_nets:network", "could not be built"), ("torchvision:resnet1", "could not be built")):
        for flag in ("--teacher", "--student"):
            args = [*tiny_args(dafl, "wrn10_1"), "--student", "wrn10_1", flag, name]
            if flag == "--teacher" or "resnet1" in name or "could" not in message:
                assert message in refused(dafl, args, capsys), (flag, name)


def test_a_teacher_for_another_set_or_with_other_weights_is_refused(in_tmp, capsys):
    for name, data in (("image shape", DIGITS._replace(image_shape=(1, 16, 16))), ("classes", DIGITS._replace(num_classes=7))):
        save_untrained("toy.pt", "wrn10_1", data)
        assert f"is for {name}" in refused(dafl, tiny_args(dafl, "./toy.pt"), capsys)
    common.save_classifier("toy.pt", common.build_model("wrn10_2", 10, DIGITS.image_shape), "wrn10_1", DIGITS, "digits")
    assert "do not fit wrn10_1" in refused(dafl, tiny_args(dafl, "./toy.pt"), capsys)


def test_what_a_method_needs_is_asked_before_a_teacher_is_trained(in_tmp, monkeypatch, capsys):
    """A BatchNorm, an image size, a map: no hours of training come before such a refusal."""
    for part in ("train", "test"):
        for label in "ab":
            (in_tmp / "odd" / part / label).mkdir(parents=True)
            Image.new("L", (10, 10)).save(in_tmp / "odd" / part / label / "0.png")
    monkeypatch.setattr(common, "train_teacher", None)         # would be called, and is not callable
    assert "no BatchNorm" in refused(deepinversion, ["--dataset", "digits", "--teacher", "lenet5"], capsys)
    assert "must be a layer" in refused(csd, ["--dataset", "digits", "--teacher-last-map", "nowhere"], capsys)
    for method in METHODS:
        if hasattr(method, "Generator"):
            argv = ["--dataset", "folder:odd", "--preset", "digits", "--teacher", "wrn10_1", "--student", "wrn10_1"]
            assert "multiple" in refused(method, argv, capsys)


# ---------------------------------------------------------------------------------------------------- flags and presets
def parsed(method, *argv, pairs=None, variant=lambda flags: ""):
    return common.parse(method.__name__, method.__doc__, method.Settings, method.PRESETS, list(argv), pairs, variant)


def test_a_preset_is_found_by_pair_data_set_or_name_and_flags_beat_it(teacher_file):
    for method, argv, preset, dataset, teacher, student in (
            (csd, "", "cifar10", "cifar10", "resnet34", "resnet18"),
            (csd, "--teacher wrn40_2 --student wrn16_1", "cifar10-wrn40_2-wrn16_1", "cifar10", "wrn40_2", "wrn16_1"),
            (csd, "--preset cifar10-wrn40_2-wrn16_1", "cifar10-wrn40_2-wrn16_1", "cifar10", "wrn40_2", "wrn16_1"),
            (csd, "--preset cifar10-short", "cifar10-short", "cifar10", "resnet34", "resnet18"),
            (csd, "--preset digits", "digits", "digits", "wrn16_2", "wrn16_1"),
            (csd, "--dataset svhn", "svhn", "svhn", "wrn40_2", "wrn16_1"),
            (csd, f"--teacher {teacher_file}", "digits", "digits", str(teacher_file), "wrn16_1"),
            (csd, f"--teacher {teacher_file} --dataset none", "digits", "none", str(teacher_file), "wrn16_1"),
            (cudfkd, "--teacher wrn40_2 --student wrn16_2", "cifar10-wrn", "cifar10", "wrn40_2", "wrn16_2"),
            (cudfkd, "--teacher wrn40_2 --student resnet18", "cifar10", "cifar10", "wrn40_2", "resnet18"),
            (cudfkd, "--dataset cifar100 --teacher wrn16_4 --student wrn16_1", "cifar100-wrn", "cifar100", "wrn16_4", "wrn16_1"),
            (dafl, "--dataset mnist", "mnist", "mnist", "lenet5", "lenet5_half"),
            (deepinversion, "--dataset imagenet", "imagenet", "imagenet", "torchvision:resnet50", "torchvision:resnet18"),
            (regulated_kd, "--teacher alexnet --student alexnet_half", "cifar10-alexnet-alexnet_half", "cifar10", "alexnet",
             "alexnet_half")):
        options, settings = parsed(method, *argv.split())
        found = options.preset, options.dataset, options.teacher, options.student
        assert found == (preset, dataset, teacher, student) and settings == method.PRESETS[preset] and not options.changed
    options, settings = parsed(csd, *"--preset digits --epochs 3 --csd 0 --raw-head --seed 7 --student-steps 180".split())
    assert (settings.epochs, settings.csd, settings.raw_head, settings.seed) == (3, 0.0, True, 7)
    assert options.changed == {"epochs": 3, "csd": 0.0, "raw_head": True} and settings.bn == csd.PRESETS["digits"].bn
    assert parsed(csd, "--preset", "digits", "--no-raw-head")[1] == csd.PRESETS["digits"]


def test_every_pair_with_a_preset_finds_it():
    for method in METHODS:
        for name in (name for name in method.PRESETS if name.count("-") == 2):
            dataset, teacher, student = name.split("-")
            options, _ = parsed(method, "--dataset", dataset, "--teacher", teacher, "--student", student)
            assert options.preset == name


def test_a_method_may_have_pairs_of_its_own_and_real_surrogates_take_the_real_preset(monkeypatch):
    found = []

    def stop(options, settings, *args, **more):
        found.append((options, settings))
        raise BadInput("far enough")
    for method in (regulated_kd, surrogate_kd):
        monkeypatch.setattr(method, "load_networks", stop)
    monkeypatch.setattr(surrogate_kd, "real_pictures", lambda *args: (1, None, ""))
    for method, argv, preset, teacher, temperature in (
            (regulated_kd, "--dataset digits", "digits", "lenet5", 4), (surrogate_kd, "--dataset digits", "digits", "wrn16_2", 4),
            (surrogate_kd, "--surrogate cifar100", "cifar10-real", "resnet34", 2),
            (surrogate_kd, "--surrogate leaves", "cifar10", "resnet34", 20),
            (surrogate_kd, "--surrogate folder:x", "cifar10-real", "resnet34", 2),
            (surrogate_kd, "--surrogate cifar100 --preset cifar10", "cifar10", "resnet34", 20),
            (surrogate_kd, "--dataset mnist --surrogate fashion_mnist", "mnist-real", "lenet5_bn", 4),
            (surrogate_kd, "--surrogate svhn --temperature 7", "cifar10-real", "resnet34", 7)):
        with pytest.raises(SystemExit):
            method.main(argv.split())
        options, settings = found[-1]
        assert (options.preset, options.teacher, settings.temperature) == (preset, teacher, temperature)


HUGE = "1" + 30 * "0"
BAD_FLAGS = [
    ("--teacher resnet99", "unknown model resnet99"), ("--student wrn16", "unknown model wrn16"), ("--student t.pt", "unknown model"),
    ("--dataset imagewoof", "unknown data set"), ("--preset cifar99", "no preset cifar99; choose from cifar10"),
    ("--dataset mnist28", "no preset for data set mnist28"), ("--dataset folder:nowhere --preset cifar10", "one folder a class"),
    ("--epochs 0", "must be above 0"), ("--epochs -3", "must be above 0"), ("--epochs ten", "invalid whole number value"),
    ("--epochs 1.5", "invalid whole number value"), ("--epochs", "expected one argument"), ("--batch-size 0", "must be above 0"),
    ("--temperature 0", "must be above 0"), ("--oh -1", "must be at least 0"), ("--lr-student 0", "must be above 0"),
    ("--lr-student nan", "must be above 0"), ("--lr-student inf", "must be above 0"), ("--oh 1e999", "must be at least 0"),
    ("--oh -0x1", "invalid number value"), ("--seed -1", "must be at least 0"), ("--seed 4294967296", "under 4294967296"),
    ("--eval-every 0", "must be above 0"), ("--threads 0", "must be above 0"), ("--epochs 1" + 400 * "0", "must be"),
    (f"--batch-size {HUGE}", "must be"), (f"--threads {HUGE}", "must be"), ("--precision fp16", "invalid choice: fp16"),
    ("--schedule steep", "invalid choice: steep"), ("--device tpu", "unknown device"), ("--device cuda:99", "no device"),
    ("--device cpu --precision tf32", "for CUDA"), ("--no-such-flag 1", "unrecognized"), ("--epoch 3", "unrecognized"),
    ("--resume", "--resume needs --out"), ("--teacher nowhere/t.pt", "no teacher file"), ("--teacher ./", "no teacher file"),
    ("--dataset none", "needs a --teacher file"), ("--dataset none --teacher torchvision:resnet18", "needs a --teacher file"),
    ("--warmup 1", "under 1"), (f"--preset digits --out {300 * 'a'}", "cannot be a run folder")]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_are_refused_in_a_sentence(flags, message, in_tmp, capsys):
    assert message in refused(dafl, flags.split(), capsys)


def test_missing_cifar10_says_what_to_type(in_tmp, capsys, monkeypatch):
    def missing(*args, **more):
        raise RuntimeError("not found")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", missing)
    error = refused(dafl, [], capsys)
    assert str(in_tmp / "data") in error and "--dataset digits" in error


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_help_has_every_setting_its_comment_and_its_presets(method, capsys):
    with pytest.raises(SystemExit) as stop:
        method.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(name in text for name in method.PRESETS)
    for line in __import__("inspect").getsource(method.Settings).splitlines():
        if ": " in line and "=" in line and not line.lstrip().startswith(('"""', "#")):
            name, comment = line.split(":")[0].strip(), line.partition("# ")[2]
            assert "--" + name.replace("_", "-") in text and comment and " ".join(comment.split()) in text.replace("- ", "-"), line


# ---------------------------------------------------------------------------------------------------------- run folders
def test_folders_are_numbered_and_never_used_twice(teacher_file, in_tmp, capsys, monkeypatch):
    args = tiny_args(dafl, teacher_file)
    for _ in range(2):
        dafl.main(args)
    assert sorted(path.name for path in (in_tmp / "runs").iterdir()) == ["dafl-digits-001", "dafl-digits-002"]
    (in_tmp / "file").write_text("mine")
    (in_tmp / "pictures").mkdir()
    (in_tmp / "pictures" / "samples.png").write_text("mine")
    before = files_of(in_tmp)
    for out, message in (("runs/dafl-digits-001", "holds a run already"), ("pictures", "holds a run already"),
                         ("file", "is a file"), ("file/deeper", "is a file")):
        assert message in refused(dafl, [*args, "--out", out], capsys) and files_of(in_tmp) == before
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "access", lambda path, mode: False)
        assert "is read-only" in refused(dafl, [*args, "--out", "new"], capsys)
    (in_tmp / "notes").mkdir()
    (in_tmp / "notes" / "mine.txt").write_text("mine")
    dafl.main([*args, "--out", "notes"])
    assert files_of(in_tmp)["notes/mine.txt"] == b"mine" and "notes/student.pt" in files_of(in_tmp)


@pytest.mark.parametrize("moment", ["teacher", "bank", "epoch 0", "epoch 1"])
def test_ctrl_c_says_how_to_go_on(moment, teacher_file, in_tmp, capsys, monkeypatch):
    save, saves = common.Checkpoint.save, []

    def interrupted(self, *args):
        if moment == ("teacher" if type(self) is common.Checkpoint else getattr(self, "event", f"epoch {args[0]}")):
            signal.raise_signal(signal.SIGINT)
        save(self, *args)
    args = tiny_args(csd, "wrn10_1" if moment == "teacher" else teacher_file)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common.Checkpoint, "save", interrupted)
        csd.main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 130 and error.count("\n") == 1 and not saves
    more = error.strip().partition("type the same command again")[2].split()
    assert more == ([] if moment == "teacher" else ["with", "--resume", "--out", "runs/csd-digits-001"])
    if more:
        csd.main([*args, *more[1:]])
        assert rows_of("runs/csd-digits-001")[-1]["event"] == "end"


@pytest.mark.parametrize("rate, epoch", [("1e30", 0), ("20", None)])
def test_a_loss_that_is_not_finite_names_epoch_and_checkpoint_and_is_not_saved(rate, epoch, teacher_file, in_tmp, capsys, monkeypatch):
    found = dafl.kd_loss
    calls = []
    if epoch is None:                                          # well in the first epoch, and infinite in the second one
        monkeypatch.setattr(dafl, "kd_loss", lambda *args: calls.append(1) or found(*args) * (math.inf if len(calls) > 4 else 1))
    with pytest.raises(SystemExit) as stop:
        dafl.main([*tiny_args(dafl, teacher_file), "--out", "out", "--lr-student", rate])
    error, checkpoint = capsys.readouterr().err, in_tmp / "out" / "checkpoint.pt"
    assert stop.value.code == 1 and "loss_kd became" in error and error.count("\n") == 1
    assert f"in epoch {epoch or 0 if epoch is not None else 1}" in error
    assert checkpoint.exists() == ("out/checkpoint.pt" in error) == (epoch is None)
    assert epoch == 0 or torch.load(checkpoint, weights_only=True)["epoch"] == 0


def test_the_three_signs_of_a_collapse():
    torch.manual_seed(0)
    varied, alike = torch.rand(40, 1, 8, 8), torch.full((40, 1, 8, 8), 0.5) + 0.001 * torch.rand(40, 1, 8, 8)
    even, one, few = torch.arange(40) % 10, torch.full((40,), 3), torch.tensor([0] * 35 + [1] * 5)
    for pixels, labels, words in (
            (varied, even, []), (alike, even, ["hardly differ"]), (varied, one, ["all its images are in class 3"]),
            (varied, few, ["entropy of its classes is 0.16 of the largest"]), (alike, one, ["hardly differ", "in class 3"]),
            (None, None, []), (varied, None, []), (varied[:4], even[:4], [])):
        common.COSTS.clear()
        common.COSTS.update(seconds_a=1.0, teacher_queries=5)
        *warning, row = common.describe("epoch", "epoch", 7, {"loss": 1.0}, pixels, labels, 10)
        assert len(warning) == bool(words) and all(word in warning[0]["text"] for word in words)
        assert row["event"] == "epoch" and row["epoch"] == 7 and row["loss"] == 1 and row["seconds_a"] == 1
        assert row["teacher_queries"] == 5 and common.COSTS["seconds_a"] == 0
        assert labels is None or row["class_counts"] == torch.bincount(labels, minlength=10).tolist()
    assert common.describe("epoch", "epoch", 0, {}, varied, even, 1000)[-1]["class_counts"] is None


def test_a_collapse_is_named_on_the_screen_and_in_the_log_and_the_run_goes_on(teacher_file, in_tmp, monkeypatch, capsys):
    forward = dafl.Generator.forward
    monkeypatch.setattr(dafl.Generator, "forward", lambda self, z: 0.1 + 0 * forward(self, z))
    dafl.main([*tiny_args(dafl, teacher_file), "--out", "out"])
    assert [row["event"] for row in rows_of("out")] == ["start", *["collapse", "epoch"] * 2, "end"]
    assert capsys.readouterr().out.count("its images hardly differ, all its images are in class") == 2


@pytest.mark.parametrize("method, arch, words", [
    (csd, "lenet5", ["the BN term is off"]), (csd, "my_nets:network", ["the feature term is off"]), (csd, "wrn10_1", []),
    (cudfkd, "lenet5", ["the BN term is off"]), (cudfkd, "wrn10_1", [])])
def test_a_term_that_is_off_is_noted(method, arch, words, in_tmp):
    (in_tmp / "my_nets.py").write_text(OWN)
    teacher = arch if ":" in arch else save_untrained("./toy.pt", arch, DIGITS)
    method.main([*tiny_args(method, teacher), "--out", "out"])
    notes = [row["text"] for row in rows_of("out") if row["event"] == "note" and "->" not in row["text"]]
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes))
    epoch = next(row for row in rows_of("out") if row["event"] == "epoch")
    assert (epoch["loss_bn"] == 0) == ("the BN term is off" in words)


def test_the_picture_has_a_row_a_class_with_its_last_images(tmp_path):
    pixels = torch.arange(12).view(12, 1, 1, 1).expand(-1, 1, 20, 20) / 12
    labels = torch.tensor([0] * 10 + [2] * 2)
    common.save_samples(tmp_path / "s.png", pixels, labels, 3)
    sheet = torch.tensor(list(Image.open(tmp_path / "s.png").convert("L").tobytes())).view(3 * 42 + 2, -1)[:, 24:]
    seen = [[sheet[2 + 42 * row + 20, 2 + 42 * column + 20].item() for column in range(8)] for row in range(3)]
    assert seen[0] == [int(255 * i / 12) for i in range(2, 10)] and seen[1] == [0] * 8
    assert seen[2] == [int(255 * 10 / 12), int(255 * 11 / 12)] + [0] * 6
    common.save_samples(tmp_path / "many.png", torch.rand(30, 3, 8, 8), torch.arange(30), 1000)
    assert Image.open(tmp_path / "many.png").size[1] == 20 * 42 + 2 and len(list(tmp_path.iterdir())) == 2


def test_rows_are_json_and_the_screen_shows_the_terms_that_are_on(teacher_file, in_tmp, capsys):
    dafl.main([*tiny_args(dafl, teacher_file), "--out", "out"])
    lines, rows = capsys.readouterr().out.splitlines(), rows_of("out")
    heads = [line.split() for line in lines if line.split()[:1] == ["epoch"]]
    assert heads == [["epoch", "oh", "ie", "act", "kd", "pixel_std", "student_acc", "agreement", "seconds"]]
    first = lines[[line.split() for line in lines].index(heads[0]) + 1].split()
    epoch = next(row for row in rows if row["event"] == "epoch")
    assert first[:3] == ["0", f"{epoch['loss_oh']:.4f}", f"{epoch['loss_ie']:.4f}"] and first[-3] == f"{epoch['student_acc']:.4f}"
    assert all(json.loads(line) for line in (in_tmp / "out" / "log.jsonl").read_text().splitlines()) and Killed
