"""cudfkd.py: golden numbers (float64, 1e-5; 1e-4 at temperature 20), what a weight is the minimum of, the round in one pass, its script."""
import copy
import io
import json
import math

import pytest
import torch
import torch.nn as nn

import common
import cudfkd as cu
import curriculum_picture
import models
import run
from conftest import tiny_args, tiny_networks, tiny_settings
from test_csd_method import ForeignTeacher, Recorder, same, weights_of
from test_scripts import Killed, assert_same_run, kill_at, rows_of

D = torch.float64
S = torch.arange(12, dtype=D).reshape(3, 4) / 10
T = ((torch.arange(12) * 7) % 12).to(D).reshape(3, 4) / 2
LOSSES = torch.tensor([0.5, 1.5, 2.5, 4.0], dtype=D)
CURRICULA = ("hard", "soft", "log")


def near(value, expected, tolerance=1e-5):
    value = torch.as_tensor(value, dtype=D).detach()
    assert torch.allclose(value, torch.tensor(expected, dtype=D), atol=tolerance, rtol=0), value


# -------------------------------------------------------------------------------------------------------------- golden numbers
def test_golden_1_losses_of_each_image():
    """The numbers were taken in float32: at temperature 20 a cancellation, times 400, leaves their fifth digit to chance."""
    near(cu.kd_losses(S, T, 20), [1.519382, 1.781594, 0.923359], 1e-4)
    near(cu.kd_losses(S, T, 20).mean(), 1.408112, 1e-4)
    near(cu.kd_losses(S, T, 5).mean(), 1.386122)
    near(cu.kd_losses(S, T, 2).mean(), 1.173775)
    near(cu.l1_losses(S, T), [2.1, 2.3, 2.3])
    near(cu.l1_losses(S, T).mean(), 2.233333)


@pytest.mark.parametrize("curriculum, weights, total", [
    ("hard", [1.0, 1, 0, 0], -4.0), ("soft", [0.75, 0.25, 0, 0], -1.375),
    ("log", [0.928221, 0.706700, 0.428635, 0.135335], -2.251679 - 2.021848 - 1.465719 - 0.541341)])
def test_golden_2_weights_and_regularizers(curriculum, weights, total):
    found = cu.curriculum_weights(LOSSES, 2.0, curriculum)
    near(found, weights)
    near(cu.curriculum_regularizer(found, 2.0, curriculum).sum(), total)


def test_golden_2_log():
    weights = cu.curriculum_weights(LOSSES, 2.0)
    near(cu.curriculum_regularizer(weights, 2.0), [-2.251679, -2.021848, -1.465719, -0.541341])
    near((weights * LOSSES).sum(), 3.137090)
    near(cu.curriculum_loss(LOSSES, 2.0), 0.784272)
    near(cu.curriculum_weights(LOSSES, 12.0), [0.999996, 0.999979, 0.999931, 0.999671], 1e-6)
    scalar = cu.curriculum_weights(LOSSES.mean(), 2.0)
    near(scalar, 0.532235)
    near(cu.curriculum_loss(LOSSES, 2.0, granularity="batch"), 1.130998)
    near(cu.curriculum_regularizer(scalar, 2.0), -1.705105)


def test_golden_3_the_three_published_readings():
    losses = cu.kd_losses(S, T, 20)
    near(cu.curriculum_loss(losses, 2.0), 0.989710, 1e-4)                                 # by image
    near(cu.curriculum_weights(losses.mean(), 2.0), 0.730927, 1e-4)
    batch = cu.curriculum_loss(losses, 2.0, granularity="batch")
    near(batch, 1.029227, 1e-4)                                                           # by batch, the code's last state
    near(batch + cu.curriculum_regularizer(cu.curriculum_weights(losses.mean(), 2.0), 2.0), -1.027853, 1e-4)    # printed by its first one
    near(cu.curriculum_loss(cu.l1_losses(S, T), 2.0), 1.118346)
    near(cu.curriculum_loss(cu.l1_losses(S, T), 2.0, granularity="batch"), 1.120550)


@pytest.mark.parametrize("start, end, expected", [
    (0.0, 62.0, {0: 0, 63: 0, 64: 0.5, 125: 31, 187: 62, 249: 62}), (0.5, 6.7, {0: 0.5, 125: 3.6, 249: 6.7})])
def test_golden_4_the_ramp(start, end, expected):
    for epoch, value in expected.items():
        assert cu.adversarial_weight(epoch, 250, start, end, 0.25, 0.75) == pytest.approx(value)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8, 30])
