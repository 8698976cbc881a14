"""Evaluations of best-of-n and of ILQL's policies: what is answered, at which KL, at what cost; against oracles."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_exp.data.encode import encode_prompts
from rlhf_exp.model.ilql_heads import ILQLHeads
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.rules import length
from rlhf_exp.rollout.engine import Rollout, generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import Evaluation, Generation, RewardSource
from rlhf_exp.stages import divergence, evaluate
from rlhf_exp.stages.data_answers import prompts_of
from rlhf_exp.stages.drawing import Drawn, Rounds, best
from rlhf_exp.tracking import read_lines

SFT_ROLE, TOKENS, PROMPTS = "sft", 7, 5


@pytest.fixture
def config(run_config):
    """config("sft", "sft:best_of_4", ...) -> EvalRun of few prompts, rewarded by the number of words."""

    def make(*policies: str, generation=None, **values):
        return run_config(
            "eval",
            eval=Evaluation(policies=list(policies), prompts=PROMPTS, gold="regex:e", **values),
            generation=Generation(**{"max_new_tokens": TOKENS, **(generation or {})}),
            reward_source=RewardSource(kind="function", function="length"),
        )

    return make


@pytest.fixture
def ilql(base, adapters, tmp_path) -> Path:
    """A run folder of ilql: the adapter `other`, and heads whose Q says something."""
    folder = tmp_path / "ilql"
    shutil.copytree(adapters["other"], folder / "adapter")
    heads = ILQLHeads("mlp", base.hidden_size, base.output_layer[0], seed=1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.mul_(3)
    (folder / "ilql").mkdir()
    heads.save(folder / "ilql" / "heads.safetensors")
    return folder


@pytest.fixture
def measured(context, adapters, monkeypatch):
    """measured(config, **parents) -> {name: Measured}, eval.json and the rows of samples.jsonl."""

    def run(config, **parents):
        inside, found, measure = context(sft=adapters["sft"], **parents), {}, evaluate.measure

        def remember(*given):
            result = measure(*given)
            found[result.candidate.name] = result
            return result

        monkeypatch.setattr(evaluate, "measure", remember)
        evaluate.run(config, inside)
        content = json.loads((inside.folder.path / "eval.json").read_text())
        return found, content, list(read_lines(inside.folder.path / "samples.jsonl"))

    return run


def words(text: str) -> float:
    return length([""], [text])[0]


def answers_of(base, adapters, config, count: int) -> list[list[str]]:
    """[prompt][sample]: plain samples of the SFT adapter, each drawn alone."""
    prompts = prompts_of(config)
    encoded = encode_prompts(base.tokenizer, config.dataset, [prompt.prompt for prompt in prompts])
    found = []
    with Roles(base) as roles:
        roles.load("sft", adapters["sft"])
        for prompt, ids in zip(prompts, encoded, strict=True):
            rollouts = [
                generate(
                    base, lambda: roles.use("sft"), [ids], [row_key(0, 0, prompt.id, j)], config.generation
                )
                for j in range(count)
            ]
            found.append([base.tokenizer.decode(r.responses[0], skip_special_tokens=True) for r in rollouts])
    return found


# ---------------------------------------------------------------- the best of n


def drawn(*rows: tuple[list[int], float], tokens: int = 0) -> Drawn:
    ids = [row for row, _ in rows]
    rollout = Rollout(
        [[1]] * len(rows), ids, [True] * len(rows), [torch.zeros(len(row)) for row in ids], None
    )
    return Drawn(rollout, [reward for _, reward in rows], tokens)


def test_the_best_of_each_row_and_of_equal_ones_the_first():
    first = drawn(([10], 1.0), ([11], 5.0), ([12], 2.0), tokens=3)
    second = drawn(([20, 0], 4.0), ([21, 0], 5.0), ([22, 0], 1.0), tokens=6)
    found = best([first, second])
    assert found.rollout.responses == [[20, 0], [11], [12]]
    assert [len(each) for each in found.rollout.logprobs] == [2, 1, 1]
    assert found.rewards == [4.0, 5.0, 2.0]
    assert found.tokens == 9, "the others were sampled too"
    assert best([first]) is first
    with pytest.raises(FloatingPointError, match="nan"):
        best([first, drawn(([1], math.nan), ([1], 0.0), ([1], 0.0))])


def test_a_round_is_drawn_once_however_many_policies_choose_from_it():
    asked = []

    def draw(j: int) -> Drawn:
        asked.append(j)
        return drawn(([j], float(j)))

    rounds = Rounds()
    assert [len(rounds.of((None, 0.0), n, draw)) for n in (1, 4, 2)] == [1, 4, 2]
    assert asked == [0, 1, 2, 3]
    rounds.of((None, 4.0), 1, draw)  # another beta is another policy
    assert asked == [0, 1, 2, 3, 0]


def test_the_best_of_n_is_the_best_of_n_plain_samples(base, adapters, config, measured):
    asked = config("sft", "sft:best_of_2", "sft:best_of_4", greedy=True)
    found, content, rows = measured(asked)
    samples = answers_of(base, adapters, asked, 4)
    for n, name in ((1, "sft"), (2, "sft:best_of_2"), (4, "sft:best_of_4")):
        expected = [max(each[:n], key=words) for each in samples]
        assert found[name].texts == expected
        assert found[name].metrics["reward"] == pytest.approx(sum(map(words, expected)) / PROMPTS)
        assert found[name].metrics["gold"] == sum("e" in text for text in expected) / PROMPTS
    assert len({tuple(m.texts) for m in found.values()}) == 3, "the samples differ enough to tell"
    # nothing ends within so few tokens, so that n answers cost n times as much
    assert [m.metrics["sampled_tokens"] for m in found.values()] == [TOKENS, 2 * TOKENS, 4 * TOKENS]
    assert found["sft"].greedy and not found["sft:best_of_4"].greedy  # n most probable answers are equal
    assert "greedy_reward" in found["sft"].metrics and "greedy_reward" not in found["sft:best_of_4"].metrics
    sft, two, four = content["policies"]
    assert (two["best_of"], two["bounds"], two["run"], two["role"]) == (2, ["kl"], "sft:best_of", "sft")
    assert four["step"] is None and "bounds" not in sft and "best_of" not in sft
    assert sft["metrics"]["kl"] == 0
    # log 2 - 1/2 and log 4 - 3/4
    assert two["metrics"]["kl"] == pytest.approx(0.1931472) and four["metrics"]["kl"] == pytest.approx(
        0.6362944
    )
    assert [row["text"] for row in rows if row["policy"] == "sft:best_of_4"] == found["sft:best_of_4"].texts
    assert four["gain"]["reward"]["mean"] == pytest.approx(
        four["metrics"]["reward"] - sft["metrics"]["reward"]
    )


def test_several_answers_a_prompt_each_choose_among_their_own(config, measured):
    found, _, _ = measured(config("sft", "sft:best_of_3", samples_per_prompt=2))
    plain, chosen = found["sft"], found["sft:best_of_3"]
    assert len(chosen.texts) == len(plain.texts) == 2 * PROMPTS
    better = [a >= b for a, b in zip(chosen.scores["reward"], plain.scores["reward"], strict=True)]
    assert all(better), "the plain answer is among the three"
    assert any(a != b for a, b in zip(chosen.texts[::2], chosen.texts[1::2], strict=True))


@pytest.fixture
def plain_logits(base):
    """transformers with PEFT's own adapter: (folder, ids) -> logits [T, V] before each of the last tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def of(folder: Path, prompt: list[int], response: list[int]) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        return logits[len(prompt) - 1 : -1].double()

    return of


