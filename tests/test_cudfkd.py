"""cudfkd.py: golden numbers (float64, 1e-5; 1e-4 at temperature 20, as they were taken in float32), what the
weights minimise, the presets' schedules, and the whole of distill, written anew batch by batch."""
import math

import pytest
import torch
import torch.nn as nn

import common
import running
import cudfkd as cu
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (D, Log, assert_close, bn_distances, bn_inputs, in_float64, kl, near, near6, odd_teacher,
                     refused, rows_of, save_untrained, sure)

S = torch.arange(12, dtype=D).reshape(3, 4) / 10
T = ((torch.arange(12) * 7) % 12).to(D).reshape(3, 4) / 2
LOSSES = torch.tensor([0.5, 1.5, 2.5, 4.0], dtype=D)


def regularizer_of(weights, age, curriculum="log"):
    """f(v; λ), as the docstring of curriculum_weights gives it."""
    if curriculum == "hard":
        return -age * weights
    if curriculum == "soft":
        return age * (weights ** 2 / 2 - weights)
    if curriculum == "log":
        other = (1 + math.exp(-age) - weights).clamp(min=0)                # by rounding, v may be above 1
        return torch.xlogy(other, other) + torch.xlogy(weights, weights) - age * weights
    return torch.zeros_like(weights)


def loss_of(losses, age, curriculum="log", granularity="sample"):
    """The student's loss, as distill puts it together."""
    difficulty = cu.difficulties(losses, granularity)
    return cu.curriculum_loss(difficulty, cu.curriculum_weights(difficulty.detach(), age, curriculum))


@pytest.mark.parametrize("curriculum, weights, regularizer", [
    ("hard", [1.0, 1, 0, 0], [-2.0, -2, 0, 0]), ("soft", [0.75, 0.25, 0, 0], [-0.9375, -0.4375, 0, 0]),
    ("log", [0.928221, 0.706700, 0.428635, 0.135335], [-2.251679, -2.021848, -1.465719, -0.541341]),
    ("none", [1.0] * 4, [0.0] * 4)])
def test_golden_2_weights_and_regularizers(curriculum, weights, regularizer):
    found = cu.curriculum_weights(LOSSES, 2.0, curriculum)
    near(found, weights), near(regularizer_of(found, 2.0, curriculum), regularizer)
    one = cu.curriculum_weights(LOSSES.mean(), 2.0, curriculum)                # for the whole batch
    for granularity, v in (("sample", found), ("batch", one)):     # v is a constant; the sum is divided by N
        losses = LOSSES.clone().requires_grad_()
        loss = loss_of(losses, 2.0, curriculum, granularity)
        near(loss, (v * LOSSES).mean()), near(torch.autograd.grad(loss, losses)[0], v.expand(4) / 4)
    for call in (lambda: cu.curriculum_weights(LOSSES, 2.0, curriculum.title()),
                 lambda: cu.difficulties(LOSSES, "")):
        with pytest.raises(ValueError, match="must be (hard, soft, log or none|sample or batch)"):
            call()


def test_goldens_1_2_3_losses_of_each_image_and_the_three_published_readings():
    losses, l1 = cu.kd_losses(S, T, 20), cu.l1_losses(S, T)
    near(losses, [1.519382, 1.781594, 0.923359], 1e-4), near(losses.mean(), 1.408112, 1e-4)
    near(cu.kd_losses(S, T, 5).mean(), 1.386122), near(cu.kd_losses(S, T, 2).mean(), 1.173775)
    near(l1, [2.1, 2.3, 2.3])
    near(loss_of(LOSSES, 2.0), 0.784272)
    near6(cu.curriculum_weights(LOSSES, 12.0), [0.999996, 0.999979, 0.999931, 0.999671])
    scalar = cu.curriculum_weights(LOSSES.mean(), 2.0)
    near(scalar, 0.532235), near(regularizer_of(scalar, 2.0), -1.705105)
    near(loss_of(LOSSES, 2.0, granularity="batch"), 1.130998)
    near(loss_of(losses, 2.0), 0.989710, 1e-4)                 # by image
    v, batch = cu.curriculum_weights(losses.mean(), 2.0), loss_of(losses, 2.0, granularity="batch")
    near(v, 0.730927, 1e-4), near(batch, 1.029227, 1e-4)       # by batch, the code's last state
    near(batch + regularizer_of(v, 2.0), -1.027853, 1e-4)           # printed by its first one
    near(loss_of(l1, 2.0), 1.118346), near(loss_of(l1, 2.0, "log", "batch"), 1.120550)


