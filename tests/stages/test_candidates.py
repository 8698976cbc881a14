"""Which policies an evaluation looks at, from what a PPO run left in its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_exp.schema import EvalRun, Evaluation
from rlhf_exp.stages import evaluate
from rlhf_exp.stages.candidates import candidates, made_by_sft


@pytest.fixture
def ppo(adapters, tmp_path) -> Path:
    """The folder of a run of 7 iterations that kept its adapter after 2 and 4."""
    root = tmp_path / "ppo"
    for name, source in (("checkpoints/step_00002", "sft"), ("checkpoints/step_00004", "other")):
        shutil.copytree(adapters[source], root / name)
    shutil.copytree(adapters["other"], root / "adapter")
    (root / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)))
    return root


@pytest.fixture
def looked_at(run_config, context, adapters):
    """looked_at(ppo, **values of eval) -> (name, step, folder) of each candidate."""

    def find(ppo: Path, sft: bool = True, **values) -> list[tuple[str, int, str | None]]:
        parents = {"ppo": ppo} | ({"sft": adapters["sft"]} if sft else {})
        config: EvalRun = run_config("eval", eval=Evaluation(**values))
        found = candidates(config, context(**parents))
        return [(c.name, c.step, c.adapter and c.adapter.name) for c in found]

    return find


def best(ppo: Path, step: int, adapter: str) -> None:
    (ppo / "best.json").write_text(
        json.dumps({"metric": "x", "step": step, "value": 1.0, "adapter": adapter})
    )


def test_sft_then_what_was_kept_then_the_last(looked_at, ppo):
    kept = [("ppo@2", 2, "step_00002"), ("ppo@4", 4, "step_00004")]
    assert looked_at(ppo) == [("sft", 0, "sft"), *kept, ("ppo@7", 7, "adapter")]
    assert looked_at(ppo, checkpoints=False) == [("sft", 0, "sft"), ("ppo@7", 7, "adapter")]
    assert looked_at(ppo, sft=False)[0] == ("base", 0, None)


def test_the_best_has_its_name_and_is_looked_at_once(looked_at, ppo):
    best(ppo, 4, "checkpoints/step_00004")
    row = ("ppo (best: step 4)", 4, "step_00004")
    assert looked_at(ppo) == [("sft", 0, "sft"), ("ppo@2", 2, "step_00002"), row, ("ppo@7", 7, "adapter")]
    assert looked_at(ppo, checkpoints=False) == [("sft", 0, "sft"), row, ("ppo@7", 7, "adapter")]
    assert looked_at(ppo, best=False)[2] == ("ppo@4", 4, "step_00004")
    assert looked_at(ppo, best=False, checkpoints=False) == looked_at(ppo, checkpoints=False)[::2]


@pytest.mark.parametrize("adapter", ["adapter", "checkpoints/step_00006"])
def test_the_last_is_no_other_and_a_lost_one_is_none(looked_at, ppo, adapter):
    before = looked_at(ppo)
    best(ppo, 7, adapter)
    assert looked_at(ppo) == before


def test_the_average_stands_before_the_last(looked_at, ppo, adapters):
    shutil.copytree(adapters["other"], ppo / "ema")
    assert looked_at(ppo, checkpoints=False) == [
        ("sft", 0, "sft"),
        ("ppo (ema)", 7, "ema"),
        ("ppo@7", 7, "adapter"),
    ]
    assert looked_at(ppo, checkpoints=False, ema=False) == [("sft", 0, "sft"), ("ppo@7", 7, "adapter")]


def test_a_peft_folder_knows_no_steps(looked_at, ppo):
    assert looked_at(ppo / "adapter") == [("sft", 0, "sft"), ("ppo@1", 1, "adapter")]


def test_a_base_that_sft_made_is_the_sft_policy():
    assert made_by_sft(Path("outputs/sft/0123456789ab/model"))
    assert not made_by_sft(Path("downloads/llama/model"))
    assert not made_by_sft(Path("outputs/sft/0123456789ab/adapter"))


def test_all_of_them_are_measured_on_the_same_prompts(looked_at, ppo, adapters, run_config, context):
    """best is the SFT adapter itself and ema that of the last: equal adapters give equal figures, paired."""
    from rlhf_exp.schema import Generation, RewardSource
    from rlhf_exp.tracking import read_lines

    best(ppo, 2, "checkpoints/step_00002")
    shutil.copytree(adapters["other"], ppo / "ema")
    config = run_config(
        "eval",
        eval=Evaluation(prompts=6, gold="none", checkpoints=False),
        generation=Generation(max_new_tokens=5),
        reward_source=RewardSource(kind="function", function="length"),
    )
    given = context(sft=adapters["sft"], ppo=ppo)
    metrics = evaluate.run(config, given)
    found = json.loads((given.folder.path / "eval.json").read_text())["policies"]
    assert [(p["name"], p["step"]) for p in found] == [
        ("sft", 0), ("ppo (best: step 2)", 2), ("ppo (ema)", None), ("ppo@7", 7),
    ]  # fmt: skip
    steps = [line.get("policy_step") for line in read_lines(given.folder.path / "metrics.jsonl")]
    assert steps == [0, 2, None, 7]  # an average was here at no step
    sft, chosen, average, last = found
    assert chosen["metrics"] == sft["metrics"]  # KL 0 among them
    assert average["metrics"] == last["metrics"] and average["metrics"]["kl"] > 0
    assert chosen["gain"]["reward"] == {"mean": 0, "low": 0, "high": 0}
    assert average["gain"] == last["gain"] != chosen["gain"]
    for kind, policy in (("sft", sft), ("best", chosen), ("ema", average), ("last", last)):
        assert metrics[f"{kind}/reward"] == policy["metrics"]["reward"]
    rows = read_lines(given.folder.path / "samples.jsonl")
    answered = {name: [] for name in ("sft", "ppo (best: step 2)", "ppo (ema)", "ppo@7")}
    for row in rows:
        answered[row["policy"]].append(row["prompt"])
    assert len(set(map(tuple, answered.values()))) == 1
    page = (given.folder.path / "report" / "report.html").read_text()
    assert "ppo (ema)" in page and "ppo (best: step 2)" in page
    assert "After 7 PPO steps" in page  # the last is still the last
