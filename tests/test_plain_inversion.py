"""plain_inversion.py: all of distill written anew, from the same draws; what a kept generator keeps."""
import math

import pytest
import torch
import torch.nn.functional as F

import common
import csd
import plain_inversion
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (Log, assert_close, bn_distances, bn_inputs, equal, in_float64, kl, near,  # noqa: F401
                     near6, refused, rows_of, save_untrained, sure, weights_of)


def bilinear(image, row, column):
    """The value of an image (C, H, W) between its pixels, where everything outside is black."""
    value, (height, width) = 0, image.shape[1:]
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            if 0 <= i < height and 0 <= j < width:
                value = value + (1 - abs(row - i)) * (1 - abs(column - j)) * image[:, i, j]
    return value + torch.zeros(len(image))


def warped_anew(pixels, strength):
    """Pixel by pixel, from the same draws."""
    amounts, (height, width), result = 2 * torch.rand(6, len(pixels)) - 1, pixels.shape[2:], []
    for image, amount in zip(pixels, amounts.T):
        turn, slant, wide, high, right, down = (
            strength * most * each.item() for most, each in zip((0.35, 0.3, 0.2, 0.2, 0.12, 0.12), amount))
        rows = []
        for i in range(height):
            for j in range(width):
                x, y = j + 0.5 - width / 2, i + 0.5 - height / 2             # pixels from the middle
                old_x = (math.cos(turn) * math.exp(wide) * x - math.sin(turn) * math.exp(high) * y
                         + slant * y + right * width / 2)
                old_y = (math.sin(turn) * math.exp(wide) * x + math.cos(turn) * math.exp(high) * y
                         + down * height / 2)
                rows.append(bilinear(image, old_y + height / 2 - 0.5, old_x + width / 2 - 0.5))
        result.append(torch.stack(rows, 1).unflatten(1, (height, width)))
    return torch.stack(result)


def test_warped_images_are_turned_slanted_stretched_and_moved(in_float64):
    pixels = torch.rand(5, 2, 8, 12)
    torch.manual_seed(3)
    found = plain_inversion.warped(pixels, 1.5)
    torch.manual_seed(3)
    near6(found, warped_anew(pixels, 1.5))
    assert plain_inversion.warped(pixels, 0.0) is pixels
    white = plain_inversion.warped(torch.ones(50, 1, 16, 16), 1.0)
    assert 0.6 < white.mean() < 1 and white.max() <= 1 + 1e-6              # black comes in at the borders


@pytest.mark.parametrize("changes", [{}, dict(mixup=False, visits=1, seed=1),
                                     dict(keep_generator=False, seed=2),
                                     dict(detail=2, warp=1.0, contrast=0.7, optimizer="adam", seed=3)],
                         ids=str)
