"""A sweep from its first trial to its table: frozen, resumed, interrupted. A stub stands in for the pipeline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_exp import compose
from rlhf_exp.errors import InputError, Interrupted
from rlhf_exp.paths import PACKAGE, conf_dir
from rlhf_exp.sweeps import __main__ as commands
from rlhf_exp.sweeps import folder, ledger, resume, run

WORDS = ("stage=ppo", "model=tiny", "tracking=none", "-m")
HERE = "hydra.sweep.dir=sweep"


def statuses(place="sweep"):
    return [state.status for state in ledger.states(Path(place)).values()]


def rows(place="sweep"):
    return json.loads((Path(place) / "table.json").read_text())


def test_every_trial_is_frozen_before_the_first_starts(call, pipeline):
    def look(config):
        place = Path("sweep")
        seen.append([(place / str(i) / "trial.yaml").is_file() for i in range(3)])
        return config.seed / 10

    seen = []
    pipeline.then = look
    code, out, err = call(*WORDS, "seed=4,5,6", HERE)
    assert (code, err, seen[0]) == (0, [], [True] * 3)
    assert [trial.number for _, _, trial in pipeline.calls] == [0, 1, 2]
    known = folder.read(Path("sweep"))
    assert (known["argv"], known["cwd"]) == ([*WORDS, "seed=4,5,6"], os.getcwd())
    assert (known["sweeper"], known["launcher"], known["mlflow_run_id"]) == ("basic", "basic", None)
    assert statuses() == ["done"] * 3
    assert [(row["overrides"], row["objective"]) for row in rows()] == [
        ({"seed": "4"}, 0.4),
        ({"seed": "5"}, 0.5),
        ({"seed": "6"}, 0.6),
    ]
    assert "| 1 | 5 | done | 0.5 | - | - | 0:0" in Path("sweep/table.md").read_text()
    assert "go on" not in out


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of the config tree in the place of ours."""
    copy = tmp_path / "checkout" / "conf"
    shutil.copytree(conf_dir(), copy)
    monkeypatch.setattr(compose, "conf_dir", lambda: copy)
    monkeypatch.setattr(run, "conf_dir", lambda: copy)
    return copy


def test_a_trial_that_was_cancelled_is_not_done(call, pipeline, capsys):
    """Its only trouble, and nothing waits: the code says so, that of the sweep and of its collection."""

    def then(config):
        if config.seed == 0:  # of another one, as a watcher of the queue enters it
            ledger.append(Path("sweep"), ledger.SUBMITTED, number=1, job="17_1")
            ledger.append(Path("sweep"), ledger.STARTED, number=1, job="17_1")
            fields = {"status": ledger.INTERRUPTED, "reason": "cancelled on n1", "lost": "CANCELLED"}
            ledger.append(Path("sweep"), ledger.ENDED, number=1, **fields)
        return 1.0

    pipeline.then = then
    assert call(*WORDS, "seed=0,1", HERE)[0] == 0, "it was run here then"
    ledger.append(Path("sweep"), ledger.ENDED, number=1, status=ledger.INTERRUPTED, lost="CANCELLED")
    assert commands.main(["collect", "sweep"]) == 1
    assert "1 of 2 trials are not done; go on: " in capsys.readouterr().out
    # while another one waits in the queue the sweep is not over, and the code is for later
    ledger.append(Path("sweep"), ledger.SUBMITTED, number=0, job="18_0")
    assert commands.main(["collect", "sweep"]) == 0
    assert "2 of 2 trials have not ended; see: python -m rlhf_exp.jobs status " in capsys.readouterr().out


@pytest.mark.parametrize("edit", ["values", "gone"])
def test_an_edit_of_conf_between_trials_changes_nothing(call, pipeline, conf, edit):
    """Not the trial's own config, nor that of its upstream stages, nor what a group chooses."""

    def change(config):
        upstream.append(compose.upstream("sft", config, pipeline.calls[-1][1])[0].train.steps)
        if edit == "gone":
            shutil.rmtree(conf, ignore_errors=True)
            return 1.0
        for name, key, value in (("ppo/default", "lam", 0.123), ("model/tiny", "notes", "edited")):
            path = conf / f"{name}.yaml"
            path.write_text(f"{path.read_text()}\n{key}: {value}\n")
        sft = conf / "stage/sft.yaml"
        sft.write_text(sft.read_text().replace("defaults:", "train: {steps: 777}\ndefaults:"))
        return 1.0

    upstream = []
    pipeline.then = change
    code, _, err = call(*WORDS, "seed=1,2", "ppo=default,instructgpt", HERE)
    assert (code, err) == (0, [])
    (first, *_), (_, *_), (third, *_), _ = pipeline.calls
    assert (third.seed, first.seed) == (2, 1)
    assert third.ppo == first.ppo
    assert third.model == first.model
    assert len(set(upstream)) == 1 and 777 not in upstream


