"""Shared by the tests: numbers that are near, weights, a run that keeps everything, networks, refusals."""
import functools
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import common
import running

D = torch.float64


def near(value, expected, tolerance=1e-5):
    value, expected = (torch.as_tensor(each, dtype=D).detach() for each in (value, expected))
    assert value.shape == expected.shape
    assert torch.allclose(value, expected, atol=tolerance, rtol=0), (value - expected).abs().max().item()


near6 = functools.partial(near, tolerance=1e-6)


@pytest.fixture
def in_float64(monkeypatch):
    """All of a method in float64, so that rounding does not grow: Adam makes large what is only rounding."""
    torch.set_default_dtype(D)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


def weights_of(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(one, other, tolerance=1e-6):
    """Two networks, up to rounding."""
    for name, value in one.state_dict().items():
        other_value = other.state_dict()[name].double()
        assert torch.allclose(value.double(), other_value, atol=tolerance, rtol=tolerance), name


class Log:
    """A run that keeps what it is given: the live state, a row an epoch, what would be shown, notes."""
    def __init__(self):
        self.rows, self.shown, self.notes = [], [], []
        self.note = self.notes.append

    def resume(self, **state):
        self.state = state
        return 0

    def log(self, epoch, means, pixels=None, labels=None):
        self.rows.append({"epoch": epoch, **means})
        self.shown.append((pixels, labels))


def bn_inputs(network):
    """{BatchNorm: the input of its latest pass}, from now on; written apart from common.py."""
    seen = {}
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda layer, x: seen.__setitem__(layer, x[0]))
    return seen


def bn_distances(seen):
    """The part of bn_loss of each layer of `bn_inputs`."""
    return [(x.var((0, 2, 3), unbiased=False) - layer.running_var).norm()
            + (x.mean((0, 2, 3)) - layer.running_mean).norm() for layer, x in seen.items()]


def kl(student, teacher, temperature):
    """T² KL(teacher || student) of each image, as torch.distributions has it."""
    teacher, student = (torch.distributions.Categorical(logits=x / temperature) for x in (teacher, student))
    return temperature ** 2 * torch.distributions.kl_divergence(teacher, student)


def sure(network, factor=30):
    """Makes the answers of an untrained network differ from image to image."""
    network.fc.weight.data *= factor
    return network


class Foreign(nn.Module):
    """A network that has nothing in common with common.py's: no `last_map`, no `fc`."""
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), norm(12), nn.ReLU())
        self.pool, self.out = nn.AdaptiveMaxPool2d(1), nn.Linear(12, 10)

    def forward(self, x):
        return self.out(self.pool(self.body(x)).flatten(1))


def save_untrained(path, arch, data=common.DATASETS["digits"], dataset="digits"):
    """A teacher's file for main()."""
    with common.seeded(0):
        model = common.build_model(arch, data.num_classes, data.image_shape)
    running.save_classifier(path, model, arch, data, dataset)
    return str(path)


def odd_teacher(folder):
    """The command line of a teacher for 10x10 images, which the papers' generators cannot make."""
    data = common.DataSpec((1, 10, 10), 3, (0.5,), (0.5,))
    return ["--teacher", save_untrained(folder / "odd.pt", "wrn10_1", data, "folder:x"),
            "--student", "wrn10_1", "--dataset", "none", "--preset", "digits"]


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def run_script(name, argv, folder):
    """A script in a process of its own, which is in `folder`."""
    os.chdir(folder)
    importlib.import_module(name).main(argv)


def refused(method, argv, capsys):
    """The one sentence with which a script refuses, before any work; without quotes, which vary by Python."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        method.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(Path().rglob("*")) == before                 # no folder, no file
    return error.replace("'", "")
