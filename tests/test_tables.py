"""benchmarks/table.py: what shares a row of a table, and that the pages show what the logs say."""
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import common
import dafl
import rdskd

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import race  # noqa: E402
import table  # noqa: E402

# of a run, but no settings: nothing in the tables depends on them, or they have a column of their own
OPTIONS = {"bank", "compile", "data_dir", "dataset", "deterministic", "device", "eval_every", "generator",
           "inspect_only", "keep_epochs", "out", "pictures", "pool", "precision", "preset", "resume",
           "significance", "student", "student_last_map", "synthesize_only", "teacher", "teacher_last_map",
           "threads"}
TEXTS = {name: (table.ROOT / "benchmarks" / name).read_text()
         for name in ("README.md", "DEPARTURES.md", "CLAIMS.md")}


@pytest.fixture(scope="module")
def runs():
    return table.read()[0]


# --------------------------------------------------------------------------------------------------- the logs
def test_committed_logs_are_whole():
    files = sorted(table.RESULTS.rglob("*.jsonl"))
    assert 0 < len(files) <= 30 and not [path for path in table.RESULTS.iterdir() if path.is_dir()]
    for path in files:
        inside = False                                         # a run that has not ended yet
        for row in map(json.loads, path.read_text().splitlines()):
            event = row.get("event")
            assert event or "variant" in row, path
            assert (event == "start") != inside or "variant" in row, path
            inside = inside and event != "end" or event == "start"
        assert not inside, path


def test_every_argument_in_the_logs_is_a_setting_or_known_to_be_none(runs):
    for run in runs:
        arguments, method = run[0]["arguments"], run[0]["method"]
        settings = table.presets_of(method)[arguments["preset"]]
        assert {*arguments} <= {*settings, *OPTIONS, "seed"}, arguments["out"]
        assert {*settings} - {*arguments} <= {*table.YOUNG, *table.GONE.get(method, {})}, arguments["out"]


def test_the_older_logs_are_those_that_the_page_names(runs):
    found = {}
    for group, same in table.grouped(runs).items():
        if group.older:
            names = found.setdefault((group.method, group.preset), [0, 0])
            names[0], names[1] = names[0] + 1, names[1] + len(same)
    assert found == {("regulated_kd", "fashion_mnist"): [8, 24], ("regulated_kd", "mnist"): [12, 50],
                     ("surrogate_kd", "mnist"): [23, 35], ("surrogate_kd", "mnist-real"): [3, 9],
                     ("zskd", "digits"): [1, 5]}


# --------------------------------------------------------------------------------------- what shares a row
def test_a_run_that_changes_one_setting_leaves_its_row(runs):
    seen = set()
    for start in (run[0] for run in runs):
        arguments, preset = start["arguments"], start["arguments"]["preset"]
        others = dict.fromkeys(("device", "precision", "teacher", "student"))
        for name, usual in {**table.presets_of(start["method"])[preset], **others}.items():
            if (start["method"], preset, name) in seen or name == "seed":
                continue
            given = arguments.get(name, usual)
            value = not given if isinstance(usual, bool) else f"{given}0"
            value = given + 1 if type(usual) in (int, float) else value
            changed = {**start, "arguments": {**arguments, name: value}}
            assert table.group_of(changed) != table.group_of(start), name
            seen.add((start["method"], preset, name))
        reseeded = {**start, "arguments": {**arguments, "seed": 99, "out": "elsewhere"}}
        assert table.group_of(reseeded) == table.group_of(start)
    assert len(seen) > 150


def start_of(given={}, method="csd", preset="digits", **more):
    numbers = table.presets_of(method)[preset]
    arguments = {"preset": preset, "teacher": "wrn16_2", "student": "wrn16_1", "seed": 0, "device": "cpu",
                 "precision": "fp32", "out": "runs/a", **numbers, **given}
    return dict(event="start", method=method, arguments=arguments, changed={}, device="AMD EPYC, 2 threads",
                **more)