def test_only_what_is_not_done_is_run_again(call, pipeline):
    def fail(config):
        if config.seed == 1:
            raise InputError("no data")
        if config.seed == 2:
            raise ZeroDivisionError("here\nand there")
        return 1.0

    pipeline.then = fail
    code, out, err = call(*WORDS, "seed=0,1,2,3", HERE)
    assert (code, statuses()) == (1, ["done", "failed", "failed", "done"])
    assert err[-2:] == [
        "error: trial 1 (stage=ppo model=tiny tracking=none seed=1): no data",
        "error: trial 2 (stage=ppo model=tiny tracking=none seed=2): ZeroDivisionError: here",
    ]
    assert "trial 1 (seed=1) failed: no data" in out
    assert (
        f"2 of 4 trials are not done; go on: python -m rlhf_exp.sweeps resume {Path('sweep').absolute()}"
        in out
    )
    pipeline.calls.clear()
    pipeline.then = lambda config: 2.0
    code, out, err = call(*WORDS, "seed=0,1,2,3", HERE)
    assert (code, err, statuses()) == (0, [], ["done"] * 4)
    assert [config.seed for config, *_ in pipeline.calls] == [1, 2]
    assert [row["objective"] for row in rows()] == [1.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (Interrupted("stopped by SIGTERM"), 75)]
)
def test_a_signal_ends_the_sweep_with_a_table_and_the_way_on(call, pipeline, error, code):
    def stop(config):
        if config.seed == 1:
            raise error
        return 1.0

    pipeline.then = stop
    done, out, err = call(*WORDS, "seed=0,1,2", HERE)
    assert (done, err) == (code, [])
    assert [row["status"] for row in rows()] == ["done", "interrupted", "waiting"]
    assert "2 of 3 trials are not done; go on: python -m rlhf_exp.sweeps resume" in out
    pipeline.then = lambda config: 1.0
    assert call(*WORDS, "seed=0,1,2", HERE)[0] == 0
    assert statuses() == ["done"] * 3
    assert [config.seed for config, *_ in pipeline.calls] == [0, 1, 1, 2]


def test_sigterm_between_trials(call, pipeline):
    """The handler is there for the whole sweep, not for a stage's steps alone."""
    import signal

    pipeline.then = lambda config: os.kill(os.getpid(), signal.SIGTERM)
    code = call(*WORDS, "seed=0,1", HERE)[0]
    assert (code, [row["status"] for row in rows()]) == (75, ["interrupted", "waiting"])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_trial_that_cannot_run_is_named_before_the_first_starts(call, pipeline):
    pipeline.then = lambda config: print("it runs") or 1.0
    code, out, err = call(*WORDS, "ppo.minibatches=1,5", "ppo.batch_size=32,40", HERE)
    reason = "ppo.minibatches must divide ppo.batch_size, got 5 and 32"
    assert out.index(f"trial 2 cannot run, the others will: {reason}") < out.index("it runs")
    assert (code, statuses()) == (2, ["done", "done", "failed", "done"])
    assert err == [
        "error: trial 2 (stage=ppo model=tiny tracking=none ppo.minibatches=5 ppo.batch_size=32): " + reason
    ]


def test_a_sweep_may_grow_and_is_not_replaced_by_another(call, pipeline):
    assert call(*WORDS, "seed=0,1", HERE)[0] == 0
    assert call(*WORDS, "seed=0,1,2", HERE)[0] == 0
    assert [config.seed for config, *_ in pipeline.calls] == [0, 1, 2]
    code, _, err = call(*WORDS, "seed=5,6", HERE)
    assert code == 2
    assert err == [
        f"error: {Path('sweep').absolute()} has another trial 0: stage=ppo model=tiny tracking=none seed=0, not "
        "stage=ppo model=tiny tracking=none seed=5; choose another hydra.sweep.dir"
    ]
    (Path("other") / "things").mkdir(parents=True)
    code, _, err = call(*WORDS, "seed=5,6", "hydra.sweep.dir=other")
    assert (code, len(err)) == (2, 1)
    assert "is no sweep, and not empty" in err[0]
    assert len(pipeline.calls) == 3


