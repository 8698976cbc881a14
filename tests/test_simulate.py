"""The simulator against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlhf_exp import simulate
from rlhf_exp.simulate import Job, Link, Part

LINK = Link(bandwidth=1e9, latency=1e-3)


def test_rings_by_hand():
    """4 ranks, 8 GB: each sends 3 shares of 2 GB at 1 GB/s, and waits three times; a reduce does so twice."""
    assert LINK.all_gather(8e9, 4) == pytest.approx(6 + 0.003)
    assert LINK.all_reduce(8e9, 4) == pytest.approx(12 + 0.006)
    assert LINK.all_reduce(8e9, 1) == 0


def test_a_part_is_fitted_through_two_runs():
    assert simulate.fitted([(10, 5.0)]) == Part(0.0, 0.5)
    # 3 s and 0.2 s a row
    assert simulate.fitted([(10, 5.0), (20, 7.0)]).seconds(40) == pytest.approx(11.0)
    # a part that takes no longer, or grows faster than its rows, has no negative share
    assert simulate.fitted([(10, 5.0), (20, 5.0)]) == Part(5.0, 0.0)
    assert simulate.fitted([(10, 5.0), (20, 20.0)]) == Part(0.0, 0.5)


def test_an_iteration_on_four_ranks():
    """30 rows are 8 on the fullest rank. Two optimiser steps reduce 1 GB each."""
    parts = {"rollout": Part(1.0, 0.1), "score": Part(0.0, 0.2), "update": Part(0.0, 1.0)}
    job = Job(rows=30, micro=4, steps=2, epochs=2, trained=1e9, base=10e9, layers=5)
    alone = simulate.simulate(parts, job, LINK, "ddp", 1)
    assert (alone.total, alone.sent) == (pytest.approx(1 + 3 + 6 + 30), 0)
    four = simulate.simulate(parts, job, LINK, "ddp", 4)
    assert four.parts == {
        "rollout": pytest.approx(1.8),
        "score": pytest.approx(1.6),
        "update": pytest.approx(8.0),
    }
    assert four.sending == pytest.approx(2 * (1.5 + 0.006))
    assert four.sent == pytest.approx(2 * 1.5e9)
    sharded = simulate.simulate(parts, job, LINK, "zero2", 4)
    # DeepSpeed reduces once more, and gathers what each rank has stepped
    assert sharded.sending == pytest.approx(2 * (2 * (1.5 + 0.006) + 0.75 + 0.003))
    assert sharded.sent == pytest.approx(2 * 3.75e9)
    # 8 rows are 2 micro-batches: each 2 epochs of forward and backward, and 3 forwards; and the rollout's gather
    assert job.passes(4) == 2 * (2 * 2 + 3)
    gathered = simulate.simulate(parts, job, LINK, "zero3", 4)
    assert gathered.sending == pytest.approx(sharded.sending + 15 * 5 * (0.75 * 2 + 0.003))
    assert gathered.sent == pytest.approx(sharded.sent + 15 * 7.5e9)


def write_run(folder: Path, rows: int, seconds: list[float]) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(1000))
    (folder / "head").mkdir()
    (folder / "head" / "head.safetensors").write_bytes(bytes(24))
    ppo = {
        "batch_size": rows // 2,
        "samples_per_prompt": 2,
        "epochs": 4,
        "minibatches": 1,
        "micro_batch_size": 0,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"ppo": ppo}))
    times = [{"step": i + 1, **{f"time/{name}": x for name in simulate.PARTS}} for i, x in enumerate(seconds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    return folder


def test_a_run_is_read_without_its_first_iteration(tmp_path):
    folder = write_run(tmp_path / "a", 8, [9.0, 2.0, 4.0])
    rows, means, config = simulate.read(folder)
    assert (rows, means) == (8, dict.fromkeys(simulate.PARTS, 3.0))
    job = simulate.job_of(folder, config, rows, 0.0, 1)
    assert (job.trained, job.steps, job.micro) == (1024, 4, 8)


def test_the_table_of_a_run(tmp_path, capsys):
    """9 s on one rank; on two 4.5 s, and all but nothing is sent."""
    folder = write_run(tmp_path / "a", 8, [9.0, 2.0, 4.0])
    assert simulate.main([str(folder), "--ranks", "1", "2", "--latency", "0"]) == 0
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("ddp")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0][:8] == ["ddp", "1", "3", "3", "3", "0", "9", "1.00"]
    assert cells[1][1:5] == ["2", "1.5", "1.5", "1.5"]
    assert cells[1][6:8] == ["4.5", "2.00"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "is no run folder"),
        (["a", "--strategies", "zero3"], "say with --base-gb"),
        (["a", "b"], "both runs have 8 answers an iteration"),
        (["a", "--ranks", "2", "0"], "--ranks must be more than 0, got 0"),
        (["a", "--rows", "0"], "--rows must be more than 0, got 0"),
        (["a", "--layers", "0", "--strategies", "zero3", "--base-gb", "1"], "--layers must be more than 0"),
        (["a", "--bandwidth", "0"], "--bandwidth must be more than 0"),
        (["a", "--base-gb", "-1"], "must be at least 0"),
        (["empty"], "no PPO run with an iteration"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", 8, [1.0])
    write_run(tmp_path / "b", 8, [1.0])
    write_run(tmp_path / "empty", 8, [])
    assert simulate.main(words) == 2
    found = capsys.readouterr().err.splitlines()
    assert len(found) == 1
    assert said in found[0]