def test_a_new_run_never_shares_a_row_with_an_older_one_or_with_an_ablation(monkeypatch):
    def group(older=False, **given):
        start = start_of(given)
        if older:
            del start["changed"]                               # logs of c07d91b have no such entry
        return table.group_of(start)
    default = group()
    assert default == group(seed=1) == group(out="elsewhere") and not default.changed
    others = {group(csd=0.0), group(csd=0.0, adversarial=1.0), group(raw_head=True), group(csd=1e-9),
              group(csd=2e-9), group(device="cuda"), group(precision="bf16"), group(dataset="mnist"),
              group(student="wrn10_1"), group(older=True)}
    assert len(others) == 10 and default not in others
    old, other = group(older=True), group(older=True, raw_head=True)
    assert [*table.of_now(dict.fromkeys([default, old, other]))] == [default, other]
    start, numbers = start_of(), table.presets_of("csd")["digits"]
    monkeypatch.setattr(table, "presets_of", lambda method: {"digits": {**numbers, "epochs": 99}})
    assert table.group_of(start).flags() == f"`--epochs {numbers['epochs']}`"  # its preset is another one now
    assert table.of_earlier_preset(start)


def test_a_race_takes_in_runs_beside_others_but_not_their_seconds(runs):
    of_cpu = next(run for run in runs if run[0]["arguments"]["preset"] == "mnist-cpu"
                  and not run[0]["changed"] and table.on_two_cores(run)
                  and not table.of_earlier_preset(run[0]))

    def copy(seed, machine, **given):
        start, *rows, end = of_cpu
        arguments = {**start["arguments"], "seed": seed, **given}
        return [{**start, "device": machine, "arguments": arguments}, *rows, {**end, "seconds": 1e6}]

    def rows(*more):
        return table.race_tables(table.grouped([of_cpu, *more]), [])["race on mnist"]
    on_gpu = copy(7, "NVIDIA H200", device="cuda", precision="tf32")
    (alone,), (both,) = rows(), rows(on_gpu, copy(8, "AMD EPYC, 1 threads", threads=1))
    assert both["seeds"] == f"{alone['seeds']}, 7, 8"
    assert both["seconds of two cores"] == alone["seconds of two cores"]
    of_authors = [run for run in runs if "race-mnist/dafl-authors" in run[0]["arguments"]["out"]]
    assert len(rows(*of_authors, copy(7, "AMD EPYC, 2 threads", precision="bf16"))) == 3


# ---------------------------------------------------------------------------------------- old names and forms
def test_logs_keep_their_old_names_and_are_shown_under_the_new_ones(runs):
    text = (table.RESULTS / "race-cifar10.jsonl").read_text()
    assert '"preset": "cifar10-cpu-plain"' in text and "plain_inversion" not in text
    plain = [run for run in runs if run[0]["method"] == "plain_inversion"]
    rows = {table.race_row(run[0])[1] for run in plain if table.race_row(run[0])}
    assert rows == {f"plain-inversion{more}" for more in (
        "", "-2h", "-bf16", "-2h-bf16", "-lenet5", "-own-kind", "-in-bf16", "-coarse", "-coarse-own-kind",
        "-two-photographs", "-hundred-photographs")}
    plain = [run for run in plain if run[0]["arguments"]["preset"] == "cifar10-cpu"
             and "-norm/" not in run[0]["arguments"]["out"]]
    assert len(plain) == 12 + 6
    new = start_of(method="plain_inversion", preset="cifar10-cpu",
                   given=dict(teacher=plain[0][0]["arguments"]["teacher"]))
    assert not table.group_of(new).changed and table.group_of(new) in {
        table.race_group(run[0]) for run in plain}             # a run of today shares the row
    assert table.as_now(plain[0][0]) == plain[0][0]            # what is in today's names stays


def test_a_flag_that_is_no_longer_there_is_shown_and_marked(runs):
    kept = [run for run in runs if table.race_row(run[0]) == ("cifar10-readings", "csd-kept")]
    assert len(kept) == 3 and {table.race_group(run[0]).flags() for run in kept} == {"`--keep-generator` ¹"}
    csd = next(run for run in runs if table.race_row(run[0]) == ("cifar10", "csd"))
    assert table.race_group(csd[0]).flags() == "-"             # older than the flag: it was off
    trial = next(run for run in runs if run[0]["arguments"]["out"] == "runs/trials/plain-inversion-b64")
    assert "--visits 1" in table.group_of(trial[0]).flags()    # older than the flag: its preset has 3 since


