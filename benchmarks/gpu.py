"""What is to be measured on a CUDA machine, the most useful first. Each call goes on where the last ended.

    python benchmarks/gpu.py --minutes 30                # data from data/, downloaded if they are not there
    python benchmarks/gpu.py --list                      # what is done and what is to come
    python benchmarks/gpu.py --rehearse --minutes 30     # the whole list on a CPU, at a tiny size

The list:
    1  the tests
    2  how fast the steps are, beside the authors' order of work, and how busy the GPU is in them
    3  a ResNet-34 for CIFAR-10
    4  CuDFKD with the authors' preset, its first 15 epochs: its abstract says 90 % by then
    5  plain_inversion, ResNet-34 to ResNet-18
    6  CSD, the same pair, with a fifth of the authors' bank and epochs
    7  CSD with the authors' preset, WRN-40-2 to WRN-16-1
    8  DAFL with the authors' preset on MNIST, three seeds together

Before a training it says how long that will take. If the training was begun before, it knows that from the
log. Else it divides the FLOPs that costs.py counts by the FLOPs a second of ten training steps, here and now.
A job that fails does not hold up the others, and is tried again by the next call. What is made lies in gpu/:
logs, pictures and students in gpu/runs, what was printed in gpu/NAME.out. DAFL's runs alone lie where
race.py puts them.
"""
import contextlib
import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import costs
import race
from common import DATASETS, BadInput, build_model, in_bf16
from running import Parser, command_line, device_name, number_type, require_same

RESNETS, WIDE = ("resnet34", "resnet18"), ("wrn40_2", "wrn16_1")
TINY = {"csd": "--student-steps 2 --synthesis-batch-size 10 --synthesis-steps 2 --bank-rounds 1 "
               "--bank-synthesis-steps 2",
        "cudfkd": "--student-steps 10 --synthesis-batch-size 10"}
TINY["plain_inversion"] = TINY["csd"]


class Job(NamedTuple):
    name: str                # also of its folder or file
    command: list            # without python
    makes: Path              # it is done when this file is there; a run's log must also have its end
    networks: tuple = ()     # of a training, for the estimate
    epochs: int = 0          # stop a run after so many; 0 = at its end
    teacher: Path = ROOT     # the file that it needs


def jobs(folder, rehearse):
    """-> the list, the most useful first.   folder: absolute"""
    # with a number of threads, because what was begun with another number does not go on
    dataset, how = ("digits", "--threads 1") if rehearse else ("cifar10", "--precision bf16 --threads 4")
    pairs = (("wrn10_1", "wrn10_1"),) * 2 if rehearse else (RESNETS, WIDE)
    found = []

    def once(name, command, *files):
        found.append(Job(name, [*shlex.split(command), *files], folder / f"{name}.txt"))

    def teacher(network, epochs):
        file = folder / "teachers" / f"{dataset}_{network}.pt"
        if all(job.makes != file for job in found):
            command = f"common.py --model {network} --dataset {dataset} --epochs {epochs} {how}"
            found.append(Job(f"teacher-{network}", [*shlex.split(command), "--out", str(file)], file,
                             (network,) * 2))
        return str(file)

    def student(name, script, flags, networks, epochs=0):
        if rehearse:
            flags, epochs = f"--preset digits --epochs 2 --batch-size 8 {TINY[script]}", min(epochs, 1)
        command = f"{script}.py {flags} --student {networks[1]} {how}"
        file = teacher(networks[0], 2 if rehearse else 40)
        out = folder / "runs" / name
        stage = race.own_stage(script, f"{folder}/made/{name}")
        command = [*shlex.split(command), "--teacher", file, *stage, "--out", str(out), "--resume"]
        found.append(Job(name, command, out / "log.jsonl", networks, epochs, Path(file)))
    once("tests", "-m pytest -q tests/test_tables.py" if rehearse else "-m pytest -q -n 4")
    for precision in ("fp32",) if rehearse else ("fp32", "tf32", "bf16"):
        for method in ("dafl",) if rehearse else ("csd", "cudfkd"):
            small = " --laps 1 --batch-size 2" * rehearse
            name = f"throughput-{method}-{precision}"
            once(name, f"benchmarks/throughput.py --method {method} --precision {precision}{small}",
                 "--log", f"{folder}/{name}.jsonl")
        for networks in dict.fromkeys(pairs):
            small = " --images 4 --methods dafl plain_inversion" * rehearse
            once(f"busy-{networks[0]}-{precision}", f"benchmarks/busy.py --networks {' '.join(networks)} "
                 f"--precision {precision}{small}", "--log", f"{folder}/busy-{networks[0]}-{precision}.jsonl")
    student("cudfkd-resnets", "cudfkd", "--preset cifar10 --eval-every 1", pairs[0], 15)
    student("plain_inversion-resnets", "plain_inversion", "--preset cifar10", pairs[0])
    student("csd-resnets-fifth", "csd", "--preset cifar10 --bank-rounds 80 --epochs 20", pairs[0])
    student("csd-wrn", "csd", "--preset cifar10-wrn40_2-wrn16_1", pairs[1])
    if not rehearse:
        once("dafl-mnist", "benchmarks/race.py mnist --only dafl-authors --jobs 3")
    return found


def epochs_of(job):
    """The rows of a run's epochs, and its end row if there is one."""
    if job.makes.name != "log.jsonl" or not job.makes.exists():
        return []
    rows = []
    for line in job.makes.read_text().splitlines():
        with contextlib.suppress(ValueError):                  # a row that a kill has cut off
            rows.append(json.loads(line))
    return [row for row in rows if row["event"] in ("epoch", "end")]


