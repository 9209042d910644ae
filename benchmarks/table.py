"""The result tables, made from the committed logs and nothing else.

    python benchmarks/table.py            # print the tables of benchmarks/TABLES.md
    python benchmarks/table.py --write    # put them into that page, and the short one into the front page
    python benchmarks/table.py --front    # print the front page's table

A file in results/ holds whole runs, one after another: a start row, rows of stages and epochs, an end row. A
row with a "variant" is a measurement by itself. What a run was is read in its start row; the name of its file
does not matter.

Runs share a row of a table if they differ in nothing but the seed. A row's flags are the settings in which
its runs differ from their preset *as it is now*. So if a preset changes, its older runs show the old numbers
as flags.
"""
import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

from scipy.stats import spearmanr      # it comes with scikit-learn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import foreign

RESULTS, PAGE, FRONT = ROOT / "benchmarks/results", ROOT / "benchmarks/TABLES.md", ROOT / "README.md"
MARKERS = re.compile(r"(<!-- ([^:>]+): python benchmarks/table.py[^>]*-->\n).*?(<!-- end -->)", re.S)
OF_ANY_RUN = {"dataset": None, "device": "cpu", "precision": "fp32"}   # results depend on these, too
# Settings that are younger than some logs, with what the code did before it had them.
YOUNG = dict(visits=1, mixup=False, keep_generator=False, teacher_statistics="running",
             optimizer="sgd", contrast=0.0, detail=1, warp=0.0,
             # no effect for teachers with BatchNorm or of grey images; `as_now` sees to the others
             statistics=10.0, statistics_from="auto")
# The rows of the race on MNIST that are repeated with the teachers of foreign.py
WITH_FOREIGN_TEACHERS = ("rdskd", "dafl", "plain-inversion", "cudfkd", "csd", "surrogate-leaves", "mskd",
                         "zskd")
WIDE = "plain-inversion-lenet5"     # one more row, with foreign teachers alone
# {row: the usual row}: rows whose students have their teacher's structure, as lenet5_half has LeNet-5's
OWN_KIND = {f"{row}-own-kind": row for row in ("plain-inversion", "rdskd", "surrogate-leaves")}
# The rows of the race on CIFAR-10 that are repeated with foreign teachers, and those that they alone have.
# DeepInversion needs BatchNorm, and DAFL ends close to RDSKD in the race.
WITH_COLOUR_TEACHERS = ("plain-inversion", "csd", "cudfkd", "rdskd", "surrogate-cifar100",
                        "surrogate-generator")
FOR_COLOUR_TEACHERS = ("plain-inversion-in-bf16", "plain-inversion-coarse", "plain-inversion-coarse-own-kind",
                       "plain-inversion-two-photographs", "plain-inversion-hundred-photographs",
                       "surrogate-thousand-photographs", "surrogate-cifar100-in-bf16")
# {method: {weight of a loss: its number in mnist-cpu}}: what the race mnist-weights varies, by these factors
WEIGHTS = {"rdskd": {"oh": 1, "ie": 1, "diversity-weight": 1},
           "mskd": {"oh": 1, "ie": 1, "diversity-weight": 1},
           "dafl": {"oh": 1, "ie": 5, "act": 0.1}}
FACTORS = 0.1, 10
# Settings that a script no longer has, with the value that it now takes always. Old logs have them.
GONE = {"csd": dict(mixup=False, keep_generator=False, visits=1, fresh_head_optimizer=False),
        "plain_inversion": dict(pixel=0.0, adversarial=0.0, csd=0.0, ce=0.0, kd=1.0, feature=0.0, lr_head=0.1,
                                raw_head=False, fresh_head_optimizer=False, teacher_last_map="",
                                student_last_map="", drawn=0),
        "rdskd": dict(detail=1, warp=0.0),      # these were tried for a day, and no commit has them
        "surrogate_kd": dict(deeper_radius=16.0)}


