"""Several processes at once on a store that does not exist yet."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROCESSES, STEPS = 6, 100

# forked after the imports and held at a barrier: all of them reach the missing database in the same moment
SCRIPT = """
import multiprocessing, sys
import mlflow, mlflow.store.tracking.sqlalchemy_store
from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import open_tracker, tracked, mlflow_tracker

def work(rank, output_dir, steps, barrier):
    mlflow_tracker.FLUSH_COUNT = 40  # several batches each, in the middle of the others'
    barrier.wait()
    with tracked(open_tracker(Tracking(experiment="sweep"), output_dir, f"trial {rank}")) as tracker:
        tracker.params({"rank": rank, "lora": {"r": 8}})
        for step in range(steps):
            tracker.metrics({"loss": rank + step / 100, "kl": step}, step)

count, steps = int(sys.argv[2]), int(sys.argv[3])
context = multiprocessing.get_context("fork")
barrier = context.Barrier(count)
processes = [context.Process(target=work, args=(rank, sys.argv[1], steps, barrier)) for rank in range(count)]
[process.start() for process in processes]
[process.join() for process in processes]
print([process.exitcode for process in processes])
"""


def test_six_processes_on_a_fresh_store(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "outputs"), str(PROCESSES), str(STEPS)],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert json.loads(done.stdout) == [0] * PROCESSES, done.stderr
    assert "tracking:" not in done.stderr  # nothing was late, refused or lost

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/outputs/mlflow.db")
    assert sorted(experiment.name for experiment in client.search_experiments()) == ["Default", "sweep"]
    runs = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    assert len(runs) == PROCESSES
    for run in runs:
        rank = int(run.data.params["rank"])
        assert (run.info.status, run.info.run_name) == ("FINISHED", f"trial {rank}")
        assert run.data.params["lora.r"] == "8"
        losses = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((metric.step, metric.value) for metric in losses) == [
            (step, rank + step / 100) for step in range(STEPS)
        ]
        assert len(client.get_metric_history(run.info.run_id, "kl")) == STEPS
    assert sorted(int(run.data.params["rank"]) for run in runs) == list(range(PROCESSES))