@pytest.mark.parametrize("name, growth, slope", [
    ("cifar10", 0.5, 1e-4), ("cifar10-vgg11-resnet18", 0.5, 1e-4), ("cifar10-wrn40_2-wrn16_1", 0.05, 1e-4),
    ("cifar10-wrn40_2-wrn40_1", 0.2, 1e-4), ("cifar100", 0.35, 2e-5), ("tiny-imagenet", 0.15, 2e-5),
    ("cifar100-wrn40_2-wrn40_1", 0.12, 2e-5), ("cifar100-wrn40_2-wrn16_2", 0.15, 2e-5), ("svhn", 0.03, 2e-5)])
def test_golden_4_ramp_and_age_of_each_preset_are_what_the_codes_increments_add_up_to(name, growth, slope):
    preset = cu.PRESETS[name].settings
    ramp = preset.adversarial_start, preset.adversarial_end, preset.ramp_begin, preset.ramp_end
    begin, end = (math.floor(preset.epochs * part) for part in ramp[2:])
    assert preset.age_end - preset.age_start == pytest.approx(slope * preset.epochs * preset.student_steps)
    assert ramp[1] == pytest.approx(ramp[0] + growth * (end - begin - (name != "svhn")))
    alpha = ramp[0]
    for epoch in range(preset.epochs if name != "svhn" else 0):            # svhn's ramp has a test of its own
        assert cu.adversarial_weight(epoch, preset.epochs, *ramp) == pytest.approx(alpha), epoch
        alpha += growth * (begin < epoch < end)


def test_svhn_reaches_the_next_projects_end_in_one_step_less_and_stays_within_003_of_it():
    """Their closed form: at the end of epoch e, 0.03 for each epoch from 62 to e, at most 125 of them."""
    theirs = [0.0, *(0.03 * min(125, max(0, epoch - 62)) for epoch in range(249))]
    preset = cu.PRESETS["svhn"].settings
    ours = [cu.adversarial_weight(epoch, 250, preset.adversarial_start, preset.adversarial_end, 0.25, 0.75)
            for epoch in range(250)]
    assert theirs[-1] == ours[-1] == pytest.approx(3.75) and sum(alpha > 0 for alpha in ours) == 250 - 64
    rises = [[b - a for a, b in zip(alphas, alphas[1:]) if b > a] for alphas in (theirs, ours)]
    assert [len(steps) for steps in rises] == [125, 124] and max(rises[1]) == pytest.approx(0.0302, abs=5e-5)
    assert max(abs(one - other) for one, other in zip(theirs, ours)) <= 0.03 + 1e-9


def test_golden_4_the_ramp_and_short_runs():
    for start, end, expected in ((0.0, 62.0, {0: 0, 63: 0, 64: 0.5, 125: 31, 187: 62, 249: 62}),
                                 (0.5, 6.7, {0: 0.5, 125: 3.6, 249: 6.7})):
        for epoch, value in expected.items():
            assert cu.adversarial_weight(epoch, 250, start, end, 0.25, 0.75) == pytest.approx(value)
    for epochs in (1, 2, 3, 5, 8, 30):
        values = [cu.adversarial_weight(epoch, epochs, 1.0, 5.0, 0.25, 0.75) for epoch in range(epochs)]
        assert values == sorted(values) and values[0] == 1 and values[-1] == (5 if epochs > 2 else 1)