# ------------------------------------------------------------------------- logs, and what makes one row
def as_now(start):
    """A start row in today's names.

    Until commit b9db535, plain_inversion.py was a preset of csd.py, and a race's other readings of paper and
    code were called its ledger. A stage (CSD's bank) has no preset and no `out`.
    """
    if "stage" in start:
        return start
    arguments = dict(start["arguments"])
    out = arguments["out"].replace("-ledger/", "-readings/").replace("/csd-plain", "/plain-inversion")
    if "race-cifar10-group-norm/plain" in out and "statistics" not in arguments:
        arguments["statistics"] = 0.0                          # there was no such term yet
        start = {**start, "changed": {**start["changed"], "statistics": 0.0}}
    if (start["method"], arguments["preset"]) == ("csd", "cifar10-cpu-plain"):
        start, arguments["preset"] = {**start, "method": "plain_inversion"}, "cifar10-cpu"
    return {**start, "arguments": {**arguments, "out": out}}


def read(folder=RESULTS):
    """-> (runs of students, each the list of its rows; measurements)"""
    runs, measurements = [], []
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            if "variant" in row:
                measurements.append(row)
            elif row["event"] == "start":
                runs.append([as_now(row)])
            else:
                runs[-1].append(row)
    return [run for run in runs if "stage" not in run[0]], measurements


def typed(name, value):
    """A setting as it would be typed."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} " + (f"{value:.10g}" if isinstance(value, float) else str(value))


@functools.cache
def presets_of(method):
    """{preset: {setting: value}}, as they are now, with the preset's data set and without the seed."""
    return {name: {**GONE.get(method, {}), **dataclasses.asdict(preset.settings), "dataset": preset.dataset}
            for name, preset in importlib.import_module(method).PRESETS.items()}


class Group(NamedTuple):
    """What the runs in one row of a table have in common."""
    preset: str
    method: str
    changed: tuple              # ((setting, as it would be typed), ...): where the runs leave their preset
    networks: str
    older: bool                 # of c07d91b or before: random numbers were drawn in another order

    name = property(lambda self: f"{self.method}, {self.preset}")

    def flags(self, *in_other_columns):
        """The flags as one types them. ¹ marks a flag that the script no longer has."""
        changed = [(name, flag) for name, flag in self.changed if name not in in_other_columns]
        text = " ".join(flag for _, flag in changed)
        gone = any(name in GONE.get(self.method, {}) for name, _ in changed)
        return f"`{text}`" + " ¹" * gone if text else "-"


def group_of(start):
    method = start["method"]
    arguments = {**YOUNG, **GONE.get(method, {}), **start["arguments"]}
    usual = presets_of(method)[arguments["preset"]]
    changed = [(name, arguments[name]) for name in sorted({*usual} - {"seed", "dataset"})
               if arguments[name] != usual[name]]
    usual = {**OF_ANY_RUN, "dataset": usual["dataset"]}
    changed += [(name, arguments[name]) for name, value in usual.items() if arguments[name] != value]
    changed = tuple((name, typed(name, value)) for name, value in changed)
    networks = f"{arguments['teacher']} → {arguments['student']}"
    return Group(arguments["preset"], method, changed, networks, "changed" not in start)


def grouped(runs):
    """-> {Group: its runs in the order of their seeds}, without runs that trained no student"""
    groups = {}
    for run in sorted(runs, key=lambda run: run[0]["arguments"]["seed"]):
        if run[-1].get("student_acc_last") is not None:
            groups.setdefault(group_of(run[0]), []).append(run)
    return dict(sorted(groups.items()))


def of_now(groups):
    """The groups without older ones that the present code has repeated."""
    return {group: runs for group, runs in groups.items()
            if not group.older or group._replace(older=False) not in groups}


# ------------------------------------------------------------------------------------------------- cells
def spread(values, digits=2):
    """'96.11 ± 0.32' of fractions, in percent; the standard deviation is the sample's."""
    values = [100 * value for value in values]
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def of_end(runs, name="student_acc_last", digits=2):
    """The spread of a field of the end rows; - for a field that is younger than one of the runs."""
    values = [run[-1].get(name) for run in runs]
    return "-" if None in values else spread(values, digits)


def events(runs, event):
    return [row for run in runs for row in run if row["event"] == event]


def collapsed(runs):
    return f"{sum(bool(events([run], 'collapse')) for run in runs)} of {len(runs)}"


def teacher(runs):
    """One figure where all seeds have the same teacher (rounding moves 3 images in 10,000), else all."""
    found = [run[-1]["teacher_acc"] for run in runs]
    if max(found) - min(found) <= 3e-4:
        return f"{100 * mean(found):.2f}"
    return ", ".join(sorted({of_end([run], "teacher_acc") for run in runs}))


