"""plain_inversion.py: all of distill written anew, from the same draws; what a kept generator keeps."""
import pytest
import torch
import torch.nn.functional as F

import common
import csd
import plain_inversion
from conftest import tiny_args, tiny_networks, tiny_settings
from helpers import (Log, assert_close, bn_distances, bn_inputs, equal, in_float64, kl, near6,  # noqa: F401
                     odd_teacher, refused, rows_of, save_untrained, sure, weights_of)


@pytest.mark.parametrize("changes", [{}, dict(mixup=False, visits=1, seed=1),
                                     dict(keep_generator=False, seed=2)], ids=str)
def test_distill_equals_the_algorithm_written_anew(changes, in_float64):
    """The same images in the bank, of both stages, and the same student."""
    settings = tiny_settings(plain_inversion, oh=1.2, synthesis_steps=5, bank_synthesis_steps=4,
                             lr_generator=0.02, lr_student=0.02, **{"visits": 2, **changes})
    (teacher, student, data), (_, other, _), log = tiny_networks(), tiny_networks(), Log()
    found = plain_inversion.distill(sure(teacher), student, data, settings, log)
    of_teacher = bn_inputs(teacher.eval())

    def fresh():                                               # in the order in which weights are drawn anew
        return csd.reinitialize(csd.Generator(6, data.image_shape)).to(memory_format=torch.channels_last)

    def made(generator, steps):
        csd.reinitialize(generator.layers[0] if settings.keep_generator else generator)
        z, y, tried = torch.randn(10, 6).requires_grad_(), torch.randint(10, (10,)).sort().values, []
        adam = torch.optim.Adam([*generator.parameters(), z], settings.lr_generator, (0.5, 0.999))
        for _ in range(steps):
            x = generator(z)
            t = teacher(common.normalize(common.augment(x, data), data))
            loss = 1.2 * F.cross_entropy(t, y) + settings.bn * sum(bn_distances(of_teacher))
            tried.append((loss.item(), x.detach().clone()))
            adam.zero_grad(), loss.backward(), adam.step()
        return min(tried, key=lambda each: each[0])[1], y
    with common.seeded(settings.seed):
        generator = fresh()
        batches = [made(generator, 4) for _ in range(2)]
    with common.seeded(settings.seed ^ 2 ** 31):
        generator, sgd = fresh(), torch.optim.SGD(other.parameters(), 1, 0.9, weight_decay=1e-4)
        for epoch, rate in enumerate((0.02, 0.01)):            # half a cosine
            batches.append(made(generator, 5))
            near6(log.shown[epoch][0], batches[-1][0])
            pixels = torch.cat([(255 * x).floor().to(torch.uint8) for x, _ in batches])
            sgd.param_groups[0]["lr"], asked = rate, []
            for rows in torch.randperm(len(pixels)).split(8)[:3]:
                if len(asked) * settings.visits < 3:
                    images = common.normalize(common.augment(pixels[rows] / 255, data), data)
                    if settings.mixup:
                        part = torch.rand(8)[:, None, None, None]
                        images = (1 - part) * images + part * images[torch.randperm(8)]
                    asked.append((images, teacher(images).detach()))
                    images, t = asked[-1]
                else:                                          # with two visits, the third step
                    images, t = asked[torch.randperm(2)[0]]
                loss = kl(other.train()(images), t, settings.temperature).mean()
                sgd.zero_grad(), loss.backward(), sgd.step()
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
    plain_inversion.Generator(6, (1, 8, 12))                   # nothing here turns images


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
    assert "10x10" in refused(plain_inversion, odd_teacher(in_tmp), capsys)


def test_drawn_pictures_join_the_bank_without_a_class(in_tmp):
    teacher, student, data = tiny_networks()
    settings = tiny_settings(plain_inversion, drawn=5)
    bank = plain_inversion.synthesize_bank(teacher, data, settings)
    pixels, labels = plain_inversion.distill(teacher, student, data, settings, bank=bank)
    first, made = len(bank[0]), settings.epochs * settings.synthesis_batch_size
    assert len(pixels) == len(labels) == first + 5 + made
    assert torch.equal(pixels[:first], bank[0]) and labels[first:first + 5].tolist() == 5 * [-1]
    with common.seeded(settings.seed ^ 2 ** 30):
        assert torch.equal(pixels[first:first + 5], common.leaves_for(data, 5))
    of_score = common.drawn_pictures(data, 5).pixels           # a run is not scored on what it learned from
    assert not torch.equal(pixels[first:first + 5], of_score)
