"""All that is to be measured on a CUDA machine, the most useful first, within some minutes.

    python benchmarks/gpu.py --minutes 30                # data from data/, downloaded if they are not there
    python benchmarks/gpu.py --list                      # what is done and what is to come
    python benchmarks/gpu.py --rehearse --minutes 30     # the whole list on a CPU, at a tiny size

The list has the tests, the throughput of each method in three precisions, the teachers, and then short and
full trainings of every method on CIFAR-10 and MNIST. The same command goes on where the last call ended.
Before a training it says how long that will take: from the log if the training was begun before, else from
the FLOPs that benchmarks/costs.py counts and the FLOPs a second of ten training steps of the two networks,
here and now. Trainings that fit into the minutes left come first. Then those that do not fit get the rest of
the time, and go on next time. A job that fails does not hold up the others, and is tried again by the next
call. Everything lies in gpu/: logs, pictures and students in gpu/runs, what was printed in gpu/NAME.out.
"""
import json
import shlex
import shutil
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

PAIRS = (("wrn40_2", "wrn16_1"), ("resnet34", "resnet18"))
# {method: flags of its short run on CIFAR-10}; the best value for the time first
SHORT = {"cudfkd": "--preset cifar10-short", "surrogate_kd": "--preset cifar10-short",
         "plain_inversion": "--preset cifar10",
         "csd": "--preset cifar10-short", "dafl": "--preset cifar10-short",
         "deepinversion": "--preset cifar10-short", "rdskd": "--preset cifar10 --epochs 50",
         "regulated_kd": "--preset cifar10 --epochs 30 --plain-teacher"}
TINY = {"csd": "--student-steps 2 --synthesis-batch-size 10 --synthesis-steps 2 --bank-rounds 1 "
               "--bank-synthesis-steps 2",
        "plain_inversion": "--student-steps 2 --synthesis-batch-size 10 --synthesis-steps 2 --bank-rounds 1 "
                           "--bank-synthesis-steps 2",
        "cudfkd": "--student-steps 10 --synthesis-batch-size 10", "dafl": "--student-steps 2",
        "deepinversion": "--student-steps 2 --synthesis-batch-size 10 --synthesis-steps 2 "
                         "--initial-batches 1 --pool-batches 2",
        "rdskd": "--student-steps 2 --generator-epochs 1 --generator-steps 2 --synthesis-batch-size 10",
        "surrogate_kd": "--surrogate noise --pool-images 20", "regulated_kd": "--plain-teacher"}


class Job(NamedTuple):
    name: str            # also of its folder or file
    kind: str            # "once" starts anew after a kill; "teacher" and "run" go on
    command: list        # without python
    networks: tuple = ()
    dataset: str = "cifar10"


def jobs(folder, rehearse):
    """-> the list, the most useful first.   folder: absolute"""
    dataset, how, pairs, threads = "cifar10", "--precision bf16", PAIRS, ""
    precisions, more, tests = ("fp32", "tf32", "bf16"), "", "-m pytest -q -n 2"
    if rehearse:
        dataset, how, pairs, threads = "digits", "", (("wrn10_1", "wrn10_1"),), "--threads 1"
        precisions, more, tests = ("fp32",), "--laps 1 --batch-size 2", "-m pytest -q tests/test_tables.py"
    found = [Job("tests", "once", tests.split())]

    def add(name, kind, command, *rest):
        found.append(Job(name, kind, [*shlex.split(f"{command} {threads}"), *rest[0]], *rest[1:]))
    for method in ("dafl",) if rehearse else ("csd", "dafl", "rdskd", "deepinversion", "cudfkd"):
        for precision in precisions:
            add(f"throughput-{method}-{precision}", "once", f"benchmarks/throughput.py --method {method} "
                f"--precision {precision} {more}", ["--log", f"{folder}/throughput.jsonl"])
    files = {teacher: f"{folder}/teachers/{dataset}_{teacher}.pt" for teacher, _ in pairs}
    for teacher, file in files.items():
        flags = f"--model {teacher} --dataset {dataset} --epochs {2 if rehearse else 60} {how}"
        add(f"teacher-{teacher}", "teacher", f"common.py {flags}", ["--out", file], (teacher,) * 2, dataset)

    def add_run(name, script, flags, networks, dataset, *more):
        add(name, "run", f"{script}.py {flags} --student {networks[1]}", [
            *more, *race.own_stage(script, f"{folder}/made/{name}"), "--out", f"{folder}/runs/{name}",
            "--resume"], networks, dataset)
    for length in ("short",) if rehearse else ("short", "full"):
        for networks in pairs:
            for script, flags in SHORT.items():
                if (script, length) == ("plain_inversion", "full"):          # its short run is its preset
                    continue
                flags = f"{flags if length == 'short' else ''} {how} --eval-every 5"
                if rehearse:
                    flags = f"--preset digits --epochs 2 --batch-size 8 {TINY[script]}"
                add_run(f"{script}-{networks[0]}-{length}", script, flags, networks, dataset,
                        "--teacher", files[networks[0]])
    for script in () if rehearse else ("dafl", "rdskd", "cudfkd"):
        for seed in range(5):
            add_run(f"{script}-mnist-{seed}", script, f"--preset mnist --seed {seed}",
                    ("lenet5", "lenet5_half"), "mnist")
    return found


