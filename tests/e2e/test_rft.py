"""stage=rft, and best-of-n and ILQL's policies in stage=eval, from the command line; what is refused."""

from __future__ import annotations

import json
import math
import re

import pytest

pytestmark = pytest.mark.timeout(900)  # a fixture trains several stages
COMMON = ("model=tiny", "dataset=reviews", "model.dtype=float32", "threads=1", "tracking=none")
SFT = "upstream.sft={train: {steps: 2, batch_size: 8, micro_batch_size: 8}}"
REWARD = "upstream.reward={train: {steps: 2, batch_size: 8, micro_batch_size: 8}, reward: {probes: 0}}"
RFT = (
    "rft={samples: 3, prompts: 6, rounds: 2}",
    "train={epochs: 1, batch_size: 4, micro_batch_size: 4}",
    "generation.max_new_tokens=6",
)


@pytest.fixture(scope="module")
def trained(cli, tmp_path_factory):
    """sft, reward and rft in one command; the output folder and what was said."""
    output = tmp_path_factory.mktemp("rft") / "outputs"
    result = cli.call("stage=rft", *COMMON, SFT, REWARD, *RFT, f"output_dir={output}")
    assert result.code == 0, result.out + result.err
    return output, result


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_from_the_command_line(cli, trained):
    output, result = trained
    (folder,) = cli.runs(output, "rft")
    found = record(folder)
    assert set(found["inputs"]["parents"]) == {"sft", "reward"}
    assert set(found["inputs"]["data"]) == {"prompts"}
    assert found["metrics"]["rft/kept"] == 6 and found["metrics"]["rft/answers"] == 18
    said = result.out.splitlines()
    assert any(line.startswith("policy = base tiny + sft ") for line in said)
    assert any(line.startswith("reward = base tiny + reward ") for line in said)
    assert not any(line.startswith("ref ") for line in said), "it has no reference"
    assert [line.split(":")[0] for line in said if line.startswith("round ")] == ["round 1", "round 2"]
    assert any(line.startswith("rft    ") and "answers learned 6, of 18" in line for line in said)
    again = cli.call("stage=rft", *COMMON, SFT, REWARD, *RFT, f"output_dir={output}")
    assert again.code == 0 and "(cached)" in again.out
    assert [len(cli.runs(output, stage)) for stage in ("sft", "reward", "rft")] == [1, 1, 1]


@pytest.fixture(scope="module")
def evaluation(cli, trained):
    """One evaluation that trains ilql, and looks at rft and two bests of n: its folder."""
    output, _ = trained
    result = cli.call(
        *("stage=eval", *COMMON, SFT, REWARD, f"output_dir={output}", "generation.max_new_tokens=6"),
        "eval.policies=[sft,rft,ilql:beta_4,sft:best_of_2,rft:best_of_3]",
        *("eval.prompts=5", "eval.judge=learned", "eval.samples=2"),
        "upstream.rft={rft: {samples: 3, prompts: 6, rounds: 2}, train: {epochs: 1, batch_size: 4, "
        "micro_batch_size: 4}, generation: {max_new_tokens: 6}}",
        "upstream.ilql={train: {steps: 2, batch_size: 8, micro_batch_size: 8}, ilql: {data: comparisons, head: tied, "
        "betas: [1], eval_prompts: 2}, generation: {max_new_tokens: 4}}",
    )
    assert result.code == 0, result.out + result.err
    assert "≤0.2" in result.out, "the terminal's table says what is a bound"
    (folder,) = cli.runs(output, "eval")
    return folder


