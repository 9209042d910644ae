"""csd.py: losses against numbers that the authors' functions gave (1e-5); all of distill, written anew."""
import math

import pytest
import torch
from torchvision.models import mnasnet0_5
import torch.nn as nn
import torch.nn.functional as F

import common
import csd
import running
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (Foreign, Log, assert_close, bn_distances, bn_inputs, in_float64, kl, near, near6,
                     odd_teacher, refused, rows_of, save_untrained, sure)

S = torch.arange(12.).reshape(3, 4) / 10
T = ((torch.arange(12) * 7) % 12).float().reshape(3, 4) / 2
Y = torch.tensor([0, 1, 3])
WRN = csd.PRESETS["cifar10-wrn40_2-wrn16_1"].settings


def test_golden_1_and_2_kd_cross_entropies_feature_loss_and_the_student_total():
    near(csd.kd_loss(S, T, 1.0), 0.713002), near(csd.adversarial_loss(S, T), -0.713002)
    near(csd.kd_loss(S, T, 20.0), 1.408112), near(csd.kd_loss(S, T, 4.0), kl(S, T, 4.0).mean())
    rows = [csd.kd_loss(S[i:i + 1], T[i:i + 1], 20.0).item() for i in range(3)]
    near(rows, [1.519382, 1.781594, 0.923359])
    near(csd.kd_loss(T.double(), T.double(), 20.0), 0.0, 1e-12)
    near(csd.one_hot_loss(S, Y), 1.409202), near(csd.one_hot_loss(T, Y), 2.615872)
    assert torch.autograd.gradcheck(lambda s: csd.kd_loss(s, T.double(), 3.0), S.double().requires_grad_())
    feature = csd.feature_loss(((torch.arange(48) * 5) % 13).float().reshape(3, 4, 2, 2) / 10,
                               ((torch.arange(48) * 3) % 11).float().reshape(3, 4, 2, 2) / 10)
    near(feature, 0.246667)
    near(WRN.kd * csd.kd_loss(S, T, WRN.temperature) + WRN.ce * F.cross_entropy(S, Y) + WRN.feature * feature,
         10.217313)


class ForeignBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, ForeignBatchNorm])
def test_golden_3_and_5_bn_loss_head_csd_loss_its_gradient_and_the_generator_total(layer):
    bn, x = layer(3).eval(), torch.arange(96.).reshape(2, 3, 4, 4) / 10
    running = torch.tensor([1., 2, 3]), torch.tensor([4., 5, 6])
    with common.frozen(bn), common.recorded_statistics([bn]) as seen:
        bn(x)
    for found in (seen[bn], (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))):
        near(found[0], [3.15, 4.75, 6.35]), near(found[1], [5.9725] * 3)
        loss_bn = csd.bn_loss([found], [running])
        near(loss_bn, 7.037509)
    heads = csd.AuxiliaryHead(5, 3), csd.AuxiliaryHead(5, 3, raw=True)
    for head in heads:
        head.layers[0].weight.data = torch.arange(25.).sin().reshape(5, 5) / 2
        head.layers[2].weight.data = torch.arange(60.).cos().reshape(12, 5) / 2
        nn.init.zeros_(head.layers[0].bias), nn.init.zeros_(head.layers[2].bias)
    features = ((torch.arange(40.) * 0.7).sin() + 1).reshape(8, 5).requires_grad_()
    labels = csd.rotation_labels(torch.tensor([0, 2]))
    near(heads[0](features)[0, :3], [0.357947, 0.280786, -0.198651])
    loss = csd.csd_loss(heads[0](features), labels)
    near(loss, -2.549469), near(csd.auxiliary_loss(heads[0](features), labels), 2.549469)
    near(csd.auxiliary_loss(heads[1](features), labels), 2.683309)
    gradient, = torch.autograd.grad(loss, features)
    near(gradient.norm(), 0.113756)
    near(gradient[0], [0.002950, 0.003277, 0.000591, -0.002639, -0.003442], 2e-6)
    near(WRN.oh * csd.one_hot_loss(T, Y) + WRN.bn * loss_bn + WRN.csd * loss, -15.841311, 2e-5)


def test_golden_4_6_7_rotations_joint_labels_bytes_and_crops():
    turned = csd.rotations(torch.arange(8).reshape(2, 1, 2, 2))
    assert turned.flatten(1).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1],
                                          [4, 5, 6, 7], [5, 7, 4, 6], [7, 6, 5, 4], [6, 4, 7, 5]]
    assert csd.rotation_labels(torch.tensor([0, 2])).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert csd.to_bytes(torch.tensor([0, 0.0039, 0.5, 0.998, 1, -1])).tolist() == [0, 0, 127, 254, 255, 0]
    top, left = torch.tensor([[0, 2], [1, 0]])
    out = common.crop_by_offsets(torch.arange(18.).reshape(2, 1, 3, 3), 1, top, left)
    assert out.flatten(1).tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5], [0, 12, 13, 0, 15, 16, 0, 0, 0]]