def test_goldens_5_and_6_the_generators_terms_and_totals_with_the_presets_own_weights():
    near(cu.one_hot_loss(T), 0.282539)
    for temperature, entropy in ((1, 1.288324), (2, 1.346482), (5, 1.379380), (20, 1.385889)):
        near(cu.information_entropy_loss(T, temperature), -entropy)
    near(cu.kd_losses(S, T, 3), [1.306365, 1.776099, 0.857416])
    student, teacher = S.clone().requires_grad_(), T.clone().requires_grad_()
    loss = cu.adversarial_loss(student, teacher, student.argmax(1) == teacher.argmax(1))
    near(loss, -0.435455)                                      # they agree on the first image alone
    for gradient in torch.autograd.grad(loss, (student, teacher)):
        assert gradient[0].any() and not gradient[1:].any()
    x, settings = torch.arange(96, dtype=D).reshape(2, 3, 4, 4) / 10, cu.CIFAR10_WIDE
    running = torch.tensor([1.0, 2, 3], dtype=D), torch.tensor([4.0, 5, 6], dtype=D)
    bn = cu.bn_loss([(x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))], [running])
    entropy = cu.information_entropy_loss(T, settings.entropy_temperature)
    easy = settings.oh * cu.one_hot_loss(T) + settings.bn * bn + settings.ie * entropy
    near(bn, 7.037509), near(easy, -20.397735), near(easy + settings.adversarial_end * loss, -23.315282)


def test_at_temperature_20_the_entropy_is_near_its_largest_even_if_all_images_are_alike():
    alike = torch.zeros(8, 10)
    alike[:, 3] = 10                                           # the teacher is certain of class 3
    assert cu.information_entropy_loss(alike, 20) < -0.99 * math.log(10)
    assert cu.information_entropy_loss(alike, 1) > -0.01 * math.log(10)


def test_parameter_counts_start_and_range_of_the_generator():
    for args, count in (((1024, (3, 64, 64)), 35_139_139), ((512, (3, 32, 32)), 8_776_259)):
        generator = cu.Generator(*args)
        assert sum(p.numel() for p in generator.parameters()) == count
    for module in generator.modules():
        mean, tolerance = (1, 0.3) if isinstance(module, nn.BatchNorm2d) else (0, 0.1)
        if hasattr(module, "weight"):
            assert module.weight.std().item() == pytest.approx(0.02, rel=tolerance)
            assert abs(module.weight.mean() - mean) < 0.01 and (module.bias is None or not module.bias.any())
    for shape in ((1, 8, 8), (1, 28, 28), (3, 64, 64), (2, 12, 20)):
        pixels = cu.Generator(6, shape, 4)(torch.randn(5, 6))
        assert pixels.shape == (5, *shape) and pixels.min() >= 0 and pixels.max() <= 1


@pytest.mark.parametrize("curriculum", ["hard", "soft", "log"])
@pytest.mark.parametrize("age", [0.3, 1.0, 2.0, 7.0, 12.0])
def test_v_minimises_v_times_difficulty_plus_f_over_a_fine_grid(curriculum, age):
    grid = torch.linspace(0, 1, 100_001, dtype=D)
    for loss in (0.0, 0.01, 0.5, 1.0, 1.9, 2.1, 5.0, 11.0, 30.0):
        objective = grid * loss + regularizer_of(grid, age, curriculum)
        v = cu.curriculum_weights(torch.tensor(loss, dtype=D), age, curriculum)
        assert objective.isfinite().all() and abs(grid[objective.argmin()] - v) <= 1e-5
        assert v * loss + regularizer_of(v, age, curriculum) <= objective.min() + 1e-12


@pytest.mark.parametrize("curriculum", ["soft", "log"])
def test_a_constant_v_descends_the_whole_objective(curriculum):
    """The derivative of min over v of v ℓ + f(v; λ) by ℓ is v, with all of v's own dependence on ℓ."""
    losses = LOSSES.clone().requires_grad_()
    v = cu.curriculum_weights(losses, 5.0, curriculum)
    objective = (v * losses + regularizer_of(v, 5.0, curriculum)).sum()
    near(torch.autograd.grad(objective, losses)[0], v)


