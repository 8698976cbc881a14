"""hydra/launcher=slurm on the command line: what is refused, and what is shown without SLURM."""

from __future__ import annotations

import pytest

from rlhf_exp import cli
from rlhf_exp.errors import Interrupted
from rlhf_exp.jobs import script, watch
from rlhf_exp.sweeps import collect, ledger

WORDS = ["stage=ppo", "model=tiny", "dataset=reviews", "tracking=none", "hydra/launcher=slurm"]


def test_scripts_are_shown_and_nothing_stays_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    words = [*WORDS, "reward_source=length", "ppo.kl_coef=.1,.2", "hydra.launcher.dry_run=true"]
    words += ["hydra.launcher.mem=4G", "hydra.launcher.by_stage.ppo.mem=16G"]
    assert cli.main(["-m", *words]) == 0
    sft, ppo = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert "#SBATCH --mem=4G\n" in sft and "--array" not in sft
    assert "#SBATCH --mem=16G\n" in ppo and "#SBATCH --array=0,1%256\n" in ppo
    name = next(line for line in sft.splitlines() if line.startswith("srun")).split()[-1]
    assert name.startswith("sft-")
    assert f"#SBATCH --dependency=afterok:{name}\n" in ppo
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    """Empty, the real command may have it; one of a sweep keeps what it has."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    words = [*WORDS, "reward_source=length", "adapters.sft=base", "hydra.launcher.dry_run=true"]
    (tmp_path / "sweep").mkdir()
    assert cli.main([*words, "hydra.sweep.dir=sweep"]) == 0
    assert "#SBATCH" in capsys.readouterr().out
    assert list((tmp_path / "sweep").iterdir()) == []
    (tmp_path / "sweep" / "multirun.yaml").write_text("of the sweep\n")
    assert cli.main([*words, "hydra.sweep.dir=sweep"]) == 0
    assert (tmp_path / "sweep" / "multirun.yaml").read_text() == "of the sweep\n"
    assert len(list((tmp_path / "sweep").iterdir())) == 1


class Parent:
    """MLflow's run of a sweep."""

    run_id = None

    def __init__(self):
        self.said = []

    def __getattr__(self, name):
        return lambda *words: self.said.append((name, *words))


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (Interrupted("stopped by SIGTERM at once"), 75)]
)
def test_who_waits_may_leave_and_the_jobs_go_on(tmp_path, monkeypatch, capsys, error, code):
    """MLflow's run is open until all is collected, whichever signal came."""
    parent = Parent()
    monkeypatch.setattr(collect, "open_tracker", lambda *given, **more: parent)
    monkeypatch.setattr(script, "submit", lambda job, sweep, settings: "17")

    def wait(sweep, numbers, poll, say):
        ledger.append(sweep, ledger.STARTED, number=0, job="17_0")
        raise error

    monkeypatch.setattr(watch, "wait", wait)
    words = [
        *WORDS,
        "reward_source=length",
        "adapters.sft=base",
        "ppo.kl_coef=.1,.2",
        "hydra.sweep.dir=sweep",
    ]
    assert cli.main(["-m", *words]) == code
    out = capsys.readouterr().out
    assert "\nthe jobs go on; python -m rlhf_exp.jobs status|cancel " in out
    assert "2 of 2 trials have not ended; see: python -m rlhf_exp.jobs status " in out
    ends = [word for word in parent.said if word[0] in ("flush", "finish")]
    assert ends == [("flush",)]
    # when all have ended it is over
    for number in (0, 1):
        ledger.append(tmp_path / "sweep", ledger.ENDED, number=number, status=ledger.DONE, objective=1.0)
    assert collect.again(tmp_path / "sweep") == 0
    assert parent.said[-1] == ("finish", "FINISHED")


def test_a_single_run_is_one_job(capsys):
    """Without -m, and without anything that is swept."""
    words = [*WORDS, "reward_source=length", "adapters.sft=base", "hydra.launcher.dry_run=true"]
    assert cli.main(words) == 0
    (ppo,) = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert "#SBATCH --array=0%256\n" in ppo and "--dependency" not in ppo


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hydra.launcher.time=abc"],
            "hydra.launcher.time must be minutes, hours:minutes:seconds or days-hours, got abc",
        ),
        (
            ["hydra.launcher.mem=16Q"],
            "hydra.launcher.mem must be a number with K, M, G or T, such as 16G, got 16Q",
        ),
        (
            ["hydra.launcher.by_stage.ppo.gpus_per_node=x:y:z"],
            "hydra.launcher.by_stage.ppo.gpus_per_node must be a number, or a type with it, such as a100:2, got "
            "x:y:z",
        ),
        (
            ["hydra.launcher.tasks_per_node=2"],
            "hydra.launcher: ppo: 2 processes were started as ranks of one run, but strategy=single is one process",
        ),
        (
            ["hydra.launcher.by_stage.sft.nodes=2"],
            "hydra.launcher: sft: 2 processes were started as ranks of one run, but strategy=single is one process",
        ),
        (
            ["hydra.launcher.patrition=x"],
            "unknown key hydra.launcher.patrition; did you mean hydra.launcher.partition?",
        ),
        (
            ["hydra.launcher.by_stage.stf.mem=1G"],
            "unknown key hydra.launcher.by_stage.stf; did you mean hydra.launcher.by_stage.sft?",
        ),
        (["hydra.launcher.nodes=two"], "Value 'two' of type 'str' could not be converted to Integer"),
        (
            ["hydra.launcher.nodes=0", "hydra.launcher.dry_run=true", "reward_source=length"],
            "hydra.launcher.nodes must be at least 1, got 0",
        ),
    ],
)
def test_settings_that_cannot_be(words, said, capsys, tmp_path):
    assert cli.main([*WORDS, *words]) == 2
    said_here = capsys.readouterr().err
    assert said in said_here and said_here.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "nothing is made"


@pytest.mark.parametrize("name", ["wait=false", "dry_run=true"])
def test_a_sweeper_that_needs_values_has_to_wait(name, capsys):
    pytest.importorskip("optuna")
    words = [*WORDS, "reward_source=length", "hydra/sweeper=optuna", f"hydra.launcher.{name}"]
    assert cli.main(["-m", *words, "ppo.kl_coef=interval(0.01, 0.2)"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: hydra/sweeper=optuna chooses trials by the ")
    assert said.endswith(f"leave out hydra.launcher.{name}\n")
