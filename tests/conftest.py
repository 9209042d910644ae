"""Shared by all tests: the repository's root on the path, an empty working folder, tiny networks and settings."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import csd  # noqa: E402
import cudfkd  # noqa: E402
import dafl  # noqa: E402
import deepinversion  # noqa: E402
import models  # noqa: E402
import rdskd  # noqa: E402
import regulated_kd  # noqa: E402
import run as run_module  # noqa: E402
import surrogate_kd  # noqa: E402
import zskd  # noqa: E402

TINY = dict(epochs=2, batch_size=8, student_steps=3, synthesis_batch_size=10, synthesis_steps=2, latent_dim=6, bank_rounds=2,
            bank_synthesis_steps=2)
TINY_OF = {
    csd: TINY,
    dafl: dict(epochs=2, student_steps=3, batch_size=8, latent_dim=6, generator_width=4),
    rdskd: dict(epochs=2, student_steps=3, batch_size=8, generator_epochs=2, generator_steps=3, synthesis_batch_size=8, latent_dim=6,
                generator_width=4),
    deepinversion: dict(epochs=2, batch_size=8, student_steps=3, initial_batches=2, pool_batches=4, synthesis_batch_size=10, synthesis_steps=2),
    cudfkd: dict(epochs=2, batch_size=8, student_steps=4, round_steps=2, synthesis_batch_size=6, images_per_pass=5, latent_dim=6, generator_width=4),
    regulated_kd: dict(epochs=2, teacher_epochs=2, batch_size=480, teacher_batch_size=480, scan_batch_size=480),
    surrogate_kd: dict(epochs=2, batch_size=8, pool_images=40, pool_budget=1, attacks=2, attack_iterations=4),
    zskd: dict(epochs=2, batch_size=8, impressions=20, synthesis_batch_size=12, synthesis_steps=2),
}


def tiny_flags(method):
    return [text for name, value in TINY_OF[method].items() for text in ("--" + name.replace("_", "-"), str(value))]


def tiny_settings(method=csd, **changes):
    return SimpleNamespace(**{**method.PRESETS["digits"], **TINY_OF[method], "seed": 0, **changes})


def tiny_networks(teacher="wrn10_1", student="wrn10_1"):
    data = common.DATASETS["digits"]
    with common.seeded(0):
        return models.build_model(teacher, 10, data.image_shape), models.build_model(student, 10, data.image_shape), data


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
    return tiny_args(csd, teacher_file)


def tiny_args(method, teacher_file):
    return ["--dataset", "digits", "--teacher", str(teacher_file), "--student", "wrn10_1", "--threads", "2", *tiny_flags(method)]


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
