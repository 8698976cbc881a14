"""Tables, pages and estimates from folders made by hand."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.sweeps import estimate, ledger, page, table

DONE = {"status": "done", "objective": 0.25, "metric": "objective/scores", "kl": 1.5, "gold": None}


@pytest.fixture
def sweep(tmp_path):
    """Three trials: done, failed after two attempts, and one whose process was killed."""
    place = tmp_path / "sweep"
    for number, kl in enumerate(("0.1", "0.2", "0.3")):
        ledger.append(place, "trial", number=number, overrides=["stage=ppo", f"++ppo.kl_coef={kl}"])
    ledger.append(place, "ended", number=0, seconds=61.0, **DONE)
    ledger.append(place, "ended", number=1, status="interrupted", reason="SIGTERM", seconds=2.0)
    ledger.append(place, "ended", number=1, status="failed", reason="no | data", seconds=3.0, bad_input=True)
    ledger.append(place, "started", number=2, host=socket.gethostname(), pid=os.getpid())
    known = {
        "argv": ["stage=ppo", "sweep=kl", "upstream.sft={seed: 0}"],
        "cwd": str(tmp_path),
        "created": "2026-01-31T12:00:00",
        "version": "1",
        "commit": "c" * 40,
    }
    (place / "sweep.json").write_text(json.dumps(known))
    return place


def test_rows(sweep):
    done, failed, gone = table.rows(sweep)
    assert (done["overrides"], done["status"], done["objective"], done["seconds"]) == (
        {"ppo.kl_coef": "0.1"},
        "done",
        0.25,
        61.0,
    )
    assert (failed["status"], failed["seconds"], failed["bad_input"]) == ("failed", 5.0, True)
    assert (gone["status"], gone["reason"]) == ("interrupted", "its process is gone")
    assert table.problems([done, failed, gone]) == [
        "trial 1 (ppo.kl_coef=0.2) failed: no | data",
        "trial 2 (ppo.kl_coef=0.3) interrupted: its process is gone",
    ]


def test_markdown(sweep):
    assert table.markdown(table.rows(sweep)) == (
        "| trial | ppo.kl_coef | status | objective/scores | gold | KL | time |\n"
        "|---|---|---|---|---|---|---|\n"
        "| 0 | 0.1 | done | 0.25 | - | 1.5 | 1:01 |\n"
        "| 1 | 0.2 | failed | - | - | - | 0:05 |\n"
        "| 2 | 0.3 | interrupted | - | - | - | - |\n"
        "\n"
        "- trial 1 (ppo.kl_coef=0.2) failed: no | data\n"
        "- trial 2 (ppo.kl_coef=0.3) interrupted: its process is gone\n"
    )


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["0.05085250751312762", "0.02906119971275205"], ["0.05085", "0.02906"]),
        (["5.363012215224091e-05", "1e-3", "0.1"], ["5.363e-05", "1e-3", "0.1"]),
        (["0.123451", "0.123459", "0.1"], ["0.123451", "0.123459", "0.1"]),  # four digits would make them one
        (["0.12345678901", "0.12345678999"], ["0.123456789", "0.12345679"]),
        (["123456789012", "7"], ["123456789012", "7"]),  # a seed
        (["python:scores.a_long_name", "length", "-"], ["python:scores.a_long_name", "length", "-"]),
    ],
)
def test_numbers_are_rounded_and_never_made_equal(values, shown):
    assert table.shortened(values) == shown


def test_a_narrow_terminal_breaks_no_number(tmp_path):
    from io import StringIO

    from rich.console import Console

    for number, coef in enumerate(("0.05085250751312762", "0.02906119971275205")):
        lines = [f"ppo.kl_coef={coef}", f"reward_source.function=python:scores.a_very_long_name_{number}"]
        ledger.append(tmp_path, "trial", number=number, overrides=lines)
        ledger.append(tmp_path, "ended", number=number, seconds=61.0, **DONE | {"objective": -0.123456789})
    console = Console(file=StringIO(), width=64)
    console.print(table.terminal(table.rows(tmp_path)))
    shown = console.file.getvalue()
    assert all(shown.count(whole) == 1 for whole in ("0.05085", "0.02906"))
    assert shown.count("-0.1235") == shown.count("1:01") == 2
    assert max(map(len, shown.splitlines())) <= 64
    console = Console(file=StringIO(), width=40)
    console.print(table.terminal(table.rows(tmp_path)))
    assert "0.05085" in console.file.getvalue() or "…" in console.file.getvalue()
    assert "| 0.05085 |" in table.markdown(table.rows(tmp_path))


def test_a_page_keeps_its_own_text_and_has_the_table_and_a_picture(sweep, tmp_path):
    place = tmp_path / "kl.md"
    place.write_text(f"# Mine\n\n{page.BEGIN}\nearlier text\n{page.END}\n\nafter\n")
    for _ in range(2):  # the second time over the first
        page.write(sweep, place)
    text = place.read_text()
    assert text.startswith(
        f"# Mine\n\n{page.BEGIN}\nRun on 2026-01-31 (version 1, commit cccccccccc): 3 trials, "
    )
    assert text.endswith(f"![kl](images/kl.png)\n{page.END}\n\nafter\n")
    assert text.count("| 0 | 0.1 | done |") == 1 and "earlier text" not in text
    assert "python -m rlhf_exp stage=ppo sweep=kl 'upstream.sft={seed: 0}'" in text
    assert (tmp_path / "images" / "kl.png").read_bytes()[:4] == b"\x89PNG"


def test_a_page_without_marks_is_left_alone(sweep, tmp_path):
    place = tmp_path / "kl.md"
    place.write_text("# Mine\n")
    with pytest.raises(InputError, match=r"kl\.md needs one line <!-- results -->"):
        page.write(sweep, place)
    assert place.read_text() == "# Mine\n"


# ---------------------------------------------------------------- estimates


def entry(seconds: float, lines: list[dict]) -> SimpleNamespace:
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(record={"seconds": seconds}, path=folder, name="ppo/0123")


def test_what_a_finished_run_took():
    """ppo: the median of rollout + score + update is 3, their sum 15; 20 - 15 are beside the steps."""
    steps = [
        {"step": i, "time/rollout": 1.0, "time/score": 0.5, "time/update": u}
        for i, u in enumerate((1.5, 7.5, 1.5))
    ]
    assert estimate.measure(entry(20.0, steps)) == estimate.Measured("ppo/0123", 3.0, 5.0, ())
    sft = [{"step": i, "train/loss": 1.0} for i in (1, 2, 3, 4)]
    assert estimate.measure(entry(20.0, sft))[1:3] == (5.0, 0.0)
    assert estimate.measure(entry(20.0, [{"step": 1, "kl": 1.0}]))[1:3] == (None, 20.0)
    assert estimate.measure(entry(0.0, sft)) is None


def test_what_a_stage_will_take():
    ppo = SimpleNamespace(config=SimpleNamespace(ppo=SimpleNamespace(steps=10)))
    assert estimate.seconds_of(ppo, estimate.Measured("a", 3.0, 5.0, ())) == 35.0
    assert estimate.seconds_of(ppo, estimate.Measured("a", None, 7.0, ())) == 7.0
    assert estimate.seconds_of(ppo, None) is None


def test_the_sum_says_what_is_unknown():
    def build(stage: str, seconds: float | None, cached: bool = False) -> estimate.Build:
        measured = None if seconds is None else estimate.Measured("ppo/0123", 2.0, 1.0, ("ppo.batch_size",))
        node = SimpleNamespace(name=stage, stage=stage, key="a" * 64, folder=Path() if cached else None)
        return estimate.Build(node, [0], seconds, measured)

    assert estimate.total([build("ppo", None, cached=True)]) == "nothing has to be trained"
    assert estimate.total([build("sft", None)]) == "1 of them unknown: no finished run of sft with this model"
    said = estimate.total([build("sft", None), build("ppo", 1800.0), build("ppo", 1800.0)])
    assert said.splitlines() == [
        "to build: 3 runs, one after the other 1:00:00 (1 hours); 1 of them unknown: no finished run of sft "
        "with this model",
        "  measured: ppo/0123, 2 s a step, 1 s beside; other ppo.batch_size",
    ]
    assert estimate.line(build("ppo", 61.0)) == "ppo aaaaaa (1:01)"
    assert estimate.largest([build("ppo", 1.0)]) == ""  # the model's sizes are not known
    most = [build("sft", 1.0), build("ppo", 1.0), build("reward", 1.0, cached=True)]
    for one, need in zip(most, (2.5e9, 1e9, 9e9), strict=True):
        one.peak = ("backward", need)
    assert estimate.largest(most).startswith("memory: at most 2.50 GB, in backward of sft aaaaaa; ")
    assert estimate.line(build("ppo", None, cached=True)) == "ppo aaaaaa (cached)"
