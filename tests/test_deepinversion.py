"""deepinversion.py: golden numbers (1e-6, float64), who moves and who must not, the pool, the ImageNet setting at a small size."""
import contextlib
import inspect
import json
import re

import numpy
import pytest
import torch
import torch.nn as nn
import torchvision

import common
import deepinversion as di
import models
import run
import stranger
from conftest import tiny_args, tiny_networks
from conftest import tiny_settings as preset_settings
from test_csd_method import ForeignTeacher, Recorder, same, weights_of
from test_scripts import Killed, assert_same_run, kill_at, rows_of

D = torch.float64


def tiny_settings(method, **changes):
    """What these tests say of a step does not hang on the digits preset's taste."""
    return preset_settings(method, **{"lr_images": 0.1, "bn": 0.5, "tv": 2.5e-5, "clip": False, **changes})


X = (((torch.arange(96) * 37) % 97).to(D) / 50 - 1).reshape(2, 3, 4, 4)


def near(value, expected, tolerance=1e-6):
    value = torch.as_tensor(value, dtype=D).detach()
    assert torch.allclose(value, torch.tensor(expected, dtype=D), atol=tolerance, rtol=0), value


def statistics(x):
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, variance


RUNNING = torch.tensor([0.1, 0.2, 0.3], dtype=D), torch.tensor([1, 0.5, 2], dtype=D)


def test_golden_1_priors():
    near(X[0, 0, 0], [-1, -0.26, 0.48, -0.72])
    near(di.tv_l1_loss(X), 2.7225000)
    near(di.tv_loss(X), 25.7642710)
    near([part.norm().item() for part in di.neighbour_differences(X)], [7.970069, 8.241650, 5.064701, 4.487850])
    near(di.l2_loss(X), 5.5257941)
    near(di.l2_loss(X, per_image=True), 3.9069755)


def test_golden_2_bn():
    near(di.bn_loss([statistics(X)], [RUNNING]), 2.2638321)
    near(di.bn_loss([statistics(X)], [RUNNING], first=10.0), 22.638321)
    two = di.bn_loss([statistics(X), statistics(X)], [RUNNING, RUNNING], first=10.0)
    near(two, 22.638321 + 2.2638321)


def test_recorded_statistics_equal_plain_numpy_in_float64():
    bn = nn.BatchNorm2d(3).double().eval()
    bn.running_mean.copy_(RUNNING[0]), bn.running_var.copy_(RUNNING[1])
    with common.frozen(bn), common.recorded_statistics([bn]) as seen:
        bn(X)
    x = X.numpy()
    mean = numpy.array([x[:, c].mean() for c in range(3)])
    variance = numpy.array([((x[:, c] - mean[c]) ** 2).mean() for c in range(3)])
    near(seen[bn][0], mean.tolist())
    near(seen[bn][1], variance.tolist())
    expected = ((variance - RUNNING[1].numpy()) ** 2).sum() ** 0.5 + ((mean - RUNNING[0].numpy()) ** 2).sum() ** 0.5
    near(di.bn_loss([seen[bn]], [RUNNING]), expected.item())


def one_hot(value, index, classes=10):
    return value * torch.eye(classes, dtype=D)[index:index + 1]


@pytest.mark.parametrize("student, teacher, divergence, true", [
    (torch.arange(10, dtype=D).reshape(2, 5) / 2, ((torch.arange(10) * 3) % 10).to(D).reshape(2, 5), 0.0983073, 0.0870027),
    (one_hot(9, 0), one_hot(9, 1), 0.6201507, 0.3641291), (torch.zeros(1, 10, dtype=D), one_hot(9, 1), 0.2437371, None),
    (one_hot(9, 3), one_hot(9, 3), 0.0, 0.0)])
def test_golden_3_competition(student, teacher, divergence, true):
    near(di.competition_loss(student, teacher), 1 - divergence)
    if true is not None:
        near(di.competition_loss(student, teacher, true_js=True), 1 - true)


def test_golden_3_the_codes_form_saturates_and_the_true_one_does_not():
    student, teacher = one_hot(30, 0).requires_grad_(), one_hot(30, 1).requires_grad_()
    loss = di.competition_loss(student, teacher)
    assert loss.item() == 0 and not any(gradient.any() for gradient in torch.autograd.grad(loss, (student, teacher)))
    true = di.competition_loss(student, teacher, true_js=True)
    near(true, 1 - 0.6924, 1e-3)
    assert all(gradient.abs().sum() > 1e-6 for gradient in torch.autograd.grad(true, (student, teacher)))
    sure = one_hot(1000, 0).float().requires_grad_()           # probabilities that are 0 in float32
    true = di.competition_loss(sure, one_hot(1000, 1).float(), true_js=True)
    assert true.isfinite() and torch.autograd.grad(true, sure)[0].isfinite().all()


