"""experiment=randomwalks_ppo: from random weights to shortest paths, and what a short one leaves behind."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest

from rlhf_exp.data.randomwalks import graph_of, optimality, walks_of
from rlhf_exp.schema import RandomWalks

SHORT = (
    "experiment=randomwalks_ppo",
    "tracking=none",
    "ppo.steps=12",
    "ppo.save_every=6",
    "ppo.batch_size=64",
    "eval.samples_per_prompt=10",
    "upstream.sft.train.steps=80",
)


def evaluation(cli, tmp_path) -> dict:
    (folder,) = cli.runs(tmp_path / "out", "eval")
    return json.loads((folder / "eval.json").read_text())


def test_a_short_one_learns(cli, tmp_path):
    result = cli.call(*SHORT, f"output_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    whole = evaluation(cli, tmp_path)
    found, data = whole["policies"], whole["data"]["metrics"]
    assert [policy["step"] for policy in found] == [0, 6, 12]
    first, last = found[0]["metrics"], found[-1]["metrics"]
    graph, walks = graph_of(RandomWalks()), walks_of(RandomWalks())
    assert data["reward"] == pytest.approx(sum(optimality(graph, walk) for walk in walks) / 1000)
    assert data["reward"] == pytest.approx(0.3515, abs=1e-4) and data["answers"] == 1000
    (row,) = (line.split() for line in result.out.splitlines() if line.startswith(" data "))
    assert row[:5] == ["data", "0.35", "±0.03", "–", "–"]  # no greedy answers, no KL
    assert first["reward"] < 0.45  # of the walks that it imitates
    assert last["reward"] > first["reward"] + 0.2
    assert last["greedy_reward"] > 0.6
    assert "gold" not in last
    assert "greedy" in result.out  # the table has the column


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_start_node_is_solved(cli, tmp_path, seed):
    """Greedy answers are shortest walks from each of the 20 nodes, sampled ones nearly so; pretraining included."""
    started = time.process_time()
    result = cli.call(
        "experiment=randomwalks_ppo", "tracking=none", f"seed={seed}", f"output_dir={tmp_path / 'out'}",
        "eval.samples=20",
    )  # fmt: skip
    seconds = time.process_time() - started
    assert result.code == 0, result.err
    found = evaluation(cli, tmp_path)
    graph = graph_of(RandomWalks())
    before, after = found["policies"][0]["metrics"], found["policies"][-1]["metrics"]
    walks = walks_of(RandomWalks())
    imitated = sum(optimality(graph, walk) for walk in walks) / len(walks)
    assert before["reward"] == pytest.approx(imitated, abs=0.06)
    assert after["greedy_reward"] == 1.0
    assert after["reward"] >= 0.95
    last = found["policies"][-1]["name"]
    answers = {sample["prompt"]: sample["responses"][last]["greedy"] for sample in found["samples"]}
    assert sorted(answers) == list("bcdefghijklmnopqrstu")
    for start, answer in answers.items():
        nodes = [ord(letter) - ord("a") for letter in start + answer]
        assert nodes[-1] == 0 and len(nodes) == graph.shortest[nodes[0]]
        assert all(b in graph.successors[a] for a, b in pairwise(nodes))
    assert seconds < 80  # of one core: three seeds in four minutes, one after the other