@pytest.mark.parametrize("word", ["resume=auto", "resume=never"])
def test_how_to_go_on_makes_no_other_trial(call, pipeline, word):
    assert call(*WORDS, "seed=0,1", HERE)[0] == 0
    code, _, err = call(*WORDS, "seed=0,1,2", HERE, word)
    assert (code, err, statuses()) == (0, [], ["done"] * 3)
    assert [config.seed for config, *_ in pipeline.calls] == [0, 1, 2]
    assert call(*WORDS, "seed=0,1,2", HERE)[0] == 0, "nor is it missed"


@pytest.mark.parametrize("torn", [False, True])
def test_a_trial_that_the_ledger_has_lost_is_entered_again(call, pipeline, torn):
    assert call(*WORDS, "seed=0,1", HERE)[0] == 0
    lines = Path("sweep/ledger.jsonl").read_text().splitlines()
    kept = [line for line in lines if '"trial"' not in line]
    Path("sweep/ledger.jsonl").write_text("\n".join([lines[0][:40], *kept] if torn else []) + "\n")
    assert call(*WORDS, "seed=0,1", HERE)[0] == 0
    assert [state.overrides[-1] for state in ledger.states(Path("sweep")).values()] == ["seed=0", "seed=1"]
    assert statuses() == ["done"] * 2
    assert len(pipeline.calls) == (2 if torn else 4)
    size = Path("sweep/ledger.jsonl").stat().st_size
    assert call(*WORDS, "seed=0,1", HERE)[0] == 0
    assert Path("sweep/ledger.jsonl").stat().st_size == size, "once"


def test_where_trials_are_is_not_for_users_to_say(call, pipeline):
    code, _, err = call(*WORDS, "seed=0,1", "hydra.sweep.subdir=x")
    assert (code, err) == (2, ["error: hydra.sweep.subdir: leave it out, the folders of trials are numbered"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ["hydra/launcher=local_pool", "hydra.launcher.workers=0"],
            "hydra.launcher.workers must be at least 1, got 0",
        ),
        (
            ["hydra/launcher=local_pool", "hydra.launcher.grace_seconds=-1"],
            "hydra.launcher.grace_seconds must be at least 0, got -1.0",
        ),
        (
            ["hydra/launcher=local_pool", "hydra.launcher.devices=[0,0]"],
            "hydra.launcher.devices: name each once, got 0, 0",
        ),
        (
            ["hydra/launcher=slurm", "hydra.launcher.nodes=0"],
            "hydra.launcher.nodes must be at least 1, got 0",
        ),
        (
            ["hydra/launcher=slurm", "hydra.launcher.time=1"],
            "hydra.launcher.time=1 is over before the job is asked to save, hydra.launcher.signal_delay_s=120 "
            "seconds before its end",
        ),
    ],
)
def test_a_launcher_is_asked_before_anything_is_made(call, pipeline, words, problem):
    for more in ((), ("dry_run=true",)):
        assert call(*WORDS, "seed=0,1", HERE, *words, *more)[::2] == (2, [f"error: {problem}"])
        assert os.listdir() == []


SECRET = "https://me:s3cret@mlflow.example.org"


