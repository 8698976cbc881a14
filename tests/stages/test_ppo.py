"""PPO against a plain implementation of the same equations: one row at a time, full logits, no padding."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from rlhf_exp.errors import InputError
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.schema import PPO, Dataset, Generation, Lora, Model, Optim, PPORun, RewardSource, Views
from rlhf_exp.stages import experience as experiences
from rlhf_exp.stages import order, ppo
from rlhf_exp.stages.context import Context
from rlhf_exp.stages.experience import Experience
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import loss_of, update
from rlhf_exp.store.runs import RunFolder
from rlhf_exp.tracking import NullTracker, read_lines, read_metrics
from tests.stages.plain import (
    LENGTHS,
    ROWS,
    SCORES,
    gradients,
    iterate,
    nudge,
    plain_experience,
    plain_loss,
    plain_row,
    prepare,
    with_supports,
)

# ---------------------------------------------------------------- data order


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_batches_go_through_every_epoch_once(count, size):
    steps = 3 * count  # whole epochs: 3 * count * size places
    places = [i for step in range(1, steps + 1) for i in order.batch_of(count, size, seed=5, step=step)]
    epochs = [places[start : start + count] for start in range(0, len(places), count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 3:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_are_of_the_seed_and_the_step_alone():
    torch.manual_seed(0)
    first = [order.batch_of(50, 8, 3, step) for step in (1, 2, 7)]
    torch.manual_seed(1)
    assert [order.batch_of(50, 8, 3, step) for step in (7, 2, 1)] == first[::-1]
    assert order.batch_of(50, 8, 4, 1) != first[0]


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(12, 4, [4, 4, 4]), (10, 4, [4, 4, 2]), (17, 16, [16, 1]), (3, 8, [3])],
)
def test_a_pass_over_rows_ends_where_they_end(count, size, sizes):
    """As the Trainer's epochs: no row is in a pass twice, and none is left out."""
    for epoch in range(3):
        steps = range(epoch * len(sizes) + 1, (epoch + 1) * len(sizes) + 1)
        pieces = [order.piece_of(count, size, 5, step) for step in steps]
        assert [len(piece) for piece in pieces] == sizes
        assert sorted(i for piece in pieces for i in piece) == list(range(count))
    assert order.piece_of(50, 25, 5, 1) != order.piece_of(50, 25, 5, 3)
    assert order.piece_of(50, 25, 5, 1) != order.piece_of(50, 25, 6, 1)


def test_minibatches_partition_the_rows_of_every_epoch(ppo_config, rollout):
    config = ppo_config({"epochs": 3, "minibatches": 2, "micro_batch_size": 3})
    plan = order.minibatches(rollout, config, step=1)
    assert len(plan) == 3
    orders = []
    for epoch in plan:
        assert [sum(map(len, minibatch)) for minibatch in epoch] == [4, 4]
        assert all(len(rows) <= 3 for minibatch in epoch for rows in minibatch)
        rows = [row for minibatch in epoch for rows in minibatch for row in rows]
        assert sorted(rows) == list(range(ROWS))
        orders.append(tuple(frozenset(row for rows in minibatch for row in rows) for minibatch in epoch))
    assert len(set(orders)) > 1
    assert order.minibatches(rollout, config, step=1) == plan
    assert order.minibatches(rollout, config, step=2) != plan


def test_padded_puts_values_back_in_their_places():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([1.0, 2.0, 3.0])
    assert experiences.padded(x, mask).tolist() == [[1, 2, 0], [3, 0, 0]]


# ---------------------------------------------------------------- against the plain implementation


CASES = {
    "default": ({}, {}, False),
    "temperature": ({"kl_estimator": "k2", "lam": 0.8, "gamma": 0.9}, {"temperature": 0.7}, False),
    "no minimum": ({"kl_estimator": "k3", "whiten_advantages": False}, {"min_new_tokens": 0}, False),
    "minimum 3": ({"kl_coef": 0.5, "vf_coef": 1.0, "cliprange": 0.05}, {"min_new_tokens": 3}, False),
    "top-p": ({"cliprange_value": 0.01, "reward_clip": 1.0}, {"top_p": 0.8, "temperature": 1.3}, True),
}


