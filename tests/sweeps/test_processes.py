"""Many processes at once on one store and one MLflow database that is not there yet."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from rlhf_exp import compose
from rlhf_exp.paths import conf_dir
from rlhf_exp.sweeps import folder, ledger, trial

WORDS = (
    *("stage=dpo", "model=tiny", "model.dtype=float32", "threads=1"),
    *("train.steps=3", "train.batch_size=2", "train.micro_batch_size=2"),
    "upstream.sft={train: {steps: 2, batch_size: 2, micro_batch_size: 2}}",
)


def together(count: int, place: Path) -> list[subprocess.CompletedProcess]:
    """`count` trials of one sweep, two of each seed, in a process each, started in the same moment."""
    folder.create(place, [], conf=conf_dir())
    for number in range(count):
        words = [*WORDS, f"optim.lr={(number // 2 + 1) / 1e4}", f"output_dir={place.parent / 'outputs'}"]
        config, choices = compose.compose(words)
        trial.write(place / str(number), number, words, config, choices)
    running = [
        subprocess.Popen(
            trial.command(place / str(number)),
            env=trial.environment(place / str(number)) | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    return [finished(one) for one in running]


def finished(one: subprocess.Popen) -> subprocess.CompletedProcess:
    out, err = one.communicate(timeout=600)
    return subprocess.CompletedProcess(one.args, one.returncode, out, err)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(3, marks=[pytest.mark.long, pytest.mark.timeout(300)]),
        pytest.param(16, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_one_store_one_database(tmp_path, count):
    place = tmp_path / "sweep"
    done = together(count, place)
    for one in done:
        assert one.returncode == 0, one.stderr[-3000:]
        assert "tracking:" not in one.stderr, "nothing was late, refused or lost"
    states = ledger.states(place)
    assert [state.status for state in states.values()] == ["done"] * count
    assert [state.attempts for state in states.values()] == [1] * count

    output, different = tmp_path / "outputs", (count + 1) // 2
    runs = {stage: [p for p in (output / stage).iterdir() if p.name[0] != "."] for stage in ("sft", "dpo")}
    assert {stage: len(found) for stage, found in runs.items()} == {"sft": 1, "dpo": different}
    built = "".join(one.stdout for one in done).count("built by another process meanwhile, reused")
    # each process wanted sft and its dpo: what it did not build it waited for, or found
    assert built <= 2 * count - 1 - different
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output}/mlflow.db")
    tracked = client.search_runs([client.get_experiment_by_name("rlhf_exp").experiment_id])
    of_stage = {stage: [run for run in tracked if run.data.tags.get("stage") == stage] for stage in runs}
    assert {stage: len(found) for stage, found in of_stage.items()} == {"sft": 1, "dpo": different}
    for stage, found in of_stage.items():
        for run in found:
            assert run.info.status == "FINISHED"
            lines = (Path(run.data.tags["folder"]) / "metrics.jsonl").read_text().splitlines()
            wanted = [(row["step"], row["train/loss"]) for row in map(json.loads, lines)]
            history = client.get_metric_history(run.info.run_id, "train/loss")
            assert sorted((m.step, m.value) for m in history) == wanted
            assert len(wanted) == {"sft": 2, "dpo": 3}[stage]
    assert os.listdir(output / ".experiments") == [] if (output / ".experiments").is_dir() else True