def test_golden_4_total():
    weight = (((torch.arange(240) * 11) % 13).to(D) / 26 - 0.25).reshape(5, 48)
    ce = di.one_hot_loss(X.reshape(2, 48) @ weight.T, torch.tensor([0, 3]))
    near(ce, 1.8418364)
    preset = di.PRESETS["cifar10"]
    near(ce + preset["tv"] * di.tv_loss(X) + preset["bn"] * di.bn_loss([statistics(X)], [RUNNING]) + 3e-8 * di.l2_loss(X), 24.4808022)


def test_golden_5_rate():
    near([di.warm_cosine(0.25, step, 1000) for step in (0, 49, 99, 100, 500)], [0.0025, 0.125, 0.25, 0.25, 0.14670602])
    near(di.warm_cosine(0.25, 999, 1000), 7.6e-7, 1e-8)
    near(di.warm_cosine(0.25, 1000, 2000), 0.13532242)


def test_golden_6_roll():
    moved = di.rolled(torch.arange(16).reshape(1, 1, 4, 4), 1, -1)[0, 0]
    assert moved[0].tolist() == [13, 14, 15, 12] and moved[1].tolist() == [1, 2, 3, 0]


def trained(look=None, teacher=None, **changes):
    found, student, data = tiny_networks()
    recorder, settings = Recorder(look), tiny_settings(di, **changes)
    pool = di.synthesize_pool(teacher or found, data, settings, recorder)
    images = di.distill(teacher or found, student, data, settings, recorder, pool)
    return weights_of(student), images, recorder


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def sure_teacher():
    """An untrained teacher whose answers are far from uniform."""
    teacher = tiny_networks()[0]
    with torch.no_grad():
        teacher.fc.weight.mul_(30)
    return teacher


def test_distill_trains_the_student_and_leaves_the_teacher_as_it_was():
    teacher, student, data = tiny_networks()
    teacher.train()
    before, student_before, recorder = weights_of(teacher), weights_of(student), Recorder()
    images = di.distill(teacher, student, data, tiny_settings(di), recorder)
    assert same(before, teacher) and teacher.training and all(p.grad is None for p in teacher.parameters())
    assert not same(student_before, student) and student.training
    for network in (teacher, student):
        assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in network.modules())
    assert images.shape == (2 * 10 + 2 * 10, 1, 8, 8) and images.dtype == torch.float16 and recorder.state["images_synthesized"] == 40
    assert recorder.state["student_steps"] == 6 and recorder.state["teacher_queries"] == 2 * 2 * 10 + 2 * 2 * 10 + 6 * 8
    assert all(row[term] > 0 for row in recorder.rows for term in ("loss_oh", "loss_bn", "loss_tv", "loss_competition", "loss_kd"))


def test_distill_is_a_function_of_its_seed_and_draws_from_no_global_stream():
    results = []
    for seed, disturb in ((0, 0), (0, 1234), (1, 0)):
        torch.manual_seed(disturb)
        before = torch.get_rng_state()
        results.append(trained(seed=seed)[0])
        assert torch.equal(before, torch.get_rng_state())
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


def test_student_weights_do_not_move_during_synthesis_and_pixels_do_not_in_distillation():
    seen = {}

    def look(state):
        if "student" not in state:
            return
        weights, x = weights_of(state["student"]), state["x"].detach().clone()
        if seen:
            assert equal(weights, seen["weights"]) == (state["distillation_step"] == 0)
            assert torch.equal(x, seen["x"]) == (state["distillation_step"] > 0)
        seen.update(weights=weights, x=x)
        assert not state["student"].training or state["distillation_step"] > 0      # at rest while images are made
    trained(look, synthesis_steps=4)


def test_images_move_towards_the_teachers_statistics_and_the_classes():
    teacher, data = sure_teacher(), tiny_networks()[2]
    teacher.groups[0].bn1.running_mean.add_(0.5)               # statistics that noise does not have
    recorder = Recorder()
    settings = tiny_settings(di, synthesis_steps=100, synthesis_batch_size=32, initial_batches=1, tv=0.0, bn=1.0)
    losses = []

    def look(state):
        losses.append(state["synthesis_means"].sums.tolist())
    recorder.look = look
    pool = di.synthesize_pool(teacher, data, settings, recorder)
    first, last = losses[0], [b - a for a, b in zip(losses[-2], losses[-1])]
    assert last[0] < 0.7 * first[0] and last[1] < 0.95 * first[1]
    with torch.no_grad(), common.frozen(teacher):
        agreed = (teacher(pool["images"].float()).argmax(1) == pool["targets"]).float().mean()
    assert agreed > 0.3                                        # 0.1 is chance; the teacher is an untrained one


