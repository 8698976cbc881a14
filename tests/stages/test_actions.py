"""What follows when a guard fires: each action alone, and tiny runs that are made to fail."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rlhf_exp.algorithms.masked import Moments
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles, read_weights
from rlhf_exp.schema import Guards as Settings
from rlhf_exp.stages import ppo
from rlhf_exp.stages.actions import Watch
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.stages.guards import Fired, Guards
from rlhf_exp.stages.optim import adamw, schedule
from rlhf_exp.stages.state import State
from rlhf_exp.tracking import read_lines, read_metrics

FUNCTION = {"kind": "function", "function": "length"}
CALM = {"eos_rate": 0.0}  # of eight answers of four tokens one ends, or none


def fired(action: str, guard: str = "kl") -> Fired:
    return Fired(guard, "objective/kl", 60.0, 50.0, action, "KL is above")


def weights(actors, role: str = "policy") -> list[torch.Tensor]:
    return [p.detach().clone() for p in actors.roles.parameters(role)]


def disturb(actors, value: float | None = None) -> None:
    """Move everything trainable; put `value` into the policy where one is given."""
    with torch.no_grad():
        for parameter in actors.trainable():
            parameter.add_(0.1)
        if value is not None:
            actors.roles.parameters("policy")[0].view(-1)[0] = value


@pytest.fixture
def watching(base, adapters, context, ppo_config):
    """Watch of a run that has made one optimiser step, by settings of ppo; the roles close with the test."""
    opened = []

    def make(sft: bool = True, optim=None, **settings) -> Watch:
        config = ppo_config(
            {"steps": 10, "save_every": 2, **settings},
            optim={"lr": 0.01, **(optim or {})},
            reward_source=FUNCTION,
        )
        given = context(**({"sft": adapters["sft"]} if sft else {}))
        roles = Roles(base)
        opened.append(roles)
        actors = build_actors(config, given, roles)
        optimizer = adamw(actors.groups(config.ppo), config.optim)
        scheduler = schedule(optimizer, config.optim, config.ppo.steps)
        watch = Watch(config, given, actors, optimizer, scheduler, State.start(config.ppo), Guards())
        for parameter in actors.trainable():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return watch

    yield make
    for roles in opened:
        roles.close()


# ---------------------------------------------------------------- each alone


def test_warn_changes_nothing_and_is_written_down(watching, capsys):
    watch = watching(guards=Settings(kl=1.0))
    before, lr, kl_coef = weights(watch.actors), watch.scheduler.get_last_lr(), watch.state.kl_coef
    sound = {"objective/scores": 1.0, "objective/kl": 2.0}
    assert watch.after(1, sound) == {"guard/kl": 1.0}
    assert watch.after(2, sound) == {}  # it is silent for a while
    assert all(map(torch.equal, before, weights(watch.actors)))
    assert (watch.scheduler.get_last_lr(), watch.state.kl_coef) == (lr, kl_coef)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "guard kl at iteration 1: KL to the reference, nats an answer, 2 is above ppo.guards.kl=1"
    )
    (row,) = read_lines(watch.context.folder.path / "guards.jsonl")
    assert (row["step"], row["guard"], row["metric"]) == (1, "kl", "objective/kl")
    assert (row["value"], row["bound"], row["action"]) == (2.0, 1.0, "warn")


def test_raise_kl_doubles_the_coefficient(watching):
    watch = watching(kl_coef=0.05)
    watch.act(fired("raise_kl"))
    watch.act(fired("raise_kl"))
    assert watch.state.kl_coef == 0.2


@pytest.mark.parametrize("name", ["constant", "linear"])
def test_lower_lr_halves_now_and_from_there_on(watching, name):
    watch = watching(optim={"schedule": name}, critic_lr=0.1)
    watch.scheduler.step()
    before = watch.scheduler.get_last_lr()
    watch.act(fired("lower_lr"))
    assert [group["lr"] for group in watch.optimizer.param_groups] == [lr / 2 for lr in before]
    assert watch.scheduler.get_last_lr() == [lr / 2 for lr in before]
    watch.scheduler.step()
    # linear: from 1 to 0 in 10 steps, of which 2 are made
    factor = 0.8 if name == "linear" else 1.0
    assert watch.scheduler.get_last_lr() == pytest.approx([0.005 * factor, 0.05 * factor])


def test_a_lowered_rate_is_in_the_schedulers_state(watching):
    one, other = watching(optim={"schedule": "linear"}), watching(optim={"schedule": "linear"})
    one.act(fired("lower_lr"))
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    other.scheduler.load_state_dict(one.scheduler.state_dict())
    for _ in range(3):
        one.scheduler.step()
        other.scheduler.step()
        assert one.scheduler.get_last_lr() == other.scheduler.get_last_lr()
    assert one.scheduler.get_last_lr() == pytest.approx([0.005 * 0.7] * 2)


def test_stop_notes_why(watching):
    watch = watching()
    watch.act(fired("stop"))
    assert watch.guards.stopped == "guard kl: KL is above"


@pytest.mark.parametrize("sft", [True, False], ids=["sft", "no sft"])
@pytest.mark.parametrize("step", [0, 4, 6])
def test_rollback_restores_the_adapter_bit_for_bit(watching, sft, step):
    watch = watching(sft, ema_decay=0.9)
    start = build_again(watch) if step == 0 else None
    kept = {}
    for number in (4, 6):
        disturb(watch.actors)
        kept[number] = weights(watch.actors)
        ppo.publish(watch.context, watch.actors, f"checkpoints/step_{number:05d}")
    disturb(watch.actors)
    watch.guards.kept = {0: 1.0, 4: 1.0, 6: 1.0, step: 2.0}
    critic = [p.detach().clone() for p in watch.actors.critic_parameters()]
    assert watch.act(fired("rollback")).startswith("the policy is again")
    wanted = start or kept[step]
    for role in ("policy", "ema"):
        assert all(map(torch.equal, weights(watch.actors, role), wanted))
    assert all(map(torch.equal, critic, watch.actors.critic_parameters()))  # a sound critic stays
    assert not watch.optimizer.state
    assert "restored" not in watch.actors.roles._configs
    assert all(p.requires_grad for p in watch.actors.roles.parameters("policy"))


def build_again(watch) -> list[torch.Tensor]:
    """The policy's weights as a run starts."""
    roles = watch.actors.roles
    if watch.context.adapter("sft") is not None:
        stored = read_weights(watch.context.adapter("sft"))
        return [stored[f"base_model.model.{name}"] for name in roles._tensors("policy")]
    roles.new("again", roles._configs["policy"], watch.config.seed)
    found = weights(watch.actors, "again")
    roles.remove("again")
    return found


