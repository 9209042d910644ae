"""Losses and generator of dafl.py, rdskd.py and zskd.py against numbers that the authors' functions gave once (1e-6, float64)."""
import math

import pytest
import torch

import common
import dafl
import models
import rdskd
import zskd

D = torch.float64
T = ((torch.arange(12) * 7) % 12).to(D).reshape(3, 4) / 4
S = torch.arange(12, dtype=D).reshape(3, 4) / 10
FEATURES = (torch.arange(15, dtype=D) - 7).reshape(3, 5) / 10
T1, T2 = ((torch.arange(8) * 3) % 8).to(D).reshape(2, 4) / 2, ((torch.arange(8) * 5 + 1) % 8).to(D).reshape(2, 4) / 5
X1 = torch.arange(32, dtype=D).reshape(2, 1, 4, 4) / 10 - 1.5
X2 = ((torch.arange(32) * 7) % 32).to(D).reshape(2, 1, 4, 4) / 10 - 1.5
BOTH = pytest.mark.parametrize("method", [dafl, rdskd])


def near(value, expected, tolerance=1e-6):
    value = torch.as_tensor(value, dtype=D).detach()
    assert torch.allclose(value, torch.tensor(expected, dtype=D), atol=tolerance, rtol=0), value


def generator_loss(preset, logits):
    return (preset["oh"] * dafl.one_hot_loss(logits) + preset["ie"] * dafl.information_entropy_loss(logits)
            + preset["act"] * dafl.activation_loss(FEATURES))


def test_dafl_golden_1_terms():
    assert T.argmax(1).tolist() == [3, 1, 2]
    near(dafl.one_hot_loss(T), 0.5978744)
    near(dafl.information_entropy_loss(T), -0.5847696)
    near(dafl.information_entropy_loss(T, natural_log=True), -1.3464818)
    near(dafl.activation_loss(FEATURES), -0.3733333)
    near(dafl.activation_loss(FEATURES, sum_features=True), -1.8666667)


@pytest.mark.parametrize("preset, expected", [("mnist", -2.3633069), ("cifar10", -2.8976876), ("cifar100", -11.4337880)])
def test_dafl_golden_2_totals_with_the_presets_own_weights(preset, expected):
    near(generator_loss(dafl.PRESETS[preset], T), expected)


@BOTH
def test_dafl_golden_3_kd(method):
    near(method.kd_loss(S, T, 1.0), 0.2940561)
    soft = -(T.softmax(1) * S.log_softmax(1)).sum(1).mean()
    near(soft, 1.3844015)
    student = S.clone().requires_grad_()                       # KL and soft cross-entropy: the same gradient
    one, = torch.autograd.grad(method.kd_loss(student, T, 1.0), student)
    other, = torch.autograd.grad(-(T.softmax(1) * student.log_softmax(1)).sum(1).mean(), student)
    near(one - other, [[0.0] * 4] * 3)


def test_dafl_golden_4_gradients():
    logits = T.clone().requires_grad_()
    gradient, = torch.autograd.grad(dafl.one_hot_loss(logits) + 5 * dafl.information_entropy_loss(logits), logits)
    near(gradient[0], [-0.0035481, 0.1716107, 0.0275016, -0.1955643])
    near(gradient[2], [0.0185522, 0.0555114, -0.1276393, 0.0535757])
    near(gradient.sum(1), [0.0] * 3)


def test_dafl_golden_5_limits():
    uniform = torch.zeros(3, 10, dtype=D)
    near(dafl.one_hot_loss(uniform), 2.3025851)
    near(dafl.information_entropy_loss(uniform), -1.0)
    near(dafl.kd_loss(uniform, uniform, 1.0), 0.0)
    near(dafl.one_hot_loss(10 * torch.eye(4, dtype=D)), 0.0001362)
    near(dafl.information_entropy_loss(10 * torch.eye(4, dtype=D)), -0.6020600)
    near(dafl.information_entropy_loss(10 * torch.eye(4, dtype=D)[:1].expand(4, -1)), -0.0006506)
    sure = (1000 * torch.eye(4)[:1].expand(4, -1)).requires_grad_()                       # float32
    p = sure.softmax(1).mean(0)
    assert (p * p.log()).sum().isnan()                         # as it is usually written
    for loss in (dafl.information_entropy_loss(sure), rdskd.information_entropy_loss(sure)):
        gradient, = torch.autograd.grad(loss, sure)
        assert loss.item() == 0 and gradient.isfinite().all()


