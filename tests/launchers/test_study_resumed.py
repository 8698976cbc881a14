"""The study when its process ends early, and other studies in its place: nothing is lost, nothing comes twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.rlhf_optuna._outcome import Verdict
from optuna.trial import TrialState
from sqlalchemy.orm import Session

from rlhf_exp.errors import InputError
from rlhf_exp.sweeps import ledger
from rlhf_exp.sweeps import trial as trials
from tests.launchers.fakes import XY, Launcher, bowl, points, run, stored, sweeper


class Killed(BaseException):
    """The end of the process."""


@pytest.mark.parametrize("tenth", [0, 2, 4, 6, 8, 9])
def test_whenever_it_is_interrupted_it_goes_on_as_if_it_had_not(tmp_path, monkeypatch, tenth):
    """The process ends at one of its writes to the database, early or late."""
    settings = {"n_trials": 5, "n_jobs": 2, "sampler.seed": 11, "sampler.n_startup_trials": 2}
    commits, last = [], []
    original = Session.commit

    def commit(session):
        commits.append(session)
        if last and len(commits) > last[0]:
            raise Killed
        return original(session)

    launched = []
    with monkeypatch.context() as patch:
        patch.setattr(Session, "commit", commit)
        run(tmp_path / "whole", **settings)
        count = len(commits)
        assert count > 30, "each trial is several writes"
        commits.clear()
        last.append(count * tenth // 10)
        made = sweeper(tmp_path / "cut", bowl, **settings)
        with pytest.raises(Killed):
            made.sweep(list(XY))
        launched += made.launcher.launched
    launched += run(tmp_path / "cut", **settings).launcher.launched
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    numbers = [first + place for first, batch in launched for place in range(len(batch))]
    assert sorted(numbers) == [0, 1, 2, 3, 4], "each was launched once: the ledger knows the others"


def test_a_trial_without_a_result_is_launched_again_as_it_was(tmp_path):
    def dies(number, params, folder):
        if number == 2 and not (folder / "second").exists():
            (folder / "second").touch()
            raise Killed
        return bowl(number, params, folder)

    settings = {"n_trials": 6, "n_jobs": 4, "sampler.seed": 1}
    made = sweeper(tmp_path / "s", dies, **settings)
    with pytest.raises(Killed):
        made.sweep(list(XY))
    ((_, first),) = made.launcher.launched
    again = run(tmp_path / "s", dies, **settings).launcher.launched
    # 0 and 1 had their results in the ledger; 2 and 3 come again, with what fits into the batch
    assert again[0][0] == 2
    assert again[0][1][:2] == first[2:]
    assert [trial.state for trial in stored(tmp_path / "s")] == [TrialState.COMPLETE] * 6


def test_a_trial_that_another_process_still_runs_is_waited_for(tmp_path, monkeypatch):
    """A launcher that was killed has left it behind: that counts as no try, however long it takes."""
    from hydra_plugins.rlhf_optuna import sweeper as module

    class Elsewhere(Launcher):
        def launch(self, job_overrides, initial_job_idx):
            folder = self.sweep / str(initial_job_idx)
            if len(self.launched) == 5 or initial_job_idx:
                return super().launch(job_overrides, initial_job_idx)
            self.launched.append((initial_job_idx, []))
            folder.mkdir(exist_ok=True)
            if len(self.launched) == 1:
                ledger.append(self.sweep, ledger.STARTED, number=initial_job_idx)
                held.append(trials._mine(folder))
                assert held[0].__enter__()
            return [JobReturn(overrides=job_overrides[0], status=JobStatus.COMPLETED, _return_value=None)]

    held, waited = [], []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    made = sweeper(tmp_path / "s", bowl, n_trials=2)
    made.launcher = Elsewhere(bowl, tmp_path / "s")
    made.sweep(list(XY))
    held[0].__exit__(None, None, None)
    assert [trial.state for trial in stored(tmp_path / "s")] == [TrialState.COMPLETE] * 2
    assert waited == [module.ELSEWHERE] * 5


def test_what_was_told_before_stays(tmp_path):
    made = run(tmp_path / "s", n_trials=1)
    study, _ = made._study(tmp_path / "s", XY)
    (before,) = stored(tmp_path / "s")
    for verdict in (Verdict(TrialState.FAIL, reason="late"), Verdict(TrialState.COMPLETE, [7.0])):
        study.settle(study.trials()[0], verdict)
    assert stored(tmp_path / "s") == [before]


DRIVER = """
import sys, time
from pathlib import Path
from tests.launchers.fakes import XY, bowl, sweeper