@pytest.mark.parametrize("critic", ["trunk", "own"])
def test_a_critic_that_holds_nan_starts_anew(watching, critic):
    watch = watching(critic=critic)
    assert watch.actors.value_head.weight.abs().max() > 0
    with torch.no_grad():
        watch.actors.value_head.weight[0] = math.nan
    watch.restore(0)
    assert torch.equal(watch.actors.value_head.weight, torch.zeros_like(watch.actors.value_head.weight))
    for now, start in zip(watch.actors.critic_parameters(), watch.critic_start, strict=True):
        assert torch.equal(now, start)


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def train(context, adapters, ppo_config, monkeypatch):
    """ppo.run of eight short answers a step; `spoil(step, actors)` after the update of each iteration."""
    runs, sound = [], ppo.update

    def run(spoil=None, optim=None, generation=None, name=None, **settings):
        config = ppo_config(
            {"steps": 6, "save_every": 1, "guards": Settings(**CALM), **settings},
            generation={"max_new_tokens": 4, **(generation or {})},
            optim=optim,
            reward_source=FUNCTION,
            selfcheck="off",
        )
        runs.append(1)
        given, at = context(name or f"run{len(runs)}", sft=adapters["sft"]), [0]
        given.checkpoint_every = 1

        def update(config, actors, *arguments, **keywords):
            metrics = sound(config, actors, *arguments, **keywords)
            at[0] += 1
            if spoil is not None:
                spoil(at[0], actors)
            return metrics

        monkeypatch.setattr(ppo, "update", update)
        result = ppo.run(config, given)
        return given.folder, result, read_metrics(given.folder.path / "metrics.jsonl")

    return run


