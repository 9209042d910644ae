"""Pictures of finished runs.

    python benchmarks/pictures.py curriculum RUN_FOLDER --out picture.png
    python benchmarks/pictures.py regulation RUN_FOLDER --out picture.png
    python benchmarks/pictures.py side-by-side RUN_FOLDER RUN_FOLDER ... --out picture.png
    python benchmarks/pictures.py race benchmarks/results/race-mnist.jsonl --out picture.png
    python benchmarks/pictures.py score --out picture.png

    curriculum     a run of cudfkd.py: how difficult its images were, what they weighed, and what moves both.
                   It also takes a log file; of one with several runs, it draws the first.
    regulation     a run of regulated_kd.py: how many images took part in each epoch, how often each did, and
                   which were needed most and least. Type it where the run was made, beside checkpoints/.
    side-by-side   runs on one data set: the images of each run in a block of columns, one row for each class.
                   For a run of regulated_kd.py, which makes none, the real images that were needed most.
    race           the log of a race: the student's accuracy on the test images after so many questions to
                   the teacher, a line for each of the rows that LINES names below. A run that asks the
                   teacher nothing is left out, and so is one whose preset has become another.
    score          all logs of benchmarks/results: each student's accuracy on the test images against its
                   agreement with the teacher on drawn pictures, which needs no test data.
"""
import functools
import itertools
import json
import os
import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import table
from common import BadInput, load_dataset
from running import Parser, command_line, read_file


def read_runs(path):
    """-> the runs in a run folder or in a log file, each a list of rows, the start row first"""
    path, runs = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path), []
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["event"] == "start":
                runs.append([])
                row = table.as_now(row)
            runs[-1].append(row)
        runs[0]                                                              # at least one
        return runs
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInput(f"{path} is not a run's log ({type(error).__name__}); name a run folder") from None


def read_log(path):
    return read_runs(path)[0]


# ------------------------------------------------------------------------------------------------ cudfkd.py
def curriculum(run):
    """-> a matplotlib Figure: difficulty and weight of an epoch's last images, and what moves them."""
    from matplotlib.figure import Figure
    rows = read_log(run)
    epochs = [row for row in rows if "difficulty" in row]
    if not epochs:
        raise BadInput(f"{run} is no run of cudfkd.py, or has no finished epoch")
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    x = [row["epoch"] + 1 for row in epochs]
    for axes, name in ((left, "difficulty"), (middle, "weights")):
        bands, blue = list(zip(*[row[name] for row in epochs])), dict(color="tab:blue", linewidth=0)
        axes.fill_between(x, bands[0], bands[4], alpha=0.2, label="5 to 95 % of the images", **blue)
        axes.fill_between(x, bands[1], bands[3], alpha=0.4, label="25 to 75 %", **blue)
        axes.plot(x, bands[2], color="tab:blue", marker=".", label="median")
    left.set(xlabel="epoch", ylabel="loss ℓ of an image", yscale="log")
    middle.set(xlabel="epoch", ylabel="weight v of its loss", ylim=(-0.02, 1.02))
    left.plot(x, [row["age"] for row in epochs], color="black", linestyle="--", label="age λ")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    right.plot(x, [row["alpha"] for row in epochs], color="tab:red", marker=".")
    right.set_xlabel("epoch")
    right.set_ylabel("α, weight of the adversarial term", color="tab:red")
    scored = [(row["epoch"] + 1, row["student_acc"]) for row in epochs if row["student_acc"] is not None]
    if scored:
        accuracy = right.twinx()
        accuracy.plot(*zip(*scored), color="tab:green", marker=".")
        accuracy.set_ylabel("student's test accuracy", color="tab:green")
    return figure


# ------------------------------------------------------------------------------------------ regulated_kd.py
def needed(run, rows):
    """How often each image of the training set was needed, by the teacher if it regulated itself.

    -> counts (M,), of how many epochs, by whom, {whose: share of the images that took part, by epoch}
    """
    if rows[0]["method"] != "regulated_kd":
        raise BadInput(f"{run} is a run of {rows[0]['method']}.py, not of regulated_kd.py")
    arguments = rows[0]["arguments"]
    shares = {"student": [row["share"] for row in rows if row["event"] == "epoch"]}
    for row in rows:
        if row["event"] == "significance":                     # the teacher's folder, with a log of its own
            counts = read_file(Path(row["path"], "result.pt"), "self-regulated teacher")["result"][1]
            shares["teacher"] = [each["share"] for each in read_log(row["path"]) if each["event"] == "round"]
            return counts, arguments["teacher_epochs"], "the teacher", shares
    counts = read_file(Path(run) / "checkpoint.pt", "checkpoint")["state"]["used"]
    return counts, arguments["epochs"], "the student", shares