@pytest.fixture(params=CASES, ids=str)
def case(request, ppo_config, rollout):
    settings, generation, restricted = CASES[request.param]
    config = ppo_config(settings, generation)
    if config.generation.min_new_tokens == 3:  # then no answer of this rollout may end before
        rollout = rollout._replace(
            responses=[
                [7 if token == 2 and t < 3 else token for t, token in enumerate(response)]
                for response in rollout.responses
            ]
        )
    return config, with_supports(rollout) if restricted else rollout


@pytest.mark.parametrize("critic", ["trunk", "own"])
def test_experience_is_that_of_the_definitions(case, actors, critic):
    config, rollout = case
    plan = order.minibatches(rollout, config, step=1)
    got, metrics = prepare(config, actors[critic], rollout, SCORES, plan[0])
    expected = plain_experience(config, actors[critic], rollout, SCORES)
    for row, plain in enumerate(expected):
        n = LENGTHS[row]
        assert got.mask[row].tolist() == [True] * n + [False] * (max(LENGTHS) - n)
        for name in ("logprobs", "values", "advantages", "returns"):
            whole = getattr(got, name)[row]
            assert torch.allclose(whole[:n], getattr(plain, name), atol=1e-5), name
            assert (whole[n:] == 0).all()
    kl = sum(float((row.logprobs - row.ref).sum()) for row in expected) / ROWS
    assert metrics["objective/kl"] == pytest.approx(kl, abs=1e-4)
    assert abs(kl) > 0.01  # else the reference would not have been looked at


