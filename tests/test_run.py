"""run.py: files that are whole at every moment, checkpoints, teachers on demand, and one clear sentence for bad input."""
import json
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import common
import csd
import models
import run
from common import BadInput, Means, Shuffled
from conftest import tiny_networks


# ------------------------------------------------------------------------------------------------------- files, state
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.pt"
    run.write_atomically(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        run.write_atomically(path, half)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file.pt"]


class Anything:
    """A pickle of this would run code where torch.load lets it."""


@pytest.mark.parametrize("content", ["empty", "text", "truncated", "hostile", "another"])
def test_damaged_and_hostile_teacher_files_are_refused(tmp_path, content):
    path = tmp_path / "teacher.pt"
    teacher, _, data = tiny_networks()
    run.save_classifier(path, teacher, "wrn10_1", data, "digits")
    whole = path.read_bytes()
    if content == "another":
        torch.save({"weights": teacher.state_dict()}, path)
    elif content == "hostile":
        torch.save(Anything(), path)
    else:
        path.write_bytes({"empty": b"", "text": b"no checkpoint\n" * 9, "truncated": whole[:len(whole) // 2]}[content])
    with pytest.raises(BadInput) as error:
        run.read_classifier(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"num_classes": 1}, {"num_classes": 10 ** 9}, {"image_shape": (1, 8)}, {"image_shape": (1, -8, 8)},
                                    {"std": (0.0,)}, {"mean": (0.0, 0.0)}, {"crop": -1}, {"image_shape": (10 ** 9, 8, 8)}])
def test_teacher_files_with_impossible_data_are_refused(tmp_path, change):
    teacher, _, data = tiny_networks()
    run.save_classifier(tmp_path / "t.pt", teacher, "wrn10_1", data._replace(**change), "digits")
    with pytest.raises(BadInput, match="not a teacher file"):
        run.read_classifier(tmp_path / "t.pt")


def everything():
    """A state with one of each kind that a method keeps."""
    torch.manual_seed(0)
    layer, rng = nn.Linear(2, 2), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    means = Means("loss", device="cpu")
    means.add(torch.tensor(2.0))
    return dict(layer=layer, optimizer=optimizer, rng=rng, batches=Shuffled(rng), z=torch.ones(3, requires_grad=True), means=means, epoch=3,
                seconds_training=1.5)


def test_a_checkpoint_holds_everything_and_restores_it_in_place(tmp_path):
    keeper = run.Progress(tmp_path / "checkpoint.pt", {"a": 1})
    state = everything()
    state["batches"].next(10, 3)
    keeper.restore(state)
    keeper.save(state)
    drawn, expected_batch = torch.rand(3, generator=state["rng"]), state["batches"].next(10, 3)
    global_draw = torch.rand(2)
    other = everything()
    with torch.no_grad():
        other["layer"].weight.zero_(), other["z"].zero_()
    other["optimizer"].state.clear()
    other.update(epoch=0, seconds_training=0.0)
    torch.manual_seed(77)
    aliases = other["layer"].weight, other["z"]
    run.Progress(tmp_path / "checkpoint.pt", {"a": 1}).restore(other)
    assert other["layer"].weight is aliases[0] and other["z"] is aliases[1] and other["z"].sum() == 3
    assert torch.equal(other["layer"].weight, state["layer"].weight) and other["epoch"] == 3 and other["seconds_training"] == 1.5
    assert len(other["optimizer"].state) == 2 and other["means"].take() == {"loss": 2.0}
    assert torch.equal(torch.rand(3, generator=other["rng"]), drawn) and torch.equal(other["batches"].next(10, 3), expected_batch)
    assert torch.equal(torch.rand(2), global_draw)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    keeper = run.Progress(tmp_path / "checkpoint.pt", {})
    for epoch in (1, 2):
        keeper.save({"epoch": epoch})
    keeper.path.write_bytes(keeper.path.read_bytes()[:100])
    state = {"epoch": 0}
    run.Progress(tmp_path / "checkpoint.pt", {}).restore(state)
    assert state["epoch"] == 1 and "trying the one before" in capsys.readouterr().err
    keeper.path.unlink()                                       # killed between the two renames
    run.Progress(tmp_path / "checkpoint.pt", {}).restore(state)
    assert state["epoch"] == 1
    keeper.previous.write_bytes(b"")
    with pytest.raises(BadInput, match="no readable checkpoint is left"):
        run.Progress(tmp_path / "checkpoint.pt", {}).restore(state)


def test_another_configuration_is_refused_by_name(tmp_path):
    run.Progress(tmp_path / "c.pt", {"epochs": 5, "seed": 0}).save({"epoch": 1})
    with pytest.raises(BadInput, match="epochs = 5, this command has epochs = 6"):
        run.Progress(tmp_path / "c.pt", {"epochs": 6, "seed": 0}).restore({"epoch": 0})
    with pytest.raises(BadInput, match="another version"):
        run.Progress(tmp_path / "c.pt", {"epochs": 5, "seed": 0}).restore({"epoch": 0, "new": 1})


def test_a_state_with_a_nan_is_not_saved(tmp_path):
    means = Means("loss", device="cpu")
    keeper = run.Progress(tmp_path / "c.pt", {})
    keeper.save({"means": means})
    saved = keeper.path.read_bytes()
    means.add(torch.tensor(float("inf")))
    with pytest.raises(FloatingPointError, match="loss became inf"):
        keeper.save({"means": means})
    assert keeper.path.read_bytes() == saved


def test_steps_counts_in_the_state_and_ticks_after_each():
    ticked = []
    state = dict(a_step=2, seconds_a=0.0)
    done = list(common.steps(state, "a", 5, SimpleNamespace(tick=lambda state: ticked.append(state["a_step"]))))
    assert done == [2, 3, 4] and ticked == [3, 4, 5] and state["seconds_a"] > 0
    assert list(common.steps(state, "a", 5)) == []


# ----------------------------------------------------------------------------------------------------------- teachers
def teacher_settings(**changes):
    return SimpleNamespace(**{**dict(teacher="wrn10_1", dataset="digits", data_dir="data", threads=2, precision="fp32"), **changes})


@pytest.fixture
def short_recipe(monkeypatch):
    monkeypatch.setitem(run.RECIPES, "digits", (3, 256))


def test_a_teacher_is_trained_once_and_its_file_is_safe_and_complete(in_tmp, short_recipe):
    device = torch.device("cpu")
    first = run.load_teacher(teacher_settings(), device)
    path = in_tmp / "checkpoints" / "digits_wrn10_1.pt"
    stamp = path.stat().st_mtime_ns
    second = run.load_teacher(teacher_settings(), device)
    assert path.stat().st_mtime_ns == stamp and first.sha256 == second.sha256 and first.name == "digits_wrn10_1"
    assert first.data == common.DATASETS["digits"] and not first.model.training
    content = torch.load(path, weights_only=True)
    assert {"weights", "arch", "data", "recipe", "test_acc", "versions", "dataset", "seed"} <= set(content)
    test, data = common.load_dataset("digits", False)
    assert common.accuracy(common.predict(first.model, test, data), test.labels) == pytest.approx(content["test_acc"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_cached_teacher_of_another_recipe_is_not_used_silently(in_tmp, short_recipe, monkeypatch):
    run.load_teacher(teacher_settings(), torch.device("cpu"))
    monkeypatch.setitem(run.RECIPES, "digits", (4, 256))
    with pytest.raises(BadInput, match="--teacher checkpoints/digits_wrn10_1.pt"):
        run.load_teacher(teacher_settings(), torch.device("cpu"))
    assert run.load_teacher(teacher_settings(teacher="checkpoints/digits_wrn10_1.pt"), torch.device("cpu")).name == "digits_wrn10_1"


def test_a_killed_teacher_training_goes_on_bit_for_bit(in_tmp, short_recipe, monkeypatch):
    device, recipe = torch.device("cpu"), run.recipe_of("wrn10_1", "digits")
    run.train_teacher("wrn10_1", "digits", in_tmp / "straight.pt", teacher_settings(), device, recipe)
    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    save, saves = run.Progress.save, []

    def killed(self, state):
        save(self, state)
        saves.append(1)
        if len(saves) in (2, 9):
            raise KeyboardInterrupt
    monkeypatch.setattr(run.Progress, "save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run.train_teacher("wrn10_1", "digits", in_tmp / "killed.pt", teacher_settings(), device, recipe)
    run.train_teacher("wrn10_1", "digits", in_tmp / "killed.pt", teacher_settings(), device, recipe)
    one, other = (torch.load(in_tmp / name, weights_only=True)["weights"] for name in ("straight.pt", "killed.pt"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_recipes_are_the_ones_that_reach_published_accuracies():
    assert run.recipe_of("resnet34", "cifar10") == dict(epochs=200, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="cosine")
    assert run.recipe_of("lenet5", "mnist")["optimizer"] == "adam" and run.recipe_of("lenet5_bn", "mnist")["optimizer"] == "sgd"


OWN_TEACHER = """
import torch.nn as nn
def network():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
def wrong():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
def number():
    return 3
"""


def test_a_teacher_from_a_users_module(in_tmp):
    (in_tmp / "my_nets.py").write_text(OWN_TEACHER)
    teacher = run.load_teacher(teacher_settings(teacher="my_nets:network"), torch.device("cpu"))
    assert teacher.name == "my_nets_network" and len(teacher.sha256) == 64 and teacher.data == common.DATASETS["digits"]
    for name, message in (("my_nets:wrong", "finite logits"), ("my_nets:number", "not a torch.nn.Module"), ("my_nets:none", "could not be built"),
                          ("no_nets:network", "could not be built"), ("torchvision:resnet1", "could not be built")):
        with pytest.raises(BadInput, match=message):
            run.load_teacher(teacher_settings(teacher=name), torch.device("cpu"))


# ----------------------------------------------------------------------------------------------------- flags, presets
def read(*argv):
    return run.read_settings(list(argv), "csd", csd.__doc__, csd.PRESETS, csd.FLAGS, {"bank": "a file"})


def test_the_default_is_cifar10_with_the_authors_numbers():
    settings = read("--teacher", "resnet34", "--student", "resnet18")
    assert settings.dataset == "cifar10" and settings.preset == "cifar10"
    authors = csd.PRESETS["cifar10-wrn40_2-wrn16_1"]
    assert {key: getattr(settings, key) for key in authors} == authors
    assert (read().teacher, read().student) == ("resnet34", "resnet18")


def test_presets_are_found_by_data_set_and_pair_and_flags_beat_them(teacher_file):
    assert read("--teacher", "wrn40_2", "--student", "wrn16_1").preset == "cifar10-wrn40_2-wrn16_1"
    pair = read("--preset", "cifar10-wrn40_2-wrn16_1")
    assert (pair.dataset, pair.teacher, pair.student) == ("cifar10", "wrn40_2", "wrn16_1")
    digits = read("--dataset", "digits", "--epochs", "3", "--csd", "0", "--raw-head", "--no-fresh-head-optimizer")
    assert (digits.teacher, digits.student, digits.epochs, digits.csd, digits.raw_head) == ("wrn16_2", "wrn16_1", 3, 0.0, True)
    assert digits.student_steps == csd.PRESETS["digits"]["student_steps"]
    assert read("--preset", "digits").dataset == "digits" and read("--preset", "cifar10-short").bank_rounds == 20
    from_file = read("--teacher", str(teacher_file), "--student", "wrn16_1")
    assert from_file.dataset == "digits" and read("--teacher", str(teacher_file), "--dataset", "none", "--student", "wrn16_1").preset == "digits"


BAD_FLAGS = [
    ("--teacher resnet99", "unknown model 'resnet99'"), ("--student wrn16", "unknown model 'wrn16'"), ("--dataset imagewoof", "unknown data set"),
    ("--preset cifar99", "no preset 'cifar99'"), ("--dataset mnist", "no preset for data set 'mnist'"), ("--epochs 0", "must be above 0"),
    ("--epochs -3", "must be above 0"), ("--batch-size 0", "must be above 0"), ("--bank-rounds 0", "must be above 0"), ("--epochs ten", "invalid"),
    ("--epochs 1.5", "invalid"), ("--temperature 0", "must be above 0"), ("--csd -1", "must be at least 0"), ("--lr-student nan", "must be above 0"),
    ("--seed -1", "must be at least 0"), ("--eval-every 0", "must be above 0"), ("--threads 0", "must be above 0"), ("--precision fp16", "invalid choice"),
    ("--resume", "--resume needs --out"), ("--teacher nowhere/t.pt", "no teacher file"), ("--dataset none", "needs a --teacher file"), ("--dataset none --teacher torchvision:resnet18", "needs a --teacher file"),
    ("--no-such-flag 1", "unrecognized"), ("--device tpu", "unknown device"), ("--device cuda:99", "no device"),
    ("--device cpu --precision tf32", "for CUDA"), ("--device cpu --compile", "for CUDA"), ("--dataset folder:nowhere --preset cifar10", "one folder a class")]


@pytest.mark.parametrize("flags, message", BAD_FLAGS)
def test_bad_flags_get_one_sentence_and_status_2(in_tmp, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        csd.main(flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not list(in_tmp.iterdir())                          # nothing was made


def test_help_names_every_presets_value(capsys):
    with pytest.raises(SystemExit) as stop:
        csd.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "cifar10-short" in text and "digits 180" in text


def test_missing_cifar10_says_what_to_type(in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(common.torchvision.datasets, "CIFAR10", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("not found")))
    with pytest.raises(SystemExit) as stop:
        csd.main(["--teacher", "resnet34", "--student", "resnet18"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and str(in_tmp / "data") in error and "--dataset digits" in error and error.count("\n") == 1
    assert not (in_tmp / "runs").exists()


def test_a_signal_saves_and_stops_with_its_own_status(in_tmp, capsys):
    @run.command_line
    def main(argv=None):
        keeper = run.Progress("c.pt", {})
        state = dict(a_step=0, seconds_a=0.0)
        keeper.restore(state)
        for step in common.steps(state, "a", 5, keeper):
            if step == 2:
                signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 128 + signal.SIGINT and signal.getsignal(signal.SIGINT) is before
    assert torch.load("c.pt", weights_only=True)["state"]["a_step"] == 3 and "saved in c.pt" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(csd_args, in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    with pytest.raises(SystemExit) as stop:
        csd.main([*csd_args, "--out", "out", "--lr-student", "1e30"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "became" in error and "at step" in error and "out/checkpoint.pt" in error
    assert (in_tmp / "out" / "checkpoint.pt").exists()


def test_a_teacher_for_another_shape_or_number_of_classes(in_tmp, capsys):
    data = common.DATASETS["digits"]
    for name, other in (("shape", data._replace(image_shape=(1, 16, 16))), ("classes", data._replace(num_classes=7))):
        run.save_classifier(f"{name}.pt", models.build_model("wrn10_1", other.num_classes, other.image_shape), "wrn10_1", other, "digits")
        with pytest.raises(SystemExit) as stop:
            csd.main(["--dataset", "digits", "--teacher", f"{name}.pt", "--student", "wrn10_1"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and name in error and error.count("\n") == 1
    run.save_classifier("fit.pt", models.build_model("wrn10_2", 10, data.image_shape), "wrn10_1", data, "digits")
    with pytest.raises(SystemExit):
        csd.main(["--dataset", "digits", "--teacher", "fit.pt", "--student", "wrn10_1"])
    assert "do not fit wrn10_1" in capsys.readouterr().err and not (in_tmp / "runs").exists()


def test_training_a_teacher_by_itself_refuses_to_overwrite(in_tmp, capsys):
    run.train_main(["--model", "wrn10_1", "--dataset", "digits", "--epochs", "1", "--batch-size", "512"])
    assert "test accuracy" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run.train_main(["--model", "wrn10_1", "--dataset", "digits"])
    assert stop.value.code == 2 and "is there already" in capsys.readouterr().err
    assert json.loads(json.dumps(torch.load("checkpoints/digits_wrn10_1.pt", weights_only=True)["recipe"]))["epochs"] == 1
