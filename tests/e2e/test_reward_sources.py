"""Ensembles, sums and gold scorers from the command line: what is trained, once, on what, and what is refused."""

from __future__ import annotations

import json
import re

import pytest

from rlhf_exp import compose

SFT = "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}"
REWARD = "upstream.reward={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}"
TWO = ("reward_source=ensemble", "reward_source.ensemble=2")
GOLD = "reward_source.gold=learned"


@pytest.fixture
def run(cli, tmp_path):
    """run(more words) -> the result of a short command on one output folder."""

    def call(*words: str, base: tuple[str, ...] = cli.SHORT_PPO):
        result = cli.call(*base, "lora.r=2", SFT, REWARD, f"output_dir={tmp_path / 'out'}", *words)
        assert result.code == 0, result.out + result.err
        return result

    return call


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_an_ensemble_is_trained_once_and_each_of_its_members_is_a_run(cli, run, tmp_path):
    first = run(*TWO)
    rewards = {record(path)["key"] for path in cli.runs(tmp_path / "out", "reward")}
    (ppo,) = cli.runs(tmp_path / "out", "ppo")
    parents = record(ppo)["inputs"]["parents"]
    assert {name: parent["stage"] for name, parent in parents.items()} == {
        **{"sft": "sft", "reward": "reward", "reward_1": "reward"}
    }
    assert {parents["reward"]["key"], parents["reward_1"]["key"]} == rewards and len(rewards) == 2
    seeds = {
        int(re.search(r"^seed: (\d+)$", (path / "config.yaml").read_text(), re.M)[1])
        for path in cli.runs(tmp_path / "out", "reward")
    }
    assert seeds == {0, 1}
    assert "mean - 0.5 * std of base tiny + each of reward " in first.out
    (line,) = cli.lines(ppo / "metrics.jsonl")
    assert line["objective/ensemble_std"] > 0

    third = run(*TWO, "reward_source.ensemble=3")  # two of three are there
    assert third.out.count("(cached)") >= 3
    assert len(cli.runs(tmp_path / "out", "reward")) == 3
    single = run()  # and a run without an ensemble has the first
    assert len(cli.runs(tmp_path / "out", "reward")) == 3 and "(cached)" in single.out

    given = ",".join(str(path) for path in cli.runs(tmp_path / "out", "reward")[:2])
    ready = run(*TWO, f"adapters.reward_ensemble=[{given}]", "dry_run=true")
    assert len(set(re.findall(r"reward(?:_1)? \w{6} \(given: ", ready.out))) == 2


def test_gold_has_the_other_half_and_changes_nothing_but_its_figure(cli, run, tmp_path):
    run(GOLD)
    (ppo,) = cli.runs(tmp_path / "out", "ppo")
    (line,) = cli.lines(ppo / "metrics.jsonl")
    assert isinstance(line["objective/gold"], float)
    assert record(ppo)["metrics"]["objective/gold"] == line["objective/gold"]
    parents = record(ppo)["inputs"]["parents"]
    assert set(parents) == {"sft", "reward", "gold"} and parents["gold"]["stage"] == "reward"
    halves = {
        re.search(r"^  half: (\w+)$", (path / "config.yaml").read_text(), re.M)[1]
        for path in cli.runs(tmp_path / "out", "reward")
    }
    assert halves == {"first", "second"}
    pairs = [record(path)["metrics"]["data/pairs"] for path in cli.runs(tmp_path / "out", "reward")]
    assert min(pairs) > 0.3 * sum(pairs)

    # the same reward model without gold: the same run but for that figure
    run("upstream.reward.dataset.half=first")
    (other,) = (path for path in cli.runs(tmp_path / "out", "ppo") if path != ppo)
    (without,), (with_gold,) = (
        cli.without_clock(other / "metrics.jsonl"),
        cli.without_clock(ppo / "metrics.jsonl"),
    )
    assert with_gold.pop("objective/gold") == line["objective/gold"]
    assert with_gold == without
    weights = [(path / "adapter" / "adapter_model.safetensors").read_bytes() for path in (ppo, other)]
    assert weights[0] == weights[1]
    assert len(cli.runs(tmp_path / "out", "reward")) == 2  # nothing new


