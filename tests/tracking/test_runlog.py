from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_exp.tracking import NullTracker, RunLog, read_lines, read_metrics
from rlhf_exp.tracking import runlog as module


class Remembers(NullTracker):
    def __init__(self) -> None:
        self.said: list[tuple] = []

    def metrics(self, values, step) -> None:
        self.said.append(("metrics", step, dict(values)))

    def table(self, name, rows) -> None:
        self.said.append(("table", name, [dict(row) for row in rows]))

    def update(self, step, metrics) -> None:
        self.said.append(("update", step, dict(metrics)))


def test_a_step_is_in_the_file_at_once_and_goes_to_tracker_and_screen(tmp_path: Path) -> None:
    tracker, progress = Remembers(), Remembers()
    log = RunLog(tmp_path / "run", tracker, progress)
    log.step(1, {"loss": 0.5, "lr": 1e-05})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5, "lr": 1e-05}\n'
    log.step(2, {"loss": 0.1 + 0.2})
    log.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "lr": 1e-05},
        {"step": 2, "loss": 0.30000000000000004},
    ]
    assert tracker.said[0] == ("metrics", 1, {"loss": 0.5, "lr": 1e-05})
    assert progress.said[1] == ("update", 2, {"loss": 0.30000000000000004})


def test_lines_are_strict_json_also_for_nan_and_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with RunLog(tmp_path, NullTracker()) as log:
        log.step(
            1, {"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf), "d": torch.tensor(0.25), "e": 3}
        )

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        **{"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.25, "e": 3},
    }
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line.pop("a"))
    assert line == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.25, "e": 3}


def test_the_tracker_gets_no_missing_values(tmp_path: Path) -> None:
    tracker = Remembers()
    with RunLog(tmp_path, tracker) as log:
        log.step(1, {"a": None, "b": math.nan})
    ((_, _, values),) = tracker.said
    assert list(values) == ["b"]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["a"] is None


def test_samples_of_all_steps_are_one_table(tmp_path: Path) -> None:
    tracker = Remembers()
    with RunLog(tmp_path, tracker) as log:
        log.samples(0, [{"prompt": "Der Film", "response": "war gut\n«ja»", "score": 0.5}])
        log.samples(10, [{"prompt": "p", "response": "r", "score": math.nan}])
        log.samples(20, [])
    lines = list(read_lines(tmp_path / "samples.jsonl"))
    assert lines[0] == {"step": 0, "prompt": "Der Film", "response": "war gut\n«ja»", "score": 0.5}
    assert lines[1] == {"step": 10, "prompt": "p", "response": "r", "score": "NaN"}
    assert [name for _, name, _ in tracker.said] == ["samples", "samples"]
    assert [row["step"] for row in tracker.said[-1][2]] == [0, 10]


def test_the_table_keeps_the_latest_rows_and_the_file_all(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 3)
    tracker = Remembers()
    with RunLog(tmp_path, tracker) as log:
        for step in range(5):
            log.samples(step, [{"response": "x"}])
    assert [row["step"] for row in tracker.said[-1][2]] == [2, 3, 4]
    assert len(list(read_lines(tmp_path / "samples.jsonl"))) == 5


def test_fresh_truncates_and_otherwise_lines_are_added(tmp_path: Path) -> None:
    tracker = Remembers()
    with RunLog(tmp_path, tracker) as log:
        log.step(1, {"a": 1})
        log.samples(1, [{"response": "one"}])
    with RunLog(tmp_path, tracker, fresh=False) as log:
        log.step(2, {"a": 2})
        log.samples(2, [{"response": "two"}])
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["response"] for row in tracker.said[-1][2]] == ["one", "two"]
    with RunLog(tmp_path, tracker) as log:
        log.samples(3, [{"response": "three"}])
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert [row["response"] for row in tracker.said[-1][2]] == ["three"]


def test_a_half_written_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    with RunLog(tmp_path, NullTracker(), fresh=False) as log:
        log.step(2, {"loss": 1.0})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]
    path.write_bytes(b'{"step": 1')
    RunLog(tmp_path, NullTracker(), fresh=False).close()
    assert path.read_bytes() == b""


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
