"""`reward.faults`: the reward model's data have the mistake, and PPO's self-check finds it."""

from __future__ import annotations

import shutil

import pytest

from rlhf_exp.data.load import load_view
from rlhf_exp.errors import InputError
from rlhf_exp.model.roles import Roles
from rlhf_exp.schema import Optim, Reward, Train
from rlhf_exp.stages import ppo, provenance, reward, reward_faults
from rlhf_exp.stages.actors import build_actors
from rlhf_exp.store.frozen import config_text

NAME = "answers_without_eos"
EOS = 2
LONGEST = 36  # tokens of the tiny tokenizer: some answers of the reviews end within it, some are cut


def of(*names: str) -> Reward:
    return Reward(faults=list(names))


# ---------------------------------------------------------------- the data


def test_only_an_end_is_taken_off():
    rows = [[7, 8, EOS], [7, 8], [EOS], [EOS, 7], [7, EOS, EOS]]
    assert reward_faults.answers(of(NAME), rows, EOS) == [[7, 8], [7, 8], [EOS], [EOS, 7], [7, EOS]]
    assert reward_faults.answers(of(), rows, EOS) == rows


@pytest.mark.parametrize("names", [(), (NAME,)], ids=["sound", "fault"])
def test_the_reward_stage_trains_and_is_judged_on_them(base, context, run_config, monkeypatch, capsys, names):
    config = run_config(
        "reward",
        dataset={"limit": 24, "validation_share": 0.15, "max_response_tokens": LONGEST},
        train=Train(steps=1, batch_size=24, micro_batch_size=24),
        optim=Optim(lr=1e-9),
        reward=of(*names),
    )
    seen = []
    sound = reward.pairs_of
    monkeypatch.setattr(reward, "pairs_of", lambda rows, *more: seen.append(rows) or sound(rows, *more))
    reward.run(config, context())
    assert len(seen) == 2  # train, validation
    plain = lambda text: base.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ended = 0
    for split, rows in zip(("train", "validation"), seen, strict=True):
        records = load_view(config.dataset, "comparisons", split)
        for side in ("chosen", "rejected"):
            for record, ids in zip(records, rows.answers[side], strict=True):
                whole = plain(f" {getattr(record, side)}")
                if len(whole) >= LONGEST:  # cut: never had an EOS
                    assert ids == whole[:LONGEST]
                else:
                    assert ids == (whole if names else [*whole, base.eos_id])
                    ended += 1
    assert ended > 5
    said = f"fault {NAME}: {reward_faults.FAULTS[NAME].breaks}"
    assert (said in capsys.readouterr().out) == bool(names)


def test_unknown_names_are_refused_with_the_list(context, run_config):
    with pytest.raises(InputError) as caught:
        reward.run(run_config("reward", reward=of("answers_without_eso")), context())
    (problem,) = caught.value.problems
    assert (
        problem
        == f"reward.faults: there is no fault answers_without_eso; did you mean {NAME}? there are {NAME}"
    )


def test_they_are_refused_before_anything_is_trained(tmp_path, capsys):
    from rlhf_exp import cli

    words = ["stage=ppo", "model=tiny", "tracking=none", f"output_dir={tmp_path / 'out'}", "dry_run=true"]
    assert cli.main([*words, "upstream.reward.reward.faults=[wrong_reference]"]) == 2
    assert "reward.faults: there is no fault wrong_reference" in capsys.readouterr().err
    assert cli.main([*words, f"upstream.reward.reward.faults=[{NAME}]"]) == 0


# ---------------------------------------------------------------- PPO's self-check


@pytest.fixture
def reward_run(adapters, run_config, tmp_path):
    """A reward run's folder that says which faults it was made with."""

    def make(*names: str):
        folder = tmp_path / f"reward_run_{len(names)}"
        for part, patterns in (("adapter", ("adapter*", "base.json")), ("head", ("head*",))):
            (folder / part).mkdir(parents=True)
            for file in (file for pattern in patterns for file in adapters["reward"].glob(pattern)):
                shutil.copy(file, folder / part)
        (folder / "config.yaml").write_text(config_text(run_config("reward", reward=of(*names)), []))
        return folder

    return make


def checked(base, config, given) -> provenance.Check:
    prompts, tokens = given.read(config.dataset, "prompts", "train")
    with Roles(base) as roles:
        actors = build_actors(config, given, roles)
        return provenance.reward_tokens(config, given, actors, prompts, tokens.prompts)


def test_the_self_check_finds_it(base, adapters, context, ppo_config, reward_run):
    given = context(sft=adapters["sft"], reward=reward_run(NAME))
    check = checked(base, ppo_config(), given)
    assert not check.ok
    assert check.cause.startswith("the ends differ from those that reward was trained on: ")
    assert check.cause.endswith(f"; its run had reward.faults=[{NAME}]")
    assert checked(base, ppo_config(), context("sound", sft=adapters["sft"], reward=reward_run())).ok


def test_strict_stops_warn_goes_on(adapters, context, ppo_config, reward_run, capsys):
    folders = {"sft": adapters["sft"], "reward": reward_run(NAME)}
    with pytest.raises(InputError, match="self-check: not so: the reward model sees the tokens"):
        ppo.run(ppo_config(), context("strict", **folders))
    assert not (context("strict").folder.path / "adapter").exists()
    ppo.run(ppo_config(selfcheck="warn"), context("warn", **folders))
    assert "FAIL  the reward model sees the tokens it was trained on (" in capsys.readouterr().out


def test_scored_without_eos_too_it_is_consistent(base, adapters, context, ppo_config, reward_run):
    """As published: neither the data nor what is scored has an EOS. Nothing differs then."""
    given = context(sft=adapters["sft"], reward=reward_run(NAME))
    assert checked(base, ppo_config({"faults": ["score_without_eos"]}), given).ok


def test_an_older_run_knows_of_no_faults(reward_run):
    import yaml

    folder = reward_run(NAME)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert provenance.reward_of(folder) == of(NAME)
    del settings["reward"]["faults"]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert provenance.reward_of(folder) == of()
    (folder / "config.yaml").unlink()
    assert provenance.reward_of(folder) == of()


def test_nothing_else_knows_of_them():
    """Outside reward_faults.py no source names a fault of reward models."""
    from pathlib import Path

    package = Path(reward_faults.__file__).parent.parent
    for path in package.rglob("*.py"):
        assert path.name == "reward_faults.py" or NAME not in path.read_text(), path
