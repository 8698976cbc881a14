from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console

from rlhf_exp.progress import Progress, duration

SHOW = (
    ("objective/reward", "reward", ".2f"),
    ("objective/kl", "kl", ".2f"),
    ("length", "len", ".1f"),
    ("rate", "tok/s", ",.0f"),
)
VALUES = {"objective/reward": 0.417, "objective/kl": 12.3456, "length": 14.04, "rate": 12345.6, "other": 1}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(total: int, show=SHOW, stage: str = "ppo") -> tuple[Progress, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return Progress(stage, total, show, clock=clock, lines=out), out, clock


def test_a_plain_line_names_stage_step_figures_elapsed_and_eta() -> None:
    progress, out, clock = plain(100)
    with progress:
        clock.now += 65
        progress.update(1, VALUES)
    first = out.getvalue().splitlines()[0]
    assert first == "ppo   1/100  reward 0.42  kl 12.35  len 14.0  tok/s 12,346  1:05  eta 1:47:15"


def test_plain_lines_come_first_last_and_every_ten_seconds() -> None:
    progress, out, clock = plain(100, ())
    with progress:
        for step in range(1, 101):
            clock.now += 1
            progress.update(step, {})
    steps = [int(re.match(r"ppo +(\d+)/100", line)[1]) for line in out.getvalue().splitlines()]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert out.getvalue().splitlines()[-1] == "ppo 100/100  1:40  done"


def test_what_has_finished_says_nothing_more() -> None:
    progress, out, clock = plain(3, ())
    with pytest.raises(RuntimeError), progress:
        for step in (1, 2, 3):
            clock.now += 1
            progress.update(step, {})
        progress.finish()
        clock.now += 60
        raise RuntimeError
    assert out.getvalue().splitlines() == ["ppo 1/3  0:01  eta 0:02", "ppo 3/3  0:03  done"]


def test_a_bar_that_has_finished_is_off_the_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Progress("reward", 1, console=console) as progress:
        progress.update(1, {})
        assert "\x1b[?25h" not in console.file.getvalue()
        progress.finish()
        assert "\x1b[?25h" in console.file.getvalue()  # the cursor is back
        drawn = console.file.getvalue()
    assert console.file.getvalue() == drawn


def test_an_early_end_prints_where_it_ended() -> None:
    progress, out, clock = plain(100, ())
    with progress:
        for step in (1, 2, 3):
            clock.now += 1
            progress.update(step, {})
    assert out.getvalue().splitlines()[-1] == "ppo   3/100  0:03  ended"

    progress, out, clock = plain(100, ())
    with pytest.raises(KeyboardInterrupt), progress:
        progress.update(1, {})
        raise KeyboardInterrupt
    assert out.getvalue().splitlines()[-1] == "ppo   1/100  0:00  stopped"


def test_nothing_happened_nothing_printed() -> None:
    progress, out, _ = plain(0, ())
    with progress:
        pass
    assert out.getvalue() == ""


def test_the_last_line_is_not_printed_twice() -> None:
    progress, out, _ = plain(1, ())
    with progress:
        progress.update(1, {})
    assert out.getvalue() == "ppo 1/1  0:00  done\n"


def test_figures_that_are_odd_or_missing() -> None:
    show = (("a", "a", "d"), ("b", "b", ".2f"), ("c", "c", ".2f"), ("d", "d", ".1e"), ("e", "e", ".2f"))
    progress, out, clock = plain(3, show)
    with progress:
        progress.update(1, {"a": 3.0, "b": math.nan, "c": -math.inf, "d": "text"})
        clock.now += 20
        progress.update(2, {"b": 1.0})
    first, second = out.getvalue().splitlines()[:2]
    assert first.startswith("ppo 1/3  a 3  b nan  c -inf  d text  0:00")
    assert second.startswith("ppo 2/3  a 3  b 1.00  c -inf  d text  0:20")


def test_eta_is_by_the_recent_pace_also_after_a_resume() -> None:
    progress, out, clock = plain(1000, ())
    with progress:
        clock.now += 50
        progress.update(501, {})  # the first step here took 50 s: compilation and the like
        for step in range(502, 601):
            clock.now += 2
            progress.update(step, {})
        clock.now += 10
        progress._print_line()
    assert "eta 13:10" in out.getvalue().splitlines()[-2]  # 400 steps of 2 s, 10 s of them gone


def test_the_first_eta_of_a_resumed_run_counts_one_step() -> None:
    progress, out, clock = plain(1000, ())
    with progress:
        clock.now += 10
        progress.update(501, {})
    assert out.getvalue().splitlines()[0] == "ppo  501/1000  0:10  eta 1:23:10"  # 499 steps of 10 s


def test_duration() -> None:
    assert [duration(s) for s in (0, 7.4, 59.6, 3671, 360000, math.nan, -3)] == [
        *("0:00", "0:07", "1:00", "1:01:11", "100:00:00", "-:--", "0:00"),
    ]


def test_notes_in_plain_mode() -> None:
    progress, out, _ = plain(2, ())
    with progress:
        progress.note("saved [adapter] 3 MB")
    assert out.getvalue() == "saved [adapter] 3 MB\n"


def on_screen(width: int, ascii_only: bool = False, steps: int = 12, total: int = 25) -> tuple[str, Console]:
    """The line as drawn on a screen of that width."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii") if ascii_only else io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    clock = Clock()
    progress = Progress("reward", total, SHOW, clock=clock, console=console)
    for step in range(1, steps + 1):
        clock.now += 1
        progress.update(step, VALUES)
    with console.capture() as capture:
        console.print(progress)
    return capture.get(), console


@pytest.mark.parametrize("width", [200, 120, 100, 80, 72, 60, 50, 40, 30, 20, 12, 5, 2, 1])
def test_the_line_never_wraps(width: int) -> None:
    line, _ = on_screen(width)
    assert "\n" not in line.rstrip("\n")
    assert len(line.rstrip("\n")) <= max(width - 1, 1)


def test_what_is_shown_at_each_width() -> None:
    full = "reward 12/25  {bar}  reward 0.42  kl 12.35  len 14.0  tok/s 12,346  0:12  eta 0:13"
    assert on_screen(120)[0].strip() == full.format(bar="━" * 11 + "╸" + "─" * 12)
    assert on_screen(100)[0].strip() == full.format(bar="━" * 7 + "╸" + "─" * 8)
    expected = "reward 12/25  reward 0.42  kl 12.35  len 14.0  0:12  eta 0:13"
    assert on_screen(len(expected) + 1)[0].strip() == expected
    assert on_screen(60)[0].strip() == "reward 12/25  reward 0.42  kl 12.35  0:12  eta 0:13"
    assert on_screen(30)[0].strip() == "reward 12/25  0:12  eta 0:13"
    assert on_screen(20)[0].strip() == "reward 12/25"


def test_a_terminal_without_unicode() -> None:
    line, _ = on_screen(100, ascii_only=True)
    assert "###" in line and "---" in line and line.isascii()


def test_a_finished_bar_is_full_and_an_overrun_no_longer() -> None:
    assert "━" * 24 + "  reward" in on_screen(120, steps=25)[0] and "done" in on_screen(120, steps=25)[0]
    assert "━" * 24 + "  reward" in on_screen(120, steps=30)[0]
    assert "━" * 24 + "  reward" in on_screen(120, total=0)[0]


PTY = """
import sys
from rlhf_exp.progress import Progress
for stage in ("sft", "ppo"):
    with Progress(stage, 3, (("loss", "loss", ".2f"),)) as progress:
        for step in (1, 2, 3):
            progress.update(step, {"loss": step})
            if step == 2:
                progress.note("a note in " + stage)
                print("a print in", stage)
                print("a warning in", stage, file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_two_bars_on_a_real_terminal() -> None:
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 60, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", PTY], stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    data, start = b"", time.monotonic()
    while time.monotonic() - start < 60:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the process has ended
            break
        if not piece:
            break
        data += piece
    os.close(leader)
    assert process.wait(timeout=30) == 0
    # what stays on the screen: a line is erased (ESC [ 2 K) and drawn again until it is left with a newline
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-JL-Zl-m]", "", data.decode())
    kept = [line.split("\x1b[2K")[-1].replace("\r", "").strip() for line in text.split("\n")]
    kept = [line for line in kept if line]
    assert [line for line in kept if line.startswith("a ")] == [
        f"a {kind} in {stage}" for stage in ("sft", "ppo") for kind in ("note", "print", "warning")
    ]
    for stage in ("sft", "ppo"):
        assert any(re.fullmatch(rf"{stage} 3/3  ━+  loss 3.00  0:0\d  done", line) for line in kept), kept
    assert all(len(line) < 60 for line in kept)


def test_a_pipe_gets_lines_and_no_control_characters() -> None:
    done = subprocess.run([sys.executable, "-c", PTY], capture_output=True, text=True, check=True, timeout=60)
    assert "\x1b" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sft 1/3  loss 1.00") and lines[-1].startswith("ppo 3/3  loss 3.00")
    assert "a note in ppo" in lines