@pytest.mark.parametrize("place", ["the command line", "a file"])
def test_no_file_has_the_password_of_a_tracking_server(call, pipeline, monkeypatch, tmp_path, place):
    """The trials have it from the environment, and so has a sweep that is resumed."""
    from rlhf_exp.schema import Tracking
    from rlhf_exp.tracking import tracking_uri

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://elsewhere.example.org")
    seen, words = [], [f"tracking.uri={SECRET}"]
    pipeline.then = lambda config: seen.append((config.tracking.uri, os.environ["MLFLOW_TRACKING_URI"]))
    if place == "a file":
        more = tmp_path / "more" / "experiment" / "ours.yaml"
        more.parent.mkdir(parents=True)
        text = f"# @package _global_\n# Ours.\ntracking: {{uri: '{SECRET}'}}\n"
        more.write_text(text)
        words = ["experiment=ours", "--config-dir", str(tmp_path / "more")]
    code, out, err = call(*WORDS, "seed=0,1", HERE, *words)
    assert (code, err) == (0, [])
    masked = "https://me:***@mlflow.example.org"
    assert seen == [(masked, SECRET)] * 2
    place = Path("sweep")
    files = [path for path in place.rglob("*") if path.is_file() and "code" not in path.parts]
    assert {path.name for path in files} >= {"sweep.json", "trial.yaml", "ledger.jsonl", "multirun.yaml"}
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
    assert "s3cret" not in out
    assert any(masked.encode() in path.read_bytes() for path in files)
    # to go on
    assert tracking_uri(Tracking(uri=masked), "out") == SECRET
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cret@elsewhere.example.org")
    with pytest.raises(
        InputError, match=r"tracking.uri=https://me:\*\*\*@mlflow.example.org: passwords are not kept"
    ):
        tracking_uri(Tracking(uri=masked), "out")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    assert call(*WORDS, "seed=0,1,2", HERE, *words)[0] == 0
    assert len(seen) == 3


def test_no_file_has_the_password_of_a_study(monkeypatch):
    """Of hydra.sweeper.storage: in the overrides that Hydra and optuna write down, and in the command."""
    pytest.importorskip("optuna")
    from rlhf_exp.store.frozen import with_password
    from rlhf_exp.sweeps import passwords, plan

    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///other.db")
    storage = "hydra.sweeper.storage=postgresql://me:s3cret@db.example.org/studies"
    given = ["stage=ppo", "hydra/sweeper=optuna", storage, "ppo.kl_coef=interval(0.1, 1)"]
    with compose.session():
        found, words = passwords.kept_out(plan.plan(given), given)
        masked = found.config.hydra.sweeper.storage
    assert masked == "postgresql://me:***@db.example.org/studies"
    assert "s3cret" not in " ".join([*found.overrides, *words])
    assert f"hydra.sweeper.storage='{masked}'" in found.overrides
    whole = with_password(masked, "hydra.sweeper.storage", passwords.STORAGE)
    assert whole == "postgresql://me:s3cret@db.example.org/studies"


def test_a_folder_with_blanks_and_quotes(call, pipeline):
    place = "a sweep, it's=[mine]"
    assert call(*WORDS, "seed=0,1", f'hydra.sweep.dir="{place}"')[0] == 0
    assert statuses(place) == ["done", "done"]


def test_the_options_of_another_folder_are_frozen_too(call, pipeline, tmp_path):
    more = tmp_path / "more" / "model" / "mine.yaml"
    more.parent.mkdir(parents=True)
    more.write_text("# My model.\nname: mine\nlora_targets: [q]\n")

    def change(config):
        sft = compose.upstream("sft", config, pipeline.calls[-1][1])[0]
        names.append((config.model.name, sft.model.name))
        more.unlink(missing_ok=True)
        return 1.0

    names = []
    pipeline.then = change
    words = (
        "stage=ppo",
        "model=mine,tiny",
        "tracking=none",
        "-m",
        "--config-dir",
        str(tmp_path / "more"),
        HERE,
    )
    code, _, err = call(*words)
    assert (code, err) == (0, [])
    assert names == [("mine", "mine"), ("tiny", "tiny")]


# ---------------------------------------------------------------- the frozen code


def test_a_process_on_the_frozen_code_sees_nothing_else(tmp_path):
    """Not even from within the checkout, where `python -m` looks first."""
    folder.create(tmp_path / "sweep", [], conf=conf_dir())
    code = tmp_path / "sweep" / "code"
    assert not list(code.rglob("__pycache__"))  # the checkout's own; a process may then write new ones
    script = "import rlhf_exp; from rlhf_exp.paths import *; print(rlhf_exp.__file__, conf_dir())"
    done = subprocess.run(
        [*folder.python(), "-c", script],
        env=folder.environment(tmp_path / "sweep"),
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(code / "rlhf_exp/__init__.py"), str(code / "conf")]
    assert (code / "rlhf_exp/data/reviews.jsonl").is_file()


