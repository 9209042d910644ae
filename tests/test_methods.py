"""What holds for every method: who learns, what is left behind, what a run keeps, what a kill changes."""
import contextlib
import dataclasses
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import sklearn.datasets
import torch
import torch.nn as nn
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import common
import running
from conftest import (METHODS, THREADS, TINY, csd, cudfkd, dafl, deepinversion, plain_inversion, rdskd,
                      real_images, regulated_kd, surrogate_kd, tiny_args, tiny_networks, tiny_settings)
from helpers import equal, refused, rows_of, run_script, save_untrained, sure, weights_of


def each(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.__name__)


# What a method makes once for all students of a teacher: its event in the log, its maker, the settings that
# shape it, and what is read there without effect (weights of terms that need a student, a seed that is 0) or
# told apart only where there are pictures (test_plain_inversion.py).
STAGES = {csd: ("bank", "synthesize_bank", "OF_BANK", {"csd", "adversarial"}),
          plain_inversion: ("bank", "synthesize_bank", "OF_BANK", {"statistics", "statistics_from"}),
          rdskd: ("generator", "train_generator", "OF_GENERATOR", set()),
          deepinversion: ("pool", "synthesize_pool", "OF_POOL", {"competition"}),
          regulated_kd: ("significance", "train_regulated_teacher", "OF_TEACHER", {"seed"}),
          surrogate_kd: ("pool", "balanced_pool", "OF_POOL", set())}


def trained(method, teacher=None, student=None, **changes):
    """The student's weights after `distill` without a run."""
    usual_teacher, usual_student, data = tiny_networks()
    teacher = usual_teacher if teacher is None else teacher    # a compiled one has no truth value
    student = usual_student if student is None else student
    settings = tiny_settings(method, **changes)
    method.distill(teacher, student, data, settings, **real_images(method, teacher, data, settings))
    return weights_of(student)


def looks(network):
    """All that a pass could leave on a network, but for its weights."""
    return {name: (module.training, len(module._forward_pre_hooks), len(module._forward_hooks),
                   "forward" in vars(module), [p.requires_grad for p in module.parameters(recurse=False)])
            for name, module in network.named_modules()}


def files_of(folder="."):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------ distill, without a run
@each(METHODS)
def test_the_student_moves_and_all_else_is_as_it_was(method, in_tmp, capsys, monkeypatch):
    """Teacher, random stream, disk, screen, bit by bit. Every way to real data raises meanwhile."""
    teacher, student, data = tiny_networks()
    teacher.groups[0].eval()                                   # a mode and a flag that must come back
    teacher.conv1.weight.requires_grad_(False)
    settings = tiny_settings(method)
    images = real_images(method, teacher, data, settings)
    before, untrained = weights_of(teacher), weights_of(student)
    others = looks(teacher), looks(student), torch.get_rng_state()

    def forbidden(*args, **more):
        raise AssertionError("distill asked for data")
    places = [(common, name) for name in ("load_dataset", "_read_torchvision", "_read_folder", "predict")]
    places += [(torchvision.datasets, name) for name in torchvision.datasets.__all__]
    places += [(method, "load_dataset"), (sklearn.datasets, "load_digits")]
    for place, name in [*places, (torch.utils.data.DataLoader, "__init__")]:
        monkeypatch.setattr(place, name, forbidden, raising=False)
    method.distill(teacher, student, data, settings, **images)
    assert equal(before, weights_of(teacher)) and others[:2] == (looks(teacher), looks(student))
    assert all(p.grad is None for p in teacher.parameters()) and torch.equal(others[2], torch.get_rng_state())
    assert not any(torch.equal(untrained[name], value) for name, value in weights_of(student).items())
    assert not list(in_tmp.iterdir()) and capsys.readouterr() == ("", "")