def seconds(runs):
    """Mean over the runs, of everything but a usual teacher's training. - where there is no run."""
    return f"{mean(run[-1]['seconds'] for run in runs):.0f}" if runs else "-"


def seconds_of(runs, phase, event=None):
    """Mean over the runs, of one phase; also of a stage that has a folder and a log of its own."""
    rows = [row for run in runs for row in run]
    total = sum(row.get(f"seconds_{phase}") or 0 for row in rows)
    total += sum(row["seconds"] for row in rows if row["event"] == event and "sha256" in row)
    return f"{total / len(runs):.0f}"


def origin(runs):
    """The last columns of a table of runs."""
    return {"seeds": ", ".join(str(run[0]["arguments"]["seed"]) for run in runs),
            "machine": "; ".join(sorted({run[0]["device"] for run in runs}))}


def table(rows):
    """Dicts with the same keys -> a table."""
    rows = list(rows)
    lines = [rows[0], ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)] if rows else []
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---------------------------------------------------------------------------------------------- races
def race_row(start):
    """-> which row of which race the run was made for, e.g. ("cifar10", "csd"), or None"""
    found = re.fullmatch(r".*\brace-([^/]+)/(.+)-seed\d+", start["arguments"]["out"])
    return found and found.groups()


def race_group(start):
    """A race counts steps, so its rows do not part by machine. bf16 and fp32 are rows apart, as elsewhere."""
    group = group_of(start)
    changed = (pair for pair in group.changed if pair[0] != "device" and pair[1] != "--precision tf32")
    return group._replace(changed=tuple(changed))


def of_earlier_preset(start):
    """Did this run's preset hold other numbers than it does now?"""
    return {name for name, _ in group_of(start).changed} - {*OF_ANY_RUN} != {*start["changed"]}


def on_two_cores(run):
    """Are this run's seconds a race's? Of several at a time, each had one thread or a share of a GPU."""
    return run[0]["device"].endswith(", 2 threads")


def race_tables(groups, measurements):
    """-> {title: rows}: the runs of benchmarks/race.py by data set, and the trials that chose their settings.

    The groups that are in these tables leave `groups`.
    """
    costs = {(row["method"], row["preset"], *sorted(typed(*flag) for flag in row["changed"].items())):
             row["pflop"] for row in measurements if row["variant"] == "cost"}
    races, trials, merged = {}, {}, {}
    for group in [group for group, runs in groups.items()
                  if (race_row(runs[0][0]) or [None])[0] in (*foreign.RACES, "mnist-weights")]:
        groups.pop(group)                                        # they have tables of their own
    for group in [group for group, runs in groups.items() if group.preset.split("-")[1:2] == ["cpu"]
                  or race_row(runs[0][0])]:                    # also a race's row with authors' numbers
        runs = groups.pop(group)
        merged.setdefault(race_group(runs[0][0]), []).extend(runs)
    for group, runs in merged.items():
        runs, start = sorted(runs, key=lambda run: run[0]["arguments"]["seed"]), runs[0][0]
        arguments, line = start["arguments"], {"method, preset": group.name, "flags": group.flags("dataset")}
        if arguments["dataset"].endswith("-val"):
            on_cpu = [run for run in runs if run[0]["arguments"]["device"] == "cpu"]
            trials.setdefault(f"trials on {arguments['dataset']}", []).append({
                **line, "teacher": Path(arguments["teacher"]).stem,
                "student": arguments["student"].rpartition(":")[2],
                "of the validation images": f"**{of_end(runs)}**",
                "epochs": len(events(runs[:1], "epoch")), "seconds of a CPU": seconds(on_cpu),
                **origin(runs)})
            continue
        flags = sorted(flag for name, flag in group.changed if name not in OF_ANY_RUN)
        pflop = costs.get((group.method, group.preset, *flags))
        score = mean(run[-1]["student_acc_last"] for run in runs)
        reading = "-readings/" in arguments["out"] or of_earlier_preset(start)
        title = f"race on {arguments['dataset']}" + ", other readings" * reading
        races.setdefault(title, []).append((-score, {
            **line, "teacher": teacher(runs), "**student, last epoch**": f"**{of_end(runs)}**",
            "best epoch, chosen on the test set": of_end(runs, "student_acc_best"),
            "agreement with the teacher": of_end(runs, "agreement"),
            "on drawn pictures": of_end(runs, "agreement_drawn"), "calibration error": of_end(runs, "ece"),
            "runs with a collapse": collapsed(runs),
            "teacher queries, million": f"{mean(run[-1]['teacher_queries'] for run in runs) / 1e6:.2f}",
            "TFLOP": "-" if pflop is None else f"{1000 * pflop:.0f}",
            "seconds of two cores": seconds([*filter(on_two_cores, runs)]), **origin(runs)}))
    found = {title: [line for _, line in sorted(lines, key=lambda pair: pair[0])]
             for title, lines in sorted(races.items())}
    return {**found, **trials}