def test_the_bound_of_another_policys_best_counts_from_sft(adapters, config, measured, plain_logits):
    """log n - (n - 1) / n, and how far the policy itself is from SFT on the answers that were the best."""
    found, content, _ = measured(config("sft", "dpo:best_of_3"), dpo=adapters["other"])
    rollout = found["dpo:best_of_3"].rollout
    ratios = []
    for prompt, response in zip(rollout.prompts, rollout.responses, strict=True):
        both = (plain_logits(adapters[name], prompt, response).log_softmax(-1) for name in ("other", "sft"))
        ours, theirs = (x.gather(1, torch.tensor(response)[:, None]).sum() for x in both)
        ratios.append(float(ours - theirs))
    expected = math.log(3) - 2 / 3 + sum(ratios) / len(ratios)
    assert content["policies"][1]["metrics"]["kl"] == pytest.approx(expected, abs=1e-3)
    assert abs(sum(ratios)) > 0.1, "else the test could not tell"


# ---------------------------------------------------------------- ILQL


def steered(base, folder: Path, logits, hidden_of, prompt, response, beta: float) -> torch.Tensor:
    heads = ILQLHeads.load(folder / "ilql" / "heads.safetensors", base.hidden_size, base.output_layer[0])
    hidden = hidden_of(prompt, response)
    with torch.no_grad():
        tables = [f @ w.T + b for f, w, b in heads.targets(hidden)]
        return logits + beta * (torch.minimum(*tables) - heads.values(hidden)[:, None]).double()


