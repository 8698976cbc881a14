"""stage=report on runs that the program itself made: a sweep of the tiny model, and its evaluation."""

from __future__ import annotations

import csv

import pytest

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def table(folder, name):
    return list(csv.DictReader((folder / "report" / "tables" / f"{name}.csv").open(encoding="utf-8")))


def test_a_sweep_from_its_trials_to_the_page(cli, tmp_path, monkeypatch):
    """Two settings with two seeds; the folder of the sweep, outputs and the MLflow experiment name the same runs."""
    monkeypatch.chdir(tmp_path)
    shared = [word for word in cli.SMOKE_PPO if not word.startswith("stage=")]
    swept = ("stage=ppo", "ppo.kl_coef=0.05,0.5", "seed=0,1", "-m")
    done = cli.call(*shared, *swept)
    assert done.code == 0, done.out + done.err
    (sweep,) = (tmp_path / "multirun" / "results").iterdir()
    plain = [word for word in shared if not word.startswith("ppo.")]
    for seed in (0, 1):
        given = ("stage=eval", f"adapters.ppo={first(tmp_path, seed)}", f"seed={seed}", "eval.prompts=4")
        done = cli.call(*plain, *given)
        assert done.code == 0, done.out + done.err
    found = []
    for given in ("outputs", sweep, "rlhf_exp"):
        done = cli.call(
            "stage=report", f"inputs={given}", f"output_dir={tmp_path / str(len(found))}", *uri(tmp_path)
        )
        assert done.code == 0, done.out + done.err
        (folder,) = cli.runs(tmp_path / str(len(found)), "report")
        assert (folder / "report" / "report.html").stat().st_size > 30_000
        found.append({row["run"] for row in table(folder, "trials") if row["run"].startswith("ppo/")})
        assert {row["ppo.kl_coef"] for row in table(folder, "config") if row["run"].startswith("ppo/")} == {
            "0.05",
            "0.5",
        }
        bands = table(folder, "bands")
        assert {row["step"] for row in bands if row["source"] == "training"} == {"1.0", "2.0", "3.0"}
        assert {row["seeds"] for row in bands} == {"2"}
    assert len(found[0]) == 4
    assert found[0] == found[1] == found[2]


def first(folder, seed):
    """The PPO run of kl_coef .05 and this seed."""
    import yaml

    for run in sorted((folder / "outputs" / "ppo").glob("[0-9a-f]*")):
        config = yaml.safe_load((run / "config.yaml").read_text())
        if (config["ppo"]["kl_coef"], config["seed"]) == (0.05, seed):
            return run
    raise AssertionError("no such run")


def uri(folder):
    return ["tracking.backend=none", f"tracking.uri=sqlite:///{folder / 'outputs' / 'mlflow.db'}"]
