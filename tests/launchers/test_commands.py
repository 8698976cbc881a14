"""hydra/sweeper=optuna and hydra/launcher=local_pool by the command line; stubs stand in for what trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from rlhf_exp import cli, stages
from rlhf_exp.sweeps import ledger, pruning, trial

ROOT = Path(__file__).resolve().parents[2]
COEF = "ppo.kl_coef=tag(log, interval(1e-3, 1))"
# a trial's process: reads what it was given, and writes the ledger as rlhf_exp.sweeps.trial does
CHILD = """
import os, signal, sys
from pathlib import Path
import yaml
from rlhf_exp.sweeps import ledger
folder = Path(sys.argv[2])
content = yaml.safe_load((folder / "trial.yaml").read_text())
number, config = content["number"], content["config"]
ledger.append(folder.parent, "started", number=number)
with open(folder / "environ", "w") as file:
    file.write(os.environ["OMP_NUM_THREADS"])
if config["seed"] == 13:
    os.kill(os.getpid(), signal.SIGKILL)
ledger.append(folder.parent, "ended", number=number, status="done", objective=float(config["seed"]), kl=2.0)
"""


@pytest.fixture
def pipeline(monkeypatch):
    """Trials of this process: the score is best at kl_coef = .05."""
    stub = types.ModuleType("rlhf_exp.stages.pipeline")
    stub.calls, stub.OBJECTIVES = [], ()

    def run(config, choices):
        stub.calls.append(config)
        return 1.0 - abs(config.ppo.kl_coef - 0.05)

    stub.run = run
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(stages, "pipeline", stub, raising=False)
    return stub


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Trials of other processes."""
    from hydra_plugins.rlhf_local_pool import _pool

    stub = tmp_path / "child.py"
    stub.write_text(CHILD)
    monkeypatch.setattr(_pool, "_script", lambda sweep: stub)