def test_the_loss_itself_takes_the_weights_as_constants():
    """So that somebody who copies it and forgets detach() does not push the student away from the teacher."""
    losses = LOSSES.clone().requires_grad_()
    v = cu.curriculum_weights(losses, 2.0)
    near(torch.autograd.grad(cu.curriculum_loss(losses, v), losses)[0], v.detach() / 4)


def test_the_default_weight_falls_over_the_same_width_at_every_age():
    for age in (0.2, 2.0, 12.0):
        below, at, above = cu.curriculum_weights(torch.tensor([age - 1, age, age + 1], dtype=D), age)
        near(at, (1 + math.exp(-age)) / 2), near(below / above, math.e)


def test_weights_are_computed_once_a_step(monkeypatch):
    calls, weigh = [], cu.curriculum_weights
    monkeypatch.setattr(cu, "curriculum_weights", lambda *args: calls.append(args) or weigh(*args))
    settings = tiny_settings(cu)
    cu.distill(*tiny_networks(), settings)
    assert len(calls) == settings.epochs * settings.student_steps


@pytest.mark.parametrize("changes", [
    dict(student_loss="kl"), dict(student_loss="l1", granularity="batch")], ids=["image", "batch"])
def test_distill_equals_the_algorithm_written_anew(changes, in_float64):
    """Batch by batch, where distill makes a round's images in passes of five."""
    settings = tiny_settings(cu, epochs=4, generator_steps=2, adversarial_start=1.0, adversarial_end=3.0,
                             oh=0.7, bn=0.6, ie=3.0, age_start=0.5, lr_student=0.02, lr_generator=1e-3,
                             **changes)
    (teacher, student, data), (_, other, _), log, step = tiny_networks(), tiny_networks(), Log(), 0
    found, of_batch = cu.distill(sure(teacher), student, data, settings, log), "granularity" in changes
    seen = bn_inputs(teacher.eval())
    with common.seeded(settings.seed):
        generator = cu.Generator(6, data.image_shape, 4)
        adam = torch.optim.Adam(generator.parameters(), 1e-3, (0.9, 0.99))
        sgd = torch.optim.SGD(other.parameters(), momentum=0.9, weight_decay=settings.weight_decay)
        for epoch, alpha in enumerate((1, 1, 1, 3)):
            sgd.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * epoch / 4)) / 2
            for _ in range(2):                                 # rounds
                for _ in range(2):
                    other.eval(), generator.train()
                    x = common.normalize(generator(torch.randn(6, 6)), data)
                    t, s = teacher(x), other(x)
                    p = (t / settings.entropy_temperature).softmax(1).mean(0)
                    agreed = s.argmax(1) == t.argmax(1)
                    loss = (-0.7 * t.log_softmax(1).amax(1).mean() + 0.6 * sum(bn_distances(seen))
                            + 3 * (p * p.log()).sum() - alpha * (agreed * kl(s, t, 3)).mean())
                    adam.zero_grad(), loss.backward(), adam.step()
                other.train(), generator.eval()
                for z in torch.randn(16, 6).split(8):
                    x = common.normalize(generator(z), data).detach()
                    t, s = teacher(x).detach(), other(x)
                    losses = (s - t).abs().mean(1) if of_batch else kl(s, t, settings.temperature)
                    age, hard = 0.5 + (settings.age_end - 0.5) * step / 16, losses.detach()
                    v = (1 + math.exp(-age)) / (1 + ((hard.mean() if of_batch else hard) - age).exp())
                    sgd.zero_grad(), (v * losses).mean().backward(), sgd.step()
                    step += 1
    assert_close(student, other), assert_close(found.train(), generator.train())
    last, parts = log.rows[-1], torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])    # quantiles in the last batch
    near6(last["difficulty"], losses.quantile(parts)), near6(last["weights"], v.expand(8).quantile(parts))
    near6(last["age"], age), near6(log.shown[-1][0], common.denormalize(x, data))
    assert [row["alpha"] for row in log.rows] == [1, 1, 1, 3]


