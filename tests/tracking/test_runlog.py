from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_exp.tracking import NullTracker, RunLog, read_lines, read_metrics, resend
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


def told(tracker: Remembers) -> list[tuple]:
    return [(step, values) for kind, step, values in tracker.said if kind == "metrics"]


def test_a_log_that_holds_tells_the_tracker_at_commit_and_at_a_good_end(tmp_path: Path) -> None:
    tracker = Remembers()
    with RunLog(tmp_path, tracker, hold=True) as log:
        log.step(0, {"a": 0.0})
        assert told(tracker) == []
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 0.0}]
        log.commit()
        log.commit()
        assert told(tracker) == [(0, {"a": 0.0})]
        log.step(1, {"a": 1.0})
    assert told(tracker) == [(0, {"a": 0.0}), (1, {"a": 1.0})]
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, tracker, hold=True) as log:
        log.step(2, {"a": 2.0})
        raise ZeroDivisionError
    assert len(told(tracker)) == 2


def killed_after_three(tmp_path: Path, tracker: Remembers) -> dict:
    """Saved after step 2, told so far, then dead in step 4."""
    log = RunLog(tmp_path, tracker, hold=True)
    for step in (1, 2):
        log.step(step, {"a": step / 7})
        log.samples(step, [{"response": f"of {step}"}])
    position = json.loads(json.dumps(log.position()))
    log.commit()
    log.step(3, {"a": math.nan})
    log.samples(3, [{"response": "of 3"}])
    log.close()
    return position


def test_it_goes_on_where_the_position_says(tmp_path: Path) -> None:
    position = killed_after_three(tmp_path, Remembers())
    tracker = Remembers()
    with RunLog(tmp_path, tracker, hold=True, position=position) as log:
        # what may have been lost on its way, and nothing else
        assert told(tracker) == [(1, {"a": 1 / 7}), (2, {"a": 2 / 7})]
        log.step(3, {"a": 3.0})
        log.samples(3, [{"response": "again"}])
    assert [line["a"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1 / 7, 2 / 7, 3.0]
    assert [row["response"] for row in tracker.said[-2][2]] == ["of 1", "of 2", "again"]
    assert told(tracker)[2:] == [(3, {"a": 3.0})]


def test_what_an_attempt_that_was_further_has_told_is_not_told_again(tmp_path: Path) -> None:
    """The checkpoint of step 3 is damaged: that of step 2 is used, the tracker has step 3 for good."""
    position = killed_after_three(tmp_path, Remembers()) | {"tracked": 3}
    tracker = Remembers()
    with RunLog(tmp_path, tracker, hold=True, position=position) as log:
        assert [step for step, _ in told(tracker)] == [1, 2, 3]
        log.step(3, {"a": 3.5})
        log.step(4, {"a": 4.0})
        assert log.position()["tracked"] == 4
    assert [line["a"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1 / 7, 2 / 7, 3.5, 4.0]
    assert told(tracker)[3:] == [(4, {"a": 4.0})]


def test_what_has_arrived_is_not_sent_again_to_the_same_run(tmp_path: Path) -> None:
    class Slow(Remembers):
        run_id = "r1"
        done = False

        def settled(self) -> bool:
            return self.done

    first = Slow()
    log = RunLog(tmp_path, first, hold=True)
    for step in range(1, 5):
        first.done = step == 4  # the store has what was committed before: steps 1 to 3
        log.step(step, {"a": step})
        position = log.position()
        log.commit()
    log.close()
    again, other = Slow(), Slow()
    other.run_id = "r2"
    for tracker, steps in ((again, [4]), (other, [1, 2, 3, 4])):
        RunLog(tmp_path, tracker, hold=True, position=position).close()
        assert [step for step, _ in told(tracker)] == steps


def test_a_finished_run_is_told_whole_again(tmp_path: Path) -> None:
    with RunLog(tmp_path, Remembers()) as log:
        log.step(1, {"a": 1.0, "no": None})
        log.step(2, {"a": math.nan})
        log.samples(2, [{"response": "of 2"}])
    tracker = Remembers()
    resend(tmp_path, tracker)
    (_, one, first), (_, two, second), table = tracker.said
    assert (one, first, two) == (1, {"a": 1.0}, 2)
    assert math.isnan(second["a"])
    assert table == ("table", "samples", [{"step": 2, "response": "of 2"}])
    resend(tmp_path / "empty", untold := Remembers())
    assert untold.said == []