@each(METHODS)
def test_the_seed_of_the_settings_decides_and_no_other(method):
    results = []
    for seed, of_the_caller in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(of_the_caller)
        results.append(trained(method, seed=seed))
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@each(METHODS)
def test_a_compiled_network_gives_the_same_student_and_a_traced_one_is_refused(method):
    """Compiled graphs may ignore hooks, and the BatchNorm term would be 0 without a word."""
    *networks, data = tiny_networks()
    compiled = [torch.compile(network, backend="eager").eval() for network in networks]
    for network in compiled:                                   # its graph is made before there is a hook
        network(torch.rand(4, *data.image_shape))
    trained(method, *compiled)
    assert equal(trained(method), weights_of(networks[1]))
    with pytest.raises(common.BadInput, match="must be a torch.nn.Module"):
        trained(method, networks[0], torch.jit.script(nn.Linear(2, 2)))


@each(METHODS)
@pytest.mark.parametrize("whose", [0, 1], ids=["teacher", "student"])
def test_hooks_and_flags_are_back_after_an_exception(method, whose):
    """Raised in the first, second, middle and last forward pass of the network."""
    def passes_until(last):
        passes, networks, stream = [], tiny_networks()[:2], torch.get_rng_state()

        def stop(module, inputs):
            passes.append(module)
            if len(passes) == last:
                raise KeyError
        networks[whose].register_forward_pre_hook(stop)
        before, weights = [looks(network) for network in networks], weights_of(networks[0])
        with contextlib.suppress(KeyError, common.BadInput):     # raised while the network is looked at first
            trained(method, *networks)
        if len(passes) == last:                      # the student, which is trained, may be in another mode
            assert before[0] == looks(networks[0]) and equal(weights, weights_of(networks[0]))
            assert all(look[1:] == before[1][name][1:] for name, look in looks(networks[1]).items())
            assert torch.equal(stream, torch.get_rng_state())
        return len(passes)
    total = passes_until(math.inf)
    for last in sorted({1, 2, total // 2, total}):
        assert passes_until(last) == last


@each(METHODS)
def test_a_loss_that_is_not_finite_stops_and_is_named(method):
    with pytest.raises(FloatingPointError, match=r"^loss\w* became (nan|inf)$"):
        trained(method, lr_student=math.inf)


@each(METHODS)
def test_networks_that_are_not_of_common(method):
    with common.seeded(0):
        teacher, student = (nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                                          nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 10)) for _ in range(2))
    before, untrained = weights_of(teacher), weights_of(student)
    weights = trained(method, teacher, student)
    assert equal(before, weights_of(teacher))
    assert not any(torch.equal(untrained[name], value) for name, value in weights.items())


class EpochOver(Exception):
    pass


