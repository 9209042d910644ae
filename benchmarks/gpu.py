"""All that is to be measured on a CUDA machine, in order of worth, within some minutes.

    python benchmarks/gpu.py --minutes 30                      # data from data/, downloaded if not there
    python benchmarks/gpu.py --minutes 30 --pack cifar10.zip   # data from a file of benchmarks/pack_data.py
    python benchmarks/gpu.py --list                            # what is done and what is to come
    python benchmarks/gpu.py --rehearse --minutes 30           # the whole list on a CPU, at a tiny size

The same command goes on where the last call ended, however that was. Before each job it says how
long it will take: the job's FLOPs (benchmarks/costs.py) over the FLOPs a second of ten training steps
of its networks, here and now. Jobs that fit into the minutes left come first; then the first one that
does not gets the rest, and goes on next time. gpu/keep holds what is worth carrying away, at most
60 MB: logs, pictures, output, and students and teachers in bf16, as long as there is room.
"""
import json
import shutil
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
from common import (DATASETS, BadInput, Parser, build_model, command_line, device_name, in_bf16, number_type,
                    read_classifier, require_same, write)

MOST_MB = 60
PAIRS = (("wrn40_2", "wrn16_1"), ("resnet34", "resnet18"))
# {method: flags of its short run on CIFAR-10}; the best value for the time first
SHORT = {"cudfkd": "--preset cifar10-short", "surrogate_kd": "--preset cifar10-short",
         "csd": "--preset cifar10-short", "dafl": "--preset cifar10-short",
         "deepinversion": "--preset cifar10-short", "rdskd": "--preset cifar10 --epochs 50",
         "regulated_kd": "--preset cifar10 --epochs 30 --plain-teacher"}
TINY = {"csd": "--student-steps 2 --synthesis-batch-size 10 --synthesis-steps 2 --bank-rounds 1 "
               "--bank-synthesis-steps 2", "cudfkd": "--student-steps 10 --synthesis-batch-size 10",
        "dafl": "--student-steps 2", "deepinversion": "--student-steps 2 --synthesis-batch-size 10 "
        "--synthesis-steps 2 --initial-batches 1 --pool-batches 2",
        "rdskd": "--student-steps 2 --generator-epochs 1 --generator-steps 2 --synthesis-batch-size 10",
        "surrogate_kd": "--surrogate noise --pool-images 20", "regulated_kd": "--plain-teacher"}


class Job(NamedTuple):
    name: str            # also of its folder or file
    kind: str            # "once": no way to go on, its output is kept; "teacher", "run": goes on after a kill
    command: str         # without python
    networks: tuple = ()
    dataset: str = "cifar10"


def jobs(folder, rehearse):
    """-> the list, in order of worth"""
    found = [Job("tests", "once", "-m pytest -q tests/test_tables.py" if rehearse else "-m pytest -q -n 2")]
    for method in ("csd", "dafl", "rdskd", "deepinversion", "cudfkd"):
        for precision in ("fp32",) if rehearse else ("fp32", "tf32", "bf16"):
            flags = f"--method {method} --precision {precision} --log {folder}/keep/throughput.jsonl"
            flags += " --laps 1 --batch-size 2" * rehearse
            found.append(Job(f"throughput-{method}-{precision}", "once", f"benchmarks/throughput.py {flags}"))
    pairs = (("wrn10_1", "wrn10_1"),) if rehearse else PAIRS
    dataset, how = "cifar10", "--epochs 60 --precision bf16"
    if rehearse:
        dataset, how = "digits", "--epochs 2 --threads 1"
    for teacher, _ in pairs:
        flags = f"--dataset {dataset} {how} --out {folder}/teachers/{dataset}_{teacher}.pt"
        found.append(Job(f"teacher-{teacher}", "teacher", f"common.py --model {teacher} {flags}",
                         (teacher, teacher), dataset))
    for length in ("short",) if rehearse else ("short", "full"):
        for teacher, student in pairs:
            for name in SHORT:
                flags = SHORT[name] if length == "short" else ""
                how = "--precision bf16 --eval-every 5"
                if rehearse:
                    flags, how = f"--preset digits --epochs 2 --batch-size 8 {TINY[name]}", "--threads 1"
                flags += f" --teacher {folder}/teachers/{dataset}_{teacher}.pt --student {student} {how}"
                found.append(Job(f"{name}-{teacher}-{length}", "run", f"{name}.py {flags}",
                                 (teacher, student), dataset))
    for name in () if rehearse else ("dafl", "rdskd", "cudfkd"):
        for seed in range(5):
            found.append(Job(f"{name}-mnist-{seed}", "run", f"{name}.py --preset mnist --seed {seed}",
                             ("lenet5", "lenet5_half"), "mnist"))
    return [job._replace(command=f"{job.command} --out {folder}/runs/{job.name} --resume")
            if job.kind == "run" else job for job in found]


def done(job, folder):
    """'done', 'failed' or ''"""
    if (folder / f"{job.name}.failed").exists():
        return "failed"
    if job.kind == "teacher":
        return "done" if Path(job.command.split()[-1]).exists() else ""
    if job.kind == "once":
        return "done" if (folder / "keep" / f"{job.name}.txt").exists() else ""
    log = folder / "runs" / job.name / "log.jsonl"
    return "done" if log.exists() and '"event": "end"' in log.read_text() else ""


