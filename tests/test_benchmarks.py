"""benchmarks/: the rival zskd.py, what throughput.py and costs.py count, every script at a tiny size."""
import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import busy
import costs
import epochs
import gpu
import pictures
import race
import running
import table
import throughput
import zskd
from conftest import (METHODS, ROOT, TINY, common, cudfkd, dafl, plain_inversion, rdskd, regulated_kd,
                      surrogate_kd, tiny_args, tiny_networks, tiny_settings)
from helpers import D, equal, near, refused, rows_of, weights_of
from test_methods import each

TINY[zskd] = dict(epochs=2, batch_size=8, impressions=20, synthesis_batch_size=8, synthesis_steps=3)


def test_zskds_golden_numbers_and_dirichlet():
    similarity = zskd.class_similarity(torch.tensor([[1, 0, 1], [0, 1, 1], [1, -1, 0]], dtype=D))
    near(similarity, [[1, 0.5, 0.5], [0.5, 1, -0.5], [0.5, -0.5, 1]], 1e-6)
    stretched = torch.tensor([[1, 0, 0], [2 / 3, 1, 0], [2 / 3, 0, 1]], dtype=D)
    near(zskd.concentrations(similarity, 1.0), stretched + 1e-4, 1e-6)
    near(zskd.concentrations(similarity, 0.1), 0.1 * stretched + 1e-4, 1e-6)
    y, logits = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], [[20, 0, 10], [0, -10, 30]]], dtype=D)
    near(zskd.soft_ce_loss(logits, y, 20.0), 0.7933127, 1e-6)
    near(zskd.kd_loss(logits, 20 * y.log(), 20.0) / 400, 0.7933127 + (y * y.log()).sum(1).mean(), 1e-6)
    # means of many draws are α / Σα, class by class; the smaller β gives sharper distributions
    with common.seeded(0):
        weight = torch.randn(4, 6)
        smooth, sharp = zskd.draw_targets(weight, 4000).reshape(2, 4, 2000, 4)
    near(sharp.sum(2), torch.ones(4, 2000))
    alpha = zskd.concentrations(zskd.class_similarity(weight), 1.0)
    near(smooth.mean(1), alpha / alpha.sum(1, keepdim=True), 0.03)
    assert sharp.min() >= 0 and sharp.amax(2).mean() > smooth.amax(2).mean() + 0.1


def test_zskd_fits_impressions_to_their_targets_and_trains_the_student_alone():
    teacher, student, data = tiny_networks()
    before, losses = [weights_of(network) for network in (teacher, student)], []
    for steps in (1, 40):
        settings = tiny_settings(zskd, synthesis_steps=steps, temperature=1.0)
        pixels, targets = zskd.distill(teacher, student, data, settings)
        with common.frozen(teacher):
            losses.append(zskd.soft_ce_loss(teacher(common.normalize(pixels, data)), targets, 1.0))
    assert losses[1] < losses[0] - 0.1 and len(pixels) == 20 and 0 <= pixels.min() <= pixels.max() <= 1
    assert equal(before[0], weights_of(teacher)) and not equal(before[1], weights_of(student))
    near(zskd.moved(pixels, 0.0), pixels)                      # strength 0 moves nothing
    assert (zskd.moved(pixels, 1.0) - pixels).abs().mean() > 0.05


def test_zskds_script_and_its_pool(teacher_file, capsys):
    assert "at least one a class" in refused(zskd, tiny_args(zskd, teacher_file, impressions=3), capsys)
    one, two = (zskd.main([*tiny_args(zskd, teacher_file), "--out", out]) or rows_of(out) for out in "12")
    one, two = ([row for row in rows if "text" not in row] for rows in (one, two))
    assert [row["event"] for row in one] == ["start", "pool", "epoch", "epoch", "end"]
    assert one[1] == two[1] and one[1]["path"] == "checkpoints/toy.zskd-seed0"
    assert [row["event"] for row in rows_of(one[1]["path"])] == ["start", *["round"] * 3, "end"]
    assert one[-1]["student_acc_last"] == two[-1]["student_acc_last"]
    assert one[-2]["teacher_queries"] == two[-2]["teacher_queries"] == 3 * 20 + 2 * 20