@each(METHODS)
def test_no_step_uses_another_device_or_waits_for_a_number(method, monkeypatch):
    """Tensors without content, on a device that does not exist: one from the CPU raises, and so does .item().

    Excepted are choices whose shapes depend on data: the images that regulated_kd and surrogate_kd's
    attack pick, the shifts of deepinversion's pictures, the draws of torchvision's augmentation, the order
    in which answered batches come again (drawn on the CPU).
    """
    special = {regulated_kd: dict(mode="kd"), surrogate_kd: dict(randaugment=0, elastic=False),
               plain_inversion: dict(visits=1)}
    settings = tiny_settings(method, epochs=1, **special.get(method, {}))
    images, steps = real_images(method, *tiny_networks()[::2], settings), []

    def to(network, device, **more):                           # torch's own cannot move such tensors
        for module in network.modules():
            module._parameters.update({name: nn.Parameter(value.detach().to(device), value.requires_grad)
                                       for name, value in module.named_parameters(recurse=False)})
            module._buffers.update({name: value.to(device) for name, value in module._buffers.items()})
        return network

    def take(self):
        steps.append(self.counts)
        if self.counts.keys() & {"loss", "loss_kd"}:           # the student's
            raise EpochOver
        return {}
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(common, "check_answers", lambda *args, **more: None)     # it reads numbers, once
    monkeypatch.setattr(common.Means, "take", take)
    monkeypatch.setattr(deepinversion, "random_int", lambda below: below // 2)
    common._on_device.cache_clear()
    with FakeTensorMode() as mode, torch.autograd.set_multithreading_enabled(False):
        teacher, student, data = tiny_networks()

        def moved(value):
            return mode.from_tensor(value).to("lazy:0") if torch.is_tensor(value) else value
        images = {name: type(value)(*map(moved, value)) if isinstance(value, tuple) else moved(value)
                  for name, value in images.items()}
        with pytest.raises(EpochOver):
            method.distill(teacher.to("lazy:0"), student.to("lazy:0"), data, settings, **images)
        for wrong in (lambda: torch.ones(2, device="lazy:0") + torch.ones(2),
                      lambda: torch.ones(2, device="lazy:0").sum().item()):
            with pytest.raises((RuntimeError, DataDependentOutputException)):
                wrong()
    common._on_device.cache_clear()
    losses = {name for counts in steps for name in counts}
    assert min(count for counts in steps for count in counts.values()) > 1 and losses & {"loss", "loss_kd"}
    assert method in (regulated_kd, surrogate_kd) or "loss_oh" in losses


# The other value of a setting is twice as large, one more, another choice, or what stands here.
OTHER = dict(
    teacher_last_map="groups", student_last_map="groups", beta1=0.5, beta2=0.5, pool_batches=3, round_steps=4,
    student_steps=6, synthesis_batch_size=12, surrogate="leaves", statistics_from="photographs",
    magnitude=28, attacks=1,
    attack_iterations=1, attack_threshold=0.11, deeper_step=20.0, normalization="mean1", ramp_begin=0.5,
    ramp_end=1.0)
# What else has to be set, so that a setting matters.
RAMP, SURE, WEIGHTED = dict(epochs=4, adversarial_end=50.0), dict(alpha_epochs=0.2), dict(mode="significance")
ATTACK = dict(boundary_attack=True, attack_step=20.0, deeper_step=60.0)
COMPANY = dict(
    l2_per_image=dict(l2=1.0),
    statistics=dict(statistics_from="photographs"),
    adversarial_end=RAMP, ramp=RAMP, ramp_begin=RAMP, ramp_end=RAMP,
    alpha_epochs=SURE, confidence=SURE, confidence_temperature=SURE,
    scan_batch_size=dict(queue=True), normalization=WEIGHTED, teacher_epochs=dict(WEIGHTED, optimizer="sgd"),
    attack_share=ATTACK, attacks=ATTACK, attack_target=ATTACK, attack_step=ATTACK, attack_radius=ATTACK,
    attack_iterations=ATTACK, attack_threshold=ATTACK, deeper_step=ATTACK)
UNSEEN = {"images_per_pass"}     # cuts a pass of networks in eval mode into parts: the same images


@pytest.mark.slow
@each(METHODS)
def test_every_setting_changes_the_student(method, in_tmp):
    """In `distill`, or in the script where distill does not read it."""
    save_untrained("toy.pt", "wrn10_1")
    results, dead = {}, set()

    def weights(by_script, changes):
        key = by_script, tuple(sorted(changes.items()))
        if key not in results and by_script:
            shutil.rmtree("out", ignore_errors=True)
            shutil.rmtree("checkpoints", ignore_errors=True)
            method.main([*tiny_args(method, "./toy.pt", **changes), "--out", "out"])
            results[key] = running.read_classifier("out/student.pt")["weights"]
        elif key not in results:
            results[key] = trained(method, sure(tiny_networks()[0]), **changes)
        return results[key]
    for field in fields(method.Settings):
        company = COMPANY.get(field.name, {})
        value = getattr(tiny_settings(method, **company), field.name)
        if field.name in OTHER:
            other = OTHER[field.name]
        elif get_args(field.type):
            other = next(choice for choice in get_args(field.type) if choice != value)
        else:
            other = not value if field.type is bool else value + 1 if field.type is int else 2 * value or 0.5
        changes = {**company, field.name: other}
        if all(equal(weights(how, company), weights(how, changes)) for how in (False, True)):
            dead.add(field.name)
    assert dead <= UNSEEN


# The authors' numbers, as their scripts, papers and readers' notes have them; a preset must not lose one.
AUTHORS = {
    (csd, "cifar10-wrn40_2-wrn16_1"): dict(
        epochs=100, student_steps=2000, batch_size=128, lr_student=0.1, weight_decay=1e-4, temperature=20,
        kd=1, ce=1, feature=30, lr_head=0.1, synthesis_batch_size=200, synthesis_steps=200, lr_generator=1e-3,
        latent_dim=256, oh=1, bn=1, csd=10, adversarial=0, bank_rounds=400, bank_synthesis_steps=500),
    (dafl, "mnist"): dict(
        epochs=200, student_steps=120, batch_size=512, latent_dim=100, lr_generator=0.2, lr_student=2e-3,
        student_optimizer="adam", schedule="constant", weight_decay=0, oh=1, ie=5, act=0.1),
    (dafl, "cifar10"): dict(
        epochs=2000, student_steps=120, batch_size=1024, latent_dim=1000, lr_generator=0.02, lr_student=0.1,
        student_optimizer="sgd", schedule="steps", weight_decay=5e-4, oh=0.05, ie=5, act=0.01),
    (dafl, "cifar100"): dict(epochs=2000, batch_size=1024, lr_generator=0.02, oh=0.5, ie=20, act=0.1),
    (rdskd, "mnist"): dict(
        epochs=1000, student_steps=120, batch_size=512, generator_epochs=20, generator_steps=120,
        temperature=10, synthesis_batch_size=512, latent_dim=100, lr_generator=1e-3, lr_student=2e-3,
        weight_decay=0, student_optimizer="adam", schedule="constant"),
    (rdskd, "cifar10"): dict(epochs=1000, batch_size=512, latent_dim=1000, lr_student=2e-3, schedule="steps"),
    (deepinversion, "cifar10"): dict(
        synthesis_batch_size=256, synthesis_steps=2000, lr_images=0.05, beta1=0.9, beta2=0.999, oh=1, bn=10,
        tv=2.5e-5, l2=0, jitter=2, mirror=False, clip=False, pool_batches=1000, student_steps=50,
        temperature=3),
    (cudfkd, "cifar10"): dict(epochs=250, batch_size=512, student_loss="l1", temperature=20, age_start=2),
    (cudfkd, "cifar10-wrn40_2-wrn16_1"): dict(epochs=250, batch_size=1024, student_loss="kl", temperature=20),
    (cudfkd, "cifar100"): dict(epochs=400, batch_size=768, student_loss="l1", temperature=5, age_start=1),
    (regulated_kd, "mnist"): dict(alpha_epochs=1.6, hard=0.3, optimizer="adam", lr_student=1e-3),
    (surrogate_kd, "cifar10"): dict(
        epochs=400, batch_size=256, lr_student=0.1, weight_decay=1e-4, temperature=20, pool_images=50_000,
        randaugment=4, magnitude=14, elastic=True, invert=0.1, mixup=True, attack_threshold=0.9),
    (surrogate_kd, "cifar10-real"): dict(temperature=2, randaugment=2, elastic=False, invert=0)}


@pytest.mark.parametrize("method, preset", AUTHORS, ids=lambda value: getattr(value, "__name__", value))
def test_presets_hold_the_authors_numbers(method, preset):
    found = dataclasses.asdict(method.PRESETS[preset].settings)
    assert {name: found[name] for name in AUTHORS[method, preset]} == AUTHORS[method, preset]


# ------------------------------------------------------------------------------------------------- by script
def seconds_in(rows):
    return sum(value for row in rows for name, value in row.items() if name.startswith("seconds_"))


@each(METHODS)
def test_a_run_leaves_what_it_promises(method, teacher_file, in_tmp, capsys):
    method.main([*tiny_args(method, teacher_file), "--out", "out"])
    rows, out = rows_of("out"), capsys.readouterr().out
    start, *epochs, end = [row for row in rows if row["event"] in ("start", "epoch", "end")]
    assert (rows[0], rows[-2], rows[-1]) == (start, epochs[-1], end)
    assert [row["epoch"] for row in epochs] == [0, 1]
    assert {"arguments", "changed", "versions", "device", "teacher_sha256", "teacher_acc"} <= set(start)
    assert start["arguments"]["epochs"] == 2 and start["arguments"]["preset"] == "digits"
    assert start["changed"] == {name: value for name, value in TINY[method].items()
                                if value != getattr(method.PRESETS["digits"].settings, name)}
    for row in epochs:
        assert {"student_acc", "agreement", "agreement_drawn", "teacher_queries",
                "seconds_distillation"} <= set(row)
        assert any(name.startswith("loss") and math.isfinite(value) for name, value in row.items())
    assert set(end) == {"event", "teacher_acc", "student_acc_last", "student_acc_best", "agreement", "ece",
                        "agreement_drawn", "balanced_drawn", "seconds", "peak_memory_mb", "teacher_queries"}
    assert 0 <= end["agreement_drawn"] == epochs[-1]["agreement_drawn"] <= 1
    assert start["drawn_pictures"] == 40 and start["data"]["num_classes"] == 10
    assert 0 <= end["student_acc_last"] == epochs[-1]["student_acc"] <= end["student_acc_best"] <= 1
    assert end["seconds"] >= seconds_in(rows) - 0.05 and end["peak_memory_mb"] > 100
    assert {*os.listdir("out")} == {"log.jsonl", "student.pt", "checkpoint.pt", "samples.png", "curves.png"}
    assert min(Image.open("out/samples.png").size) > 8 * 40    # eight images a class
    assert min(Image.open("out/curves.png").size) > 300
    assert "test accuracy" in out and "chosen on the test set" in out
    method.main([*tiny_args(method, "./out/student.pt"), "--out", "next"])        # the student teaches
    assert rows_of("next")[0]["teacher_acc"] == end["student_acc_last"]


@each([method for method in METHODS if method is not regulated_kd])    # which needs the real images
def test_scores_change_nothing(method, teacher_file, in_tmp):
    """Every epoch, every second one, never: the same student, bit by bit. The last epoch is always scored."""
    for folder, flags, scored in (("every", "", [True] * 3), ("never", "--dataset none", [False] * 3),
                                  ("second", "--eval-every 2", [False, True, True])):
        method.main([*tiny_args(method, teacher_file, epochs=3), *flags.split(), "--out", folder])
        rows = rows_of(folder)
        assert [row["student_acc"] is not None for row in rows if row["event"] == "epoch"] == scored
        assert (rows[-1]["ece"] is not None) == (rows[0]["teacher_acc"] is not None) == any(scored)
        students = (running.read_classifier(f"{name}/student.pt") for name in ("every", folder))
        assert equal(*(student["weights"] for student in students))


@each(METHODS)
def test_teacher_queries_are_the_images_that_the_teacher_was_asked_about(method, in_tmp, monkeypatch):
    """Counted here in the forward method of the teacher's class; the first one asked is the teacher."""
    asked, forward = [], common.LeNet5.forward
    monkeypatch.setattr(common.LeNet5, "forward", lambda self, x: asked.append(
        (id(self), 0 if common._scoring else len(x))) or forward(self, x))
    method.main([*tiny_args(method, "./" + save_untrained("toy.pt", "lenet5_bn")), "--out", "out"])
    counted = sum(number for who, number in asked if who == asked[0][0])
    assert rows_of("out")[-1]["teacher_queries"] == counted > 0


@each(METHODS)
def test_bf16_stays_close_to_fp32(method, teacher_file, in_tmp):
    args = tiny_args(method, teacher_file, epochs=1)
    for precision in ("fp32", "bf16"):
        for result in Path("checkpoints").glob("toy.*/result.pt"):       # made in fp32: it would be refused
            shutil.rmtree(result.parent)
        method.main([*args, "--precision", precision, "--out", precision])
    one, other = (next(row for row in rows_of(name) if row["event"] == "epoch") for name in ("fp32", "bf16"))
    losses = [name for name in one if name.startswith("loss")]
    assert any(one[name] != other[name] for name in losses)
    for name in losses:
        assert other[name] == pytest.approx(one[name], rel=0.15, abs=0.1), name


# ------------------------------------------------------------------------------------------- killed, resumed
class Killed(BaseException):
    """Caught by nothing, as a kill is not."""


@contextlib.contextmanager
def killed(moment):
    """Inside, the process dies: before or after save N of a run, before student.pt or the end row."""
    save, write, saves = running.Loop.save, running.Run.write, []

    def save_or_die(self, *args):
        saves.append(1)
        if moment == f"before save {len(saves)}":
            raise Killed
        save(self, *args)
        if moment == f"after save {len(saves)}":
            raise Killed

    def write_or_die(self, row):
        if moment == f"before {row['event']}":
            raise Killed
        write(self, row)

    def die(*args, **more):
        raise Killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(running.Loop, "save", save_or_die)
        patch.setattr(running.Run, "write", write_or_die)
        if moment == "before student":
            patch.setattr(running, "save_classifier", die)
        yield


def cleaned(value):
    """Without what differs between sessions: times, memory, the rows that say that a loop went on."""
    if isinstance(value, dict):
        return {name: cleaned(part) for name, part in value.items()
                if not str(name).startswith(("seconds", "peak_memory", "log_bytes"))}
    if isinstance(value, (list, tuple)):
        return [cleaned(part) for part in value
                if not (isinstance(part, dict) and part.get("event") == "resume")]
    if torch.is_tensor(value):
        return value.dtype, value.shape, value.flatten().tolist()
    return value


def assert_same_results(one, other):
    """All that runs left, bit by bit. A write that was cut off may leave a hidden file in checkpoints/."""
    def results_in(folder):
        found = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
        return {name: path for name, path in found.items() if not name.startswith("checkpoints/.")}

    def content(path):
        if path.suffix == ".pt":
            return cleaned(torch.load(path, map_location="cpu", weights_only=True))
        return cleaned(rows_of(path.parent)) if path.suffix == ".jsonl" else path.read_bytes()
    one, other = results_in(one), results_in(other)
    assert one.keys() == other.keys()
    for name in one:
        assert content(one[name]) == content(other[name]), name


GPU = pytest.param("after save 1", "--device cuda --deterministic --precision bf16",
                   marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@each(METHODS)
@pytest.mark.parametrize("moment, flags", [("before save 2", ""), ("after save 1", ""), GPU])
def test_a_run_killed_again_and_again_ends_like_another(method, moment, flags, teacher_file, monkeypatch):
    """Each session gets one epoch or one round of a stage further and dies; two more die at the very end."""
    if moment == "after save 1":
        flags += {plain_inversion: " --no-keep-generator --detail 2 --warp 1 --contrast 1 --optimizer adam",
                   surrogate_kd: " --visits 2"}.get(method, "")
    args = [*tiny_args(method, teacher_file, epochs=3), *flags.split(), "--out", "run", "--resume"]
    for folder in ("straight", "killed"):
        (teacher_file.parent / folder).mkdir()
        monkeypatch.chdir(teacher_file.parent / folder)
        if folder == "killed":
            logs = [path.parent for path in Path("../straight").rglob("log.jsonl")]      # of run and stage
            saves = [row for log in logs for row in rows_of(log) if row["event"] in ("epoch", "round")]
            sessions = len(saves) - (moment == "before save 2")
            for this in ["before save 1", *sessions * [moment], "before student", "before end"]:
                with killed(this):
                    method.main(args)
                (Path("run") / ".checkpoint.pt.0.tmp").write_bytes(b"half")        # a write that was cut off
        method.main(args)
    assert_same_results("../straight", ".")


@each(METHODS)
def test_resume_refuses_other_settings_by_name_and_finished_runs(method, teacher_file, in_tmp, capsys):
    args = [*tiny_args(method, teacher_file), "--out", "out"]
    method.main(args)
    before = files_of()
    for more, message in (([], "out holds a run already"), (["--resume"], "the run in out is finished")):
        assert message in refused(method, [*args, *more], capsys) and files_of() == before
    shutil.rmtree("out")
    with killed("after save 1"):                               # its stage is that of the run before
        method.main(args)
    before = files_of()
    for flag, value in (("--epochs", 5), ("--seed", 1), ("--batch-size", 7), ("--student", "wrn16_1"),
                        ("--eval-every", 2), ("--threads", THREADS + 1), ("--precision", "bf16")):
        error = refused(method, [*args, "--resume", flag, str(value)], capsys)
        assert f" {flag[2:].replace('-', '_')} = " in error and files_of() == before
    with other_teacher(teacher_file):
        assert " teacher = " in refused(method, [*args, "--resume"], capsys)
    method.main([*args, "--resume"])
    assert rows_of("out")[-1]["event"] == "end"


@each(METHODS)
def test_a_full_disk_is_named_and_nothing_is_lost(method, teacher_file, in_tmp, capsys, monkeypatch):
    """A write fails in its middle, at each save in turn; the run is continued and ends like another."""
    args = [*tiny_args(method, teacher_file), "--out", "run", "--resume"]
    save, saves = running.Loop.save, []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_to_a_full_disk(self, *args):
        saves.append(1)
        if len(saves) % 2:                                     # every second save works
            return save(self, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            save(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for folder in ("straight", "full"):
        (in_tmp / folder).mkdir()
        monkeypatch.chdir(in_tmp / folder)
        if folder == "full":
            monkeypatch.setattr(running.Loop, "save", save_to_a_full_disk)
            for _ in range(9):
                capsys.readouterr()
                try:
                    method.main(args)
                    break
                except SystemExit as stop:
                    error = capsys.readouterr().err
                    assert stop.code == 1 and error.startswith("stopped: ") and error.count("\n") == 1
                    assert "could not be written" in error and not list(Path().rglob("*.tmp"))
        else:
            method.main(args)
    assert len(saves) > 2
    assert_same_results("../straight", ".")


@contextlib.contextmanager
def other_teacher(path):
    """Inside, the file holds another teacher."""
    whole, content = path.read_bytes(), torch.load(path, weights_only=True)
    content["weights"]["fc.bias"] += 1
    torch.save(content, path)
    yield
    path.write_bytes(whole)


def other_flag(method):
    """A flag that changes a stage, and the words in which it is refused."""
    name = next(name for name in getattr(method, STAGES[method][2]) if name in TINY[method])
    return ["--" + name.replace("_", "-"), str(2 * TINY[method][name])], f" {name} = {TINY[method][name]}"


@each(STAGES)
def test_a_stage_is_made_once_counted_in_every_run_and_never_replaced(method, teacher_file, in_tmp, capsys):
    args, event = tiny_args(method, teacher_file), STAGES[method][0]
    method.main([*args, "--out", "one"])
    stage, = (path for path in Path("checkpoints").iterdir() if path.name != "toy.pt")
    assert {*os.listdir(stage)} <= {"result.pt", "log.jsonl", "samples.png"}     # no checkpoint is left
    start, *rounds, last = rows_of(stage)
    assert start["event"] == "start" and last["event"] == "end" and start["stage"] == event
    rounds = [row for row in rounds if row["event"] == "round"]       # a collapse has a row of its own
    assert [row["round"] for row in rounds] == [*range(len(rounds))]
    content = torch.load(stage / "result.pt", weights_only=True)
    assert content["teacher_queries"] == last["teacher_queries"] == rounds[-1]["teacher_queries"]
    torch.save(dict(content, seconds=1000.0), stage / "result.pt")               # as if it had taken long
    made = files_of(stage)
    for more in ("--out two", "--out third --student wrn16_1"):
        method.main([*args, *more.split()])
    one, two = rows_of("one"), rows_of("two")
    assert capsys.readouterr().out.count(f"{event} from {stage}") == 2
    assert cleaned(one[1:]) == cleaned(two[1:])
    queries = last["teacher_queries"]
    named = {"event": event, "path": str(stage), "seconds": 1000.0, "teacher_queries": queries}
    assert named.items() <= next(row for row in two if row["event"] == event).items()
    assert two[-1]["seconds"] >= seconds_in(two) + 999.9 and two[-1]["teacher_queries"] >= queries
    assert equal(*(running.read_classifier(f"{name}/student.pt")["weights"] for name in ("one", "two")))
    flags, words = other_flag(method)
    assert words in refused(method, [*args, *flags], capsys) and files_of(stage) == made
    with other_teacher(teacher_file):
        assert " teacher = " in refused(method, args, capsys) and files_of(stage) == made
    assert "is a file" in refused(method, [*args, f"--{event}", "checkpoints/toy.pt"], capsys)
    method.main([*args, *flags, f"--{event}", "mine", "--out", "fourth"])
    assert Path("mine/result.pt").exists() and files_of(stage) == made


def shifted(value):
    """The same with 1 added to every tensor."""
    if isinstance(value, dict):
        return {name: shifted(part) for name, part in value.items()}
    return value + 1 if torch.is_tensor(value) else type(value)(map(shifted, value))


@each(STAGES)
def test_a_stage_half_made_with_others_or_replaced_meanwhile_is_refused(method, teacher_file, in_tmp, capsys):
    args, (flags, words) = [*tiny_args(method, teacher_file), "--out", "out", "--resume"], other_flag(method)
    with killed("after save 1"):
        method.main(args)
    assert words in refused(method, [*args, *flags, "--out", "new"], capsys)
    method.main(args)
    shutil.rmtree("out")
    with killed("after save 1"):                               # an epoch: the stage is read from its file
        method.main(args)
    stage, = (path for path in Path("checkpoints").iterdir() if path.name != "toy.pt")
    content = torch.load(stage / "result.pt", weights_only=True)
    torch.save(dict(content, result=shifted(content["result"])), stage / "result.pt")
    before = files_of()
    assert f" {STAGES[method][0]} = " in refused(method, args, capsys) and files_of() == before


@each(STAGES)
def test_a_stages_file_is_told_apart_by_every_setting_that_shaped_it(method):
    _, maker, names, unused = STAGES[method]
    (teacher, _, data), read, more = tiny_networks(), set(), {}

    class Watched:
        def __getattr__(self, name):
            read.add(name)
            return getattr(settings, name)
    for changes in ({}, {"queue": True}) if method is regulated_kd else ({},):
        settings = tiny_settings(method, **changes)
        if method is regulated_kd:
            more = dict(train=real_images(method, teacher, data, settings)["train"])
        if method is surrogate_kd:
            more = dict(draw=lambda start, n: method.procedural_pixels("leaves", n, data, Watched(), "cpu"))
        getattr(method, maker)(teacher, data, Watched(), **more)
    assert len(read) > 3 and read - unused <= set(getattr(method, names))


@each(METHODS)
@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.slow),
                                   pytest.param(20, marks=pytest.mark.kill)])
def test_sigkill_at_random_moments(method, kills, teacher_file, in_tmp):
    """Real processes and signals: whatever the moment, the run that is continued ends like another."""
    context, draw = multiprocessing.get_context("forkserver"), random.Random(method.__name__)
    context.set_forkserver_preload(["torch", "torchvision", "sklearn.datasets"])      # imported once
    args = [*tiny_args(method, teacher_file, epochs=4 * kills), "--out", "run", "--resume"]

    def written():
        with contextlib.suppress(FileNotFoundError):
            return Path("killed/run/log.jsonl").stat().st_size

    def started(folder):
        Path(folder).mkdir(exist_ok=True)
        process = context.Process(target=run_script, args=(method.__name__, args, folder))
        process.start()
        return process
    process = started("straight")
    process.join()
    an_epoch = seconds_in(rows_of("straight/run")) / (4 * kills)       # without imports and drawn pictures
    for _ in range(kills):                     # each time after 0 to 3 rows and up to two epochs' time
        process = started("killed")
        for _ in range(draw.randint(0, 3)):
            before = written()
            while process.is_alive() and written() == before:
                time.sleep(0.001)
        time.sleep(draw.uniform(0, 2 * an_epoch))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = started("killed")
    process.join()
    assert process.exitcode == 0
    assert_same_results("straight", "killed")