def test_a_stage_counts_in_both_forms_and_its_own_log_is_no_run(tmp_path):
    old = [{"event": "significance", "round": n, "seconds_training": 2.0} for n in range(3)]
    new = [{"event": "significance", "path": "x", "sha256": "1", "seconds": 7.0, "teacher_queries": 9}]
    for rows, total in ((old, "6"), (new, "7")):
        assert table.seconds_of([rows], "training", "significance") == total
    student = [start_of(), dict(event="bank", path="x", sha256="1", seconds=1.0, teacher_queries=2),
               dict(event="end", student_acc_last=0.5)]
    stage = [dict(event="start", method="csd", stage="bank", arguments=dict(bn=1.0)),
             dict(event="round", round=0), dict(event="end", seconds=1.0)]
    lines = "".join(json.dumps(row) + "\n" for row in [*stage, *student])
    (tmp_path / "log.jsonl").write_text(lines)
    (found,), measurements = table.read(tmp_path)
    assert found == student and not measurements
    pictures = dict(evenness=0.5, evenness_augmented=0.25, evenness_before=0.75)
    cells = []
    for before in ("", "relative_"):                           # the name until b9db535: relative_entropy
        named = {name.replace("evenness", "relative_entropy") if before else name: value
                 for name, value in pictures.items()}
        run = [start_of(method="surrogate_kd"), dict(event="surrogate", **named),
               dict(event="end", student_acc_last=0.5, teacher_acc=0.9, seconds=1.0)]
        line, = table.surrogate_table(table.grouped([run]))
        cells.append([line[name] for name in ("evenness of all pictures", "of those kept",
                                              "as training shows them")])
    assert cells == 2 * [["0.750", "0.500", "0.250"]]


# ------------------------------------------------------------------------------------------------- the pages
@pytest.mark.parametrize("page", ["PAGE", "FRONT"])
def test_the_pages_hold_word_for_word_what_the_script_makes(capsys, page):
    runs, measurements = table.read()
    tables = table.all_tables(runs, measurements)
    if page == "FRONT":
        tables = {"front": table.table(table.front_table(runs))}
    text = getattr(table, page).read_text()
    assert [title for _, title, _ in table.MARKERS.findall(text)] and {*tables} == {
        title for _, title, _ in table.MARKERS.findall(text)}
    assert table.filled(text, tables) == text
    table.main(["--front"] if page == "FRONT" else [])
    printed = capsys.readouterr().out
    assert all(each in printed for each in tables.values())


def test_the_front_page_has_ten_rows_with_one_result_a_cell(runs):
    rows, scores = [*table.front_table(runs)], []
    assert [*rows[0]] == ["file", "paper", "what it needs from you", "student, %", "more steps"]
    for file, _, _, score, longer in (row.values() for row in rows):
        assert (table.ROOT / re.match(r"\[`(\w+[.]py)`\]\(\1\)", file)[1]).exists()
        assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", cell) for cell in (score, longer) if cell), file
        scores.append(float(score.split()[0]))
    assert len(rows) <= 10 and scores == sorted(scores, reverse=True)


PUBLISHED = {"98.20", "98.91", "93.27", "95.34", "92.22", "74.47"}     # by papers and a toolbox, not by us
OLDER = {"75.18"}                                              # of a run whose log is at commit b9db535


@pytest.mark.parametrize("name", [*TEXTS])
def test_the_figures_of_a_page_stand_in_the_logs(name, runs):
    """Every mean with its deviation, and every accuracy with two digits after the point."""
    tables, which = table.PAGE.read_text(), ("student_acc_last", "student_acc_best")
    groups, merged = table.grouped(runs), {}
    for same in groups.values():
        merged.setdefault(table.race_group(same[0][0]), []).extend(same)
    groups = [*groups.values(), *merged.values()]
    spreads = {table.of_end(same, key, digits) for same in groups for key in which for digits in (1, 2)}
    spreads |= {*re.findall(r"\d+\.\d\d ± \d+\.\d\d", tables)}
    singles = {f"{100 * run[-1][key]:.2f}" for run in runs for key in which if run[-1].get(key) is not None}
    singles |= {*re.findall(r"\d\d\.\d\d", tables)} | PUBLISHED | OLDER
    singles |= {f"{100 * row['student_acc'][epoch]:.2f}" for row in table.read()[1]
                if row["variant"] == "epochs" and (row["method"], row["dataset"]) == ("dafl", "mnist")
                for epoch in row["chosen"].values()}
    text = " ".join(re.sub("```.*?```", "", TEXTS[name], flags=re.S).split())
    found = re.findall(r"\d+\.\d+ ± \d+\.\d+", text)
    assert {*found} <= spreads and (len(found) > 30 or name != "README.md")
    found = re.findall(r"(?<![\d.])\d\d\.\d\d(?![\d.])", re.sub(r"\d+\.\d+ ± \d+\.\d+", "", text))
    assert found and {*found} <= singles