def rows_of(job, folder):
    log = folder / "runs" / job.name / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def done(job, folder):
    if job.kind == "once":
        return (folder / f"{job.name}.txt").exists()
    if job.kind == "teacher":
        return Path(job.command[job.command.index("--out") + 1]).exists()
    return bool(rows := rows_of(job, folder)) and rows[-1]["event"] == "end"


def state(job, folder):
    begun = rows_of(job, folder) or (folder / f"{job.name}.out").exists()
    return "done" if done(job, folder) else "failed" if (folder / f"{job.name}.failed").exists() else (
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
    if device.type == "cuda":
        torch.cuda.empty_cache()                               # the job needs the memory
    return counter.get_total_flops() / seconds


def seconds_of(job, folder, device, speeds):
    """An estimate of what is left; None where there is none: tests, throughput, MNIST's small networks."""
    epochs = [row for row in rows_of(job, folder) if row["event"] == "epoch"]
    words = [word for word in job.command if word != "--resume"]

    def without(*flags):
        return [word for place, word in enumerate(words) if word not in flags
                and (place == 0 or words[place - 1] not in flags)]
    if job.kind == "once" or (job.dataset == "mnist" and not epochs):
        return None
    if epochs:
        each = sum(value for key, value in epochs[-1].items() if key.startswith("seconds_"))
        *_, settings, _ = costs.planned([*without("--out", "--teacher", "--precision"), "--teacher",
                                         job.networks[0]])
        return each * (settings.epochs - len(epochs))
    shape = DATASETS[job.dataset].image_shape
    if job.networks not in speeds:
        speeds[job.networks] = flops_a_second(job.networks, device, shape)
    if job.kind == "teacher":
        images = int(words[words.index("--epochs") + 1]) * costs.TRAINING_IMAGES[job.dataset]
        return images * costs.training_gflop(job.networks[0], shape) * 1e9 / speeds[job.networks]
    command = [*without("--out", "--teacher", "--precision"), "--teacher", job.networks[0]]
    return costs.cost(command)["pflop"] * 1e15 / speeds[job.networks]


def go(job, folder, left):
    """Run a job for `left` seconds at most.   -> 'done', 'failed', or 'begun' where the time was over"""
    output, failed = folder / f"{job.name}.out", folder / f"{job.name}.failed"
    failed.unlink(missing_ok=True)
    with open(output, "w" if job.kind == "once" else "a") as file:
        process = subprocess.Popen([sys.executable, *job.command], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            return "begun"
        finally:                                               # also when this process is told to end
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
    if job.kind == "once" and (code == 0 or job.name == "tests"):
        shutil.copy(output, folder / f"{job.name}.txt")
    if code:
        failed.write_text("")
        print(f"{job.name} failed, status {code}: {['', *output.read_text().splitlines()][-1]}; see {output}",
              flush=True)
    return "failed" if code else "done"


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
    device, began = torch.device("cpu" if options.rehearse else "cuda"), time.monotonic()
    folder = Path(options.folder).resolve()
    listed, speeds, tried = jobs(folder, options.rehearse), {}, {}
    table = "\n".join("{:>8s}   {}" for _ in listed)
    if options.list:
        print(table.format(*(text for job in listed for text in (state(job, folder), job.name))))
        return
    what = dict(rehearse=options.rehearse)
    if (folder / "what.json").exists():
        require_same(json.loads((folder / "what.json").read_text()), what, options.folder,
                     "name another --folder, or move this one away")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "what.json").write_text(json.dumps(what))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # so that the job ends, too
    print(f"{device_name(device)}, {options.minutes:g} minutes", flush=True)

    def left():
        return 60 * options.minutes - (time.monotonic() - began)

    def ready(job):
        needed = [other for other in listed if other.kind == "teacher" and job.kind == "run"
                  and other.networks[0] == job.networks[0]]
        return not done(job, folder) and job.name not in tried and all(
            done(other, folder) for other in needed)
    for fitting in (True, False):                              # what fits into the time, then what does not
        while left() > 1 and (job := next(filter(ready, listed), None)):
            try:
                seconds = seconds_of(job, folder, device, speeds)
            except (BadInput, torch.OutOfMemoryError) as error:
                seconds, _ = None, print(f"{job.name}: no estimate ({error})", flush=True)
            begun_in_vain = job.kind == "once" and state(job, folder) == "begun"
            if fitting and ((seconds or 0) > left() or begun_in_vain):
                tried[job.name] = "later"
                continue
            about = "" if seconds is None else f": about {seconds / 60:.1f} minutes"
            print(f"{job.name}{about}", flush=True)
            tried[job.name] = go(job, folder, left())
        tried = {name: result for name, result in tried.items() if result != "later"}
    print(table.format(*(text for job in listed for text in (state(job, folder), job.name))))
    if left() <= 1:
        print("the time is over; the same command goes on", flush=True)


if __name__ == "__main__":
    main()
