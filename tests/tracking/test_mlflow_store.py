"""Opening a store: made once and safely, or refused in one line."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from pathlib import Path

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import NullTracker, mlflow_store, open_tracker


def refused(tracking: Tracking, output_dir: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        open_tracker(tracking, output_dir, "x", **options)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def test_none_is_a_tracker_that_does_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(Tracking(backend="none", uri="nonsense"), tmp_path / "outputs", "x")
    assert isinstance(tracker, NullTracker)
    assert tracker.child("y").run_id is None
    tracker.metrics({"a": 1}, 0)
    tracker.finish("FAILED", ValueError("x"))
    assert not (tmp_path / "outputs").exists()


def test_a_fresh_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    output_dir = tmp_path / "out dir" / "outputs"
    output_dir.mkdir(parents=True)
    (output_dir / "mlflow.db.new").write_bytes(b"left by a process that was killed here")
    tracker = open_tracker(Tracking(experiment="my exp"), output_dir, "sft", {"stage": "sft"})
    tracker.finish("FINISHED")

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlflow.db")
    experiment = client.get_experiment_by_name("my exp")
    assert experiment.artifact_location == (output_dir / "mlartifacts").as_uri()
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("sft", "FINISHED")
    assert run.data.tags["stage"] == "sft"
    with sqlite3.connect(output_dir / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert list(cwd.iterdir()) == []  # no ./mlruns, no ./mlflow.db
    assert not (output_dir / "mlflow.db.new").exists()


def test_an_unfinished_creation_leaves_nothing_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.db import utils

    def interrupted(engine) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE experiments (half INTEGER)")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_tracker(Tracking(), tmp_path, "x")
    assert not (tmp_path / "mlflow.db").exists()


def test_an_old_database_in_another_mode_becomes_wal(output_dir: Path) -> None:
    with sqlite3.connect(output_dir / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    open_tracker(Tracking(), output_dir, "x")
    with sqlite3.connect(output_dir / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_an_experiment_that_someone_else_makes_first(output_dir: Path, store, monkeypatch) -> None:
    theirs = store.client.create_experiment("shared")
    real = type(store.client).get_experiment_by_name
    answers = [None]  # the first look comes before their creation

    def late(self, name):
        return answers.pop() if answers else real(self, name)

    monkeypatch.setattr(type(store.client), "get_experiment_by_name", late)
    tracker = open_tracker(Tracking(experiment="shared"), output_dir, "x")
    assert store.run(tracker.run_id).info.experiment_id == theirs


def test_a_run_that_is_gone_is_continued_by_a_new_one(output_dir: Path, store, capsys) -> None:
    gone = "0123456789abcdef0123456789abcdef"
    tracker = open_tracker(Tracking(), output_dir, "ppo", run_id=gone)
    assert tracker.run_id != gone
    assert store.run(tracker.run_id).data.tags["rlhf_exp.continues"] == gone
    deleted = open_tracker(Tracking(), output_dir, "ppo").run_id
    store.client.delete_run(deleted)
    assert open_tracker(Tracking(), output_dir, "ppo", run_id=deleted).run_id != deleted
    assert f"run {gone} is not in sqlite" in capsys.readouterr().err


def test_a_deleted_experiment(output_dir: Path, store) -> None:
    store.client.delete_experiment(store.client.create_experiment("old"))
    line = refused(Tracking(experiment="old"), output_dir)
    assert "tracking.experiment=old was deleted" in line


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    line = refused(Tracking(uri=f"http://user:secret@127.0.0.1:{port}"), tmp_path)
    assert time.monotonic() - start < 10
    assert f"http://user:***@127.0.0.1:{port}" in line and "Connection refused" in line
    assert "tracking=none" in line


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        line = refused(Tracking(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)
        assert time.monotonic() - start < 10
    assert "timed out" in line.lower()


def test_a_folder_that_cannot_be_made(tmp_path: Path, capfd) -> None:
    (tmp_path / "file").write_text("")
    start = time.monotonic()
    line = refused(Tracking(), tmp_path / "file" / "outputs")
    assert time.monotonic() - start < 5
    assert str(tmp_path / "file") in line and "tracking=none" in line
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_without_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    assert "Permission denied" in refused(Tracking(), tmp_path / "outputs")
    assert "Permission denied" in refused(Tracking(), tmp_path)


def test_a_read_only_folder_of_the_system() -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    start = time.monotonic()
    assert "cannot use sqlite:////proc/self/mlflow.db" in refused(Tracking(), Path("/proc/self"))
    assert time.monotonic() - start < 5


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look like one" * 100)
    assert "file is not a database" in refused(Tracking(), tmp_path)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("adapters/sft", "write runs:/RUN_ID/PATH"),
        ("runs:/4f0c", "write runs:/RUN_ID/PATH"),
        ("runs:/4f0c/adapter", "has no run 4f0c"),
    ],
)
def test_download_refuses_in_a_line(uri: str, says: str, output_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        mlflow_store.download(uri, Tracking(), output_dir, tmp_path / "into")


def test_download_without_store_or_artifact(output_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no MLflow database"):
        mlflow_store.download("runs:/4f0c/adapter", Tracking(), tmp_path / "elsewhere", tmp_path / "into")
    assert not (tmp_path / "elsewhere").exists()
    run_id = open_tracker(Tracking(), output_dir, "x").run_id
    with pytest.raises(InputError, match="no such artifact"):
        mlflow_store.download(f"runs:/{run_id}/adapter", Tracking(), output_dir, tmp_path / "into")
