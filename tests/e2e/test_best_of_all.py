"""experiment=best_of_all with the tiny model to its end, sweep and report, as docs/best-of-all.md says one can."""

from __future__ import annotations

import csv
import json
import re

import pytest

SHORT = (
    "model=tiny",
    "model.dtype=float32",
    "threads=1",
    "tracking=none",
    "generation.max_new_tokens=6",
    "eval.prompts=4",
    "upstream.sft.train.steps=2",
    "upstream.reward.train.steps=2",
    "upstream.reward.reward={probes: 2}",
    "upstream.ppo.ppo={steps: 2, batch_size: 8, micro_batch_size: 8, epochs: 1, save_every: 1}",
    "upstream.ppo.generation.max_new_tokens=6",
    "upstream.rloo.ppo={batch_size: 2, samples_per_prompt: 4}",
    "upstream.dpo.train={steps: 2, batch_size: 4}",
    "upstream.rft.rft={samples: 2, prompts: 4, rounds: 2}",
    "upstream.rft.train={epochs: 1, batch_size: 4}",
    "upstream.rft.generation.max_new_tokens=6",
    "upstream.ilql.train={steps: 2, batch_size: 4}",
    "upstream.ilql.ilql.eval_prompts=2",
    "upstream.ilql.generation.max_new_tokens=6",
)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_experiment_and_its_report(cli, tmp_path):
    """Two seeds; each trains every algorithm once, evaluates all of them, and is a line of the report."""
    done = cli.call("experiment=best_of_all", *SHORT)
    assert done.code == 0, done.out + done.err
    out = tmp_path / "outputs" / "best_of_all"
    stages = {path.name: len(cli.runs(out, path.name)) for path in out.iterdir() if path.is_dir()}
    # ppo and rloo are of one stage
    expected = {"sft": 2, "reward": 2, "ppo": 4, "dpo": 2, "rft": 2, "ilql": 2, "eval": 2}
    assert {stage: count for stage, count in stages.items() if stage in expected} == expected
    for folder in cli.runs(out, "eval"):
        policies = json.loads((folder / "eval.json").read_text())["policies"]
        # without steps: ppo@2, "rloo (best: step 1)"
        assert {re.split(r"@| \(", policy["name"])[0] for policy in policies} == {
            *("sft", "ppo", "rloo", "dpo", "rft", "ilql:beta_0", "ilql:beta_0.25", "ilql:beta_1"),
            *(f"sft:best_of_{n}" for n in (2, 4, 8, 16)),
        }
        assert all({"gold", "reward", "kl"} <= set(policy["metrics"]) for policy in policies)

    done = cli.call("stage=report", "inputs=outputs/best_of_all", "tracking=none")
    assert done.code == 0, done.out + done.err
    (report,) = cli.runs(tmp_path / "outputs", "report")
    assert (report / "report" / "report.html").stat().st_size > 30_000
    with (report / "report" / "tables" / "trials.csv").open(encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert {trial["state"] for trial in trials} == {"FINISHED"}
    assert {trial["seed"] for trial in trials} == {"0", "1"}
