"""Each fault of `ppo.faults` makes wrong, in the known direction, what the sound code has right."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf_exp.errors import InputError
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.stages import faults, order, ppo, references
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.state import State
from rlhf_exp.stages.update import update
from tests.stages.plain import LENGTHS, ROWS, SCORES, iterate, prepare

FUNCTION = {"kind": "function", "function": "length"}


@pytest.fixture
def started(base, adapters, context, ppo_config):
    """Metrics of the first iteration with some faults."""

    def run(*names: str, **settings):
        config = ppo_config({"faults": list(names), "micro_batch_size": 3, **settings})
        with Roles(base) as roles:
            actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
            return iterate(config, actors)

    return run


def experience_of(ppo_config, actors, rollout, *names: str, **settings):
    config = ppo_config({"faults": list(names), **settings})
    plan = order.minibatches(rollout, config, step=1)
    return prepare(config, actors["trunk"], rollout, SCORES, plan[0])


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_run_goes_on_with_each_and_says_what_it_breaks(context, adapters, ppo_config, name, capsys):
    config = ppo_config({"faults": [name], "steps": 1})
    given = context(sft=adapters["sft"], reward=adapters["reward"])
    ppo.run(config, given)
    said = capsys.readouterr().out
    assert f"fault {name}: {faults.FAULTS[name].breaks}" in said


def test_without_faults_nothing_is_said(context, ppo_config, capsys):
    ppo.run(ppo_config(reward_source=FUNCTION), context())
    assert "fault" not in capsys.readouterr().out


def test_unknown_names_are_refused_with_the_list(context, ppo_config):
    config = ppo_config({"faults": ["wrong_referense", "sigmoid_scores", "x"]}, reward_source=FUNCTION)
    with pytest.raises(InputError) as caught:
        ppo.run(config, context())
    first, second = caught.value.problems
    assert first.startswith(
        "ppo.faults: there is no fault wrong_referense; did you mean wrong_reference? there are "
    )
    assert second.startswith("ppo.faults: there is no fault x; there are ")
    assert all(name in first for name in faults.FAULTS)


def test_they_are_refused_before_anything_is_trained(tmp_path, capsys):
    from rlhf_exp import cli

    words = ["stage=ppo", "model=tiny", "tracking=none", f"output_dir={tmp_path / 'out'}", "dry_run=true"]
    assert cli.main([*words, "ppo.faults=[nothing_known]"]) == 2
    assert "there is no fault nothing_known" in capsys.readouterr().err
    assert cli.main([*words, "ppo.faults=[missing_grad_clip]"]) == 0


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("name", ["wrong_reference", "ref_with_dropout"])
def test_the_kl_starts_away_from_0_and_its_check_is_waived(started, name):
    metrics = started(name)
    assert metrics["objective/kl_max"] > 0.05
    assert metrics["objective/kl"] != 0
    assert metrics["first/ratio_max"] == 1
    assert started()["objective/kl_max"] == 0


def test_the_wrong_reference_is_the_plain_base(base, adapters, context, ppo_config):
    for names, ref in ((["wrong_reference"], BASE), ([], "ref")):
        with Roles(base) as roles:
            config = ppo_config({"faults": names})
            assert (
                build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles).ref
                == ref
            )


def test_the_kl_of_a_wrong_reference_is_that_of_sft_and_base(base, adapters, context, ppo_config):
    """On average over what SFT samples it is above 0: by the exact KL of the two distributions."""
    config = ppo_config({"faults": ["wrong_reference"], "batch_size": 8}, {"max_new_tokens": 6})
    with Roles(base) as roles:
        actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        totals = [iterate(config, actors, step=step, lr=0.0)["objective/kl"] for step in range(1, 13)]
    assert sum(totals) / len(totals) > 0.1


def test_only_the_matching_check_is_waived():
    sound = {"objective/kl_max": 0.0, "first/ratio_max": 1.0, "first/approxkl": 0.0}
    sound["rollout/logprob_difference"] = 0.0
    config = SimpleNamespace(faults=["wrong_reference", "missing_grad_clip"])
    assert faults.waived(config) == {"kl"}
    ppo.check_start(sound | {"objective/kl_max": 3.0}, torch.float32, {"kl"})
    for wrong in ({"first/ratio_max": 1.1}, {"first/approxkl": 0.1}, {"rollout/logprob_difference": 1.0}):
        with pytest.raises(InputError, match="does not start"):
            ppo.check_start(sound | wrong, torch.float32, {"kl"})


# ---------------------------------------------------------------- scores


def test_without_eos_the_reward_model_scores_another_input(base, adapters, context, ppo_config, monkeypatch):
    asked = []
    sound = ppo.score
    monkeypatch.setattr(ppo, "score", lambda *arguments: asked.append(arguments[4]) or sound(*arguments))
    # more than half of these answers end at once
    monkeypatch.setattr(ppo, "judged", lambda rollout: [[7, 8, base.eos_id] for _ in rollout.responses])
    for names in ([], ["score_without_eos"]):
        config = ppo_config({"faults": names})
        with Roles(base) as roles:
            iterate(
                config, build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
            )
    with_eos, without = asked
    text = base.tokenizer.decode([7, 8])
    assert with_eos == [[7, 8, base.eos_id]] * ROWS
    assert without == [base.tokenizer(text, add_special_tokens=False)["input_ids"]] * ROWS
    assert base.eos_id not in without[0]


def test_an_empty_answer_without_eos_is_the_prompt_alone(base):
    config = SimpleNamespace(faults=["score_without_eos"])
    assert faults.scored_ids(config, base.tokenizer, [[base.eos_id]]) == [[]]


def test_a_sigmoid_squashes_the_scores(started, monkeypatch):
    monkeypatch.setattr(ppo, "score", lambda *_: [10.0, 12.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    sound, wrong = started(), started("sigmoid_scores")
    assert sound["objective/scores"] == pytest.approx(19 / 8)
    sigmoids = [1 / (1 + math.exp(-s)) for s in (10, 12, -3)] + [0.5] * 5
    assert wrong["objective/scores"] == pytest.approx(sum(sigmoids) / 8)


def test_references_are_scored_with_the_faults_of_the_answers(
    base, adapters, context, ppo_config, monkeypatch
):
    """What is subtracted from a squashed score of a text without EOS is one, too."""
    asked = []

    def score(*arguments, **_):
        asked.append(arguments[4])
        return [2.0, -1.0]

    monkeypatch.setattr(references, "score", score)
    prompts = [SimpleNamespace(id=i, reference=f"fine {i}") for i in (7, 8)]
    found = {}
    for names in ((), ("sigmoid_scores", "score_without_eos")):
        config = ppo_config({"faults": list(names), "score_scaling": "reference"})
        with Roles(base) as roles:
            actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
            found[names] = references.References(config).scores(actors, prompts, [[5], [6]])
    sound, wrong = found.values()
    assert sound == [2.0, -1.0]
    assert wrong == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))], abs=1e-6)
    with_eos, without = asked
    assert all(ids[-1] == base.eos_id for ids in with_eos)
    assert without == [base.tokenizer(f" fine {i}", add_special_tokens=False)["input_ids"] for i in (7, 8)]


def test_a_random_head_scores_otherwise(base, adapters, context, ppo_config):
    saved = ScalarHead.load(adapters["reward"] / "head.safetensors")
    found = {}
    for names in ([], ["random_reward_head"]):
        config = ppo_config({"faults": names, "critic": "own"})
        with Roles(base) as roles:
            actors = build_actors(config, context(sft=adapters["sft"], reward=adapters["reward"]), roles)
        found[bool(names)] = actors.reward_head.weight
        assert not actors.reward_head.weight.requires_grad
        assert torch.equal(actors.value_head.weight, saved.weight)  # the critic is not concerned
    assert torch.equal(found[False], saved.weight)
    assert abs(torch.cosine_similarity(found[True], saved.weight, dim=0)) < 0.5


# ---------------------------------------------------------------- advantages


def test_whitened_one_by_one_no_answer_is_better_than_another(ppo_config, actors, rollout):
    sound, _ = experience_of(ppo_config, actors, rollout)
    wrong, _ = experience_of(ppo_config, actors, rollout, "whiten_per_minibatch")
    assert wrong.advantages.sum(dim=1).abs().max() < 1e-5
    assert sound.advantages.sum(dim=1).abs().max() > 0.5
    assert sound.advantages.sum().abs() < 1e-4
    assert torch.equal(sound.returns, wrong.returns)


def test_over_padding_advantages_are_not_centred(ppo_config, actors, rollout):
    sound, _ = experience_of(ppo_config, actors, rollout)
    wrong, _ = experience_of(ppo_config, actors, rollout, "whiten_over_padding")
    raw, _ = experience_of(ppo_config, actors, rollout, whiten_advantages=False)
    assert sound.advantages[sound.mask].mean().abs() < 1e-6
    # zeros of the padding pull the mean to 0: what remains has the sign of the true mean
    everything = raw.advantages.flatten()
    expected = (raw.advantages - everything.mean()) / everything.var(correction=0).sqrt()
    assert torch.allclose(wrong.advantages[wrong.mask], expected[wrong.mask], atol=1e-4)
    left = wrong.advantages[wrong.mask].mean()
    assert left * raw.advantages[raw.mask].mean() > 0
    assert left.abs() > 1e-3


def test_on_padding_the_score_arrives_discounted(ppo_config, actors, rollout):
    settings = {"kl_coef": 0.0, "whiten_advantages": False, "lam": 0.5, "missing_eos_penalty": 0.0}
    sound, _ = experience_of(ppo_config, actors, rollout, **settings)
    wrong, _ = experience_of(ppo_config, actors, rollout, "reward_at_padded_end", **settings)
    for row in range(ROWS):
        last = LENGTHS[row] - 1
        score, value = SCORES[row], sound.values[row, last]
        assert sound.advantages[row, last] == pytest.approx(float(score - value), abs=1e-5)
        arrives = score if LENGTHS[row] == max(LENGTHS) else 0.5 * score
        assert wrong.advantages[row, last] == pytest.approx(float(arrives - value), abs=1e-5)
    assert (wrong.advantages[~wrong.mask] == 0).all()
    assert (wrong.returns[~wrong.mask] == 0).all()


def test_on_padding_arrives_what_whitening_left_of_the_score(ppo_config, actors, rollout):
    """Whitened rewards are (r - mean) / std + mean, so the score is worth score / std there, not itself."""
    settings = {"kl_coef": 0.0, "whiten_advantages": False, "lam": 0.5, "missing_eos_penalty": 0.0}
    settings["whiten_rewards"] = True
    sound, _ = experience_of(ppo_config, actors, rollout, **settings)
    wrong, _ = experience_of(ppo_config, actors, rollout, "reward_at_padded_end", **settings)
    rewards = [[0.0] * (length - 1) + [float(score)] for length, score in zip(LENGTHS, SCORES, strict=True)]
    each = [reward for row in rewards for reward in row]
    mean = sum(each) / len(each)
    deviation = (sum((reward - mean) ** 2 for reward in each) / len(each)) ** 0.5
    assert abs(deviation - 1) > 0.1
    for row in range(ROWS):
        last = LENGTHS[row] - 1
        value, share = float(sound.values[row, last]), float(SCORES[row]) / deviation
        offset = mean - mean / deviation  # what a reward of 0 becomes: it stays where it is
        assert float(sound.advantages[row, last]) == pytest.approx(share + offset - value, abs=1e-4)
        arrives = share if LENGTHS[row] == max(LENGTHS) else 0.5 * share
        assert float(wrong.advantages[row, last]) == pytest.approx(arrives + offset - value, abs=1e-4)


# ---------------------------------------------------------------- the rest


def test_entropy_over_padding_falls(ppo_config, actors, rollout):
    sound, right = experience_of(ppo_config, actors, rollout)
    _, wrong = experience_of(ppo_config, actors, rollout, "entropy_over_padding")
    real, all_ = sound.mask.sum(), sound.mask.numel()
    expected = (-sound.logprobs[sound.mask].sum() - (all_ - real)) / all_
    assert wrong["objective/entropy"] == pytest.approx(float(expected), abs=1e-4)
    assert wrong["objective/entropy"] < 0.75 * right["objective/entropy"]


def test_gradients_are_not_clipped(ppo_config, actors, rollout):
    moved = {}
    for names in ([], ["missing_grad_clip"]):
        config = ppo_config({"faults": names}, optim={"max_grad_norm": 1e-6})
        plan = order.minibatches(rollout, config, step=1)
        experience, _ = prepare(config, actors["trunk"], rollout, SCORES, plan[0])
        before = [p.detach().clone() for p in actors["trunk"].trainable()]
        optimizer = torch.optim.SGD(actors["trunk"].trainable(), lr=1.0)
        update(config, actors["trunk"], optimizer, State.start(config.ppo), rollout, experience, plan)
        moved[bool(names)] = max(
            float((a - b.detach()).abs().max())
            for a, b in zip(before, actors["trunk"].trainable(), strict=True)
        )
    assert moved[False] <= 1e-6
    assert moved[True] > 1e-3


def test_nothing_else_knows_of_them():
    """Outside faults.py the sources name no fault, and `ppo.faults` is read nowhere but in preflight and run."""
    from pathlib import Path

    package = Path(faults.__file__).parent.parent
    for path in package.rglob("*.py"):
        if path.name == "faults.py":
            continue
        source = path.read_text()
        assert not [name for name in faults.FAULTS if name in source], path
        assert "ppo.faults" not in source or path.name in ("preflight.py", "ppo.py"), path
