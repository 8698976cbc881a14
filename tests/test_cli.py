"""The command line from outside: lines, exit codes, the help page, sweeps. A stub stands in for the pipeline."""
# ruff: noqa: E501  (tables of words and messages: a line each)

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import rlhf_exp
from rlhf_exp import cli, compose, conftree, helppage, stages
from rlhf_exp.errors import InputError, Interrupted
from rlhf_exp.paths import conf_dir
from rlhf_exp.sweeps import plan as sweep
from rlhf_exp.tracking import NullTracker

STAGES = "there are sft, prefer, reward, probe, ppo, ilql, dpo, kto, rft, eval, export, report and pipeline"


def options(group: str, last: str = "and") -> str:
    """The options of a group as a sentence lists them."""
    names = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


NO_STAGE = f"no stage: add stage=sft, prefer, reward, probe, ppo, ilql, dpo, kto, rft, eval, export, report or pipeline, or experiment={options('experiment', 'or')}"


class Pipeline(types.ModuleType):
    """Stands in for rlhf_exp.stages.pipeline: notes what it was called with."""

    def __init__(self):
        super().__init__("rlhf_exp.stages.pipeline")
        self.calls = []
        self.then = lambda config: None

    def run(self, config, choices):
        self.calls.append((config, choices))
        return self.then(config)


@pytest.fixture
def pipeline(monkeypatch):
    stub = Pipeline()
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr(stages, "pipeline", stub, raising=False)
    # seconds for MLflow's database, which tests/sweeps looks at
    monkeypatch.setattr("rlhf_exp.sweeps.collect.begin", lambda *_: NullTracker())
    return stub


@pytest.fixture
def run(pipeline, capsys):
    """Run the command line in this process: (exit code, stdout, lines of stderr)."""

    def call(*words):
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


