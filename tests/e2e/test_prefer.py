"""stage=prefer from the command line: labels, a reward model on them, rounds, and what is wrong in one line each."""

from __future__ import annotations

import json

import pytest

TINY = ("model=tiny", "dataset=reviews", "model.dtype=float32", "threads=1", "tracking=none")
SHORT = "train: {steps: 2, batch_size: 4, micro_batch_size: 4}"
ASKED = "labellers: [length, sentiment], prompts: 12, validation_prompts: 6, samples: 3"
FEW = (
    f"upstream.prefer={{prefer: {{{ASKED}}}, generation: {{max_new_tokens: 8}}}}",
    f"upstream.sft={{{SHORT}}}",
)
PREFER = (
    *("stage=prefer", *TINY, "prefer.labellers=[length,sentiment]", "prefer.prompts=12"),
    *("prefer.validation_prompts=6", "prefer.samples=3", "generation.max_new_tokens=8", FEW[1]),
)
REWARD = (
    *("stage=reward", *TINY, *FEW, "dataset.comparisons_from=prefer", "train.steps=2", "train.batch_size=4"),
    *("train.micro_batch_size=4", "reward.probes=0"),
)
ROUNDS = (
    *(
        "stage=ppo",
        *TINY,
        "dataset.comparisons_from=prefer",
        "prefer.labellers=[length]",
        "prefer.prompts=12",
    ),
    *("prefer.validation_prompts=6", "prefer.samples=3", "generation.max_new_tokens=8", "ppo.steps=1"),
    *("ppo.batch_size=4", "ppo.epochs=1", FEW[1], f"upstream.reward={{{SHORT}, reward: {{probes: 0}}}}"),
)


def stages(out: str) -> dict[str, str]:
    """{node: key and state} of the plan's lines."""
    lines = (line.split(maxsplit=2) for line in out.splitlines() if line.startswith("stage    "))
    return {name: rest for _, name, rest in lines}


@pytest.mark.timeout(240)
def test_a_reward_model_on_labels_without_people(cli, tmp_path):
    first = cli.call(*PREFER)
    assert first.code == 0, first.out + first.err
    assert "agreement of length and sentiment" in first.out
    assert "comparisons labelled by length" in first.out
    (made,) = cli.runs(tmp_path / "outputs", "prefer")
    rows = cli.lines(made / "comparisons.jsonl")
    assert "comparisons.jsonl" in json.loads((made / "manifest.json").read_text())["files"]

    second = cli.call(*REWARD)  # the labels are there, whoever asked for them
    assert second.code == 0, second.out + second.err
    plan = stages(second.out)
    assert plan["prefer"].endswith("(cached)") and plan["sft"].endswith("(cached)")
    (reward,) = cli.runs(tmp_path / "outputs", "reward")
    record = json.loads((reward / "run.json").read_text())
    assert record["inputs"]["parents"]["prefer"]["path"].endswith(made.name)
    assert record["metrics"]["data/pairs"] + record["metrics"]["validation/pairs"] == len(rows)
    assert f"comparisons: {made}" in (reward / "config.yaml").read_text()

    again = cli.call(*REWARD)
    assert again.code == 0 and stages(again.out)["reward"].endswith("(cached)")
    other = cli.call(*REWARD, "dry_run=true", "upstream.prefer.prefer.min_margin=2")
    assert {name for name, state in stages(other.out).items() if "will be" in state} == {"prefer", "reward"}
    own = cli.call(*REWARD, "dry_run=true", "dataset.comparisons_from=data")
    assert set(stages(own.out)) == {"reward"} and "will be" in stages(own.out)["reward"]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_third_round_trains_the_third_alone(cli, tmp_path):
    two = cli.call(*ROUNDS, "prefer.rounds=2")
    assert two.code == 0, two.out + two.err
    made = {stage: cli.runs(tmp_path / "outputs", stage) for stage in ("sft", "prefer", "reward", "ppo")}
    assert {stage: len(folders) for stage, folders in made.items()} == {
        "sft": 1,
        "prefer": 2,
        "reward": 2,
        "ppo": 2,
    }
    three = stages(cli.call(*ROUNDS, "prefer.rounds=3", "dry_run=true").out)
    missing = {name for name, state in three.items() if "will be" in state}
    assert missing == {"prefer", "reward", "ppo"}
    assert set(three) - missing == {"sft", "prefer.1", "reward.1", "ppo.1", "prefer.2", "reward.2", "ppo.2"}
    # with the newest comparisons alone the first round stays, the second's labels are others
    newest = stages(cli.call(*ROUNDS, "prefer.rounds=2", "prefer.keep=newest", "dry_run=true").out)
    assert {name for name, state in newest.items() if "will be" in state} == {"prefer", "reward", "ppo"}

    last = cli.call(*ROUNDS, "prefer.rounds=2", "prefer.start=last")  # the same labels and reward models
    assert last.code == 0, last.out + last.err
    assert [name for name, state in stages(last.out).items() if "will be" in state] == ["ppo"]
    assert "ok    the policy starts where the last round left it" in last.out

    rows = {len(cli.lines(folder / "comparisons.jsonl")): folder for folder in made["prefer"]}
    (few, first), (many, second) = sorted(rows.items())
    both = cli.lines(second / "comparisons.jsonl")
    assert both[:few] == cli.lines(first / "comparisons.jsonl")
    assert {row["round"] for row in both[few:]} == {2} and many > few


