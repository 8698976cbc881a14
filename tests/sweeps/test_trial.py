"""A trial as a file: written once, run from it, heard of in the ledger. A stub stands in for the pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp import compose, schema
from rlhf_exp.errors import InputError, Interrupted, Pruned
from rlhf_exp.sweeps import current, ledger, pruning, trial
from tests.strategies.conftest import environments

WORDS = {
    stage: [f"stage={stage}", *(["model=tiny"] if stage != "report" else ["inputs=a"])]
    for stage in schema.RUNS
}


def written(number=0, *words):
    config, choices = compose.compose(["stage=ppo", "model=tiny", *words])
    return (
        trial.write(Path("sweep") / str(number), number, ["stage=ppo", *words], config, choices),
        config,
        choices,
    )


@pytest.mark.parametrize("stage", schema.RUNS)
def test_what_is_read_is_what_was_written(stage):
    config, choices = compose.compose(WORDS[stage])
    content = trial.read(trial.write(Path("sweep/0"), 0, WORDS[stage], config, choices))
    with compose.session():
        assert trial.config_of(content) == config
        composed = compose.load(WORDS[stage])
        again = trial.read(trial.write(Path("sweep/1"), 1, WORDS[stage], composed, choices))
    assert again["config"] == content["config"], "from OmegaConf as from the dataclass"
    assert content["choices"] == choices


def test_a_trial_runs_from_its_file(pipeline, capsys):
    folder, config, choices = written(3, "ppo.kl_coef=0.3", "upstream.sft={optim: {lr: 1e-5}}")
    outcome = trial.run(folder)
    ((given, chosen, where),) = pipeline.calls
    assert (given, chosen) == (config, choices)
    assert given.upstream.sft == {"optim": {"lr": 1e-5}}
    assert (where.folder, where.number, where.parent) == (folder.absolute(), 3, None)
    assert current.trial() is None
    assert (outcome.status, outcome.objective, outcome.value) == ("done", 0.5, 0.5)
    events = ledger.read(folder.parent)
    assert [e["event"] for e in events] == ["trial", "started", "ended"]
    assert (events[1]["pid"], events[1]["number"]) == (os.getpid(), 3)
    assert (events[2]["status"], events[2]["objective"]) == ("done", 0.5)
    assert "trial 3: stage=ppo ppo.kl_coef=0.3" in capsys.readouterr().out


def test_a_trial_that_is_done_is_not_run_again(pipeline, capsys):
    folder, *_ = written()
    trial.run(folder)
    assert trial.run(folder).value == 0.5
    assert len(pipeline.calls) == 1
    assert len(ledger.read(folder.parent)) == 3
    assert "trial 0: done before, not run again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "bad_input", "reason"),
    [
        (InputError(["no model", "no data"]), True, "no model; no data"),
        (ZeroDivisionError("here\nand there"), False, "ZeroDivisionError: here"),
    ],
)
def test_a_failure_is_an_outcome_and_the_next_attempt_may_work(pipeline, capsys, error, bad_input, reason):
    folder, *_ = written()

    def fail(config):
        raise error

    pipeline.then = fail
    outcome = trial.run(folder)
    assert (outcome.status, outcome.reason, outcome.bad_input, outcome.value) == (
        "failed",
        reason,
        bad_input,
        None,
    )
    assert outcome.error is error
    assert ledger.states(folder.parent)[0].reason == reason
    assert ("Traceback" in capsys.readouterr().err) is not bad_input
    pipeline.then = lambda config: 1.0
    assert trial.run(folder).status == "done"
    assert ledger.states(folder.parent)[0].attempts == 2


@pytest.mark.parametrize("error", [Interrupted("stopped by SIGTERM at step 3"), KeyboardInterrupt()])
def test_a_signal_goes_on_after_the_ledger_has_it(pipeline, error):
    folder, *_ = written()

    def stop(config):
        raise error

    pipeline.then = stop
    with pytest.raises(type(error)):
        trial.run(folder)
    state = ledger.states(folder.parent)[0]
    assert (state.status, state.reason) == ("interrupted", str(error) or "KeyboardInterrupt")
    assert not trial.is_running(folder)


def test_a_pruned_trial_is_stopped_and_settled(pipeline):
    folder, *_ = written()

    def stop(config):
        pruning.report_intermediate(1, 0.25)
        pruning.report_intermediate(2, float("nan"))
        raise Pruned(pruning.should_stop())

    pruning.prune(folder, "of an earlier attempt")
    pipeline.then = lambda config: (pruning.prune(folder, "worse than the others"), stop(config))
    outcome = trial.run(folder)
    assert (outcome.status, outcome.reason, outcome.value) == ("stopped", "worse than the others", None)
    assert ledger.states(folder.parent)[0].settled
    assert pruning.values(folder) == {1: 0.25}


def test_what_the_sweeper_asked_of_an_earlier_attempt_is_forgotten(pipeline):
    folder, *_ = written()
    pruning.prune(folder, "worse")
    pipeline.then = lambda config: 1.0 if pruning.should_stop() is None else 0.0
    assert trial.run(folder).value == 1.0


def test_another_trial_in_its_place_is_refused():
    folder, config, choices = written(0, "ppo.kl_coef=0.3")
    assert (
        trial.write(folder, 0, ["stage=ppo", "ppo.kl_coef=0.3", "hydra.verbose=true"], config, choices)
        == folder
    )
    with pytest.raises(
        InputError, match=r"has another trial 0: stage=ppo ppo.kl_coef=0.3, not stage=ppo; choose"
    ):
        trial.write(folder, 0, ["stage=ppo"], config, choices)
    assert len(ledger.read(folder.parent)) == 1


def test_two_processes_never_run_the_same_trial(pipeline):
    folder, *_ = written()
    inner = []
    pipeline.then = lambda config: inner.append((trial.is_running(folder), trial.run(folder).status)) or 1.0
    assert trial.run(folder).status == "done"
    assert inner == [(True, "running")]
    assert len(pipeline.calls) == 1


@pytest.mark.long
def test_all_ranks_pass_by_a_trial_that_another_process_runs():
    folder, *_ = written()
    command = [sys.executable, "-m", "rlhf_exp.jobs.child", str(folder.parent.absolute()), "0"]
    with trial._mine(folder) as mine:
        assert mine
        ranks = [
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            for environment in environments(2)
        ]
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0] == "trial 0: another process is running it\n"
    assert [event["event"] for event in ledger.read(folder.parent)] == ["trial"]


@pytest.mark.parametrize(
    ("then", "code"),
    [
        (lambda config: 1.0, 0),
        (lambda config: (_ for _ in ()).throw(Pruned("bad")), 0),
        (lambda config: (_ for _ in ()).throw(InputError("no data")), 2),
        (lambda config: 1 / 0, 1),
        (lambda config: (_ for _ in ()).throw(Interrupted("SIGTERM")), 75),
        (lambda config: (_ for _ in ()).throw(KeyboardInterrupt), 130),
    ],
)
def test_as_a_command(pipeline, then, code, tmp_path, monkeypatch):
    folder, *_ = written()
    pipeline.then = lambda config: (places.append(Path.cwd()), then(config))[1]
    places = []
    (tmp_path / "elsewhere").mkdir()
    place = folder.absolute()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trial.main([str(place)]) == code
    assert places == [tmp_path], "relative paths are from where the sweep was started"


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "16"}, "16"),
        # SLURM gives each task of an array a number of its own, which nobody has seen
        ({"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0"}, "17_0"),
    ],
)
def test_the_job_as_the_ledger_counts(pipeline, monkeypatch, variables, job):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    folder, *_ = written()
    trial.run(folder)
    assert ledger.read(folder.parent)[1]["job"] == ledger.states(folder.parent)[0].job == job


def test_a_folder_that_is_no_trial(tmp_path, capsys):
    assert trial.main([str(tmp_path)]) == 2
    assert trial.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path} is no trial's folder: it has no trial.yaml",
        "error: give one folder: python -m rlhf_exp.sweeps.trial FOLDER",
    ]