def poison(*steps: int):
    """Puts nan into one weight of the policy after these updates."""

    def spoil(step, actors):
        if step in steps:
            with torch.no_grad():
                actors.roles.parameters("policy")[3].view(-1)[5] = math.nan

    return spoil


def test_a_sound_run_fires_nothing_and_names_best_and_last(train, capsys):
    folder, result, metrics = train()
    assert not any(name.startswith("guard/") for line in metrics for name in line)
    assert not (folder.path / "guards.jsonl").exists()
    worth = [line["objective/scores"] - 0.05 * line["objective/kl"] for line in metrics]
    # kept after 1 to 5 and measured by 2 to 6; the last one by 6, too
    best = max(range(1, 6), key=lambda step: (worth[step], -step))
    written = json.loads((folder.path / "best.json").read_text())
    assert (written["step"], written["value"]) == (best, pytest.approx(worth[best]))
    assert written["adapter"] == f"checkpoints/step_{best:05d}"
    assert written["last"] == {"step": 6, "value": pytest.approx(worth[5]), "adapter": "adapter"}
    assert written["start"] == pytest.approx(worth[0])
    assert result["best/step"] == best
    assert result["objective/scores"] == metrics[-1]["objective/scores"]
    assert f"best: checkpoints/step_{best:05d}" in capsys.readouterr().out


def test_nan_in_a_weight_goes_back_and_on_with_half_the_learning_rate(train, capsys):
    folder, result, metrics = train(poison(3), optim={"lr": 1e-3})
    assert [line["step"] for line in metrics] == list(range(1, 7))
    assert [line.get("guard/nan") for line in metrics] == [None, None, None, 1.0, None, None]
    assert [line["optim/lr"] for line in metrics] == [1e-3] * 4 + [5e-4] * 2
    assert set(metrics[3]) == {"step", "policy/nonfinite", "optim/lr", "guard/nan"}
    # what was kept after 2 is the last that gave answers; 3 holds the nan, 4 is 2 again
    weights = {
        step: (folder.path / f"checkpoints/step_{step:05d}/adapter_model.safetensors").read_bytes()
        for step in range(1, 6)
    }
    assert weights[4] == weights[2]
    assert len({weights[step] for step in (1, 2, 3, 5)}) == 4
    assert metrics[4]["objective/kl"] != 0
    dump = json.loads((folder.path / "nan/step_00004.json").read_text())
    assert dump["step"] == 4
    assert "the logits hold nan or inf" in dump["reason"]
    assert len(dump["tensors"]) == 1
    assert ".policy." in dump["tensors"][0]
    assert len(dump["prompts"]) == 8
    assert dump["prompts"][0]["ids"] and dump["prompts"][0]["text"]
    assert json.loads((folder.path / "run.json").read_text()).get("stopped_by") is None
    said = capsys.readouterr().out
    assert "guard nan at iteration 4" in said
    assert "the policy is again that of checkpoints/step_00002, the learning rate is now 0.0005" in said
    assert math.isfinite(result["objective/scores"])