def saved_by_upsampling(module, shape, forward_only):
    """GFLOP of two images: what a generator takes more when it enlarges its maps first."""
    if not hasattr(module, "Generator"):
        return 0
    counts, length = [], module.PRESETS["mnist" if shape[0] == 1 else "cifar10"].settings.latent_dim
    for build in (lambda *args: throughput.theirs(module.Generator, torch.nn.Linear(1, 1), *args),
                  module.Generator):
        with FlopCounterMode(display=False) as mode:
            images = build(length, shape)(torch.randn(2, length))
            forward = mode.get_total_flops()
            images.sum().backward()
        counts.append(mode.get_total_flops() + forward_only * forward)
    return (counts[0] - counts[1]) / 1e9


# `wasted`: passes whose weight gradients nobody reads, in the first phase; csd: and its head's
@pytest.mark.slow
@pytest.mark.parametrize("name, wasted", [*zip(throughput.METHODS, (5, 1, 1, 1, 1, 2))])
def test_throughput_times_both_orders_of_work_and_counts_them(name, wasted, in_tmp, monkeypatch):
    network, shape = ("lenet5", (1, 32, 32)) if name == "dafl-mnist" else ("wrn10_1", (3, 32, 32))
    method = throughput.METHODS[name]._replace(networks=(network, network))
    monkeypatch.setitem(throughput.METHODS, name, method)
    first, few = [*method.images][0], dict.fromkeys(method.images, 2)
    if name in ("csd", "dafl-mnist"):
        throughput.main(["--method", name, "--laps", "1", "--batch-size", "2", "--log", "log.jsonl"])
        assert [row["variant"] for row in rows_of(".") if row[first]["fraction"] > 0] == ["authors", "here"]
    if name == "dafl-mnist":
        monkeypatch.setattr(throughput, "in_bf16", (in_bf16 := []).append)
        throughput.main("--method dafl-mnist --laps 1 --batch-size 2 --precision bf16 --log bf16".split())
        assert len(in_bf16) == 2 and '"variant": "authors, in fp32"' in open("bf16").read()
    authors, here = (throughput.gflop(method, variant, few, torch.device("cpu"), scored=False)
                     for variant in ("authors", "here"))
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        common.build_model(network, 10, shape).eval()(torch.zeros(2, *shape))
    wasted *= mode.get_total_flops() / 1e9         # weight gradients take as much as the forward pass
    wasted += saved_by_upsampling(method.module, shape, forward_only=10 if name == "cudfkd" else 0)
    assert authors.pop(first) - here.pop(first) == pytest.approx(wasted, rel=1e-3 if name == "csd" else 1e-6)
    assert name != "csd" or here == pytest.approx(authors, rel=1e-3)           # the student's step: as much


@pytest.mark.parametrize("method, flags", [(plain_inversion, "--visits 1"), (surrogate_kd, "--visits 2"), *(
    (method, "") for method in METHODS if method is not regulated_kd)])
def test_costs_are_those_of_a_real_run(method, flags, teacher_file, in_tmp):
    """The teacher queries to the last image, the FLOPs but for those of probes and scores."""
    args = [*tiny_args(method, teacher_file), "--eval-every", "2", *flags.split()]
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as mode:
        for module in (common, running):
            patch.setattr(module, "check_answers", lambda *args, **more: None)
        patch.setattr(running, "predict", lambda model, images, data: torch.zeros(len(images.pixels), 10))
        patch.setattr(surrogate_kd, "inspect_surrogate", lambda *args: dict(
            evenness=1.0, evenness_augmented=1.0, confidence=1.0, class_share=[0.1] * 10))
        method.main([*args, "--out", "out", *["--no-ramp", "--adversarial-start", "1"] * (method is cudfkd)])
    row = costs.cost(shlex.join([f"{method.__name__}.py", *args]))
    assert row["queries"] == rows_of("out")[-1]["teacher_queries"] > 0
    assert row["pflop"] * 1e15 == pytest.approx(mode.get_total_flops(), rel=0.1)
    assert row["memory_gb"] >= 0 and set(row["phases"]) <= {"bank", "pool", "synthesis", "distillation"}