@pytest.mark.parametrize("critic", ["trunk", "own"])
def test_loss_and_gradient_are_those_of_the_plain_implementation(case, actors, critic):
    config, rollout = case
    actors = actors[critic]
    plan = order.minibatches(rollout, config, step=1)
    experience, _ = prepare(config, actors, rollout, SCORES, plan[0])
    plain = plain_experience(config, actors, rollout, SCORES)
    nudge(actors)
    rows = list(range(ROWS))
    expected = plain_loss(config, actors, rollout, plain, rows)
    expected.backward()
    expected_gradients = gradients(actors)
    loss, shares, _ = loss_of(config, actors, rollout, experience, rows, experience.mask.sum())
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for got, wanted in zip(gradients(actors), expected_gradients, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert shares["policy/clipfrac"] > 0  # the clip is in play
    assert shares["critic/clipfrac"] > 0


@pytest.mark.parametrize(("minibatches", "clip"), [(1, 1e9), (2, 1e9), (2, 0.5)])
def test_micro_batches_change_nothing(actors, rollout, ppo_config, minibatches, clip):
    """Two epochs of plain gradient descent, in micro-batches of 1, 2, 3 and 8, and written out plainly."""
    actors, ends = actors["trunk"], {}
    start = [p.detach().clone() for p in actors.trainable()]

    def reset() -> torch.optim.Optimizer:
        with torch.no_grad():
            for parameter, value in zip(actors.trainable(), start, strict=True):
                parameter.copy_(value)
        return torch.optim.SGD(actors.trainable(), lr=0.05)

    for size in (1, 2, 3, 8):
        settings = {"epochs": 2, "minibatches": minibatches, "micro_batch_size": size}
        config = ppo_config(settings, optim={"max_grad_norm": clip})
        optimizer = reset()
        plan = order.minibatches(rollout, config, step=1)
        experience, _ = prepare(config, actors, rollout, SCORES, plan[0])
        update(config, actors, optimizer, State.start(config.ppo), rollout, experience, plan)
        ends[size] = [p.detach().clone() for p in actors.trainable()]
    optimizer = reset()
    plain = plain_experience(config, actors, rollout, SCORES)
    for epoch in plan:
        for minibatch in epoch:
            loss = plain_loss(config, actors, rollout, plain, [row for rows in minibatch for row in rows])
            optimizer.zero_grad()
            loss.backward()
            norm = sum(float(p.grad.square().sum()) for p in actors.trainable()) ** 0.5
            for parameter in actors.trainable():
                parameter.grad *= min(1.0, clip / norm)
            optimizer.step()
    ends["plain"] = [p.detach().clone() for p in actors.trainable()]
    moved = max(float((a - b).abs().max()) for a, b in zip(start, ends["plain"], strict=True))
    assert moved > 1e-3
    for size in (1, 2, 3, 8):
        for got, wanted in zip(ends[size], ends["plain"], strict=True):
            assert torch.allclose(got, wanted, atol=1e-5), size


def test_the_first_ratio_is_that_before_any_step(actors, rollout, ppo_config):
    """The metrics of the start are of the first minibatch alone; those of the policy are means over all."""
    actors = actors["trunk"]
    config = ppo_config({"epochs": 2, "minibatches": 2}, optim={"max_grad_norm": 1e9})
    plan = order.minibatches(rollout, config, step=1)
    experience, _ = prepare(config, actors, rollout, SCORES, plan[0])
    old = plain_experience(config, actors, rollout, SCORES)
    nudge(actors)
    with torch.no_grad():
        rows = [row for rows in plan[0][0] for row in rows]
        log_ratio = torch.cat([plain_row(config, actors, rollout, r)[0] - old[r].logprobs for r in rows])
    optimizer = torch.optim.SGD(actors.trainable(), lr=0.1)
    metrics = update(config, actors, optimizer, State.start(config.ppo), rollout, experience, plan)
    assert metrics["first/ratio_max"] == pytest.approx(float(log_ratio.exp().max()), abs=1e-4)
    k3 = float((log_ratio.exp() - 1 - log_ratio).mean())
    assert metrics["first/approxkl"] == pytest.approx(k3, abs=1e-5)
    assert k3 > 1e-3
    assert metrics["policy/approxkl"] != pytest.approx(k3, rel=0.01)
    assert metrics["policy/ratio_max"] >= metrics["first/ratio_max"]
    assert metrics["optim/updates"] == 4


def test_what_is_in_the_padding_does_not_matter(actors, rollout, ppo_config, base, monkeypatch):
    config, actors = ppo_config(), actors["trunk"]
    plan = order.minibatches(rollout, config, step=1)
    found = []
    for pad in (base.pad_id, 17, 400):
        monkeypatch.setattr(type(base), "pad_id", property(lambda _, pad=pad: pad))
        experience, metrics = prepare(config, actors, rollout, SCORES, plan[0])
        holes = Experience(
            *(torch.where(experience.mask, x, math.nan) for x in experience[:5]), experience.mask
        )
        loss, _, _ = loss_of(config, actors, rollout, holes, list(range(ROWS)), holes.mask.sum())
        loss.backward()
        found.append((metrics, loss.item(), gradients(actors)))
    for metrics, loss, gradient in found[1:]:
        assert metrics == found[0][0]
        assert loss == found[0][1]
        assert all(map(torch.equal, gradient, found[0][2]))
    assert math.isfinite(found[0][1])
    assert all(g.isfinite().all() for g in found[0][2])


# ---------------------------------------------------------------- before the first update


@pytest.mark.parametrize("critic", ["trunk", "own"])
@pytest.mark.parametrize("minibatches", [1, 4])
@pytest.mark.parametrize(
    "generation", [{}, {"top_p": 0.8}, {"temperature": 0.7}, {"top_k": 5}], ids=["T1", "p.8", "T.7", "k5"]
)
def test_kl_is_zero_and_ratio_one_before_the_first_update(
    base, adapters, context, ppo_config, critic, minibatches, generation
):
    config = ppo_config(
        {"critic": critic, "minibatches": minibatches, "epochs": 2, "micro_batch_size": 3}, generation
    )
    with Roles(base) as roles:
        built = ppo.build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        assert built.critic == ("policy" if critic == "trunk" else "critic")
        metrics = iterate(config, built)
    assert metrics["objective/kl"] == 0
    assert metrics["objective/kl_max"] == 0
    assert metrics["first/ratio_max"] == 1
    assert metrics["first/approxkl"] == 0
    assert metrics["policy/ratio_max"] > 1  # the later updates are not the first
    assert metrics["rollout/logprob_difference"] < 1e-4


@pytest.mark.parametrize("critic", ["trunk", "own"])
def test_in_bfloat16_within_the_tolerance(bf16_base, adapters, context, ppo_config, critic):
    config = ppo_config({"critic": critic, "minibatches": 2, "micro_batch_size": 3}, {"top_p": 0.9})
    parents = {"sft": adapters["sft"], "reward": adapters["reward"]}
    with Roles(bf16_base) as roles:
        built = ppo.build_actors(config, context(on=bf16_base, **parents), roles)
        metrics = iterate(config, built)
    tolerance = ppo.TOLERANCE[torch.bfloat16]
    assert tolerance <= 0.05
    assert metrics["objective/kl_max"] <= tolerance
    assert abs(metrics["first/ratio_max"] - 1) <= tolerance
    assert metrics["rollout/logprob_difference"] < 0.1


def test_without_sft_the_base_is_the_reference(base, adapters, context, ppo_config):
    config = ppo_config(reward_source={"kind": "function", "function": "length"})
    with Roles(base) as roles:
        built = ppo.build_actors(config, context(), roles)
        assert built.ref is BASE
        assert iterate(config, built)["objective/kl_max"] == 0


def test_the_critic_of_its_own_starts_as_the_reward_model(base, adapters, context, ppo_config):
    config = ppo_config({"critic": "own"})
    with Roles(base) as roles:
        built = ppo.build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        head = ScalarHead.load(adapters["reward"] / "head.safetensors")
        assert torch.equal(built.value_head.weight, head.weight)
        assert torch.equal(built.value_head.bias, head.bias)
        for one, other in zip(roles.parameters("critic"), roles.parameters("reward"), strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad
            assert not other.requires_grad
        assert not any(p.requires_grad for p in roles.parameters("ref"))
        trainable = {id(p) for p in built.trainable()}
        assert trainable == {id(p) for p in base.model.parameters() if p.requires_grad} | {
            id(p) for p in built.value_head.parameters()
        }


@pytest.mark.parametrize("critic", ["trunk", "own"])
def test_only_policy_and_critic_move(base, adapters, context, ppo_config, critic):
    config = ppo_config({"critic": critic, "epochs": 2})
    with Roles(base) as roles:
        built = ppo.build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
        iterate(config, built)
        moved = {name for name, p in base.model.named_parameters() if not torch.equal(p, before[name])}
    roles_moved = {name.split(".")[-2] for name in moved}
    assert roles_moved == {"policy"} | ({"critic"} if critic == "own" else set())


@pytest.mark.parametrize("fault", ["another adapter", "the plain base", "dropout", "policy is another"])
def test_a_wrong_start_is_an_error(base, adapters, context, ppo_config, fault):
    config = ppo_config(reward_source={"kind": "function", "function": "length"})
    sft = adapters["dropout" if fault == "dropout" else "sft"]
    with Roles(base) as roles:
        built = ppo.build_actors(config, context(sft=sft), roles)
        if fault == "another adapter":
            roles.remove("ref")
            roles.load("ref", adapters["other"])
        elif fault == "the plain base":
            built.ref = BASE
        elif fault == "dropout":
            base.model.train()
        else:
            nudge(built)
        try:
            with pytest.raises(InputError, match="does not start where SFT ended"):
                iterate(config, built)
        finally:
            base.model.eval()


def test_dropout_of_the_adapters_config_is_off_in_ppo(base, adapters, context, ppo_config):
    config = ppo_config(reward_source={"kind": "function", "function": "length"})
    with Roles(base) as roles:
        built = ppo.build_actors(config, context(sft=adapters["dropout"]), roles)
        assert iterate(config, built)["objective/kl_max"] == 0


def test_a_wrong_ratio_alone_is_an_error():
    sound = {"objective/kl_max": 0.0, "first/ratio_max": 1.0, "first/approxkl": 0.0}
    sound["rollout/logprob_difference"] = 1e-5
    ppo.check_start(sound, torch.float32)
    small = [{"first/ratio_max": 1.0001}, {"objective/kl_max": 1e-6}, {"first/approxkl": 1e-6}]
    for wrong in [*small, {"rollout/logprob_difference": 0.01}]:
        with pytest.raises(InputError, match="does not start"):
            ppo.check_start(sound | wrong, torch.float32)
    ppo.check_start(sound | {"first/ratio_max": 1.04}, torch.bfloat16)
    for wrong in (
        {"first/ratio_max": 1.06},
        {"rollout/logprob_difference": 0.2},
        {"objective/kl_max": math.nan},
        {"first/ratio_max": math.nan},
    ):
        with pytest.raises(InputError, match="does not start"):
            ppo.check_start(sound | wrong, torch.bfloat16)


# ---------------------------------------------------------------- it learns

STEPS = 20


@pytest.fixture(scope="module")
def good(base) -> set[int]:
    """Half of the vocabulary, on one side of the embedding space: an untrained model gives them half of the time."""
    weight = base.model.get_output_embeddings().weight
    side = weight @ torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    return set(side.argsort()[256:].tolist())


@pytest.fixture(scope="module")
def learned(base, good, tmp_path_factory):
    """A run whose reward is the share of good tokens among two."""

    def share(source, roles, heads, prompts, responses, *_):
        return [sum(token in good for token in response) / len(response) for response in responses]

    folder = RunFolder(tmp_path_factory.mktemp("learned") / "run", "ppo", "0" * 64)
    folder.start({})
    config = PPORun(
        stage="ppo",
        seed=2,
        model=Model(name="tiny", source="builtin", lora_targets=["q_proj", "v_proj", "o_proj", "down_proj"]),
        lora=Lora(r=8),
        dataset=Dataset(name="reviews", family="reviews", views=Views(*["builtin:reviews"] * 3)),
        ppo=PPO(steps=STEPS, batch_size=64, micro_batch_size=64, kl_coef=0.01, save_every=5),
        generation=Generation(max_new_tokens=2),
        optim=Optim(lr=1.5e-2, schedule="constant"),
        reward_source=RewardSource(kind="function", function="length"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "score", share)
        torch.set_num_threads(1)
        result = ppo.run(config, Context(base, folder, NullTracker(), {}))
    return folder.path, result


def test_a_simple_reward_rises(learned):
    path, result = learned
    metrics = read_metrics(path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    scores = [line["objective/scores"] for line in metrics]
    assert 0.37 < scores[0] < 0.63  # 128 tokens: three standard errors
    assert sum(scores[-3:]) / 3 > 0.7  # .85 to .90 with seeds 0 to 9
    assert metrics[0]["objective/kl"] == 0
    assert metrics[-1]["objective/kl"] > 0.1
    assert result["objective/scores"] == scores[-1]


def test_the_value_head_learns_the_return(learned):
    metrics = read_metrics(learned[0] / "metrics.jsonl")
    assert metrics[0]["critic/explained_variance"] == pytest.approx(0, abs=1e-6)  # it starts at 0
    assert metrics[-1]["critic/loss"] < 0.5 * metrics[0]["critic/loss"]  # .08 to .34 of it with seeds 0 to 9


def test_adapters_are_kept_and_differ(learned):
    path, _ = learned
    kept = ["step_00005", "step_00010", "step_00015"]
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == kept
    contents = {
        (folder / "adapter_model.safetensors").read_bytes()
        for folder in (path / "adapter", *(path / "checkpoints").iterdir())
    }
    assert len(contents) == 4
    assert (path / "head" / "head.safetensors").is_file()
    assert not (path / "critic").exists()  # it is the policy's trunk


def test_samples_of_every_iteration(learned):
    rows = list(read_lines(learned[0] / "samples.jsonl"))
    assert Counter(row["step"] for row in rows) == dict.fromkeys(range(1, STEPS + 1), 4)
    assert set(rows[0]) == {"step", "prompt", "response", "score", "ended"}


def test_the_adapter_is_the_policy_of_the_end(learned, good, base):
    """Read with PEFT alone, the policy prefers good tokens as the last scores say."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prompts = [base.tokenizer(row["prompt"])["input_ids"] for row in read_lines(learned[0] / "samples.jsonl")]

    def mass(model) -> float:
        with torch.no_grad():
            probs = [model(input_ids=torch.tensor([p])).logits[0, -1].softmax(0) for p in prompts[:12]]
        return float(torch.stack(probs)[:, sorted(good)].sum(1).mean())

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    assert 0.35 < mass(plain) < 0.65
    assert mass(PeftModel.from_pretrained(plain, learned[0] / "adapter")) > 0.7