def test_a_sweep_over_kl_trains_reward_and_gold_once(cli, run, tmp_path):
    run(GOLD, "ppo.kl_coef=0.01,0.1", "-m")
    assert len(cli.runs(tmp_path / "out", "ppo")) == 2
    assert len(cli.runs(tmp_path / "out", "reward")) == 2
    assert len(cli.runs(tmp_path / "out", "sft")) == 1


def test_eval_judges_by_the_same_gold(cli, run, tmp_path):
    words = (
        "eval.gold=learned",
        "eval.prompts=4",
        "eval.samples=1",
        "tracking=none",
        "generation.max_new_tokens=4",
    )
    base = ("stage=pipeline", *cli.SHORT_PPO[1:])
    run(GOLD, *words, base=base)
    (folder,) = cli.runs(tmp_path / "out", "eval")
    parents, ppo = record(folder)["inputs"]["parents"], record(cli.runs(tmp_path / "out", "ppo")[0])
    assert parents["gold"]["key"] == ppo["inputs"]["parents"]["gold"]["key"]
    assert parents["reward"]["key"] == ppo["inputs"]["parents"]["reward"]["key"]
    metrics = record(folder)["metrics"]
    assert metrics["last/gold"] != metrics["last/reward"]


def test_ilql_reports_gold_of_its_answers(cli, run, tmp_path):
    base = (
        *("stage=ilql", "model=tiny", "model.dtype=float32", "threads=1", "tracking=none"),
        *("train={steps: 1, batch_size: 4, micro_batch_size: 4}", "ilql.betas=[1]", "ilql.eval_prompts=2"),
        "generation.max_new_tokens=4",
    )
    run("reward_source.kind=sum", "reward_source.parts=[1*learned,-0.5*length]", GOLD, base=base)
    (folder,) = cli.runs(tmp_path / "out", "ilql")
    assert set(record(folder)["inputs"]["parents"]) == {"sft", "reward", "gold"}
    assert {"eval/beta_1/gold", "eval/beta_1/gold_se"} <= set(record(folder)["metrics"])


COMPARED = ("stage=eval", "model=tiny", "eval.policies=[sft,dpo,kto]", "eval.gold=learned", GOLD)


def test_gold_judges_no_policy_that_learnt_from_its_comparisons(tmp_path):
    from rlhf_exp.data.load import load_view
    from rlhf_exp.stages import plan

    with compose.session():
        config, choices = compose.compose([*COMPARED, f"output_dir={tmp_path}"])
        nodes = {node.name: node.config for node in plan.make(config, choices).nodes}
    assert {name: nodes[name].dataset.half for name in ("sft", "gold", "reward", "dpo", "kto", "eval")} == {
        **{"gold": "second", "reward": "first", "dpo": "first", "kto": "first"},
        **{"sft": None, "eval": None},
    }
    asked = {
        name: {row.prompt for row in load_view(nodes[name].dataset, "comparisons", "train")}
        for name in ("gold", "dpo", "kto")
    }
    assert asked["dpo"] == asked["kto"] and not asked["dpo"] & asked["gold"]