@BOTH
def test_safe_entropy_equals_the_naive_one_where_that_is_finite(method):
    for _ in range(20):
        logits = 3 * torch.randn(7, 5, dtype=D)
        p = logits.softmax(1).mean(0)
        scale = math.log(10) if method is dafl else 1
        near(method.information_entropy_loss(logits), ((p * p.log()).sum() / scale).item(), 1e-12)


def generator_of(method, latent_dim, channels):
    generator = method.Generator(latent_dim, (channels, 32, 32)).double()
    with torch.no_grad():
        for name, p in generator.named_parameters():
            if p.dim() >= 2:
                p.copy_((((torch.arange(p.numel()) * 7919) % 1009).double() / 1009 - 0.5).reshape(p.shape) * 0.5)
            elif isinstance(generator.get_submodule(name.rpartition(".")[0]), (torch.nn.Linear, torch.nn.Conv2d)):
                p.zero_()
    return generator, torch.linspace(-1, 1, 3 * latent_dim, dtype=D).reshape(3, latent_dim)


@BOTH
def test_dafl_golden_6_generator(method):
    count = lambda *args: sum(p.numel() for p in method.Generator(*args).parameters())     # noqa: E731
    assert count(100, (1, 32, 32)) == 1_049_985 and count(1000, (3, 32, 32)) == 8_423_939
    generator, z = generator_of(method, 4, 1)
    images = generator(z)
    assert images.shape == (3, 1, 32, 32)
    near(images.abs().mean(), 0.8946518)                       # 0.8958080 with the usual eps
    near(images[0, 0, 0, :4], [0.716467, -1.200503, -1.176074, -1.194454])
    near(images[2, 0, 31, -3:], [-1.248844, -1.313633, -1.012115])
    near(generator.layers[-1].running_mean, [0.000932])
    near(generator.layers[-1].running_var, [0.958861])
    near(generator.eval()(z).abs().mean(), 0.725995)
    with common.frozen(generator):                             # as phase 2 of RDSKD runs it
        near(generator(z).abs().mean(), 0.725995)
    generator, z = generator_of(method, 8, 3)
    images = generator(z)
    near(images.abs().mean(), 0.8833136)
    near(images[0, 0, 0, :4], [0.062054, 1.300203, -0.994481, 0.074330])
    near(images[2, 2, 31, -3:], [0.752380, 1.429036, -0.658325])


def test_dafl_golden_7_students_learning_rate():
    for epoch, expected in ((799, 0.1), (800, 0.01), (1599, 0.01), (1600, 0.001)):
        assert dafl.learning_rate(0.1, "steps", epoch / 2000) == pytest.approx(expected)
    assert [round(dafl.learning_rate(0.1, "steps", e / 250), 9) for e in (99, 100, 199, 200)] == [0.1, 0.01, 0.01, 0.001]
    assert [round(rdskd.learning_rate(2e-3, "steps", e / 1000), 9) for e in (0, 799, 800, 999)] == [2e-3, 2e-3, 2e-4, 2e-4]
    for method in (dafl, rdskd):
        assert method.learning_rate(0.1, "constant", 0.99) == 0.1 and method.learning_rate(0.1, "cosine", 0.5) == pytest.approx(0.05)


def test_rdskd_golden_1_terms():
    logits, images = torch.cat([T1, T2]), torch.cat([X1, X2])
    near(rdskd.one_hot_loss(logits), 0.6413839)
    near(rdskd.information_entropy_loss(logits), -1.3085979)
    near((X2 - X1).norm(), 6.9282032)
    near(rdskd.diversity_loss(images, logits), 0.1192106)


def rdskd_total(logits, images, reference_oh, reference_ie):
    return (rdskd.increment_penalty(rdskd.one_hot_loss(logits), reference_oh)
            + rdskd.increment_penalty(rdskd.information_entropy_loss(logits), reference_ie) + rdskd.diversity_loss(images, logits))


@pytest.mark.parametrize("references, expected", [((0, 0), 2.2885164), ((0.5, -1), 2.0055533), ((1, -1.3862944), 1.8986476)])
def test_rdskd_golden_2_totals(references, expected):
    near(rdskd_total(torch.cat([T1, T2]), torch.cat([X1, X2]), *references), expected)


def test_rdskd_golden_3_gradients():
    logits, images = torch.cat([T1, T2]).requires_grad_(), torch.cat([X1, X2]).requires_grad_()
    of_logits, of_images = torch.autograd.grad(rdskd_total(logits, images, 0.5, -1), (logits, images))
    near(of_logits[:2], [[0.0025184, 0.0316564, -0.0395035, 0.0053287], [0.0164780, -0.0630624, 0.0120881, 0.0344963]])
    near(of_logits[2], [0.0322793, -0.1196937, 0.0609073, 0.0265071])
    near(of_images[:2].norm(), 0.0172066)


