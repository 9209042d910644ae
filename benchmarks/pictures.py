"""Pictures of finished runs.

    python benchmarks/pictures.py curriculum RUN_FOLDER --out picture.png
    python benchmarks/pictures.py regulation RUN_FOLDER --out picture.png
    python benchmarks/pictures.py side-by-side RUN_FOLDER RUN_FOLDER ... --out picture.png
    python benchmarks/pictures.py race benchmarks/results/race-mnist.jsonl --out picture.png

    curriculum     a run of cudfkd.py: how hard the images were, what they weighed, what moved both.
                   Also takes a log file; of one with several runs, it draws the first.
    regulation     a run of regulated_kd.py: how many images took part in each epoch, how often each
                   did, and which were needed most and least.
    side-by-side   runs on one data set: images of each run in a block of columns, a row a class. Of
                   regulated_kd.py, which makes none, the real images that were needed most.
    race           the log of a race: test error after so many seconds of two cores, where two rows or more
                   were timed, and so many teacher queries; a line a row, the mean over its seeds between
                   least and most; a colour a preset, its best row unbroken. Runs beside others are not in
                   the seconds, runs that ask the teacher nothing not in the queries, runs of earlier
                   presets in neither.
"""
import functools
import json
import re
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import table
from common import BadInput, Parser, command_line, load_dataset, read_file, save_samples

DASHES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)))    # of a preset's rows, best first


def read_runs(path):
    """-> the runs in a run folder or in a log file, each a list of rows, the start row first"""
    path, runs = Path(path) / "log.jsonl" if Path(path).is_dir() else Path(path), []
    try:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            runs += [[]] if row["event"] == "start" else []
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
    # rows of epochs; in logs of c07d91b quantiles have rows of their own
    seen, epochs = ([row for row in rows if name in row] for name in ("difficulty", "alpha"))
    if not seen or not epochs:
        raise BadInput(f"{run} is no run of cudfkd.py, or has no finished epoch")
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    x = [row["epoch"] + 1 for row in seen]
    for axes, name in ((left, "difficulty"), (middle, "weights")):
        bands, blue = list(zip(*[row[name] for row in seen])), dict(color="tab:blue", linewidth=0)
        axes.fill_between(x, bands[0], bands[4], alpha=0.2, label="5 to 95 % of the images", **blue)
        axes.fill_between(x, bands[1], bands[3], alpha=0.4, label="25 to 75 %", **blue)
        axes.plot(x, bands[2], color="tab:blue", marker=".", label="median")
    left.set(xlabel="epoch", ylabel="loss ℓ of an image", yscale="log")
    middle.set(xlabel="epoch", ylabel="weight v of its loss", ylim=(-0.02, 1.02))
    left.plot(x, [row["age"] for row in seen], color="black", linestyle="--", label="age λ")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    rises = [(row["epoch"] + 1, row["alpha"]) for row in epochs]
    right.plot(*zip(*rises), color="tab:red", marker=".")
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

    -> counts (M,), of how many epochs, by whom, ImageSet
    """
    if rows[0]["method"] != "regulated_kd":
        raise BadInput(f"{run} is a run of {rows[0]['method']}.py, not of regulated_kd.py")
    state, arguments = read_file(Path(run) / "checkpoint.pt", "checkpoint")["state"], rows[0]["arguments"]
    train, _ = load_dataset(arguments["dataset"], True, arguments["data_dir"])
    if any(row["event"] == "significance" for row in rows):
        return state["counts"], arguments["teacher_epochs"], "the teacher", train
    return state["used"], arguments["epochs"], "the student", train


def regulation(run):
    """-> a matplotlib Figure: who took part by epoch, how often, and the most and least needed images."""
    from matplotlib.figure import Figure
    rows = read_log(run)
    counts, epochs, whose, train = needed(run, rows)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    for label, event in (("student", "epoch"), ("teacher", "significance")):
        shares = [100 * row["share"] for row in rows if row["event"] == event and "share" in row]
        if shares:
            left.plot(range(1, len(shares) + 1), shares, marker=".", label=label)
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
def samples(run, rows):
    """samples.png of a run, or the most needed images of regulated_kd.py in the same form."""
    from PIL import Image
    path = Path(run, "samples.png")
    if rows[0]["method"] != "regulated_kd":
        try:
            return Image.open(path).convert("RGB")
        except OSError:
            raise BadInput(f"{path} is no picture; side-by-side takes folders of finished runs") from None
    counts, _, _, train = needed(run, rows)
    order = counts.argsort(stable=True, descending=True)
    labels, shown = train.labels[order], torch.zeros(len(order), dtype=torch.bool)
    for label in labels.unique():
        shown[(labels == label).nonzero()[:8, 0]] = True
    with tempfile.TemporaryDirectory() as folder:
        save_samples(Path(folder, "s.png"), train.pixels[order[shown]] / train.scale, labels[shown],
                     int(labels.max()) + 1)
        return Image.open(Path(folder, "s.png")).convert("RGB")


def side_by_side(runs, each=4):
    """-> a PIL picture: the first `each` images of a class of each run, its method's name above."""
    from PIL import Image, ImageDraw
    logs = [read_log(run) for run in runs]
    sheets = [samples(run, rows) for run, rows in zip(runs, logs)]
    if len({sheet.size for sheet in sheets}) > 1:
        raise BadInput("the runs' images differ in size or number of classes; name runs on one data set")
    # as common.save_samples draws them: labels, 24 pixels wide, then 8 images a row with 2 pixels around each
    (width, height), labels, top = sheets[0].size, 24, 16
    block = (width - labels - 2) // 8 * each + 2
    picture = Image.new("RGB", (labels + len(sheets) * (block + 8) - 8, height + top), "white")
    picture.paste(sheets[0].crop((0, 0, labels, height)), (0, top))
    for place, (sheet, rows) in enumerate(zip(sheets, logs)):
        left = labels + place * (block + 8)
        picture.paste(sheet.crop((labels, 0, labels + block, height)), (left, top))
        ImageDraw.Draw(picture).text((left + 2, 3), rows[0]["method"], fill="black")
    return picture