# ------------------------------------------------------------------------------------------ foreign teachers
def run_of(out, accuracy, drawn=None, teacher="t", method="csd", **given):
    """A whole run with these ends."""
    start = {**start_of(dict(out=out, **given), method=method), "teacher_sha256": teacher}
    return [start, dict(event="end", student_acc_last=accuracy, teacher_acc=0.99, agreement_drawn=drawn)]


def test_the_table_of_foreign_teachers_is_sorted_by_the_worst_and_names_the_seeds():
    runs = [run_of(f"runs/race-{race}/{row}-seed{seed}", accuracy) for race, row, seed, accuracy in (
        ("mnist", "csd", 0, 0.9), ("mnist", "csd", 1, 0.8), ("mnist-mixer", "csd", 0, 0.4),
        ("mnist", "dafl", 0, 0.6), ("mnist-mixer", "dafl", 0, 0.5))]
    teachers = ["mnist", *table.foreign.GREY_RACES]
    runs += [run_of(f"runs/race-{race}/rdskd-seed0", 0.7, method="rdskd") for race in teachers]
    runs += [run_of(f"runs/race-{race}/zskd-seed0", 0.8) for race in teachers]
    runs.append(runs[0][:1])                                                 # a run that has just begun
    zskd, rdskd, dafl, csd, teacher = sorted(table.foreign_table(runs), key=lambda line: (
        line["worst teacher"] == "", line["worst teacher"] == "-", line["worst teacher"] != "**80.00**"))
    assert (zskd["row"], zskd["worst teacher"], zskd["mixer"]) == ("zskd", "**80.00**", "80.00 (1)")
    assert (rdskd["worst teacher"], dafl["worst teacher"], dafl["mixer"]) == ("**70.00**", "-", "50.00 (1)")
    assert (csd["worst teacher"], csd["lenet5, ours"], csd["wrn"]) == ("-", "85.00 ± 7.07 (2)", "-")
    assert (teacher["mixer"], teacher["wrn"]) == ("99.00", "99.00")
    assert [line["row"] for line in table.foreign_table(runs)][:2] == ["zskd", "rdskd"]
    foreign = [run for run in runs if "mixer" in run[0]["arguments"]["out"]]
    groups = table.grouped(foreign)
    assert groups and not table.race_tables(groups, []) and not groups       # they stand in this table alone


def test_students_of_their_teachers_own_kind_stand_beside_ours_and_colour_has_a_table_of_its_own():
    runs = [run_of(f"runs/race-{race}/{row}-seed0", accuracy, method="rdskd") for race, row, accuracy in (
        ("mnist", "rdskd", 0.98), ("mnist-wrn", "rdskd-own-kind", 0.9), ("cifar10", "csd", 0.7),
        ("cifar10-group-norm", "plain-inversion-coarse", 0.5),
        ("cifar10-layer-norm", "plain-inversion-coarse", 0.6))]
    usual, own = sorted(table.foreign_table(runs), key=lambda line: line["row"])[:2]
    assert (usual["row"], usual["lenet5, ours"], usual["wrn"]) == ("rdskd", "98.00 (1)", "-")
    assert (own["row"], own["lenet5, ours"], own["wrn"]) == ("rdskd-own-kind", "98.00 (1)", "90.00 (1)")
    colour = table.foreign_table(runs, "cifar10", "wrn16_2", table.foreign.COLOUR_RACES,
                                 ("csd", *table.FOR_COLOUR_TEACHERS))
    coarse, csd, teacher = map(tuple, map(dict.values, colour))
    assert coarse == ("plain-inversion-coarse", "**50.00**", "-", "50.00 (1)", "60.00 (1)")
    assert csd == ("csd", "-", "70.00 (1)", "-", "-") and teacher[0] == "the teacher itself"


@pytest.mark.parametrize("race", table.foreign.OWN_KIND)
def test_a_student_of_its_teachers_own_kind_takes_the_same_images_and_is_not_larger(race):
    dataset, teacher = table.foreign.RACES[race]
    shape = common.DATASETS[dataset.removesuffix("-val")].image_shape
    if "digit_recognizer" in teacher:                  # it is another package's, with 390,410 weights
        teacher = nn.Linear(390_410, 1, bias=False)
    else:
        teacher = common.build_model(teacher, 10, shape)
    student = common.build_model(table.foreign.OWN_KIND[race], 10, shape)
    assert student(torch.rand(2, *shape)).shape == (2, 10)
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in (student, teacher)]
    assert sizes[0] < sizes[1] or race == "mnist-wrn" and sizes[0] == sizes[1]