@pytest.mark.parametrize("same_images, same_answers", [(True, True), (True, False), (False, True)])
def test_rdskd_golden_4_diversity_is_finite_where_a_collapsed_generator_stands(same_images, same_answers):
    images = torch.cat([X1, X1 if same_images else X2]).float().requires_grad_()
    logits = torch.cat([T1, T1 if same_answers else T2]).float().requires_grad_()
    loss = rdskd.diversity_loss(images, logits)
    gradients = torch.autograd.grad(loss, (images, logits))
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    if same_answers:                                           # as the authors' code has it: infinite ratio, NaN gradient
        p1, p2 = logits.softmax(1).chunk(2)
        x1, x2 = images.chunk(2)
        naive = 1 / ((x2 - x1).norm() / (p2 - p1).norm() + 1e-20)
        assert not torch.autograd.grad(naive, logits)[0].isfinite().all()


def test_rdskd_golden_5_kd_at_temperature_10():
    student, teacher = torch.arange(12, dtype=D).reshape(3, 4), ((torch.arange(12) * 7) % 12).to(D).reshape(3, 4)
    near(rdskd.kd_loss(student, teacher, 10.0), 5.9107569)
    near(rdskd.kd_loss(student, teacher, 1.0), 1.3199027)


def test_rdskd_mode_seeking_golden():
    z1 = torch.arange(6, dtype=D).reshape(2, 3) / 5 - 0.5
    near(rdskd.mode_seeking_loss(torch.cat([X1, X2]), torch.cat([z1, -z1 + 0.1])), 0.5999964)


def test_an_increment_weighs_a_loss_by_its_rise():
    for rise in (-1.0, 0.0, 2.0):
        loss = torch.tensor(0.7 + rise, requires_grad=True)
        weight, = torch.autograd.grad(rdskd.increment_penalty(loss, torch.tensor(0.7)), loss)
        assert weight.item() == pytest.approx(math.exp(rise), rel=1e-6)


def test_zskd_goldens():
    similarity = zskd.class_similarity(torch.tensor([[1, 0, 1], [0, 1, 1], [1, -1, 0]], dtype=D))
    near(similarity, [[1, 0.5, 0.5], [0.5, 1, -0.5], [0.5, -0.5, 1]])
    near(zskd.concentrations(similarity, 1.0), [[1.0001, 0.0001, 0.0001], [2 / 3 + 1e-4, 1.0001, 0.0001], [2 / 3 + 1e-4, 0.0001, 1.0001]])
    near(zskd.concentrations(similarity, 0.1)[0], [0.1001, 0.0001, 0.0001])
    y, logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=D), torch.tensor([[20, 0, 10], [0, -10, 30]], dtype=D)
    near(zskd.soft_ce_loss(logits, y, 20.0), 0.7933127)


def test_zskd_targets_follow_their_dirichlet():
    """Means of many draws are α / Σα, class by class; both β give distributions, the smaller one sharper ones."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    targets = zskd.draw_targets(weight, 4000, torch.Generator().manual_seed(0))
    assert targets.shape == (16000, 4) and torch.allclose(targets.sum(1), torch.ones(16000)) and (targets >= 0).all()
    alpha = zskd.concentrations(zskd.class_similarity(weight), 1.0)
    smooth, sharp = targets.reshape(2, 4, 2000, 4)
    assert torch.allclose(smooth.mean(1), alpha / alpha.sum(1, keepdim=True), atol=0.03)
    assert (sharp.max(2).values.mean() > smooth.max(2).values.mean() + 0.1)


@pytest.mark.parametrize("loss", [lambda t: dafl.kd_loss(S, t, 1.0), dafl.one_hot_loss, dafl.information_entropy_loss,
                                  lambda t: rdskd.kd_loss(S, t, 10.0), rdskd.one_hot_loss, rdskd.information_entropy_loss])
def test_losses_move_when_the_teachers_logits_move(loss):
    assert abs(loss(T) - loss(torch.zeros_like(T))) > 1e-3


def test_first_linear_is_what_follows_the_convolutions():
    lenet = models.build_model("lenet5", 10, (1, 32, 32))
    assert common.first_linear(lenet) is lenet.fc1 and common.last_linear(lenet) is lenet.fc2
    wide = models.build_model("wrn10_1", 10, (1, 8, 8))
    assert common.first_linear(wide) is wide.fc
    dense = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    assert common.first_linear(dense) is dense[3]              # no convolution: the last one
    with pytest.raises(common.BadInput, match="no nn.Linear"):
        common.first_linear(torch.nn.Conv2d(1, 1, 1))
