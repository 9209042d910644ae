"""Slow: the digits commands, each in its own process, learn what the pages say, in time and memory."""
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from helpers import rows_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all: the first run trains the teacher and makes the bank."""
    return tmp_path_factory.mktemp("digits")


def learned(method, folder, *flags):
    """-> the rows of a run, its seconds"""
    out, began = folder / "_".join([method, *flags]), time.monotonic()
    command = [sys.executable, ROOT / f"{method}.py", "--dataset", "digits", "--out", out, *flags]
    subprocess.run(command, cwd=folder, check=True)
    return rows_of(out), time.monotonic() - began


@pytest.mark.parametrize("method, least, minutes", [
    ("csd", 0.93, 8), ("dafl", 0.88, 6), ("rdskd", 0.88, 6), ("deepinversion", 0.95, 6), ("cudfkd", 0.92, 6),
    ("regulated_kd", 0.90, 6), ("surrogate_kd", 0.85, 6)])
def test_a_method_learns_the_digits(method, least, minutes, folder):
    """Seed 0, last epoch, a little under the mean of several seeds; twice the time of a quiet machine."""
    rows, seconds = learned(method, folder)
    epochs, end = [row for row in rows if row["event"] == "epoch"], rows[-1]
    assert end["teacher_acc"] >= (0.97 if method == "regulated_kd" else 0.985)
    assert end["student_acc_last"] >= least and epochs[-1]["student_acc"] > epochs[0]["student_acc"]
    assert not [row for row in rows if row["event"] == "collapse"] and seconds < 60 * minutes
    assert method != "csd" or epochs[-1]["loss_kd"] < epochs[0]["loss_kd"] / 3
    code = "import resource, torch, torchvision; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    imports = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert end["peak_memory_mb"] - imports / (2 ** 20 if sys.platform == "darwin" else 2 ** 10) < 700


@pytest.mark.parametrize("flags", ["--csd 0", "--csd 0 --adversarial 1", "--raw-head --csd 1"])
def test_the_ablations_learn_too(flags, folder):
    rows, _ = learned("csd", folder, "--epochs", "3", *flags.split())
    assert rows[-1]["student_acc_last"] > 0.3