def foreign_table(runs, own="mnist", ours="lenet5", races=foreign.GREY_RACES,
                  rows=(*WITH_FOREIGN_TEACHERS, WIDE, *OWN_KIND)):
    """The race `own` with our teacher and with foreign ones: a column for each, sorted by the worst.

    A row has a worst teacher only when it has been run with all foreign ones.
    """
    found = {}
    for run in runs:
        race, row = race_row(run[0]) or (None, None)
        if race in (own, *races) and run[-1].get("student_acc_last") is not None \
                and not of_earlier_preset(run[0]):
            found.setdefault((race, row), []).append(run)
    lines = []
    for row in rows:
        cells = {race: found.get((race, row)) for race in (own, *races)}
        if row in OWN_KIND and any(cells.values()):
            cells[own] = found.get((own, OWN_KIND[row]))
        there = [mean(run[-1]["student_acc_last"] for run in runs) for runs in cells.values() if runs]
        worst = min(there) if all(cells[race] for race in races) else None
        if there:
            lines.append((-(worst or 0), {
                "row": row, "worst teacher": f"**{100 * worst:.2f}**" if worst else "-",
                **{race.removeprefix(f"{own}-") if race != own else f"{ours}, ours":
                   f"{of_end(runs)} ({len(runs)})" if runs else "-" for race, runs in cells.items()}}))
    for _, line in sorted(lines, key=lambda pair: pair[0]):
        yield line
    best = {race: max((run[-1]["teacher_acc"] for (of, _), runs in found.items() if of == race
                       for run in runs), default=None) for race in (own, *races)}
    if lines:
        yield dict(zip(lines[0][1], ["the teacher itself", "", *(
            "-" if value is None else f"{100 * value:.2f}" for value in best.values())], strict=True))


def weight_row(method, weight, factor):
    """The name of a row of the race mnist-weights, such as rdskd-oh-x10."""
    return f"{method}-{weight}-x{factor}"


def weights_table(runs):
    """The race mnist-weights: the student's accuracy when a generator's loss weighs more or less."""
    found = {}
    for run in runs:
        race, row = race_row(run[0]) or (None, None)
        if race == "mnist-weights" and run[-1].get("student_acc_last") is not None:
            found.setdefault(row, []).append(run)
    for method, weights in WEIGHTS.items():
        rows = {f"{'third' if number == 2 else weight} x {factor}": weight_row(method, weight, factor)
                for number, weight in enumerate(weights) for factor in FACTORS}
        there = [found[row] for row in (method, *rows.values()) if row in found]
        scores = [mean(run[-1]["student_acc_last"] for run in of_row) for of_row in there]
        if there:
            complete = len(there) == 1 + len(rows)
            yield {"method": method,
                   "the preset's weights": of_end(found[method]) if method in found else "-",
                   **{title: of_end(found[row]) if row in found else "-" for title, row in rows.items()},
                   "worst": f"{100 * min(scores):.2f}" if complete else "-",
                   "deviation of the seven": f"{100 * stdev(scores):.2f}" if complete else "-",
                   "seeds": ", ".join(str(run[0]["arguments"]["seed"]) for run in there[0])}


