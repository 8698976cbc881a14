"""A real SQLite store per test, its tables made once for all of them (that costs 2 s)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import location, mlflow_store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mlflow_store._import_mlflow()
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    with location.calling(location.sqlite_uri(path), {}), location.locked_database(path):
        pass
    return path


@pytest.fixture
def output_dir(tmp_path: Path, empty_database: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


class Store:
    """Reads the store back through a client of its own."""

    def __init__(self, output_dir: Path):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlflow.db")

    def run(self, run_id: str):
        return self.client.get_run(run_id)

    def history(self, run_id: str, key: str) -> list[tuple[int, float]]:
        return sorted((metric.step, metric.value) for metric in self.client.get_metric_history(run_id, key))

    def runs(self, experiment: str = "rlhf_exp") -> list:
        found = self.client.get_experiment_by_name(experiment)
        return list(self.client.search_runs([found.experiment_id]))

    def artifact(self, run_id: str, name: str, into: Path) -> str:
        into.mkdir(exist_ok=True)
        return Path(self.client.download_artifacts(run_id, name, str(into))).read_text(encoding="utf-8")


@pytest.fixture
def store(output_dir: Path) -> Store:
    return Store(output_dir)


class Clock:
    """Seconds that pass when the test says so; `sleep` lets them pass too."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tracker(output_dir: Path, clock: Clock) -> mlflow_store.MlflowTracker:
    opened = mlflow_store.open_run(Tracking(), output_dir, "sft 3fa9c1")
    opened._clock, opened._sleep, opened._last_flush = clock, clock.sleep, clock()
    return opened
