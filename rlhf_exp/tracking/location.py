"""Which store runs go to, and making the default one (SQLite) safe for several processes at once.

Traps this module is for (MLflow 3.17): its default store is relative to the current folder; several processes
on a fresh SQLite file crash each other and can leave it broken; a file that cannot be opened is tried again
for 100 s, a server that does not answer for 4 minutes.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Tracking
from rlhf_exp.store.frozen import with_password

VARIABLE = "MLFLOW_TRACKING_URI"
LOCK_SECONDS = 600  # creating the database takes 2 s, where many processes start at once minutes
_SQLITE = re.compile(r"^sqlite(?:\+\w+)?://(?:/(?P<path>[^?]*))?(?P<query>\?.*)?$")

# Limits of the first check, of sending, and of trying again; a user's own settings win over these
CHECK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
SEND = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
PROBE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
_ALWAYS = {
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri(tracking: Tracking, output_dir: Path | str) -> str | None:
    """The store's absolute URI: tracking.uri, else MLFLOW_TRACKING_URI, else SQLite in `output_dir`."""
    if tracking.backend == "none":
        return None
    if tracking.uri:
        return _absolute(with_password(tracking.uri, "tracking.uri", VARIABLE), "tracking.uri")
    if os.environ.get(VARIABLE):
        return _absolute(os.environ[VARIABLE], VARIABLE)
    return sqlite_uri(Path(output_dir) / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """sqlite:////absolute/path, with `%`, `?` and `#` escaped as SQLAlchemy reads them."""
    absolute = os.path.abspath(path)
    return "sqlite:///" + re.sub(r"[%?#]", lambda sign: quote(sign[0], safe=""), absolute)


def _absolute(uri: str, origin: str) -> str:
    uri = uri.strip()
    if match := _SQLITE.match(uri):
        if match["path"] in (None, "", ":memory:"):
            raise InputError(
                f"{origin}={uri} is a database in memory and would be lost; use a file: sqlite:///mlflow.db"
            )
        return sqlite_uri(Path(unquote(match["path"]))) + (match["query"] or "")
    if uri.startswith("file:") or (
        ":/" not in uri and uri.split(":")[0] not in ("databricks", "databricks-uc")
    ):
        folder = re.sub(r"^file:(//)?", "", uri)
        raise InputError(
            f"{origin}={uri} is a folder, and MLflow keeps runs in a database or a server: "
            f"{sqlite_uri(Path(folder) / 'mlflow.db')} or http://HOST:PORT"
        )
    return uri


def database_path(uri: str) -> Path | None:
    """The file behind an absolute SQLite URI, None for any other store."""
    match = _SQLITE.match(uri)
    return Path(unquote(match["path"])) if match else None


def artifact_root(uri: str) -> str | None:
    """Where artifacts of a SQLite store go: mlartifacts beside it. A server has its own place (None)."""
    path = database_path(uri)
    return (path.parent / "mlartifacts").as_uri() if path else None


def shown(uri: str) -> str:
    """The URI without its password, for messages."""
    return re.sub(r"(://[^:/@]*):.*@", r"\1:***@", uri)


def how_to_open(uri: str) -> str:
    """The command line (SQLite, other databases) or the address (server) at which to look at the runs."""
    if uri.startswith(("http://", "https://")):
        return shown(uri)
    python = shlex.quote(sys.executable or "python")
    return f"{python} -m mlflow ui --backend-store-uri {shlex.quote(shown(uri))} --host 127.0.0.1"


def unusable(uri: str, error: BaseException) -> InputError:
    """The one line for a store that does not work: which, why, what to do."""
    others = "output_dir or tracking.uri" if database_path(uri) else "tracking.uri"
    return InputError(
        f"tracking: cannot use {shown(uri)} ({reason(error)}); choose another {others}, or run with tracking=none"
    )


def reason(error: BaseException) -> str:
    """The first line that says something, at the root of an exception's chain."""
    root, seen = error, {id(error)}
    while (below := root.__cause__ or root.__context__) is not None and id(below) not in seen:
        if isinstance(below, KeyError):  # says nothing but the key
            break
        root = below
        seen.add(id(below))
    for candidate in (root, error):
        for line in str(candidate).splitlines():
            # urllib3: "HTTPConnection(host='localhost', port=1): ...: [Errno 111] Connection refused"
            text = line.rsplit("[Errno", 1)[-1].split("] ", 1)[-1] if "[Errno" in line else line
            if text.strip():
                return text.strip()[:240]
    return type(error).__name__


@contextmanager
def calling(uri: str, limits: Mapping[str, str]) -> Iterator[None]:
    """Around every call of MLflow: seconds of retries, not minutes, and our one line, not its tracebacks."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    settings = {**_ALWAYS, **limits} if database_path(uri) is None else {}
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key in added:
            os.environ.pop(key, None)


@contextmanager
def locked_database(path: Path) -> Iterator[None]:
    """Hold the file lock of a database that exists, in WAL mode, and is writable.

    Raises OSError, sqlite3.Error, filelock.Timeout, or what MLflow raises.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = f"{path}.lock"
    os.close(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666))  # fails now; FileLock may try until its timeout
    with FileLock(lock, timeout=LOCK_SECONDS):
        if not path.exists() or path.stat().st_size == 0:
            _create(path)
        with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")  # readers and a writer at once; stays with the file
            connection.execute("BEGIN IMMEDIATE")  # fails now rather than in the first flush
            connection.execute("ROLLBACK")
        yield


def _create(path: Path) -> None:
    """MLflow's tables in a new file, put in place when complete: Ctrl-C in the middle breaks nothing."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import Engine, event

    def hurry(connection: sqlite3.Connection, _: object) -> None:
        # 68 migrations that each wait for the disk take 8 s instead of 2 where the disk is slow
        connection.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY")

    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    sqlite3.connect(unfinished).close()  # an impossible place fails here at once; MLflow would try for 100 s
    event.listen(Engine, "connect", hurry)
    try:
        # the second argument only serves MLflow's own experiment "Default"
        store = SqlAlchemyStore(sqlite_uri(unfinished), (path.parent / "mlartifacts").as_uri())
        store.engine.dispose()
    finally:
        event.remove(Engine, "connect", hurry)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)
