"""Shared by all tests: the repository's root on the path, an empty working folder, tiny networks and settings."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import csd  # noqa: E402
import run as run_module  # noqa: E402

TINY = dict(epochs=2, batch_size=8, student_steps=3, synthesis_batch_size=10, synthesis_steps=2, latent_dim=6, bank_rounds=2,
            bank_synthesis_steps=2)
TINY_FLAGS = [text for name, value in TINY.items() for text in ("--" + name.replace("_", "-"), str(value))]


def tiny_settings(**changes):
    return SimpleNamespace(**{**csd.PRESETS["digits"], **TINY, "seed": 0, **changes})


def tiny_networks(teacher="wrn10_1", student="wrn10_1"):
    data = common.DATASETS["digits"]
    with common.seeded(0):
        return common.build_model(teacher, 10, data.image_shape), common.build_model(student, 10, data.image_shape), data


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty current folder; checkpoints/ and runs/ go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def teacher_file(in_tmp):
    """An untrained teacher for digits in a file: good enough for everything but learning."""
    teacher, _, data = tiny_networks()
    path = in_tmp / "checkpoints" / "toy.pt"
    run_module.save_classifier(path, teacher, "wrn10_1", data, "digits")
    return path


@pytest.fixture
def csd_args(teacher_file):
    """A command line of csd.py that takes two seconds."""
    return ["--dataset", "digits", "--teacher", str(teacher_file), "--student", "wrn10_1", "--threads", "2", *TINY_FLAGS]


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
