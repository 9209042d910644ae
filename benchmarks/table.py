"""The result tables, made from the committed logs and nothing else.

    python benchmarks/table.py            # print the tables of benchmarks/README.md
    python benchmarks/table.py --write    # put them into that page, between its markers
    python benchmarks/table.py --front    # print the front page's: the race on CIFAR-10 in fewer columns

A file in results/ holds whole runs, one after another: a start row, rows of epochs and stages, an end row.
A row with a "variant" is a measurement by itself. Runs share a row of a table if they differ in nothing but
the seed. What a run was is read in its start row; the name of its file does not matter.

Logs of the present code lie in results/ itself; where a run left its preset is seen by the preset as it is
now. Logs of an older commit lie in a folder named after it, with that commit's presets. The two never share
a row, because their random streams differ; of a row that the present code has repeated only that is shown.
"""
import argparse
import dataclasses
import functools
import importlib
import json
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
PAGE, RESULTS = (Path(__file__).resolve().with_name(name) for name in ("README.md", "results"))
FRONT = PAGE.parent.parent / "README.md"
MARKERS = re.compile(r"(<!-- \w+: python benchmarks/table.py(?: --front)? -->\n).*?(<!-- end -->)", re.S)
OF_ANY_RUN = {"dataset": None, "device": "cpu", "precision": "fp32"}   # results depend on these, too
OLD_PRESETS = {path.parent.name: json.loads(path.read_text()) for path in RESULTS.glob("*/presets.json")}


# ------------------------------------------------------------------------- logs, and what makes one row
def read(folder=RESULTS):
    """-> (runs, each the list of its rows; measurements). A row's "made" is its older commit, or ""."""
    runs, measurements = [], []
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = {**json.loads(line), "made": "" if path.parent == folder else path.parent.name}
            if "variant" in row:
                measurements.append(row)
            elif row["event"] == "start":
                runs.append([row])
            else:
                runs[-1].append(row)
    return runs, measurements


def typed(name, value):
    """A setting as it would be typed."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} " + (f"{value:.10g}" if isinstance(value, float) else str(value))


@functools.cache
def presets_of(method):
    """The presets as they are now: a run that was made with other numbers shows them as its flags."""
    presets = importlib.import_module(method).PRESETS.items()
    return {name: {key: value for key, value in sorted(dataclasses.asdict(preset).items()) if key != "seed"}
            for name, preset in presets}


class Group(NamedTuple):
    """What the runs in one row of a table have in common."""
    preset: str
    method: str
    changed: tuple              # ((setting, as it would be typed), ...): where the runs leave their preset
    networks: str
    made: str

    name = property(lambda self: f"{self.method}, {self.preset}")

    def flags(self, *in_other_columns):
        text = " ".join(flag for name, flag in self.changed if name not in in_other_columns)
        return f"`{text}`" if text else "-"


def group_of(start):
    arguments, method, made = start["arguments"], start["method"], start["made"]
    usual = OLD_PRESETS[made][method] if made else presets_of(method)
    usual = usual[arguments["preset"]]
    changed = {name: arguments[name] for name in usual if arguments.get(name, usual[name]) != usual[name]}
    usual = {**OF_ANY_RUN, "dataset": arguments["preset"].partition("-")[0]}
    changed.update({name: arguments[name] for name, value in usual.items() if arguments[name] != value})
    changed = tuple((name, typed(name, value)) for name, value in changed.items())
    networks = f"{arguments['teacher']} → {arguments['student']}"
    return Group(arguments["preset"], method, changed, networks, made)


def grouped(runs):
    """-> {Group: its runs in the order of their seeds}, without runs that trained no student"""
    groups = {}
    for run in sorted(runs, key=lambda run: run[0]["arguments"]["seed"]):
        if run[-1].get("student_acc_last") is not None:
            groups.setdefault(group_of(run[0]), []).append(run)
    return dict(sorted(groups.items()))


def of_now(groups):
    """The groups without those of an older commit that the present code has repeated."""
    def setting(group):
        return group.method, group.preset, group.networks, *sorted(group.changed)
    repeated = {setting(group) for group in groups if not group.made}
    return {group: runs for group, runs in groups.items() if not group.made or setting(group) not in repeated}


# ------------------------------------------------------------------------------------------------- cells
def spread(values):
    """'96.11 ± 0.32' of fractions, in percent; the standard deviation is the sample's."""
    values = [100 * value for value in values]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def of_end(runs, name="student_acc_last"):
    return spread([run[-1][name] for run in runs])


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


