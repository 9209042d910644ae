"""All runs of a comparison, one after another: one teacher, one budget, several seeds.

    python benchmarks/race.py cifar10                    # seed 0 of every row first, then the other seeds
    python benchmarks/race.py cifar10 --only csd cudfkd  # some rows
    python benchmarks/race.py cifar10 --list             # what is finished, begun or to do, and its command
    python benchmarks/race.py cifar10 --jobs 14          # 14 runs at a time, a thread each; not timed

A run that stands in the logs of results/ is skipped, unless its preset has become another since. Then move
runs/race-NAME/ROW-seedN and its folder in checkpoints/race-NAME/ away first. --list prints the command of
each row, with which one repeats it by itself. A run that was killed goes on from its last epoch when the same
command is typed again. A run that ends is added to results/race-NAME.jsonl, after the logs of what was made
for it. Commit that file; `python benchmarks/table.py --write` puts it into the tables. The rows are the table
RACES below. A row whose flags change gets another name. The protocol is in benchmarks/README.md.
"""
import contextlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import foreign
import table
from common import BadInput
from running import Parser, command_line, number_type

ROOT = Path(__file__).resolve().parent.parent
OWN = {"cifar10": ("cifar10-val", "wrn16_2"), "mnist": ("mnist-val", "lenet5")}   # set, network
TEACHERS = {**OWN, **{f"{name}-readings": teacher for name, teacher in OWN.items()},
            "mnist-weights": OWN["mnist"], **foreign.RACES}
READINGS = {    # {row: flags}: other readings of paper and code, beside the rows of a race
    "csd-raw-head": "--raw-head",
    "csd-without": "--csd 0",
    "csd-adversarial": "--csd 0 --adversarial 1",
    "cudfkd-batch": "--granularity batch",
    "cudfkd-no-curriculum": "--curriculum none",
    "cudfkd-no-ramp": "--no-ramp",
    "dafl-natural-log": "--natural-log",
    "dafl-sum-activation": "--sum-activation",
    "dafl-separate-batches": "--separate-batches",
    "rdskd-previous": "--reference previous",
}
RACES = {   # {race: {row: command}}; --teacher, --seed and --out are added
    "cifar10": {
        "csd": "csd.py --preset cifar10-cpu",
        "plain-inversion": "plain_inversion.py --preset cifar10-cpu",
        "cudfkd": "cudfkd.py --preset cifar10-cpu",
        "deepinversion": "deepinversion.py --preset cifar10-cpu",
        "dafl": "dafl.py --preset cifar10-cpu",
        "rdskd": "rdskd.py --preset cifar10-cpu",
        "surrogate-cifar100":
            "surrogate_kd.py --preset cifar10-cpu-real --surrogate folder:data/cifar100-jpeg",
        "surrogate-generator": "surrogate_kd.py --preset cifar10-cpu",
        "surrogate-noise": "surrogate_kd.py --preset cifar10-cpu --surrogate noise",
        "real-kd": "regulated_kd.py --preset cifar10-cpu --plain-teacher --mode kd",
        "real-regulated": "regulated_kd.py --preset cifar10-cpu --plain-teacher --mode regulated",
        "real-labels": "regulated_kd.py --preset cifar10-cpu --plain-teacher --mode ce",
        "plain-inversion-2h":
            "plain_inversion.py --preset cifar10-cpu --bank-rounds 300 --epochs 30 --precision bf16",
        "cudfkd-2h": "cudfkd.py --preset cifar10-cpu --epochs 51",
        "plain-inversion-bf16":
            "plain_inversion.py --preset cifar10-cpu --bank-rounds 200 --epochs 20 --precision bf16",
        "plain-inversion-2h-bf16":
            "plain_inversion.py --preset cifar10-cpu --bank-rounds 600 --epochs 60 --precision bf16",
        "surrogate-cifar100-bf16": "surrogate_kd.py --preset cifar10-cpu-real --epochs 36 --precision bf16 "
                                   "--surrogate folder:data/cifar100-jpeg",
    },
    "mnist": {
        "csd": "csd.py --preset mnist-cpu",
        "plain-inversion": "plain_inversion.py --preset mnist-cpu",
        "cudfkd": "cudfkd.py --preset mnist-cpu",
        "dafl": "dafl.py --preset mnist-cpu",
        "rdskd": "rdskd.py --preset mnist-cpu",
        "mskd": "rdskd.py --preset mnist-cpu --diversity ms --penalty fixed",
        "zskd": "benchmarks/zskd.py --preset mnist-cpu",
        "surrogate-leaves": "surrogate_kd.py --preset mnist-cpu",
        "surrogate-noise": "surrogate_kd.py --preset mnist-cpu --surrogate noise",
        "real-kd": "regulated_kd.py --preset mnist-cpu --plain-teacher --mode kd",
        "real-labels": "regulated_kd.py --preset mnist-cpu --plain-teacher --mode ce",
        "cudfkd-1h": "cudfkd.py --preset mnist-cpu --epochs 75",
        "rdskd-1h": "rdskd.py --preset mnist-cpu --epochs 180",
        "dafl-1h": "dafl.py --preset mnist-cpu --epochs 200 --batch-size 256",
        "dafl-24000": "dafl.py --preset mnist-cpu --epochs 200",
        "dafl-authors": "dafl.py --preset mnist",
        "dafl-authors-32": "dafl.py --preset mnist --generator-width 32 --precision bf16",
    },
    **{f"{name}-readings": {row: f"{row.partition('-')[0]}.py --preset {name}-cpu {flags}"
                            for row, flags in READINGS.items()} for name in ("cifar10", "mnist")},
}
RACES["cifar10-readings"].update({
    "deepinversion-adi": "deepinversion.py --preset cifar10-cpu --initial-batches 9 --pool-batches 20",
    "rdskd-mskd": "rdskd.py --preset cifar10-cpu --diversity ms --penalty fixed",
    "surrogate-noise-batch":
        "surrogate_kd.py --preset cifar10-cpu --surrogate noise --teacher-statistics batch",
    "surrogate-generator-batch": "surrogate_kd.py --preset cifar10-cpu --teacher-statistics batch",
})
RACES.update({name: {**{row: RACES["mnist"][row] for row in table.WITH_FOREIGN_TEACHERS},
                     table.WIDE: "plain_inversion.py --preset mnist-cpu --student lenet5",
                     **{row: f"{RACES['mnist'][usual]} --student {foreign.OWN_KIND[name]}"
                        for row, usual in table.OWN_KIND.items()}}
              for name in foreign.GREY_RACES})