def test_distill_equals_the_algorithm_written_anew(changes, in_float64):
    """The same images in the bank, of both stages, and the same student."""
    settings = tiny_settings(plain_inversion, oh=1.2, synthesis_steps=5, bank_synthesis_steps=4,
                             lr_generator=0.02, lr_student=0.02, **{"visits": 2, **changes})
    (teacher, student, data), (_, other, _), log = tiny_networks(), tiny_networks(), Log()
    found = plain_inversion.distill(sure(teacher), student, data, settings, log)
    of_teacher = bn_inputs(teacher.eval())

    coarse = [side // settings.detail for side in data.image_shape[1:]]
    assert not any(side % 4 for side in coarse)

    def fresh():                                               # in the order in which weights are drawn anew
        generator = csd.reinitialize(csd.Generator(6, (data.image_shape[0], *coarse)))
        return generator.to(memory_format=torch.channels_last)

    def seen(x):
        x = common.augment(x, data)
        return common.normalize(warped_anew(x, settings.warp) if settings.warp else x, data)

    def contrast(x):
        x = common.normalize(x, data).transpose(0, 1).flatten(1)
        return ((x.var(1, unbiased=False) - 1) ** 2).sum().sqrt() + (x.mean(1) ** 2).sum().sqrt()

    def made(generator, steps):
        csd.reinitialize(generator.layers[0] if settings.keep_generator else generator)
        z, y, tried = torch.randn(10, 6).requires_grad_(), torch.randint(10, (10,)).sort().values, []
        adam = torch.optim.Adam([*generator.parameters(), z], settings.lr_generator, (0.5, 0.999))
        for _ in range(steps):
            x = generator.layers[:-1](z)
            if settings.detail > 1:
                x = F.interpolate(x, scale_factor=settings.detail, mode="bicubic")
            x = x.sigmoid()
            t = teacher(seen(x))
            loss = (1.2 * F.cross_entropy(t, y) + settings.bn * sum(bn_distances(of_teacher))
                    + settings.contrast * contrast(x))
            tried.append((loss.item(), x.detach().clone()))
            adam.zero_grad(), loss.backward(), adam.step()
        return min(tried, key=lambda each: each[0])[1], y
    with common.seeded(settings.seed):
        generator = fresh()
        batches = [made(generator, 4) for _ in range(2)]
    with common.seeded(settings.seed ^ 2 ** 31):
        generator, optimizer = fresh(), torch.optim.SGD(other.parameters(), 1, 0.9, weight_decay=1e-4)
        if settings.optimizer == "adam":
            optimizer = torch.optim.AdamW(other.parameters(), 1, weight_decay=1e-4)
        for epoch, rate in enumerate((0.02, 0.01)):            # half a cosine
            batches.append(made(generator, 5))
            near6(log.shown[epoch][0], batches[-1][0])
            pixels = torch.cat([(255 * x).floor().to(torch.uint8) for x, _ in batches])
            optimizer.param_groups[0]["lr"], asked, agreed = rate, [], []
            for rows in torch.randperm(len(pixels)).split(8)[:3]:
                if len(asked) * settings.visits < 3:
                    images = seen(pixels[rows] / 255)
                    if settings.mixup:
                        part = torch.rand(8)[:, None, None, None]
                        images = (1 - part) * images + part * images[torch.randperm(8)]
                    asked.append((images, teacher(images).detach()))
                    images, t = asked[-1]
                else:                                          # with two visits, the third step
                    images, t = asked[torch.randperm(2)[0]]
                answer = other.train()(images)
                agreed += (answer.argmax(1) == t.argmax(1)).tolist()
                loss = kl(answer, t, settings.temperature).mean()
                optimizer.zero_grad(), loss.backward(), optimizer.step()
            near(log.rows[epoch]["agreement_made"], sum(agreed) / len(agreed))
    assert torch.equal(found[0], pixels) and torch.equal(found[1], torch.cat([y for _, y in batches]))
    assert_close(student, other)


def test_the_losses_and_the_generator_are_csds():
    """The same numbers, and the same first weights from the same draws."""
    logits, other, y = torch.randn(2, 6, 10).unbind() + (torch.arange(6),)
    statistics = [(torch.randn(3), torch.rand(3)) for _ in range(4)]
    for name, arguments in (("kd_loss", (logits, other, 3.0)), ("one_hot_loss", (logits, y)),
                            ("bn_loss", (statistics[:2], statistics[2:]))):
        one, two = (getattr(module, name)(*arguments) for module in (csd, plain_inversion))
        assert torch.equal(one, two)
    torch.manual_seed(0)
    one = csd.reinitialize(csd.Generator(6, (3, 8, 8)))
    torch.manual_seed(0)
    assert equal(weights_of(one), weights_of(plain_inversion.Generator(6, (3, 8, 8))))


def test_images_of_any_size_and_coarse_ones():
    """The generator makes them smaller or larger than it needs and resizes them."""
    z = torch.randn(7, 6)
    for shape, detail, rows in (((1, 10, 10), 1, 12), ((3, 28, 20), 2, 16), ((1, 30, 30), 4, 8),
                                ((1, 8, 8), 1, 8)):
        generator = plain_inversion.Generator(6, shape, detail)
        assert generator(z).shape == (7, *shape) and generator.layers(z).shape[2] == rows
    # the coarser, the smoother: neighbouring pixels are more alike
    torch.manual_seed(0)
    rough, smooth = (torch.logit(plain_inversion.Generator(6, (1, 32, 32), detail)(z)) for detail in (1, 4))
    step_rough, step_smooth = ((x.diff(dim=3).std() / x.std()).item() for x in (rough, smooth))
    assert step_smooth < 0.4 * step_rough


def test_contrast_loss_is_the_distance_from_mean_0_and_variance_1():
    images = torch.randn(400, 2, 16, 16)
    assert plain_inversion.contrast_loss(images) < 0.02
    moved = images + torch.tensor([3.0, 4.0])[:, None, None]
    assert plain_inversion.contrast_loss(moved) == pytest.approx(5, abs=0.03)
    assert plain_inversion.contrast_loss(2 * images) == pytest.approx(3 * 2 ** 0.5, abs=0.1)


def test_a_kept_generator_goes_on_but_for_its_first_layer(monkeypatch):
    teacher, _, data = tiny_networks()
    sure(teacher)
    for keep, changed in ((True, {"0.weight", "0.bias"}), (False, None)):
        settings = tiny_settings(plain_inversion, keep_generator=keep)
        generator = plain_inversion.Generator(6, data.image_shape)
        plain_inversion.synthesize(generator, teacher, data, settings, 3)
        before = weights_of(generator.layers)
        plain_inversion.synthesize(generator, teacher, data, settings, 0)       # no step: what is drawn anew
        after = weights_of(generator.layers)
        differ = {name for name in before if not torch.equal(before[name], after[name])}
        assert differ == changed if keep else {"0.weight", "3.weight", "9.weight"} <= differ


def test_a_mixture_lies_between_two_images_of_the_batch():
    torch.manual_seed(0)
    images = torch.arange(6.).view(6, 1, 1, 1).expand(-1, 2, 3, 3)
    mixtures = plain_inversion.mixed(images)
    assert mixtures.shape == images.shape and 0 <= mixtures.min() and mixtures.max() <= 5
    assert torch.equal(mixtures, mixtures[:, :1, :1, :1].expand_as(mixtures))   # one λ for each image
    assert len((mixtures - images)[:, 0, 0, 0].unique()) > 3


def test_a_teacher_without_batchnorm_is_taken_and_the_log_says_so(teacher_file, in_tmp, capsys):
    argv = tiny_args(plain_inversion, save_untrained(in_tmp / "plain.pt", "lenet5"))
    plain_inversion.main([*argv, "--out", "out"])
    rows = rows_of("out")
    said = " ".join(row.get("text", "") for row in rows)
    assert rows[-2]["loss_bn"] == 0 and "the BatchNorm term is off" in said


def test_a_mean_of_0_turns_the_contrast_off(in_tmp, capsys):
    """That is what the front page advises for a network that normalises by itself."""
    data = common.DataSpec((1, 8, 8), 10, (0.0,), (1.0,))
    argv = tiny_args(plain_inversion, save_untrained(in_tmp / "own.pt", "wrn10_1", data, "digits"))
    plain_inversion.main([*argv, "--contrast", "1", "--out", "out"])
    assert "the contrast term is off" in capsys.readouterr().out
    assert all(row["loss_contrast"] == 0 for row in rows_of("out") if row["event"] == "epoch")


def test_a_mean_that_may_be_a_placeholder_is_named(in_tmp, capsys):
    for mean, contrast, told in ((0.5, 1, True), (0.5, 0, False), (0.3, 1, False)):
        data = common.DataSpec((1, 8, 8), 10, (mean,), (0.5,))
        argv = tiny_args(plain_inversion, save_untrained(in_tmp / "grey.pt", "wrn10_1", data, "digits"))
        plain_inversion.main([*argv, "--contrast", str(contrast), "--bank", f"bank-{mean}-{contrast}",
                              "--out", f"{mean}-{contrast}"])
        assert ("add --contrast 0 and a --bank" in capsys.readouterr().out) == told


def test_deterministic_is_refused_on_cuda_where_a_gradient_is_not(teacher_file, in_tmp, monkeypatch, capsys):
    """Bicubic resizing and warping have no deterministic gradient there."""
    parse = plain_inversion.parse

    def on_cuda(*args, **own):
        options, settings = parse(*args, **own)
        options.device = torch.device("cuda")
        return options, settings

    def reached(*_):
        raise common.BadInput("the networks are reached")
    monkeypatch.setattr(plain_inversion, "parse", on_cuda)
    monkeypatch.setattr(plain_inversion, "load_networks", reached)
    for flags, message in (("--deterministic --warp 1", "leave --deterministic out"),
                           ("--deterministic --detail 2", "leave --deterministic out"),
                           ("--detail 2", "reached"), ("--deterministic", "reached")):
        argv = [*tiny_args(plain_inversion, teacher_file), *flags.split()]
        assert message in refused(plain_inversion, argv, capsys)
