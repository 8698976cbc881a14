"""Reading an MLflow experiment: which runs are in it, and the metrics of one, step by step."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import location
from rlhf_exp.tracking.mlflow_store import _client, _usable

PAGE = 1000  # runs of one request


class Logged(NamedTuple):
    """One run of an experiment. folder: where its run folder was when it was made."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: tuple[str, ...]

    @property
    def stage(self) -> str:
        return self.tags.get("stage", "")

    @property
    def folder(self) -> str | None:
        return self.tags.get("folder")


class Experiment(NamedTuple):
    client: Any
    uri: str
    runs: list[Logged]

    def history(self, run: Logged, names: Iterable[str]) -> list[dict[str, float]]:
        """Lines as of metrics.jsonl: {"step", name: value, ..}; of a step logged twice the later value counts."""
        lines: dict[int, dict[str, float]] = {}
        with _usable(self.uri):
            for name in names:
                if name in run.metrics:
                    history = self.client.get_metric_history(run.run_id, name)
                    for metric in sorted(history, key=lambda m: m.timestamp):
                        lines.setdefault(metric.step, {})[name] = metric.value
        return [{"step": float(step), **lines[step]} for step in sorted(lines)]

    def text(self, run: Logged, artifact: str) -> str | None:
        """The content of an artifact; None where it cannot be had."""
        os.environ.setdefault(
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"
        )  # two lines for each small file
        with TemporaryDirectory() as folder, _usable(self.uri):
            try:
                path = self.client.download_artifacts(run.run_id, artifact, folder)
                return Path(path).read_text(encoding="utf-8")
            except (
                Exception
            ):  # whatever the store of artifacts raises: a path that is gone, a bucket that is closed
                return None


def open_experiment(name: str, tracking: Tracking, output_dir: Path) -> Experiment | None:
    """The runs of an experiment, oldest first; None if the store has none of this name, or is not there.

    Reading, so that tracking.backend=none does not matter; a store is never made. Raises InputError if it cannot be
    used.
    """
    uri = location.tracking_uri(Tracking(uri=tracking.uri), output_dir)
    assert uri is not None
    path = location.database_path(uri)
    if path and not path.exists():
        return None
    with _usable(uri):
        client = _client(uri)
        found = client.get_experiment_by_name(name)
        if found is None:
            return None
        if found.lifecycle_stage != "active":
            raise InputError(
                f"inputs={name}: this experiment was deleted in {location.shown(uri)}; restore it: "
                f"mlflow experiments restore --experiment-id {found.experiment_id}"
            )
        runs, token = [], None
        while True:
            page = client.search_runs([found.experiment_id], max_results=PAGE, page_token=token)
            runs += page
            token = page.token
            if not token:
                break
    ordered = sorted(runs, key=lambda run: run.info.start_time or 0)
    return Experiment(
        client,
        uri,
        [
            Logged(
                r.info.run_id, r.info.status, dict(r.data.tags), dict(r.data.params), tuple(r.data.metrics)
            )
            for r in ordered
        ],
    )


def where(tracking: Tracking, output_dir: Path) -> str:
    """The store that would be read, for messages."""
    uri = location.tracking_uri(Tracking(uri=tracking.uri), output_dir)
    assert uri is not None
    return location.shown(uri)
