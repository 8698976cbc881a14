"""Killed at any step, a store holds the old content or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp.store import atomic
from rlhf_exp.store.locks import build_lock
from rlhf_exp.store.runs import RunFolder

KEY = "5f" * 32
OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "b": "new", "c": "new"}


def write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str] | None:
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.is_dir() else None


def killed_runs(action: str, root: Path) -> list[Path]:
    """The run folders that killer.py left in the stage folder `root`; the process of the last one lived."""
    script = Path(__file__).with_name("killer.py")
    done = subprocess.run([sys.executable, script, action, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [root / str(step) for step in range(1, int(done.stdout) + 1)]


def repaired(folder: Path) -> Path:
    with build_lock(folder):
        pass
    assert atomic.leftovers(folder) == []
    assert not any(path.name.startswith(".") for path in folder.rglob("*"))
    return folder


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A started run at the place that killer.py copies."""
    folder = RunFolder(tmp_path / "sft" / "start", "sft", KEY)
    folder.start({})
    return folder


def test_publish_over_an_old_folder(run):
    write(run.path / "adapter", OLD)
    folders = killed_runs("publish", run.path.parent)
    seen = [content(repaired(folder) / "adapter") for folder in folders]
    assert all(files in (OLD, NEW) for files in seen)
    first_new = seen.index(NEW)
    # once the new one is in place it stays, and both happened: the kills reach either side of the renames
    assert first_new > 5 and seen[first_new:] == [NEW] * (len(seen) - first_new) and len(seen) - first_new > 2


def test_publish_the_first_time(run):
    seen = [content(repaired(folder) / "adapter") for folder in killed_runs("publish", run.path.parent)]
    assert all(files in (None, NEW) for files in seen) and seen[0] is None and seen[-1] == NEW


def test_what_a_kill_leaves_does_not_hinder_the_next_publish(run):
    write(run.path / "adapter", OLD)
    for folder in killed_runs("publish", run.path.parent):
        with RunFolder(folder).publish("adapter") as files:
            (files / "x").write_text("newer")
        assert content(folder / "adapter") == {"x": "newer"}


@pytest.mark.parametrize(
    ("aside", "in_place", "expected"), [(OLD, None, OLD), (OLD, NEW, NEW)], ids=["undone", "completed"]
)
def test_repair_can_itself_be_killed(run, aside, in_place, expected):
    write(run.path / ".adapter.old", aside)
    write(run.path / ".adapter.123-ab.tmp", {"a": "ne"})
    if in_place:
        write(run.path / "adapter", in_place)
    folders = killed_runs("repair", run.path.parent)
    assert len(folders) > 3
    for folder in folders:
        assert content(repaired(folder) / "adapter") == expected


def test_discard(run):
    write(run.path / "adapter", OLD)
    seen = [content(repaired(folder) / "adapter") for folder in killed_runs("discard", run.path.parent)]
    assert seen[0] == OLD and seen[-1] is None and all(files in (OLD, None) for files in seen)


@pytest.mark.parametrize(
    ("action", "field", "before", "after"),
    [
        ("update", "mlflow_run_id", "old", "new"),
        ("fail", "status", "RUNNING", "FAILED"),
        ("finish", "status", "RUNNING", "FINISHED"),
    ],
)
def test_run_json_is_whole_at_every_moment(run, action, field, before, after):
    write(run.path / "adapter", OLD)
    run.update(mlflow_run_id="old")
    folders = killed_runs(action, run.path.parent)
    seen = []
    for folder in folders:
        record = json.loads((folder / "run.json").read_text())
        assert record["key"] == KEY and record["started"]
        seen.append(record[field])
        if record["status"] == "FINISHED":
            assert record["metrics"] == {"loss": 0.25}
            RunFolder(folder).verify()
        repaired(folder)
    assert seen[0] == before and seen[-1] == after and set(seen) == {before, after}


def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path):
    write(tmp_path / "adapter", OLD)
    with pytest.raises(ZeroDivisionError), atomic.new_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("new")
        _ = 1 / 0
    assert content(tmp_path / "adapter") == OLD and os.listdir(tmp_path) == ["adapter"]


def test_a_rename_that_fails_gives_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "adapter", OLD)
    rename = os.rename

    def full(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", full)
    with pytest.raises(OSError, match="No space"), atomic.new_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("new")
    assert content(tmp_path / "adapter") == OLD and os.listdir(tmp_path) == ["adapter"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    atomic.write_bytes(tmp_path / "f", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_bytes(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_everything_is_flushed_before_its_name_appears(tmp_path, monkeypatch):
    """fsync of each file and folder, then the rename, then fsync of the folder that holds the name."""
    calls = []
    name = lambda path: "TMP" if Path(path).name.endswith(".tmp") else Path(path).name  # noqa: E731
    fsync, rename = atomic.fsync, os.rename
    monkeypatch.setattr(atomic, "fsync", lambda path: (calls.append(f"fsync {name(path)}"), fsync(path)))
    monkeypatch.setattr(
        atomic.os, "rename", lambda a, b: (calls.append(f"rename {name(a)} {name(b)}"), rename(a, b))
    )
    with atomic.new_folder(tmp_path / "adapter") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        (folder / "y").write_text("2")
    expected = [
        "fsync x",
        "fsync sub",
        "fsync y",
        "fsync TMP",
        "rename TMP adapter",
        f"fsync {tmp_path.name}",
    ]
    assert calls == expected


def test_new_files_follow_the_umask(tmp_path):
    """A shared outputs folder stays readable for the group: tempfile's 0600 would not."""
    umask = os.umask(0o027)
    try:
        atomic.write_bytes(tmp_path / "f", b"")
        with atomic.new_folder(tmp_path / "d"):
            pass
    finally:
        os.umask(umask)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("f", "d")]
    assert modes == [0o640, 0o750]