def flops_a_second(networks, device, image_shape, classes=10):
    """Of ten training steps of the student on the teacher's answers, after three that warm up."""
    size, found = 256 if device.type == "cuda" else 8, []
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
        found.append((time.perf_counter() - began) / count)
    return counter.get_total_flops() / found[-1]


def seconds_of(job, device, speeds):
    """An estimate; None for tests and throughput."""
    if job.kind == "once":
        return None
    shape = DATASETS[job.dataset].image_shape
    if job.networks not in speeds:
        speeds[job.networks] = flops_a_second(job.networks, device, shape)
    words = job.command.replace(" --resume", "").split()

    def value_of(flag):
        place = words.index(flag)
        return words.pop(place + 1), words.pop(place)
    if job.kind == "teacher":
        images = int(value_of("--epochs")[0]) * costs.TRAINING_IMAGES[job.dataset]
        return images * costs.training_gflop(job.networks[0], shape) * 1e9 / speeds[job.networks]
    for flag in {"--out", "--teacher", "--precision"} & {*words}:
        value_of(flag)
    return costs.cost(" ".join([*words, "--teacher", job.networks[0]]))["pflop"] * 1e15 / speeds[job.networks]


def keep(job, folder):
    """Copy what is worth it to the folder that is carried away, while there is room."""
    kept = folder / "keep"
    weights = folder / "runs" / job.name / "student.pt"
    if job.kind == "run":
        for name in ("log.jsonl", "samples.png"):
            if (source := weights.with_name(name)).exists():
                shutil.copy(source, kept / f"{job.name}{source.suffix}")
    elif job.kind == "teacher":
        weights = Path(job.command.split()[-1])
    if not weights.exists():
        return
    content = read_classifier(weights)
    content["weights"] = {name: value.bfloat16() if value.is_floating_point() else value
                          for name, value in content["weights"].items()}
    to = kept / f"{job.name}.pt"
    write(content, to)
    if sum(file.stat().st_size for file in kept.iterdir()) > MOST_MB * 2 ** 20:
        to.unlink()
        print(f"{to.name} would not fit into {MOST_MB} MB and stays in {weights}", flush=True)


def go(job, folder, pack, left):
    """Run a job for `left` seconds at most.   -> whether it ended"""
    words = job.command.split()
    if pack and job.kind != "once" and job.dataset == "cifar10":
        words = ["benchmarks/pack_data.py", pack, "--run", *words]
    output = folder / f"{job.name}.out"
    with open(output, "a") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return False
    if code and job.name != "tests":
        (folder / f"{job.name}.failed").write_text(output.read_text()[-2000:])
        print(f"{job.name} failed: {output.read_text().splitlines()[-1:]}; see {output}", flush=True)
    elif job.kind == "once":
        shutil.copy(output, folder / "keep" / f"{job.name}.txt")
    return True


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=number_type(float, True), default=30, help="[30]")
    parser.add_argument("--folder", default="gpu", help="what is made lies there [gpu]")
    parser.add_argument("--pack", default="", help="a file of benchmarks/pack_data.py instead of data/")
    parser.add_argument("--list", action="store_true", help="say what is done, and stop")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at a tiny size, on digits")
    options = parser.parse_args(argv)
    if not options.rehearse and not options.list and not torch.cuda.is_available():
        raise BadInput("there is no CUDA device here; --rehearse tries the list on a CPU")
    if options.pack and not Path(options.pack).is_file():
        raise BadInput(f"there is no pack {options.pack}; make one with: python benchmarks/pack_data.py "
                       f"{options.pack}")
    device = torch.device("cpu" if options.rehearse else "cuda")
    folder, began = Path(options.folder), time.monotonic()
    listed = jobs(folder, options.rehearse)
    if options.list:
        print("\n".join(f"{done(job, folder) or 'to do':>8s}   {job.name}" for job in listed))
        return
    what = dict(rehearse=options.rehearse, pack=bool(options.pack))
    if (folder / "what.json").exists():
        require_same(json.loads((folder / "what.json").read_text()), what, folder,
                     "name another --folder, or move this one away")
    (folder / "keep").mkdir(parents=True, exist_ok=True)
    (folder / "what.json").write_text(json.dumps(what))
    print(f"{device_name(device)}, {options.minutes:g} minutes", flush=True)
    speeds, too_long = {}, []

    def left():
        return 60 * options.minutes - (time.monotonic() - began)

    def attempt(job, text):
        print(f"{job.name}: {text}", flush=True)
        if go(job, folder, options.pack, left()):
            keep(job, folder)
        else:
            print(f"{job.name}: the time is over; the same command goes on", flush=True)
    for job in listed:
        if done(job, folder) or left() < 1:
            continue
        if job.kind == "run" and any(other.kind == "teacher" and other.networks[0] == job.networks[0]
                                     and done(other, folder) != "done" for other in listed):
            continue                                           # its teacher is not there yet
        seconds = seconds_of(job, device, speeds)
        if seconds and seconds > left():
            too_long.append((job, seconds))
            print(f"{job.name}: {seconds / 60:.1f} minutes, more than is left; later", flush=True)
            continue
        attempt(job, "no estimate" if seconds is None else f"about {seconds / 60:.1f} minutes")
    for job, seconds in too_long:
        if left() > 1:
            attempt(job, f"{seconds / 60:.1f} minutes in all; begun, with what is left")
    print("\n".join(f"{done(job, folder) or 'to do':>8s}   {job.name}" for job in listed))


if __name__ == "__main__":
    main()