def test_a_commands_cost_is_refused_as_the_script_refuses_it(in_tmp, capsys):
    assert "choose from" in refused(costs, ["csd.py --preset nothing"], capsys)
    assert "none of csd.py" in refused(costs, ["ls"], capsys)
    costs.main(["dafl.py --preset mnist", "--log", "log.jsonl"])
    assert rows_of(".")[0]["queries"] == 200 * 120 * 512       # 24,000 steps of 512 images


def test_the_committed_costs_are_of_the_presets_as_they_are():
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/costs.jsonl").read_text().splitlines()]
    for command, row in zip(costs.every_command(), rows, strict=True):
        module, options, settings, _ = costs.planned(command)
        images = getattr(settings, "pool_images", costs.images_of(options))
        planned = {phase: [*found] for phase, found in costs.phases_of(module, settings, images).items()}
        assert {phase: [each["steps"], each["images"]] for phase, each in row["phases"].items()} == {
            phase: found for phase, found in planned.items() if found[0]}, command


@pytest.mark.slow
def test_a_race_skips_what_is_logged_and_logs_what_has_ended(teacher_file, in_tmp, monkeypatch, capsys):
    (in_tmp / "results").mkdir()
    monkeypatch.setattr(race, "ROOT", in_tmp)
    monkeypatch.setattr(race.table, "RESULTS", in_tmp / "results")
    read = race.table.read
    monkeypatch.setattr(race.table, "read", lambda: read(in_tmp / "results"))
    commands = {row: shlex.join([str(ROOT / f"{method.__name__}.py"), *tiny_args(method, teacher_file)])
                for row, method in dict(a=dafl, b=dafl, c=plain_inversion).items()}
    monkeypatch.setattr(race, "RACES", {"toy": commands})
    monkeypatch.setattr(race, "TEACHERS", {"toy": ("digits", "toy")})
    assert "python common.py --model toy --dataset digits" in refused(race, ["toy"], capsys)
    (in_tmp / "benchmarks" / "teachers").mkdir(parents=True)
    shutil.copy(teacher_file, in_tmp / "benchmarks/teachers/digits_toy.pt")
    race.main(["toy", "--seeds", "0", "--only", "a", "--jobs", "2"])
    assert "last epoch: student" in (in_tmp / "runs/race-toy/a-seed0.txt").read_text()
    dafl.main([*tiny_args(dafl, teacher_file), "--out", "runs/race-toy/b-seed0"])    # ended, but not logged
    race.main(["toy", "--seeds", "0"])
    capsys.readouterr()
    race.main(["toy", "--seeds", "0", "--list"])
    assert capsys.readouterr().out.count("finished") == 3
    with pytest.MonkeyPatch.context() as patch:                # its preset is another one since
        digits = dafl.PRESETS["digits"]
        patch.setitem(dafl.PRESETS, "digits", digits._replace(
            settings=dataclasses.replace(digits.settings, act=7.0)))
        race.table.presets_of.cache_clear()
        race.main(["toy", "--seeds", "0", "--list"])
        assert capsys.readouterr().out.count("finished") == 1
    race.table.presets_of.cache_clear()
    logged = [json.loads(line) for line in (in_tmp / "results/race-toy.jsonl").read_text().splitlines()]
    events = [row["event"] for row in logged if "text" not in row]           # but for notes and warnings
    assert events == [*2 * ["start", "epoch", "epoch", "end"], "start", "round", "round", "end",
                      "start", "bank", "epoch", "epoch", "end"]              # the bank's own log comes first
    assert (in_tmp / "checkpoints/race-toy/c-seed0/result.pt").exists() and len(race.table.read()[0]) == 3
    assert "has no row d" in refused(race, ["toy", "--only", "d"], capsys)