def test_weights_of_losses_have_a_table_of_their_own():
    rows = [*race.RACES["mnist-weights"]]
    mine = [row for row in rows if row.startswith("dafl")]
    assert len(rows) == 21 and mine[0] == "dafl"
    assert race.RACES["mnist-weights"]["dafl-ie-x10"].endswith("--ie 50")
    for method, script in (("rdskd", rdskd), ("mskd", rdskd), ("dafl", dafl)):     # the preset's own numbers
        settings = script.PRESETS["mnist-cpu"].settings
        assert table.WEIGHTS[method] == {name: getattr(settings, name.replace("-", "_"))
                                         for name in table.WEIGHTS[method]}
    runs = [run_of(f"runs/race-mnist-weights/{row}-seed0", 0.9 - 0.1 * number, method="dafl")
            for number, row in enumerate(mine)] + [run_of("runs/race-mnist-weights/mskd-ie-x10-seed0", 0.5)]
    mskd, of_dafl = table.weights_table(runs)
    assert (mskd["ie x 10"], mskd["the preset's weights"], mskd["worst"]) == ("50.00", "-", "-")
    assert (of_dafl["the preset's weights"], of_dafl["oh x 0.1"], of_dafl["third x 10"]) == (
        "90.00", "80.00", "30.00")
    assert (of_dafl["worst"], of_dafl["deviation of the seven"]) == ("30.00", "21.60")
    groups = table.grouped(runs)
    assert groups and not table.race_tables(groups, []) and not groups


def test_scores_without_data_on_photographs_and_on_drawn_pictures():
    """Pairs are of two runs: here four, three of them five points apart. A repeated run counts once."""
    def row(out, *students, teacher="folder/mnist-val_net.pt", balanced=False):
        student_acc, leaves, pictures = zip(*students)
        measures = {"agreement-leaves": leaves, "agreement-pictures": pictures}
        if balanced:
            measures.update({"balanced-leaves": pictures, "balanced-pictures": leaves})
        return dict(variant="epochs", dataset="mnist", teacher=teacher, pictures="folder:x", out=out,
                    changed={}, student_acc=student_acc, chosen={}, measures=measures)
    rows = [row("a", (0.1, 0.9, 0.9)), row("a", (0.5, 0.6, 0.1), (0.6, 0.5, 0.3)),
            row("b", (0.62, 0.4, 0.2), (0.7, 0.3, 0.4))]
    alone, = table.photographs_table(rows)
    assert not [*table.epochs_table(rows)]
    assert (alone["teacher"], alone["runs"], alone["students"], alone["pairs"]) == ("net", 2, 4, 3)
    assert (alone["agreement on drawn pictures"], alone["agreement on photographs"]) == ("0 %", "100 %")
    assert alone["balanced, on drawn pictures"] == alone["balanced, on photographs"] == "-"
    rows += [row("c", (0.1, 0.5, 0.2), teacher="mine:other", balanced=True),
             row("d", (0.9, 0.4, 0.3), (0.12, 0.7, 0.1), teacher="mine:other", balanced=True)]
    first, other, whole = table.photographs_table(rows)
    assert first == alone
    assert (other["teacher"], other["agreement on drawn pictures"], other["balanced, on drawn pictures"]) == (
        "other", "0 %", "100 %")
    assert (whole["data set"], whole["runs"], whole["students"], whole["pairs"]) == ("all, grey", 2, 3, 1)
    assert whole["balanced, on drawn pictures"] == "100 %"
    assert (whole["closer pairs"], whole["balanced, drawn, there"]) == (1, "0 %")


def test_pairs_of_students_of_one_teacher():
    runs = [run_of("a", 0.5, 0.5), run_of("b", 0.6, 0.7), run_of("c", 0.62, 0.6), run_of("f", 0.7),
            run_of("d", 0.9, 0.1, "another teacher"),
            run_of("e", 0.99, 0.4, method="surrogate_kd", surrogate="leaves")]
    every, not_drawn = table.drawn_table(runs, [])
    assert (every["students"], every["pairs"], not_drawn["students"], not_drawn["pairs"]) == (4, 6, 3, 3)
    assert (not_drawn["the better one found"], not_drawn["pairs five points apart"]) == ("67 %", 2)
    assert (not_drawn["found there"], not_drawn["rank correlation"]) == ("100 %", "0.50")