def test_the_commit_is_known_to_the_frozen_code(tmp_path):
    from rlhf_exp.store.frozen import git_state

    folder.create(tmp_path / "sweep", [], conf=conf_dir())
    assert git_state(tmp_path / "sweep/code/rlhf_exp") == git_state(PACKAGE)


def test_a_sweep_of_a_process_goes_on_on_the_frozen_code(pipeline, monkeypatch, tmp_path):
    class Become(Exception):
        pass

    def execve(path, command, environment):
        became.append((path, command, environment))
        raise Become

    became = []
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["rlhf_exp", *WORDS, "seed=0,1", HERE, "-cd", str(tmp_path)])
    from rlhf_exp import cli

    assert cli.main() == 1  # Become is none of ours
    ((path, command, environment),) = became
    place = Path("sweep").absolute()
    words = [*WORDS, "seed=0,1", "-cd", str(place / "code/config_dir"), f"hydra.sweep.dir='{place}'"]
    assert command == [sys.executable, "-P", "-m", "rlhf_exp", *words]
    assert path == sys.executable
    assert environment["PYTHONPATH"].split(os.pathsep)[:2] == [
        str(place / "code"),
        str(place / "code/launchers"),
    ]
    assert not pipeline.calls


def test_the_short_command_goes_on(call, pipeline, monkeypatch, tmp_path):
    became = []
    monkeypatch.setattr(resume, "become", lambda path, argv: became.append((path, argv, os.getcwd())))
    pipeline.then = lambda config: 1 / config.seed
    call(*WORDS, "seed=0,1", HERE)
    place, here = Path("sweep").absolute(), os.getcwd()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert commands.main(["resume", str(place)]) == 0
    assert became == [(place, [*WORDS, "seed=0,1"], here)]
    marker = place / "code" / "rlhf_exp" / "marker"
    marker.touch()
    commands.main(["resume", str(place), "--new-code"])
    assert not marker.exists()


@pytest.mark.parametrize("verb", ["resume", "collect"])
def test_the_folder_in_which_a_sweep_was_started_is_gone(call, pipeline, capsys, verb):
    call(*WORDS, "seed=0,1", HERE)
    folder.update(Path("sweep"), cwd="/nowhere")
    assert commands.main([verb, "sweep"]) == 2
    assert capsys.readouterr().err == (
        f"error: {Path('sweep').absolute()} was started in /nowhere, which is gone: relative paths of its trials "
        "are from there\n"
    )


def test_trials_that_were_stopped_early_go_to_their_end_on_demand(call, pipeline, monkeypatch):
    from rlhf_exp.errors import Pruned

    def stop(config):
        if config.early_stop.rule == "median":
            raise Pruned("step 3: worse than the others")
        return 1.0

    pipeline.then = stop
    words = (*WORDS, "seed=0,1", "early_stop.rule=median", HERE)
    code, out, err = call(*words)
    assert (code, err, [row["status"] for row in rows()]) == (0, [], ["stopped", "stopped"])
    assert "trial 1 (seed=1) stopped: step 3: worse than the others" in out
    assert call(*words)[0] == 0
    assert len(pipeline.calls) == 2, "a resumed sweep leaves them alone"
    monkeypatch.setattr(resume, "become", lambda path, argv: None)
    commands.main(["resume", "sweep", "--stopped"])
    assert call(*words)[0] == 0
    assert statuses() == ["done", "done"]
    early = yaml.safe_load(Path("sweep/0/trial.yaml").read_text())["config"]["early_stop"]
    assert (early["rule"], early["guards"]) == ("none", False)


def test_show_and_a_folder_that_is_no_sweep(call, pipeline, capsys):
    call(*WORDS, "seed=0,1", HERE)
    assert commands.main(["show", "sweep"]) == 0
    assert "0.5" in capsys.readouterr().out
    assert commands.main(["show", "nowhere"]) == 2
    assert capsys.readouterr().err == (
        f"error: {Path('nowhere').absolute()} is no sweep's folder: it has no sweep.json; sweeps are in "
        "multirun/results\n"
    )
    for content, said in (('{"argv": []}', "has no cwd, created, version"), ("[]", "is no JSON object")):
        Path("sweep/sweep.json").write_text(content)
        assert commands.main(["show", "sweep"]) == 2
        file = Path("sweep/sweep.json").absolute()
        assert capsys.readouterr().err == f"error: {file} {said}: no sweep has written it\n"