IN_BF16 = "plain_inversion.py --preset cifar10-cpu --precision bf16"
COARSE_IN_BF16 = f"{IN_BF16} --statistics 0 --detail 2 --warp 1 --contrast 1"
PHOTOGRAPHS = "folder:data/cifar100-jpeg"
ON_PHOTOGRAPHS = f"surrogate_kd.py --preset cifar10-cpu-real --precision bf16 --surrogate {PHOTOGRAPHS}"
RACES.update({name: {**{row: RACES["cifar10"][row] for row in table.WITH_COLOUR_TEACHERS},
                     **dict(zip(table.FOR_COLOUR_TEACHERS, (
                         f"{IN_BF16} --statistics 0", COARSE_IN_BF16,
                         f"{COARSE_IN_BF16} --student {foreign.OWN_KIND[name]}",
                         IN_BF16, f"{IN_BF16} --statistics-from {PHOTOGRAPHS}",
                         f"{ON_PHOTOGRAPHS} --pool-images 1000 --epochs 880 --eval-every 88", ON_PHOTOGRAPHS),
                         strict=True))}
              for name in foreign.COLOUR_RACES})
# Each weight of the generator's losses times 0.1 and 10, in a fifth of the race's steps
SHORT = {
    "rdskd": "rdskd.py --preset mnist-cpu --epochs 12",
    "mskd": "rdskd.py --preset mnist-cpu --diversity ms --penalty fixed --epochs 12",
    "dafl": "dafl.py --preset mnist-cpu --epochs 20",
}
RACES["mnist-weights"] = {
    **SHORT,
    **{table.weight_row(row, weight, factor): f"{SHORT[row]} --{weight} {factor * value:g}"
       for row, weights in table.WEIGHTS.items() for weight, value in weights.items()
       for factor in table.FACTORS},
}
STAGES = {"csd": "bank", "plain_inversion": "bank", "deepinversion": "pool", "rdskd": "generator",
          "surrogate_kd": "pool", "regulated_kd": "significance", "zskd": "pool"}