def drawn_students(runs, measurements):
    """-> {(data set, teacher): {run: (it learned from drawn pictures?, accuracy, agreement)}}"""
    names = {run[0]["teacher_sha256"]: Path(run[0]["arguments"]["teacher"].rpartition(":")[2]).stem
             for run in runs if "teacher_sha256" in run[0]}
    teachers = {}

    def add(row, arguments, accuracy, agreement):
        computed = arguments.get("drawn", 0) > 0 or (
            arguments.get("surrogate") in importlib.import_module("surrogate_kd").GENERATORS)
        digest = row["teacher_sha256"]
        name = names.get(digest, "").rpartition("-val_")[2]                  # mnist-val_mixer: mixer
        teachers.setdefault((arguments["dataset"], f"{name} ({digest[:6]})"), {})[arguments["out"]] = (
            computed, accuracy, agreement)
    for row in measurements:
        if row["variant"] == "epochs" and not row.get("pictures"):       # those have a table of their own
            arguments = {**presets_of(row["method"]).get(row["preset"], {}), **row["changed"],
                         "dataset": row["dataset"], "out": row["out"]}
            add(row, arguments, row["student_acc"][-1], row["measures"]["agreement-leaves"][-1])
    for start, *_, end in (run for run in runs if len(run) > 1):
        if end.get("agreement_drawn") is not None and end.get("student_acc_last") is not None:
            add(start, start["arguments"], end["student_acc_last"], end["agreement_drawn"])
    return teachers


def drawn_table(runs, measurements):
    """How well the agreement on drawn pictures tells which of two students of one teacher is better."""
    for (dataset, name), students in drawn_students(runs, measurements).items():
        for title, kept in (("all students", [*students.values()]),
                            ("not of drawn pictures", [one for one in students.values() if not one[0]])):
            pairs = [(one[1] - other[1], one[2] - other[2]) for one, other in itertools.combinations(kept, 2)]
            far = [pair for pair in pairs if abs(pair[0]) >= 0.05]
            if len(kept) < 3 or len(kept) == len(students) and title != "all students":
                continue
            yield {"data set": dataset, "teacher": name, "of": title, "students": len(kept),
                   "rank correlation": f"{spearmanr([one[1:] for one in kept])[0]:.2f}",
                   "pairs": len(pairs), "the better one found": share_right(pairs),
                   "pairs five points apart": len(far), "found there": share_right(far)}


def photographs_table(measurements):
    """How often four scores without data name the better of two students, on drawn pictures and photographs.

    The students are those of all epochs, by benchmarks/epochs.py. Pairs are of two different runs, and five
    points of accuracy apart; the last two columns have those of one to five points. Runs of which two scores
    are not known have a line of their own. The last lines add up the teachers for which all four are known;
    one of them has only students that did not learn from a folder of photographs.
    """
    scores = {f"{name} {of}": f"{rule}-{pictures}" for of, pictures in (("drawn pictures", "leaves"),
                                                                      ("photographs", "pictures"))
              for name, rule in (("agreement on", "agreement"), ("balanced, on", "balanced"))}
    teachers, whole = {}, {}
    for row in measurements:
        if row["variant"] == "epochs" and row.get("pictures"):
            name = Path(row["teacher"].rpartition(":")[2]).stem.rpartition("val_")[2]
            known = all(rule in row["measures"] for rule in scores.values())
            teachers.setdefault((row["dataset"], name, known), {})[row["out"]] = row

    def line(dataset, teacher, runs, students, pairs):
        """`pairs`: {score: (difference of accuracy, difference of the score) of each pair}"""
        first = next(iter(pairs.values()))
        near, drawn = [0.01 <= abs(acc) < 0.05 for acc, _ in first], pairs["balanced, on drawn pictures"]
        return {"data set": dataset, "teacher": teacher, "runs": runs, "students": students,
                "pairs": sum(abs(acc) >= 0.05 for acc, _ in first),
                **{title: share_right([pair for pair in of if abs(pair[0]) >= 0.05])
                   for title, of in pairs.items()},
                "closer pairs": sum(near),
                "balanced, drawn, there": share_right(list(itertools.compress(drawn, near)))}

    def counted(runs):
        """-> how many runs, how many students, {score: the pairs}"""
        pairs = {}
        for title, rule in scores.items():
            students = [[*zip(row["student_acc"], row["measures"].get(rule, ()))] for row in runs]
            pairs[title] = [(one[0] - other[0], one[1] - other[1]) for first, second in
                            itertools.combinations(students, 2) for one in first for other in second]
        return len(runs), sum(len(row["student_acc"]) for row in runs), pairs
    for (dataset, teacher, known), runs in sorted(teachers.items()):
        runs = [*runs.values()]
        yield line(dataset, teacher, *counted(runs))
        kind = "in colour" if foreign.DATASETS[dataset].image_shape[0] == 3 else "grey"
        others = [row for row in runs if not row["changed"].get("surrogate", "").startswith("folder:")]
        for name, part in ((kind, runs), (f"{kind}, not of photographs", others)):
            if known and (name == kind or kind == "in colour"):
                *count, pairs = counted(part)
                counts, added = whole.setdefault(name, ([], {}))
                counts.append(count)
                for title, of in pairs.items():
                    added.setdefault(title, []).extend(of)
    for kind, (counts, pairs) in sorted(whole.items()):
        yield line(f"all, {kind}", "", *map(sum, zip(*counts)), pairs)


