"""dafl.py and rdskd.py: losses and generator against the authors' functions' numbers (1e-6, float64); every
phase of both distills, written anew."""
import math

import pytest
import torch
import torch.nn as nn

import common
import dafl
import rdskd
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (D, Foreign, Log, assert_close, equal, in_float64, kl, near, near6, odd_teacher, refused,
                     sure, weights_of)

T = ((torch.arange(12) * 7) % 12).to(D).reshape(3, 4) / 4
S = torch.arange(12, dtype=D).reshape(3, 4) / 10
FEATURES = (torch.arange(15, dtype=D) - 7).reshape(3, 5) / 10
T1 = ((torch.arange(8) * 3) % 8).to(D).reshape(2, 4) / 2
T2 = ((torch.arange(8) * 5 + 1) % 8).to(D).reshape(2, 4) / 5
X1 = torch.arange(32, dtype=D).reshape(2, 1, 4, 4) / 10 - 1.5
X2 = ((torch.arange(32) * 7) % 32).to(D).reshape(2, 1, 4, 4) / 10 - 1.5
BOTH = pytest.mark.parametrize("method", [dafl, rdskd], ids=lambda method: method.__name__)


def test_dafl_golden_1_2_4_terms_totals_with_the_presets_own_weights_and_gradients():
    near6(dafl.one_hot_loss(T), 0.5978744), near6(dafl.information_entropy_loss(T), -0.5847696)
    near6(dafl.information_entropy_loss(T, natural_log=True), -1.3464818)
    near6(dafl.activation_loss(FEATURES), -0.3733333)
    near6(dafl.activation_loss(FEATURES, sum_features=True), -1.8666667)
    for name, total in (("mnist", -2.3633069), ("cifar10", -2.8976876), ("cifar100", -11.4337880)):
        preset = dafl.PRESETS[name].settings
        near6(preset.oh * dafl.one_hot_loss(T) + preset.ie * dafl.information_entropy_loss(T)
              + preset.act * dafl.activation_loss(FEATURES), total)
    t = T.clone().requires_grad_()
    gradient, = torch.autograd.grad(dafl.one_hot_loss(t) + 5 * dafl.information_entropy_loss(t), t)
    near6(gradient[0], [-0.0035481, 0.1716107, 0.0275016, -0.1955643]), near6(gradient.sum(1), [0.0] * 3)
    near6(gradient[2], [0.0185522, 0.0555114, -0.1276393, 0.0535757])


@BOTH
def test_dafl_golden_3_and_rdskd_golden_5_kd(method):
    near6(method.kd_loss(S, T, 1.0), 0.2940561), near6(method.kd_loss(S, T, 4.0), kl(S, T, 4.0).mean())
    near6(method.kd_loss(10 * S, 4 * T, 10.0), 5.9107569)
    near6(method.kd_loss(10 * S, 4 * T, 1.0), 1.3199027)
    student = S.clone().requires_grad_()
    soft = -(T.softmax(1) * student.log_softmax(1)).sum(1).mean()
    near6(soft, 1.3844015)
    one, = torch.autograd.grad(method.kd_loss(student, T, 1.0), student)
    near6(one, torch.autograd.grad(soft, student)[0])          # KL and soft CE: the same gradient


@BOTH
def test_dafl_golden_5_limits(method):
    uniform, certain = torch.zeros(3, 10, dtype=D), 10 * torch.eye(4, dtype=D)
    scale = math.log(10) if method is dafl else 1
    near6(method.one_hot_loss(uniform), 2.3025851), near6(method.one_hot_loss(certain), 0.0001362)
    near6(method.kd_loss(uniform, uniform, 1.0), 0.0)
    for logits, entropy in ((uniform, -1.0), (certain, -0.6020600), (certain[:1].expand(4, -1), -0.0006506)):
        near6(method.information_entropy_loss(logits) * scale / math.log(10), entropy)    # to base 10
    logits = 3 * torch.randn(7, 5, dtype=D)
    p = logits.softmax(1).mean(0)
    near(method.information_entropy_loss(logits), (p * p.log()).sum() / scale, 1e-12)
    one = (1000 * torch.eye(4)[:1].expand(4, -1)).requires_grad_()             # float32
    p = one.softmax(1).mean(0)
    loss = method.information_entropy_loss(one)
    assert (p * p.log()).sum().isnan() and loss.item() == 0    # as it is usually written; as it is here
    assert torch.autograd.grad(loss, one)[0].isfinite().all()