def test_one_evaluation_of_all_of_them(cli, trained, evaluation):
    output, _ = trained
    assert [len(cli.runs(output, stage)) for stage in ("rft", "ilql")] == [1, 1], "rft was there already"
    found = {p["name"]: p for p in json.loads((evaluation / "eval.json").read_text())["policies"]}
    assert list(found) == ["sft", "rft", "ilql:beta_4", "sft:best_of_2", "rft:best_of_3"]
    kl = {name: policy["metrics"]["kl"] for name, policy in found.items()}
    assert kl["sft"] == 0 and kl["rft"] > 0 and kl["ilql:beta_4"] > 0
    assert kl["sft:best_of_2"] == pytest.approx(math.log(2) - 0.5)
    assert kl["rft:best_of_3"] != pytest.approx(math.log(3) - 2 / 3, abs=1e-9)
    reward = {name: policy["metrics"]["reward"] for name, policy in found.items()}
    assert reward["sft:best_of_2"] >= reward["sft"] and reward["rft:best_of_3"] >= reward["rft"]
    assert found["sft:best_of_2"]["metrics"]["win_rate"] >= 0.5, "an answer that is chosen never loses"
    metrics = record(evaluation)["metrics"]
    assert {"ilql_beta_4/kl", "sft_best_of_2/sampled_tokens", "rft_best_of_3/reward"} <= set(metrics)
    page = (evaluation / "report" / "report.html").read_text()
    assert "≤0.2" in page and "sft:best_of_2" in page


def test_stage_report_shows_them(cli, trained, evaluation, tmp_path):
    output, _ = trained
    result = cli.call("stage=report", f"inputs={output}", "tracking=none", f"output_dir={tmp_path}")
    assert result.code == 0, result.err
    (folder,) = cli.runs(tmp_path, "report")
    page = (folder / "report" / "report.html").read_text()
    for said in ("sft:best_of", "KL at most 0.1931", "hollow: best of n", "ilql:beta_4"):
        assert said in page, said
    points = (folder / "report" / "tables" / "points.csv").read_text().splitlines()
    bounds = {line.split(",")[5] for line in points if ",bound," in line}
    assert bounds == {"sft:best_of_2", "rft:best_of_3"}


def test_run_folders_are_policies_too(cli, trained, evaluation, tmp_path):
    output, _ = trained
    ((ilql,), (rft,), (sft,)) = (cli.runs(output, stage) for stage in ("ilql", "rft", "sft"))
    words = ("stage=eval", *COMMON, "reward_source=length", "eval.gold=none", "generation.max_new_tokens=4")
    words += ("eval.prompts=3", "eval.samples=1", f"adapters.sft={sft}", f"output_dir={tmp_path / 'out'}")
    result = cli.call(*words, f"eval.policies=[sft,{rft},{ilql}:beta_4,{ilql}:beta_0:best_of_2]")
    assert result.code == 0, result.out + result.err
    (folder,) = cli.runs(tmp_path / "out", "eval")
    names = [p["name"] for p in json.loads((folder / "eval.json").read_text())["policies"]]
    called = f"ilql {record(ilql)['key'][:6]}"
    assert names[2:] == [f"{called}:beta_4", f"{called}:beta_0:best_of_2"]
    plain = cli.call(*words, f"eval.policies=[sft,{ilql}]")
    assert plain.code == 2
    (line,) = plain.errors
    assert f"{ilql} is a run of ilql, which decodes by beta (Q - V): say by which beta, {ilql}:beta_4" in line


def test_rft_is_exported_and_answers_for_prefer(cli, trained, tmp_path):
    output, _ = trained
    (rft,) = cli.runs(output, "rft")
    words = ("stage=export", "export={role: rft, form: adapter}", *COMMON, f"adapters.rft={rft}")
    result = cli.call(*words, f"output_dir={tmp_path / 'out'}")
    assert result.code == 0, result.err
    (run,) = cli.runs(tmp_path / "out", "export")
    assert "best answers" in (run / "export" / "README.md").read_text()
    words = ("stage=prefer", *COMMON, f"adapters.rft={rft}", "generation.max_new_tokens=4")
    result = cli.call(
        *words,
        "prefer={policies: [rft], labellers: [length], samples: 3, prompts: 8, validation_prompts: 8}",
        f"output_dir={tmp_path / 'out'}",
    )
    assert result.code == 0, result.err