@pytest.fixture
def run(capsys):
    """Run the command line in this process: (exit code, lines of stdout, of stderr)."""

    def call(*words):
        code = cli.main(["stage=ppo", "tracking=none", "hydra.sweep.dir=sweep", *words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


def stored():
    return optuna.load_study(
        study_name="sweep", storage=f"sqlite:///{Path('sweep').absolute()}/study.db"
    ).trials


# ---------------------------------------------------------------- optuna


OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=1")


def test_a_search_needs_no_flag(run, pipeline):
    code, out, err = run(*OPTUNA, COEF, "ppo.lam=0.9,0.95", "seed=3", "hydra.sweeper.n_trials=4")
    assert (code, err) == (0, [])
    trials = stored()
    assert [(c.ppo.kl_coef, c.ppo.lam) for c in pipeline.calls] == [
        (t.params["ppo.kl_coef"], t.params["ppo.lam"]) for t in trials
    ]
    assert {c.seed for c in pipeline.calls} == {3}
    assert all(1e-3 <= c.ppo.kl_coef <= 1 for c in pipeline.calls)
    assert [t.value for t in trials] == [1.0 - abs(t.params["ppo.kl_coef"] - 0.05) for t in trials]
    best = max(trials, key=lambda t: t.value)
    found = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    assert (found["best_params"], found["best_trial"]) == (best.params, best.number)
    assert any(
        re.fullmatch(r"4 trials \(4 complete\); objective maximized; the best 4:", line) for line in out
    )


def test_the_same_command_goes_on(run, pipeline):
    words = (*OPTUNA, COEF)
    run(*words, "hydra.sweeper.n_trials=2")
    code, out, _ = run(*words, "hydra.sweeper.n_trials=3")
    assert code == 0
    assert len(pipeline.calls) == len(stored()) == 3
    assert any("3 trials, 2 of them there already" in line for line in out)


FIRST = """
import sys, time, types
from pathlib import Path
from rlhf_exp import cli, stages

stub = types.ModuleType("rlhf_exp.stages.pipeline")
def run(config, choices):
    while not Path("go").exists():
        time.sleep(0.05)
    return config.ppo.kl_coef
stub.run = run
sys.modules[stub.__name__] = stages.pipeline = stub
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_same_command_twice_at_once(run, pipeline, tmp_path):
    """The second one is refused in a line, and does no harm to the first one's trials."""
    words = (*OPTUNA, COEF, "hydra.sweeper.n_trials=2")
    command = [sys.executable, "-c", FIRST, "stage=ppo", "tracking=none", "hydra.sweep.dir=sweep", *words]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'launchers'}"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not any(e["event"] == "started" for e in ledger.read(Path("sweep"))):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = Path("sweep/ledger.jsonl").read_bytes()
        code, _, err = run(*words)
        assert code == 2
        assert err == [
            f"error: another process runs this search: {tmp_path / 'sweep'}; wait for it, or choose another "
            "hydra.sweep.dir"
        ]
        assert Path("sweep/ledger.jsonl").read_bytes() == before and not pipeline.calls
        Path("go").touch()
        _, said = first.communicate(timeout=90)
    finally:
        first.kill()
    assert (first.returncode, said) == (0, "")
    assert [trial.state for trial in stored()] == [TrialState.COMPLETE] * 2
    assert run(*words)[0] == 0, "it is free again"


def test_a_recipe_is_the_search_space(run, pipeline):
    assert run(*OPTUNA, "sweep=kl", "hydra.sweeper.n_trials=3")[0] == 0
    values = (ROOT / "conf/sweep/kl.yaml").read_text().partition("ppo.kl_coef: ")[2].split("\n")[0]
    assert {c.ppo.kl_coef for c in pipeline.calls} <= {float(v) for v in values.split("#")[0].split(",")}


def test_a_search_over_stages(run, pipeline):
    pipeline.run = lambda config, choices: pipeline.calls.append(config) or 1.0
    words = (
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=grid",
        "stage=sft,ppo",
        "optim.lr=1e-3",
        "seed=range(0,2)",
    )
    assert cli.main(["tracking=none", "hydra.sweep.dir=sweep", *words]) == 0
    assert sorted((c.stage, c.seed, c.optim.lr) for c in pipeline.calls) == [
        *(("ppo", 0, 1e-3), ("ppo", 1, 1e-3)),
        *(("sft", 0, 1e-3), ("sft", 1, 1e-3)),
    ]


def test_a_trial_of_this_process_is_pruned_while_it_runs(run, pipeline):
    def reports(config, choices):
        from rlhf_exp.errors import Pruned

        number = len(pipeline.calls)
        pipeline.calls.append(config)
        for step in range(4):
            pruning.report_intermediate(step, 1.0 if number < 2 else -1.0)
        for _ in range(2000 if number >= 2 else 0):  # as long as it takes
            if reason := pruning.should_stop():
                raise Pruned(reason)
            import time

            time.sleep(0.01)
        return 1.0

    pipeline.run = reports
    words = (
        "hydra/sweeper/pruner=median",
        "hydra.sweeper.pruner.n_startup_trials=2",
        "hydra.sweeper.poll_seconds=.02",
    )
    code, out, _ = run(*OPTUNA, COEF, "hydra.sweeper.n_trials=3", *words)
    assert code == 0
    assert [t.state for t in stored()] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    state = ledger.states(Path("sweep"))[2]
    assert (state.status, state.reason) == (ledger.STOPPED, "pruned at step 0: -1 (Median)")
    assert any("2 complete, 1 stopped early" in line for line in out)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["ppo.kl_coef=interval(-1, 1)"], "ppo.kl_coef must be at least 0, got -1.0"),
        (["seed=interval(0, 1)"], "seed must be a whole number, got 0.0"),
        (["ppo.kl_coeff=interval(0, 1)"], "unknown key ppo.kl_coeff; did you mean ppo.kl_coef?"),
        (["seed=3"], "optuna has nothing to search over"),
        ([COEF, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials must be at least 1, got 0"),
        ([COEF, "hydra.sweeper.poll_seconds=-1"], "hydra.sweeper.poll_seconds must be above 0, got -1.0"),
        ([COEF, "hydra.sweeper.poll_seconds=0"], "hydra.sweeper.poll_seconds must be above 0, got 0.0"),
        ([COEF, "hydra/sweeper/sampler=best"], "best"),
        (
            [COEF, "hydra.sweeper.objectives=[gold,kl]", "hydra/sweeper/pruner=median"],
            "prunes for one objective only",
        ),
    ],
)
def test_what_is_wrong_is_said_first(run, pipeline, words, problem):
    code, _, err = run(*OPTUNA, *words)
    assert code == 2
    assert any(problem in line for line in err), err
    assert all(line.startswith("error: ") for line in err)
    assert not pipeline.calls
    assert os.listdir() == [], "nothing is made"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:s3cret@nohost/db", "postgresql://me:***@nohost/db cannot be opened: "),
        ("nonsense", "nonsense cannot be opened: "),
        (
            "postgresql://host:port/db",
            "postgresql://host:port/db cannot be opened: invalid literal for int()",
        ),
        ("no+such://host/db", "no+such://host/db cannot be opened: "),
        ("sqlite:////nonexistent/x.db", "sqlite:////nonexistent/x.db cannot be opened: there is no folder "),
        ("sqlite:///../no.db", "sqlite:///../no.db cannot be opened: file is not a database"),
    ],
)
def test_a_storage_that_cannot_be_opened(run, pipeline, tmp_path, monkeypatch, url, said):
    """Before the sweep's folder is made."""
    (tmp_path / "here").mkdir()
    (tmp_path / "no.db").write_text("no database, but more than a hundred bytes of something else " * 4)
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = run(*OPTUNA, COEF, f"hydra.sweeper.storage={url}")
    assert (code, len(err)) == (2, 1), err
    assert err[0].startswith(f"error: hydra.sweeper.storage={said}")
    assert "s3cret" not in "".join([*out, *err])
    assert os.listdir() == []