def share_right(pairs):
    """Of pairs (difference of accuracy, difference of agreement), how many have the same sign, in percent.

    Pairs of equally accurate students do not count.
    """
    right = [acc * drawn > 0 for acc, drawn in pairs if acc]
    return f"{100 * mean(right):.0f} %" if right else "-"


def rounded(number):
    """Two digits, but no exponent: 0.52, 7.5, 110."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}" if number >= 0.01 else "under 0.01"


# The front page's rows: the file, the flag that tells its rows apart, the paper, what it needs, the row of
# the race on CIFAR-10, and the row with more steps.
ON_FRONT = (
    ("regulated_kd", " `--mode kd`", "plain distillation, for comparison", "all training images",
     "real-kd", ""),
    ("regulated_kd", "", "Self-Regulated Learning, 2021", "all training images and labels",
     "real-regulated", ""),
    ("surrogate_kd", "", "What Makes a Good Dataset for KD?, CVPR 2025", "photographs of other things",
     "surrogate-cifar100", "surrogate-cifar100-bf16"),
    ("plain_inversion", "", "ours", "a teacher, best with BatchNorm", "plain-inversion",
     "plain-inversion-2h-bf16"),
    ("csd", "", "Customizing Synthetic Data, ICME 2023", "a teacher, best with BatchNorm", "csd", ""),
    ("cudfkd", "", "Easy-to-Hard, Inf. Sci. 2023", "a teacher, best with BatchNorm", "cudfkd", "cudfkd-2h"),
    ("surrogate_kd", "", "the same, on pictures that a program draws", "only the teacher's answers",
     "surrogate-generator", ""),
    ("deepinversion", "", "Dreaming to Distill, CVPR 2020", "a teacher with BatchNorm", "deepinversion", ""),
    ("rdskd", "", "Robustness and Diversity, ICASSP 2021", "a teacher", "rdskd", ""),
    ("dafl", "", "Data-Free Learning of Student Networks, ICCV 2019", "a teacher with a linear layer", "dafl",
     ""),
)


def front_table(runs):
    """The race on CIFAR-10 for the front page: one result a cell, with one digit after the point."""
    found = {}
    for run in runs:
        if race_row(run[0]) and not of_earlier_preset(run[0]):
            found.setdefault(race_row(run[0]), []).append(run)
    for method, flag, paper, needs, row, longer in ON_FRONT:
        yield {"file": f"[`{method}.py`]({method}.py){flag}", "paper": paper, "what it needs from you": needs,
               "student, %": of_end(found["cifar10", row], digits=1),
               "more steps": of_end(found["cifar10", longer], digits=1) if longer else ""}


# --------------------------------------------------------------------------------------- other tables of runs
def main_table(groups):
    for group, runs in groups.items():
        if group.method in ("regulated_kd", "surrogate_kd"):                # these two use images
            continue
        last = [events([run], "epoch")[-1] for run in runs]
        labels = [row["target_acc"] for row in last if "target_acc" in row]
        yield {"method, preset": group.name, "flags": group.flags(),
               "teacher → student": group.networks, "teacher": teacher(runs),
               "**student, last epoch**": f"**{of_end(runs)}**",
               "best epoch, chosen on the test set": of_end(runs, "student_acc_best"),
               "agreement with the teacher": of_end(runs, "agreement"),
               "on drawn pictures": of_end(runs, "agreement_drawn"),
               "calibration error": of_end(runs, "ece"),
               "labels the teacher agrees with": spread(labels) if labels else "-",
               "runs with a collapse": collapsed(runs),
               "seconds": seconds(runs), **origin(runs)}


def regulation_table(groups):
    """What was used of the data, and the seconds of student and teacher apart."""
    order = ["ce", "kd", "significance", "regulated", "hybrid"]
    lines = []
    for group, runs in groups.items():
        if group.method == "regulated_kd":
            settings = runs[0][0]["arguments"]
            lines.append((group.preset, order.index(settings["mode"]), settings["queue"], group))
    for *_, group in sorted(lines):
        runs, settings = groups[group], groups[group][0][0]["arguments"]
        mode = settings["mode"]
        last = [events([run], "epoch")[-1] for run in runs]
        images = [round(row["sample_uses"] / row["data_fraction"] / (row["epoch"] + 1)) for row in last]
        trained = "usual" if settings["plain_teacher"] else "self-regulated"
        used = "queued" if settings["queue"] else "at each visit"
        cost = seconds_of(runs, "training", "significance")
        usual = sum(row.get("teacher_seconds") or 0 for run in runs for row in run) / len(runs)
        yield {"method, preset": group.name, "mode": mode, "teacher → student": group.networks,
               "teacher's training": "-" if mode == "ce" else trained,
               "chosen images are used": used if mode in ("regulated", "hybrid") else "-",
               "other flags": group.flags("mode", "plain_teacher", "queue"),
               "teacher": "-" if mode == "ce" else teacher(runs),
               "**student, last epoch**": f"**{of_end(runs)}**",
               "steps on % of images x epochs": spread([row["data_fraction"] for row in last]),
               "never used, %": spread([row["never_used"] / count for row, count in zip(last, images)]),
               "student's seconds": seconds_of(runs, "distillation"),
               "teacher's seconds": cost if cost != "0" else f"{usual:.0f}", **origin(runs)}


def surrogate_table(groups):
    """evenness_... was called relative_entropy_... in logs of b9db535 and before."""
    def cell(runs, name, *more):
        names = [f"{stem}{name}" for stem in ("evenness", "relative_entropy")]
        found = [row[each] for event in ("surrogate", *more) for row in events(runs, event) for each in names
                 if each in row]
        return f"{mean(found):.3f}"
    for group, runs in groups.items():
        if group.method == "surrogate_kd":
            settings = runs[0][0]["arguments"]
            yield {"method, preset": group.name, "pictures": settings["surrogate"],
                   "balanced": "yes" if settings["balance"] else "no",
                   "boundary attack": "yes" if settings["boundary_attack"] else "no",
                   "other flags": group.flags("surrogate", "balance", "boundary_attack"),
                   "teacher → student": group.networks, "teacher": teacher(runs),
                   "evenness of all pictures": cell(runs, "_before", "pool"), "of those kept": cell(runs, ""),
                   "as training shows them": cell(runs, "_augmented"),
                   "**student, last epoch**": f"**{of_end(runs)}**",
                   "seconds": seconds(runs), **origin(runs)}


# ----------------------------------------------------------------------------------------- measurements
def repeats(values, digits):
    """The median, with the smallest and the largest value in brackets where they differ."""
    low, middle, high = (f"{f(values):.{digits}f}" for f in (min, median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def throughput_table(measurements):
    found = {}
    for row in measurements:
        if row["variant"].startswith(("authors", "here", "without ")):
            for phase in ("synthesis", "distillation"):
                if phase in row:
                    key = (row[name] for name in ("method", "batch_size", "variant", "precision", "device"))
                    found.setdefault((phase, *key), []).append((row[phase], row["ceiling_gflops"]))
    heads = "images of a step", "order of work", "precision", "machine"
    for (name, method, *key), rows in found.items():
        phases = [phase for phase, _ in rows]
        yield {"steps of": f"{method}, {name}", **dict(zip(heads, key)),
               "seconds a step": repeats([phase[name] for phase in phases
                                          for name in ("least", "seconds", "most")], 2),
               "of the authors' time": repeats([phase["of_authors"] for phase in phases], 2),
               "of the ceiling": repeats([phase["fraction"] for phase in phases], 2),
               "GFLOP done": f"{phases[0]['gflop_done']:.1f}", "GFLOP needed": f"{phases[0]['gflop']:.1f}",
               "ceiling, GFLOP/s": repeats([ceiling for _, ceiling in rows], 0), "repeats": len(rows)}


def pictures_table(measurements):
    found = {}
    for row in measurements:
        if row["variant"] == "generation":
            key = row["generator"], row["size"], row["device"]
            found.setdefault(key, []).append(row["images_per_second"])
    for (generator, size, device), rates in found.items():
        yield {"pictures": generator, "size": size, "pictures a second": repeats(rates, 0),
               "repeats": len(rates), "machine": device}


def epochs_table(measurements):
    """What the rules of benchmarks/epochs.py were worth, in points of test accuracy."""
    found = {}
    for row in measurements:
        if row["variant"] == "epochs" and not row.get("pictures"):
            for rule, epoch in row["chosen"].items():
                runs = found.setdefault((row["dataset"], rule), {})
                runs[row["method"], row["out"]] = row["student_acc"], epoch          # of a run the last row
    for (dataset, rule), runs in found.items():
        runs = [*runs.values()]
        gains = [scores[epoch] - scores[-1] for scores, epoch in runs]
        signs = [(gain > 0) - (gain < 0) for gain in gains]
        yield {"data set": dataset, "rule": rule, "runs": len(runs),
               "points over the last epoch": spread(gains),
               "runs better, same, worse": ", ".join(str(signs.count(sign)) for sign in (1, 0, -1)),
               "points under the best epoch": spread([max(scores) - scores[epoch] for scores, epoch in runs])}


def architectures_table(measurements):
    """How many of torchvision's networks work as teacher and as student of each method, and which do not."""
    found = {}
    for row in measurements:
        if row["variant"] == "architecture":
            for method, said in row["methods"].items():
                found.setdefault((method, row["role"]), {})[row["network"]] = said
    for method in sorted({method for method, _ in found}):
        line = {"method": method}
        for role in ("teacher", "student"):
            said = found[method, role]
            refused = sorted(network for network, text in said.items() if text != "works")
            line[f"as {role}"] = f"{len(said) - len(refused)} of {len(said)}"
            line[f"not as {role}"] = ", ".join(refused)
        yield line