def test_the_ramp_never_falls_and_stays_between_its_ends_however_short_the_run(epochs):
    values = [cu.adversarial_weight(epoch, epochs, 1.0, 5.0, 0.25, 0.75) for epoch in range(epochs)]
    assert values == sorted(values) and values[0] == 1 and values[-1] == (5 if epochs > 2 else 1)


@pytest.mark.parametrize("preset, slope, steps", [("cifar10", 1e-4, 100_000), ("cifar10-wrn40_2-wrn16_1", 1e-4, 100_000),
                                                  ("cifar100", 2e-5, 160_000), ("cifar100-wrn40_2-wrn40_1", 2e-5, 200_000), ("cifar100-wrn40_2-wrn16_2", 2e-5, 120_000),
                                                  ("svhn", 2e-5, 100_000), ("tiny-imagenet", 2e-5, 160_000)])
def test_golden_4_the_age_of_each_preset_grows_as_fast_as_in_the_code(preset, slope, steps):
    preset = cu.PRESETS[preset]
    assert preset["epochs"] * preset["student_steps"] == steps
    assert preset["age_end"] - preset["age_start"] == pytest.approx(slope * steps)


@pytest.mark.parametrize("name, growth", [("cifar10", 0.5), ("cifar10-vgg11-resnet18", 0.5), ("cifar10-wrn40_2-wrn16_1", 0.05),
                                          ("cifar10-wrn40_2-wrn40_1", 0.2), ("cifar100", 0.35), ("cifar100-wrn40_2-wrn40_1", 0.12),
                                          ("cifar100-wrn40_2-wrn16_2", 0.15), ("tiny-imagenet", 0.15)])
def test_golden_4_the_ramp_of_each_preset_ends_where_the_codes_increments_end(name, growth):
    preset = cu.PRESETS[name]
    epochs = preset["epochs"]
    begin, end = math.floor(epochs * preset["ramp_begin"]), math.floor(epochs * preset["ramp_end"])
    assert preset["adversarial_end"] == pytest.approx(preset["adversarial_start"] + growth * (end - begin - 1))
    alpha = preset["adversarial_start"]                        # epoch by epoch, as the code adds it up
    for epoch in range(epochs):
        ours = cu.adversarial_weight(epoch, epochs, *(preset[key] for key in ("adversarial_start", "adversarial_end", "ramp_begin", "ramp_end")))
        assert ours == pytest.approx(alpha), epoch
        alpha += growth * (begin < epoch < end)


def test_svhn_ends_where_the_next_papers_closed_form_ends():
    preset = cu.PRESETS["svhn"]
    assert preset["adversarial_end"] == pytest.approx(0.03 * (math.floor(250 * 0.75) - math.floor(250 * 0.25))) and preset["epochs"] == 250


def test_golden_5_the_generators_terms():
    near(cu.one_hot_loss(T), 0.282539)
    for temperature, entropy in ((1, 1.288324), (2, 1.346482), (5, 1.379380), (20, 1.385889)):
        near(cu.information_entropy_loss(T, temperature), -entropy)
    near(cu.kd_losses(S, T, 3), [1.306365, 1.776099, 0.857416])
    assert (S.argmax(1) == T.argmax(1)).tolist() == [True, False, False]
    near(cu.adversarial_loss(S, T), -0.435455)
    near(-cu.kd_losses(S, T, 3).mean(), -1.313293)


def statistics(x):
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, variance


def test_golden_6_bn_and_totals_with_the_presets_own_weights():
    x = torch.arange(96, dtype=D).reshape(2, 3, 4, 4) / 10
    running = torch.tensor([1.0, 2, 3], dtype=D), torch.tensor([4.0, 5, 6], dtype=D)
    bn = cu.bn_loss([statistics(x)], [running])
    near(bn, 7.037509)
    preset = cu.PRESETS["cifar10-wrn40_2-wrn16_1"]
    easy = (preset["oh"] * cu.one_hot_loss(T) + preset["bn"] * bn
            + preset["ie"] * cu.information_entropy_loss(T, preset["entropy_temperature"]))
    near(easy, -20.397735)
    near(easy + preset["adversarial_end"] * cu.adversarial_loss(S, T), -23.315282)


def test_parameter_counts_and_start_of_the_generator():
    count = lambda *args: sum(p.numel() for p in cu.Generator(*args).parameters())         # noqa: E731
    assert count(512, (3, 32, 32)) == 8_776_259 and count(1024, (3, 64, 64)) == 35_139_139
    generator = cu.Generator(512, (3, 32, 32))
    for module in generator.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(module.weight.mean()) < 2e-3
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.02) and module.weight.std() > 0.005 and not module.bias.any()
    for shape in ((1, 8, 8), (1, 28, 28), (3, 64, 64), (2, 12, 20)):
        pixels = cu.Generator(6, shape, 4)(torch.randn(5, 6))
        assert pixels.shape == (5, *shape) and pixels.min() >= 0 and pixels.max() <= 1
    with pytest.raises(common.BadInput, match="multiples of 8, not 68x68"):
        cu.Generator(6, (3, 68, 68))