def test_after_too_many_recoveries_the_run_ends_with_the_reason(train, capsys):
    folder, result, metrics = train(poison(*range(2, 20)), guards=Settings(**CALM, max_recoveries=1), steps=9)
    # 3: first recovery, the second update after it (of 4) spoils again, 5: the end
    assert [line["step"] for line in metrics if "guard/nan" in line] == [3, 5]
    assert metrics[-1]["step"] == 5
    why = json.loads((folder.path / "run.json").read_text())["stopped_by"]
    assert why.startswith("guard nan: row ")
    assert result["objective/scores"] == metrics[3]["objective/scores"]
    stored = read_weights(folder.path / "adapter")
    assert all(bool(value.isfinite().all()) for value in stored.values())
    said = capsys.readouterr().out
    assert "stopped at iteration 5 of 9 by guard nan" in said
    assert "ppo.guards.max_recoveries" in said


@pytest.mark.parametrize(
    "settings",
    [{}, {"score_scaling": "running"}, {"estimator": "reinforce", "critic": "none", "samples_per_prompt": 1}],
    ids=["plain", "running", "reinforce"],
)
def test_nan_in_the_scores_makes_no_step_and_recovers(train, monkeypatch, settings):
    sound, calls = ppo.score, []

    def score(*arguments):
        calls.append(1)
        found = sound(*arguments)
        return [math.nan, *found[1:]] if len(calls) == 3 else found

    monkeypatch.setattr(ppo, "score", score)
    folder, _, metrics = train(**settings)
    # once: nothing of it stays in running moments, where it would be for ever
    assert [line["step"] for line in metrics if "guard/nan" in line] == [3]
    assert len(metrics) == 6
    assert metrics[2]["policy/nonfinite"] == 1
    assert metrics[2]["optim/updates"] == 0
    (row,) = read_lines(folder.path / "guards.jsonl")
    assert row["value"] == "nan"
    weights = [
        (folder.path / f"checkpoints/step_{step:05d}/adapter_model.safetensors").read_bytes()
        for step in (1, 2, 3)
    ]
    dump = json.loads((folder.path / "nan/step_00003.json").read_text())
    assert len(dump["prompts"]) == 8
    first, second = dump["prompts"][:2]
    assert (first["score"], isinstance(second["score"], float)) == ("nan", True)
    assert all(isinstance(row["response"], str) and isinstance(row["ended"], bool) for row in (first, second))
    assert all(1 <= len(row["response_ids"]) <= 4 for row in dump["prompts"])
    # no step was made at 3, and the last adapter that is known to be sound is that of 1... or of 2, measured by 3
    assert weights[2] == weights[0]


def test_an_unsound_iteration_leaves_controller_and_moments_as_they_were():
    state = State(0.1, Moments(*torch.tensor([4.0, 1.0, 2.0])), Moments(*torch.tensor([3.0, 0.5, 1.0])), 7)
    before = state.copy()
    state.kl_coef, state.updates = math.nan, 9
    state.scores = state.returns = Moments(*torch.full((3,), math.nan))
    state.forget(before)
    assert state.kl_coef == 0.1
    assert [x.tolist() for x in (*state.scores, *state.returns)] == [4, 1, 2, 3, 0.5, 1]
    assert state.updates == 9  # demonstrations go on from there


def test_nothing_to_go_back_to_is_an_error(train, base, adapters, context, ppo_config, monkeypatch):
    monkeypatch.setattr(ppo, "score", lambda *arguments: [math.nan] * len(arguments[4]))
    monkeypatch.setattr(ppo, "check_start", lambda *arguments: None)
    with pytest.raises(InputError, match="first iteration is not sound"):
        train()


def test_a_learning_rate_of_one_is_caught(train):
    """Weights that jump: the policy collapses or its numbers overflow; some guard says so, and the run ends well."""
    folder, result, metrics = train(
        optim={"lr": 1.0}, steps=8, epochs=2, generation={"max_new_tokens": 8}, guards=Settings(baseline=1)
    )
    fired = {row["guard"] for row in read_lines(folder.path / "guards.jsonl")}
    assert "eos" in fired  # one of eight answers ended at first, none does after the jump
    assert math.isfinite(result["objective/scores"])
    assert metrics[-1]["step"] == 8


