"""ILQL: losses and decoding against PEFT and safetensors alone, one answer at a time; micro-batches; the base."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.data.load import load_view
from rlhf_exp.errors import InputError
from rlhf_exp.model.ilql_heads import ILQLHeads
from rlhf_exp.model.roles import Roles
from rlhf_exp.rewards.rules import length
from rlhf_exp.rollout.engine import generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import ILQL, Generation, Optim, RewardSource, Train
from rlhf_exp.stages import ilql, ilql_eval
from rlhf_exp.tracking import read_lines, read_metrics

HEADS = "ilql/heads.safetensors"
WEIGHTS = "adapter/adapter_model.safetensors"
LONGEST = 36  # about half of the responses end within it


@pytest.fixture
def config(run_config):
    """ILQLRun of a few steps on sixteen rows, scored by the number of words."""

    def make(steps=1, lr=1e-9, micro=16, rows=16, batch=16, kind="function", **values):
        return run_config(
            "ilql",
            dataset={"limit": rows, "max_response_tokens": LONGEST},
            train=Train(steps=steps, batch_size=batch, micro_batch_size=micro),
            optim=Optim(lr=lr, schedule="constant"),
            ilql=ILQL(**{"betas": [0.0], "eval_prompts": 3, "head": "linear", **values}),
            generation=Generation(max_new_tokens=5),
            reward_source=RewardSource(kind=kind, function="length"),
        )

    return make


def encoded(base, prompt, response):
    ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {response}")]
    return ids[0][-24:], [*ids[1], base.eos_id][:LONGEST]


class Oracle:
    """PEFT's own model and the heads' file, one sequence at a time."""

    def __init__(self, base, folder, head="linear"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(plain, folder / "adapter").eval()
        self.state, self.head = load_file(folder / HEADS), head
        self.output = plain.get_output_embeddings().weight.detach()

    @torch.no_grad()
    def states(self, ids):
        """Log-probs and hidden states after each token."""
        found = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        return found.logits[0].log_softmax(-1), found.hidden_states[-1][0]

    def q(self, part, hidden):
        if self.head != "linear":
            weight, bias = self.state[f"{part}.inner.weight"], self.state[f"{part}.inner.bias"]
            hidden = (hidden @ weight.T + bias).clamp(min=0)
        hidden = hidden @ self.state[f"{part}.weight"].T
        return hidden @ self.output.T if self.head == "tied" else hidden + self.state[f"{part}.bias"]

    def v(self, hidden):
        if self.head != "linear":
            hidden = (hidden @ self.state["v_inner.weight"].T + self.state["v_inner.bias"]).clamp(min=0)
        return hidden @ self.state["v_weight"] + self.state["v_bias"]


def losses_by_hand(base, oracle, samples, rewards, settings) -> dict[str, float]:
    """Every token of every answer in a loop; means over all tokens."""
    sums = dict.fromkeys(("q", "v", "cql", "awac"), 0.0)
    tokens = 0
    for (prompt, response), reward in zip(samples, rewards, strict=True):
        logprobs, hidden = oracle.states(prompt + response)
        at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        values = [float(oracle.v(hidden[i])) for i in at]
        for t, (i, token) in enumerate(zip(at, response, strict=True)):
            last = t + 1 == len(response)
            target = reward if last else settings.gamma * values[t + 1]
            for number in (0, 1):
                table = oracle.q(f"q.{number}", hidden[i])
                sums["q"] += (target - float(table[token])) ** 2
                sums["cql"] -= float(table.log_softmax(0)[token])
            smaller = min(float(oracle.q(f"target.{n}", hidden[i])[token]) for n in (0, 1))
            u = smaller - values[t]
            sums["v"] += (settings.tau if u >= 0 else 1 - settings.tau) * u * u
            sums["awac"] -= min(math.exp(settings.awac_beta * u), 100) * float(logprobs[i, token])
            tokens += 1
    return {name: value / tokens for name, value in sums.items()}


def samples_and_rewards(base, run):
    """Ids of the training answers, their numbers of words with mean 0 and variance 1, and the mean."""
    rows = load_view(run.dataset, "demonstrations", "train")
    samples = [encoded(base, row.prompt, row.response) for row in rows]
    texts = base.tokenizer.batch_decode([answer for _, answer in samples], skip_special_tokens=True)
    words = torch.tensor(length([], texts))
    return samples, ((words - words.mean()) / words.std(correction=0)).tolist(), float(words.mean())


@pytest.mark.parametrize(("head", "micro"), [("linear", 16), ("mlp", 3), ("tied", 5)])
def test_the_first_losses(base, config, context, adapters, head, micro):
    """At a learning rate of nearly 0 what is saved is what the first losses were computed with."""
    run = config(micro=micro, head=head, awac_beta=2.0, gamma=0.9, tau=0.8)
    given = context(sft=adapters["sft"])
    found = ilql.run(run, given)
    samples, rewards, mean = samples_and_rewards(base, run)
    assert found["data/reward"] == pytest.approx(mean)
    assert len({len(r) for _, r in samples}) > 3  # so that padding would show
    oracle = Oracle(base, given.folder.path, head)
    expected = losses_by_hand(base, oracle, samples, rewards, run.ilql)
    logged = read_metrics(given.folder.path / "metrics.jsonl")[0]
    for name, value in expected.items():
        assert logged[f"ilql/{name}_loss"] == pytest.approx(value, abs=2e-4), name
    whole = expected["q"] + expected["v"] + 0.1 * expected["cql"] + expected["awac"]
    assert logged["ilql/loss"] == pytest.approx(whole, abs=5e-4)


def test_the_second_losses(base, config, context, adapters):
    """What one step saves is what the second step starts from: the copies now lag, and V follows them."""
    given = {}
    for steps in (1, 2):
        given[steps] = context(f"steps{steps}", sft=adapters["sft"])
        run = config(steps=steps, lr=1e-2, polyak=0.3)
        ilql.run(run, given[steps])
    samples, rewards, _ = samples_and_rewards(base, run)
    expected = losses_by_hand(base, Oracle(base, given[1].folder.path), samples, rewards, run.ilql)
    logged = read_metrics(given[2].folder.path / "metrics.jsonl")[1]
    for name, value in expected.items():
        assert logged[f"ilql/{name}_loss"] == pytest.approx(value, abs=2e-4), name


def test_micro_batches_change_nothing(config, context, adapters):
    """Answers differ in length, so a mean of means would differ."""
    found = {}
    for micro in (8, 3):
        given = context(f"micro{micro}", sft=adapters["sft"])
        ilql.run(config(steps=4, lr=1e-3, micro=micro, rows=21, batch=8), given)
        found[micro] = (
            load_file(given.folder.path / WEIGHTS) | load_file(given.folder.path / HEADS),
            [line["ilql/loss"] for line in read_metrics(given.folder.path / "metrics.jsonl")],
        )
    (one, losses), (other, other_losses) = found.values()
    assert losses == pytest.approx(other_losses, abs=1e-4)
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=2e-4), name


def test_comparisons_are_rewards_of_plus_and_minus_one(base, config, context, adapters):
    run = config(data="comparisons", rows=7)
    given = context(sft=adapters["sft"])
    metrics = ilql.run(run, given)
    assert (metrics["data/answers"], metrics["data/reward"], metrics["data/reward_std"]) == (14, 0, 1)
    rows = load_view(run.dataset, "comparisons", "train")
    samples = [encoded(base, r.prompt, r.chosen) for r in rows]
    samples += [encoded(base, r.prompt, r.rejected) for r in rows]
    with Roles(base) as roles:
        data = ilql.load(run, given, roles, None)
    assert list(zip(data.rollout.prompts, data.rollout.responses, strict=True)) == samples
    assert data.rewards.tolist() == [1.0] * 7 + [-1.0] * 7


def test_normalised_and_raw_rewards(base, config, context):
    with Roles(base) as roles:
        raw, whitened = (
            ilql.load(config(normalise_rewards=on), context(), roles, None).rewards for on in (False, True)
        )
    assert raw.mean() > 3
    assert torch.equal(raw, raw.round())  # words
    assert abs(whitened.mean()) < 1e-6
    assert whitened.std(correction=0) == pytest.approx(1)
    assert torch.equal(raw.argsort(stable=True), whitened.argsort(stable=True))


def test_equal_rewards_are_an_error(base, config, context, monkeypatch):
    monkeypatch.setattr(ilql, "score", lambda *a: [2.0] * len(a[3]))
    with Roles(base) as roles, pytest.raises(InputError, match="all 16 rewards are 2, so there is nothing"):
        ilql.load(config(), context(), roles, None)


def test_rewards_of_a_reward_model(base, config, context, adapters):
    """The frozen reward adapter and head score the answers; only the policy is trained."""
    given = context(sft=adapters["sft"], reward=adapters["reward"])
    run = config(kind="learned", normalise_rewards=False, lr=1e-3)
    metrics = ilql.run(run, given)
    from rlhf_exp.model.heads import ScalarHead
    from rlhf_exp.rewards.learned import score_sequences

    rows = load_view(run.dataset, "demonstrations", "train")
    sequences = [p + r for p, r in (encoded(base, row.prompt, row.response) for row in rows)]
    with Roles(base) as roles:
        roles.load("reward", adapters["reward"])
        head = ScalarHead.load(adapters["reward"] / "head.safetensors")
        scores = score_sequences(roles, "reward", head, sequences, 4)
    assert metrics["data/reward"] == pytest.approx(sum(scores) / 16, abs=1e-4)


# ---------------------------------------------------------------- decoding


@pytest.fixture
def policy(base, adapters):
    """Roles with the SFT adapter as policy, eight prompts, and random heads with Q of some size."""
    heads = ILQLHeads("mlp", base.hidden_size, base.output_layer[0], seed=1)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.mul_(3)
        for parameter in heads.target.parameters():  # unlike the twins
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 512, (n,), generator=generator).tolist() for n in (3, 9, 1, 6, 6, 2, 12, 4)]
    with Roles(base) as roles:
        roles.load("policy", adapters["sft"])
        yield roles, heads, prompts


def test_beta_0_decodes_as_the_policy_bit_for_bit(base, policy):
    roles, heads, prompts = policy
    keys = [row_key(0, 0, i) for i in range(8)]
    generation = Generation(max_new_tokens=8)
    plain = generate(base, lambda: roles.use("policy"), prompts, keys, generation)
    steered = ilql_eval.decode(roles, ilql_eval.steer(heads, 0), prompts, keys, generation)
    adding_zero = generate(
        base, lambda: roles.use("policy"), prompts, keys, generation, adjust=lambda h: torch.zeros(len(h), 1)
    )
    for other in (steered, adding_zero):
        assert other.responses == plain.responses
        assert all(torch.equal(a, b) for a, b in zip(other.logprobs, plain.logprobs, strict=True))
    tiny = ilql_eval.decode(roles, ilql_eval.steer(heads, 1e-30), prompts, keys, generation)
    assert tiny.responses == plain.responses


@pytest.mark.parametrize("beta", [0.5, 16.0])
def test_decoding_equals_recomputation(base, policy, beta):
    """One row, no cache, no padding: softmax of logits + beta (min of the copies' Q - V), and its most probable."""
    roles, heads, prompts = policy
    keys = [row_key(0, 0, i) for i in range(8)]
    for greedy in (False, True):
        generation = Generation(max_new_tokens=6, min_new_tokens=2, greedy=greedy)
        found = ilql_eval.decode(roles, ilql_eval.steer(heads, beta), prompts, keys, generation)
        for prompt, response, logprobs in zip(prompts, found.responses, found.logprobs, strict=True):
            for t, token in enumerate(response):
                with torch.no_grad(), roles.use("policy"):
                    out = base.model(
                        input_ids=torch.tensor([prompt + response[:t]]), output_hidden_states=True
                    )
                    hidden = out.hidden_states[-1][:, -1]
                    tables = [f @ w.T + b for f, w, b in heads.targets(hidden)]
                    logits = out.logits[0, -1] + beta * (torch.minimum(*tables)[0] - heads.values(hidden)[0])
                if t < 2:
                    logits[base.eos_id] = -torch.inf
                if greedy:
                    assert token == int(logits.argmax())
                else:
                    assert float(logits.log_softmax(0)[token]) == pytest.approx(float(logprobs[t]), abs=1e-3)


def test_steering_changes_what_is_said(policy):
    roles, heads, prompts = policy
    keys = [row_key(0, 0, i) for i in range(8)]
    answers = [
        ilql_eval.decode(roles, ilql_eval.steer(heads, beta), prompts, keys, Generation(max_new_tokens=8))
        for beta in (0.0, 1.0, 16.0)
    ]
    assert len({str(a.responses) for a in answers}) == 3


def test_the_evaluation(base, config, context, adapters):
    """Every beta, several answers to each validation prompt, scored as they are; best is the best sampled mean."""
    run = config(betas=[0.0, 4.0, 100.0], eval_prompts=3, eval_samples=4)
    given = context(sft=adapters["sft"])
    metrics = ilql.run(run, given)
    assert metrics["eval/prompts"] == 3
    assert len({id for id, _ in ilql_eval.prompts_of(run)}) == 3
    validation = {row.prompt for row in load_view(run.dataset, "demonstrations", "validation")}
    assert {prompt for _, prompt in ilql_eval.prompts_of(run)} <= validation
    rewards = {beta: metrics[f"eval/beta_{beta:g}/reward"] for beta in run.ilql.betas}
    assert metrics["eval/best_reward"] == max(rewards.values()) == rewards[metrics["eval/best_beta"]]
    samples = list(read_lines(given.folder.path / "samples.jsonl"))
    assert [s["beta"] for s in samples] == [0.0] * 3 + [4.0] * 3 + [100.0] * 3
    for sample in samples:
        assert sample["score"] == length([], [sample["response"]])[0]
        assert sample["greedy_score"] == length([], [sample["greedy"]])[0]
    greedy = [s["greedy_score"] for s in samples if s["beta"] == 4]
    assert metrics["eval/beta_4/greedy_reward"] == pytest.approx(sum(greedy) / 3)


def test_without_a_validation_split_training_prompts_are_answered(config):
    run = config(eval_prompts=0)
    run.dataset.validation_share = 0.0
    rows = load_view(run.dataset, "demonstrations", "train")
    assert {prompt for _, prompt in ilql_eval.prompts_of(run)} == {row.prompt for row in rows}


# ---------------------------------------------------------------- the stage as a whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_and_the_copies_follow(config, context, base, bf16_base, dtype):
    given = context(on=base if dtype == "float32" else bf16_base)
    run = config(steps=40, lr=1e-2, polyak=0.5, betas=[0.0, 16.0])
    ilql.run(run, given)
    metrics = read_metrics(given.folder.path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 41))
    # the conservative loss is a cross-entropy of Q, which the Bellman loss holds near the rewards
    for name, share in (("q", 0.1), ("cql", 0.9), ("awac", 0.6)):
        assert metrics[-1][f"ilql/{name}_loss"] < share * metrics[0][f"ilql/{name}_loss"], name
    state = load_file(given.folder.path / HEADS)
    start = ILQLHeads("linear", base.hidden_size, base.output_layer[0], run.seed).state_dict()
    moved = (state["q.0.weight"] - start["q.0.weight"]).norm()
    behind = (state["q.0.weight"] - state["target.0.weight"]).norm()
    assert moved > 0.1
    assert 0 < behind < 0.3 * moved
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_where_the_policy_starts(config, context, adapters):
    """At a learning rate of nearly 0 the adapter is SFT's."""
    given = context(sft=adapters["sft"])
    ilql.run(config(), given)
    stored, sft = (
        load_file(given.folder.path / WEIGHTS),
        load_file(adapters["sft"] / "adapter_model.safetensors"),
    )
    assert stored.keys() == sft.keys()
    assert all(torch.allclose(stored[name], sft[name], atol=1e-7) for name in sft)


def test_the_base_is_as_before(base, config, context, fingerprint, unchanged, adapters):
    before = fingerprint(base)
    ilql.run(config(steps=2, lr=1e-2, betas=[0.0, 4.0]), context(sft=adapters["sft"]))
    unchanged(base, before)


def test_the_same_run_twice_is_the_same(config, context, adapters):
    files = []
    for name in ("one", "two"):
        given = context(name, sft=adapters["sft"])
        ilql.run(config(steps=3, lr=1e-3, betas=[4.0]), given)
        files.append([(given.folder.path / file).read_bytes() for file in (WEIGHTS, HEADS)])
    assert files[0] == files[1]
