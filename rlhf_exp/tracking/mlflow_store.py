"""Opening runs in MLflow 3 through MlflowClient only: no active run, no global URI, runs side by side."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import location
from rlhf_exp.tracking.mlflow_tracker import PARENT_TAG, MlflowTracker, create_run, existing, reopened, say


def _import_mlflow() -> Any:
    """The module (1.3 s). Its usage reports to mlflow.org are off unless the user says otherwise."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    return mlflow


@contextmanager
def _usable(uri: str) -> Iterator[None]:
    """Whatever goes wrong inside ends as one InputError line."""
    try:
        mlflow = _import_mlflow()
        from filelock import Timeout
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise InputError(
            f"tracking: mlflow is not installed ({error}); install it or use tracking=none"
        ) from error
    store_errors = (mlflow.exceptions.MlflowException, SQLAlchemyError, sqlite3.Error, Timeout, OSError)
    try:
        with location.calling(uri, location.CHECK):
            yield
    except (*store_errors, ImportError) as error:  # ImportError: a database's driver
        raise location.unusable(uri, error) from error


def _client(uri: str) -> Any:
    """A client whose store has been seen to exist (not, for a server, to answer)."""
    mlflow = _import_mlflow()
    if uri.split("+")[0].split(":")[0] in ("postgresql", "mysql", "mssql"):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri)  # one attempt; MLflow's own engine keeps trying for 100 s
        engine.connect().close()
        engine.dispose()
    return mlflow.MlflowClient(tracking_uri=uri)


def _experiment(client: Any, uri: str, name: str) -> str:
    """The experiment's id; made if it is not there, also when another process makes it at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=location.artifact_root(uri))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise InputError(
            f"tracking.experiment={name} was deleted in {location.shown(uri)}; choose another name or "
            f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return found.experiment_id


def _uri(tracking: Tracking, output_dir: Path) -> str:
    uri = location.tracking_uri(tracking, output_dir)
    assert uri is not None
    return uri


def _connect(uri: str, experiment: str) -> tuple[Any, str]:
    """A client and the experiment's id; the default database is made if it is not there."""
    if path := location.database_path(uri):
        # seconds, and minutes on a busy machine: not while other processes wait for the lock
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        with location.locked_database(path):
            pass  # from here on all find it there, and MLflow makes no tables
    client = _client(uri)
    return client, _experiment(client, uri, experiment)


def require_store(tracking: Tracking, output_dir: Path) -> None:
    """InputError, within seconds, unless runs can be opened."""
    uri = _uri(tracking, output_dir)
    with _usable(uri):
        _connect(uri, tracking.experiment)


def open_run(
    tracking: Tracking,
    output_dir: Path,
    name: str,
    tags: Mapping[str, object] | None = None,
    parent_id: str | None = None,
    run_id: str | None = None,
) -> MlflowTracker:
    """Open a new run, or continue `run_id`. A run that is no longer in the store is continued by a new one.

    Raises InputError (one line: the URI, why, what to do) within seconds if the store cannot be used.
    """
    uri = _uri(tracking, output_dir)
    with _usable(uri):
        client, experiment_id = _connect(uri, tracking.experiment)
        all_tags = {**(tags or {}), **({PARENT_TAG: parent_id} if parent_id else {})}
        if run_id and (run := existing(client, run_id)):
            return reopened(client, uri, run, all_tags)
        if run_id:
            say(f"tracking: run {run_id} is not in {location.shown(uri)} any more; a new run continues it")
            all_tags["rlhf_exp.continues"] = run_id
        return MlflowTracker(client, uri, create_run(client, experiment_id, name, all_tags))


def download(uri: str, tracking: Tracking, output_dir: Path, into: Path) -> Path:
    """Fetch the file or folder that runs:/RUN_ID/PATH names into the folder `into`; returns its local path.

    Raises InputError if it is malformed, the store cannot be used, or there is no such run or artifact.
    """
    parts = PurePosixPath(uri.removeprefix("runs:/").strip("/")).parts
    if not uri.startswith("runs:/") or len(parts) < 2:
        raise InputError(f"{uri}: write runs:/RUN_ID/PATH, for example runs:/4f0c.../adapter")
    store = location.tracking_uri(Tracking(uri=tracking.uri), output_dir)
    assert store is not None
    path = location.database_path(store)
    if path and not path.exists():
        raise InputError(f"{uri}: there is no MLflow database {path}; set tracking.uri to where the run is")
    with _usable(store):
        client = _client(store)
        if existing(client, parts[0]) is None:
            raise InputError(
                f"{uri}: {location.shown(store)} has no run {parts[0]}; set tracking.uri to where it is"
            )
        into.mkdir(parents=True, exist_ok=True)
        try:
            return Path(client.download_artifacts(parts[0], "/".join(parts[1:]), str(into)))
        except Exception as error:
            raise InputError(f"{uri}: no such artifact in that run ({location.reason(error)})") from error