def test_a_reward_for_emptiness_is_stopped(base, train, monkeypatch):
    """The score is the likeness of the first token to EOS: answers become empty."""
    weight = base.model.get_output_embeddings().weight.detach()
    likeness = torch.nn.functional.normalize(weight, dim=1) @ torch.nn.functional.normalize(
        weight[base.eos_id], dim=0
    )
    monkeypatch.setattr(ppo, "score", lambda *a: [10 * float(likeness[response[0]]) for response in a[4]])
    folder, _, metrics = train(
        optim={"lr": 2e-2},
        steps=40,
        save_every=10,
        batch_size=32,
        micro_batch_size=32,
        epochs=4,
        kl_coef=0.0,
        generation={"max_new_tokens": 2, "min_new_tokens": 0},
        guards=Settings(**CALM, empty_action="stop", entropy=0.0, distinct_2=0.0, length_share=0.0),
    )
    rates = [line["response/empty_rate"] for line in metrics]
    assert rates[0] < 0.2
    assert rates[-1] > 0.5
    assert len(metrics) < 40
    assert metrics[-1]["guard/empty"] == 1
    assert "empty answers" in json.loads((folder.path / "run.json").read_text())["stopped_by"]


def test_a_rollback_in_a_run_is_to_the_best_that_was_measured(train):
    folder, _, metrics = train(
        guards=Settings(**CALM, clipfrac=1e-9, clipfrac_action="rollback", patience=100),
        epochs=3,
        optim={"lr": 0.05},
        best_metric="objective/kl",
        steps=4,
    )
    (row,) = read_lines(folder.path / "guards.jsonl")
    assert row["action"] == "rollback"
    assert row["did"] == "the policy is again as it started"
    assert row["step"] == 1
    assert metrics[1]["objective/kl"] == 0


def test_what_does_not_fire_changes_nothing(train):
    def figures(metrics):
        return [{k: v for k, v in m.items() if "time/" not in k and "second" not in k} for m in metrics]

    one = train()[2]
    off = dict.fromkeys(
        ("empty_rate", "length_share", "distinct_2", "repetition", "entropy", "kl", "clipfrac"), 0.0
    )
    assert figures(train(guards=Settings(**CALM, **off))[2]) == figures(one)


def test_a_run_that_was_cut_off_goes_on_with_the_same_guards(train, capsys):
    """Learning rates were halved and the policy rolled back before, at and after the cut."""
    acting = {
        "guards": Settings(
            **CALM, kl=1e-9, kl_action="lower_lr", clipfrac=1e-9, clipfrac_action="rollback", patience=2
        ),
        "optim": {"lr": 0.05, "schedule": "linear"},
        "epochs": 3,
        "steps": 7,
    }

    def cut(step, actors):
        if step == 5:
            raise KeyboardInterrupt

    def left(folder, metrics):
        figures = [{k: v for k, v in m.items() if "time/" not in k and "second" not in k} for m in metrics]
        names = ("guards.jsonl", "best.json", "adapter/adapter_model.safetensors")
        return figures, [(folder.path / name).read_bytes() for name in names]

    folder, result, metrics = train(**acting)
    with pytest.raises(KeyboardInterrupt):
        train(cut, name="cut", **acting)
    again, same_result, same_metrics = train(name="cut", **acting)
    assert "continued from step 4" in capsys.readouterr().out
    assert left(again, same_metrics) == left(folder, metrics)
    assert same_result == result
    steps = {row["guard"]: [] for row in read_lines(folder.path / "guards.jsonl")}
    for row in read_lines(folder.path / "guards.jsonl"):
        steps[row["guard"]].append(row["step"])
    assert steps["clipfrac"] == [1, 4, 7]
    assert min(steps["kl"]) < 5 <= max(steps["kl"])
