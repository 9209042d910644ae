"""common.py, rooms 6 and 7: whole files, teachers, flags, run folders, one clear sentence for bad input."""
import dataclasses
import inspect
import itertools
import math
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import common
import running
from common import BadInput
from conftest import (METHODS, THREADS, csd, cudfkd, dafl, deepinversion, plain_inversion, rdskd,
                      regulated_kd, surrogate_kd, tiny_args)
from helpers import equal, refused, rows_of, run_script, save_untrained
from test_methods import STAGES, each, files_of, killed

DIGITS = common.DATASETS["digits"]


# ------------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("place, name", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_a_failed_write_leaves_the_old_file_and_no_other(place, name, tmp_path, monkeypatch):
    def disk_full(*args):
        raise OSError("disk full")
    running.write({"a": 1}, tmp_path / "file.pt")
    monkeypatch.setattr(place, name, disk_full)
    with pytest.raises(OSError):
        running.write({"a": 2}, tmp_path / "file.pt", torch.save)
    assert torch.load(tmp_path / "file.pt") == {"a": 1} and os.listdir(tmp_path) == ["file.pt"]


class Anything:
    """A pickle of this would run code where torch.load lets it."""


@each([dafl, cudfkd, *STAGES])
def test_damaged_hostile_and_foreign_files_are_refused_and_kept(method, teacher_file, in_tmp, capsys):
    """The teacher, what is made once (bank, generator, pool), the checkpoint; then the run goes on."""
    args = [*tiny_args(method, teacher_file), "--out", "out", "--resume"]
    while not Path("out/checkpoint.pt").exists():              # after the first epoch
        with killed("after save 1"):
            method.main(args)
    for path in [path for path in in_tmp.rglob("*.pt")]:
        whole = path.read_bytes()
        for damage in (whole[:len(whole) // 2], b"", b"no file\n", Anything(), torch.ones(3), {"state": 1}):
            path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
            before = files_of()
            assert path.name in refused(method, args, capsys) and files_of() == before
        path.write_bytes(whole)
    method.main(args)
    assert rows_of("out")[-1]["event"] == "end"


@pytest.mark.slow
def test_two_processes_in_one_folder_and_two_that_train_the_same_teacher(in_tmp, capsys):
    """The second is refused while the first one writes; a teacher that both train is kept once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "sklearn.datasets"])
    args = [*tiny_args(dafl, "lenet5", epochs=40), "--eval-every", "40"]
    one, two = (context.Process(target=run_script, args=("dafl", [*args, "--out", out], ".")) for out in "12")
    one.start()
    two.start()
    while not Path("1/checkpoint.pt").exists():
        time.sleep(0.01)
    with pytest.raises(SystemExit) as stop:
        dafl.main([*args, "--out", "1", "--resume"])
    assert stop.value.code == 2 and "error: another process writes to 1;" in capsys.readouterr().err
    for process in (one, two):
        process.join()
        assert process.exitcode == 0
    assert equal(*(running.read_classifier(f"{folder}/student.pt")["weights"] for folder in "12"))
    assert rows_of("1")[0]["teacher_sha256"] == rows_of("2")[0]["teacher_sha256"]
    assert os.listdir("checkpoints") == ["digits_lenet5.pt"]


def test_a_run_that_goes_on_with_another_version_or_device_says_so(teacher_file, in_tmp, monkeypatch):
    args = [*tiny_args(dafl, teacher_file), "--out", "out", "--resume"]
    with killed("after save 1"):
        dafl.main(args)
    monkeypatch.setattr(running, "versions", lambda: {"torch": "0.4.1"})
    monkeypatch.setattr(running, "device_name", lambda device: "abacus")
    dafl.main(args)
    notes = [row["text"] for row in rows_of("out") if row["event"] == "note"]
    assert "resumed with versions {'torch': '0.4.1'}" in notes[0] and "device abacus" in notes[1]


@pytest.mark.parametrize("change", [
    {"num_classes": 1}, {"num_classes": 10 ** 9}, {"num_classes": 10.5}, {"crop": -1}, {"crop": 1.5},
    {"image_shape": (1, 8)}, {"image_shape": (1, -8, 8)}, {"image_shape": (10 ** 9, 8, 8)}, {"std": (0.0,)},
    {"std": ("x",)}, {"mean": (0.0, 0.0)}, {"mean": (math.nan,)}], ids=str)
def test_a_teachers_file_with_impossible_data_is_refused(change, in_tmp, capsys):
    content = torch.load(save_untrained("toy.pt", "wrn10_1"), weights_only=True)
    torch.save({**content, "data": {**content["data"], **change}}, "toy.pt")
    assert "not a teacher file" in refused(dafl, tiny_args(dafl, "./toy.pt"), capsys)


def test_weights_from_elsewhere_are_refused_with_the_way_to_use_them(in_tmp, capsys):
    network = common.build_model("wrn10_1", 10, (1, 8, 8))
    for content in (network.state_dict(), dict(state_dict=network.state_dict()), network):
        torch.save(content, "weights.pth")
        assert "type --teacher mine:teacher" in refused(dafl, tiny_args(dafl, "weights.pth"), capsys)


# --------------------------------------------------------------------------------------------------- teachers
def load(**options):
    """Teacher and student as a script gets them, and its options."""
    usual = dict(teacher="wrn10_1", student="wrn10_1", dataset="digits", precision="fp32", data_dir="data",
                 device=torch.device("cpu"), threads=THREADS)
    options = SimpleNamespace(**{**usual, **options})
    networks = running.load_networks(options, SimpleNamespace(seed=0), running.dataset_spec(options))
    return *networks, options


def test_a_teacher_is_trained_once_goes_on_after_a_kill_and_says_all_in_its_file(in_tmp, monkeypatch, capsys):
    monkeypatch.setitem(running.RECIPES, "digits", (3, 256))
    teacher, student, options = load()
    path = in_tmp / "checkpoints" / "digits_wrn10_1.pt"
    kept, content = path.read_bytes(), running.read_classifier(path)
    assert equal(load()[0].state_dict(), teacher.state_dict()) and path.read_bytes() == kept
    assert options.teacher_name == "digits_wrn10_1" and not teacher.training and student.training
    assert common.DataSpec(**content["data"]) == DIGITS and content["seed"] == 0 and content["seconds"] > 0
    assert {"arch", "recipe", "versions", "device", "precision", "dataset"} <= set(content)
    test, _ = common.load_dataset("digits", False)
    score = common.accuracy(common.predict(teacher, test, DIGITS), test.labels)
    assert content["test_acc"] == pytest.approx(score)
    assert capsys.readouterr().out.count("training teacher") == 1
    path.unlink()
    for moment in ("after save 1", "before save 2", "after save 1"):
        with killed(moment):
            load()
        assert os.listdir("checkpoints") == ["digits_wrn10_1.partial"]
    load()
    assert equal(running.read_classifier(path)["weights"], content["weights"])
    assert os.listdir("checkpoints") == [path.name]
    monkeypatch.setitem(running.RECIPES, "digits", (4, 256))
    with pytest.raises(BadInput, match="recipe = .*--teacher checkpoints/digits_wrn10_1.pt"):
        load()
    assert equal(load(teacher="checkpoints/digits_wrn10_1.pt")[0].state_dict(), teacher.state_dict())


def test_a_teacher_by_itself_is_never_replaced(in_tmp, capsys):
    argv = ["--model", "wrn10_1", "--dataset", "digits", "--epochs", "1", "--batch-size", "512"]
    running.main(argv)
    assert "test accuracy" in capsys.readouterr().out
    assert running.read_classifier("checkpoints/digits_wrn10_1.pt")["recipe"]["epochs"] == 1
    for flags, words in (("", "is there already"), ("--out o.pt --dataset mnist99", "unknown data set"),
                         ("--out o.pt --model x", "unknown model x"),
                         ("--out o.pt --dataset imagenet", "no teacher is trained on imagenet")):
        assert words in refused(running, [*argv, *flags.split()], capsys)


def test_recipes_are_the_ones_that_reach_published_accuracies():
    assert running.recipe_of("resnet34", "cifar10") == dict(
        epochs=200, batch_size=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, schedule="cosine")
    assert running.recipe_of("lenet5", "mnist") == running.recipe_of("lenet5_half", "mnist") == dict(
        epochs=10, batch_size=256, optimizer="adam", lr=1e-3, weight_decay=0.0, schedule="cosine")
    assert running.recipe_of("lenet5_bn", "mnist")["optimizer"] == "sgd"


def test_networks_of_the_users_own_module(in_tmp, capsys):
    (in_tmp / "my_nets.py").write_text(
        "from torch.nn import Conv2d, Flatten, Linear, Sequential\n"
        "network = lambda: Sequential(Conv2d(1, 8, 3), Flatten(), Linear(288, 10))\n"
        "seven = lambda: Sequential(Flatten(), Linear(64, 7))\n"
        "large = lambda: Sequential(Flatten(), Linear(999, 10))\n"
        "class Auxiliary(Sequential):\n"
        "    def forward(self, x):\n"
        "        return (super().forward(x), x) if self.training else super().forward(x)\n"
        "auxiliary = lambda: Auxiliary(Conv2d(1, 8, 3), Flatten(), Linear(288, 10))\n")
    dafl.main([*tiny_args(dafl, "my_nets:network"), "--student", "my_nets:network", "--out", "out"])
    assert running.read_classifier("out/student.pt")["arch"] == "my_nets:network"
    running.main("--model my_nets:network --dataset digits --epochs 1".split())
    dafl.main([*tiny_args(dafl, "checkpoints/digits_my_nets_network.pt"), "--out", "own"])
    for name, words in (("seven", "finite logits"), ("large", "does not take images"),
                        ("auxiliary", "remove auxiliary classifiers")):
        assert words in refused(running, ["--model", f"my_nets:{name}", "--dataset", "digits"], capsys)
    assert os.listdir("checkpoints") == ["digits_my_nets_network.pt"]
    dafl.main([*tiny_args(dafl, "out/student.pt"), "--out", "next"])
    for name, words in (("my_nets:seven", "finite logits"), ("my_nets:large", "does not take images"),
                        ("my_nets:none", "could not be built"), ("no_nets:x", "could not be built")):
        for flag in ("--teacher", "--student"):
            assert words in refused(dafl, [*tiny_args(dafl, "my_nets:network"), flag, name], capsys)
    dafl.main([*tiny_args(dafl, "my_nets:auxiliary"), "--student", "my_nets:network", "--out", "third"])
    for method, teacher, student in ((dafl, "network", "auxiliary"), (regulated_kd, "auxiliary", "network")):
        flags = [*tiny_args(method, f"my_nets:{teacher}"), "--student", f"my_nets:{student}"]
        assert "cannot be trained" in refused(method, flags, capsys)


def test_inspect_says_what_a_network_has(teacher_file, in_tmp, capsys):
    (in_tmp / "looked_at.py").write_text(
        "from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, Sequential\n"
        "from common import DataSpec\n"
        "network = lambda: Sequential(Conv2d(3, 8, 3), BatchNorm2d(8), Conv2d(8, 4, 3), Flatten(),"
        " Linear(64, 7))\n"
        "pair = lambda: (network(), DataSpec((3, 8, 8), 7, (0.5,) * 3, (0.5,) * 3))\n"
        "wrong = lambda: (network(), DataSpec((3, 8, 8), 9, (0.5,) * 3, (0.5,) * 3))")
    for name, words in (
            ("looked_at:network", "7 classes|images  3x8x8, of those tried|1 layers|4, (N, 64)|3, (N, 4, |"
             "csd, rdskd, dafl, cudfkd, deepinversion|if it is right: csd.py --teacher-last-map 3"),
            ("looked_at:pair", "7 classes|images  3x8x8\n|1 layers"),
            (str(teacher_file), "10 classes|1x8x8|of bn, (N, 64, 2, 2)"),
            ("torchvision:swin_t", "1000 classes|BatchNorm  none|of head, (N, 768)|of avgpool, (N, 768, |"
             "not deepinversion, which needs BatchNorm")):
        running.main(["--inspect", name])
        said = re.sub(" {3,}", "  ", capsys.readouterr().out)
        assert all(word in said for word in words.split("|")), said
    for flags, words in (("--inspect torchvision:nothing", "could not be built"), ("", "is required"),
                         ("--inspect nowhere.pt", "no teacher file"), ("--inspect os:getpid", "not a torch"),
                         ("--inspect looked_at:wrong", "finite logits (N, 9)")):
        assert words in refused(running, flags.split(), capsys)


def test_a_teacher_for_another_set_or_with_other_weights_is_refused(in_tmp, capsys):
    for change in (dict(image_shape=(1, 16, 16)), dict(num_classes=7)):
        save_untrained("toy.pt", "wrn10_1", DIGITS._replace(**change))
        assert re.search("for image shape|for classes", refused(dafl, tiny_args(dafl, "./toy.pt"), capsys))
    content = torch.load(save_untrained("toy.pt", "wrn10_2"), weights_only=True)
    torch.save({**content, "arch": "wrn10_1"}, "toy.pt")
    assert "do not fit wrn10_1" in refused(dafl, tiny_args(dafl, "./toy.pt"), capsys)


def test_what_a_method_needs_is_asked_before_a_teacher_is_trained(in_tmp, monkeypatch, capsys):
    for part, label in ((part, label) for part in ("train", "test") for label in "ab"):
        (in_tmp / "odd" / part / label).mkdir(parents=True)
        Image.new("L", (10, 10)).save(in_tmp / "odd" / part / label / "0.png")
    monkeypatch.setattr(running, "train_teacher", None)         # would be called, and cannot be
    assert "no BatchNorm" in refused(deepinversion, "--dataset digits --teacher lenet5".split(), capsys)
    assert "no layer nowhere" in refused(csd, "--dataset digits --teacher-last-map nowhere".split(), capsys)
    makers = [method for method in METHODS if hasattr(method, "Generator") and method is not plain_inversion]
    for method in makers:                                       # plain_inversion makes images of any size
        argv = "--dataset folder:odd --preset digits --teacher wrn10_1 --student wrn10_1".split()
        assert "multiple" in refused(method, argv, capsys)


# ------------------------------------------------------------------------------------------ flags and presets
def parsed(method, text):
    more = dict(fits=surrogate_kd.fits) if method is surrogate_kd else {}
    names = method.__name__, method.__doc__, method.Settings, method.PRESETS
    return running.parse(*names, text.split(), **more)


WIDE = "--teacher wrn40_2 --student "


@pytest.mark.parametrize("method, flags, preset, dataset, teacher, student", [
    (csd, "", "cifar10", "cifar10", "resnet34", "resnet18"),
    (csd, WIDE + "wrn16_1", "cifar10-wrn40_2-wrn16_1", "cifar10", "wrn40_2", "wrn16_1"),
    (csd, "--preset cifar10-wrn40_2-wrn16_1", "cifar10-wrn40_2-wrn16_1", "cifar10", "wrn40_2", "wrn16_1"),
    (csd, "--preset cifar10-short", "cifar10-short", "cifar10", "resnet34", "resnet18"),
    (csd, "--preset digits", "digits", "digits", "wrn16_2", "wrn16_1"),
    (csd, "--dataset cifar10-val", "cifar10", "cifar10-val", "resnet34", "resnet18"),
    (csd, WIDE + "wrn16_1 --dataset cifar10-val", "cifar10-wrn40_2-wrn16_1", "cifar10-val", "wrn40_2",
     "wrn16_1"),
    (csd, "--dataset svhn", "svhn", "svhn", "wrn40_2", "wrn16_1"),
    (csd, "--teacher checkpoints/toy.pt", "digits", "digits", "checkpoints/toy.pt", "wrn16_1"),
    (csd, "--teacher checkpoints/toy.pt --dataset none", "digits", "none", "checkpoints/toy.pt", "wrn16_1"),
    (cudfkd, WIDE + "wrn40_1", "cifar10-wrn40_2-wrn40_1", "cifar10", "wrn40_2", "wrn40_1"),
    (cudfkd, WIDE + "wrn16_1 --dataset cifar100", "cifar100", "cifar100", "wrn40_2", "wrn16_1"),
    (cudfkd, WIDE + "resnet18", "cifar10", "cifar10", "wrn40_2", "resnet18"),
    (csd, "--teacher wrn16_2", "cifar10-cpu", "cifar10", "wrn16_2", "wrn16_1"),
    (csd, "--student resnet18", "cifar10", "cifar10", "resnet34", "resnet18"),
    (csd, "--preset cifar10 --dataset cifar100 --student vgg8", "cifar10", "cifar100", "resnet34", "vgg8"),
    (plain_inversion, "", "cifar10", "cifar10", "resnet34", "resnet18"),
    (surrogate_kd, "--surrogate folder:x", "cifar10-real", "cifar10", "resnet34", "resnet18"),
    (surrogate_kd, "--surrogate noise", "cifar10", "cifar10", "resnet34", "resnet18"),
    (dafl, "--dataset mnist", "mnist", "mnist", "lenet5", "lenet5_half"),
    (deepinversion, "--dataset imagenet", "imagenet", "imagenet", "torchvision:resnet50",
     "torchvision:resnet18")])
def test_a_preset_is_found_by_name_networks_or_data_set(
        method, flags, preset, dataset, teacher, student, teacher_file):
    options, settings = parsed(method, flags)
    wanted = dataclasses.replace(method.PRESETS[preset].settings, **(
        {"surrogate": flags.split()[1]} if "--surrogate" in flags else {}))
    assert settings == wanted and {*options.changed} <= {"surrogate"}
    found = options.preset, options.dataset, options.teacher, options.student
    assert found == (preset, dataset, teacher, student)


def test_a_teachers_file_knows_its_data_set_better_than_a_preset(in_tmp):
    """But --preset mnist-cpu scores students of a teacher of mnist-val on MNIST's test images."""
    for made_with, dataset in (("fashion_mnist", "fashion_mnist"), ("mnist-val", "mnist"), ("none", "none")):
        save_untrained("t.pt", "lenet5", common.DATASETS["mnist"], made_with)
        assert parsed(dafl, "--preset mnist-cpu --teacher t.pt")[0].dataset == dataset
    assert parsed(dafl, "--preset mnist-cpu --teacher t.pt --dataset mnist")[0].dataset == "mnist"


def test_flags_beat_the_preset_and_are_named_as_changed():
    options, settings = parsed(csd, "--preset digits --epochs 3 --csd 0 --raw-head --seed 7 --batch-size 64")
    assert (settings.epochs, settings.csd, settings.raw_head, settings.seed) == (3, 0.0, True, 7)
    assert options.changed == {"epochs": 3, "csd": 0.0, "raw_head": True}
    assert parsed(csd, "--preset digits --no-raw-head")[1] == csd.PRESETS["digits"].settings


HUGE = "--teacher nowhere/t.pt --preset digits --{} 1" + 30 * "0"
BAD_FLAGS = {
    "must be above 0": "--epochs 0|--epochs -3|--batch-size 0|--temperature 0|--lr-student 0|--eval-every 0|"
                       "--lr-student nan|--lr-student inf|--threads 0|--threads -1",
    "must be at least 0": "--seed -1", "under 4294967296": "--seed 4294967296",
    "invalid": "--epochs ten|--epochs 1.5|--lr-student 0x1|--precision fp16|--threads two",
    "must be": "|".join([*map(HUGE.format, ("batch-size", "threads", "seed")), "--epochs 1" + 400 * "0"]),
    "unknown model": "--teacher resnet99|--student wrn16|--student t.pt|--student wrn17_1",
    "expected one argument": "--epochs|--out|--dataset",
    "unknown data set imagewoof; choose from digits": "--dataset imagewoof", "unknown device": "--device tpu",
    "no preset cifar99; choose from ": "--preset cifar99", "no preset for data": "--dataset mnist28",
    "one folder a class": "--dataset folder:nowhere --preset {preset}|--dataset folder: --preset {preset}",
    "the size after @": "--dataset folder:x@0 --preset {preset}|--dataset folder:x@9999 --preset {preset}",
    "no device": "--device cuda:99", "tf32 is for CUDA": "--precision tf32 --device cpu",
    "unrecognized": "--no-such-flag 1|--epoch 3",
    "--resume needs --out": "--resume", "no teacher file": "--teacher nowhere/t.pt|--teacher ./",
    "needs a --teacher file": "--dataset none|--dataset none --teacher torchvision:resnet18",
    "could not be built": "--preset digits --student torchvision:net99|--preset digits --student nowhere:net",
    "cannot be a run folder": "--out " + 300 * "a"}


@each(METHODS)
@pytest.mark.parametrize("words, flags", [(w, flags) for w, f in BAD_FLAGS.items() for flags in f.split("|")])
def test_bad_flags_are_refused_in_a_sentence(method, words, flags, in_tmp, capsys):
    assert words in refused(method, flags.format(preset=next(iter(method.PRESETS))).split(), capsys)


def test_a_cuda_device_without_a_number_is_the_first(monkeypatch):
    """torch.cuda.set_device refuses a device without one, since PyTorch 2.11 at the latest."""
    taken, cudnn, matmul = [], torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(
        torch.device(device).index if isinstance(device, (str, torch.device)) else device))
    try:
        for name, number in ((None, 0), ("cuda", 0), ("cuda:1", 1)):
            options = SimpleNamespace(device=name, precision=None, threads=None, deterministic=False)
            running.set_up_device(options)
            assert taken.pop() == number and options.precision == "tf32" and options.device.type == "cuda"
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


@each(METHODS)
def test_a_bad_value_of_any_setting_is_refused_and_named(method, in_tmp, capsys):
    """Of a wrong type, below the range, not a number, too large to be meant, not among the choices."""
    wrong = {int: ["x", "1.5", "-1", "nan", "1" + 30 * "0"], float: ["x", "-1", "nan", "inf", "1" + 30 * "0"]}
    fields = dataclasses.fields(method.Settings)
    for flag, values in (("--" + field.name.replace("_", "-"), wrong.get(field.type, ["nothing"]))
                         for field in fields if field.type not in (bool, str)):
        for value in values:
            assert flag in refused(method, [flag, value], capsys), value


def pictures(folder, classes, parts=("train", "test"), modes=("RGB",), sizes=(8,)):
    """Class folders of pictures."""
    for part, label, (number, mode) in itertools.product(parts, classes, enumerate(modes)):
        path = folder / part / label
        path.mkdir(parents=True, exist_ok=True)
        side = sizes[number % len(sizes)]
        Image.new(mode, (side, side), number).save(path / f"{number}.png")


@each(METHODS)
def test_folders_of_images_that_cannot_be_a_data_set(method, in_tmp, capsys, monkeypatch):
    monkeypatch.setattr(common, "augment", None)               # what a training would call
    pictures(in_tmp / "one", "a")
    pictures(in_tmp / "half", "ab", parts=["train"])
    pictures(in_tmp / "mixed", "ab", modes=("RGB", "L"), sizes=(8, 9))
    pictures(in_tmp / "other", "ab", parts=["train"])
    pictures(in_tmp / "other", "bc", parts=["test"])
    pictures(in_tmp / "broken", "ab")
    (in_tmp / "broken" / "train" / "a" / "1.png").write_bytes(b"no image")
    pictures(in_tmp / "hollow", "ab")
    (in_tmp / "hollow" / "train" / "c").mkdir()
    (in_tmp / "empty" / "train").mkdir(parents=True)
    (in_tmp / "file").write_text("no folder")
    for name, words in (("one", "at least two"), ("half", "one folder a class"), ("mixed", "differ in size"),
                        ("other", "different class folders"), ("broken", "no whole image"),
                        ("file", "folder"), ("hollow", "no class folders"), ("empty", "no class"),
                        ("no", "folder")):
        argv = f"--dataset folder:{name} --preset digits --teacher wrn10_1 --student wrn10_1".split()
        assert words in refused(method, argv, capsys), name


def test_grey_pictures_and_some_with_alpha_are_a_data_set(in_tmp):
    pictures(in_tmp / "set", "ab", modes=("RGB", "L", "RGBA", "P"))
    assert common.load_dataset("folder:set", True)[0].pixels.shape == (8, 3, 8, 8)
    pictures(in_tmp / "half", "ab", parts=["train"], modes=["L"])
    pictures(in_tmp / "half", "ab", parts=["test"], modes=["RGB"])     # so none is read as grey
    for train in (True, False):
        images, data = common.load_dataset("folder:half", train)
        assert images.pixels.shape[1:] == data.image_shape == (3, 8, 8) and len(data.mean) == 3
    pictures(in_tmp / "half", "ab", parts=["test"], sizes=[9])
    with pytest.raises(common.BadInput, match="differ in size"):
        common.load_dataset("folder:half", True)


def test_pictures_are_turned_as_the_camera_was_held(in_tmp):
    picture, exif = Image.new("RGB", (8, 8)), Image.Exif()
    picture.putpixel((0, 0), (255, 255, 255))
    exif[0x0112] = 6                                           # to be turned by a quarter, clockwise
    picture.save("turned.png", exif=exif)
    assert common.real_pictures("folder:.")[1]([0], 8)[0, 0, 0, 7] == 1


@each(METHODS)
def test_help_has_every_setting_with_its_comment_and_every_preset(method, capsys):
    with pytest.raises(SystemExit) as stop:
        method.main(["--help"])
    text = "".join(capsys.readouterr().out.split())            # lines are broken at hyphens, too
    fields = re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(method.Settings), re.M)
    assert stop.value.code == 0 and len(fields) > 15 and all(name in text for name in method.PRESETS)
    assert {name for name, _ in fields} == {*method.Settings.__dataclass_fields__}
    for name, comment in fields:
        assert "--" + name.replace("_", "-") in text and comment.replace(" ", "") in text, name