def test_an_ilql_policy_is_sampled_from_and_measured_as_it_decodes(
    base, adapters, ilql, config, measured, plain_logits
):
    """Each token's log-prob, and the KL to SFT, are those of softmax(logits + beta (min Q - V))."""
    beta = 2.0
    found, content, _ = measured(config("sft", "ilql:beta_0", "ilql:beta_2"), ilql=ilql)
    rollout, total = found["ilql:beta_2"].rollout, 0.0
    with Roles(base) as roles:
        roles.load("policy", adapters["other"])

        def hidden_of(prompt, response):
            with torch.no_grad():
                return roles.trunk("policy", torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1]

        for prompt, response, logprobs in zip(
            rollout.prompts, rollout.responses, rollout.logprobs, strict=True
        ):
            plain = plain_logits(adapters["other"], prompt, response)
            ours = steered(base, ilql, plain, hidden_of, prompt, response, beta).log_softmax(-1)
            first = ours.clone()
            first[0, base.eos_id] = -torch.inf  # min_new_tokens=1: no answer is empty
            taken = first.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            assert torch.allclose(taken.float(), logprobs, atol=1e-3)
            theirs = plain_logits(adapters["sft"], prompt, response).log_softmax(-1)
            total += float((ours.exp() * (ours - theirs)).sum())
    metrics = {each["name"]: each["metrics"] for each in content["policies"]}
    assert metrics["ilql:beta_2"]["kl"] == pytest.approx(total / PROMPTS, rel=1e-3)
    assert metrics["ilql:beta_2"]["kl"] > metrics["ilql:beta_0"]["kl"] > 0
    assert content["policies"][2]["beta"] == 2 and "bounds" not in content["policies"][2]


def test_beta_0_is_the_adapter_without_q(adapters, ilql, config, measured):
    found, content, _ = measured(config("sft", "ilql:beta_0", "dpo"), ilql=ilql, dpo=adapters["other"])
    # one adapter in two folders: two policies, which answer alike
    assert found["ilql:beta_0"].texts == found["dpo"].texts
    one, two = (each["metrics"] for each in content["policies"][1:])
    assert one == two


def test_the_best_of_n_of_an_ilql_policy(ilql, config, measured):
    found, content, _ = measured(config("sft", "ilql:beta_2", "ilql:beta_2:best_of_3"), ilql=ilql)
    plain, chosen = found["ilql:beta_2"], found["ilql:beta_2:best_of_3"]
    assert chosen.metrics["reward"] > plain.metrics["reward"]
    assert content["policies"][2]["metrics"]["kl"] > math.log(3) - 2 / 3
    assert (content["policies"][2]["beta"], content["policies"][2]["best_of"]) == (2, 3)


def test_stop_texts_and_truncation_do_not_disturb_it(adapters, config, measured):
    """Kept sets and stops are columns of a rollout that not every answer has."""
    given = {"stop": ["e"], "top_k": 20, "max_new_tokens": 12}
    found, _, _ = measured(config("sft", "dpo:best_of_3", generation=given), dpo=adapters["other"])
    chosen = found["dpo:best_of_3"]
    assert chosen.rollout.stops is not None and any(chosen.rollout.ended)
    assert math.isfinite(chosen.metrics["kl"])


def test_what_sft_is_to_itself(base, adapters, context):
    """Its log-ratio is 0, and so is its KL."""
    rollout = drawn(([5, 6, 7], 0.0), ([8], 0.0)).rollout
    inside = context(sft=adapters["sft"])
    with Roles(base) as roles:
        roles.load("candidate", adapters["sft"])
        assert divergence.log_ratio_to_sft(inside, roles, "candidate", rollout) == pytest.approx(0, abs=1e-6)
        assert divergence.kl_to_sft(inside, roles, "candidate", rollout) == pytest.approx(0, abs=1e-6)
        assert divergence.best_of_n_to_sft(4, inside, roles, "candidate", rollout) == pytest.approx(0.6362944)
