"""Run folders: their life, what a damaged one says, and which one `find` returns."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_exp import distributed
from rlhf_exp.errors import InputError
from rlhf_exp.store import hashing
from rlhf_exp.store.manifest import CorruptArtifact
from rlhf_exp.store.runs import RunFolder, find, run_folder

KEY = "3f" * 32
WEIGHTS = "adapter/adapter_model.safetensors"


def read(folder: RunFolder) -> dict:
    return json.loads((folder.path / "run.json").read_text())


def test_the_life_of_a_run(outputs):
    folder = run_folder(outputs, "sft", KEY)
    assert (folder.path, folder.stage, folder.key, folder.short) == (
        outputs / "sft" / "3f3f3f3f3f3f",
        "sft",
        KEY,
        "3f3f3f",
    )
    assert folder.status is None and folder.read() == {}

    inputs = {"base": {"name": "tiny"}, "data": {"demonstrations": "d"}, "parents": {}}
    folder.start(inputs, mlflow_run_id="m1")
    record = read(folder)
    assert record["status"] == folder.status == "RUNNING"
    assert (record["stage"], record["key"], record["inputs"], record["mlflow_run_id"]) == (
        "sft",
        KEY,
        inputs,
        "m1",
    )
    assert record["metrics"] == {} and record["ended"] is None and record["error"] is None

    folder.finish({"loss": 0.5})
    record = read(folder)
    assert (record["status"], record["metrics"]) == ("FINISHED", {"loss": 0.5})
    assert record["ended"] > record["started"] and record["seconds"] >= 0
    assert record["version"]
    # what is on the disk suffices to open it again
    again = RunFolder(folder.path)
    assert (again.stage, again.key, again.short, again.status) == ("sft", KEY, "3f3f3f", "FINISHED")


def test_a_failed_run_goes_on_in_the_same_folder_and_its_seconds_add_up(outputs, monkeypatch):
    clock = iter([100.0, 107.0, 500.0, 503.0])
    monkeypatch.setattr("rlhf_exp.store.runs.time.monotonic", lambda: next(clock))
    folder = run_folder(outputs, "sft", KEY)
    folder.start({})
    started = read(folder)["started"]
    folder.fail("KILLED", "KeyboardInterrupt")
    record = read(folder)
    assert (record["status"], record["error"], record["seconds"]) == ("KILLED", "KeyboardInterrupt", 7.0)

    again = run_folder(outputs, "sft", KEY)
    assert again.path == folder.path
    again.start({})
    assert read(again)["status"] == "RUNNING" and read(again)["error"] is None
    again.finish({})
    assert read(again)["seconds"] == 10.0 and read(again)["started"] == started


def test_what_fails_after_the_end_does_not_undo_the_result(make_run):
    run = make_run("sft", "3f")
    run.fail("KILLED", "Ctrl-C during an upload")
    assert run.status == "FINISHED"
    assert run.read()["error"] is None
    run.verify()


def test_fail_takes_only_the_two_states(make_run):
    with pytest.raises(ValueError, match="FAILED or KILLED, got FINISHED"):
        make_run("sft", "3f", end=None).fail("FINISHED", "")


def test_metrics_are_strict_json(make_run):
    class Scalar:  # as torch and numpy have them
        def item(self):
            return 2.5

    metrics = {"nan": float("nan"), "inf": float("-inf"), "n": Scalar(), "pair": (1, Path("x")), "on": True}
    text = (make_run("sft", "3f", metrics=metrics).path / "run.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["metrics"] == {"nan": None, "inf": None, "n": 2.5, "pair": [1, "x"], "on": True}


def test_text_json_and_nested_folders(make_run):
    folder = make_run("sft", "3f", end=None)
    folder.write_json("tables/eval.json", {"text": "好", "at": Path("a")})
    assert (folder.path / "tables/eval.json").read_text(
        encoding="utf-8"
    ) == '{\n "text": "好",\n "at": "a"\n}\n'
    with folder.publish("policies/step-10") as files:
        (files / "w").write_text("1")
    assert (folder.path / "policies/step-10/w").read_text() == "1"
    folder.discard("policies/step-10")
    folder.discard("policies/never-there")
    assert list((folder.path / "policies").iterdir()) == []


def test_manifest_lists_files_with_their_hash_but_not_logs(make_run):
    folder = make_run("sft", "3f")
    files = json.loads((folder.path / "manifest.json").read_text())["files"]
    assert set(files) == {"adapter/adapter_config.json", WEIGHTS, "config.yaml"}
    # sha256 of the bytes 0..199, by sha256sum
    assert files[WEIGHTS] == {
        "size": 200,
        "sha256": "1901da1c9f699b48f6b2636e65cbf73abf99d0441ef67f5c540a42f7051dec6f",
    }


CHANGES = {
    "publish": lambda folder: folder.publish("adapter").__enter__(),
    "write_text": lambda folder: folder.write_text("config.yaml", ""),
    "write_json": lambda folder: folder.write_json("adapter/adapter_config.json", {}),
    "discard": lambda folder: folder.discard("adapter"),
    "start": lambda folder: folder.start({}),
}
ENDS = {
    "finish": lambda folder: folder.finish({}),
    "fail": lambda folder: folder.fail("KILLED", "by a signal"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_artifact_cannot_be_changed(make_run, change):
    folder = make_run("sft", "3f")
    with pytest.raises(RuntimeError, match="is finished"):
        CHANGES[change](folder)
    folder.verify()


@pytest.mark.parametrize("change", CHANGES | ENDS)
def test_a_rank_that_is_behind_finds_the_run_finished(make_run, monkeypatch, change):
    """Rank 0 writes, and does not wait: what another rank comes to write may be sealed by then. It does nothing."""
    folder = make_run("sft", "3f")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    (CHANGES | ENDS)[change](folder)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_a_finished_run_takes_new_files_and_fields(make_run):
    folder = make_run("sft", "3f")
    folder.write_text("report.html", "<p>")
    folder.update(mlflow_run_id="m2")
    with open(folder.path / "metrics.jsonl", "a") as log:
        log.write("{}\n")
    folder.verify()
    assert read(folder)["mlflow_run_id"] == "m2" and read(folder)["status"] == "FINISHED"


# ---- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def edit(name: str, change) -> object:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


DAMAGE = {
    "truncated": (
        lambda f: os.truncate(f / WEIGHTS, 150),
        f"{WEIGHTS} is truncated (150 bytes, 200 when the run finished)",
    ),
    "longer": (
        lambda f: os.truncate(f / WEIGHTS, 300),
        f"{WEIGHTS} is longer than it was (300 bytes, 200 when the run finished)",
    ),
    "flipped bit": (
        lambda f: flip(f / WEIGHTS),
        f"{WEIGHTS} has other content than when the run finished (sha256 differs)",
    ),
    "missing file": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "a folder in its place": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        WEIGHTS,
    ),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json is not a manifest"),
    "manifest of another shape": (
        lambda f: (f / "manifest.json").write_text('{"files": [1]}'),
        "manifest.json is not a manifest",
    ),
    "manifest row of another shape": (
        lambda f: (f / "manifest.json").write_text('{"files": {"a": {"size": null, "sha256": ""}}}'),
        "manifest.json is not a manifest",
    ),
    "manifest without a file": (
        edit("manifest.json", lambda m: m["files"].pop(WEIGHTS)),
        "manifest.json is not the manifest that the run wrote",
    ),
    "missing run.json": (lambda f: (f / "run.json").unlink(), "run.json is missing"),
    "truncated run.json": (lambda f: os.truncate(f / "run.json", 50), "run.json cannot be read"),
    "binary run.json": (lambda f: (f / "run.json").write_bytes(b"\xff\xfe\x00"), "run.json cannot be read"),
    "run.json of another shape": (
        lambda f: (f / "run.json").write_text("[]"),
        "run.json is not a JSON object",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_the_file_and_the_cure(make_run, outputs, name):
    folder = make_run("sft", "3f")
    damage, expected = DAMAGE[name]
    damage(folder.path)
    for check in (folder.verify, lambda: find(outputs, "sft", KEY)):
        with pytest.raises(CorruptArtifact) as caught:
            check()
        assert isinstance(caught.value, InputError)
        (line,) = caught.value.problems
        assert line.startswith(f"{folder.path}/") and expected in line
        assert line.endswith(f": delete {folder.path} to build it again, or run with resume=never")
        assert "\n" not in line


def test_every_damaged_file_has_its_line_up_to_five(make_run):
    folder = make_run("sft", "3f", end=None)
    for n in range(8):
        folder.write_text(f"{n}.txt", "x")
    folder.finish({})
    for n in range(7):
        (folder.path / f"{n}.txt").unlink()
    with pytest.raises(CorruptArtifact) as caught:
        folder.verify()
    assert len(caught.value.problems) == 6
    assert caught.value.problems[-1] == f"{folder.path}: 2 more files are not as the manifest says"


def test_an_unfinished_run_does_not_verify(make_run):
    with pytest.raises(CorruptArtifact, match=r"not a finished run \(status FAILED\)"):
        make_run("sft", "3f", end="FAILED").verify()


def test_a_file_is_hashed_once_a_process_and_again_when_it_changes(make_run, monkeypatch):
    folder = make_run("sft", "3f")
    read_files, digest, now = [], hashing._digest, hashing.time.time
    monkeypatch.setattr(hashing, "_digest", lambda path: (read_files.append(path.name), digest(path))[1])
    monkeypatch.setattr(hashing.time, "time", lambda: now() + 10)  # long after the files were written
    hashing._process_memo.clear()
    folder.verify()
    assert sorted(read_files) == ["adapter_config.json", "adapter_model.safetensors", "config.yaml"]
    folder.verify()
    assert len(read_files) == 3
    stat = (folder.path / WEIGHTS).stat()
    flip(folder.path / WEIGHTS)
    os.utime(folder.path / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CorruptArtifact, match="other content"):
        folder.verify()


# ---- find and run_folder


def test_find_returns_only_finished_runs_of_this_stage_and_key(make_run, outputs):
    assert find(outputs, "sft", KEY) is None
    for end in (None, "FAILED", "KILLED"):
        make_run("sft", "3f", end=end)
        assert find(outputs, "sft", KEY) is None
    finished = make_run("sft", "3f")
    assert find(outputs, "sft", KEY).path == finished.path
    assert find(outputs, "reward", KEY) is None
    assert find(outputs, "sft", "4e" * 32) is None


def test_an_empty_folder_is_an_unfinished_run(outputs):
    run_folder(outputs, "sft", KEY)
    assert find(outputs, "sft", KEY) is None


def test_find_prefers_the_newest(make_run, outputs):
    make_run("sft", "3f")
    second = make_run("sft", "3f", resume="never")
    assert second.path.name == "3f3f3f3f3f3f-2"
    assert find(outputs, "sft", KEY).path == second.path
    make_run("sft", "3f", resume="never", end="FAILED")
    assert find(outputs, "sft", KEY).path == second.path


def test_a_damaged_run_is_reported_until_a_newer_one_is_there(make_run, outputs):
    first = make_run("sft", "3f")
    os.truncate(first.path / WEIGHTS, 1)
    with pytest.raises(CorruptArtifact):
        find(outputs, "sft", KEY)
    second = make_run("sft", "3f", resume="never")
    assert find(outputs, "sft", KEY).path == second.path
    # an older sound one is no excuse for the newest
    os.truncate(second.path / WEIGHTS, 1)
    with pytest.raises(CorruptArtifact, match="-2/adapter"):
        find(outputs, "sft", KEY)


def test_an_unreadable_run_json_does_not_hide_a_sound_run(make_run, outputs):
    (make_run("sft", "3f", end=None).path / "run.json").write_text("{")
    with pytest.raises(CorruptArtifact, match=r"run\.json cannot be read"):
        find(outputs, "sft", KEY)
    second = make_run("sft", "3f", resume="never")
    assert find(outputs, "sft", KEY).path == second.path


def test_never_takes_the_first_free_name_and_auto_always_the_first(outputs):
    names = [run_folder(outputs, "sft", KEY, "never").path.name for _ in range(3)]
    assert names == ["3f3f3f3f3f3f", "3f3f3f3f3f3f-2", "3f3f3f3f3f3f-3"]
    assert run_folder(outputs, "sft", KEY).path.name == "3f3f3f3f3f3f"


def test_keys_with_the_same_first_digits_are_kept_apart(make_run, outputs):
    make_run("sft", "3f")
    other = "3f" * 6 + "00" * 26
    assert find(outputs, "sft", other) is None
    folder = run_folder(outputs, "sft", other)
    assert folder.path.name == "3f3f3f3f3f3f-2"
    folder.start({})
    folder.finish({})
    assert find(outputs, "sft", other).path == folder.path
    assert find(outputs, "sft", KEY).path.name == "3f3f3f3f3f3f"
    assert run_folder(outputs, "sft", other).path == folder.path


def test_other_folders_are_not_taken_for_runs(outputs):
    for name in ("3f3f3f3f3f3f-old", "3f3f3f3f3f3fff", ".3f3f3f3f3f3f.1-a.tmp"):
        (outputs / "sft" / name).mkdir(parents=True)
        (outputs / "sft" / name / "run.json").write_text("{")
    assert find(outputs, "sft", KEY) is None
