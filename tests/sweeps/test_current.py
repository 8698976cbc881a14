"""The trial that a process is in: the list of runs that it leaves in its sweep's folder, and what MLflow is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from rlhf_exp.sweeps import current


def plan(tmp_path, dry_run=False, stage="ppo"):
    """sft is there, ppo is still to be made, the reward model was given."""
    config = SimpleNamespace(output_dir=str(tmp_path / "outputs"), dry_run=dry_run, stage=stage)
    sft = SimpleNamespace(
        config=config, folder=tmp_path / "outputs/sft/a", stage="sft", name="sft", key="a" * 64
    )
    given = SimpleNamespace(
        config=None, folder=tmp_path / "mine", stage="reward", name="reward", key="b" * 64
    )
    ppo = SimpleNamespace(config=config, folder=None, stage="ppo", name="ppo", key="0123456789abcdef" * 4)
    return SimpleNamespace(config=config, nodes=[sft, given, ppo], target=ppo)


def trial(tmp_path, number=0):
    return current.Trial(
        tmp_path / "results" / str(number),
        number,
        ["stage=ppo", "ppo.kl_coef=0.1"],
        "parent",
        ["ppo.kl_coef"],
    )


def test_a_trial_notes_its_runs_before_and_after_they_are_made(tmp_path):
    found = plan(tmp_path)
    file = tmp_path / "results" / "0" / "runs.txt"
    with current.inside(trial(tmp_path)):
        current.note(found)
        expected = [tmp_path / "outputs" / "sft" / "a", tmp_path / "outputs" / "ppo" / "0123456789ab"]
        assert current.noted(file) == expected
        found.nodes[2].folder = Path(f"{expected[1]}-2")  # resume=never
        current.note(found)
    assert current.noted(file) == [expected[0], Path(f"{expected[1]}-2")]


def test_what_is_no_trial_or_a_dry_run_notes_nothing(tmp_path):
    with current.inside(None):
        current.note(plan(tmp_path))
    with current.inside(trial(tmp_path)):
        current.note(plan(tmp_path, dry_run=True))
    current.note(plan(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_mlflow_is_told_of_a_run(tmp_path):
    found = plan(tmp_path)
    sft, _, ppo = found.nodes
    assert (current.tags(ppo, found), current.name(ppo, found), current.parent_run()) == ({}, None, None)
    with current.inside(trial(tmp_path, 3)):
        assert current.parent_run() == "parent"
        assert current.tags(sft, found) == {
            "sweep.role": "upstream",
            "sweep.folder": str(tmp_path / "results"),
        }
        assert current.tags(ppo, found) == {
            "sweep.role": "trial",
            "sweep.folder": str(tmp_path / "results"),
            "sweep.trial": 3,
            "sweep.overrides": "ppo.kl_coef=0.1",
        }
        assert (current.name(sft, found), current.name(ppo, found)) == (None, "trial 3 ppo.kl_coef=0.1 (ppo)")
        ppo.name = "ppo.1"  # of an earlier round: upstream
        found.target, found.config.stage = sft, "pipeline"
        assert current.tags(ppo, found)["sweep.role"] == "upstream"