@pytest.mark.parametrize("keep_best", [False, True])
def test_what_is_kept_is_the_last_iterate_or_a_copy_of_the_best(keep_best):
    """With a rate so large that the loss rises again. An alias of x would equal the last iterate in both cases."""
    teacher, _, data = tiny_networks()
    iterates, losses = [], []
    settings = tiny_settings(di, synthesis_steps=12, lr_images=0.7, initial_batches=1, keep_best=keep_best)

    def look(state):
        iterates.append(state["x"].detach().clone())
        losses.append(state["best_loss"].item())
    kept = di.synthesize_pool(teacher, data, settings, Recorder(look))["images"]
    if keep_best:
        assert losses == sorted(losses, reverse=True) and len(set(losses)) < 12
        best = max(i for i in range(12) if i == 0 or losses[i] < losses[i - 1])            # the step whose loss was least: x before it
        assert 0 < best < 11 and torch.equal(kept, iterates[best - 1].half())
    else:
        assert torch.equal(kept, iterates[-1].half())


@pytest.mark.parametrize("changes", [dict(oh=0.0), dict(bn=0.0), dict(first_bn=9.0), dict(tv=0.0), dict(tv_l1=1.0), dict(l2=1.0),
                                     dict(l2_per_image=True), dict(jitter=0), dict(mirror=True), dict(clip=True), dict(warm_cosine=True),
                                     dict(beta1=0.5), dict(beta2=0.9), dict(cycle_targets=False), dict(low_resolution_steps=2)], ids=str)
def test_every_setting_of_the_synthesis_reaches_the_images(changes):
    teacher, _, data = tiny_networks()
    pools = [di.synthesize_pool(teacher, data, tiny_settings(di, **more))["images"] for more in ({"l2": 0.5}, {"l2": 0.5, **changes})]
    assert not torch.equal(*pools)


@pytest.mark.parametrize("changes", [dict(competition=0.0), dict(competition=5.0), dict(true_js=True)], ids=str)
def test_the_competition_reaches_the_images_made_beside_a_student(changes):
    first, later = 20, trained(competition=1.0, teacher=sure_teacher())[1]
    other = trained(**changes, teacher=sure_teacher())[1]
    assert torch.equal(later[:first], other[:first]) and not torch.equal(later[first:], other[first:])


@pytest.mark.parametrize("weight, loss", [("tv", di.tv_loss), ("tv_l1", di.tv_l1_loss), ("l2", di.l2_loss)], ids=["tv", "tv_l1", "l2"])
def test_a_prior_with_a_large_weight_makes_its_own_term_small(weight, loss):
    teacher, _, data = tiny_networks()
    pools = [di.synthesize_pool(teacher, data, tiny_settings(di, synthesis_steps=20, **{weight: value}))["images"].float() for value in (0.0, 1e3)]
    assert loss(pools[1]) < 0.8 * loss(pools[0])


def test_the_competition_pushes_teacher_and_student_apart():
    losses = [trained(teacher=sure_teacher(), competition=value, synthesis_steps=40, epochs=1, pool_batches=3)[2].rows[-1]["loss_competition"]
              for value in (1e-6, 1e3)]
    assert losses[1] < losses[0] - 0.01


def test_clip_keeps_the_valid_range():
    _, _, data = tiny_networks()
    pool = di.synthesize_pool(tiny_networks()[0], data, tiny_settings(di, clip=True, lr_images=1.0, synthesis_steps=5))
    pixels = common.denormalize(pool["images"].float(), data)
    assert pixels.min() >= -1e-3 and pixels.max() <= 1.001 and (pixels < 1e-3).any() and (pixels > 0.999).any()
    cifar = common.DATASETS["cifar10"]
    low, high = (common.normalize(torch.full((1, 3, 1, 1), value), cifar).flatten().tolist() for value in (0.0, 1.0))
    assert low == pytest.approx([-2.42907, -2.41825, -2.22139], abs=1e-4) and high == pytest.approx([2.51409, 2.59679, 2.75373], abs=1e-4)