def seconds(runs, *phases):
    """Mean over the runs: of these phases, or of everything. - where there is no run."""
    if not phases:
        return f"{mean(run[-1]['seconds'] for run in runs):.0f}" if runs else "-"
    return f"{sum(row.get(phase) or 0 for run in runs for row in run for phase in phases) / len(runs):.0f}"


def made_at(rows):
    return ", ".join(sorted({f"`{row['made'] or row.get('commit') or '-'}`" for row in rows}))


def origin(runs):
    """The last columns of a table of runs."""
    starts = [run[0] for run in runs]
    return {"seeds": ", ".join(str(row["arguments"]["seed"]) for row in starts),
            "machine": "; ".join(sorted({row["device"] for row in starts})), "made at": made_at(starts)}


def table(rows):
    """Dicts with the same keys -> a table."""
    rows = list(rows)
    lines = [rows[0], ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)] if rows else []
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ------------------------------------------------------------------------------------------------ tables
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
        cost = seconds(runs, "seconds_training")
        yield {"method, preset": group.name, "mode": mode, "teacher → student": group.networks,
               "teacher's training": "-" if mode == "ce" else trained,
               "chosen images are used": used if mode in ("regulated", "hybrid") else "-",
               "other flags": group.flags("mode", "plain_teacher", "queue"),
               "teacher": "-" if mode == "ce" else teacher(runs),
               "**student, last epoch**": f"**{of_end(runs)}**",
               "steps on % of images x epochs": spread([row["data_fraction"] for row in last]),
               "never used, %": spread([row["never_used"] / count for row, count in zip(last, images)]),
               "student's seconds": seconds(runs, "seconds_distillation"),
               "teacher's seconds": cost if cost != "0" else seconds(runs, "teacher_seconds"), **origin(runs)}


def surrogate_table(groups):
    for group, runs in groups.items():
        if group.method == "surrogate_kd":
            settings = runs[0][0]["arguments"]
            rows = {name: [row[f"relative_entropy{name}"] for event in ("pool", "surrogate")
                           for row in events(runs, event) if f"relative_entropy{name}" in row
                           and (name or event == "surrogate")] for name in ("_before", "", "_augmented")}
            before, kept, shown = (f"{mean(values):.3f}" for values in rows.values())
            yield {"method, preset": group.name, "pictures": settings["surrogate"],
                   "balanced": "yes" if settings["balance"] else "no",
                   "boundary attack": "yes" if settings["boundary_attack"] else "no",
                   "other flags": group.flags("surrogate", "balance", "boundary_attack"),
                   "teacher → student": group.networks, "teacher": teacher(runs),
                   "relative entropy of all pictures": before, "of those kept": kept,
                   "as training shows them": shown, "**student, last epoch**": f"**{of_end(runs)}**",
                   "seconds": seconds(runs), **origin(runs)}


def measured(measurements, variants, shared, cells):
    """One row for all repeats.   shared: head -> name in the log   cells: head -> name, digits, factor"""
    found = {}
    for row in measurements:
        if row["variant"].startswith(variants):
            key = *(row.get(name, "-") for name in shared.values()), made_at([row])
            found.setdefault(key, []).append(row)
    for key, rows in found.items():
        line = dict(zip((*shared, "made at"), key), repeats=len(rows))
        for head, (name, digits, factor) in cells.items():
            phase, _, name = name.rpartition(".")                           # not every method has both phases
            parts = [row.get(phase, {}) if phase else row for row in rows]
            names = (name, "least", "most") if name == "seconds" else (name,)      # of one repeat's turns
            values = [factor * part[each] for part in parts for each in names if each in part]
            low, middle, high = (f"{f(values):.{digits}f}" for f in (min, median, max)) if values else "---"
            line[head] = middle if low == high else f"{middle} ({low} to {high})"
        yield line


