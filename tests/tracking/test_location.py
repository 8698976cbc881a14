from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import how_to_open, location, tracking_uri


def test_default_is_sqlite_in_the_output_folder_and_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Tracking(), "outputs") == f"sqlite:///{tmp_path}/outputs/mlflow.db"
    assert tracking_uri(Tracking(), "../outputs") == f"sqlite:///{tmp_path.parent}/outputs/mlflow.db"


def test_config_wins_over_environment_wins_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:5000")
    assert tracking_uri(Tracking(uri="http://config:5000"), tmp_path) == "http://config:5000"
    assert tracking_uri(Tracking(), tmp_path) == "http://env:5000"
    assert tracking_uri(Tracking(backend="none"), tmp_path) is None


def test_relative_sqlite_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Tracking(uri="sqlite:///runs/m.db"), "x") == f"sqlite:///{tmp_path}/runs/m.db"
    absolute = f"sqlite:///{tmp_path}/m.db?timeout=5"
    assert tracking_uri(Tracking(uri=absolute), "x") == absolute


@pytest.mark.parametrize("uri", ["mlruns", "./runs", "file:///data/mlruns", "file:runs"])
def test_a_folder_is_refused_with_what_to_write_instead(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        tracking_uri(Tracking(uri=uri), "outputs")
    (line,) = caught.value.problems
    assert line.startswith(f"tracking.uri={uri} is a folder")
    assert "mlflow.db" in line and "sqlite:////" in line


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_memory_is_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI=sqlite://.* in memory"):
        tracking_uri(Tracking(), "outputs")


@pytest.mark.parametrize("name", ["two words", "50%", "what?", "a#b", "%20", "naïve;&="])
def test_sqlalchemy_reads_odd_folders_as_they_are(tmp_path: Path, name: str) -> None:
    from sqlalchemy.engine import make_url

    uri = location.sqlite_uri(tmp_path / name / "mlflow.db")
    assert make_url(uri).database == f"{tmp_path}/{name}/mlflow.db"
    assert location.database_path(uri) == tmp_path / name / "mlflow.db"


def test_artifacts_of_a_database_are_beside_it() -> None:
    assert location.artifact_root("sqlite:////data/my runs/mlflow.db") == "file:///data/my%20runs/mlartifacts"
    assert location.artifact_root("http://host:5000") is None


def test_how_to_open() -> None:
    words = shlex.split(how_to_open("sqlite:////my runs/mlflow.db"))
    assert words == [
        *(sys.executable, "-m", "mlflow", "ui"),
        *("--backend-store-uri", "sqlite:////my runs/mlflow.db", "--host", "127.0.0.1"),
    ]
    assert how_to_open("http://user:secret@host:5000") == "http://user:***@host:5000"


def test_passwords_are_not_shown() -> None:
    assert location.shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert location.shown("http://me:pa/s@s@host:5000") == "http://me:***@host:5000"
    assert location.shown("http://host:5000/a") == "http://host:5000/a"
    assert location.shown("sqlite:////a/b@c:d.db") == "sqlite:////a/b@c:d.db"


def test_limits_hold_inside_only_and_the_users_own_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    before = dict(os.environ)
    level = logging.getLogger("mlflow").level
    with location.calling("http://host:5000", location.CHECK):
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert not logging.getLogger("mlflow.store.db.utils").isEnabledFor(logging.ERROR)
    assert dict(os.environ) == before
    assert logging.getLogger("mlflow").level == level


def test_reason_is_the_root_of_the_chain_in_one_line() -> None:
    def chain(root: BaseException) -> BaseException:
        try:
            try:
                raise root
            except type(root) as error:
                raise RuntimeError("long story\nwith lines") from error
        except RuntimeError as error:
            return error

    refused = OSError("HTTPConnection(host='h', port=1): Failed to establish: [Errno 111] Connection refused")
    assert location.reason(chain(refused)) == "Connection refused"
    assert location.reason(chain(KeyError("foo"))) == "long story"
    assert location.reason(chain(ValueError(""))) == "long story"
    assert location.reason(ValueError()) == "ValueError"