def test_gpu_refuses_in_a_sentence_and_lists_its_jobs(in_tmp, capsys):
    assert "no CUDA device" in refused(gpu, [], capsys)
    (in_tmp / "gpu").mkdir()
    (in_tmp / "gpu" / "what.json").write_text('{"rehearse": false}')
    assert "gpu was made with rehearse = False" in refused(gpu, ["--rehearse"], capsys)
    gpu.main(["--list"])
    listed = capsys.readouterr().out
    assert listed.count("to do") == len(gpu.jobs(in_tmp, False)) > 15 and "csd-resnets-fifth" in listed
    for job in gpu.jobs(in_tmp, False):                        # the scripts take every command
        if job.makes.name == "log.jsonl":
            words = job.command[:job.command.index("--out")]
            words = [word for word in words if word not in ("--precision", "bf16")]
            if "--teacher" in words:
                words[words.index("--teacher") + 1] = job.networks[0]
            _, options, *_ = costs.planned(words)
            assert (options.teacher, options.student) == job.networks
    commands = [tuple(job.command) for job in gpu.jobs(in_tmp, False)]
    assert len(set(commands)) == len(commands)


@pytest.mark.slow
def test_gpus_list_from_start_to_end_on_a_cpu_in_two_parts(in_tmp, capfd):
    gpu.main(["--rehearse", "--minutes", "0.6"])
    assert "the time is over" in capfd.readouterr().out
    gpu.main(["--rehearse", "--minutes", "15"])
    printed = capfd.readouterr().out.splitlines()
    names = [job.name for job in gpu.jobs(in_tmp, True)]
    assert [line.split() for line in printed[-len(names):]] == [["done", name] for name in names]
    for name in ("csd-wrn", "plain_inversion-resnets"):
        assert f"{name}: about" in "".join(printed) and (in_tmp / "gpu/runs" / name / "student.pt").exists()
    assert len([row for row in rows_of("gpu/runs/cudfkd-resnets") if row["event"] == "epoch"]) in (1, 2)


def test_the_time_in_which_a_kernel_runs_counts_overlapping_kernels_once():
    def event(start, end, device=DeviceType.CUDA):
        return SimpleNamespace(device_type=device, time_range=SimpleNamespace(start=start, end=end))
    events = [event(0, 10), event(5, 20), event(6, 8), event(30, 40), event(0, 99, DeviceType.CPU)]
    assert busy.busy_seconds(events) == (30e-6, 4)


@pytest.mark.slow
def test_busy_times_every_method_on_a_cpu(in_tmp, capsys):
    busy.main(["--networks", "wrn10_1", "wrn10_1", "--images", "2", "--log", "log.jsonl", "--device", "cpu"])
    rows = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == [module.__name__ for module in costs.MODULES]
    assert all(phase["milliseconds"] > 0 and phase["busy"] is None
               for row in rows for phase in row["phases"].values())
    assert {*rows[0]["phases"]} == {"synthesis", "distillation"} and "ms a step" in capsys.readouterr().out