def done(job):
    rows = epochs_of(job)
    if job.makes.name == "log.jsonl":
        return bool(rows) and (rows[-1]["event"] == "end" or 0 < job.epochs <= len(rows))
    return job.makes.exists()


def state(job, folder):
    begun = epochs_of(job) or (folder / f"{job.name}.out").exists()
    return "done" if done(job) else "failed" if (folder / f"{job.name}.failed").exists() else (
        "begun" if begun else "to do")


def flops_a_second(networks, device, image_shape, classes=10):
    """Of ten training steps of the student on the teacher's answers, after three that warm up."""
    size, seconds = 128 if device.type == "cuda" else 8, 0.0
    teacher, student = (build_model(name, classes, image_shape).to(device, memory_format=torch.channels_last)
                        for name in networks)
    if device.type == "cuda":
        in_bf16(teacher), in_bf16(student)
    images = torch.randn(size, *image_shape, device=device).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), 1e-3)

    def step():
        with torch.no_grad():
            target = teacher(images).softmax(1)
        optimizer.zero_grad()
        F.cross_entropy(student(images), target).backward()
        optimizer.step()
    with FlopCounterMode(display=False) as counter:
        step()
    for count in (3, 10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / count
    del teacher, student, images, optimizer
    gc.collect()                                               # the job needs the memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return counter.get_total_flops() / seconds


def seconds_of(job, device):
    """An estimate of what is left of a training; None for another job."""
    if not job.networks:
        return None
    words = [word for word in job.command if word != "--resume"]
    words = [word for place, word in enumerate(words)
             if not {word, words[place - 1]} & {"--out", "--teacher", "--precision"}]
    dataset = "digits" if "digits" in words else "cifar10"
    if words[0] == "common.py":
        images = int(words[words.index("--epochs") + 1]) * costs.TRAINING_IMAGES[dataset]
        shape = DATASETS[dataset].image_shape
        return (images * costs.training_gflop(job.networks[0], shape) * 1e9
                / flops_a_second(job.networks, device, shape))
    _, _, settings, data = costs.planned([*words, "--teacher", job.networks[0]])
    rows = epochs_of(job)
    if rows:
        each = sum(value for key, value in rows[-1].items() if key.startswith("seconds_"))
        return each * ((job.epochs or settings.epochs) - len(rows))
    part = job.epochs / settings.epochs if job.epochs else 1
    return (part * costs.cost([*words, "--teacher", job.networks[0]])["pflop"] * 1e15
            / flops_a_second(job.networks, device, data.image_shape))


def go(job, folder, left):
    """Run a job for `left` seconds at most, one that starts anew after a kill for nine minutes at most."""
    output, failed = folder / f"{job.name}.out", folder / f"{job.name}.failed"
    once = job.makes.suffix == ".txt"
    ends = time.monotonic() + (min(left, 540) if once else left)
    failed.unlink(missing_ok=True)
    if once and "--log" in job.command:
        Path(job.command[job.command.index("--log") + 1]).unlink(missing_ok=True)
    with open(output, "w" if once else "a") as file:
        process = subprocess.Popen([sys.executable, *job.command], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < ends and not (job.epochs and done(job)):
                time.sleep(0.2)
            code = process.poll()
        finally:                                               # also when this process is told to end
            for kind in (signal.SIGTERM, signal.SIGKILL):      # to what it has started, too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
    said = output.read_text()
    if once and (code == 0 or code == 1 and " failed" in said and job.name == "tests"):
        job.makes.write_text(said)                             # tests that fail have been run all the same
    elif code:
        failed.write_text("")
        print(f"{job.name} failed, status {code}: {['', *said.splitlines()][-1]}; see {output}", flush=True)


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=number_type(float, True), default=30, help="[30]")
    parser.add_argument("--folder", default="gpu", help="what is made lies there [gpu]")
    parser.add_argument("--list", action="store_true", help="say what is done, and stop")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at a tiny size, on digits")
    options = parser.parse_args(argv)
    if not options.rehearse and not options.list and not torch.cuda.is_available():
        raise BadInput("there is no CUDA device here; --rehearse tries the list on a CPU")
    device = torch.device("cpu" if options.rehearse else "cuda")
    ends = time.monotonic() + 60 * options.minutes
    folder = Path(options.folder).resolve()
    listed = jobs(folder, options.rehearse)
    if not options.list:
        what = dict(rehearse=options.rehearse)
        if (folder / "what.json").exists():
            require_same(json.loads((folder / "what.json").read_text()), what, options.folder,
                         "name another --folder, or move this one away")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "what.json").write_text(json.dumps(what))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))          # so that the job ends, too
        print(f"{device_name(device)}, {options.minutes:g} minutes", flush=True)
        for job in listed:
            if done(job) or ends - time.monotonic() < 1:
                continue
            if not job.teacher.exists():
                print(f"{job.name} waits for its teacher", flush=True)
                continue
            try:
                seconds = seconds_of(job, device)
            except Exception as error:         # of whatever kind: a job must not fall with its estimate
                seconds, _ = None, print(f"{job.name}: no estimate ({error})", flush=True)
            about = "" if seconds is None else f": about {seconds / 60:.1f} minutes"
            print(job.name + about, flush=True)
            go(job, folder, ends - time.monotonic())
    print("".join(f"{state(job, folder):>8s}   {job.name}\n" for job in listed), end="", flush=True)
    if not options.list and ends - time.monotonic() < 1:
        print("the time is over; the same command goes on", flush=True)


if __name__ == "__main__":
    main()
