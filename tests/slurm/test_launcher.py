"""hydra/launcher=slurm on the command line: what is refused, and what is shown without SLURM."""

from __future__ import annotations

import pytest

from rlhf_exp import cli

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
    assert list(tmp_path.rglob("*.json*")) == []
    assert list((tmp_path / "multirun").rglob("*.yaml")) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hydra.launcher.patrition=x"],
            "Could not override 'hydra.launcher.patrition'. Key 'patrition' not in",
        ),
        (["hydra.launcher.by_stage.stf.mem=1G"], "Key 'stf' not in 'ByStage'"),
        (["hydra.launcher.nodes=two"], "Value 'two' of type 'str' could not be converted to Integer"),
        (
            ["hydra.launcher.nodes=0", "hydra.launcher.dry_run=true", "reward_source=length"],
            "hydra.launcher.nodes must be at least 1, got 0",
        ),
    ],
)
def test_settings_that_cannot_be(words, said, capsys):
    assert cli.main([*WORDS, *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["wait=false", "dry_run=true"])
def test_a_sweeper_that_needs_values_has_to_wait(name, capsys):
    pytest.importorskip("optuna")
    words = [*WORDS, "reward_source=length", "hydra/sweeper=optuna", f"hydra.launcher.{name}"]
    assert cli.main(["-m", *words, "ppo.kl_coef=interval(0.01, 0.2)"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: hydra/sweeper=optuna chooses trials by the ")
    assert said.endswith(f"leave out hydra.launcher.{name}\n")