def slow(number, params, folder):
    with open(folder.parent / "launched", "a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.05)
    return bowl(number, params, folder)

made = sweeper(Path(sys.argv[1]), slow, n_trials=12, n_jobs=3, **{"sampler.seed": 4, "sampler.n_startup_trials": 4})
made.sweep(list(XY))
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_sigkill_at_random_moments(tmp_path):
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'launchers'}"}

    def start(sweep):
        command = [sys.executable, "-c", DRIVER, str(sweep)]
        return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    draw, kills = random.Random(0), 0
    for _ in range(40):
        process = start(tmp_path / "cut")
        deadline = time.monotonic() + 30  # the interesting time begins when the study is opened
        while not (tmp_path / "cut").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        try:
            code = process.wait(draw.uniform(0, 2.5) if kills < 8 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert kills >= 3, "it must have been killed"
    assert points(tmp_path / "cut") == points(tmp_path / "whole")
    launched = [int(line) for line in (tmp_path / "cut" / "launched").read_text().split()]
    assert sorted(set(launched)) == list(range(12))
    ended = [e["number"] for e in ledger.read(tmp_path / "cut") if e["event"] == ledger.ENDED]
    assert sorted(ended) == list(range(12)), "none ran to its end twice"


# ---------------------------------------------------------------- shared studies, other studies


def test_two_sweeps_in_one_study(tmp_path):
    storage = f"sqlite:///{tmp_path / 'all.db'}"
    settings = {
        "storage": storage,
        "study_name": "all",
        "n_trials": 3,
        "sampler": "random",
        "sampler.seed": 1,
    }
    first, second = run(tmp_path / "a", **settings), run(tmp_path / "b", **settings)
    assert [n for n, _ in first.launcher.launched] == [n for n, _ in second.launcher.launched] == [0, 1, 2]
    trials = optuna.load_study(study_name="all", storage=storage).get_trials()
    assert [trial.number for trial in trials] == list(range(6))
    assert len({trial.params["x"] for trial in trials}) == 6
    assert not run(tmp_path / "a", **settings).launcher.launched, "it has its three"


def test_another_study_is_refused(tmp_path):
    run(tmp_path / "s", n_trials=1)
    with pytest.raises(
        InputError, match="has the objectives objective \\(maximize\\), not gold \\(maximize\\), kl"
    ):
        run(tmp_path / "s", n_trials=2, objectives=["gold", "kl"])
    run(tmp_path / "t", words=["x=choice(1,2)"], function=lambda n, p, f: {"objective": 1.0}, n_trials=1)
    with pytest.raises(InputError, match="another search space"):
        run(tmp_path / "t", words=["x=choice(1,3)"], n_trials=2)


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({}, ["stage=ppo"], "optuna has nothing to search over"),
        ({"objectives": ["gold", "kl"], "pruner": "median"}, XY, "prunes for one objective only"),
        (
            {"objectives": ["kl"], "pruner": "median"},
            XY,
            "running trials report their score: set early_stop.metric",
        ),
        ({"direction": "up"}, XY, "must be maximize or minimize, got up"),
        ({"direction": ["maximize", "minimize"]}, XY, "has 2, hydra.sweeper.objectives 1: one for each"),
        ({"objectives": ["kl", "kl"]}, XY, "name each once"),
        ({"sampler": "grid"}, XY, "x: a grid needs values"),
        ({"sampler._target_": "optuna.samplers.Best"}, XY, "there is no optuna.samplers.Best"),
        ({"sampler._target_": "pathlib.Path"}, XY, "pathlib.Path is no sampler of optuna's"),
        ({"pruner": "median", "pruner.n_startup_trials": -3}, XY, "hydra.sweeper.pruner: "),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path, settings, words, message):
    made = sweeper(tmp_path / "s", bowl, **settings)
    with pytest.raises(InputError) as error:
        made.sweep(list(words))
    assert any(message in problem for problem in error.value.problems), error.value.problems
    assert not made.launcher.launched


def test_a_direction_nobody_gave_is_that_of_the_metric(tmp_path):
    def loss(number, params, folder):
        return {"objective": 1.0, "metric": "train/loss"}

    run(tmp_path / "a", loss, n_trials=1, stage="sft")  # its stage reports a loss
    study = optuna.load_study(study_name="a", storage=f"sqlite:///{tmp_path / 'a' / 'study.db'}")
    assert study.direction.name == "MINIMIZE"
    with pytest.raises(InputError, match=r"report train/loss: set hydra\.sweeper\.direction=minimize"):
        run(tmp_path / "b", loss, n_trials=3, stage="dpo")
    run(tmp_path / "c", loss, n_trials=1, stage="dpo", direction="maximize")  # as they wish