# ------------------------------------------------------------------------------------------------------------ the curriculum
@pytest.mark.parametrize("curriculum", CURRICULA)
@pytest.mark.parametrize("age", [0.3, 1.0, 2.0, 7.0, 12.0])
def test_v_is_the_minimum_of_v_times_loss_plus_f_over_a_fine_grid(curriculum, age):
    grid = torch.linspace(0, 1, 100_001, dtype=D)
    for loss in (0.0, 0.01, 0.5, 1.0, 1.9, 2.1, 5.0, 11.0, 30.0):
        objective = grid * loss + cu.curriculum_regularizer(grid, age, curriculum)
        v = cu.curriculum_weights(torch.tensor(loss, dtype=D), age, curriculum)
        at_v = v * loss + cu.curriculum_regularizer(v, age, curriculum)
        assert objective.isfinite().all() and at_v <= objective.min() + 1e-12
        assert abs(grid[objective.argmin()] - v) <= 1e-5


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_descending_v_times_the_gradient_descends_the_surrogate(curriculum):
    """F(ℓ) = min over v of v ℓ + f(v) has the derivative v."""
    losses = LOSSES.clone().requires_grad_()
    weights = cu.curriculum_weights(losses.detach(), 2.2, curriculum)
    eps = 1e-6

    def surrogate(values):
        v = cu.curriculum_weights(values, 2.2, curriculum)
        return v * values + cu.curriculum_regularizer(v, 2.2, curriculum)
    near((surrogate(LOSSES + eps) - surrogate(LOSSES - eps)) / (2 * eps), weights.tolist(), 1e-4)
    gradient, = torch.autograd.grad(cu.curriculum_loss(losses, 2.2, curriculum), losses)
    near(gradient, (weights / 4).tolist())


def test_weights_fall_with_the_loss_rise_with_the_age_and_none_is_one():
    losses = torch.linspace(0, 60, 200, dtype=torch.float32)
    for curriculum in CURRICULA:
        by_age = torch.stack([cu.curriculum_weights(losses, age, curriculum) for age in (0.5, 2.0, 5.0, 12.0, 100.0)])
        assert (by_age.diff(dim=1) <= 1e-6).all() and (by_age.diff(dim=0) >= -1e-6).all() and by_age.min() >= 0 and by_age.max() <= 1 + 1e-6
        assert by_age[-1].min() > 0.39
    assert torch.equal(cu.curriculum_weights(losses, 2.0, "none"), torch.ones_like(losses))
    assert not cu.curriculum_regularizer(losses, 2.0, "none").any()
    for granularity in ("sample", "batch"):
        near(cu.curriculum_loss(LOSSES, 2.0, "none", granularity), LOSSES.mean().item())
    for word in ("Log", ""):
        with pytest.raises(ValueError, match="must be hard, soft, log or none"):
            cu.curriculum_weights(losses, 2.0, word)
        with pytest.raises(ValueError, match="must be sample or batch"):
            cu.curriculum_loss(losses, 2.0, granularity=word)
    assert cu.curriculum_regularizer(torch.tensor([1 + 1e-6]), 20.0).isfinite()


def test_a_weight_of_the_batch_does_not_choose_between_images():
    losses = LOSSES.clone().requires_grad_()
    gradient, = torch.autograd.grad(cu.curriculum_loss(losses, 2.0, granularity="batch"), losses)
    assert len(set(gradient.tolist())) == 1
    gradient, = torch.autograd.grad(cu.curriculum_loss(losses, 2.0, granularity="sample"), losses)
    assert gradient.tolist() == sorted(gradient.tolist(), reverse=True) and len(set(gradient.tolist())) == 4


def test_the_adversarial_term_is_nothing_where_they_disagree():
    assert cu.adversarial_loss(S[1:], T[1:]).item() == 0
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    of_student, of_teacher = torch.autograd.grad(cu.adversarial_loss(student, teacher), (student, teacher))
    assert of_student[0].any() and of_teacher[0].any() and not of_student[1:].any() and not of_teacher[1:].any()


