"""Shared by all tests: the repository's root on the path, an empty folder, tiny networks and settings."""
import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import common  # noqa: E402
import running  # noqa: E402
import csd  # noqa: E402
import cudfkd  # noqa: E402
import dafl  # noqa: E402
import deepinversion  # noqa: E402
import plain_inversion  # noqa: E402
import rdskd  # noqa: E402
import regulated_kd  # noqa: E402
import surrogate_kd  # noqa: E402

DATA_FREE = [csd, cudfkd, dafl, deepinversion, plain_inversion, rdskd]
METHODS = [*DATA_FREE, regulated_kd, surrogate_kd]
# OMP_NUM_THREADS=1 asks for one; two workers of pytest-xdist with two threads each would slow one another
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads())
# settings with which a run takes a second or two; a new method needs one entry here and one in METHODS
TINY = {
    csd: dict(epochs=2, batch_size=8, student_steps=3, synthesis_batch_size=10, synthesis_steps=2,
              latent_dim=6, bank_rounds=2, bank_synthesis_steps=2),
    dafl: dict(epochs=2, student_steps=3, batch_size=8, latent_dim=6, generator_width=4),
    rdskd: dict(epochs=2, student_steps=3, batch_size=8, generator_epochs=2, generator_steps=3,
                synthesis_batch_size=8, latent_dim=6, generator_width=4),
    deepinversion: dict(epochs=2, batch_size=8, student_steps=3, initial_batches=2, pool_batches=4,
                        synthesis_batch_size=10, synthesis_steps=2),
    cudfkd: dict(epochs=2, batch_size=8, student_steps=4, round_steps=2, synthesis_batch_size=6,
                 images_per_pass=5, latent_dim=6, generator_width=4),
    plain_inversion: dict(epochs=2, batch_size=8, student_steps=3, synthesis_batch_size=10, synthesis_steps=2,
                          latent_dim=6, bank_rounds=2, bank_synthesis_steps=2, visits=2),
    regulated_kd: dict(epochs=2, teacher_epochs=2, batch_size=160, teacher_batch_size=160,
                       scan_batch_size=160),
    surrogate_kd: dict(epochs=2, batch_size=8, pool_images=40, pool_budget=1, attacks=2, attack_iterations=4),
}


def tiny_settings(method, **changes):
    """A method's Settings with which `distill` takes a second."""
    return dataclasses.replace(method.PRESETS["digits"].settings, **{**TINY[method], **changes})


def tiny_networks(teacher="wrn10_1", student="wrn10_1"):
    """Untrained teacher and student for digits, always the same ones, and the DataSpec."""
    data = common.DATASETS["digits"]
    with common.seeded(0):
        return *(common.build_model(name, 10, data.image_shape) for name in (teacher, student)), data


def few_images(*args):
    """As `load_dataset`, a third of the digits."""
    images, data = common.load_dataset(*args)
    return images._replace(pixels=images.pixels[:480], labels=images.labels[:480]), data


def real_images(method, teacher, data, settings):
    """What `distill` takes by name beside the five arguments that all methods share."""
    if method is regulated_kd:
        return dict(train=few_images("digits", True)[0], counts=(torch.arange(480) % 3).float())
    if method is surrogate_kd:
        with common.seeded(3):
            pixels = torch.randint(256, (40, *data.image_shape), dtype=torch.uint8)
        return dict(surrogate=pixels, pseudo_labels=torch.arange(40) % 10)
    return {}


def tiny_args(method, teacher_file, **changes):
    """A command line of a method's script that takes two seconds."""
    flags = []
    for name, value in {**TINY[method], **changes}.items():
        flag = name.replace("_", "-")
        flags += ["--" + "no-" * (not value) + flag] if isinstance(value, bool) else ["--" + flag, str(value)]
    return ["--dataset", "digits", "--teacher", str(teacher_file), "--student", "wrn10_1", "--device", "cpu",
            "--threads", str(THREADS), *flags]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """An empty current folder; checkpoints/ and runs/ go there. regulated_kd trains on few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(regulated_kd, "load_dataset", few_images)
    return tmp_path


@pytest.fixture
def teacher_file(in_tmp):
    """An untrained teacher for digits in a file: good enough for everything but learning."""
    teacher, _, data = tiny_networks()
    path = in_tmp / "checkpoints" / "toy.pt"
    running.save_classifier(path, teacher, "wrn10_1", data, "digits")
    return path


@pytest.fixture
def unchecked(monkeypatch):
    """For tests that count or watch forward passes: distill does not look at the networks first."""
    monkeypatch.setattr(common, "check_answers", lambda *args, **more: None)


@pytest.fixture(autouse=True)
def short_scores(request, monkeypatch):
    """40 drawn pictures for 2,000 and no curves, to save time, except in the tests that look at them."""
    if "drawn" not in request.node.name:
        monkeypatch.setattr(running, "drawn_pictures", lambda data: common.drawn_pictures(data, 40))
    if not any(words in request.node.name for words in ("leaves_what_it_promises", "is_enough")):
        monkeypatch.setattr(running, "save_curves", lambda path, *args: None)


@pytest.fixture(autouse=True)
def same_numbers_on_every_machine(request, monkeypatch):
    """On a CPU, also where there is a GPU; tests of a GPU have "cuda" in their name."""
    torch.set_num_threads(THREADS)
    for name in () if "cuda" in request.node.name else ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: False)