MEASUREMENTS = {
    "Throughput": (
        ("authors", "here", "without "),
        {"steps of": "method", "batch": "batch_size", "order of work": "variant", "precision": "precision",
         "machine": "device"},
        {**{f"{phase}: {head}": (f"{phase}.{name}", digits, 1) for phase in ("synthesis", "distillation")
            for head, name, digits in (("seconds", "seconds", 2), ("of the authors' time", "of_authors", 2),
                                       ("of the ceiling", "fraction", 2),
                                       ("GFLOP done", "gflop_done", 1), ("GFLOP needed", "gflop", 1))},
         "ceiling, GFLOP/s": ("ceiling_gflops", 0, 1)}),
    "regulated_kd beside plain distillation, in one process": (
        ("saving",), {"data set": "dataset", "epochs": "epochs", "machine": "device", "variant": "kind"},
        {"steps on % of visits": ("used", 1, 100), "student's seconds": ("seconds", 1, 1),
         "of plain": ("of_plain", 2, 1), "student, last epoch": ("student_acc", 2, 100)}),
    "surrogate_kd: how fast pictures are drawn": (
        ("generation",), {"pictures": "generator", "size": "size", "machine": "device"},
        {"pictures a second": ("images_per_second", 0, 1)}),
    "Busy machines: two cores, beside one process that never waits": (
        ("busy",), {"command": "command", "how": "how", "machine": "device"},
        {"quiet: seconds": ("quiet_seconds", 1, 1), "busy: seconds": ("busy_seconds", 1, 1)}),
    "DeepInversion's images before a stranger": (
        ("stranger",),
        {"data set": "dataset", "flags": "flags", "images": "images", "stranger": "model", "seed": "seed"},
        {"its test accuracy": ("test_acc", 2, 100), "sees the target in %": ("target_acc", 1, 100)})}