# --------------------------------------------------------------------------------------------------------------------- distill
def trained(look=None, teacher=None, **changes):
    """-> student's weights, generator's weights, the recorder"""
    found, student, data = tiny_networks()
    recorder = Recorder(look)
    generator = cu.distill(teacher or found, student, data, tiny_settings(cu, **changes), recorder)
    return weights_of(student), weights_of(generator), recorder


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_distill_trains_the_student_and_leaves_the_teacher_as_it_was():
    teacher, student, data = tiny_networks()
    teacher.train()                                            # also its mode must come back
    next(teacher.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in teacher.parameters()]
    teacher_before, student_before, recorder = weights_of(teacher), weights_of(student), Recorder()
    generator = cu.distill(teacher, student, data, tiny_settings(cu), recorder)
    assert same(teacher_before, teacher) and teacher.training and [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters()) and not same(student_before, student) and student.training and generator.training
    for network in (teacher, student, generator):
        assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in m.__dict__ for m in network.modules())
    assert [row["epoch"] for row in recorder.rows if "loss_kd" in row] == [0, 1]
    state = recorder.state                                     # 2 epochs of 2 rounds: 6 images for the generator, 2 x 8 for the student
    assert (state["student_steps"], state["images_synthesized"], state["teacher_queries"]) == (8, 8 * 8, 4 * (6 + 16))


def test_distill_is_a_function_of_its_seed_and_draws_from_no_global_stream():
    results = []
    for seed, disturb in ((0, 0), (0, 1234), (1, 0)):
        torch.manual_seed(disturb)
        before = torch.get_rng_state()
        results.append(trained(seed=seed)[0])
        assert torch.equal(before, torch.get_rng_state())
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


def test_distill_sees_no_data(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("distill asked for data")
    for name in ("load_dataset", "_read_torchvision", "_read_folder", "predict"):
        monkeypatch.setattr(common, name, forbidden)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", forbidden)
    trained()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_teacher_that_is_not_from_common_and_one_without_batchnorm(batch_norm):
    before = weights_of(tiny_networks()[1])
    student, _, recorder = trained(teacher=ForeignTeacher(batch_norm))
    rows = [row for row in recorder.rows if "loss_kd" in row]
    assert not equal(before, student) and all(math.isfinite(row[key]) for row in rows for key in ("loss_kd", "loss_oh", "loss_bn"))
    assert (rows[-1]["loss_bn"] > 0) == batch_norm
    assert any("no BatchNorm" in row.get("text", "") for row in recorder.rows) != batch_norm


def test_the_generator_moves_in_its_step_alone_and_the_student_in_its_own():
    before, moved = {}, {"synthesis": set(), "distillation": set()}

    def look(state):
        phase = "synthesis" if state["synthesis_step"] != before.get("step", 0) else "distillation"
        now = {name: weights_of(state[name]) for name in ("student", "generator")}
        if "weights" in before:
            moved[phase] |= {name for name in now if not equal(now[name], before["weights"][name])}
        before.update(weights=now, step=state["synthesis_step"])
    trained(look, adversarial_start=1.0)
    assert moved == {"synthesis": {"generator"}, "distillation": {"student"}}


@pytest.mark.parametrize("student_loss", ["kl", "l1"])
def test_the_round_in_one_pass_equals_the_loop_one_by_one(student_loss):
    """The algorithm as it is written, batch by batch, from the same latents: the same weights up to rounding."""
    draws = []
    teacher, student, data = tiny_networks()
    settings = tiny_settings(cu, epochs=1, student_steps=6, round_steps=3, adversarial_start=2.0, ramp=False, student_loss=student_loss)
    normal_, randn = torch.Tensor.normal_, torch.randn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "normal_", lambda self, *a, **k: draws.append(normal_(self, *a, **k).clone()) or self)
        patch.setattr(torch, "randn", lambda *a, **k: draws.append(randn(*a, **k)) or draws[-1].clone())
        cu.distill(teacher, student, data, settings)
    draws = [z for z in draws if z.dim() == 2 and z.shape[1] == settings.latent_dim and len(z) < 64]       # 64: the generator's first layer
    assert [len(z) for z in draws] == [6, 24, 6, 24]

    with common.seeded(settings.seed):
        generator = cu.Generator(settings.latent_dim, data.image_shape, settings.generator_width)
    _, other, _ = tiny_networks()
    adam = torch.optim.Adam(generator.parameters(), settings.lr_generator, betas=(0.9, 0.99))
    sgd = torch.optim.SGD(other.parameters(), settings.lr_student, momentum=0.9, weight_decay=settings.weight_decay)
    teacher.eval()
    inputs, hooks = {}, []
    for bn in common.batchnorms(teacher):
        hooks.append(bn.register_forward_pre_hook(lambda m, x: inputs.__setitem__(m, x[0])))
    step = 0
    for z, batches in (draws[:2], draws[2:]):
        other.eval(), generator.train()
        x = common.normalize(generator(z), data)
        t, s = teacher(x), other(x)
        bn = sum((v.var((0, 2, 3), unbiased=False) - m.running_var).norm() + (v.mean((0, 2, 3)) - m.running_mean).norm() for m, v in inputs.items())
        loss = (settings.oh * cu.one_hot_loss(t) + settings.bn * bn + settings.ie * cu.information_entropy_loss(t, settings.entropy_temperature)
                + 2 * cu.adversarial_loss(s, t))
        adam.zero_grad(), loss.backward(), adam.step()
        other.train(), generator.eval()
        for z in batches.split(settings.batch_size):
            with torch.no_grad():
                x = common.normalize(generator(z), data)
                t = teacher(x)
            age = settings.age_start + (settings.age_end - settings.age_start) * step / 6
            losses = cu.kd_losses(other(x), t, settings.temperature) if student_loss == "kl" else cu.l1_losses(other(x), t)
            v = (1 + math.exp(-age)) / (1 + (losses.detach() - age).exp())
            sgd.zero_grad(), (v * losses).mean().backward(), sgd.step()
            step += 1
    for key, value in weights_of(other).items():
        assert torch.allclose(value.double(), student.state_dict()[key].double(), atol=2e-4, rtol=1e-3), key