@BOTH
@pytest.mark.parametrize("latent_dim, channels, size, first, last", [
    (4, 1, 0.8946518, [0.716467, -1.200503, -1.176074, -1.194454], [-1.248844, -1.313633, -1.012115]),
    (8, 3, 0.8833136, [0.062054, 1.300203, -0.994481, 0.074330], [0.752380, 1.429036, -0.658325])])
def test_dafl_golden_6_generator(method, latent_dim, channels, size, first, last):
    generator = method.Generator(latent_dim, (channels, 32, 32)).double()
    for layer in generator.layers:
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            places = torch.arange(layer.weight.numel()).reshape(layer.weight.shape)
            layer.weight.data = (((places * 7919) % 1009).double() / 1009 - 0.5) * 0.5
            nn.init.zeros_(layer.bias)
    z = torch.linspace(-1, 1, 3 * latent_dim, dtype=D).reshape(3, latent_dim)
    images = generator(z)
    near6(images.abs().mean(), size)                           # 0.8958080, not 0.8946518, with the usual eps
    near6(images[0, 0, 0, :4], first), near6(images[2, channels - 1, 31, -3:], last)
    if channels == 1:
        near6(generator.layers[-1].running_mean, [0.000932])
        near6(generator.layers[-1].running_var, [0.958861])
        near6(generator.eval()(z).abs().mean(), 0.725995)
    weights = {1: 1_049_985, 3: 8_423_939}[channels]
    generator = method.Generator({1: 100, 3: 1000}[channels], (channels, 32, 32))
    assert sum(p.numel() for p in generator.parameters()) == weights


def test_dafl_golden_7_students_learning_rate():
    for method, rate, epochs, expected in (
            (dafl, 0.1, 2000, {0: 0.1, 799: 0.1, 800: 0.01, 1599: 0.01, 1600: 0.001}),
            (dafl, 0.1, 250, {99: 0.1, 100: 0.01, 199: 0.01, 200: 0.001}),
            (rdskd, 2e-3, 1000, {0: 2e-3, 799: 2e-3, 800: 2e-4, 999: 2e-4})):
        for epoch, value in expected.items():
            assert method.learning_rate(rate, "steps", epoch / epochs) == pytest.approx(value)
        assert method.learning_rate(rate, "constant", 0.99) == rate
        assert method.learning_rate(rate, "cosine", 0.5) == pytest.approx(rate / 2)


def test_rdskd_goldens_1_2_3_terms_totals_and_gradients():
    t, x = torch.cat([T1, T2]).requires_grad_(), torch.cat([X1, X2]).requires_grad_()
    near6(rdskd.one_hot_loss(t), 0.6413839), near6(rdskd.information_entropy_loss(t), -1.3085979)
    near6(rdskd.diversity_loss(x, t), 0.1192106)
    for (oh, ie), total in (((0, 0), 2.2885164), ((1, -1.3862944), 1.8986476), ((0.5, -1), 2.0055533)):
        loss = (rdskd.increment_penalty(rdskd.one_hot_loss(t), oh) + rdskd.diversity_loss(x, t)
                + rdskd.increment_penalty(rdskd.information_entropy_loss(t), ie))
        near6(loss, total)
    of_t, of_x = torch.autograd.grad(loss, (t, x))
    near6(of_t[:2], [[0.0025184, 0.0316564, -0.0395035, 0.0053287],
                     [0.0164780, -0.0630624, 0.0120881, 0.0344963]])
    near6(of_t[2], [0.0322793, -0.1196937, 0.0609073, 0.0265071])
    near6(of_x[:2].norm(), 0.0172066)
    z1 = torch.arange(6, dtype=D).reshape(2, 3) / 5 - 0.5
    near6(rdskd.mode_seeking_loss(x, torch.cat([z1, -z1 + 0.1])), 0.5999964)


@pytest.mark.parametrize("x2, t2", [(X1, T1), (X1, T2), (X2, T1)], ids=["both alike", "images", "answers"])
def test_rdskd_golden_4_diversity_is_finite_where_a_collapsed_generator_stands(x2, t2):
    """Where the authors' ratio has a NaN gradient, or is 1e20."""
    x, t = torch.cat([X1, x2]).float().requires_grad_(), torch.cat([T1, t2]).float().requires_grad_()
    loss = rdskd.diversity_loss(x, t)
    assert loss.isfinite() and all(part.isfinite().all() for part in torch.autograd.grad(loss, (x, t)))


