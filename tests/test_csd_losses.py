"""Every loss of csd.py against numbers that the authors' functions gave once (1e-5), and against what it must mean."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import csd

S = torch.arange(12.).reshape(3, 4) / 10
T = ((torch.arange(12) * 7) % 12).float().reshape(3, 4) / 2
Y = torch.tensor([0, 1, 3])


def near(value, expected, tolerance=1e-5):
    assert torch.allclose(torch.as_tensor(value, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def head_of_the_golden_check(raw=False):
    head = csd.AuxiliaryHead(5, 3, raw)
    with torch.no_grad():
        head.layers[0].weight.copy_(torch.arange(25.).sin().reshape(5, 5) / 2)
        head.layers[2].weight.copy_(torch.arange(60.).cos().reshape(12, 5) / 2)
        head.layers[0].bias.zero_(), head.layers[2].bias.zero_()
    return head, ((torch.arange(40.) * 0.7).sin() + 1).reshape(8, 5)


def bn_of_the_golden_check():
    bn = nn.BatchNorm2d(3).eval()
    bn.running_mean.copy_(torch.tensor([1., 2, 3])), bn.running_var.copy_(torch.tensor([4., 5, 6]))
    return bn, torch.arange(96.).reshape(2, 3, 4, 4) / 10


def test_golden_1_kd_and_cross_entropies():
    near(csd.kd_loss(S, T, 1.0), 0.713002)
    near(csd.kd_loss(S, T, 20.0), 1.408112)
    near([csd.kd_loss(S[i:i + 1], T[i:i + 1], 20.0).item() for i in range(3)], [1.519382, 1.781594, 0.923359])
    near(csd.one_hot_loss(S, Y), 1.409202)
    near(csd.one_hot_loss(T, Y), 2.615872)


def test_golden_2_feature_loss_and_the_student_total():
    student_map = ((torch.arange(48) * 5) % 13).float().reshape(3, 4, 2, 2) / 10
    teacher_map = ((torch.arange(48) * 3) % 11).float().reshape(3, 4, 2, 2) / 10
    feature = csd.feature_loss(student_map, teacher_map)
    near(feature, 0.246667)
    weights = csd.PRESETS["cifar10-wrn40_2-wrn16_1"]
    total = (weights["kd"] * csd.kd_loss(S, T, weights["temperature"]) + weights["ce"] * F.cross_entropy(S, Y)
             + weights["feature"] * feature)
    near(total, 10.217313)


@pytest.mark.parametrize("how", ["var_mean", "recorded", "recorded, foreign BN class"])
def test_golden_3_bn_loss(how):
    bn, x = bn_of_the_golden_check()
    if how == "recorded, foreign BN class":
        class MyBatchNorm(nn.BatchNorm2d):
            pass
        foreign = MyBatchNorm(3)
        foreign.load_state_dict(bn.state_dict())
        bn = foreign
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    if how != "var_mean":
        with common.frozen(bn), common.recorded_statistics([bn]) as seen:
            bn(x)
        mean, variance = seen[bn]
    near(mean, [3.15, 4.75, 6.35])
    near(variance, [5.9725] * 3)
    near(csd.bn_loss([(mean, variance)], [(bn.running_mean, bn.running_var)]), 7.037509)


def test_golden_4_rotations_and_joint_labels():
    turned = csd.rotations(torch.arange(8).reshape(2, 1, 2, 2))
    assert turned.flatten(1).tolist() == [[0, 1, 2, 3], [1, 3, 0, 2], [3, 2, 1, 0], [2, 0, 3, 1],
                                          [4, 5, 6, 7], [5, 7, 4, 6], [7, 6, 5, 4], [6, 4, 7, 5]]
    assert csd.rotation_labels(torch.tensor([0, 2])).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_golden_5_head_csd_loss_its_gradient_and_the_generator_total():
    head, features = head_of_the_golden_check()
    labels = csd.rotation_labels(torch.tensor([0, 2]))
    features.requires_grad_()
    near(head(features)[0, :3], [0.357947, 0.280786, -0.198651])
    loss = csd.csd_loss(head(features), labels)
    near(loss, -2.549469)
    near(csd.auxiliary_loss(head(features), labels), 2.549469)
    near(csd.auxiliary_loss(head_of_the_golden_check(raw=True)[0](features), labels), 2.683309)
    gradient, = torch.autograd.grad(loss, features)
    near(gradient.norm(), 0.113756)
    near(gradient[0], [0.002950, 0.003277, 0.000591, -0.002639, -0.003442], 2e-6)
    weights = csd.PRESETS["cifar10-wrn40_2-wrn16_1"]
    bn, x = bn_of_the_golden_check()
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    total = (weights["oh"] * csd.one_hot_loss(T, Y) + weights["bn"] * csd.bn_loss([(mean, variance)], [(bn.running_mean, bn.running_var)])
             + weights["csd"] * loss)
    near(total, -15.841311, 2e-5)


def test_golden_6_quantiser_truncates():
    bank = csd.ImageBank((1, 1, 5), 1, "cpu")
    bank.add(torch.tensor([0, 0.0039, 0.5, 0.998, 1]).reshape(1, 1, 1, 5), torch.tensor([0]))
    assert bank.pixels.flatten().tolist() == [0, 0, 127, 254, 255]


def test_golden_7_crop_by_gather():
    x = torch.arange(18.).reshape(2, 1, 3, 3)
    out = common.crop_by_offsets(x, 1, torch.tensor([0, 2]), torch.tensor([1, 0]))
    assert out.flatten(1).tolist() == [[0, 0, 0, 0, 1, 2, 3, 4, 5], [0, 12, 13, 0, 15, 16, 0, 0, 0]]


@pytest.mark.parametrize("classes, low, high", [(10, 2.719, 4.686), (100, 4.994, 6.992)])
def test_golden_8_bounds_of_the_auxiliary_cross_entropy(classes, low, high):
    rows = 4 * classes
    other = torch.linspace(-0.1, 0.1, 2001, dtype=torch.float64)[:, None]                 # all other logits equal, unit length
    logits = torch.cat([(1 - (rows - 1) * other ** 2).clamp(min=0).sqrt(), other.expand(-1, rows - 1)], 1)
    logits = torch.cat([logits, -logits])
    values = torch.stack([csd.auxiliary_loss(F.normalize(row[None], dim=1), torch.tensor([0])) for row in logits])
    assert values.min().item() == pytest.approx(low, abs=2e-3) and values.min() >= low
    assert values.max().item() == pytest.approx(high, abs=2e-3) and values.max() <= high
    drawn = csd.auxiliary_loss(csd.AuxiliaryHead(16, classes)(torch.randn(rows, 16)), torch.arange(rows)).item()
    assert low <= drawn <= high and drawn == pytest.approx(math.log(rows), abs=0.3)


def test_kd_loss_agrees_with_torch_distributions_and_is_zero_for_a_perfect_student():
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=T / 4),
                                                 torch.distributions.Categorical(logits=S / 4)).mean() * 16
    assert csd.kd_loss(S, T, 4.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert csd.kd_loss(T.double(), T.double(), 20.0).item() == pytest.approx(0, abs=1e-12)
    assert csd.adversarial_loss(S, T).item() == pytest.approx(-csd.kd_loss(S, T, 1.0).item())


def test_kd_gradient_against_finite_differences():
    student, teacher = S.double().requires_grad_(), T.double()
    assert torch.autograd.gradcheck(lambda s: csd.kd_loss(s, teacher, 3.0), student)


@pytest.mark.parametrize("loss", [lambda t: csd.kd_loss(S, t, 20.0), lambda t: csd.adversarial_loss(S, t), lambda t: csd.one_hot_loss(t, Y)])
def test_losses_move_when_the_teachers_logits_move(loss):
    assert abs(loss(T) - loss(torch.zeros_like(T))) > 1e-3


def test_csd_loss_pulls_the_generator_towards_the_heads_mistakes():
    head, features = head_of_the_golden_check()
    labels = csd.rotation_labels(torch.tensor([0, 2]))
    features.requires_grad_()
    gradient, = torch.autograd.grad(csd.csd_loss(head(features), labels), features)
    with torch.no_grad():
        assert csd.auxiliary_loss(head(features - gradient), labels) > csd.auxiliary_loss(head(features), labels)