@pytest.mark.parametrize("images_per_pass", [1, 3, 16, 1000])
def test_however_a_round_is_cut_the_images_are_the_same(images_per_pass):
    data = common.DATASETS["cifar10"]
    teacher = models.build_model("wrn10_1", 10, data.image_shape)
    generator, z = cu.Generator(6, data.image_shape, 4), torch.randn(16, 6)
    settings = tiny_settings(cu, images_per_pass=images_per_pass)
    with common.frozen(teacher, generator):
        images, answers = cu.images_and_answers(generator, teacher, z, data, settings)
        expected = common.normalize(generator(z), data)
        assert torch.allclose(images, expected, atol=1e-5) and torch.allclose(answers, teacher(expected), atol=1e-4)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_bn_statistics_are_taken_in_the_generators_pass_alone(monkeypatch):
    calls = []
    frozen_forward = common._frozen_forward

    def spy(module, seen, x):
        calls.append((seen is not None, len(x)))
        return frozen_forward(module, seen, x)
    monkeypatch.setattr(common, "_frozen_forward", spy)
    trained(adversarial_start=1.0, ramp=False)
    assert {size for with_statistics, size in calls if with_statistics} == {6}
    assert {size for with_statistics, size in calls if not with_statistics} == {6, 5, 1}       # the student at rest; 16 images in passes of 5


def test_while_alpha_is_0_the_student_is_not_asked(monkeypatch):
    asked, forward = [], models.WideResNet.forward
    monkeypatch.setattr(models.WideResNet, "forward", lambda self, x: asked.append((len(x), self.training)) or forward(self, x))
    _, _, recorder = trained(epochs=4, adversarial_start=0.0, adversarial_end=3.0, ramp_begin=0.25, ramp_end=0.75)
    rows = [row for row in recorder.rows if "loss_kd" in row]
    assert [row["alpha"] for row in rows] == [0, 0, 0, 3]
    assert asked.count((6, False)) == 8 + 2                    # the teacher in every round, the student in the last epoch's two
    assert [row["loss_adversarial"] is None and row["agreed"] is None for row in rows] == [True, True, True, False]


def test_the_age_grows_with_every_step_and_the_rate_falls_with_every_epoch(monkeypatch):
    ages, rates, found = [], [], cu.curriculum_loss
    monkeypatch.setattr(cu, "curriculum_loss", lambda losses, age, *more: ages.append(age) or found(losses, age, *more))
    trained(lambda state: rates.append((state["epoch"], state["optimizer"].param_groups[0]["lr"])), epochs=5, age_start=1.0, age_end=3.0)
    assert ages == pytest.approx([1 + 2 * step / 20 for step in range(20)])
    for epoch, rate in rates:
        assert rate == pytest.approx(common.cosine(cu.PRESETS["digits"]["lr_student"], epoch, 5))


BASE = dict(adversarial_start=1.0, adversarial_end=2.0, lr_generator=1e-2)


@pytest.mark.parametrize("changes", [
    dict(oh=0.0), dict(bn=0.0), dict(ie=0.0), dict(entropy_temperature=1.0), dict(adversarial_start=3.0), dict(adversarial_end=7.0, epochs=6),
    dict(ramp=False, epochs=6), dict(lr_generator=0.1), dict(generator_steps=2), dict(ramp_begin=0.6, epochs=6), dict(ramp_end=0.9, epochs=6)], ids=str)