def regulation(run):
    """-> a matplotlib Figure: who took part by epoch, how often, and the most and least needed images."""
    from matplotlib.figure import Figure
    rows = read_log(run)
    counts, epochs, whose, shares = needed(run, rows)
    train, _ = load_dataset(rows[0]["arguments"]["dataset"], True, rows[0]["arguments"]["data_dir"])
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for label, values in shares.items():
        left.plot(range(1, len(values) + 1), [100 * value for value in values], marker=".", label=label)
    left.set(xlabel="epoch", ylabel="images that take part, %", ylim=(0, None))
    left.legend(fontsize=7)
    middle.hist(counts.numpy(), bins=torch.arange(-0.5, epochs + 1).tolist(), color="tab:blue")
    middle.set(xlabel=f"epochs of {epochs} in which {whose} needed an image", ylabel="images", yscale="log")
    first = torch.arange(32).clamp(max=len(counts) - 1)                      # among equals the set's first
    shown = [counts.argsort(stable=True, descending=most)[first] for most in (True, False)]
    shown = torch.cat(shown)                                                 # (64,)
    sheet = train.pixels[shown] / train.scale                                # (64, C, H, W)
    height, width = sheet.shape[2:]
    sheet = sheet.reshape(8, 8, -1, height, width).permute(0, 3, 1, 4, 2)    # (8, H, 8, W, C)
    sheet = sheet.reshape(8 * height, 8 * width, -1).expand(-1, -1, 3)
    right.imshow(sheet.numpy(), interpolation="nearest")
    right.axhline(4 * height - 0.5, color="tab:red")
    right.set(xticks=[], yticks=[2 * height, 6 * height], yticklabels=["most", "least"],
              title=f"needed by {whose}")
    return figure


# ---------------------------------------------------------------------------------------------- all methods
def samples(run):
    """The picture samples.png of a run."""
    from PIL import Image
    path = Path(run, "samples.png")
    try:
        return Image.open(path).convert("RGB")
    except OSError:
        raise BadInput(f"{path} is no picture; side-by-side takes folders of finished runs") from None


def side_by_side(runs, each=4):
    """-> a PIL picture: the first `each` images of a class of each run, its method's name above.

    Where all runs are of one method, the teachers' names are above; of one teacher, that in which the names
    of the run folders differ.
    """
    from PIL import Image, ImageDraw
    logs = [read_log(run) for run in runs]
    sheets = [samples(run) for run in runs]
    if len({sheet.size for sheet in sheets}) > 1:
        raise BadInput("the runs' images differ in size or number of classes; name runs on one data set")
    # as common.save_samples draws them: labels, 24 pixels wide, then 8 images a row with 2 pixels around each
    (width, height), labels, top = sheets[0].size, 24, 16
    block = (width - labels - 2) // 8 * each + 2
    picture = Image.new("RGB", (labels + len(sheets) * (block + 8) - 8, height + top), "white")
    picture.paste(sheets[0].crop((0, 0, labels, height)), (0, top))
    names = [rows[0]["method"] for rows in logs]
    if len({*names}) == 1:
        names = [Path(rows[0]["arguments"]["teacher"]).stem for rows in logs]
    if len({*names}) == 1 < len(names):
        names = [Path(run).name for run in runs]
        names = [name.removeprefix(os.path.commonprefix(names)) for name in names]
    for place, (sheet, name) in enumerate(zip(sheets, names)):
        left = labels + place * (block + 8)
        picture.paste(sheet.crop((labels, 0, labels + block, height)), (left, top))
        ImageDraw.Draw(picture).text((left + 2, 3), name, fill="black")
    return picture


# {race: {row: its name in the figure}}; of another race all rows are drawn, by their own names
LINES = {
    "cifar10": {"real-kd": "the training images", "plain-inversion-2h-bf16": "plain inversion, two hours",
                "surrogate-cifar100": "photographs of other things", "plain-inversion": "plain inversion",
                "csd": "CSD", "cudfkd": "CuDFKD", "surrogate-generator": "drawn pictures", "dafl": "DAFL"},
    "mnist": {"real-kd": "the training images", "surrogate-leaves": "drawn pictures", "rdskd": "RDSKD",
              "cudfkd": "CuDFKD", "dafl": "DAFL", "dafl-authors-32": "DAFL, the authors' numbers",
              "csd": "CSD", "zskd": "ZSKD"},
}


def scores_of(log):
    """-> {row of the race: its runs, each a list of (teacher queries, accuracy in %) by epoch}"""
    lines = {}
    for run in read_runs(log):
        start = run[0]
        if "stage" in start or table.of_earlier_preset(start):
            continue
        if not table.race_row(start):
            raise BadInput(f"{log} has a run that is no race's; name a log that benchmarks/race.py made")
        race, row = table.race_row(start)
        points = [(each["teacher_queries"], 100 * each["student_acc"]) for each in run
                  if each["event"] == "epoch" and each.get("student_acc") is not None]
        if not points:
            raise BadInput(f"{log} has a run without a scored epoch; name the log of a race")
        if row in LINES.get(race, [row]) and points[-1][0]:          # labels alone ask the teacher nothing
            lines.setdefault(LINES.get(race, {}).get(row, row), []).append(points)
    return lines