@pytest.mark.parametrize("classes, low, high", [(10, 2.719, 4.686), (100, 4.994, 6.992)])
def test_golden_8_bounds_of_the_auxiliary_cross_entropy(classes, low, high):
    rows = 4 * classes                                         # of unit length, all other logits equal
    other = torch.linspace(-0.1, 0.1, 2001, dtype=torch.float64)[:, None]
    logits = torch.cat([(1 - (rows - 1) * other ** 2).clamp(min=0).sqrt(), other.expand(-1, rows - 1)], 1)
    logits = F.normalize(torch.cat([logits, -logits]), dim=1)
    values = torch.stack([csd.auxiliary_loss(row[None], torch.tensor([0])) for row in logits])
    assert values.min().item() == pytest.approx(low, abs=2e-3) and values.min() >= low
    assert values.max().item() == pytest.approx(high, abs=2e-3) and values.max() <= high
    logits = csd.AuxiliaryHead(16, classes)(torch.randn(rows, 16))
    drawn = csd.auxiliary_loss(logits, torch.arange(rows)).item()
    assert low <= drawn <= high and drawn == pytest.approx(math.log(rows), abs=0.3)


def test_networks_have_the_published_sizes_the_right_range_and_the_authors_start():
    generator = csd.Generator(256, (3, 32, 32))
    for network, weights in ((generator, 2_328_899), (csd.Regressor(64, 128, 8), 640_000),
                             (csd.Regressor(128, 128, 8), 656_384), (csd.Regressor(512, 512, 4), 10_489_856)):
        assert sum(p.numel() for p in network.parameters()) == weights
    pixels = csd.Generator(6, (1, 8, 8))(torch.randn(4, 6))
    assert pixels.shape == (4, 1, 8, 8) and 0 < pixels.min() and pixels.max() < 1
    near(csd.AuxiliaryHead(64, 10)(torch.randn(3, 64)).norm(dim=1), [1.0] * 3)
    assert csd.Regressor(8, 16, 4)(torch.randn(2, 8, 8, 8)).shape == (2, 16, 4, 4)
    linear, _, bn, convolution, *_ = csd.reinitialize(generator).layers
    for layer, mean, tolerance in ((linear, 0, 0.02), (convolution, 0, 0.02), (bn, 1, 0.3)):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=tolerance)
        assert abs(layer.weight.mean() - mean) < 0.01
    assert not linear.bias.any() and not bn.bias.any()


@pytest.mark.parametrize("changes", [{}, dict(raw_head=True), dict(feature=0.0, seed=1)], ids=str)
def test_distill_equals_the_algorithm_written_anew(changes, in_float64):
    """From the same draws, in the paper's order: the same images in the bank and the same student."""
    settings = tiny_settings(csd, adversarial=0.5, kd=0.8, oh=1.2, synthesis_steps=5, lr_generator=0.02,
                             lr_student=0.02, **{"ce": 0.6, **changes})
    (teacher, student, data), (_, other, _), log = tiny_networks(), tiny_networks(), Log()
    pixels, labels = bank = csd.synthesize_bank(sure(teacher), data, settings)
    found = csd.distill(teacher, student, data, settings, log, bank if changes else None)      # makes it
    of_teacher, of_student, steps_of_best = bn_inputs(teacher.eval()), bn_inputs(other), []

    def turned(images, labels):
        return (torch.stack([torch.rot90(image, k, (1, 2)) for image in images for k in range(4)]),
                torch.tensor([4 * label + k for label in labels.tolist() for k in range(4)]))

    def head_loss(images, labels):
        rotated, joint = turned(images, labels)
        other.eval()(rotated)                                  # below: what the student's linear layer takes
        return F.cross_entropy(head(F.relu(other.bn(of_student[other.bn])).mean((2, 3))), joint)
    with common.seeded(settings.seed ^ 2 ** 31):
        head = csd.AuxiliaryHead(64, 10, settings.raw_head)
        regressor = csd.Regressor(64, 64, 2) if settings.feature else torch.nn.Identity()
        sgd = torch.optim.SGD([*other.parameters(), *regressor.parameters()], 1, 0.9, weight_decay=1e-4)
        head_sgd = torch.optim.SGD(head.parameters(), settings.lr_head, 0.9, weight_decay=1e-4)
        for epoch, rate in enumerate((0.02, 0.01)):            # half a cosine
            generator, tried = csd.reinitialize(csd.Generator(6, data.image_shape)), []
            z, y = torch.randn(10, 6).requires_grad_(), torch.randint(10, (10,)).sort().values
            adam = torch.optim.Adam([*generator.parameters(), z], settings.lr_generator, (0.5, 0.999))
            for _ in range(5):
                x = generator(z)
                images = common.normalize(common.augment(x, data), data)
                t, s = teacher(images), other.eval()(images)
                loss = (1.2 * F.cross_entropy(t, y) + settings.bn * sum(bn_distances(of_teacher))
                        - settings.csd * head_loss(images, y) - 0.5 * kl(s, t, 1).mean())
                tried.append((loss.item(), x.detach().clone()))
                adam.zero_grad(), loss.backward(), adam.step()
            steps_of_best.append(min(range(5), key=lambda step: tried[step][0]))
            x = tried[steps_of_best[-1]][1]
            near6(log.shown[epoch][0], x)
            pixels, labels = torch.cat([pixels, (255 * x).floor().to(torch.uint8)]), torch.cat([labels, y])
            csd.reinitialize(head)
            sgd.param_groups[0]["lr"] = rate
            for batch in torch.randperm(len(pixels)).split(8)[:3]:
                images = common.normalize(common.augment(pixels[batch] / 255, data), data)
                t, s = teacher(images).detach(), other.train()(images)
                wrong = regressor(of_student[other.bn]) - of_teacher[teacher.bn].detach()
                loss = (0.8 * kl(s, t, settings.temperature).mean()
                        + settings.ce * F.cross_entropy(s, labels[batch])
                        + settings.feature * wrong.square().mean())
                sgd.zero_grad(), loss.backward(), sgd.step()
                head_sgd.zero_grad(), head_loss(images, labels[batch]).backward(), head_sgd.step()
    assert torch.equal(found[0], pixels) and torch.equal(found[1], labels)
    assert 0 < min(steps_of_best) < 4                          # neither the first batch nor the last
    assert_close(student, other), assert_close(log.state["head"], head)