def test_looking_at_a_storage_makes_none(run, pipeline):
    words = (*OPTUNA, COEF, "hydra.sweeper.storage=sqlite:///all.db", "hydra.sweeper.n_trials=1")
    run(*words, "dry_run=true")
    assert os.listdir() == []
    assert run(*words, "hydra.sweeper.study_name=a")[0] == 0
    assert run(*words, "hydra.sweeper.study_name=b", "hydra.sweep.dir=other")[0] == 0, "one that is there"
    assert optuna.get_all_study_names("sqlite:///all.db") == ["a", "b"]


def test_without_optuna_one_line_says_what_to_install(run, pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = run(*OPTUNA, COEF)
    assert (code, err) == (2, ["error: hydra/sweeper=optuna needs optuna: pip install 'rlhf-exp[optuna]'"])
    monkeypatch.undo()


def test_a_config_is_shown_without_loading_optuna_or_torch():
    code = (
        "import sys; from rlhf_exp.cli import main\n"
        f"main(['stage=ppo', 'hydra/sweeper=optuna', 'hydra/launcher=local_pool', {COEF!r}, '--cfg', 'job'])\n"
        "sys.exit(bool({'optuna', 'torch'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr


# ---------------------------------------------------------------- local_pool


POOL = ("hydra/launcher=local_pool", "device=cpu")


def test_trials_in_processes_of_their_own(run, child):
    code, out, err = run(*POOL, "hydra.launcher.workers=2", "hydra.launcher.threads=3", "seed=4,13,6", "-m")
    assert code == 1
    states = ledger.states(Path("sweep"))
    assert {n: (s.status, s.end.get("objective"), s.reason) for n, s in states.items()} == {
        0: ("done", 4.0, ""),
        1: ("failed", None, "killed by SIGKILL"),
        2: ("done", 6.0, ""),
    }
    assert [Path(f"sweep/{n}/environ").read_text() for n in range(3)] == ["3", "3", "3"]
    assert any(line.startswith("trial 1: failed: killed by SIGKILL") for line in out)
    assert any("killed by SIGKILL" in line for line in err)
    # what is there is not run again, what failed is
    Path("sweep/1/environ").unlink()
    Path("sweep/0/environ").unlink()
    assert run(*POOL, "seed=4,13,6", "-m")[0] == 1
    assert Path("sweep/1/environ").exists() and not Path("sweep/0/environ").exists()


def test_a_ledger_without_a_trial(run, child):
    """As a disk that was full leaves it."""
    assert run(*POOL, "seed=4,6", "-m")[0] == 0
    file = Path("sweep/ledger.jsonl")
    lines = [line for line in file.read_text().splitlines() if '"number": 1' not in line]
    file.write_text("\n".join(lines) + "\n")
    code, _, err = run(*POOL, "seed=4,6", "-m")
    assert (code, err) == (0, [])
    assert [(s.status, s.overrides[-1]) for s in ledger.states(Path("sweep")).values()] == [
        ("done", "seed=4"),
        ("done", "seed=6"),
    ]


def test_results_come_in_the_order_of_the_trials(tmp_path, child):
    """Whichever ends first."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.utils import JobStatus
    from hydra.types import HydraContext
    from hydra_plugins.rlhf_local_pool.launcher import LocalPool

    from rlhf_exp import compose

    with compose.session():
        given = ["stage=ppo", "device=cpu", "hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path}/sweep"]
        config = compose.load(given)
        launcher = LocalPool(workers=3)
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=None)
        launcher.setup(hydra_context=context, task_function=lambda config: None, config=config)
        words = [["stage=ppo", f"seed={seed}"] for seed in (5, 13, 7)] + [["stage=ppo", "ppo.minibatches=7"]]
        jobs = launcher.launch(words, initial_job_idx=10)
    assert [job.overrides for job in jobs] == words
    done, failed = JobStatus.COMPLETED, JobStatus.FAILED
    assert [job.status for job in jobs] == [done, failed, done, failed]
    assert [jobs[0].return_value, jobs[2].return_value] == [5.0, 7.0]
    assert str(jobs[1]._return_value) == "killed by SIGKILL"
    assert "ppo.minibatches must divide ppo.batch_size" in str(jobs[3]._return_value)
    assert [job.hydra_cfg.hydra.job.num for job in jobs] == [10, 11, 12, 13]
    assert [trial.read(tmp_path / "sweep" / str(n))["config"]["seed"] for n in (10, 11, 12)] == [5, 13, 7]


def test_a_search_in_parallel(run, child):
    words = (
        *OPTUNA,
        *POOL,
        "hydra.launcher.workers=2",
        "hydra.sweeper.n_trials=4",
        "seed=int(interval(0, 12))",
    )
    code, _, _ = run(*words, "hydra.sweeper.objectives=[objective,kl]")
    assert code == 0
    assert [t.values for t in stored()] == [[float(t.params["seed"]), 2.0] for t in stored()]
    front = max(t.params["seed"] for t in stored())
    found = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())["solutions"]
    assert {one["params"]["seed"] for one in found} == {front}


def test_one_trial_without_a_flag(run, child):
    assert run(*POOL, "seed=4")[0] == 0
    assert ledger.states(Path("sweep"))[0].end["objective"] == 4.0


# ---------------------------------------------------------------- for real


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_search_of_real_trials(tmp_path, tiny_path):
    """The tiny model, two trials at a time, each on the sweep's frozen code."""
    words = (
        *("stage=sft", "model=tiny", "dataset=reviews", "tracking=none", "model.dtype=float32", "threads=1"),
        *(
            "train.steps=2",
            "train.batch_size=4",
            "train.micro_batch_size=4",
            "hydra.sweep.dir=sweep",
            *OPTUNA,
            *POOL,
        ),
        *("hydra.launcher.workers=2", "hydra.sweeper.n_trials=2", "optim.lr=tag(log, interval(1e-5, 1e-2))"),
    )
    command = [sys.executable, "-m", "rlhf_exp", *words]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert found.returncode == 0, found.stderr
    states = ledger.states(tmp_path / "sweep")
    assert {n: s.status for n, s in states.items()} == {0: "done", 1: "done"}
    name, storage = "sweep", f"sqlite:///{tmp_path}/sweep/study.db"
    study = optuna.load_study(study_name=name, storage=storage)
    assert study.direction.name == "MINIMIZE", "a loss"
    assert [t.value for t in study.trials] == [states[n].end["objective"] for n in (0, 1)]
    assert "sft 2/2" in (tmp_path / "sweep" / "0" / "log.txt").read_text()
