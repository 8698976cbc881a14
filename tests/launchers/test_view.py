"""What is shown of running trials, and what is said of lost ones."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace

import pytest
from hydra_plugins.rlhf_local_pool import _lost, _view
from hydra_plugins.rlhf_local_pool._share import Share
from hydra_plugins.rlhf_local_pool._view import View
from rich.console import Console


def running(number, log, began=0.0):
    job = SimpleNamespace(number=number, overrides=["stage=ppo", f"a={number}"], varying=f"a={number}")
    return SimpleNamespace(job=job, share=Share(("1",), 2), log=log, began=began)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("", ""),
        ("base = tiny\n", "base = tiny"),
        ("sft  1/3  loss 2.1  0:01  eta 0:02\nwarning: x\n", "sft  1/3  loss 2.1  0:01  eta 0:02"),
        (
            "ppo  1/40  score 0.1  0:01\nppo 12/40  score 0.5  0:09  eta 0:20\n",
            "ppo 12/40  score 0.5  0:09  eta 0:20",
        ),
    ],
)
def test_what_a_trial_does_is_read_off_its_log(tmp_path, log, said):
    path = tmp_path / "log.txt"
    path.write_text(log)
    assert _view.doing(path) == said
    assert _view.doing(tmp_path / "none") == ""


def test_plain_lines(tmp_path, capsys):
    now = [0.0]
    log = tmp_path / "log.txt"
    log.write_text("ppo  1/40  score 0.1  0:01  eta 0:40\n")
    with View(2, clock=lambda: now[0]) as view:
        view.started(running(0, log))
        for now[0] in (1.0, 59.0, 61.0, 100.0):
            view.update([running(0, log)])
        view.ended(0, "done", ": objective 0.5", failed=False)
    assert capsys.readouterr().out.splitlines() == [
        f"trial 0: a=0 (cuda:1, 2 threads; log: {os.path.relpath(log)})",
        "trial 0: ppo  1/40  score 0.1  0:01  eta 0:40",  # once a minute
        "trial 0: done: objective 0.5 (1 of 2)",
    ]


def test_a_line_for_each_running_trial_on_a_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system=None)
    log = tmp_path / "log.txt"
    log.write_text("ppo 12/40  score 0.5  kl 0.1  0:09  eta 0:20\n")
    view = View(5, console=console, clock=lambda: 75.0)
    view._ended, view._failed = 2, 1
    view._running = [running(0, log), running(3, tmp_path / "none")]
    console.print(view)
    assert out.getvalue().splitlines() == [
        "2 of 5 trials ended, 1 failed, 1 waiting",
        "#0 1:15 a=0  ppo 12/40  score 0.5  kl 0.1  0:09  eta 0:20"[:60],
        "#3 1:15 a=3  starting",
    ]


def test_the_kernels_count_of_kills_for_memory(tmp_path):
    (tmp_path / "vmstat").write_text("pgfault 12\noom_kill 3\npgmajfault 1\n")
    assert _lost.oom_kills(tmp_path / "vmstat") == 3
    assert _lost.oom_kills(tmp_path / "none") == 0
