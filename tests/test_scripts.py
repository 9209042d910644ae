"""Scripts as a runner types them: folders, logs, pictures, and runs that are killed and resumed bit for bit."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import csd
import run
from conftest import ROOT, TINY_OF


def rows_of(folder, without_seconds=True):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not (without_seconds and (k.startswith("seconds") or k == "peak_memory_mb"))} for row in rows]


def compared(folder):
    return [row for row in rows_of(folder) if row["event"] not in ("start", "resume")]


def assert_same_run(one, other):
    """Same rows and same weights, bit for bit; the state at the end too, bank and random streams with it."""
    assert compared(one) == compared(other)
    a, b = (torch.load(folder / "student.pt", weights_only=True)["weights"] for folder in (one, other))
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in (one, other))
    assert a.keys() == b.keys()

    def equal(x, y):
        if torch.is_tensor(x):
            return torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(equal, x, y))
        return x == y
    assert all(equal(a[key], b[key]) for key in a if not key.startswith("seconds")), [key for key in a if not equal(a[key], b[key])]


def test_a_run_leaves_what_it_promises(csd_args, in_tmp, capsys):
    csd.main([*csd_args, "--out", "out"])
    rows = rows_of(in_tmp / "out", without_seconds=False)
    assert [row["event"] for row in rows] == ["start", "bank", "bank", "epoch", "epoch", "end"]
    start, epoch, end = rows[0], rows[-2], rows[-1]
    assert {"arguments", "versions", "device", "teacher_sha256", "teacher_acc"} <= set(start)
    assert start["arguments"]["epochs"] == 2 and start["arguments"]["preset"] == "digits"
    assert {"student_acc", "agreement", "seconds_synthesis", "seconds_distillation", "seconds_evaluation", "images_synthesized",
            "student_steps", "teacher_queries", "loss_kd", "loss_csd"} <= set(epoch)
    assert (epoch["images_synthesized"], epoch["student_steps"], epoch["teacher_queries"]) == (40, 6, 128)
    assert set(end) == {"event", "teacher_acc", "student_acc_last", "student_acc_best", "agreement", "ece", "seconds", "peak_memory_mb"}
    assert 0 <= end["student_acc_last"] <= end["student_acc_best"] <= 1 and end["student_acc_last"] == epoch["student_acc"]
    assert {path.name for path in (in_tmp / "out").iterdir()} == {"log.jsonl", "samples.png", "student.pt", "checkpoint.pt"}
    from PIL import Image
    width, height = Image.open(in_tmp / "out" / "samples.png").size
    assert height > 10 * 40 and width > 8 * 40
    out = capsys.readouterr().out
    assert "test accuracy" in out and "chosen on the test set" in out and max(map(len, out.splitlines())) < 160
    assert run.read_classifier("out/student.pt")["test_acc"] == end["student_acc_last"]


def test_the_same_command_twice_goes_to_two_folders_and_shares_the_bank(csd_args, in_tmp):
    csd.main(csd_args)
    bank = in_tmp / "checkpoints" / "toy.bank-seed0.pt"
    stamp = bank.stat().st_mtime_ns
    csd.main(csd_args)
    assert sorted(path.name for path in (in_tmp / "runs").iterdir()) == ["csd-digits-001", "csd-digits-002"]
    assert bank.stat().st_mtime_ns == stamp
    assert_same_run(in_tmp / "runs" / "csd-digits-001", in_tmp / "runs" / "csd-digits-002")
    csd.main([*csd_args, "--student", "wrn16_1"])              # another student of the same teacher
    assert bank.stat().st_mtime_ns == stamp and {p.name for p in bank.parent.iterdir()} == {"toy.pt", bank.name}


def test_a_bank_of_other_settings_or_of_another_teacher_is_never_overwritten(csd_args, in_tmp, capsys):
    csd.main(csd_args)
    bank = in_tmp / "checkpoints" / "toy.bank-seed0.pt"
    before = bank.read_bytes()
    for changes, message in ((["--oh", "2"], "oh = 1.0"), (["--bank-rounds", "3"], "bank_rounds = 2")):
        with pytest.raises(SystemExit) as stop:
            csd.main([*csd_args, *changes])
        assert stop.value.code == 2 and message in capsys.readouterr().err and bank.read_bytes() == before
    assert len(list((in_tmp / "runs").iterdir())) == 1         # a refused command leaves no folder
    csd.main([*csd_args, "--oh", "2", "--bank", "mine.pt"])
    assert (in_tmp / "mine.pt").exists() and bank.read_bytes() == before
    content = torch.load("checkpoints/toy.pt", weights_only=True)
    content["weights"]["fc.bias"] += 1
    torch.save(content, "checkpoints/toy.pt")
    with pytest.raises(SystemExit) as stop:
        csd.main(csd_args)
    assert stop.value.code == 2 and "teacher_sha256" in capsys.readouterr().err and bank.read_bytes() == before
    for damage in (before[:999], b"x"):
        bank.write_bytes(damage)
        with pytest.raises(SystemExit) as stop:
            csd.main(csd_args)
        assert stop.value.code == 2 and "not a readable image bank" in capsys.readouterr().err and bank.read_bytes() == damage


def test_folders_that_cannot_be_used(csd_args, in_tmp, capsys):
    csd.main([*csd_args, "--out", "out"])
    log = (in_tmp / "out" / "log.jsonl").read_bytes()
    (in_tmp / "file").write_text("mine")
    for out, message in (("out", "holds a run already"), ("file", "is a file"), ("file/deeper", "is a file")):
        with pytest.raises(SystemExit) as stop:
            csd.main([*csd_args, "--out", out])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
    with pytest.raises(SystemExit) as stop:                    # finished: nothing to resume, nothing lost
        csd.main([*csd_args, "--out", "out", "--resume"])
    assert stop.value.code == 2 and "is finished" in capsys.readouterr().err
    assert (in_tmp / "out" / "log.jsonl").read_bytes() == log and (in_tmp / "file").read_text() == "mine"


def test_scoring_every_second_epoch_and_not_at_all(csd_args, in_tmp):
    csd.main([*csd_args, "--out", "some", "--epochs", "3", "--eval-every", "2"])
    assert [row["student_acc"] is None for row in rows_of(in_tmp / "some") if row["event"] == "epoch"] == [True, False, False]
    args = [arg for arg in csd_args if arg not in ("--dataset", "digits")]
    csd.main([*args, "--dataset", "none", "--out", "never"])
    end = rows_of(in_tmp / "never")[-1]
    assert end["student_acc_last"] is None and end["ece"] is None
    one, other = (torch.load(f"{name}/student.pt", weights_only=True)["weights"]["fc.bias"] for name in ("some", "never"))
    assert one.shape == other.shape


def test_scores_and_pictures_change_nothing(csd_args, in_tmp):
    """The test set can be away altogether: the same student comes out, bit for bit."""
    args = [arg for arg in csd_args if arg not in ("--dataset", "digits")]
    csd.main([*csd_args, "--out", "scored"])
    csd.main([*args, "--dataset", "none", "--out", "blind"])
    one, other = (torch.load(f"{name}/student.pt", weights_only=True)["weights"] for name in ("scored", "blind"))
    assert all(torch.equal(one[key], other[key]) for key in one)


class Killed(BaseException):
    """Not caught by anything, as a kill is not."""


def kill_at(monkeypatch, saves):
    """Save at every step, die right after the saves of these numbers (counted over all sessions)."""
    save, count = run.Progress.save, [0]

    def save_then_die(self, state):
        save(self, state)
        count[0] += 1
        if count[0] in saves:
            raise Killed
    monkeypatch.setattr(run, "SAVE_EVERY", 0)
    monkeypatch.setattr(run.Progress, "save", save_then_die)


# 2 bank rounds x 2 steps, then 2 epochs x (2 synthesis + 3 distillation steps): 14 ticks, and the save at the end
@pytest.mark.parametrize("saves", [[1], [2], [4], [5], [6], [7], [9], [10], [14], [15], [3, 8, 12], list(range(1, 16))], ids=str)
def test_a_killed_run_ends_like_one_that_was_not(csd_args, in_tmp, monkeypatch, saves):
    csd.main([*csd_args, "--out", "straight", "--bank", "straight.pt"])
    kill_at(monkeypatch, saves)
    args = [*csd_args, "--out", "killed", "--bank", "straight.pt"]
    args[-1] = "killed.pt"
    for _ in saves:
        with pytest.raises(Killed):
            csd.main([*args, "--resume"])                      # with no checkpoint yet it starts from the beginning
    csd.main([*args, "--resume"])
    monkeypatch.undo()
    assert not list((in_tmp / "killed").glob(".*"))
    # the file name of the bank is the one thing in which the two commands differ
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    one, other = (torch.load(name, weights_only=True)["result"] for name in (in_tmp / "straight.pt", in_tmp / "killed.pt"))
    assert torch.equal(one["pixels"], other["pixels"]) and torch.equal(one["labels"], other["labels"])


def test_resume_with_another_setting_is_refused_and_named(csd_args, in_tmp, monkeypatch, capsys):
    kill_at(monkeypatch, [8])
    with pytest.raises(Killed):
        csd.main([*csd_args, "--out", "out"])
    before = {path.name: path.read_bytes() for path in (in_tmp / "out").iterdir()}
    for change in (["--epochs", "5"], ["--seed", "1"], ["--csd", "3"], ["--threads", "1"], ["--student", "wrn16_1"]):
        with pytest.raises(SystemExit) as stop:
            csd.main([*csd_args, "--out", "out", "--resume", *change])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and change[0][2:].replace("-", "_") + " = " in error, error
        assert {path.name: path.read_bytes() for path in (in_tmp / "out").iterdir()} == before
    torch.set_num_threads(2)


@pytest.mark.slow
def test_sigkill_and_sigterm_at_random_moments(csd_args, in_tmp):
    """Real processes, real signals: whatever the moment, the run that is continued ends like the straight one."""
    csd_args[csd_args.index("--epochs") + 1] = "6"

    def command(folder):
        code = "import sys, run, csd; run.SAVE_EVERY = 0.05; csd.main(sys.argv[1:])"
        return [sys.executable, "-c", code, *csd_args, "--student-steps", "40", "--out", folder, "--bank", "bank.pt", "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command("straight"), cwd=in_tmp, env=environment, check=True, capture_output=True)
    (in_tmp / "bank.pt").unlink()
    waits, stops = iter([0.3, 0.9, 0.2, 0.5, 1.4, 0.7, 0.1, 1.1] * 3), 0
    for wait in waits:
        process = subprocess.Popen(command("killed"), cwd=in_tmp, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None and "stage 1" not in process.stdout.readline():
            pass
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if stops % 3 == 2 else signal.SIGKILL)
            stops += 1
        process.communicate()
        log = in_tmp / "killed" / "log.jsonl"
        if log.exists() and '"event": "end"' in log.read_text():
            break                                              # it ended, perhaps a moment before the signal came
    else:
        subprocess.run(command("killed"), cwd=in_tmp, env=environment, check=True, capture_output=True)
    assert stops >= 2
    assert_same_run(in_tmp / "straight", in_tmp / "killed")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        subprocess.run(command("killed"), cwd=in_tmp, env=environment, check=True, capture_output=True, text=True)
    assert refused.value.returncode == 2 and "is finished" in refused.value.stderr


def commands_of_the_readme():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("command", [c for c in commands_of_the_readme() if re.search(r"python (benchmarks/zskd|\w+)\.py", c)])
def test_every_readme_command_parses(command, in_tmp, monkeypatch, capsys):
    """Up to the point where work would start."""
    script, *argv = shlex.split(command[command.index("python "):])[1:]
    if script == "common.py":
        def would_train(*args):
            raise common.BadInput("would train")
        monkeypatch.setattr(run, "train_teacher", would_train)
        with pytest.raises(SystemExit):
            run.train_main(argv)
        assert "would train" in capsys.readouterr().err
    else:
        module = __import__(script.removesuffix(".py").removeprefix("benchmarks/"))
        settings = run.read_settings(argv, module.__name__, module.__doc__, module.PRESETS, module.FLAGS, getattr(module, "TEXT_FLAGS", {}))
        assert settings.preset in module.PRESETS


@pytest.mark.parametrize("method", TINY_OF, ids=lambda method: method.__name__)
def test_every_flag_is_read_and_every_setting_has_one(method):
    """A flag that nothing reads is a promise broken in silence."""
    sources = Path(method.__file__).read_text() + "".join((ROOT / name).read_text() for name in ("run.py", "common.py"))
    settings = vars(run.read_settings(["--dataset", "digits"], method.__name__, method.__doc__, method.PRESETS, method.FLAGS,
                                      getattr(method, "TEXT_FLAGS", {})))
    by_name = set(re.findall(r'getattr\(settings, "(\w+)"', sources)) | set(re.findall(r"settings\.(\w+)", sources))
    by_name |= set(re.findall(r"presets\[args\.(preset)\]", sources))
    if method is csd:
        by_name |= set(csd.BANK_SETTINGS)                      # bank_rounds and others are passed on by name
    assert set(settings) <= by_name, set(settings) - by_name
    assert set(TINY_OF[method]) <= set(settings)
    for preset in method.PRESETS.values():
        assert set(preset) == set(method.FLAGS) | {"epochs", "batch_size"}
