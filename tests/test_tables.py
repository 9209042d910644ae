"""benchmarks/table.py: what shares a row of a table, and that the page shows what the logs say."""
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import table  # noqa: E402

OLD = table.RESULTS / "c07d91b"


@pytest.fixture(scope="module")
def runs():
    return table.read()[0]


def test_old_logs_are_grouped_as_the_old_code_grouped_them(runs):
    """groups.json holds the groups that c07d91b's own table.py made, caught while it ran."""
    frozen = json.loads((OLD / "groups.json").read_text())
    found = table.grouped([run for run in runs if run[0]["made"] == OLD.name])
    assert len(frozen) == 70 and sum(len(seeds) for *_, seeds, _ in frozen) == 196
    assert sorted(frozen) == sorted([
        group.method, group.preset, " ".join(flag for _, flag in group.changed), *group.networks.split(" → "),
        [run[0]["arguments"]["seed"] for run in same], table.of_end(same)] for group, same in found.items())


@pytest.mark.parametrize("page, flags", [(table.PAGE, []), (table.FRONT, ["--front"])])
def test_the_pages_hold_word_for_word_what_the_script_prints(capsys, page, flags):
    table.main(flags)
    printed = capsys.readouterr().out
    marker = " ".join([f"<!-- {'front' if flags else 'results'}: python benchmarks/table.py", *flags, "-->"])
    assert f"{marker}\n{printed}\n<!-- end -->" in page.read_text()


def test_committed_logs_are_whole():
    files = sorted(table.RESULTS.rglob("*.jsonl"))
    assert 0 < len(files) <= 30
    for path in files:
        inside = False                                         # a run that has not ended yet
        for row in map(json.loads, path.read_text().splitlines()):
            event = row.get("event")
            assert event or "variant" in row, path
            assert (event == "start") != inside or "variant" in row, path
            inside = inside and event != "end" or event == "start"
        assert not inside, path


def test_an_old_run_that_changes_one_setting_leaves_its_row(runs):
    seen = set()
    for start in (run[0] for run in runs if run[0]["made"] == OLD.name):
        arguments = start["arguments"]
        preset = table.OLD_PRESETS[OLD.name][start["method"]][arguments["preset"]]
        others = dict.fromkeys(("dataset", "device", "precision", "teacher", "student"))
        for name, usual in {**preset, **others}.items():
            value = not arguments[name] if isinstance(usual, bool) else f"{arguments[name]}0"
            value = arguments[name] + 1 if type(usual) in (int, float) else value
            ablation = {**start, "arguments": {**arguments, name: value}}
            assert table.group_of(ablation) != table.group_of(start), name
            seen.add((start["method"], name))
        reseeded = {**start, "arguments": {**arguments, "seed": 99, "out": "elsewhere"}}
        assert table.group_of(reseeded) == table.group_of(start)
    assert len(seen) > 150


def test_a_new_run_never_shares_a_row_with_an_old_one_or_with_an_ablation(monkeypatch):
    numbers = table.presets_of("csd")["digits"]

    def group(made="", commit="abc1234", **given):
        arguments = {"dataset": "digits", "preset": "digits", "teacher": "wrn16_2", "student": "wrn16_1",
                     "seed": 0, "device": "cpu", "precision": "fp32", **numbers, **given}
        start = dict(event="start", method="csd", arguments=arguments, commit=commit, made=made)
        return table.group_of(start)
    default = group()
    assert default == group(seed=1) == group(commit="") and not default.changed
    others = {group(csd=0.0), group(csd=0.0, adversarial=1.0), group(raw_head=True), group(csd=1e-9),
              group(csd=2e-9), group(device="cuda"), group(precision="bf16"), group(dataset="mnist"),
              group(student="wrn10_1"), group(made=OLD.name)}
    assert len(others) == 10 and default not in others
    old, other = (row._replace(made=OLD.name) for row in (default, group(raw_head=True)))
    assert [*table.of_now(dict.fromkeys([default, old, other]))] == [default, other]
    monkeypatch.setattr(table, "presets_of", lambda method: {"digits": {**numbers, "epochs": 99}})
    assert group().flags() == f"`--epochs {numbers['epochs']}`"      # made before its preset became another
    assert group(epochs=99).flags() == "-"


def test_a_race_takes_in_runs_beside_others_but_not_their_seconds(runs):
    of_cpu = next(run for run in runs if run[0]["arguments"]["preset"] == "mnist-cpu"
                  and not run[0]["changed"] and table.on_two_cores(run)
                  and not table.of_earlier_preset(run[0]))

    def copy(seed, machine, **given):
        start, *rows, end = of_cpu
        arguments = {**start["arguments"], "seed": seed, **given}
        return [{**start, "device": machine, "arguments": arguments}, *rows, {**end, "seconds": 1e6}]

    def rows(*more):
        return table.race_tables(table.grouped([of_cpu, *more]), [])["Race on mnist"]
    on_gpu = copy(7, "NVIDIA H200", device="cuda", precision="tf32")
    (alone,), (both,) = rows(), rows(on_gpu, copy(8, "AMD EPYC, 1 threads", threads=1))
    assert both["seeds"] == f"{alone['seeds']}, 7, 8"
    assert both["seconds of two cores"] == alone["seconds of two cores"]
    of_authors = [run for run in runs if "race-mnist/dafl-authors" in run[0]["arguments"]["out"]]
    assert len(rows(*of_authors, copy(7, "AMD EPYC, 2 threads", precision="bf16"))) == 3