def apart(places, gap):
    """Numbers, moved as little as needed until neighbours are `gap` apart; their order stays."""
    groups = []
    for place in sorted(places):
        groups.append([place])
        while len(groups) > 1 and (mean(groups[-1]) - mean(groups[-2])
                                   < gap * (len(groups[-1]) + len(groups[-2])) / 2):
            last = groups.pop()
            groups[-1] += last
    moved = [mean(group) + gap * (number - (len(group) - 1) / 2)
             for group in groups for number in range(len(group))]
    order = sorted(range(len(places)), key=places.__getitem__)
    return [place for _, place in sorted(zip(order, moved))]


def race(log):
    """-> a matplotlib Figure: accuracy against teacher queries, each line with its name at its end.

    A line is the mean over a row's seeds, in the middle between the worst and the best one. Where the best
    row is above 95 %, the error is drawn, on a logarithmic scale.
    """
    import matplotlib.ticker
    from matplotlib.figure import Figure
    lines = scores_of(log)
    as_error = max(mean(points[-1][1] for points in runs) for runs in lines.values()) > 95
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    ends, colors = [], matplotlib.colormaps["tab10"].colors
    for color, (name, runs) in zip(itertools.cycle(colors), lines.items()):
        epochs = [*zip(*runs)]                                           # of each epoch, a point a seed
        x = [mean(queries for queries, _ in points) for points in epochs]
        y = [[100 - score if as_error else score for _, score in points] for points in epochs]
        axes.plot(x, [*map(mean, y)], color=color, linewidth=1.8)
        axes.fill_between(x, [*map(min, y)], [*map(max, y)], color=color, alpha=0.12, linewidth=0)
        ends.append((name, x[-1], mean(y[-1]), color))
    axes.set(xscale="log", yscale="log" if as_error else "linear",
             xlabel="images that the teacher was asked about",
             ylabel=f"student's {'error' if as_error else 'accuracy'} on the test images, %")
    for axis in (axes.xaxis, axes.yaxis)[:2 if as_error else 1]:
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))                     # 500k, 1M
        axis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    # the names stand in a column at the right, beside the ends of their lines as far as there is room
    places = axes.transAxes.inverted().transform(axes.transData.transform([end[1:3] for end in ends]))[:, 1]
    for (name, x, y, color), place in zip(ends, apart([*places], 0.05)):
        axes.annotate(name, (x, y), (1.02, place), textcoords="axes fraction", color=color, va="center",
                      fontsize=10, arrowprops=dict(arrowstyle="-", color=color, linewidth=0.7, alpha=0.6,
                                                   linestyle=":", relpos=(0, 0.5), shrinkA=1, shrinkB=1))
        axes.plot(x, y, marker="o", markersize=4, color=color)
    return figure


def score():
    """-> a matplotlib Figure: accuracy against agreement on drawn pictures, students of one teacher together.

    Teachers with ten students or more have a panel each. Those with three to nine share the last panel, a
    colour each. Students that learned from drawn pictures are open circles. Trials, which are scored on
    validation images, are left out.
    """
    from matplotlib.figure import Figure
    teachers = {f"{dataset}, {teacher.partition(' ')[0]}": [*students.values()]
                for (dataset, teacher), students in table.drawn_students(*table.read()).items()
                if len(students) >= 3 and not dataset.endswith("-val")}
    panels = [[name] for name, students in teachers.items() if len(students) >= 10]
    panels.append([name for name, students in teachers.items() if len(students) < 10])
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels):
        for color, name in enumerate(panel):
            for computed, accuracy, drawn in teachers[name]:
                axes.plot(100 * drawn, 100 * accuracy, "o", color=f"C{color}",
                          markerfacecolor="none" if computed else None)
            axes.plot([], [], "o", color=f"C{color}", label=name)
        axes.set(xlabel="agreement on drawn pictures, %", ylabel="accuracy on the test images, %")
        axes.legend(fontsize=7, loc="lower right" if len(panel) == 1 else "lower left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["curriculum", "regulation", "side-by-side", "race", "score"])
    parser.add_argument("runs", nargs="*",
                        help="run folders, one except for side-by-side; or a race's log; none for score")
    parser.add_argument("--out", required=True, help="file to draw, as picture.png")
    options = parser.parse_args(argv)
    if options.kind == "score" and options.runs:
        raise BadInput("score draws all logs of benchmarks/results; name no run")
    elif options.kind == "score":
        save = functools.partial(score().savefig, dpi=110)
    elif not options.runs:
        raise BadInput(f"{options.kind} needs a run to draw")
    elif options.kind == "side-by-side":
        save = side_by_side(options.runs).save
    elif len(options.runs) > 1:
        raise BadInput(f"{options.kind} draws one run, not {len(options.runs)}")
    else:
        draw = {"curriculum": curriculum, "regulation": regulation, "race": race}[options.kind]
        save = functools.partial(draw(options.runs[0]).savefig, dpi=110)
    try:
        save(options.out)
    except (OSError, ValueError) as error:
        raise BadInput(f"{options.out} cannot be drawn ({error})") from None
    print(options.out)


if __name__ == "__main__":
    main()
