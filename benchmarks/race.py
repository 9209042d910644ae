"""All runs of a comparison, one after another: one teacher, one budget, several seeds.

    python benchmarks/race.py cifar10                    # seed 0 of every row first, then the other seeds
    python benchmarks/race.py cifar10 --only csd cudfkd  # some rows
    python benchmarks/race.py cifar10 --list             # what is finished, begun, still to do

A run that stands in the logs of results/ is skipped. One that was killed goes on from its last epoch:
call the same command again. A run that ends is added to results/METHOD-race-NAME.jsonl; that file is to
be committed, and `python benchmarks/table.py --write` puts it into the tables. The rows and their
commands are the table RACES below; the protocol is in benchmarks/README.md.
"""
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import table
from common import BadInput, Parser, command_line

ROOT = Path(__file__).resolve().parent.parent
CIFAR10 = "--teacher benchmarks/teachers/cifar10-val_wrn16_2.pt --preset cifar10-cpu"
REAL = f"regulated_kd.py {CIFAR10} --plain-teacher"
PICTURES = f"surrogate_kd.py {CIFAR10}"
RACES = {   # {race: {row: command}}; --seed and --out are added
    "cifar10": {
        "csd": f"csd.py {CIFAR10}",
        "cudfkd": f"cudfkd.py {CIFAR10}",
        "deepinversion": f"deepinversion.py {CIFAR10}",
        "dafl": f"dafl.py {CIFAR10}",
        "rdskd": f"rdskd.py {CIFAR10}",
        "surrogate-cifar100": f"{PICTURES}-real --surrogate folder:data/cifar100-jpeg",       # as JPEG files
        "surrogate-leaves": f"{PICTURES} --surrogate leaves",
        "surrogate-noise": f"{PICTURES} --surrogate noise",
        "real-kd": f"{REAL} --mode kd",
        "real-regulated": f"{REAL} --mode regulated",
        "real-labels": f"{REAL} --mode ce",
    },
    "mnist": {
        "dafl": "dafl.py --preset mnist-cpu",
        "rdskd": "rdskd.py --preset mnist-cpu",
        "mskd": "rdskd.py --preset mnist-cpu --diversity ms --penalty fixed",
        "cudfkd": "cudfkd.py --preset mnist",
        "csd": "csd.py --preset mnist-cpu",
        "zskd": "benchmarks/zskd.py --preset mnist-cpu",
        "surrogate-leaves": "surrogate_kd.py --preset mnist --teacher lenet5 --student lenet5_half",
    },
}


def rows_of(folder):
    """The rows of a run's log, none if there is no log."""
    path = ROOT / folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(rows):
    return bool(rows) and rows[-1]["event"] == "end"


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("race", choices=[*RACES])
    parser.add_argument("--only", nargs="+", metavar="ROW", help="some rows [all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    parser.add_argument("--list", action="store_true", help="say what is done, and stop")
    options = parser.parse_args(argv)
    commands = RACES[options.race]
    for row in options.only or []:
        if row not in commands:
            raise BadInput(f"{options.race} has no row '{row}'; choose from {', '.join(commands)}")
    logged = {run[0]["arguments"]["out"] for run in table.read()[0] if ended(run)}
    for seed in options.seeds:
        for row in options.only or commands:
            out = f"runs/race-{options.race}/{row}-seed{seed}"
            script, *flags = commands[row].split()
            state = "finished" if out in logged else "begun" if rows_of(out) else "to do"
            print(f"{row:>20s}  seed {seed}  {state}", flush=True)
            if options.list or out in logged:
                continue
            if not ended(rows_of(out)):
                command = [sys.executable, script, *flags, "--seed", str(seed), "--out", out, "--resume"]
                if subprocess.run(command, cwd=ROOT).returncode:
                    raise BadInput(f"{' '.join(command[1:])} did not end; see above")
            log = table.RESULTS / f"{Path(script).stem}-race-{options.race}.jsonl"
            with open(log, "a") as file:
                file.write((ROOT / out / "log.jsonl").read_text())


if __name__ == "__main__":
    main()