# ------------------------------------------------------------------------------------------------ run folders
def test_folders_are_numbered_and_never_used_twice(teacher_file, in_tmp, capsys, monkeypatch):
    args = tiny_args(dafl, teacher_file)
    for _ in range(2):
        dafl.main(args)
    assert sorted(os.listdir("runs")) == ["dafl-digits-001", "dafl-digits-002"]
    (in_tmp / "mine").mkdir()
    (in_tmp / "mine" / "samples.png").write_text("mine")
    before = files_of()
    for out, words in (("runs/dafl-digits-001", "holds a run already"), ("mine", "holds a run already"),
                       ("mine/samples.png", "is a file"), ("mine/samples.png/deeper", "is a file")):
        assert words in refused(dafl, [*args, "--out", out], capsys) and files_of() == before
    said = refused(rdskd, [*tiny_args(rdskd, teacher_file), "--generator", "mine/samples.png/x"], capsys)
    assert "the folder of --generator" in said and "is a file" in said and files_of() == before
    (in_tmp / "mine" / "samples.png").rename(in_tmp / "mine" / "notes.txt")
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "access", lambda path, mode: False)
        assert "is read-only" in refused(dafl, [*args, "--out", "mine"], capsys)
    dafl.main([*args, "--out", "mine"])
    assert (in_tmp / "mine" / "notes.txt").read_text() == "mine" and rows_of("mine")[-1]["event"] == "end"