def own_stage(script, folder):
    """Flags that keep what a run makes first in a folder of its own, apart from runs with other settings."""
    return [f"--{STAGES[script]}", str(folder)] if script in STAGES else []


def log_of(folder):
    """The text of the log in a run folder or a stage's folder, empty if there is none."""
    path = ROOT / folder / "log.jsonl"
    return path.read_text() if path.exists() else ""


def rows_of(folder):
    return [json.loads(line) for line in log_of(folder).splitlines()]


def counts(run):
    """Has this run ended, and is its preset still what it was?"""
    return bool(run) and run[-1]["event"] == "end" and not table.of_earlier_preset(run[0])


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("race", choices=[*RACES])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="some rows [all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--jobs", type=number_type(int, True), default=1, help="runs at a time [1]")
    parser.add_argument("--list", action="store_true", help="say what is done and by which command, and stop")
    options = parser.parse_args(argv)
    commands, failed = RACES[options.race], []
    for row in options.only or []:
        if row not in commands:
            raise BadInput(f"{options.race} has no row '{row}'; choose from {', '.join(commands)}")
    dataset, network = TEACHERS[options.race]
    teacher = f"benchmarks/teachers/{dataset}_{network.rpartition(':')[2]}.pt"
    if ":" in network and not dataset.endswith("-val"):       # it comes with its weights
        teacher = f"{network} --dataset {dataset}"
    elif not options.list and not (ROOT / teacher).exists():
        raise BadInput(f"the race's teacher is not there; train it with: python common.py --model {network} "
                       f"--dataset {dataset} --out {teacher}")
    logged = {run[0]["arguments"]["out"] for run in table.read()[0] if table.race_row(run[0]) and counts(run)}
    todo, threads = [], "2" if options.jobs == 1 else "1"
    for seed in options.seeds:
        for row in options.only or commands:
            name = f"race-{options.race}/{row}-seed{seed}"
            out, (script, *flags) = f"runs/{name}", commands[row].split()
            state = "finished" if out in logged else "begun" if rows_of(out) else "to do"
            flags += ["--teacher", *teacher.split(), "--seed", str(seed), "--threads", threads]
            print(f"{row:>31s}  seed {seed}  {state:8s}  python {script} {' '.join(flags)}", flush=True)
            if not options.list and out not in logged:
                flags += own_stage(Path(script).stem, f"checkpoints/{name}")
                todo.append((out, [script, *flags, "--keep-epochs", "--out", out, "--resume"]))

    def go(job):
        """-> is there a finished run now?"""
        out, command = job
        if counts(rows_of(out)):                                             # it ended, but was not logged
            return True
        (ROOT / out).parent.mkdir(parents=True, exist_ok=True)
        # of several at a time, each writes to a file of its own
        with open(ROOT / f"{out}.txt", "a") if options.jobs > 1 else contextlib.nullcontext() as screen:
            done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=screen, stderr=screen)
        return not done.returncode
    with ThreadPoolExecutor(options.jobs) as pool:
        for (out, _), ended in zip(todo, pool.map(go, todo)):
            if not ended:
                failed.append(out)
                continue
            stages = [row["path"] for row in rows_of(out) if "sha256" in row]
            with open(table.RESULTS / f"race-{options.race}.jsonl", "a") as file:
                file.write("".join(map(log_of, [*stages, out])))
    if failed:
        raise BadInput(f"{', '.join(failed)} did not end; see above"
                       + f", and {failed[0]}.txt" * (options.jobs > 1))


if __name__ == "__main__":
    main()