class Functional(Foreign):
    """Its last linear layer is applied as a function, as some attention blocks do it."""
    def forward(self, x):
        return nn.functional.linear(self.pool(self.body(x)).flatten(1), self.out.weight, self.out.bias)


class Gated(nn.Module):
    """Linear layers before, between and after its convolutions; one of the last takes no vectors."""
    def __init__(self):
        super().__init__()
        self.gate, self.first, self.middle = nn.Linear(64, 1), nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)
        self.last, self.tokens, self.fc, self.out = (
            nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 8), nn.Linear(32, 6), nn.Linear(6, 10))

    def forward(self, x):
        x = self.first(x * self.gate(x.flatten(1))[:, :, None, None])
        x = self.last(x * self.middle(x.mean((2, 3)))[:, :, None, None])     # as squeeze and excitation do
        return self.out(self.fc(self.tokens(x.flatten(2)).flatten(1)))


def test_dafl_features_are_what_the_first_linear_layer_after_the_convolutions_takes():
    data = common.DATASETS["mnist"]
    lenet = common.build_model("lenet5", 10, data.image_shape)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(1024, 3), nn.ReLU(), nn.Linear(3, 10))
    assert dafl.feature_layer(lenet, data) is lenet.fc1 and dafl.feature_layer(dense, data) is dense[3]
    wide, _, digits = tiny_networks()
    assert dafl.feature_layer(wide, digits) is wide.fc
    gated = Gated()
    assert dafl.feature_layer(gated, digits) is gated.fc
    for teacher in (Functional(), nn.Conv2d(1, 1, 1)):
        with pytest.raises(common.BadInput, match=f"nn.Linear.*{type(teacher).__name__} has none"):
            dafl.feature_layer(teacher, digits)


@pytest.mark.parametrize("changes", [
    {}, dict(separate_batches=True, natural_log=True, sum_activation=True)], ids=["default", "others"])
def test_dafl_distill_equals_the_algorithm_written_anew(changes, in_float64):
    settings = tiny_settings(dafl, lr_generator=5e-3, lr_student=0.02, act=0.5, warmup=0.5, **changes)
    (teacher, student, data), (_, other, _), log, features = tiny_networks(), tiny_networks(), Log(), []
    found = dafl.distill(sure(teacher), student, data, settings, log)
    teacher.eval().fc.register_forward_pre_hook(lambda layer, x: features.append(x[0]))
    with common.seeded(settings.seed):
        generator = dafl.Generator(6, data.image_shape, 4)
        adam = torch.optim.Adam(generator.parameters())
        sgd = torch.optim.SGD(other.parameters(), momentum=0.9, weight_decay=settings.weight_decay)
        for step in range(6):                                  # two epochs; both rates rise over half the run
            warm = min(1, (step + 1) / 3)
            adam.param_groups[0]["lr"] = 5e-3 * warm
            sgd.param_groups[0]["lr"] = 0.02 * warm * (1 if step < 3 else 0.5)
            x = generator(torch.randn(8, 6))
            t = teacher(x)
            p = t.softmax(1).mean(0)
            activation = features[-1].abs().sum(1).mean() if changes else features[-1].abs().mean()
            loss = (-settings.oh * t.log_softmax(1).amax(1).mean() - 0.5 * activation
                    + settings.ie * (p * p.log()).sum() / (1 if changes else math.log(10)))
            adam.zero_grad(), loss.backward(), adam.step()
            if changes:                                        # a second batch, of the generator after its
                x = generator(torch.randn(8, 6))               # step; else the images from before it
            x = x.detach()
            loss = kl(other(x), teacher(x).detach(), settings.temperature).mean()
            sgd.zero_grad(), loss.backward(), sgd.step()
    assert_close(found, generator), assert_close(student, other)
    near6(log.shown[-1][0], common.denormalize(x, data))


@pytest.mark.parametrize("changes", [{}, dict(diversity="ms", penalty="fixed"),
                                     dict(diversity="none", reference="previous")], ids=str)
