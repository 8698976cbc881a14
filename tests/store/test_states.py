"""Checkpoints on the disk: which are there, which are whole, and when they go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.store import gc, listing, states
from rlhf_exp.store.runs import run_folder


def write(run: Path, step: int, text: str = "x") -> None:
    with states.new(run, step) as folder:
        (folder / "a.bin").write_text(text)
        (folder / "b.json").write_text("{}")


def test_the_last_two_are_kept(tmp_path):
    assert states.steps(tmp_path) == []
    for step in (1, 2, 10, 100000):
        write(tmp_path, step)
    assert states.steps(tmp_path) == [100000, 10]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step_00010", "step_100000"]
    assert [states.problem(tmp_path, step) for step in (10, 100000)] == [None, None]
    states.remove(tmp_path)
    states.remove(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_of_a_later_step_stays_until_its_step_comes(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (states.place(tmp_path, 3) / "a.bin").write_text("damaged")
    write(tmp_path, 1, "new")
    write(tmp_path, 2, "new")
    assert states.steps(tmp_path) == [3, 2, 1]
    write(tmp_path, 3, "new")
    assert states.steps(tmp_path) == [3, 2]
    assert states.problem(tmp_path, 3) is None


def test_an_error_while_writing_leaves_nothing(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"), states.new(tmp_path, 2) as folder:
        (folder / "a.bin").write_text("x")
        raise OSError("disk full")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_00001"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "a.bin").write_text("y"), "a.bin is not what was written"),
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing"),
        (lambda folder: (folder / "digests.json").unlink(), "digests.json is missing"),
        (lambda folder: (folder / "digests.json").write_text("{"), "digests.json cannot be read"),
        (lambda folder: (folder / "digests.json").write_text("[]"), "digests.json cannot be read"),
    ],
)
def test_what_is_wrong(tmp_path, damage, says):
    write(tmp_path, 7)
    damage(states.place(tmp_path, 7))
    assert states.problem(tmp_path, 7) == says


def test_a_finished_run_has_none_and_its_manifest_does_not_name_them(tmp_path, capsys):
    folder = run_folder(tmp_path, "sft", "ab" * 32)
    folder.start({})
    with folder.publish("adapter") as files:
        (files / "state").mkdir()
        (files / "state" / "kept").write_text("a folder of that name further down is nothing special")
    write(folder.path, 4)
    (entry,) = listing.scan(tmp_path)
    assert listing.saved_text(entry) == "saved at step 4"
    folder.finish({"loss": 1.0})
    assert not (folder.path / "state").exists()
    assert list(json.loads((folder.path / "manifest.json").read_text())["files"]) == ["adapter/state/kept"]


def test_checkpoints_that_a_crash_left_in_a_finished_run_can_go(tmp_path):
    folder = run_folder(tmp_path, "sft", "ab" * 32)
    folder.start({})
    folder.finish({})
    write(folder.path, 4)
    folder.verify()
    (candidate,) = gc.plan(tmp_path)
    assert (candidate.path, candidate.reason) == (folder.path / "state", "checkpoints of a finished run")
    size = candidate.size
    assert gc.delete(candidate, tmp_path, print) == size > 0
    assert not (folder.path / "state").exists()
    folder.verify()