def test_every_term_and_reading_reaches_the_generator(changes):
    base = {**BASE, **({"epochs": 6} if "epochs" in changes else {})}
    assert not equal(trained(**base)[1], trained(**{**base, **changes})[1])


@pytest.mark.parametrize("changes", [
    dict(curriculum="none"), dict(curriculum="hard"), dict(curriculum="soft"), dict(granularity="batch"), dict(age_start=0.1), dict(age_end=50.0),
    dict(student_loss="l1"), dict(temperature=3.0), dict(lr_student=0.01), dict(weight_decay=0.1), dict(round_steps=4)], ids=str)
def test_every_reading_reaches_the_student(changes):
    base = dict(age_start=1.0, age_end=2.0)
    assert not equal(trained(**base)[0], trained(**{**base, **changes})[0])


def test_two_switches_not_one():
    """Without a curriculum the ramp goes on, and without a ramp the curriculum does."""
    first = [row for row in trained(curriculum="none", epochs=4, adversarial_end=3.0)[2].rows if "loss_kd" in row]
    assert first[-1]["alpha"] == 3 and all(row["weight"] == 1 for row in first)
    first = [row for row in trained(ramp=False, epochs=4, age_start=0.5, age_end=1.0)[2].rows if "loss_kd" in row]
    assert all(row["alpha"] == 0 for row in first) and all(0 < row["weight"] < 1 for row in first)


@pytest.mark.parametrize("weight, term", [("oh", "loss_oh"), ("ie", "loss_ie"), ("bn", "loss_bn")])
def test_a_generators_term_alone_falls(weight, term):
    teacher = tiny_networks()[0]
    with torch.no_grad():
        teacher.fc.weight.mul_(10)                             # answers that are far from uniform
    weights = {"oh": 0.0, "ie": 0.0, "bn": 0.0, "ramp": False, "entropy_temperature": 1.0, **{weight: 1.0}}
    rows = trained(teacher=teacher, lr_generator=3e-3, student_steps=60, synthesis_batch_size=64, **weights)[2].rows
    first, *_, last = [row[term] for row in rows if term in row]
    assert last < first


def test_the_adversarial_term_alone_falls_where_a_student_at_rest_agrees_but_is_less_sure():
    teacher, _, data = tiny_networks()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        teacher.fc.weight.mul_(10), student.fc.weight.mul_(5)
    for bn in common.batchnorms(student):
        bn.momentum = 0.0                                      # its running statistics stand still, as its weights do
    falls = []
    for rate in (1e-12, 3e-3):
        recorder = Recorder()
        settings = tiny_settings(cu, oh=0.0, ie=0.0, bn=0.0, adversarial_start=1.0, ramp=False, lr_generator=rate, lr_student=1e-12,
                                 student_steps=60, synthesis_batch_size=64)
        cu.distill(teacher, copy.deepcopy(student), data, settings, recorder)
        first, last = [row["loss_adversarial"] for row in recorder.rows if "loss_adversarial" in row]
        falls.append(last - first)
    assert falls[1] < -0.01 and falls[1] < 5 * -abs(falls[0])


def test_the_student_learns_from_this_teacher():
    """Replace the teacher's answers by one class: the student's bias follows."""
    teacher = tiny_networks()[0]
    with torch.no_grad():
        teacher.fc.weight.mul_(1e-3), teacher.fc.bias.copy_(10 * torch.eye(10)[3])
    assert trained(teacher=teacher, epochs=4, student_steps=10, lr_student=0.05)[0]["fc.bias"].argmax() == 3


@pytest.mark.parametrize("rate, term", [("lr_student", "loss_kd"), ("lr_generator", "loss_oh")])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(rate, term):
    with pytest.raises(FloatingPointError, match=f"{term} became"):
        trained(**{rate: float("inf")})


@pytest.mark.parametrize("when", ["synthesis_step", "distillation_step"])
def test_hooks_and_flags_are_back_after_an_exception(when):
    def stop(state):
        if state[when] == 2:
            raise KeyError
    teacher, student, data = tiny_networks()
    before = weights_of(teacher)
    with pytest.raises(KeyError):
        cu.distill(teacher, student, data, tiny_settings(cu), Recorder(stop))
    for network in (teacher, student):
        assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in network.modules())
        assert all(p.requires_grad for p in network.parameters())
    assert same(before, teacher) and teacher.training and student.training