def test_pictures_of_finished_runs(teacher_file, in_tmp, capsys, monkeypatch):
    for method in (cudfkd, regulated_kd):
        method.main([*tiny_args(method, teacher_file), "--out", method.__name__])
    plain = ["--plain-teacher", "--out", "plain"]
    regulated_kd.main([*tiny_args(regulated_kd, teacher_file), *plain])
    for command in ("curriculum cudfkd", "regulation regulated_kd", "regulation plain",
                    "side-by-side cudfkd regulated_kd"):
        pictures.main([*command.split(), "--out", "picture.png"])
        assert min(Image.open("picture.png").size) > 350
    medians = [row["difficulty"][2] for row in rows_of("cudfkd") if row["event"] == "epoch"]
    assert list(pictures.curriculum("cudfkd").axes[0].lines[0].get_ydata()) == medians
    student, teacher = pictures.regulation("regulated_kd").axes[0].lines     # the teacher's: in its folder
    path = next(row["path"] for row in rows_of("regulated_kd") if row["event"] == "significance")
    for line, folder, event in ((student, "regulated_kd", "epoch"), (teacher, path, "round")):
        near(line.get_ydata(), [100 * row["share"] for row in rows_of(folder) if row["event"] == event])
    assert len(pictures.regulation("plain").axes[0].lines) == 1
    for command, said in (("curriculum regulated_kd", "no run of cudfkd"), ("regulation cudfkd", "not of"),
                          ("curriculum nowhere", "not a runs log"), ("regulation a b", "draws one run"),
                          ("race cudfkd", "no races"), ("curriculum", "needs a run"),
                          ("score a", "name no run")):
        assert said in refused(pictures, [*command.split(), "--out", "no.png"], capsys)


def test_the_figure_of_a_race_names_each_line_at_its_end(teacher_file, in_tmp, capsys, monkeypatch):
    runs = {"a-seed0": cudfkd, "a-seed1": cudfkd, "b-seed0": regulated_kd, "c-seed0": rdskd}
    for name, method in runs.items():
        method.main([*tiny_args(method, teacher_file), "--out", f"runs/race-toy/{name}"])
    logs = [(in_tmp / "runs/race-toy" / name / "log.jsonl").read_text() for name in runs]
    stage = next(row["path"] for row in rows_of("runs/race-toy/c-seed0") if row["event"] == "generator")
    (in_tmp / "race.jsonl").write_text("".join([*logs, (in_tmp / stage / "log.jsonl").read_text()]))
    lines = pictures.scores_of("race.jsonl")
    assert {name: len(runs) for name, runs in lines.items()} == {"a": 2, "b": 1, "c": 1}
    last = rows_of("runs/race-toy/c-seed0")[-1]
    near(lines["c"][0][-1], [last["teacher_queries"], 100 * last["student_acc_last"]])
    assert [text.get_text() for text in pictures.race("race.jsonl").axes[0].texts] == [*lines]
    monkeypatch.setitem(pictures.LINES, "toy", {"c": "RDSKD"})               # of a known race, what is named
    assert [*pictures.scores_of("race.jsonl")] == ["RDSKD"]
    (in_tmp / "begun.jsonl").write_text(logs[0].splitlines()[0])
    assert "without a scored" in refused(pictures, ["race", "begun.jsonl", "--out", "no.png"], capsys)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_no_name_in_a_races_figure_is_cut_off_or_covers_another(name, in_tmp):
    log = f"{ROOT}/benchmarks/results/race-{name}.jsonl"
    pictures.main(["race", log, "--out", "picture.png"])
    picture = ImageOps.invert(Image.open("picture.png").convert("L"))
    assert picture.getbbox()[2] < picture.width
    figure = pictures.race(log)
    figure.canvas.draw()
    texts = figure.axes[0].texts
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert all(one.y1 <= other.y0 + 1 for one, other in zip(boxes, boxes[1:]))
    assert len(texts) == len(pictures.LINES[name]) == 8
    assert {text.get_text() for text in texts} == {*pictures.LINES[name].values()}


def test_the_figure_of_the_score_has_every_student_and_open_circles_for_drawn_pictures():
    teachers = {name: group for name, group in table.drawn_students(*table.read()).items()
                if len(group) >= 3 and not name[0].endswith("-val")}
    axes = pictures.score().axes
    points = [line for panel in axes for line in panel.lines if len(line.get_xdata())]
    students = [student for group in teachers.values() for student in group.values()]
    assert sorted((line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() == "none")
                  for line in points) == sorted((100 * drawn, 100 * accuracy, computed)
                                                for computed, accuracy, drawn in students)
    many = [group for group in teachers.values() if len(group) >= 10]
    assert len(axes) == len(many) + 1 and any(computed for computed, *_ in students)
    names = [text.get_text() for panel in axes for text in panel.get_legend().texts]
    assert len({*names}) == len(names) == len(teachers) and any("mnist, lenet5" in name for name in names)


