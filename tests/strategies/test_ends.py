"""How runs on several ranks end when something is wrong: in seconds, all of them, with one line that says why."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from tests.strategies.conftest import COMMON, STAGES, STRATEGIES, environments, require_same_run

COMMAND = (sys.executable, "-m", "rlhf_exp")


def started(size: int, argv: Sequence[str]) -> list[subprocess.Popen]:
    """The ranks of a command, in the current folder."""
    return [
        subprocess.Popen(
            [*COMMAND, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for environment in environments(size)
    ]


def ended(processes: Sequence[subprocess.Popen], seconds: float) -> tuple[list[int], list[str]]:
    """Exit codes, and the lines that begin with "error:", of all ranks."""
    deadline, outputs = time.monotonic() + seconds, []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic())))
    finally:
        for process in processes:
            process.kill()
    lines = [line for _, err in outputs for line in err.splitlines() if line.startswith("error:")]
    return [process.returncode for process in processes], lines


def refused(ranks, cwd, argv: Sequence[str], apart: Sequence[Sequence[str]] = ()) -> list[str]:
    """The error lines of a command that all ranks end with as bad input; rank 0 alone says them."""
    answers = ranks.run(cwd, argv, apart=apart)
    assert [answer["code"] for answer in answers] == [2] * len(answers), [each["err"] for each in answers]
    assert [answer["err"] for answer in answers[1:]] == [""] * (len(answers) - 1)
    return answers[0]["err"].splitlines()


@pytest.mark.timeout(300)
def test_a_rank_with_another_config_ends_all(two, tmp_path):
    argv = [*STAGES["sft"], *COMMON, "strategy=ddp"]
    assert refused(two, tmp_path, argv, [["seed=1"], ["seed=2"]]) == [
        "error: rank 1 has another config than rank 0: seed=2, rank 0 has 1: start all ranks with the same command"
    ]


@pytest.mark.timeout(300)
def test_a_rank_that_sees_other_data_ends_all(two, tmp_path):
    """The same path, another file: what a disk that is not shared looks like."""
    places = [tmp_path / f"node{rank}" for rank in range(2)]
    for rank, place in enumerate(places):
        place.mkdir()
        rows = [{"prompt": f"Say {i}", "response": f"{i} {rank}"} for i in range(40)]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [*STAGES["sft"], *COMMON, "strategy=ddp", "dataset=jsonl"]
    argv += ["dataset.views.demonstrations=rows.jsonl", f"output_dir={tmp_path / 'outputs'}"]
    (line,) = refused(two, places, argv)
    assert line.startswith("error: rank 1 sees other demonstrations of dataset jsonl (")


@pytest.mark.timeout(300)
def test_a_rank_with_a_disk_of_its_own_ends_all(two, tmp_path):
    """The run is there for rank 0 alone."""
    places = [tmp_path / f"node{rank}" for rank in range(2)]
    for place in places:
        place.mkdir()
    argv = [*STAGES["sft"], *COMMON, "train.steps=1"]
    argv.remove("train.steps=5")
    assert [answer["code"] for answer in two.run(places[0], [*argv, "strategy=ddp"])] == [0, 0]
    (line,) = refused(two, places, [*argv, "strategy=zero2"])
    assert line.startswith(
        "error: rank 1 sees the run of sft in another state: output_dir must be on a disk that"
    )


NVME = "strategy.deepspeed.zero_optimization.offload_param={device: nvme, nvme_path: /proc/shards}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=ddp", "train.stepz=5"), "train.stepz"),
        (("strategy=single",), "2 processes were started as ranks of one run, but strategy=single"),
        (
            ("strategy=zero2", "strategy.deepspeed.gradient_accumulation_steps=2"),
            "micro 8 x accumulation 2 x ranks 2 = 32, train.batch_size says 8",
        ),
        (
            ("strategy=ddp", "train.batch_size=1", "train.micro_batch_size=1"),
            "sft: 2 ranks, but 1 row in a batch (train.batch_size): each rank needs one",
        ),
        (("strategy=zero1", "strategy.deepspeed.gradient_clipping=0.5"), "contradicts optim.max_grad_norm=1"),
        (("strategy=zero3_offload", NVME), "nvme_path=/proc/shards cannot be written"),
    ],
)
def test_bad_input_is_told_once_and_ends_all(words, said, two, tmp_path):
    (line,) = refused(two, tmp_path, [*STAGES["sft"], *COMMON, *words])
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "outputs" / "sft").exists()


ALL_STAGES = ("experiment=smoke", "ppo.save_every=1", "ppo.guards.kl=1e-9", "ppo.guards.kl_action=rollback")
LABELS = ("stage=prefer", "model=tiny", "dataset=reviews", "adapters.sft=base", "prefer.prompts=12")
LABELS += ("prefer.labellers=[length]", "prefer.samples=3", "generation.max_new_tokens=8")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("words", "rank", "said"),
    [
        (ALL_STAGES, 0, ("probes: ", "the policy is again")),
        (ALL_STAGES, 1, ("probes: ", "the policy is again")),
        (LABELS, 0, ("comparisons", "done in")),
    ],
)
def test_no_rank_is_ahead_of_what_it_needs_nor_behind_what_is_sealed(words, rank, said, two, tmp_path):
    """Rank 0 writes and the others read: SFT, reward model with its probes, PPO that rolls back, evaluation."""
    argv = [*words, *(word for word in COMMON if not word.startswith(("model=", "dataset.")))]
    answers = two.run(tmp_path, [*argv, "strategy=ddp"], late={rank: 0.3})
    assert [answer["code"] for answer in answers] == [0, 0], [answer["err"] for answer in answers]
    assert [each in answers[0]["out"] for each in said] == [True, True]


AT_THE_END = """
import atexit
import sys
import torch.distributed