@pytest.mark.parametrize("moment", ["teacher", "bank", "epoch 0", "epoch 1"])
def test_ctrl_c_says_how_to_go_on(moment, teacher_file, in_tmp, capsys, monkeypatch):
    save = running.Loop.save

    def interrupted(self, *args):
        loops = {running.Loop: "teacher", running.Stage: "bank", running.Run: f"epoch {args[0]}"}
        if moment == loops[type(self)]:
            signal.raise_signal(signal.SIGINT)
        save(self, *args)
    args = tiny_args(csd, "wrn10_1" if moment == "teacher" else teacher_file)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)      # background jobs ignore it
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(running.Loop, "save", interrupted)
        csd.main(args)
    signal.signal(signal.SIGINT, before)
    said, _, more = capsys.readouterr().err.partition("type the same command again")
    assert stop.value.code == 130 and said == "stopped; to go on, "
    assert more == ("\n" if moment == "teacher" else " with --resume --out runs/csd-digits-001\n")
    if moment != "teacher":
        csd.main([*args, *more.split()[1:]])
        assert rows_of("runs/csd-digits-001")[-1]["event"] == "end"


def test_the_first_epoch_says_how_long_the_others_take(teacher_file, in_tmp, capsys, monkeypatch):
    found = running.describe

    def describe(*args):                                       # each epoch seems to take 90 seconds
        running.Loop.latest.began -= 90
        return found(*args)
    monkeypatch.setattr(running, "describe", describe)
    dafl.main([*tiny_args(dafl, teacher_file, epochs=3), "--out", "out"])
    said = capsys.readouterr().out
    assert said.count("at this speed the other epochs take 3 minutes") == said.count("at this speed") == 1


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loss_that_is_not_finite_names_its_epoch(epoch, teacher_file, in_tmp, capsys, monkeypatch):
    """And that epoch's state is not saved."""
    found, calls = dafl.kd_loss, []
    monkeypatch.setattr(dafl, "kd_loss", lambda *args: calls.append(1) or found(*args) * (
        math.inf if len(calls) > 1 + 3 * epoch else 1))        # three steps an epoch
    with pytest.raises(SystemExit) as stop:
        dafl.main([*tiny_args(dafl, teacher_file), "--out", "out"])
    error, checkpoint = capsys.readouterr().err, in_tmp / "out" / "checkpoint.pt"
    assert stop.value.code == 1 and re.search(f"loss_kd became (nan|inf) in epoch {epoch}", error)
    assert error.count("\n") == 1 and ("out/checkpoint.pt" in error) == checkpoint.exists() == (epoch == 1)
    assert epoch == 0 or torch.load(checkpoint, weights_only=True)["epoch"] == 0