@pytest.mark.parametrize("sides, height", [((8, 8), 4), ((7, 7), 4), ((4, 6), 7), ((3, 3), 1)])
def test_the_regressor_pools_as_pytorch_does(sides, height):
    regressor, maps = csd.Regressor(3, 5, height).eval(), torch.randn(2, 3, *sides)
    near6(regressor(maps), regressor.layers(F.adaptive_avg_pool2d(maps, height)))


def test_the_last_map_is_named_found_or_unknown():
    (wide, _, data), foreign = tiny_networks(), Foreign()
    assert csd.last_map(wide, "", data) == (wide.bn, (64, 2, 2))
    assert csd.last_map(foreign, "", data) == (None, None)
    assert csd.last_map(foreign, "pool", data) == (foreign.pool, (12, 8, 8))
    for name in ("out", "nowhere"):                            # takes vectors; is not there
        with pytest.raises(common.BadInput, match=f"Foreign.*'{name}'.*maps"):
            csd.last_map(foreign, name, data)


def test_the_script_says_which_term_is_off_and_refuses_what_it_cannot_make(teacher_file, in_tmp, capsys):
    argv = [*tiny_args(csd, save_untrained(in_tmp / "plain.pt", "lenet5")), "--student", "helpers:Foreign"]
    csd.main([*argv, "--out", "off"])
    csd.main([*argv, "--student-last-map", "pool", "--out", "on"])
    off, on = rows_of("off"), rows_of("on")
    assert off[-2]["loss_feature"] == off[-2]["loss_bn"] == 0 < on[-2]["loss_feature"]
    off, on = (" ".join(row.get("text", "") for row in rows) for rows in (off, on))
    assert off.count("the feature term is off") == off.count("the BatchNorm term is off") == 1
    assert "feature" not in on
    argv = [*tiny_args(csd, teacher_file), "--teacher-last-map", "nowhere"]
    assert "WideResNet" in refused(csd, argv, capsys) and "10x10" in refused(csd, odd_teacher(in_tmp), capsys)
    with pytest.raises(common.BadInput, match="square.*multiple of 4, not 8x12"):
        csd.Generator(6, (1, 8, 12))


def test_a_deep_student_that_overflows_in_eval_mode_does_not_reach_the_head():
    """After one step, the running statistics of MNASNet are far from its activations."""
    data = common.DataSpec((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3)
    settings = tiny_settings(csd, epochs=1, student_steps=3, batch_size=8, feature=0.0)
    with common.seeded(0):
        teacher, student = common.build_model("wrn10_1", 10, (3, 32, 32)), mnasnet0_5(num_classes=10)
    seen, real = [], csd.auxiliary_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csd, "auxiliary_loss",
                      lambda logits, labels: seen.append(logits) or real(logits, labels))
        csd.distill(teacher.eval(), student, data, settings)
    assert len(seen) == 3 and all(logits.isfinite().all() for logits in seen)


def test_what_cannot_work_is_refused_before_it_costs_anything(in_tmp, capsys, monkeypatch):
    """A wrong layer of the student before a teacher is trained; a bank of floats; no step at all."""
    monkeypatch.setattr(running, "train_teacher", None)
    argv = "--dataset digits --teacher wrn10_1 --student wrn10_1 --student-last-map nowhere".split()
    assert "has no layer nowhere" in refused(csd, argv, capsys)
    teacher, student, data = tiny_networks()
    with pytest.raises(common.BadInput, match="must be uint8"):
        csd.distill(teacher, student, data, tiny_settings(csd), bank=(torch.rand(8, 1, 8, 8), torch.zeros(8)))
    with pytest.raises(common.BadInput, match="at least 1"):
        csd.distill(teacher, student, data, tiny_settings(csd, bank_synthesis_steps=0))


def test_the_input_of_a_layer_that_works_in_place_is_what_it_was_given():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True))
    with common.recorded_inputs([network[1]]) as seen:
        network(torch.randn(20, 4))
    assert seen[network[1]].min() < 0