@pytest.mark.usefixtures("unchecked")
def test_two_switches_not_one_and_while_alpha_is_0_the_student_is_not_asked():
    """Without a curriculum the ramp goes on, and without a ramp the curriculum does."""
    for changes, alphas in ((dict(curriculum="none"), [0, 0, 0, 3]), (dict(ramp=False), [0, 0, 0, 0])):
        (teacher, student, data), log, asked = tiny_networks(), Log(), []
        student.register_forward_pre_hook(lambda student, x: asked.append(student.training))
        cu.distill(teacher, student, data, tiny_settings(cu, epochs=4, adversarial_end=3.0, **changes), log)
        assert [row["alpha"] for row in log.rows] == alphas and asked.count(False) == 2 * (alphas[-1] > 0)
        assert ["agreed" in row for row in log.rows] == [alpha > 0 for alpha in alphas]
        assert all((row["weight"] == 1) == ("curriculum" in changes) for row in log.rows)


def test_without_batchnorm_the_term_is_off_and_the_log_says_so(in_tmp):
    cu.main([*tiny_args(cu, save_untrained(in_tmp / "plain.pt", "lenet5")), "--out", "out"])
    assert sum("the BatchNorm term is off" in row.get("text", "") for row in rows_of("out")) == 1
    assert rows_of("out")[-2]["loss_bn"] == 0


def test_what_the_script_refuses_and_distill_too(teacher_file, in_tmp, capsys):
    for flag, value, message in (
            ("--student-steps", "5", "a multiple of --round-steps"), ("--age-start", "0", "must be above 0"),
            ("--ramp-begin", "0.8", "shares of the run"), ("--ramp-end", "1.5", "shares of the run"),
            ("--entropy-temperature", "0", "must be above 0"), ("--curriculum", "easy", "log, soft, hard"),
            ("--granularity", "image", "choose from sample, batch")):
        assert message in refused(cu, [*tiny_args(cu, teacher_file), flag, value], capsys)
    assert "multiples of 4, not 10x10" in refused(cu, odd_teacher(in_tmp), capsys)
    with pytest.raises(common.BadInput, match="multiple of --round-steps"):
        cu.distill(*tiny_networks(), tiny_settings(cu, student_steps=5))
    with pytest.raises(common.BadInput, match="multiples of 8, not 68x68"):
        cu.Generator(6, (3, 68, 68))


def test_every_preset_is_sound_and_found_by_its_data_set_and_networks():
    """The first one with these three, and every pair that the authors' scripts name has one of its own."""
    for name, preset in cu.PRESETS.items():
        cu.check(preset.settings)
        argv = ["--dataset", preset.dataset, "--teacher", preset.teacher, "--student", preset.student]
        found = running.parse("cudfkd", cu.__doc__, cu.Settings, cu.PRESETS, argv)[0].preset
        assert cu.PRESETS[found][:3] == preset[:3]
        if name.count("-") == 2:
            assert found == name == "-".join(preset[:3])


def test_the_presets_for_a_cpu_hold_their_values_where_they_stand():
    """The cases in which a value of the preset had to be looked for in another one."""
    cpu, mnist, short = (cu.PRESETS[name].settings for name in ("cifar10-cpu", "mnist-cpu", "mnist"))
    assert (cpu.adversarial_start, cpu.adversarial_end, cpu.age_start, cpu.age_end) == (0.5, 2.0, 0.5, 12.0)
    assert (mnist.adversarial_start, mnist.adversarial_end, mnist.age_start, mnist.age_end) == (0, 5, 0.2, 2)
    assert (cpu.entropy_temperature, mnist.entropy_temperature, short.entropy_temperature) == (1, 1, 1)
