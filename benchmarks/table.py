"""The README's results, made from the committed logs and nothing else.     python benchmarks/table.py

A log belongs to a row when method, data set, preset, teacher and student agree. Every seed that is there is counted.
"""
import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def spread(values, digits=2, scale=100):
    """'96.11 ± 0.32' of fractions, in percent; the standard deviation is the sample's."""
    values = [scale * value for value in values]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main():
    groups = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if rows[0].get("event") != "start":
            continue
        start, end = rows[0], rows[-1]
        arguments = start["arguments"]
        key = (start["method"], arguments["dataset"], arguments["preset"], arguments["teacher"], arguments["student"])
        groups.setdefault(key, []).append((arguments["seed"], start, end, path.name))
    print("| method | data set, preset | teacher → student | teacher | student, last epoch | best epoch, chosen on the test set | agreement "
          "| calibration error | seconds a run | seeds | machine |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (method, dataset, preset, teacher, student), runs in groups.items():
        ends = [end for _, _, end, _ in runs]
        name = preset if preset == dataset else f"{dataset}, {preset}"
        print(f"| {method} | {name} | {teacher} → {student} | {spread([ends[0]['teacher_acc']])} | "
              f"**{spread([end['student_acc_last'] for end in ends])}** | {spread([end['student_acc_best'] for end in ends])} | "
              f"{spread([end['agreement'] for end in ends])} | {spread([end['ece'] for end in ends])} | "
              f"{statistics.mean(end['seconds'] for end in ends):.0f} | {', '.join(str(seed) for seed, *_ in sorted(runs, key=lambda run: run[0]))} | "
              f"{runs[0][1]['device']} |")
    print("\nLogs: " + ", ".join(f"`benchmarks/results/{name}`" for runs in groups.values() for *_, name in runs) + ".")


if __name__ == "__main__":
    main()