@pytest.mark.parametrize("stage", ["dpo", "ilql"])
def test_stages_that_read_comparisons_stand_on_prefer(cli, stage):
    words = [f"stage={stage}", *TINY, *FEW, "dataset.comparisons_from=prefer", "dry_run=true"]
    found = cli.call(*words, *["ilql.data=comparisons"] * (stage == "ilql"))
    assert found.code == 0, found.err
    assert list(stages(found.out))[:2] == ["sft", "prefer"]


def test_a_policy_by_the_datas_own_comparisons_is_round_zero(cli):
    words = ["stage=reward", *TINY, "dataset.comparisons_from=prefer", "dry_run=true"]
    asked = "upstream.prefer={prefer: {policies: [sft, ppo], labellers: [learned]}}"
    found = cli.call(*words, asked)
    assert found.code == 0, found.err
    plan = stages(found.out)
    assert list(plan) == ["sft", "labeller", "reward.0", "ppo.0", "prefer", "reward"]
    assert plan["labeller"][:6] == plan["reward.0"][:6] != plan["reward"][:6]


def test_a_gold_that_labels_is_noted(cli):
    words = [
        "stage=pipeline",
        *TINY,
        "dataset.comparisons_from=prefer",
        "dry_run=true",
        "eval.gold=sentiment",
    ]
    for labeller, notes in (("sentiment", 1), ("length", 0)):
        found = cli.call(*words, f"prefer.labellers=[{labeller}]")
        assert found.code == 0, found.err
        assert found.out.count("note: eval.gold=sentiment also labels") == notes
    asked = ["eval.judge=model", "judge.model=base", "upstream.prefer={judge: {model: base}}"]
    found = cli.call(*words, "prefer.labellers=[judge]", *asked)
    assert found.code == 0 and found.out.count("note: judge.model=base also labels") == 1, (
        found.out + found.err
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["prefer.labellers=[]"], "prefer.labellers is empty: say what orders the answers"),
        (["prefer.samples=1"], "prefer.samples=1 of one policy is one answer, which compares with nothing"),
        (["prefer.policies=[]"], "prefer.policies is empty"),
        (["prefer.labellers=[length,length]"], "prefer.labellers names one twice: length, length"),
        (
            ["prefer.labellers=[python:nomodule.rule]"],
            "prefer.labellers[0]=python:nomodule.rule: there is no module",
        ),
        (
            ["prefer.labellers=[lenght]"],
            "prefer.labellers[0]=lenght: there is no function lenght; did you mean length",
        ),
        (["prefer.labellers=[judge]"], "judge.model is not set"),
        (
            ["prefer.labellers=[judge]", "judge.model=./nowhere"],
            "judge.model=./nowhere: there is no such folder",
        ),
        (
            ["prefer.policies=[stf]"],
            "prefer.policies[0]=stf: policies are sft, base, ppo, dpo, kto, rft, or the folder",
        ),
        (["prefer.policies=[./nothing]"], "prefer.policies[0]=./nothing: there is no such folder"),
        (["prefer.rounds=2"], "prefer.rounds is of stage=ppo and pipeline"),
        (["adapters.ppo=somewhere"], "adapters.ppo is for stages that stand on ppo, which prefer does not"),
        (["prefer.pairs=most"], "prefer.pairs must be one of best_worst, all, got most"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_trained(cli, tmp_path, words, expected):
    found = cli.call("stage=prefer", *TINY, "generation.max_new_tokens=8", *words)
    assert found.code == 2
    assert len(found.errors) == 1 and found.errors[0].startswith(f"error: {expected}"), found.err
    assert not cli.runs(tmp_path / "outputs")


def test_rounds_need_labels(cli):
    found = cli.call("stage=ppo", *TINY, "prefer.rounds=2")
    assert found.code == 2 and "dataset.comparisons_from=prefer" in found.err and len(found.errors) == 1
    words = ["dataset.comparisons_from=prefer", "reward_source.gate=patch"]
    found = cli.call("stage=ppo", *TINY, "prefer.rounds=2", *words)
    assert found.code == 2 and "reward_source.gate=patch cannot be had with prefer.rounds=2" in found.err
