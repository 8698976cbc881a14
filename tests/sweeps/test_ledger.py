"""The ledger: appended to by many processes, torn by crashes, read as states."""

from __future__ import annotations

import json
import multiprocessing

from rlhf_exp.sweeps import ledger

LONG = "x" * 3000  # more than a page's worth of lines together, as a reason may be


def _write(place, who, count):
    for i in range(count):
        ledger.append(place, "started", number=who, pid=i, host=LONG)


def test_what_is_appended_is_read_in_order(tmp_path):
    sweep = tmp_path / "not" / "there"
    assert ledger.read(sweep) == []
    ledger.append(sweep, "trial", number=0, overrides=["a=1"])
    ledger.append(sweep, "ended", number=0, status="done", objective=float("nan"), reason="名")
    first, second = ledger.read(sweep)
    assert (first["event"], first["number"], first["overrides"]) == ("trial", 0, ["a=1"])
    assert first["time"] < second["time"]
    assert (second["objective"], second["reason"]) == (None, "名")
    assert (sweep / "ledger.jsonl").read_text().count("\n") == 2


def test_many_processes_at_once(tmp_path):
    """8 x 25 lines, each whole and each there."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(tmp_path, who, 25)) for who in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]  # no line is torn
    assert sorted((e["number"], e["pid"]) for e in found) == [(who, i) for who in range(8) for i in range(25)]
    assert [e["pid"] for e in found if e["number"] == 3] == list(range(25))


def test_a_torn_line_is_skipped_and_harms_nobody(tmp_path):
    ledger.append(tmp_path, "trial", number=0)
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(
            '{"event": "ended", "number": 0, "reason": "é'.encode()[:-1]
        )  # cut in the middle of a letter
    assert [e["event"] for e in ledger.read(tmp_path)] == ["trial"]
    ledger.append(tmp_path, "trial", number=1)
    assert [e["number"] for e in ledger.read(tmp_path)] == [0, 1]


def test_states():
    events = [
        {"event": "trial", "number": 1, "overrides": ["a=2"]},
        {"event": "trial", "number": 0, "overrides": ["a=1"]},
        {"event": "submitted", "number": 0, "job": 17},
        {"event": "submitted", "number": 1, "job": "17_1"},
        {"event": "started", "number": 0, "host": "n1", "pid": 5, "job": "17_0"},
        {"event": "ended", "number": 0, "status": "interrupted", "reason": "SIGTERM", "seconds": 2.5},
        {"event": "started", "number": 0, "host": "n2", "pid": 6},
        {"event": "ended", "number": 0, "status": "done", "objective": 1.5, "seconds": 4},
        {"event": "something new", "number": 0},
        {"event": "no number"},
    ]
    found = ledger.fold(events)
    assert list(found) == [0, 1]
    zero, one = found.values()
    assert (zero.status, zero.attempts, zero.seconds, zero.overrides) == ("done", 2, 6.5, ["a=1"])
    assert (zero.host, zero.pid, zero.job, zero.end["objective"], zero.reason) == ("n2", 6, "17_0", 1.5, "")
    assert zero.settled
    assert (one.status, one.job, one.attempts, one.settled) == ("submitted", "17_1", 0, False)
    assert ledger.fold(events[:6])[0].reason == "SIGTERM"
    assert not ledger.fold(events[:6])[0].settled


def test_submitted_after_it_has_begun():
    """The array runs already while lines are written: what a trial has said of itself stays."""
    own = [
        {"event": "started", "number": 0, "host": "n1", "pid": 5, "job": "17_0"},
        {"event": "ended", "number": 0, "status": "done", "objective": 1.5, "seconds": 2},
        {"event": "started", "number": 1, "host": "n1", "pid": 6, "job": "17_1"},
        {"event": "ended", "number": 2, "status": "failed", "job": "17_2", "reason": "before it began"},
    ]
    late = [{"event": "submitted", "number": number, "job": f"17_{number}"} for number in range(4)]
    found = ledger.fold(own + late)
    assert [state.status for state in found.values()] == ["done", "running", "failed", "submitted"]
    assert [state.open for state in found.values()] == [False, True, False, True]
    assert (found[0].end["objective"], found[0].job, found[3].job) == (1.5, "17_0", "17_3")
    # of another job it is the next attempt
    again = ledger.fold([*own, *late, {"event": "submitted", "number": 0, "job": "20_0"}])
    assert (again[0].status, again[0].job, again[0].open) == ("submitted", "20_0", True)


def test_what_waits_or_runs_as_a_job():
    def state(*events):
        return ledger.fold({"number": 0, **event} for event in events)[0]

    submitted, started = {"event": "submitted", "job": "17_0"}, {"event": "started", "job": "17_0"}
    interrupted = {"event": "ended", "status": "interrupted"}
    assert state(submitted, started, interrupted).open, "it is put back into the queue"
    assert not state(submitted, started, {**interrupted, "lost": "CANCELLED"}).open
    assert not state(submitted, started, {"event": "ended", "status": "done"}).open
    assert not state(started, interrupted).open, "nobody submitted it"
    assert not state(submitted, started, interrupted, {"event": "started"}, interrupted).open, "here, later"


def test_many_events_are_one_write(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(ledger, "write_line", lambda path, line: lines.append(line))
    ledger.append_all(tmp_path, "submitted", [{"number": number} for number in range(3)])
    ledger.append_all(tmp_path, "submitted", [])
    (text,) = lines
    assert [json.loads(line)["number"] for line in text.split("\n")] == [0, 1, 2]