def test_a_full_gpu_is_named_with_the_flag_to_lower(teacher_file, in_tmp, capsys, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    monkeypatch.setattr(dafl, "kd_loss", out_of_memory)
    with pytest.raises(SystemExit) as stop:
        dafl.main(tiny_args(dafl, teacher_file))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "memory is full; lower --batch-size" in error


VARIED, EVEN = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10
ALIKE, ONE, FEW = 0.5 + 0.001 * VARIED, 0 * EVEN + 3, (EVEN > 8).long()


@pytest.mark.parametrize("pixels, labels, words", [
    (VARIED, EVEN, []), (VARIED, None, []), (None, None, []), (VARIED[:4], EVEN[:4], []),
    (ALIKE, EVEN, ["hardly differ"]), (VARIED, ONE, ["all its images are in class 3"]),
    (VARIED, FEW, ["entropy of its classes is 0.14"]), (ALIKE, ONE, ["hardly differ", "in class 3"])])
def test_the_three_signs_of_a_collapse(pixels, labels, words):
    common.COSTS.clear()
    common.COSTS.update(seconds_a=1.0, teacher_queries=5)
    *warning, row = running.describe("epoch", 7, {"loss": 1.0}, pixels, labels, 10)
    assert len(warning) == bool(words) and all(word in warning[0]["text"] for word in words)
    known = {"event": "epoch", "epoch": 7, "loss": 1.0, "seconds_a": 1.0, "teacher_queries": 5}
    assert known.items() <= row.items() and common.COSTS == {"teacher_queries": 5}
    assert labels is None or row["class_counts"] == torch.bincount(labels, minlength=10).tolist()


def test_a_collapse_is_named_and_the_run_goes_on(teacher_file, in_tmp, monkeypatch, capsys):
    forward = dafl.Generator.forward
    monkeypatch.setattr(dafl.Generator, "forward", lambda self, z: 0.1 + 0 * forward(self, z))
    dafl.main([*tiny_args(dafl, teacher_file), "--out", "out"])
    assert [row["event"] for row in rows_of("out")] == ["start", "warning", *["collapse", "epoch"] * 2, "end"]
    assert capsys.readouterr().out.count("its images hardly differ, all its images are in class") == 2


def test_the_picture_has_a_row_a_class_with_its_last_images(tmp_path):
    pixels = torch.arange(12).view(12, 1, 1, 1).expand(-1, 1, 20, 20) / 12
    running.save_samples(tmp_path / "s.png", pixels, torch.tensor([0] * 10 + [2] * 2), 3)
    sheet = Image.open(tmp_path / "s.png").convert("L")
    seen = [[sheet.getpixel((46 + 42 * column, 22 + 42 * row)) for column in range(8)] for row in range(3)]
    grey = [int(255 * i / 12) for i in range(12)]
    assert seen == [grey[2:10], [0] * 8, grey[10:] + [0] * 6] and os.listdir(tmp_path) == ["s.png"]
    running.save_samples(tmp_path / "s.png", pixels.expand(-1, 4, -1, -1), torch.zeros(12), 3)
    assert abs(Image.open(tmp_path / "s.png").getpixel((46, 22))[0] - grey[4]) <= 1    # shown in grey


def test_checkpoints_and_caches_of_older_versions_are_refused(teacher_file, in_tmp, capsys):
    """Then a checkpoint held the log's rows, and a bank was a file."""
    args = [*tiny_args(csd, teacher_file), "--out", "out", "--resume"]
    with killed("after save 3"):                               # two rounds of the bank, then an epoch
        csd.main(args)
    content = torch.load("out/checkpoint.pt", weights_only=True)
    content["rows"] = content.pop("log_bytes")
    torch.save(content, "out/checkpoint.pt")
    assert "is not a checkpoint of this version of the program" in refused(csd, args, capsys)
    Path("old.pt").write_bytes(b"")
    args = [*tiny_args(csd, teacher_file), "--out", "new", "--bank", "old.pt"]
    assert "old.pt is a file; --bank names a folder" in refused(csd, args, capsys)


def test_a_log_that_lost_its_end_is_refused_and_one_that_grew_is_cut(teacher_file, in_tmp, capsys):
    args = [*tiny_args(dafl, teacher_file, epochs=3), "--out", "out", "--resume"]
    with killed("after save 2"):
        dafl.main(args)
    log, whole = Path("out/log.jsonl"), Path("out/log.jsonl").read_bytes()
    log.write_bytes(whole[:-9])
    assert "is shorter than it was" in refused(dafl, args, capsys)
    log.write_bytes(whole + b'{"event": "note", "text": "written after the checkp')
    dafl.main(args)
    assert [row["epoch"] for row in rows_of("out") if row["event"] == "epoch"] == [0, 1, 2]


def test_what_an_examiner_broke(teacher_file, in_tmp, capsys, monkeypatch):
    """A lost checkpoint, a stage's folder as a run's, a run's as a stage's, a folder that was taken."""
    args = tiny_args(csd, teacher_file, epochs=3)
    csd.main([*args, "--out", "run", "--bank", "bank", "--keep-epochs"])
    with killed("after save 2"):
        csd.main([*args, "--out", "lost", "--bank", "bank"])
    Path("lost/checkpoint.pt").unlink()
    before = files_of()
    for flags, words in (("--out lost --bank bank --resume", "a log and no checkpoint.pt"),
                         ("--out bank --bank other --resume", "is finished"),
                         ("--out new --bank run", "is the folder of a run; --bank needs another one")):
        assert words in refused(csd, [*args, *flags.split()], capsys) and files_of() == before
    reuse = running.Run.reuse

    def slow(self, *arguments, **more):                        # meanwhile another process uses the folder
        Path("taken").mkdir()
        Path("taken/student.pt").write_bytes(b"theirs")
        return reuse(self, *arguments, **more)
    monkeypatch.setattr(running.Run, "reuse", slow)
    with pytest.raises(SystemExit):
        csd.main([*args, "--out", "taken", "--bank", "bank"])
    assert "has used taken meanwhile" in capsys.readouterr().err
    assert Path("taken/student.pt").read_bytes() == b"theirs"


def test_kept_epochs_are_there_before_their_checkpoint(teacher_file, in_tmp):
    args = [*tiny_args(dafl, teacher_file, epochs=3), "--out", "out", "--keep-epochs", "--resume"]
    for moment in ("after save 1", "after save 1"):
        with killed(moment):
            dafl.main(args)
    dafl.main(args)
    assert sorted(path.name for path in Path("out/epochs").iterdir()) == ["0.pt", "1.pt", "2.pt"]


def test_the_counts_of_one_set_of_images_are_refused_for_another(teacher_file, in_tmp, capsys):
    args = tiny_args(regulated_kd, teacher_file)
    regulated_kd.main([*args, "--out", "one"])
    load = regulated_kd.load_dataset

    def others(*arguments):
        images, data = load(*arguments)
        return images._replace(pixels=images.pixels.flip(0)), data
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(regulated_kd, "load_dataset", others)
        regulated_kd.main([*args, "--out", "two"])
    assert " images = " in capsys.readouterr().err


def test_inspect_takes_layers_with_named_and_odd_inputs(in_tmp, capsys):
    (in_tmp / "odd.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Join(nn.Module):\n"
        "    def forward(self, parts):\n        return torch.cat(parts, 1)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.c, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)\n"
        "        self.join, self.fc = Join(), nn.Linear(8, 5)\n"
        "    def forward(self, x):\n"
        "        x = self.bn(input=self.c(x))\n"
        "        return self.fc(input=self.join([x, x]).mean((2, 3)))\n")
    running.main(["--inspect", "odd:Net"])
    said = capsys.readouterr().out
    assert "BatchNorm         1 layers" in said and "input of fc, (N, 8)" in said


def test_a_run_that_waited_goes_on_from_what_another_process_left(teacher_file, in_tmp, capsys, monkeypatch):
    args = [*tiny_args(csd, teacher_file, epochs=3), "--out", "out", "--bank", "bank", "--resume"]
    with killed("after save 3"):                               # two rounds of the bank, then an epoch
        csd.main(args)
    reuse, waited = running.Run.reuse, []

    def slow(self, *arguments, **more):                        # meanwhile another process finishes the run
        if not waited:
            waited.append(1)
            csd.main(args)
        return reuse(self, *arguments, **more)
    monkeypatch.setattr(running.Run, "reuse", slow)
    with pytest.raises(SystemExit):
        csd.main(args)
    assert "the run in out is finished" in capsys.readouterr().err
    rows = rows_of("out")
    assert [row["epoch"] for row in rows if row["event"] == "epoch"] == [0, 1, 2]
    assert rows[-1]["event"] == "end"