def test_rdskd_phase_1_equals_the_algorithm_written_anew(changes, in_float64):
    settings = tiny_settings(rdskd, generator_steps=4, lr_generator=5e-3, oh=0.7, ie=1.5,
                             diversity_weight=2.0, **changes)
    (teacher, _, data), references = tiny_networks(), (0.0, 0.0)
    found = rdskd.train_generator(sure(teacher), data, settings)
    teacher.eval()
    with common.seeded(settings.seed):
        generator = rdskd.Generator(6, data.image_shape, 4)
        adam = torch.optim.Adam(generator.parameters(), 5e-3)
        for step in range(8):                                  # two rounds of four
            z = torch.randn(8, 6)
            x = generator(z)
            t = teacher(x)
            p = t.softmax(1)
            terms = -t.log_softmax(1).amax(1).mean(), (p.mean(0) * p.mean(0).log()).sum()
            apart = (p[4:] - p[:4]).norm() / (x[4:] - x[:4]).norm()
            if settings.diversity == "ms":
                apart = (z[4:] - z[:4]).abs().mean() / (x[4:] - x[:4]).abs().mean()
            certain, spread = terms if settings.penalty == "fixed" else (
                (term - reference).exp() for term, reference in zip(terms, references))
            loss = 0.7 * certain + 1.5 * spread + (0 if settings.diversity == "none" else 2) * apart
            adam.zero_grad(), loss.backward(), adam.step()
            if step in (1, 5) or settings.reference == "previous":
                references = [term.detach() for term in terms]
    assert_close(found, generator)


def test_rdskd_phase_2_equals_the_algorithm_written_anew_and_leaves_the_generator_alone(in_float64):
    """In eval mode, on latents that phase 1 did not have."""
    (teacher, student, data), (_, other, _), (_, third, _) = (tiny_networks() for _ in range(3))
    settings, log, seen, agreed = tiny_settings(rdskd, lr_student=0.02), Log(), [], []
    generator = rdskd.train_generator(sure(teacher), data, settings)
    generator.zero_grad()
    handle = generator.register_forward_pre_hook(lambda generator, z: seen.append((z[0], generator.training)))
    before = weights_of(generator)
    assert rdskd.distill(teacher, student, data, settings, log, generator) is generator and generator.training
    handle.remove()
    assert equal(before, weights_of(generator)) and all(p.grad is None for p in generator.parameters())
    sgd = torch.optim.SGD(other.parameters(), momentum=0.9, weight_decay=settings.weight_decay)
    with common.frozen(teacher, generator):
        for step, (z, training) in enumerate(seen):
            sgd.param_groups[0]["lr"] = (0.02, 0.01)[step // 3]
            x = generator(z)
            s, t = other(x), teacher(x)
            agreed.append((s.argmax(1) == t.argmax(1)).float().mean())
            loss = kl(s, t, settings.temperature).mean()
            sgd.zero_grad(), loss.backward(), sgd.step()
            assert not training and len(seen) == 6
    near([row["agreement_made"] for row in log.rows], torch.stack(agreed).view(2, 3).mean(1))
    near6(log.shown[-1][0], common.denormalize(x, data)), assert_close(student, other)
    rdskd.distill(teacher, third, data, settings)              # makes its generator itself: the same student
    assert equal(weights_of(student), weights_of(third))
    with common.seeded(settings.seed ^ 2 ** 31):               # a stream of its own, not phase 1's
        assert all(torch.equal(z, torch.randn(8, 6)) for z, _ in seen)


def test_what_the_scripts_refuse(teacher_file, in_tmp, capsys):
    for method, flags, message in ((rdskd, ["--synthesis-batch-size", "7"], "must be even"),
                                   (rdskd, ["--diversity", "lots"], "choose from ds, ms, none"),
                                   (rdskd, ["--penalty", "2"], "choose from exp, fixed"),
                                   (dafl, ["--warmup", "1"], "under 1"),
                                   (dafl, ["--teacher", "test_dafl_rdskd:Functional"], "has none")):
        assert message in refused(method, [*tiny_args(method, teacher_file), *flags], capsys)
    for method in (dafl, rdskd):
        assert "multiples of 4, not 10x10" in refused(method, odd_teacher(in_tmp), capsys)
    with pytest.raises(common.BadInput, match="must be even"):
        rdskd.train_generator(*tiny_networks()[::2], tiny_settings(rdskd, synthesis_batch_size=7))