def any_teacher_table(measurements):
    """Which network teaches in which method: "works", or the sentence of refusal."""
    for row in measurements:
        if row["variant"] == "any teacher":
            yield {"teacher": row["network"], "image side": row["size"], **row["methods"]}


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

    These groups leave `groups`, so that no other table shows them.
    """
    costs = {(row["method"], row["preset"], *sorted(typed(*flag) for flag in row["changed"].items())):
             row["pflop"] for row in measurements if row["variant"] == "cost"}
    races, trials, merged = {}, [], {}
    for group in [group for group, runs in groups.items() if group.preset.split("-")[1:2] == ["cpu"]
                  or "/race-" in runs[0][0]["arguments"]["out"]]:    # one with authors' numbers
        runs = groups.pop(group)
        merged.setdefault(race_group(runs[0][0]), []).extend(runs)
    for group, runs in merged.items():
        runs, start = sorted(runs, key=lambda run: run[0]["arguments"]["seed"]), runs[0][0]
        arguments, line = start["arguments"], {"method, preset": group.name, "flags": group.flags("dataset")}
        if arguments["dataset"].endswith("-val"):
            trials.append({**line, "of the validation images": f"**{of_end(runs)}**",
                           "epochs": len(events(runs[:1], "epoch")), "seconds of a CPU":
                           seconds([run for run in runs if run[0]["arguments"]["device"] == "cpu"]),
                           **origin(runs)})
            continue
        flags = sorted(flag for name, flag in group.changed if name not in OF_ANY_RUN)
        pflop = costs.get((group.method, group.preset, *flags))
        score = mean(run[-1]["student_acc_last"] for run in runs)
        title = f"Race on {arguments['dataset']}" + ", other readings" * ("-ledger/" in arguments["out"])
        title += ", with earlier presets" * of_earlier_preset(start)
        races.setdefault(title, []).append((-score, {
            **line, "teacher": teacher(runs), "**student, last epoch**": f"**{of_end(runs)}**",
            "best epoch, chosen on the test set": of_end(runs, "student_acc_best"),
            "agreement with the teacher": of_end(runs, "agreement"), "calibration error": of_end(runs, "ece"),
            "runs with a collapse": collapsed(runs),
            "teacher queries, million": f"{mean(run[-1]['teacher_queries'] for run in runs) / 1e6:.2f}",
            "TFLOP": "-" if pflop is None else f"{1000 * pflop:.0f}",
            "seconds of two cores": seconds([*filter(on_two_cores, runs)]), **origin(runs)}))
    found = {title: [line for _, line in sorted(lines, key=lambda pair: pair[0])]
             for title, lines in sorted(races.items())}
    return {**found, **({"Trials on validation images": trials} if trials else {})}


def epochs_table(measurements):
    """What the rules of benchmarks/epochs.py were worth, in points of test accuracy."""
    found = {}
    for row in measurements:
        if row["variant"] == "epochs":
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


def costs_table(measurements):
    """What a preset costs on paper: hours at 80 TFLOP/s that are really reached."""
    for row in measurements:
        if row["variant"] == "cost" and not row["changed"]:
            hours = row["pflop"] * 1000 / 80 / 3600
            yield {"method, preset": f"{row['method']}, {row['preset']}",
                   "teacher → student": row["networks"], "PFLOP": f"{row['pflop']:.3g}",
                   "teacher queries, million": f"{row['queries'] / 1e6:.2f}",
                   "memory of a step in fp32, GB": f"{row['memory_gb']:.1f}",
                   "hours at 80 TFLOP/s": f"{hours:.2g}" if hours >= 0.01 else "under 0.01"}


def front_table(groups, measurements):
    """The race on CIFAR-10 in fewer columns."""
    for title, lines in race_tables(groups, measurements).items():
        for line in lines if title == "Race on cifar10" else []:
            kept = ("**student, last epoch**", "agreement with the teacher", "runs with a collapse",
                    "teacher queries, million", "seeds")
            method, preset = line["method, preset"].split(", ")
            flags = f"--preset {preset} {line['flags'].strip('`')}".removesuffix(" -")
            pictures = "other photographs" if "folder:" in flags else "drawn pictures"
            learns_from = {"regulated_kd": "the training images", "surrogate_kd": pictures}
            yield {"method": f"`{method}`", "learns from": learns_from.get(method, "the teacher alone"),
                   "flags": f"`{flags}`", **{name: line[name] for name in kept}}


def all_tables(runs, measurements):
    groups = of_now(grouped(runs))
    tables = {**race_tables(groups, measurements),
              "Data-free methods": main_table(groups),
              "regulated_kd: real images, fewer steps": regulation_table(groups),
              "surrogate_kd: pictures that are not the teacher's": surrogate_table(groups),
              **{title: measured(measurements, *columns) for title, columns in MEASUREMENTS.items()},
              "Any teacher": any_teacher_table(measurements),
              "Choosing the epoch without test data": epochs_table(measurements),
              "Costs of the presets, on paper": costs_table(measurements)}
    return "".join(f"\n### {title}\n\n{table(rows)}" for title, rows in tables.items())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into both pages")
    parser.add_argument("--front", action="store_true", help="print the front page's table instead")
    options = parser.parse_args(argv)
    runs, measurements = read()
    texts = {FRONT: table(front_table(grouped(runs), measurements)), PAGE: all_tables(runs, measurements)}
    if not options.write:
        print(texts[FRONT if options.front else PAGE], end="")
        return
    for page, text in texts.items():
        page.write_text(MARKERS.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text()))


if __name__ == "__main__":
    main()