@pytest.mark.usefixtures("nothing_loads")
def test_a_half_for_dpo_that_gold_has_too_is_refused(cli, tmp_path):
    result = cli.call(*COMPARED, "upstream.dpo.dataset.half=second", f"output_dir={tmp_path / 'out'}")
    assert (result.code, result.errors) == (
        2,
        [
            "error: reward_source.gold=learned needs comparisons that dpo is not trained on, but dataset.half is "
            "second in upstream.dpo and second in upstream.gold: leave them out"
        ],
    )


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (("reward_source.kind=sum",), ["reward_source.kind=sum needs reward_source.parts, such as"]),
        (
            ("reward_source.kind=sum", "reward_source.parts=[1*lenght,length,1*regex:[]"),
            ["reward_source.parts=[1*lenght,length,1*regex:[]"],
        ),
        (
            ("reward_source.kind=sum", "reward_source.parts=[1*lenght,length]"),
            [
                "reward_source.parts[1]=length: expected WEIGHT*SPEC, such as 0.5*length",
                "reward_source.parts[0]=lenght: there is no function lenght; did you mean length?",
            ],
        ),
        (("reward_source.parts=[1*length]",), ["reward_source.parts is for reward_source.kind=sum"]),
        (("reward_source=length", "reward_source.ensemble=2"), ["reward_source.ensemble=2 is of learned"]),
        (("reward_source.ensemble=0",), ["reward_source.ensemble must be at least 1, got 0"]),
        ((*TWO, "adapters.reward=x"), ["adapters.reward is one reward model: for an ensemble set"]),
        ((*TWO, "adapters.reward_ensemble=[x]"), ["adapters.reward_ensemble names 1 adapters, but"]),
        ((*TWO, "adapters.reward_ensemble=[x,y]"), ["adapters.reward_ensemble=x: there is no such folder",
                                                    "adapters.reward_ensemble=y: there is no such folder"]),
        ((GOLD, "adapters.gold=x"), ["adapters.gold=x: there is no such folder"]),
        (("reward_source.gold=lerned",), ["reward_source.gold=lerned: there is no function lerned; did you mean"]),
        ((GOLD, "upstream.gold={seeed: 1}"), ["upstream.gold: unknown key seeed; did you mean seed?"]),
        ((GOLD, "upstream.gold.dataset.half=first"), ["reward_source.gold=learned needs comparisons that reward is"]),
    ],
    ids=lambda x: None,
)  # fmt: skip
@pytest.mark.usefixtures("nothing_loads")
def test_what_cannot_be_is_refused_before_anything_loads(cli, tmp_path, words, lines):
    result = cli.call(*cli.SHORT_PPO, *words, f"output_dir={tmp_path / 'out'}")
    assert result.code == 2
    assert len(result.errors) == len(lines), result.errors
    assert [any(line in said for said in result.errors) for line in lines] == [True] * len(lines)


@pytest.mark.usefixtures("nothing_loads")
def test_eval_has_no_learned_gold_of_its_own(cli, tmp_path):
    result = cli.call("experiment=smoke", "eval.gold=learned", f"output_dir={tmp_path / 'out'}")
    (line,) = result.errors
    assert line.startswith(
        "error: eval.gold=learned is the model of reward_source.gold=learned, which halves"
    )


@pytest.mark.usefixtures("nothing_loads")
def test_ilql_keeps_off_the_comparisons_of_gold(cli, tmp_path):
    words = ("stage=ilql", "model=tiny", "ilql.data=comparisons", GOLD, f"output_dir={tmp_path / 'out'}")
    (line,) = cli.call(*words, "dry_run=true").errors
    assert line.startswith(
        "error: ilql.data=comparisons would learn from those that reward_source.gold=learned"
    )
    assert cli.call(*words, "dry_run=true", "dataset.half=first").code == 0


def test_configs_of_members_and_gold():
    """Members differ in the seed only; gold takes over upstream.reward, and has a seed past any ensemble's."""
    words = ["stage=ppo", "model=tiny", "seed=7", "upstream.reward={optim: {lr: 3e-4}, train: {steps: 5}}"]
    parent, choices = compose.compose([*words, "upstream.gold={train: {steps: 9}}"])
    first, third, gold = (
        compose.upstream(role, parent, choices)[0] for role in ("reward", "reward_2", "gold")
    )
    assert (first.seed, third.seed, gold.seed) == (7, 9, 1007)
    third.seed = 7
    assert third == first
    assert (gold.stage, gold.optim.lr, gold.train.steps, first.train.steps) == ("reward", 3e-4, 9, 5)
    parent, choices = compose.compose([*words, "upstream.gold.seed=3"])
    assert compose.upstream("gold", parent, choices, "second")[0].seed == 3
    assert compose.upstream("gold", parent, choices, "second")[0].dataset.half == "second"
