"""plain_inversion.py: all of distill written anew, from the same draws; what a kept generator keeps."""
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

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
                                     dict(detail=2, warp=1.0, contrast=0.7, optimizer="adam", seed=3),
                                     dict(statistics_from="photographs", bn=0.0, seed=4)],
                         ids=str)
def test_distill_equals_the_algorithm_written_anew(changes, in_float64):
    """The same images in the bank, of both stages, and the same student."""
    settings = tiny_settings(plain_inversion, oh=1.2, synthesis_steps=5, bank_synthesis_steps=4,
                             lr_generator=0.02, lr_student=0.02, **{"visits": 2, **changes})
    (teacher, student, data), (_, other, _), log = tiny_networks(), tiny_networks(), Log()
    found = plain_inversion.distill(sure(teacher), student, data, settings, log)
    of_teacher, inputs = bn_inputs(teacher.eval()), {}
    wanted = plain_inversion.find_statistics(teacher, data, settings)            # tested below
    assert bool(wanted) == ("statistics_from" in changes)
    for layer in wanted:
        layer.register_forward_pre_hook(lambda layer, x: inputs.__setitem__(layer, x[0]))

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

    def distance():
        parts = []
        for layer, (mean, var) in wanted.items():
            x, square = inputs[layer], var + 0.01 * var.sum() / len(var) + 1e-12
            x = x.transpose(0, 1).flatten(1) if x.dim() == 4 else x.T        # (channels, places)
            parts += [(((x.mean(1) - mean) ** 2 / square).mean() ** 0.5)
                      + (((x.var(1, unbiased=False) - var) / square) ** 2).mean() ** 0.5]
        return sum(parts) / len(parts) if parts else 0

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
                    + settings.contrast * contrast(x) + settings.statistics * distance())
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
        plain_inversion.synthesize(generator, teacher, data, settings, 3, {})
        before = weights_of(generator.layers)
        plain_inversion.synthesize(generator, teacher, data, settings, 0, {})   # no step: what is drawn anew
        after = weights_of(generator.layers)
        differ = {name for name in before if not torch.equal(before[name], after[name])}
        assert differ == changed if keep else {"0.weight", "3.weight", "9.weight"} <= differ


class Colour(nn.Module):
    """A small teacher of 16x16 colour images without BatchNorm. Its last layers see (N, places, 6)."""
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, stride=4)
        self.unused, self.mix, self.out = nn.Linear(6, 6), nn.Linear(6, 7), nn.Linear(7, 10)

    def forward(self, x):
        maps = self.second(self.first(x).relu()).relu()                      # (N, 6, 4, 4)
        return self.out(self.mix(maps.flatten(2).transpose(1, 2)).relu().mean(1))


