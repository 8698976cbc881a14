"""stage=ilql from the command line: what it stands on, leaves behind and refuses; random walks solved offline."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
from safetensors.torch import load_file

SHORT = (
    "stage=ilql",
    "model=tiny",
    "dataset=reviews",
    "model.dtype=float32",
    "threads=1",
    "tracking=none",
    "train={steps: 3, batch_size: 8, micro_batch_size: 4}",
    "ilql.betas=[0,2.5]",
    "ilql.eval_prompts=4",
    "generation.max_new_tokens=6",
    "upstream.sft={train: {steps: 2, batch_size: 8, micro_batch_size: 8}}",
)
LENGTH = ("reward_source=length",)
LIMIT = 180 * 2 / 3  # seconds of one core for a seed of the random walks


def metrics_of(folder) -> dict[str, float]:
    return json.loads((folder / "run.json").read_text())["metrics"]


def test_from_the_command_line(cli, tmp_path):
    """sft, then ilql; a second time nothing; other betas only ilql again; comparisons without a reward model."""
    output = f"output_dir={tmp_path / 'out'}"
    first = cli.call(*SHORT, *LENGTH, output)
    assert first.code == 0, first.err
    (folder,) = cli.runs(tmp_path / "out", "ilql")
    record = json.loads((folder / "run.json").read_text())
    assert set(record["inputs"]["parents"]) == {"sft"}
    assert set(record["inputs"]["data"]) == {"demonstrations"}
    assert not cli.runs(tmp_path / "out", "reward")
    metrics = record["metrics"]
    for beta in ("0", "2.5"):
        for name in ("reward", "reward_se", "greedy_reward", "length", "eos_rate"):
            assert f"eval/beta_{beta}/{name}" in metrics
    lines = cli.lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    wanted = {"ilql/q_loss", "ilql/v_loss", "ilql/cql_loss", "ilql/awac_loss", "ilql/loss", "ilql/grad_norm"}
    assert wanted | {"ilql/q_mean", "ilql/v_mean", "optim/lr", "tokens_per_second"} <= set(lines[0])
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert len(load_file(folder / "ilql" / "heads.safetensors")) == 4 * 4 + 4
    assert f"reward {metrics['eval/best_reward']:.4g}" in first.out

    again = cli.call(*SHORT, *LENGTH, output)
    assert again.code == 0 and "cached" in again.out
    assert len(cli.runs(tmp_path / "out", "ilql")) == 1
    other = cli.call(*SHORT, *LENGTH, output, "ilql.betas=[1]", "ilql.data=comparisons")
    assert other.code == 0, other.err
    assert len(cli.runs(tmp_path / "out", "sft")) == 1
    assert len(cli.runs(tmp_path / "out", "ilql")) == 2


def test_a_learned_reward_is_trained_first(cli, tmp_path):
    upstream = "upstream.reward={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}"
    result = cli.call(*SHORT, upstream, "ilql.head=tied", f"output_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    (folder,) = cli.runs(tmp_path / "out", "ilql")
    record = json.loads((folder / "run.json").read_text())
    assert set(record["inputs"]["parents"]) == {"sft", "reward"}


def test_a_dry_run_reckons_with_the_heads(cli, nothing_loads, tmp_path):
    found = {}
    for head in ("mlp", "tied"):
        output = f"output_dir={tmp_path / 'out'}"
        result = cli.call(
            "stage=ilql", "model=baichuan7b", *LENGTH, f"ilql.head={head}", "dry_run=true", output
        )
        assert result.code == 0, result.err
        rows = [[cell.strip() for cell in line.split("│")] for line in result.out.splitlines()]
        found[head] = {(row[0], row[1]): row[-1] for row in rows if len(row) == 4}
    # 2 twins * 4 bytes * (2 * 4096^2 + 2 * 4096 * 64000); the trained ones with V's 2 * 4096^2 besides
    assert found["mlp"]["lagging Q heads", "parameters"] == "4.46 GB"
    assert found["mlp"]["Q and V heads", "parameters"] == "4.60 GB"
    assert found["mlp"]["Q and V heads", "optimiser"] == "9.19 GB"
    assert found["tied"]["lagging Q heads", "parameters"] == "0.54 GB"  # 2 * 4 bytes * 4 * 4096^2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ilql.tau=1"], "ilql.tau must be less than 1, got 1"),
        (["ilql.head=big"], "ilql.head must be one of mlp, linear, tied, got big"),
        (["ilql.data=prompts"], "ilql.data must be one of demonstrations, comparisons, got prompts"),
        (["ilql.betas=[]"], "ilql.betas must hold a number, and none below 0, got []"),
        (["ilql.betas=[1,-2]"], "ilql.betas must hold a number, and none below 0, got [1.0, -2.0]"),
        (["ilql.betas=[much]"], "ilql.betas must be a list of numbers such as [0.5,1], got ['much']"),
        (["ilql.beta=3"], "unknown key ilql.beta"),
        (
            ["ilql.data=comparisons", "dataset.views.comparisons=null"],
            "dataset.views.comparisons is null: dataset reviews has no comparisons for ilql",
        ),
        (["train.micro_batch_size=5"], "train.micro_batch_size must divide train.batch_size, got 5 and 8"),
        (["ppo.steps=3"], "stage ilql has no key ppo.steps; "),
    ],
    ids=str,
)
def test_what_is_refused(cli, nothing_loads, tmp_path, words, message):
    cli.refuses(words, (*SHORT, *LENGTH), message, tmp_path)


# ---------------------------------------------------------------- random walks


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_walks_are_solved_from_random_walks(cli, tmp_path, seed):
    """No walk is sampled in training, and the data average .35; curves are all that was published.

    Three seeds are to take less than three minutes on two cores, so that one has 120 seconds of one core. The
    command is a process of its own, whose time has the imports in it and nothing of other tests.
    """
    words = ("experiment=randomwalks_ilql", "tracking=none", f"seed={seed}", f"output_dir={tmp_path / 'out'}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "rlhf_exp", *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    (folder,) = cli.runs(tmp_path / "out", "ilql")
    metrics = metrics_of(folder)
    rewards = {beta: metrics[f"eval/beta_{beta}/reward"] for beta in (0, 1, 4, 16, 100)}
    assert metrics["data/reward"] == pytest.approx(0.3515, abs=1e-3)
    assert rewards[0] == pytest.approx(metrics["data/reward"], abs=0.08)  # the policy imitates
    assert 0.45 < rewards[1] < 0.7
    assert 0.75 < rewards[4] < 0.92
    assert rewards[16] > 0.95
    assert rewards[100] > 0.95
    assert metrics["eval/beta_16/greedy_reward"] > 0.9  # 20 prompts: one lost is .05
    seconds = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    assert seconds < LIMIT