def test_two_resolutions_have_their_own_adam_and_the_smaller_one_comes_first():
    sides, moments = [], []
    teacher, _, data = tiny_networks()
    teacher.register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape[-1]))

    def look(state):
        moments.append(next(iter(state["image_optimizer"].state.values()))["step"].item())
    di.synthesize_pool(teacher, data, tiny_settings(di, low_resolution_steps=3, synthesis_steps=2, initial_batches=2), Recorder(look))
    assert sides == [4, 4, 4, 8, 8] * 2 and moments == [1, 2, 3, 1, 2] * 2


def test_the_pool_stops_growing_when_it_is_full_and_a_budget_of_none_is_refused():
    images = trained(epochs=4, pool_batches=3)[1]
    assert len(images) == 30
    with pytest.raises(common.BadInput, match="no image to learn from"):
        trained(initial_batches=0, pool_batches=0)


def test_datafrees_schedule_begins_without_images():
    images = trained(initial_batches=0, pool_batches=2)[1]
    assert len(images) == 20


def test_a_teacher_without_batchnorm_is_refused_and_told_what_fits(in_tmp, capsys):
    _, student, data = tiny_networks()
    with pytest.raises(common.BadInput, match="no BatchNorm.*dafl.py and rdskd.py"):
        di.distill(ForeignTeacher(False), student, data, tiny_settings(di))
    teacher = models.build_model("lenet5", 10, (1, 8, 8))
    run.save_classifier(in_tmp / "plain.pt", teacher, "lenet5", data, "digits")
    with pytest.raises(SystemExit) as stop:
        di.main(["--dataset", "digits", "--teacher", "./plain.pt", "--student", "lenet5_half"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "dafl.py" in error and error.count("\n") == 1 and not (in_tmp / "runs").exists()


def test_distill_sees_no_data(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("distill asked for data")
    for name in ("load_dataset", "_read_torchvision", "_read_folder", "predict"):
        monkeypatch.setattr(common, name, forbidden)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", forbidden)
    trained()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named():
    with pytest.raises(FloatingPointError, match="loss_kd became"):
        trained(lr_student=float("inf"))


# --------------------------------------------------------------------------------------------------------------- scripts
def test_a_run_leaves_what_it_promises(teacher_file, in_tmp):
    di.main([*tiny_args(di, teacher_file), "--out", "out"])
    rows = rows_of(in_tmp / "out", without_seconds=False)
    assert [row["event"] for row in rows] == ["start", "bank", "bank", "epoch", "epoch", "end"]
    assert {path.name for path in (in_tmp / "out").iterdir()} == {"log.jsonl", "samples.png", "student.pt", "checkpoint.pt"}
    assert {path.name for path in (in_tmp / "checkpoints").iterdir()} == {"toy.pt", "toy.deepinversion-seed0.pt"}


@pytest.mark.parametrize("saves", [[1], [3], [4], [5], [6], [7], [9], [10], [14], [15], list(range(1, 16))], ids=str)
def test_a_killed_run_ends_like_one_that_was_not(saves, teacher_file, in_tmp, monkeypatch):
    """Two initial batches and two rounds of two steps each, three student steps a round: also in the middle of a pool."""
    def args(name):
        return [*tiny_args(di, teacher_file), "--pool", f"{name}.pt", "--out", name, "--resume"]
    di.main(args("straight"))
    kill_at(monkeypatch, saves)
    for _ in saves:
        with pytest.raises(Killed):
            di.main(args("killed"))
    di.main(args("killed"))
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    one, other = (torch.load(in_tmp / f"{name}.pt", weights_only=True)["result"]["images"] for name in ("straight", "killed"))
    assert torch.equal(one, other)


def test_the_pools_file_is_told_apart_by_every_setting_that_shaped_it():
    read = {name for function in ("synthesize_pool", "synthesize", "synthesis_state")
            for name in re.findall(r"settings\.(\w+)", inspect.getsource(getattr(di, function)))}
    assert read - {"competition", "true_js"} | {"precision"} == set(di.POOL_SETTINGS)      # those two ask for a student


def foreign_teacher():
    """What `--teacher test_deepinversion:foreign_teacher` builds: a torchvision network, never trained."""
    with common.seeded(0):
        return torchvision.models.resnet18(num_classes=10)


def thousand_classes():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000))


@pytest.mark.parametrize("saves", [[1], [4], [5], [9], [10]], ids=str)
def test_synthesis_alone_goes_on_after_a_kill_and_makes_the_same_images(saves, teacher_file, in_tmp, monkeypatch):
    """Best iterate, two resolutions, mirrored."""
    more = ["--synthesize-only", "15", "--low-resolution-steps", "2", "--keep-best", "--mirror", "--jitter", "0", "--resume", "--out"]
    di.main([*tiny_args(di, teacher_file), *more, "straight"])
    kill_at(monkeypatch, saves)                                # two batches of 2 + 2 steps, and the save at the end
    with pytest.raises(Killed) if saves[0] < 10 else contextlib.nullcontext():
        di.main([*tiny_args(di, teacher_file), *more, "killed"])
    if saves[0] < 10:
        di.main([*tiny_args(di, teacher_file), *more, "killed"])
    monkeypatch.undo()
    one, other = (torch.load(in_tmp / name / "images.pt", weights_only=True) for name in ("straight", "killed"))
    assert len(one["images"]) == 15 and all(torch.equal(one[key], other[key]) for key in ("images", "targets", "pixels"))
    assert one["images"].untyped_storage().nbytes() == 15 * 64 * 2             # not a view of more
    with pytest.raises(SystemExit):
        di.main([*tiny_args(di, teacher_file), "--synthesize-only", "15", "--out", str(in_tmp / "straight")])


@pytest.mark.parametrize("flags, message", [(["--beta1", "1"], "under 1"), (["--dataset", "imagenet", "--teacher", "resnet34", "--student",
                                             "resnet18"], "no teacher is trained on imagenet")])
def test_what_cannot_be_done_is_refused(flags, message, in_tmp, capsys):
    with pytest.raises(SystemExit) as stop:
        di.main(["--dataset", "digits", *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_synthesis_alone_from_a_torchvision_network_in_two_resolutions(in_tmp, capsys):
    """The ImageNet setting at a small size: pictures, and images in a file that another script can take."""
    preset = ["--dataset", "cifar10", "--preset", "imagenet", "--student", "wrn10_1", "--teacher", "test_deepinversion:foreign_teacher"]
    di.main([*preset, "--synthesize-only", "5", "--synthesis-batch-size", "3", "--low-resolution-steps", "2", "--synthesis-steps", "2",
             "--jitter", "4", "--out", "made"])
    content = torch.load("made/images.pt", weights_only=True)
    assert content["images"].shape == (5, 3, 32, 32) and content["pixels"].dtype == torch.uint8 and len(content["targets"]) == 5
    again = (255 * common.denormalize(content["images"].float(), common.DataSpec(**content["data"])).clamp(0, 1)).to(torch.uint8)
    assert torch.equal(again, content["pixels"])
    assert {path.name for path in (in_tmp / "made").iterdir()} == {"log.jsonl", "samples.png", "images.pt", "checkpoint.pt"}
    rows = rows_of(in_tmp / "made")
    assert [row["event"] for row in rows] == ["start", "bank", "bank", "end"] and "5 images in" in capsys.readouterr().out


def test_weights_that_cannot_be_had_are_one_sentence(in_tmp, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(SystemExit) as stop:
        di.main(["--dataset", "imagenet", "--student", "module:none", "--synthesize-only", "84"])
    assert stop.value.code == 2 and "module:none" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        di.main(["--dataset", "imagenet", "--student", "test_deepinversion:thousand_classes", "--synthesize-only", "84"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "'torchvision:resnet50' could not be built" in error and error.count("\n") == 1 and not (in_tmp / "runs").exists()


def test_a_stranger_judges_the_images(teacher_file, in_tmp, monkeypatch, capsys):
    di.main([*tiny_args(di, teacher_file), "--synthesize-only", "12", "--out", "made"])
    recipe = stranger.recipe_of
    monkeypatch.setattr(stranger, "recipe_of", lambda arch, dataset: {**recipe(arch, dataset), "epochs": 3})
    stranger.main(["made/images.pt", "--model", "wrn10_2", "--log", "log.jsonl"])
    row = json.loads((in_tmp / "log.jsonl").read_text())
    assert row["images"] == 12 and 0 <= row["target_acc"] <= 1 and row["test_acc"] > 0.5 and "asked-for class" in capsys.readouterr().out
    with pytest.raises(common.BadInput, match="another recipe"):
        stranger.main(["made/images.pt", "--model", "lenet5"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distill_on_a_gpu(precision):
    teacher, student, data = tiny_networks()
    before = weights_of(student)
    di.distill(teacher.cuda(), student.cuda(), data, tiny_settings(di, precision=precision))
    assert not same(before, student.cpu())
