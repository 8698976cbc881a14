"""The list of runs that a trial leaves in its sweep's folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from rlhf_exp.stages import trial


def plan(tmp_path, dry_run=False):
    """sft is there, ppo is still to be made, the reward model was given."""
    config = SimpleNamespace(output_dir=str(tmp_path / "outputs"), dry_run=dry_run)
    sft = SimpleNamespace(config=config, folder=tmp_path / "outputs" / "sft" / "a", stage="sft", key="a" * 64)
    given = SimpleNamespace(config=None, folder=tmp_path / "mine", stage="reward", key="b" * 64)
    ppo = SimpleNamespace(config=config, folder=None, stage="ppo", key="0123456789abcdef" * 4)
    return SimpleNamespace(config=config, nodes=[sft, given, ppo])


def test_a_trial_notes_its_runs_before_and_after_they_are_made(tmp_path):
    folder, found = tmp_path / "results" / "0", plan(tmp_path)
    with trial.inside(folder):
        trial.note(found)
        expected = [tmp_path / "outputs" / "sft" / "a", tmp_path / "outputs" / "ppo" / "0123456789ab"]
        assert trial.noted(folder / "runs.txt") == expected
        found.nodes[2].folder = Path(f"{expected[1]}-2")  # resume=never
        trial.note(found)
    assert trial.noted(folder / "runs.txt") == [expected[0], Path(f"{expected[1]}-2")]


def test_what_is_no_trial_or_a_dry_run_notes_nothing(tmp_path):
    with trial.inside(None):
        trial.note(plan(tmp_path))
    with trial.inside(tmp_path / "results"):
        trial.note(plan(tmp_path, dry_run=True))
    trial.note(plan(tmp_path))
    assert list(tmp_path.iterdir()) == []
