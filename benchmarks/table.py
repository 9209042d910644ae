"""The README's results, made from the committed logs and nothing else.     python benchmarks/table.py

Runs are one row when method, data set, teacher, student and all settings agree; every seed whose log is there is counted.
"""
import importlib
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
RESULTS = Path(__file__).resolve().parent / "results"


def spread(values, scale=100):
    """'96.11 ± 0.32' of fractions, in percent; the standard deviation is the sample's."""
    values = [scale * value for value in values]
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def typed(key, value):
    """A setting as it would be typed."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value if isinstance(value, str) else f'{value:g}'}"


def changes(start):
    """The flags in which a run differs from its preset."""
    arguments = start["arguments"]
    preset = importlib.import_module(start["method"]).PRESETS[arguments["preset"]]
    if not arguments["device"].startswith("cuda"):
        preset = {**preset, "precision": "fp32"}
    return " ".join(typed(key, arguments[key]) for key, value in preset.items() if arguments.get(key, value) != value)


def steps_table(speeds):
    """One row a variant of a throughput run; the phases that a method has not are empty."""
    print("\n| steps of | order of work | machine, precision | synthesis, s | of the ceiling | GFLOP done (frozen) | distillation, s | of the ceiling | "
          "GFLOP done (frozen) | matrix products, GFLOP/s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in speeds:
        order = {"authors": "the authors', written anew", "here": f"`{row['method'].partition('-')[0]}.py`"}[row["variant"]]
        cells = []
        for phase in ("synthesis", "distillation"):
            found = row.get(phase)
            cells += [f"{found['seconds']:.2f}", f"{found['fraction']:.2f}",
                      f"{found.get('gflop_done', '-')} ({found['gflop']})"] if found else ["-"] * 3
        batch = f", batch {row['batch_size']}" if "batch_size" in row else ""
        print(f"| {row['method']}{batch} | {order} | {row['device']}, {row['precision']}{', compiled' if row['compile'] else ''} | "
              f"{' | '.join(cells)} | {row['ceiling_gflops']:.0f} |")


def curriculum_grid(runs):
    """CuDFKD's two switches, apart: student's curriculum by row, the generator's ramp by column."""
    cells = {}
    for rows in runs.values():
        arguments = rows[0]["arguments"]
        if rows[0]["method"] == "cudfkd" and not set(changes(rows[0]).split()) & {"--age-start", "--age-end"}:
            kind = "none" if arguments["curriculum"] == "none" else f"{arguments['curriculum']}, one weight a {arguments['granularity']}"
            cells.setdefault((arguments["preset"], kind, arguments["ramp"]), []).append(rows[-1]["student_acc_last"])
    for preset in sorted({key[0] for key in cells if sum(other[0] == key[0] for other in cells) > 1}):
        print(f"\n| cudfkd, {preset}: student, last epoch | α held at its start | α rises |\n|---|---|---|")
        for kind in sorted({key[1] for key in cells if key[0] == preset}, reverse=True):
            found = [cells.get((preset, kind, ramp), []) for ramp in (False, True)]
            print(f"| curriculum {kind} | " + " | ".join(f"{spread(values)} ({len(values)} seeds)" if values else "-" for values in found) + " |")


