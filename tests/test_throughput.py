"""benchmarks/throughput.py counts what it says: the frozen step, the authors' waste, the share of scoring."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import models
import throughput

CPU = torch.device("cpu")


def forward_flops(name, images, channels=1):
    model = models.build_model(name, 10, (channels, 32, 32)).eval()
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model(torch.zeros(images, channels, 32, 32))
    return mode.get_total_flops()


def test_the_authors_of_dafl_do_the_same_work_plus_the_teachers_weight_gradients():
    variants = throughput.METHODS["dafl-mnist"][1]
    authors, here = (throughput.count_flops(variants[name], 8, CPU)["distillation"] for name in ("authors", "here"))
    # a layer's weight gradient takes as much as its forward pass
    assert authors[0] - here[0] == pytest.approx(forward_flops("lenet5", 8), rel=1e-6)
    scoring = 10_000 / 120 * 8 / 512 * forward_flops("lenet5_half", 64) / 64
    assert authors[1] - authors[0] == pytest.approx(scoring, rel=1e-6) and here[1] - here[0] == pytest.approx(scoring, rel=1e-6)


def test_a_run_prints_and_logs_both_variants(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    throughput.main(["--method", "dafl-mnist", "--laps", "1", "--batch-size", "4", "--threads", "2", "--log", str(log)])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["variant"] for row in rows] == ["authors", "here"]
    assert all(0 < row["distillation"]["fraction"] < 2 and row["distillation"]["gflop_done"] >= row["distillation"]["gflop"] for row in rows)
    assert "GFLOP frozen" in capsys.readouterr().out


def test_rdskds_laps_go_to_their_phases():
    variants = throughput.METHODS["rdskd"][1]
    authors, here = (throughput.count_flops(variants[name], 8, CPU) for name in ("authors", "here"))
    assert set(authors) == set(here) == {"synthesis", "distillation"}
    assert authors["distillation"][0] == here["distillation"][0]               # the same work but for graphs and scoring
    assert authors["synthesis"][0] > 1.2 * here["synthesis"][0] and authors["distillation"][1] > 1.2 * here["distillation"][1]


def test_the_authors_of_deepinversion_take_weight_gradients_that_nobody_reads():
    authors, here = (throughput.count_flops(throughput.METHODS["deepinversion"][1][name], 8, CPU)["synthesis"][0] for name in ("authors", "here"))
    assert authors - here == pytest.approx(forward_flops("resnet34", 8, 3), rel=1e-6)


def test_the_authors_of_cudfkd_take_weight_gradients_at_rest_and_ours_run_a_whole_round():
    authors, here = (throughput.count_flops(throughput.METHODS["cudfkd"][1][name], 8, CPU)["distillation"][0] for name in ("authors", "here"))
    wasted = forward_flops("wrn40_2", 8, 3) + forward_flops("wrn16_1", 8, 3)
    assert authors - here == pytest.approx(wasted, rel=1e-6)
    assert here > 11 * forward_flops("wrn40_2", 8, 3) + 30 * forward_flops("wrn16_1", 8, 3)


def test_every_generator_of_pictures_is_timed(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    throughput.main(["--method", "surrogate_kd", "--laps", "1", "--log", str(log)])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["generator"] for row in rows] == list(throughput.surrogate_kd.GENERATORS) and "1 threads" in rows[0]["device"]
    assert all(row["images_per_second"] > 1 and row["variant"] == "generation" for row in rows) and "images/s" in capsys.readouterr().out