COLOUR = common.DataSpec((3, 16, 16), 10, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def test_statistics_loss_in_numbers():
    """Two layers, worked out by hand; the second never fires."""
    wanted = [(torch.tensor([1.0, 2.0]), torch.tensor([6.0, 2.0])), (torch.zeros(1), torch.zeros(1))]
    found = [(torch.tensor([1.0, 4.0]), torch.tensor([6.0, 4.0])), (torch.zeros(1), torch.zeros(1))]
    first = (2 / 2.04 ** 0.5 + 2 / 2.04) / 2 ** 0.5            # the second channel's σ² is 2 + 0.01 · 4
    found[1][1].requires_grad_()
    loss = plain_inversion.statistics_loss(found, wanted)
    near6(loss, first / 2)
    loss.backward()                                            # a layer that never fires has no endless slope
    assert found[1][1].grad.item() == 0
    assert plain_inversion.statistics_loss([], []) == 0
    louder = [[(3 * mean, 9 * var) for mean, var in layers[:1]] for layers in (found, wanted)]
    near6(plain_inversion.statistics_loss(*louder), first)     # the scale of a layer does not matter


def test_statistics_of_pictures_are_those_of_the_layers_inputs():
    torch.manual_seed(0)
    teacher, pixels, settings = Colour(), torch.rand(1, 3, 16, 16), tiny_settings(plain_inversion)
    found = plain_inversion.statistics_of(pixels, teacher, COLOUR, settings)     # of one picture
    assert [*found] == [teacher.second, teacher.mix]           # as they run; the last sees a single vector
    x = teacher.first((pixels - torch.tensor(COLOUR.mean).view(3, 1, 1))
                      / torch.tensor(COLOUR.std).view(3, 1, 1)).relu()
    maps = teacher.second(x).relu()
    places = maps.permute(0, 2, 3, 1).flatten(0, 2)                          # (16, 6)
    for layer, values in ((teacher.second, x[0].flatten(1).T), (teacher.mix, places)):
        near6(found[layer][0], values.mean(0)), near6(found[layer][1], values.var(0, unbiased=False))
    # of many pictures, the means over batches
    many = plain_inversion.statistics_of(torch.rand(500, 3, 16, 16), teacher, COLOUR, settings)
    assert many[teacher.out][1].max() > 0 and not teacher.first._forward_pre_hooks


def test_where_the_statistics_come_from(in_tmp):
    torch.manual_seed(0)
    colour, grey = common.DATASETS["cifar10"], common.DATASETS["mnist"]
    with_norm = common.build_model("wrn10_1", 10, (3, 32, 32))
    without = common.build_model("lenet5", 10, (1, 32, 32))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    for teacher, data, changes, source in (
            (with_norm, colour, {}, ""), (without, grey, {}, ""), (plain, colour, {}, "photographs"),
            (plain, colour, dict(statistics=0.0), ""),
            (with_norm, colour, dict(statistics_from="photographs"), "photographs")):
        settings = tiny_settings(plain_inversion, **changes)
        assert plain_inversion.source_of_statistics(teacher, data, settings) == source
        found = plain_inversion.find_statistics(teacher, data, settings)
        assert len(found) == (0 if not source else 1 if teacher is plain else 9)
    again = (plain_inversion.find_statistics(plain, colour, tiny_settings(plain_inversion))[plain[3]]
             for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(*again))                   # the same in a resumed run
    with pytest.raises(common.BadInput, match="choose from auto, photographs or folder"):
        plain_inversion.find_statistics(plain, colour, tiny_settings(plain_inversion, statistics_from="mine"))


def test_photographs_are_cut_out_in_the_shape_of_the_data():
    torch.manual_seed(0)
    for shape in ((3, 32, 32), (1, 20, 28)):
        pixels = plain_inversion.cut_outs(6, common.DataSpec(shape, 10, (0.5,) * shape[0],
                                                                (0.5,) * shape[0]))
        assert pixels.shape == (6, *shape) and 0 <= pixels.min() < 0.2 and 0.8 < pixels.max() <= 1
        assert pixels.flatten(1).std(0).min() > 0                            # they differ


def test_layers_that_say_nothing_are_left_out(in_tmp):
    """Those that see one vector for all images, that do not run for every batch, or that never vary."""
    class Odd(Colour):
        def __init__(self):
            super().__init__()
            self.token, self.expert, self.calls = nn.Linear(4, 4), nn.Linear(10, 10), 0
            self.rare = nn.BatchNorm1d(10)

        def forward(self, x):
            self.calls += 1
            answer = super().forward(x) + self.token(torch.ones(4)).mean()
            return self.rare(answer + self.expert(answer)) if self.calls % 2 else answer
    torch.manual_seed(0)
    teacher, settings = Odd(), tiny_settings(plain_inversion, synthesis_batch_size=8)
    found = plain_inversion.statistics_of(torch.rand(50, 3, 16, 16), teacher, COLOUR, settings)
    assert {*found} == {teacher.second, teacher.mix, teacher.out}
    teacher.calls = 0
    assert common.batchnorms(teacher, COLOUR) == [teacher.rare]              # it runs in the first call
    teacher.calls = 0
    pixels, _, losses = plain_inversion.synthesize(plain_inversion.Generator(6, COLOUR.image_shape), teacher,
                                                   COLOUR, settings, 4, {**found, teacher.expert: (
                                                       torch.zeros(10), torch.ones(10))})
    assert pixels.isfinite().all() and losses["loss_statistics"] < 100
    black = plain_inversion.statistics_of(torch.zeros(1, 3, 16, 16), teacher, COLOUR, settings)
    assert teacher.out not in black                            # the same in all images: only rounding varies
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    assert plain_inversion.find_statistics(flat, COLOUR, settings) == {}
    with pytest.raises(common.BadInput, match="leave no statistics"):
        plain_inversion.find_statistics(flat, COLOUR, tiny_settings(plain_inversion,
                                                                    statistics_from="photographs"))


def test_images_get_the_statistics_that_they_are_asked_for():
    torch.manual_seed(0)
    teacher, distance = Colour(), {}
    wanted = plain_inversion.statistics_of(plain_inversion.cut_outs(200, COLOUR), teacher, COLOUR,
                                           tiny_settings(plain_inversion))
    for weight in (0.0, 3.0):
        settings = tiny_settings(plain_inversion, statistics=weight, synthesis_batch_size=50)
        torch.manual_seed(1)
        generator = plain_inversion.Generator(6, COLOUR.image_shape)
        pixels, _, _ = plain_inversion.synthesize(generator, teacher, COLOUR, settings, 40, wanted)
        with torch.no_grad(), common.recorded_statistics(wanted) as found:
            teacher(common.normalize(pixels, COLOUR))
        distance[weight] = plain_inversion.statistics_loss([found[layer] for layer in wanted],
                                                           [*wanted.values()])
    assert distance[3.0] < 0.5 * distance[0.0]


def test_a_folder_of_pictures_in_colour(in_tmp, capsys):
    """Its pictures are part of what a bank was made with."""
    teacher = save_untrained(in_tmp / "plain.pt", "lenet5", common.DATASETS["cifar10"], "cifar10")
    argv = tiny_args(plain_inversion, teacher, student="wrn10_1")
    argv += ["--dataset", "none", "--bank", "bank"]
    assert "there is no picture in folder mine" in refused(
        plain_inversion, [*argv, "--statistics-from", "folder:mine"], capsys)
    Path("mine").mkdir()
    for name in "abc":
        Image.fromarray((255 * torch.rand(20, 30, 3)).byte().numpy()).save(f"mine/{name}.png")
    plain_inversion.main([*argv, "--statistics-from", "folder:mine", "--out", "one"])
    assert all(row["loss_statistics"] > 0 for row in rows_of("one") if row["event"] == "epoch")
    shutil.copytree("mine", "yours")
    for flags, words in (("--statistics-from folder:mine --statistics 5", "statistics = 10.0"),
                         ("--statistics-from folder:yours", "statistics_from = folder:mine"),
                         ("--statistics 0", "statistics = 10.0")):
        with pytest.raises(SystemExit):
            plain_inversion.main([*argv, *flags.split(), "--out", f"not {flags}"])
        assert f"was made with {words}" in capsys.readouterr().err
    Path("mine/c.png").unlink()
    with pytest.raises(SystemExit):
        plain_inversion.main([*argv, "--statistics-from", "folder:mine", "--out", "two"])
    assert "was made with pictures" in capsys.readouterr().err
    plain_inversion.main([*argv[:-2], "--bank", "other", "--out", "three"])
    assert "two photographs" in capsys.readouterr().out


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