def regulation_table(runs):
    """regulated_kd: what was used of the data, and the seconds of student and teacher apart."""
    groups = {}
    for rows in runs.values():
        if rows[0]["method"] == "regulated_kd":
            arguments = rows[0]["arguments"]
            teacher = "none" if arguments["mode"] == "ce" else "usual" if arguments["plain_teacher"] else "self-regulated"
            preset = importlib.import_module("regulated_kd").PRESETS[arguments["preset"]]
            shown = {key: preset[key] for key in ("mode", "plain_teacher", "queue")}       # they have columns of their own
            flags = changes({**rows[0], "arguments": {**arguments, **shown}})
            networks = f"{arguments['teacher']} → {arguments['student']}"
            key = (arguments["preset"], MODES.index(arguments["mode"]), arguments["queue"], teacher, flags, networks)
            groups.setdefault(key, []).append((arguments["seed"], rows))
    if not groups:
        return
    print("\n| regulated_kd, preset | mode | networks | teacher | chosen rows | flags | teacher, % | **student, last epoch** | "
          "steps on % of images x epochs | never used, % | student, s | teacher, s | seeds |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for (preset, mode, queue, teacher, flags, networks), found in sorted(groups.items()):
        last = [[row for row in rows if row["event"] == "epoch"][-1] for _, rows in found]
        total = [round(row["sample_uses"] / row["data_fraction"] / (row["epoch"] + 1)) for row in last]
        student = statistics.mean(sum(row.get("seconds_distillation", 0) for row in rows) for _, rows in found)
        trained = statistics.mean(sum(row.get("seconds_training", 0) + row.get("teacher_seconds", 0) for row in rows) for _, rows in found)
        regulated = MODES[mode] in ("regulated", "hybrid")
        print(f"| regulated_kd, {preset} | {MODES[mode]} | {networks} | {teacher} | {('queued' if queue else 'at each visit') if regulated else '-'} | "
              f"{f'`{flags}`' if flags else '-'} | {'-' if teacher == 'none' else spread([found[0][1][-1]['teacher_acc']])} | "
              f"**{spread([rows[-1]['student_acc_last'] for _, rows in found])}** | {spread([row['data_fraction'] for row in last])} | "
              f"{spread([row['never_used'] / m for row, m in zip(last, total)])} | {student:.0f} | {trained:.0f} | "
              f"{', '.join(str(seed) for seed, _ in sorted(found, key=lambda item: item[0]))} |")


def surrogate_table(runs):
    """surrogate_kd: one row a set of pictures, one column a way to use it. Entropies and seconds are of the balanced runs."""
    groups = {}
    for rows in runs.values():
        arguments = rows[0]["arguments"]
        if rows[0]["method"] == "surrogate_kd" and rows[-1].get("student_acc_last") is not None:           # else it trained or scored nothing
            preset = importlib.import_module("surrogate_kd").PRESETS[arguments["preset"]]
            shown = {key: preset[key] for key in ("surrogate", "balance", "boundary_attack")}              # they have columns of their own
            flags = changes({**rows[0], "arguments": {**arguments, **shown}})
            key = (arguments["preset"], arguments["surrogate"], f"{arguments['teacher']} → {arguments['student']}", flags)
            groups.setdefault(key, {}).setdefault((arguments["balance"], arguments["boundary_attack"]), []).append(rows)
    if not groups:
        return

    def mean(found, event, key):
        values = [row[key] for rows in found for row in rows if row["event"] == event]
        return f"{statistics.mean(values):.3f}" if values else "-"
    ways = [(False, False), (True, False), (True, True)]
    print("\n| surrogate_kd, preset | surrogate | networks | flags | teacher, % | relative entropy: all pictures | balanced | balanced, as training "
          "shows them | **student, last epoch**: unbalanced | balanced | balanced, attacked | seconds | seeds |\n"
          "|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for (preset, surrogate, networks, flags), cells in sorted(groups.items()):
        scores, balanced = [], cells.get((True, False), [])
        every = [rows for found in cells.values() for rows in found]
        seeds = sorted({rows[0]["arguments"]["seed"] for rows in every})
        for found in (cells.get(way, []) for way in ways):
            fewer = f" ({len(found)} of the seeds)" if 0 < len(found) < len(seeds) else ""
            scores.append(f"**{spread([rows[-1]['student_acc_last'] for rows in found])}**{fewer}" if found else "-")
        seconds = round(statistics.mean(rows[-1]["seconds"] for rows in balanced)) if balanced else "-"
        print(f"| surrogate_kd, {preset} | {surrogate} | {networks} | {f'`{flags}`' if flags else '-'} | {spread([every[0][-1]['teacher_acc']])} | "
              f"{mean(balanced, 'pool', 'relative_entropy_before')} | {mean(balanced, 'surrogate', 'relative_entropy')} | "
              f"{mean(balanced, 'surrogate', 'relative_entropy_augmented')} | {' | '.join(scores)} | {seconds} | {', '.join(map(str, seeds))} |")


def generation_table(rows):
    """Pictures a second of each procedural generator, every run that is committed."""
    found = {}
    for row in rows:
        found.setdefault((row["device"], row["generator"]), []).append(row["images_per_second"])
    if found:
        print("\n| pictures of 32x32 a second | machine | images/s, each run |\n|---|---|---|")
        for (device, generator), rates in found.items():
            print(f"| {generator} | {device} | {', '.join(f'{rate:.0f}' for rate in rates)} |")


def saving_table(rows):
    """regulated_kd: what choosing images saves, side by side in one process."""
    if rows:
        print(f"\n| regulated_kd against plain distillation, {rows[0]['dataset']}, {rows[0]['epochs']} epochs, seed 0, the usual teacher, one process "
              f"({rows[0]['device']}) | steps on % of visits | student, s | of plain | student, last epoch |\n|---|---|---|---|---|")
        for row in rows:
            print(f"| {row['kind']} | {100 * row['used']:.1f} | {row['seconds']:.1f} | {row['of_plain']:.2f} | {100 * row['student_acc']:.2f} |")


MODES = ["ce", "kd", "significance", "regulated", "hybrid"]


def main():
    logs = {path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(RESULTS.glob("*.jsonl"))}
    runs = {name: rows for name, rows in logs.items() if rows[0].get("event") == "start"}
    groups = {}
    for name, rows in runs.items():
        if rows[0]["method"] in ("regulated_kd", "surrogate_kd"):          # with real images, with other images: tables of their own
            continue
        arguments = rows[0]["arguments"]
        key = (arguments["preset"], rows[0]["method"], changes(rows[0]), arguments["teacher"], arguments["student"])
        groups.setdefault(key, []).append((arguments["seed"], rows))
    print("| method, preset | flags | teacher → student | teacher | **student, last epoch** | best epoch, chosen on the test set | "
          "agreement with the teacher | calibration error | labels the teacher agrees with | runs with a collapse | seconds | seeds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for (preset, method, flags, teacher, student), found in sorted(groups.items()):
        ends, last = [rows[-1] for _, rows in found], [[row for row in rows if row["event"] == "epoch"][-1] for _, rows in found]
        seconds = "-" if flags and method == "csd" else round(statistics.mean(end["seconds"] for end in ends))
        labels = spread([row["target_acc"] for row in last]) if "target_acc" in last[0] else "-"
        collapsed = sum(any(row["event"] == "collapse" for row in rows) for _, rows in found)
        print(f"| {method}, {preset} | {f'`{flags}`' if flags else '-'} | {teacher} → {student} | {spread([ends[0]['teacher_acc']])} | "
              f"**{spread([end['student_acc_last'] for end in ends])}** | {spread([end['student_acc_best'] for end in ends])} | "
              f"{spread([end['agreement'] for end in ends])} | {spread([end['ece'] for end in ends])} | "
              f"{labels} | {collapsed} of {len(found)} | {seconds} | "
              f"{', '.join(str(seed) for seed, _ in sorted(found, key=lambda item: item[0]))} |")
    curriculum_grid(runs)
    regulation_table(runs)
    saving_table([row for rows in logs.values() for row in rows if row.get("variant") == "saving"])
    surrogate_table(runs)
    generation_table([row for rows in logs.values() for row in rows if row.get("variant") == "generation"])
    machines = sorted({rows[0]["device"] for rows in runs.values()})
    print(f"\nPercent, mean ± standard deviation over the seeds. Machine: {'; '.join(machines)}. Seconds without the teacher's training,\n"
          "which takes half a minute on digits; those of csd's ablations are left out: some reuse the preset's bank, one ran beside the tests.")
    speeds = [row for rows in logs.values() for row in rows if row.get("variant") in ("authors", "here")]
    if speeds:
        steps_table(speeds)
    for row in (row for rows in logs.values() for row in rows if row.get("variant") == "stranger"):
        print(f"\nA stranger, {row['model']} of seed {row['seed']} ({100 * row['test_acc']:.2f} % on the test set), sees the asked-for class in "
              f"{100 * row['target_acc']:.1f} % of {row['images']} images of `deepinversion.py --dataset {row['dataset']} "
              f"--synthesize-only {row['images']}{' ' * bool(row.get('flags'))}{row.get('flags', '')}`.")
    layers = [row for rows in logs.values() for row in rows if row.get("variant") == "frozen_batchnorm"]
    if layers:
        print("\n| milliseconds, forward and backward, channels_last | conv 3x3 | PyTorch's BN, eval | with statistics | here: BN | with statistics |")
        print("|---|---|---|---|---|---|")
        for row in layers:
            print(f"| {tuple(row['shape'])} | {row['conv']} | {row['torch_bn']} | {row['torch_bn_statistics']} | {row['here_bn']} | "
                  f"{row['here_bn_statistics']} |")
    families = {}
    for name in logs:
        family, _, seed = name.removesuffix(".jsonl").rpartition("-seed")
        families.setdefault(family or seed, []).append(seed if family else "")
    print("\nLogs, in [`benchmarks/results/`](benchmarks/results): " + ", ".join(
        f"`{family}-seed{{{','.join(seeds)}}}`" if seeds[1:] else f"`{family}{f'-seed{seeds[0]}' if seeds[0] else ''}`"
        for family, seeds in families.items()) + ".")


if __name__ == "__main__":
    main()
