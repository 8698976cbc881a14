"""Sweeps of the tiny model, trained: what MLflow, the store and the folder hold afterwards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_exp.cli import main

SHORT = (
    *("stage=ppo", "model=tiny", "model.dtype=float32", "threads=1", "selfcheck=off", "-m"),
    *("ppo.steps=3", "ppo.batch_size=4", "ppo.epochs=1", "generation.max_new_tokens=4"),
    "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}",
    "upstream.reward={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}",
)
KL = (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs_of(place: Path) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("rlhf_exp").experiment_id])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, module_monkeypatch) -> SimpleNamespace:
    """sweep=kl, then the same again, then a wider one on the same store."""
    place = tmp_path_factory.mktemp("kl")
    module_monkeypatch.chdir(place)
    words = (*SHORT, "output_dir=outputs", "sweep=kl")
    codes = [main([*words, "hydra.sweep.dir=first"])]
    first = runs_of(place / "outputs")
    codes.append(main([*words, "hydra.sweep.dir=first"]))
    again = runs_of(place / "outputs")
    codes.append(main([*SHORT, "output_dir=outputs", "ppo.kl_coef=0.1,0.3", "hydra.sweep.dir=second"]))
    return SimpleNamespace(
        place=place, codes=codes, first=first, again=again, both=runs_of(place / "outputs")
    )


@pytest.fixture(scope="module")
def module_monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def by_role(runs: list) -> Counter:
    return Counter((run.data.tags["sweep.role"], run.data.tags["stage"]) for run in runs)


def parent_of(runs: list, folder: Path):
    (found,) = [
        run
        for run in runs
        if run.data.tags["sweep.role"] == "sweep" and run.data.tags["sweep.folder"] == str(folder)
    ]
    return found


def test_nine_kl_values_are_one_sft_one_reward_model_and_nine_policies(sweep):
    assert sweep.codes == [0, 0, 0]
    assert by_role(sweep.first) == {
        ("sweep", "sweep of ppo"): 1,
        ("upstream", "sft"): 1,
        ("upstream", "reward"): 1,
        ("trial", "ppo"): 9,
    }
    parent = parent_of(sweep.first, sweep.place / "first")
    known = json.loads((sweep.place / "first/sweep.json").read_text())
    assert known["mlflow_run_id"] == parent.info.run_id
    children = [run for run in sweep.first if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.status for run in sweep.first} == {"FINISHED"}
    assert "mlflow.parentRunId" not in parent.data.tags
    trials = {
        int(run.data.tags["sweep.trial"]): run for run in children if run.data.tags["sweep.role"] == "trial"
    }
    assert [float(trials[i].data.params["ppo.kl_coef"]) for i in range(9)] == list(KL)
    assert len(list((sweep.place / "outputs/sft").glob("[0-9a-f]*"))) == 1


def test_a_cached_upstream_is_a_tag_that_links_its_run(sweep):
    ids = {run.data.tags["stage"]: run.info.run_id for run in sweep.first}
    trials = [run.data.tags for run in sweep.first if run.data.tags["sweep.role"] == "trial"]
    links = {int(tags["sweep.trial"]): tags.get("cached.sft.run_id") for tags in trials}
    assert links == {0: None, **dict.fromkeys(range(1, 9), ids["sft"])}
    assert {tags.get("cached.reward.run_id") for tags in trials} == {None, ids["reward"]}


def test_a_finished_sweep_runs_nothing_again(sweep):
    assert len(sweep.again) == len(sweep.first) == 12
    assert {run.info.status for run in sweep.again} == {"FINISHED"}


def test_a_trial_that_is_there_already_is_a_child_that_links_it(sweep):
    folder = sweep.place / "second"
    parent = parent_of(sweep.both, folder)
    new = [run for run in sweep.both if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    trials = {int(run.data.tags["sweep.trial"]): run for run in new}
    assert len(new) == 2
    earlier = next(run for run in sweep.first if run.data.tags.get("sweep.trial") == "5")
    assert trials[0].data.tags["cached.ppo.run_id"] == earlier.info.run_id
    assert "cached.ppo.run_id" not in trials[1].data.tags
    for name in ("final/objective/scores", "final/objective/kl"):
        assert trials[0].data.metrics[name] == earlier.data.metrics[name]


def test_prompts_and_seeds_are_paired(sweep):
    """The same prompts in each iteration, and before the first update the same answers."""
    table = json.loads((sweep.place / "first/table.json").read_text())
    samples = [lines(Path(row["run"]) / "samples.jsonl") for row in table]
    assert len(table) == 9
    prompts = [[(line["step"], line["prompt"]) for line in found] for found in samples]
    assert all(found == prompts[0] for found in prompts)
    starts = [[line["response"] for line in found if line["step"] == 1] for found in samples]
    assert all(found == starts[0] for found in starts)
    assert len({row["kl"] for row in table}) > 1, "and yet they are nine policies"


def test_the_table_and_the_report(sweep):
    table = json.loads((sweep.place / "first/table.json").read_text())
    assert [row["overrides"] for row in table] == [{"ppo.kl_coef": f"{value}"} for value in KL]
    for row in table:
        metrics = json.loads((Path(row["run"]) / "run.json").read_text())["metrics"]
        assert (row["metric"], row["objective"]) == ("objective/scores", metrics["objective/scores"])
        assert row["kl"] == metrics["objective/kl"]
    assert (sweep.place / "first/report/report.html").is_file()
    parent = parent_of(sweep.both, sweep.place / "first")
    artifacts = Path(parent.info.artifact_uri.removeprefix("file://"))
    assert (artifacts / "table.md").read_text() == (sweep.place / "first/table.md").read_text()
    assert (artifacts / "report/report.html").is_file()
    assert parent.data.tags["sweep.done"] == "9"
