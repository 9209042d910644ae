"""Slow: the digits commands, each in its own process, learn what the pages say, in time and memory."""
import subprocess
import sys
import time

import pytest

from conftest import ROOT, THREADS
from helpers import rows_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all: the first run trains the teacher and makes the bank."""
    return tmp_path_factory.mktemp("digits")


@pytest.mark.parametrize("method, epochs, least", [
    ("csd", 3, 0.93), ("dafl", 5, 0.88), ("rdskd", 12, 0.88), ("deepinversion", 8, 0.95), ("cudfkd", 6, 0.92),
    ("regulated_kd", 80, 0.90), ("surrogate_kd", 40, 0.85), ("plain_inversion", 5, 0.93)])
def test_a_method_learns_the_digits(method, epochs, least, folder):
    """Seed 0, last epoch. The first three in a part of their preset's epochs, to save time."""
    command = [sys.executable, ROOT / f"{method}.py", "--dataset", "digits", "--epochs", str(epochs),
               "--out", folder / method]
    began = time.monotonic()
    subprocess.run([*command, "--threads", str(THREADS)], cwd=folder, check=True)
    rows, seconds = rows_of(folder / method), time.monotonic() - began
    epochs, end = [row for row in rows if row["event"] == "epoch"], rows[-1]
    assert end["teacher_acc"] >= (0.97 if method == "regulated_kd" else 0.985)
    assert end["student_acc_last"] >= least and epochs[-1]["student_acc"] > epochs[0]["student_acc"]
    assert not [row for row in rows if row["event"] == "collapse"] and seconds < 60 * 8
    assert method != "csd" or epochs[-1]["loss_kd"] < epochs[0]["loss_kd"] / 3
    code = "import resource, torch, torchvision; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    imports = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert end["peak_memory_mb"] - imports / (2 ** 20 if sys.platform == "darwin" else 2 ** 10) < 700