def test_a_collapsed_generator_is_named_and_the_run_goes_on(monkeypatch):
    forward = cu.Generator.forward
    monkeypatch.setattr(cu.Generator, "forward", lambda self, z: 0.1 + 0 * forward(self, z))
    rows = trained()[2].rows
    assert len([row for row in rows if row.get("event") == "collapse"]) == 2 and rows[-1]["epoch"] == 1


def test_difficulty_and_weights_in_the_log_belong_together():
    rows = [row for row in trained(age_start=1.0, age_end=1.5)[2].rows if row.get("event") == "curriculum"]
    assert len(rows) == 2 and rows[-1]["age"] == pytest.approx(1.5)
    for row in rows:
        assert row["difficulty"] == sorted(row["difficulty"]) and row["weights"] == sorted(row["weights"]) and len(row["weights"]) == 5
        assert row["quantiles"] == cu.QUANTILES and 0 <= row["weights"][0] <= row["weights"][-1] <= 1
        low, high = (cu.curriculum_weights(torch.tensor(row["difficulty"]).flip(0), age).tolist() for age in (row["age"] - 0.3, row["age"]))
        assert all(a - 1e-3 <= w <= b + 1e-3 for a, w, b in zip(low, row["weights"], high))
    recorder = trained(granularity="batch", age_start=1.0, age_end=1.5)[2]
    assert recorder.state["weights"].std(1).max() == 0 and recorder.state["difficulty"].std(1).min() > 0     # one weight a batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distill_on_a_gpu(precision):
    teacher, student, data = tiny_networks()
    before = weights_of(student)
    cu.distill(teacher.cuda(), student.cuda(), data, tiny_settings(cu, precision=precision))
    assert not same(before, student.cpu())


def test_bf16_stays_close_to_fp32():
    found = [trained(epochs=1, precision=precision, adversarial_start=1.0) for precision in ("fp32", "bf16")]
    assert not equal(found[0][0], found[1][0])
    rows = [recorder.rows[-1] for _, _, recorder in found]
    for key, value in rows[0].items():
        if key.startswith("loss_") and value is not None:
            assert rows[1][key] == pytest.approx(value, rel=0.15, abs=0.1), key


# ---------------------------------------------------------------------------------------------------------------------- script
def test_a_run_leaves_what_it_promises(teacher_file, in_tmp, capsys):
    cu.main([*tiny_args(cu, teacher_file), "--out", "out"])
    rows = rows_of(in_tmp / "out", without_seconds=False)
    assert [row["event"] for row in rows if row["event"] != "collapse"] == ["start", *["curriculum", "epoch"] * 2, "end"]
    assert {"student_acc", "agreement", "seconds_synthesis", "seconds_distillation", "seconds_evaluation", "images_synthesized", "student_steps",
            "teacher_queries", "loss_kd", "alpha", "age", "weight", "pixel_std"} <= set(rows[-2])
    assert {path.name for path in (in_tmp / "out").iterdir()} == {"log.jsonl", "samples.png", "student.pt", "checkpoint.pt", "curriculum.png"}
    assert rows[-2]["seconds_synthesis"] > 0 and "test accuracy" in capsys.readouterr().out
    assert all(json.loads(line) for line in (in_tmp / "out" / "log.jsonl").read_text().splitlines())


def test_the_picture_shows_what_the_log_holds(teacher_file, in_tmp):
    cu.main([*tiny_args(cu, teacher_file), "--out", "out"])
    rows = rows_of(in_tmp / "out", without_seconds=False)
    figure = cu.draw_curriculum(rows)
    seen = [row for row in rows if row["event"] == "curriculum"]
    median, age = figure.axes[0].lines
    assert list(median.get_ydata()) == [row["difficulty"][2] for row in seen] and list(age.get_ydata()) == [row["age"] for row in seen]
    assert list(figure.axes[1].lines[0].get_ydata()) == [row["weights"][2] for row in seen]
    assert list(figure.axes[2].lines[0].get_ydata()) == [row["alpha"] for row in rows if row["event"] == "epoch"]
    assert list(figure.axes[3].lines[0].get_ydata()) == [row["student_acc"] for row in rows if row["event"] == "epoch"]
    unscored = [{**row, "student_acc": None} if row["event"] == "epoch" else row for row in rows]
    assert len(cu.draw_curriculum(unscored).axes) == 3
    cu.draw_curriculum(rows).savefig(io.BytesIO(), format="png")


def test_the_picture_can_be_drawn_again_from_a_log(teacher_file, in_tmp):
    cu.main([*tiny_args(cu, teacher_file), "--out", "out"])
    curriculum_picture.main(["out/log.jsonl", "again.png"])
    assert (in_tmp / "again.png").stat().st_size > 10_000
    (in_tmp / "other.jsonl").write_text('{"event": "start"}\n')
    with pytest.raises(common.BadInput, match="not a log of cudfkd.py"):
        curriculum_picture.main(["other.jsonl", "no.png"])