def process(*words, **environment):
    """Run it as users do."""
    command = [sys.executable, "-m", "rlhf_exp", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


BAD = [
    # a stage, a group, an option, a key that is not there
    (["stage=ppoo"], [f"unknown stage ppoo; did you mean ppo? {STAGES}"]),
    (["stage=zzz"], [f"unknown stage zzz; {STAGES}"]),
    (["model=tiny"], [NO_STAGE]),
    (["experiment=quickstrat"], [f"unknown experiment quickstrat; did you mean quickstart? there are {options('experiment')}"]),
    (["stage=ppo", "model=tinny"], [f"unknown model tinny; did you mean tiny? there are {options('model')}"]),
    (["stage=ppo", "generation=greedy"], ["unknown generation greedy; there is sample"]),
    (["stage=ppo", "dataset/template=tdlr"], [f"unknown dataset/template tdlr; did you mean tldr? there are {options('dataset/template')}"]),
    (["stage=ppo", "modle=tiny"], ["unknown key modle; did you mean model?"]),
    (["stage=ppo", "dataset/templat=tldr"], ["unknown key dataset/templat; did you mean dataset/template?"]),
    (["stage=ppo", "ppo.klcoef=1"], ["unknown key ppo.klcoef; did you mean ppo.kl_coef?"]),
    (["stage=ppo", "dataset.template.trunctate=left"], ["unknown key dataset.template.trunctate; did you mean dataset.template.truncate?"]),
    (["stage=ppo", "lr=1"], ["unknown key lr; did you mean optim.lr?"]),
    (["stage=ppo", "zzz=1"], ["unknown key zzz"]),
    # what another stage has
    (["stage=sft", "ppo.kl_coef=0.1"], ["stage sft has no key ppo.kl_coef; ppo and pipeline have it"]),
    (["stage=sft", "ppo=default"], ["stage sft has no group ppo; ppo and pipeline have it"]),
    (["stage=reward", "generation=sample"], ["stage reward has no group generation; prefer, ppo, ilql, rft, eval and pipeline have it"]),
    (["stage=sft", "reward.center=false"], ["stage sft has no key reward.center; reward has it"]),
    # around the schema
    (["stage=ppo", "+ppo.foo=1"], ["unknown key ppo.foo"]),
    (["stage=ppo", "++ppo.foo=1"], ["unknown key ppo.foo"]),
    (["stage=ppo", "+ppo.kl_coef=1"], ["+ppo.kl_coef=1: leave out the +, the key is there already"]),
    (["stage=ppo", "+model=tiny"], ["+model=tiny: leave out the +, the group is there already"]),
    (["stage=ppo", "~tracking"], ["~tracking: nothing can be removed, only set to something else"]),
    (["stage=ppo", "dataset@eval=tldr"], ["cannot read 'dataset@eval=tldr': leave out @eval"]),
    # types
    (["stage=ppo", "ppo.kl_coef=abc"], ["ppo.kl_coef must be a number, got abc"]),
    (["stage=ppo", "ppo.kl_coef=null"], ["ppo.kl_coef must be a number, got null"]),
    (["stage=ppo", "ppo.kl_coef="], ["ppo.kl_coef must be a number, got ''"]),
    (["stage=ppo", "ppo.steps=1.5"], ["ppo.steps must be a whole number, got 1.5"]),
    (["stage=ppo", "dry_run=maybe"], ["dry_run must be true or false, got maybe"]),
    (["stage=ppo", "lora.targets=q_proj"], ["lora.targets must be a list such as [a,b], got q_proj"]),
    (["stage=ppo", "model.layers=many"], ["model.layers must be a whole number or null, got many"]),
    (["stage=ppo", "run_name=[a]"], ["run_name must be text or null, got ['a']"]),
    (["stage=ppo", "upstream.sft=3"], ["upstream.sft must be settings such as {train: {steps: 10}}, got 3"]),
    (["stage=ppo", "optim=3"], ["optim is a section: set one of its keys, such as optim.lr"]),
    (["stage=ppo", "dataset.template=tldr"], ["dataset.template is a section: set dataset/template=tldr"]),
    # ranges
    (["stage=ppo", "ppo.kl_coef=-1"], ["ppo.kl_coef must be at least 0, got -1.0"]),
    (["stage=ppo", "optim.lr=nan"], ["optim.lr must be a finite number, got nan"]),
    (["stage=ppo", "ppo.critic=mine"], ["ppo.critic must be one of trunk, own, detached, got mine"]),
    (["stage=ppo", "seed=???"], ["seed has no value: Seed of data order, initialisation and sampling."]),
    (["stage=ppo", "ppo.minibatches=5"], ["ppo.minibatches must divide ppo.batch_size, got 5 and 32"]),
    # what cannot be read
    (["stage=ppo", "ppo.kl_coef"], ["cannot read 'ppo.kl_coef': write key=value"]),
    (["stage=ppo", "=1"], ["cannot read '=1': write key=value"]),
    (["stage=ppo", "a b=1"], ["cannot read 'a b=1': 'a b' is not a key"]),
    (["stage=ppo", "lora.targets=[a,"], ["cannot read 'lora.targets=[a,': a bracket is not closed; in a text, put it in quotes: 'lora.targets=\"...\"'"]),
    (["stage=ppo", "run_name=名"], ["cannot read 'run_name=名': put the text in quotes: 'run_name=\"...\"'"]),
    (["stage=ppo", "run_name=it's"], ["cannot read \"run_name=it's\": put the text in quotes: 'run_name=\"...\"'"]),
    (["stage=ppo", "seed=int(abc)"], ["cannot read 'seed=int(abc)': ValueError while evaluating 'int(abc)': invalid literal for int() with base 10: 'abc'"]),
    (["stage=ppo", "optim.lr=${ppo.foo}"], ["Interpolation key 'ppo.foo' not found (at optim.lr)"]),
    (["stage=ppo", "--ppo.kl_coef=1"], ["unrecognized arguments: --ppo.kl_coef=1; keys are written without dashes: key=value"]),
    (["stage=ppo", "--cfg", "jobs"], ["argument -c/--cfg: invalid choice: 'jobs' (choose from 'job', 'hydra', 'all')"]),
    (["stage=ppo", "--cfg", "job", "--package", "pppo"], ["--package pppo: there is no such section"]),
    (["stage=ppo", "--config-dir", "nowhere"], ["--config-dir nowhere: there is no such folder"]),
    (["stage=ppo", "optim.lr=1e-3,"], ["cannot read 'optim.lr=1e-3,': nothing stands behind the last comma"]),
    (["stage=ppo", "sft"], ["cannot read 'sft': write stage=sft"]),
    # Hydra's own keys, and those of launchers and sweepers
    (["stage=ppo", "hydra.foo=1"], ["unknown key hydra.foo; did you mean hydra.job?"]),
    (["stage=ppo", "hydra.swep.dir=x"], ["unknown key hydra.swep; did you mean hydra.sweep?"]),
    (["stage=ppo", "hydra/launcher=slrm"], ["unknown hydra/launcher slrm; did you mean slurm? there are basic, local_pool and slurm"]),
    (["stage=ppo", "hydra/launcher=local_pool", "hydra.launcher.wokers=2"], ["unknown key hydra.launcher.wokers; did you mean hydra.launcher.workers?"]),
    (["stage=ppo", "hydra/launcher=slurm", "hydra.launcher.by_stage.pppo.mem=1"], ["unknown key hydra.launcher.by_stage.pppo; did you mean hydra.launcher.by_stage.ppo?"]),
    (["stage=report"], ["inputs has no value: What is compared: a folder with run folders (outputs, a sweep's), a list of run folders, or the name of an MLflow experiment."]),
    # what does not go together
    (["stage=sft", "experiment=quickstart"], ["experiment/quickstart.yaml: stage sft has no key ppo; ppo and pipeline have it"]),
    (["stage=sft", "sweep=kl"], ["sweep=kl: stage sft has no key ppo.kl_coef; ppo and pipeline have it"]),
    (["stage=ppo", "ppo.kl_coef=1,2"], ["ppo.kl_coef=1,2 has several values: add -m to run a trial for each"]),
    # all at once, in the order of the words
    (
        ["stage=ppo", "ppo.lam=2", "modle=tiny", "lora.r=0", "foo", "upstream.sft={optim: {lrr: 1}, seed: -1}"],
        [
            "cannot read 'foo': write key=value",
            "ppo.lam must be at most 1, got 2.0",
            "unknown key modle; did you mean model?",
            "lora.r must be more than 0, got 0",
            "upstream.sft: unknown key optim.lrr; did you mean optim.lr?",
            "upstream.sft: seed must be at least 0, got -1",
        ],
    ),
    (["stage=pppo", "ppo.klcoef=1", "seed=-1"], [f"unknown stage pppo; did you mean ppo? {STAGES}", "unknown key ppo.klcoef; did you mean ppo.kl_coef?", "seed must be at least 0, got -1"]),
    (["stage=ppo", "ppo={kl_coeff: 1, lam: 7}"], ["unknown key ppo.kl_coeff; did you mean ppo.kl_coef?", "ppo.lam must be at most 1, got 7.0"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "problems"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_a_line_each_and_exit_code_2(run, pipeline, words, problems):
    code, out, err = run(*words)
    assert err == [f"error: {problem}" for problem in problems]
    assert (code, out) == (2, "")
    assert not pipeline.calls
    assert not list(Path().iterdir()), "bad input leaves nothing behind"


def test_as_users_see_it():
    done = process("stage=ppo", "ppo.klcoef=1", "ppo.lam=2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: unknown key ppo.klcoef; did you mean ppo.kl_coef?",
        "error: ppo.lam must be at most 1, got 2.0",
    ]


def test_bad_input_is_found_before_anything_heavy_is_imported():
    code = (
        "import sys; from rlhf_exp.cli import main; main(['stage=ppo', 'ppo.lam=2']);"
        "print(sorted({'torch', 'transformers', 'mlflow', 'numpy', 'rlhf_exp.stages'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"
    assert done.stderr == "error: ppo.lam must be at most 1, got 2.0\n"


def test_the_full_error_is_kept_for_those_who_ask(run, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, err = run("stage=ppo", "ppo.lam=2")
    assert code == 2
    assert err[0].startswith("Traceback")
    assert err[-1] == "error: ppo.lam must be at most 1, got 2.0"
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_the_environment_is_left_alone(run, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    before = dict(os.environ)
    run("stage=ppo")
    assert dict(os.environ) == before


# printing a config


def test_the_job_config_is_printed_without_torch():
    code = (
        "import sys; from rlhf_exp.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'mlflow', 'numpy', 'peft', 'trl', 'datasets', 'rlhf_exp.stages', 'rich'};"
        "print(sorted(heavy & set(sys.modules)), len(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "stage=ppo", "model=baichuan7b", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    heavy, _, count = done.stderr.strip().rpartition(" ")
    assert heavy == "[]"
    assert int(count) < 500, "338 when this was written, in 0.34 s"
    printed = yaml.safe_load(done.stdout)
    assert printed["model"]["path"] == "baichuan-inc/Baichuan-7B"
    assert printed["model"]["lora_targets"] == ["W_pack"]
    assert "hydra" not in printed


def test_what_is_printed_is_what_runs(run, pipeline):
    words = ("stage=ppo", "model=tiny", "ppo.kl_coef=0.3", "lora.r=4")
    printed = yaml.safe_load(run(*words, "--cfg", "job")[1])
    assert not pipeline.calls
    run(*words)
    config, _ = pipeline.calls[0]
    assert printed["ppo"]["kl_coef"] == config.ppo.kl_coef == 0.3
    assert printed["lora"]["r"] == config.lora.r == 4
    assert printed["model"]["name"] == config.model.name == "tiny"


def test_a_part_of_the_config(run):
    assert yaml.safe_load(run("stage=ppo", "--cfg", "job", "--package", "ppo")[1])["kl_coef"] == 0.05
    assert run("stage=ppo", "--cfg", "job", "-p", "ppo.kl_coef")[1] == "0.05\n"
    assert "lr: ${ppo.kl_coef}" in run("stage=ppo", "optim.lr=${ppo.kl_coef}", "--cfg", "job")[1]
    assert "lr: 0.05" in run("stage=ppo", "optim.lr=${ppo.kl_coef}", "--cfg", "job", "--resolve")[1]


def test_hydras_own_config_and_information(run):
    code, out, err = run("stage=ppo", "--cfg", "hydra")
    assert (code, err) == (0, [])
    assert yaml.safe_load(out)["hydra"]["run"]["dir"] == "."
    # of a sweep: of its first trial, as --cfg job
    code, out, err = run("stage=ppo", "sweep=kl", "seed=3,4", "-m", "--cfg", "hydra")
    assert (code, err) == (0, [])
    assert "seed=3" in yaml.safe_load(out)["hydra"]["overrides"]["task"]
    done = process("stage=ppo", "--info", "defaults")  # Hydra sets up logging for it
    assert (done.returncode, done.stderr) == (0, "")
    assert "stage/ppo" in done.stdout


# running


def test_a_run_gets_a_dataclass_and_the_choices(run, pipeline):
    code, out, err = run("stage=sft", "model=tiny", "dataset=tldr", "upstream.ppo.seed=1")
    assert (code, out, err) == (0, "", [])
    config, choices = pipeline.calls[0]
    assert type(config).__name__ == "SFTRun"
    assert type(config.upstream.ppo) is dict and config.upstream.ppo == {"seed": 1}
    assert type(config.model.lora_targets) is list
    assert choices == {
        "stage": "sft",
        "model": "tiny",
        "lora": "default",
        "dataset": "tldr",
        "dataset/template": "tldr",
        "strategy": "single",
        "tracking": "mlflow",
    }
    assert not list(Path().iterdir()), "Hydra writes nothing"


def test_an_experiment_is_among_the_choices(run, pipeline):
    run("experiment=smoke", "model=baichuan7b")
    config, choices = pipeline.calls[0]
    assert (config.stage, choices["stage"], choices["experiment"]) == ("pipeline", "pipeline", "smoke")
    assert (config.model.name, choices["model"]) == ("baichuan7b", "baichuan7b")


def test_upstream_composes_inside_a_run_and_a_trial(run, pipeline):
    pipeline.then = lambda config: children.append(compose.upstream("sft", config, {"model": "tiny"})[0])
    children = []
    run("stage=ppo", "model=tiny", "lora.r=4")
    run("stage=ppo", "model=tiny", "lora.r=2,8", "-m")
    assert [child.lora.r for child in children] == [4, 2, 8]
    assert {child.stage for child in children} == {"sft"}


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (InputError(["no model", "no data"]), 2, ["error: no model", "error: no data"]),
        (Interrupted(), 75, ["stopped by a signal; the same command continues"]),
        (KeyboardInterrupt(), 130, ["stopped by Ctrl-C"]),
    ],
)
def test_exit_codes(run, pipeline, error, code, last):
    def fail(config):
        raise error

    pipeline.then = fail
    assert run("stage=ppo") == (code, "", last)


def test_any_other_error_has_its_traceback_and_exit_code_1(run, pipeline):
    def fail(config):
        raise ZeroDivisionError("here")

    pipeline.then = fail
    code, _, err = run("stage=ppo")
    assert code == 1
    assert err[0] == "Traceback (most recent call last):"
    assert err[-1] == "ZeroDivisionError: here"
    assert any("in fail" in line for line in err)


# sweeps


def sweeps():
    return sorted(Path("multirun/results").iterdir()) if Path("multirun").exists() else []


def test_a_sweep_runs_each_value(run, pipeline):
    code, out, err = run("stage=ppo", "ppo.kl_coef=0.1,0.2", "seed=range(1,3)", "-m")
    assert (code, err) == (0, [])
    assert [(c.ppo.kl_coef, c.seed) for c, _ in pipeline.calls] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    lines = [line for line in out.splitlines() if line.startswith("trial ")]
    assert lines[3] == "trial 3: stage=ppo ppo.kl_coef=0.2 seed=2"


def test_a_sweep_file_needs_no_flag(run, pipeline):
    assert run("stage=ppo", "sweep=kl")[0] == 0
    values = yaml.safe_load((conf_dir() / "sweep/kl.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert [c.ppo.kl_coef for c, _ in pipeline.calls] == [float(v) for v in values["ppo.kl_coef"].split(",")]
    assert "sweep" not in pipeline.calls[0][1]


def test_a_sweep_over_stages_and_experiments(run, pipeline):
    words = ("optim.lr=0.5", "lora.targets=[q_proj]", "upstream.sft={optim: {lr: 1e-3}}", "-m")
    assert run("stage=sft,reward,ppo", *words)[0] == 0
    assert [(c.stage, c.optim.lr, c.lora.targets) for c, _ in pipeline.calls] == [
        (stage, 0.5, ["q_proj"]) for stage in ("sft", "reward", "ppo")
    ]
    assert all(c.upstream.sft == {"optim": {"lr": 1e-3}} for c, _ in pipeline.calls)
    pipeline.calls.clear()
    assert run("experiment=quickstart,smoke", "seed=3", "-m")[0] == 0
    assert [(choices["experiment"], c.seed) for c, choices in pipeline.calls] == [
        ("quickstart", 3),
        ("smoke", 3),
    ]


def test_sweeps_started_in_the_same_second_stay_apart(run, pipeline):
    run("stage=ppo", "seed=1,2", "-m")
    run("stage=ppo", "seed=1,2", "-m")
    assert len(sweeps()) == 2
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-\d{6}", folder.name) for folder in sweeps())
    for folder in sweeps():
        files = {path.name for path in folder.iterdir()}
        assert files == {
            "0",
            "1",
            "code",
            "ledger.jsonl",
            "multirun.yaml",
            "sweep.json",
            "table.json",
            "table.md",
        }


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["stage=ppo", "ppo.kl_coef=0.1,abc,-1"], ["ppo.kl_coef must be a number, got abc", "ppo.kl_coef must be at least 0, got -1.0"]),
        (["stage=ppo", "dataset=reviews,tdlr"], [f"unknown dataset tdlr; did you mean tldr? there are {options('dataset')}"]),
        (["stage=sft,ppo", "ppo.steps=3"], ["stage sft has no key ppo.steps; ppo and pipeline have it"]),
        (["stage=sft,pppo"], [f"unknown stage pppo; did you mean ppo? {STAGES}"]),
        (["stage=ppo", "seed=interval(0,1)"], ["seed must be a whole number, got 0.0", "seed must be a whole number, got 1.0"]),
        (["stage=ppo", "ppo.lam=interval(0,1)"], ["BasicSweeper does not support sweep type : INTERVAL_SWEEP"]),
    ],
)  # fmt: skip
def test_a_sweep_with_a_bad_value_does_not_start(run, pipeline, words, problems):
    code, _, err = run(*words, "-m")
    assert (code, err) == (2, [f"error: {problem}" for problem in problems])
    assert not pipeline.calls
    assert not sweeps()


def test_a_bad_pair_of_values_fails_its_trial_alone(run, pipeline):
    for values, number in (("1,5", 2), ("5,1", 0)):
        pipeline.calls.clear()
        code, _, err = run("stage=ppo", f"ppo.minibatches={values}", "ppo.batch_size=32,40", "-m")
        assert code == 2
        assert err == [
            f"error: trial {number} (stage=ppo ppo.minibatches=5 ppo.batch_size=32): "
            "ppo.minibatches must divide ppo.batch_size, got 5 and 32"
        ]
        ran = [(c.ppo.minibatches, c.ppo.batch_size) for c, _ in pipeline.calls]
        assert sorted(ran) == [(1, 32), (1, 40), (5, 40)]


def test_failed_trials_are_named_and_the_others_run(run, pipeline):
    def fail(config):
        if config.seed == 1:
            raise InputError(["no model", "no data"])
        if config.seed == 2:
            raise ZeroDivisionError("here\nand there")
        return 1.0

    pipeline.then = fail
    code, _, err = run("stage=ppo", "seed=0,1,2,3", "-m")
    assert code == 1, "one failed otherwise than by bad input"
    assert [c.seed for c, _ in pipeline.calls] == [0, 1, 2, 3]
    assert err[-2:] == [
        "error: trial 1 (stage=ppo seed=1): no model; no data",
        "error: trial 2 (stage=ppo seed=2): ZeroDivisionError: here",
    ]
    assert err[0] == "Traceback (most recent call last):", "as soon as it happens"
    assert not any("Error executing job" in line for line in err), "that is Hydra's, for the first one only"


@pytest.mark.parametrize(("error", "code"), [(Interrupted(), 75), (KeyboardInterrupt(), 130)])
def test_a_signal_ends_the_whole_sweep(run, pipeline, error, code):
    def fail(config):
        raise error

    pipeline.then = fail
    assert run("stage=ppo", "seed=0,1", "-m")[0] == code
    assert len(pipeline.calls) == 1


def test_failures_are_collected_only_inside(pipeline):
    from hydra.core.utils import JobReturn, JobStatus

    job = JobReturn(overrides=["a=1"], status=JobStatus.FAILED)
    job.return_value = ValueError("x")
    with sweep.failures() as found:
        assert job.return_value is None
        assert job.return_value is None
    assert [(failure.number, failure.overrides, str(failure.error)) for failure in found] == [
        (None, ["a=1"], "x")
    ]
    with pytest.raises(ValueError, match="x"):
        _ = job.return_value


# other places for options


@pytest.fixture
def more(tmp_path):
    """A folder for --config-dir."""
    folder = tmp_path / "more"
    files = {
        "model/mine.yaml": "# My model.\nname: mine\nlora_targets: [q]\n",
        "experiment/good.yaml": "defaults:\n  - override /stage: ppo\n  - override /model: mine\nppo:\n  lam: 0.5\n",
        "experiment/badkey.yaml": "defaults:\n  - override /stage: ppo\nppo:\n  kl_coff: 3\n",
        "experiment/badtype.yaml": "defaults:\n  - override /stage: ppo\nppo:\n  lam: abc\n",
        "experiment/badrange.yaml": "defaults:\n  - override /stage: ppo\nppo:\n  lam: -1\n",
        "experiment/badgroup.yaml": "defaults:\n  - override /stage: ppo\n  - override /modl: tiny\n",
        "experiment/badyaml.yaml": "ppo: [1\n",
        "experiment/nostage.yaml": "seed: 1\n",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package _global_\n{text}" if name.startswith("experiment") else text)
    return str(folder)


def test_options_of_another_folder(run, pipeline, more):
    pipeline.then = lambda config: children.append(compose.upstream("sft", *pipeline.calls[-1])[0])
    children = []
    assert run("experiment=good", "--config-dir", more)[0] == 0
    config, choices = pipeline.calls[0]
    assert (config.model.name, config.ppo.lam, choices["experiment"]) == ("mine", 0.5, "good")
    assert children[0].model.name == "mine"
    # and they are gone afterwards
    assert run("stage=ppo", "model=mine")[0] == 2


@pytest.mark.parametrize(
    ("experiment", "problem"),
    [
        ("badkey", r"experiment/badkey\.yaml: unknown key ppo\.kl_coff; did you mean ppo\.kl_coef\?"),
        (
            "badtype",
            r"experiment/badtype\.yaml: Value 'abc' of type 'str' could not be converted to Float \(at ppo\.lam\)",
        ),
        ("badrange", r"ppo\.lam must be at least 0, got -1\.0"),
        (
            "badgroup",
            r"experiment/badgroup\.yaml: Could not override 'modl'\. No match in the defaults list\.",
        ),
        ("badyaml", r"while parsing a flow sequence in \".*badyaml\.yaml\", line 2, column 6 expected .*"),
        ("nostage", r"no stage: add stage=.*"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(run, more, experiment, problem):
    code, out, err = run(f"experiment={experiment}", "--config-dir", more)
    assert (code, out, len(err)) == (2, "", 1)
    assert re.fullmatch(f"error: {problem}", err[0])


# the help page


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("model=tiny", "--help")])
def test_the_help_page_names_every_option(run, words):
    code, out, err = run(*words)
    assert (code, err) == (0, [])
    flat = " ".join(out.split())
    tree = conftree.read([conf_dir()])
    assert len(tree) == 13
    for group, options in tree.items():
        assert f"\n{group}=..." in out
        for option, path in options.items():
            place = 1 if group == "experiment" else 0
            assert f"{option} {' '.join(conftree.comments(path)[place].split())}" in flat
    assert "model=... (default smollm2_135m; all stages but report)" in flat
    assert "reward_source=... (default learned; stages ppo, ilql, rft, eval, pipeline)" in flat


def test_the_page_as_a_process_is_plain_and_needs_no_hydra():
    done = process()
    assert (done.returncode, done.stderr) == (0, "")
    assert "\033" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    code = (
        "import sys; from rlhf_exp.cli import main; main(['--help']);"
        "print(sorted({'hydra', 'omegaconf', 'torch', 'yaml', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"


def test_five_examples_that_compose(run):
    out = run()[1]
    assert len(helppage.EXAMPLES) == 5
    for words, meaning in helppage.EXAMPLES:
        assert f"python -m rlhf_exp {words}\n      {meaning}" in out
        overrides = [word for word in shlex.split(words) if word not in ("--cfg", "job")]
        with compose.session():
            sweep.plan(overrides)


def test_the_flags_of_the_page_exist():
    known = {name for action in cli.parser()._actions for name in action.option_strings}
    for names, _ in helppage.FLAGS:
        assert set(re.findall(r"(?<!\w)--?[\w-]+", names.split("=")[0])) <= known


def test_the_keys_of_a_stage(run):
    code, out, err = run("stage=sft", "--help")
    assert (code, err) == (0, [])
    assert "  lora.r=16" in out and "Rank (Hu et al. 2021). [> 0]" in out
    assert "ppo.kl_coef" not in out and "ppo.kl_coef=0.05" in run("-h", "stage=ppo")[1]
    # what conf/ sets for the stage, not what the schema has for all: DPO's rate is half of it
    assert "  optim.lr=5e-05 " in run("stage=dpo", "--help")[1]


def test_a_narrow_terminal_and_colours(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    table = run("--help")[1].partition("Examples")[0].splitlines()
    assert all(len(line) <= 70 for line in table if line.startswith("  "))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[1mExamples\033[0m" in helppage.page()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in helppage.page()


def test_the_version(run):
    assert run("--version") == (0, f"rlhf_exp {rlhf_exp.__version__}\n", [])


def test_a_reader_that_has_left():
    command = [sys.executable, "-m", "rlhf_exp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as page:
        page.stdout.close()
        assert page.stderr.read() == ""
    assert page.returncode == 1


# composing without the command line


def test_compose_alone_and_beside_another_hydra(tmp_path):
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    assert not GlobalHydra.instance().is_initialized()
    run, choices = compose.compose(["stage=ppo", "model=tiny"])
    assert (run.model.name, choices["model"]) == ("tiny", "tiny")
    assert not GlobalHydra.instance().is_initialized()

    (tmp_path / "other.yaml").write_text("a: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose.compose(["stage=sft"])[0].stage == "sft"
        assert hydra.compose("other").a == 1


def test_compose_alone_says_all_that_is_wrong():
    with pytest.raises(InputError) as error:
        compose.compose(["stage=ppo", "modle=tiny", "seed=-1", "lora.r=1,2"])
    assert error.value.problems == [
        "unknown key modle; did you mean model?",
        "seed must be at least 0, got -1",
        "lora.r=1,2 has several values where one is needed",
    ]


def test_launchers_of_a_checkout_are_found(tmp_path, monkeypatch):
    import shutil

    tree = tmp_path / "conf"
    shutil.copytree(conf_dir(), tree)
    monkeypatch.setattr(compose, "conf_dir", lambda: tree)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with compose.session():
        assert str(tmp_path / "launchers") not in sys.path
    (tmp_path / "launchers").mkdir()
    for _ in range(2):
        with compose.session():
            assert sys.path.count(str(tmp_path / "launchers")) == 1