def test_side_by_side_names_methods_or_the_teachers_of_one_method(teacher_file, in_tmp, monkeypatch):
    from PIL import ImageDraw
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, at, text, **more: drawn.append(text))
    (in_tmp / "other.pt").write_bytes(Path(teacher_file).read_bytes())
    for method, teacher, out in ((dafl, teacher_file, "a"), (dafl, "other.pt", "b"),
                                 (rdskd, teacher_file, "c")):
        method.main([*tiny_args(method, teacher), "--out", out])
    drawn.clear(), pictures.side_by_side(["a", "c"])
    assert drawn == ["dafl", "rdskd"]
    drawn.clear(), pictures.side_by_side(["a", "b"])
    assert drawn == [Path(teacher_file).stem, "other"]
    Path("c").rename("row-c"), Path("a").rename("row-a")
    monkeypatch.setattr(pictures, "read_log", lambda run: [rows_of("row-a")[0]])          # of one teacher
    drawn.clear(), pictures.side_by_side(["row-a", "row-c"])
    assert drawn == ["a", "c"]


def test_numbers_are_moved_apart_as_little_as_needed():
    near(pictures.apart([0.9, 0.1, 0.5], 0.05), [0.9, 0.1, 0.5])
    near(pictures.apart([0.5, 0.5, 0.1], 0.1), [0.45, 0.55, 0.1])
    near(pictures.apart([0.3, 0.2, 0.25, 0.12], 0.1), [0.3675, 0.1675, 0.2675, 0.0675])


def test_rules_for_an_epoch_look_at_what_was_kept_and_name_one_each(teacher_file, in_tmp, capsys):
    for method, more in ((cudfkd, ["--keep-epochs"]), (dafl, []), (regulated_kd, [])):
        method.main([*tiny_args(method, teacher_file, epochs=3), *more, "--out", method.__name__])
    epochs.main(["cudfkd", "regulated_kd", "--log", "log.jsonl"])
    row, = rows_of(".")
    scores = [each["student_acc"] for each in rows_of("cudfkd") if each["event"] == "epoch"]
    assert row["student_acc"] == scores and row["chosen"]["last"] == 2
    assert {*row["chosen"]} == {"last", "kd-loss", "agreement", "agreement-leaves", "balanced",
                               "balanced-leaves", "entropy", "bn-distance"}
    for rule, values in row["measures"].items():
        assert len(values) == 3 and values[row["chosen"][rule]] == max(values)
    teacher, data = epochs.load(str(teacher_file))
    student, _ = epochs.load("cudfkd/student.pt")                    # the last epoch's student is student.pt
    leaves = common.drawn_pictures(data).pixels
    assert leaves.shape == (2000, *data.image_shape)
    answers = [common.predict(net, common.ImageSet(leaves, None), data) for net in (student, teacher)]
    assert row["measures"]["agreement-leaves"][-1] == common.agreement(*answers)
    assert row["measures"]["balanced-leaves"][-1] == common.balanced_agreement(*answers)
    line, *_ = [line for line in table.epochs_table([row]) if line["rule"] == "last"]
    assert line["points over the last epoch"] == "0.00" and line["runs better, same, worse"] == "0, 1, 0"
    assert "no finished run" in refused(epochs, ["dafl"], capsys)


@pytest.mark.slow
def test_throughput_of_surrogate_kd_is_pictures_a_second(in_tmp):
    throughput.main(["--method", "surrogate_kd", "--laps", "1", "--log", "log.jsonl"])
    assert [row["generator"] for row in rows_of(".")] == [*surrogate_kd.GENERATORS]