def test_rloo_is_a_second_run_of_ppo(cli, tmp_path):
    output = tmp_path / "out"
    result = cli.call(
        *("stage=eval", *COMMON, SFT, "reward_source=length", "eval.gold=none", f"output_dir={output}"),
        *(
            "eval.policies=[sft,ppo,rloo@1,rloo@2]",
            "eval.prompts=3",
            "eval.samples=1",
            "generation.max_new_tokens=4",
        ),
        "upstream.ppo={ppo: {steps: 2, batch_size: 4, micro_batch_size: 4, save_every: 1, epochs: 1}, generation: "
        "{max_new_tokens: 4}}",
        "upstream.rloo={ppo: {batch_size: 2, samples_per_prompt: 2}}",
    )
    assert result.code == 0, result.out + result.err
    runs = [
        re.findall(r"^  (estimator|batch_size|steps): (\S+)$", (f / "config.yaml").read_text(), re.M)
        for f in cli.runs(output, "ppo")
    ]
    assert sorted(map(dict, runs), key=str) == [
        {"steps": "2", "batch_size": "2", "estimator": "rloo"},
        {"steps": "2", "batch_size": "4", "estimator": "gae"},
    ]  # fmt: skip
    (folder,) = cli.runs(output, "eval")
    names = [p["name"] for p in json.loads((folder / "eval.json").read_text())["policies"]]
    assert names[0] == "sft" and names[-2:] == ["rloo@1", "rloo@2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=rft", "rft.samples=1"], "rft.samples must be at least 2, got 1"),
        (["stage=rft", "rft.keep=9"], "rft.keep=9 is more than there are answers to a prompt, rft.samples=8"),
        (["stage=rft", "rft.keep=0"], "rft.keep=0 learns every answer, good or bad: set rft.threshold"),
        (["stage=rft", "rft.keep=8"], "rft.keep=8 learns every answer, good or bad"),
        (["stage=rft", "generation.greedy=true"], "generation.greedy gives rft.samples=8 equal answers"),
        (["stage=rft", "lora=full"], "lora.full is for sft, not for rft"),
        (["stage=rft", "rft.pool=old"], "rft.pool must be one of newest, union, got old"),
        (["stage=rft", "reward_source.function=lenght", "reward_source=sentiment"], "did you mean length"),
        (["stage=rft", "train={batch_size: 8, micro_batch_size: 5}"], "train.micro_batch_size must divide"),
        (
            ["stage=rft", "lora.targets=[q_proj,lm_head]"],
            "lora.targets: lm_head is the output layer, which is frozen",
        ),
        (
            ["stage=dpo", "lora.targets=[q_proj,lm_head]"],
            "lora.targets: lm_head is the output layer, which is frozen",
        ),
        (
            ["stage=eval", "eval.policies=[sft,ilql]"],
            "ilql decodes by beta (Q - V): say by which beta, ilql:beta_4",
        ),
        (["stage=eval", "eval.policies=[sft,sft:best_of_1]"], "the best of 1 is of two answers at least"),
        (["stage=eval", "eval.policies=[sft,sft:bestof_4]"], "there is no such policy or folder"),
        (["stage=eval", "eval.policies=[sft,rloo]"], "upstream.rloo: ppo.estimator=rloo compares answers"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_what_is_refused(cli, nothing_loads, tmp_path, words, message):
    cli.refuses(words, COMMON, message, tmp_path)


def test_an_adapter_on_the_output_layer_is_refused(cli, trained, nothing_loads, tmp_path):
    """Nothing here would apply it: roles share one output layer."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    output, _ = trained
    (sft,) = cli.runs(output, "sft")
    foreign = shutil.copytree(sft / "adapter", tmp_path / "foreign")
    weights = load_file(foreign / "adapter_model.safetensors")
    weights["base_model.model.lm_head.lora_A.weight"] = torch.zeros(16, 64)
    weights["base_model.model.lm_head.lora_B.weight"] = torch.zeros(512, 16)
    save_file(weights, foreign / "adapter_model.safetensors")
    result = cli.call("stage=dpo", *COMMON, f"adapters.sft={foreign}", f"output_dir={tmp_path / 'out'}")
    assert result.code == 2
    (line,) = result.errors
    assert line.startswith(
        f"error: adapters.sft={foreign}: it has an adapter on the output layer, lm_head, which is"
    )


def test_help_is_of_the_stage(cli):
    result = cli.call("stage=rft", "--help")
    assert result.code == 0
    assert (
        "rft.samples=8" in result.out and "reward_source.kind" in result.out and "ppo.steps" not in result.out
    )