atexit.register(lambda: print(torch.distributed.is_initialized(), file=sys.stderr))
from rlhf_exp.strategies import command

with command.together():
    print(torch.distributed.is_initialized(), file=sys.stderr)
"""


def test_the_group_is_gone_before_the_interpreter():
    """Nothing is under way between ranks when their interpreters end."""
    command = [sys.executable, "-c", AT_THE_END]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        for environment in environments(2)
    ]
    assert [process.communicate(timeout=120)[1].split() for process in processes] == [["True", "False"]] * 2
    assert [process.returncode for process in processes] == [0, 0]


LEFT = """
import atexit, sys, threading, time
from rlhf_exp import distributed
from rlhf_exp.distributed import meeting

class Torn:
    def __del__(self):
        print("torn down")

torn = Torn()
distributed.start()
meeting._started = sys.argv[1] == "several"
atexit.register(print, "handlers")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
distributed.leave(75)
"""


@pytest.mark.parametrize("ranks", ["one", "several"])
def test_several_ranks_end_before_the_interpreter_is_taken_apart(ranks):
    """gloo's threads outlive their group: with zero2 one run in many died by SIGABRT when it was done."""
    done = subprocess.run([sys.executable, "-c", LEFT, ranks], stdout=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 75
    assert done.stdout.split("\n")[:2] == ["thread", "handlers"]
    assert ("torn down" in done.stdout) == (ranks == "one")


def checkpointed(folder: Path, seconds: float = 200) -> Path:
    """The first checkpoint that appears below the folder."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := sorted(folder.glob("*/state/step_*")):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint in {folder}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("victim", "strategy"),
    [
        (1, "ddp"),
        pytest.param(0, "ddp", marks=pytest.mark.long),
        pytest.param(1, "zero3", marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_ends_all_and_the_run_goes_on(victim, strategy, one):
    argv = [word for word in (*STAGES["ppo"], *COMMON) if not word.startswith(("ppo.steps", "checkpoint"))]
    argv += ["checkpoint_every=1", "ppo.steps=200"]
    processes = started(2, [*argv, *STRATEGIES[strategy]])
    checkpointed(Path("outputs/ppo"))
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, lines = ended(processes, 60)
    assert time.monotonic() - began < 30
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    (line,) = lines
    assert f"rank {victim} on" in line
    assert "is gone without a word" in line
    (answer,) = one.run(Path.cwd(), [*argv, "strategy=single"], stop={0: 1})
    assert answer["code"] == 75, answer["err"]
    assert "continued from step" in answer["out"]


# rank 1 ends where the others are busy: before the stages listen to signals, and while the base is loaded
BAD_RANK = """
import os, sys, time
from rlhf_exp.errors import InputError
from rlhf_exp.model import base
from rlhf_exp.stages import plan

ends = {
    "killed": lambda: os.kill(os.getpid(), 9),
    "refused": lambda: (_ for _ in ()).throw(InputError("too little memory here")),
    "failed": lambda: 1 / 0,
}

def busy(*arguments, **options):
    if RANK == "1":
        ends[sys.argv[2]]()
    for _ in range(600):
        time.sleep(0.1)

RANK = os.environ["RANK"]
if sys.argv[1] == "load":
    base.load_base = busy
else:
    plan.make = busy
from rlhf_exp.cli import main

code = main(sys.argv[3:])
print(f"rank {RANK} ends with {code}", file=sys.stderr)
sys.exit(code)
"""
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    *("--log-dir", "logs", "--redirects", "3"),
)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("tiny_path")  # built: no rank waits for the other to do so
@pytest.mark.parametrize(
    ("where", "how", "said", "code"),
    [
        ("load", "killed", "is gone without a word (killed, or out of memory), so all ranks end", 1),
        pytest.param("load", "refused", "too little memory here", 2, marks=pytest.mark.long),
        pytest.param("load", "failed", "ZeroDivisionError: division by zero", 1, marks=pytest.mark.long),
        pytest.param("plan", "killed", "is gone without a word", 1, marks=pytest.mark.long),
        pytest.param("plan", "failed", "ZeroDivisionError: division by zero", 1, marks=pytest.mark.long),
    ],
)
def test_torchruns_sigterm_does_not_hide_the_reason(where, how, said, code, tmp_path):
    """It comes a tenth of a second after the end of a rank, which rank 0 would otherwise take for a wish to stop."""
    script = tmp_path / "bad_rank.py"
    script.write_text(BAD_RANK)
    argv = [where, how, *STAGES["sft"], *COMMON, "strategy=ddp"]
    done = subprocess.run([*TORCHRUN, str(script), *argv], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr  # torchrun's own
    (log,) = tmp_path.glob("logs/*/attempt_0/0/stderr.log")
    lines = log.read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("error:")]
    assert "rank 1 on " in line
    assert said in line
    assert lines[-1] == f"rank 0 ends with {code}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "strategy",
    [name if name == "zero2" else pytest.param(name, marks=pytest.mark.long) for name in STRATEGIES],
)
def test_torchrun_starts_it_and_nothing_is_compiled(strategy, tmp_path, monkeypatch):
    """No compiler is to be found; rank 0 alone speaks, writes, and talks to MLflow."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    argv = [word for word in (*STAGES["ppo"], *COMMON) if word != "tracking=none"]
    argv += ["tracking=mlflow", *STRATEGIES[strategy]]
    done = subprocess.run([*torchrun, "-m", "rlhf_exp", *argv], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (record,) = Path("outputs/ppo").glob("*/run.json")
    found = json.loads(record.read_text())
    assert found["status"] == "FINISHED"
    assert done.stdout.count("done in") == 1
    assert not (tmp_path / "compiled").exists()
    with closing(sqlite3.connect(tmp_path / "outputs" / "mlflow.db")) as database:
        assert database.execute("SELECT run_uuid, status FROM runs").fetchall() == [
            (found["mlflow_run_id"], "FINISHED")
        ]
        steps = "SELECT COUNT(*), COUNT(DISTINCT step) FROM metrics WHERE key = 'objective/scores'"
        assert database.execute(steps).fetchall() == [(2, 2)]


RANKS = {"single": 1, "ddp": 2, "zero1": 4, "zero2": 2, "zero3": 2}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["ppo", "sft"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero2", "single"),
        ("single", "zero2"),
        *(
            pytest.param(*pair, marks=pytest.mark.long)
            for pair in (("zero3", "zero1"), ("zero1", "zero3"), ("ddp", "zero1"), ("zero1", "ddp"))
        ),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(stage, before, after, request, alone, runs):
    """One rank alone is asked to stop, all stop after that step; moments come out of as many shards as there were."""
    names = {1: "one", 2: "two", 4: "four"}
    first, then = (request.getfixturevalue(names[RANKS[strategy]]) for strategy in (before, after))
    name = f"resumed_{before}_{after}"
    argv = [*STAGES[stage], *COMMON, f"output_dir={name}", "checkpoint_every=100"]
    argv.remove("checkpoint_every=2")
    stop = {first.size - 1: 1}
    answers = first.run(runs, [*argv, *STRATEGIES.get(before, ())], stop=stop)
    assert [answer["code"] for answer in answers] == [75] * len(answers), answers[0]["err"]
    (state,) = (runs / name / stage).glob("*/state/step_00001")
    files = sorted(path.name for path in state.glob("optimizer*"))
    size = len(answers)
    parts = [f"optimizer-{rank:05d}-of-{size:05d}.safetensors" for rank in range(size)]
    assert files == (parts if before.startswith("zero") else [])
    answers = then.run(runs, [*argv, *STRATEGIES.get(after, ())])
    assert [answer["code"] for answer in answers] == [0] * len(answers), answers[0]["err"]
    assert "continued from step 1" in answers[0]["out"]
    (record,) = (runs / name / stage).glob("*/run.json")
    require_same_run(alone(stage).folder, record.parent)