# TFLOP/s of matrix products in bf16 with sums in fp32, without sparsity, by NVIDIA's data sheets
CARDS = {"RTX 3060": 25.5, "RTX 4090": 165, "A100": 312, "H100": 989}


def costs_table(measurements):
    """What a preset costs on paper: hours on cards that reach a fifth of what their data sheets promise."""
    for row in measurements:
        if row["variant"] == "cost" and not row["changed"]:
            hours = {card: row["pflop"] * 1000 / (peak / 5) / 3600 for card, peak in CARDS.items()}
            yield {"method, preset": f"{row['method']}, {row['preset']}",
                   "teacher → student": row["networks"],
                   "PFLOP": f"{row['pflop']:.0f}" if row["pflop"] >= 100 else f"{row['pflop']:.3g}",
                   "teacher queries, million": f"{row['queries'] / 1e6:.2f}",
                   "memory of a step in fp32, GB": f"{row['memory_gb']:.1f}",
                   **{f"hours, {card}": rounded(value) for card, value in hours.items()}}


# ------------------------------------------------------------------------------------------------- pages
def all_tables(runs, measurements):
    """-> {title: the text of the table}"""
    groups = of_now(grouped(runs))
    tables = {**race_tables(groups, measurements),
              "data-free methods on digits": main_table(groups),
              "regulated_kd": regulation_table(groups),
              "surrogate_kd": surrogate_table(groups),
              "throughput": throughput_table(measurements),
              "pictures a second": pictures_table(measurements),
              "foreign teachers": foreign_table(runs),
              "foreign teachers in colour": foreign_table(
                  runs, "cifar10", "wrn16_2", foreign.COLOUR_RACES,
                  (*WITH_COLOUR_TEACHERS, *FOR_COLOUR_TEACHERS)),
              "weights": weights_table(runs),
              "drawn pictures": drawn_table(runs, measurements),
              "photographs": photographs_table(measurements),
              "choosing an epoch": epochs_table(measurements),
              "architectures": architectures_table(measurements),
              "costs": costs_table(measurements)}
    return {title: table(rows) for title, rows in tables.items()}


def filled(page, tables):
    """The page with each table in its place: after `<!-- TITLE: python benchmarks/table.py -->`."""
    return MARKERS.sub(lambda found: found[1] + tables[found[2]] + found[3], page)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into both pages")
    parser.add_argument("--front", action="store_true", help="print the front page's table instead")
    options = parser.parse_args(argv)
    runs, measurements = read()
    front, tables = {"front": table(front_table(runs))}, all_tables(runs, measurements)
    if options.write:
        for page, texts in ((FRONT, front), (PAGE, tables)):
            page.write_text(filled(page.read_text(), texts))
    elif options.front:
        print(front["front"], end="")
    else:
        print("\n".join(f"{title}\n\n{text}" for title, text in tables.items()), end="")


if __name__ == "__main__":
    main()