TICKS = 12      # 2 epochs of 2 rounds of 1 + 2 steps


@pytest.mark.parametrize("saves", [[1], [2], [3], [4], [6], [7], [11], [12], [13], [2, 5, 9], list(range(1, TICKS + 2))], ids=str)
def test_a_killed_run_ends_like_one_that_was_not(saves, teacher_file, in_tmp, monkeypatch):
    """Also in the middle of a round, whose images are made again."""
    def args(folder):
        return [*tiny_args(cu, teacher_file), "--adversarial-start", "1", "--out", folder, "--resume"]
    cu.main(args("straight"))
    kill_at(monkeypatch, saves)
    for _ in saves:
        with pytest.raises(Killed):
            cu.main(args("killed"))
    cu.main(args("killed"))
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")


@pytest.mark.parametrize("saves", [[1], [2], [5]], ids=str)
def test_resume_between_two_steps_of_the_generator_and_without_batchnorm(saves, in_tmp, monkeypatch):
    data = common.DATASETS["digits"]
    with common.seeded(0):
        run.save_classifier(in_tmp / "plain.pt", models.build_model("lenet5", 10, data.image_shape), "lenet5", data, "digits")

    def args(folder):
        return [*tiny_args(cu, "./plain.pt"), "--generator-steps", "2", "--adversarial-start", "1", "--out", folder, "--resume"]
    cu.main(args("straight"))
    kill_at(monkeypatch, saves)
    for _ in saves:
        with pytest.raises(Killed):
            cu.main(args("killed"))
    cu.main(args("killed"))
    monkeypatch.undo()
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    assert sum("no BatchNorm" in row.get("text", "") for row in rows_of(in_tmp / "killed")) == 1


def test_without_matplotlib_it_says_so_before_any_work(teacher_file, in_tmp, monkeypatch, capsys):
    monkeypatch.setattr(cu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cu.main(tiny_args(cu, teacher_file))
    assert stop.value.code == 2 and "matplotlib" in capsys.readouterr().err and not (in_tmp / "runs").exists()


@pytest.mark.parametrize("flags, message", [
    (["--student-steps", "5"], "must be a multiple of --round-steps, not 5 of 2"), (["--ramp-begin", "0.8"], "parts of the run"),
    (["--ramp-end", "1.5"], "parts of the run"), (["--age-start", "0"], "must be above 0"), (["--entropy-temperature", "0"], "must be above 0"),
    (["--curriculum", "easy"], "choose from log, soft, hard, none"), (["--granularity", "image"], "choose from sample, batch")])
def test_numbers_that_make_no_sense_are_refused_before_the_folder_is_made(flags, message, teacher_file, in_tmp, capsys):
    with pytest.raises(SystemExit) as stop:
        cu.main([*tiny_args(cu, teacher_file), *flags])
    error = capsys.readouterr().err.replace("'", "")
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and not (in_tmp / "runs").exists()


def test_distill_refuses_a_round_that_does_not_divide_an_epoch():
    with pytest.raises(common.BadInput, match="multiple of --round-steps"):
        trained(student_steps=5)


def test_images_that_the_generator_cannot_make_are_refused_before_any_work(in_tmp, capsys):
    data = common.DataSpec((1, 10, 10), 3, (0.5,), (0.5,))
    run.save_classifier(in_tmp / "odd.pt", models.build_model("wrn10_1", 3, data.image_shape), "wrn10_1", data, "folder:x")
    with pytest.raises(SystemExit) as stop:
        cu.main(["--teacher", "./odd.pt", "--student", "wrn10_1", "--dataset", "none", "--preset", "digits"])
    assert stop.value.code == 2 and "multiples of 4, not 10x10" in capsys.readouterr().err and not (in_tmp / "runs").exists()


def test_every_scripted_pair_finds_its_own_preset():
    for name in cu.PRESETS:
        if name.count("-") == 2:
            dataset, teacher, student = name.split("-")
            settings = run.read_settings(["--dataset", dataset, "--teacher", teacher, "--student", student], "cudfkd", cu.__doc__, cu.PRESETS, cu.FLAGS)
            assert settings.preset == name
    for name, preset in cu.PRESETS.items():
        assert preset.keys() == cu.CIFAR10.keys() and preset["student_steps"] % preset["round_steps"] == 0, name
        assert {key for key in preset if key not in ("epochs", "batch_size")} == set(cu.FLAGS)