def race(log):
    """-> a matplotlib Figure: test error against seconds, and against teacher queries."""
    import matplotlib.ticker
    from matplotlib.figure import Figure
    lines = {}                                      # {name: [a seed's (seconds, queries, error) by epoch]}
    for run in read_runs(log):
        start = {**run[0], "made": ""}
        if table.of_earlier_preset(start):
            continue
        points, spent, timed = [], 0.0, table.on_two_cores(run)
        for row in run:
            spent += sum(value for name, value in row.items() if name.startswith("seconds_"))
            if row["event"] == "epoch" and row.get("student_acc") is not None and "teacher_queries" in row:
                time = spent if timed else None
                points.append((time, row["teacher_queries"], 100 - 100 * row["student_acc"]))
        if not points:
            raise BadInput(f"{log} has a run without a scored epoch; name the log of a race")
        group = table.race_group(start)
        method = group.method + re.sub(".*-cpu", "", f"-{group.preset}")     # csd, csd-plain, dafl-mnist
        name = " ".join([method, *(flag for name, flag in group.changed if name != "dataset")])
        lines.setdefault(name, []).append(points)
    lines = dict(sorted(lines.items(), key=lambda line: mean(points[-1][2] for points in line[1])))
    timed = sum(any(points[0][0] is not None for points in runs) for runs in lines.values()) > 1
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(f"{group.preset.partition('-')[0]}: students of one teacher", fontsize=10)
    panels = [*figure.subplots(1, 2, sharey=True)] if timed else [None, figure.subplots()]
    colors, seen, named = matplotlib.colormaps["tab10"].colors, {}, {}          # seen: {preset: its rows}
    for name, runs in lines.items():
        preset = name.split()[0]
        seen[preset] = seen.get(preset, 0) + 1
        color, dash = colors[[*seen].index(preset) % 10], DASHES[(seen[preset] - 1) % len(DASHES)]
        for place, axes in enumerate(panels):
            chosen = [points for points in runs if points[0][place] is not None]
            if not axes or not chosen or not chosen[0][-1][place]:           # labels ask the teacher nothing
                continue
            x, errors = ([[point[which] for point in points] for points in zip(*chosen)]
                         for which in (place, 2))                            # a list of seeds an epoch
            named[name], = axes.plot([*map(mean, x)], [*map(mean, errors)], color=color, linestyle=dash,
                                     label=f"{name}, runs: {len(runs)}", linewidth=1.2)
            axes.fill_between([*map(mean, x)], [*map(min, errors)], [*map(max, errors)], alpha=0.15,
                              color=color, linewidth=0)
    for axes, label in zip(panels, ("seconds of two cores (timed runs)", "teacher queries")):
        if axes:
            axes.set(xlabel=label, xscale="log", yscale="log")
            axes.grid(alpha=0.3)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))             # 500k, 1M
                axis.set_minor_formatter("")
    panels[not timed].set_ylabel("student's test error, %")
    figure.legend(handles=[*named.values()], loc="outside lower center", ncols=2, fontsize=8)
    return figure


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["curriculum", "regulation", "side-by-side", "race"])
    parser.add_argument("runs", nargs="+", help="run folders, one except for side-by-side; or a race's log")
    parser.add_argument("--out", required=True, help="file to draw, as picture.png")
    options = parser.parse_args(argv)
    if options.kind == "side-by-side":
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
