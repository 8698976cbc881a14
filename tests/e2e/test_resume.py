"""Runs that are killed anywhere and started again end exactly like the one that nobody touched."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("kill_driver.py")
COMMON = ("model=tiny", "dataset=reviews", "model.dtype=float32", "threads=1", "checkpoint_every=1")
LORA = ("lora.r=4", "lora.dropout=0.1")
TRAIN = "train={steps: 6, batch_size: 8, micro_batch_size: 4}"
STAGES = {
    # everything with a state: adaptive KL, running moments, an average, a critic of its own, demonstrations
    "ppo": (
        *(
            "stage=ppo",
            "adapters.sft=base",
            "reward_source=length",
            "lora.r=4",
            "generation.max_new_tokens=6",
        ),
        "ppo={steps: 6, batch_size: 4, epochs: 2, minibatches: 2, micro_batch_size: 2, save_every: 2, "
        "critic: own, ema_decay: .9, kl_control: adaptive, score_scaling: running, ptx_coef: .1}",
    ),
    "sft": ("stage=sft", *LORA, TRAIN),
    # 40 pairs: an epoch ends within the run
    "reward": ("stage=reward", *LORA, TRAIN, "dataset.limit=40"),
    "full": ("stage=sft", "lora=full", "train={steps: 3, batch_size: 4, micro_batch_size: 4}"),
    # 20 pairs: the last batch of an epoch is a small one
    "dpo": ("stage=dpo", "adapters.sft=base", *LORA, TRAIN, "dataset.limit=20"),
    "kto": ("stage=kto", "adapters.sft=base", *LORA, TRAIN, "dataset.limit=20"),
    # two rounds of one part each: killed while it samples and while it learns
    "rft": (
        *(
            "stage=rft",
            "adapters.sft=base",
            "reward_source=length",
            "lora.r=4",
            "generation.max_new_tokens=4",
        ),
        *(
            "rft={samples: 3, prompts: 6, rounds: 2, pool: union}",
            "train={epochs: 1, batch_size: 4, micro_batch_size: 2}",
        ),
    ),
    "ilql": (
        *("stage=ilql", "adapters.sft=base", "reward_source=length", "lora.r=4", TRAIN),
        *("ilql={betas: [1], eval_prompts: 2}", "generation.max_new_tokens=4"),
    ),
}
POINTS = {"ppo": 20, "sft": 6, "reward": 6, "full": 3, "rft": 6, "ilql": 5, "dpo": 3, "kto": 3}
KINDS = ("rollout", "scoring", "update", "log", "mlflow", "disk")
CLOCK = ("time/", "tokens_per_second")


class Driver:
    """A process that has imported everything and forks a child for each command line."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def __call__(self, jobs: list[list]) -> list[int]:
        """Exit codes of the jobs, in order; negative: the signal that ended it."""
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def drive() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.process.stdin.close()
    driver.process.wait()


def clockless(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.startswith(CLOCK)}


def history(output: Path) -> list[tuple]:
    """Every number in MLflow's database, with its step and its place in time; of a clock's only that it is there."""
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        rows = database.execute(
            "SELECT r.name, m.key, m.step, m.timestamp - r.start_time, m.value, m.is_nan "
            "FROM metrics m JOIN runs r ON r.run_uuid = m.run_uuid"
        ).fetchall()
    return sorted((*row[:4], *(() if row[1].startswith(CLOCK) else row[4:])) for row in rows)


def runs(output: Path) -> list[tuple]:
    """Name, status, parent and number of parameters of every MLflow run."""
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        return sorted(
            database.execute(
                "SELECT r.name, r.status, (SELECT p.name FROM runs p JOIN tags t ON t.value = p.run_uuid WHERE "
                "t.run_uuid = r.run_uuid AND t.key = 'mlflow.parentRunId'), (SELECT COUNT(*) FROM params p WHERE "
                "p.run_uuid = r.run_uuid) FROM runs r"
            ).fetchall(),
            key=str,
        )


def outcome(output: Path) -> dict:
    """All that a run leaves and that no clock decides."""
    found: dict = {"history": history(output), "runs": runs(output)}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.suffix == ".safetensors" or path.name in ("samples.jsonl", "guards.jsonl", "best.json"):
            if "mlartifacts" not in name:
                found[name] = path.read_bytes()
        elif path.name == "metrics.jsonl":
            found[name] = [clockless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            found[name] = [record[part] for part in ("status", "error", "metrics", "tracked")]
        elif path.name == "state":
            found[name] = "there"
    return found


def points(events: list[str], number: int, seed: int) -> list[int]:
    """Places at random, some of each kind of event."""
    drawn = random.Random(seed)
    by_kind = [[i for i, event in enumerate(events) if event == kind] for kind in KINDS]
    for places in by_kind:
        drawn.shuffle(places)
    found: list[int] = []
    while len(found) < number and any(by_kind):
        found += [places.pop() for places in by_kind if places]
    return found[:number]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rlhf_exp.tracking import location

    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    with location.calling(location.sqlite_uri(path), {}), location.locked_database(path):
        pass
    return path


class Stage:
    """A stage's uninterrupted run, and what becomes of interrupted ones."""

    def __init__(
        self, name: str, folder: Path, database: Path, drive: Driver, words: tuple[str, ...] | None = None
    ):
        self.name, self.folder, self.database, self.drive = name, folder, database, drive
        self.words = [*(words or STAGES[name]), *COMMON]
        self.jobs: list[list] = []

    def job(self, output: str, kill: int | None = None, number: int | None = None, *more: str) -> list:
        log = self.folder / f"{output}.log"
        return [str(log), kill, number, *self.words, f"output_dir={self.folder / output}", *more]

    def prepare(self, *outputs: str) -> None:
        """MLflow's database, which takes 2 s to make, made before."""
        for output in outputs:
            (self.folder / output).mkdir()
            shutil.copy(self.database, self.folder / output / "mlflow.db")

    def reference(self) -> dict:
        self.prepare("whole")
        assert self.drive([self.job("whole")]) == [0], (self.folder / "whole.log").read_text()
        self.events = json.loads((self.folder / "whole.events").read_text())
        return outcome(self.folder / "whole")

    def log(self, output: str) -> str:
        return (self.folder / f"{output}.log").read_text()


def differences(ours: dict, theirs: dict) -> list[str]:
    return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_killed_anywhere_and_continued_it_ends_as_the_whole_run(name, tmp_path, database, drive):
    stage = Stage(name, tmp_path, database, drive)
    whole = stage.reference()
    kills = points(stage.events, POINTS[name], seed=len(name))
    stage.prepare(*(f"at{kill}" for kill in kills))
    jobs = []
    for kill in kills:
        jobs += [stage.job(f"at{kill}", kill), stage.job(f"at{kill}")]
    codes = drive(jobs)
    assert codes == [-signal.SIGKILL, 0] * len(kills), [stage.log(f"at{kill}")[-2000:] for kill in kills]
    wrong = {
        (kill, stage.events[kill]): different
        for kill in kills
        if (different := differences(outcome(tmp_path / f"at{kill}"), whole))
    }
    assert wrong == {}
    assert any("continued from step" in stage.log(f"at{kill}") for kill in kills)
    assert not any("state" in part for part in whole)


# ---------------------------------------------------------------- several stages


@pytest.mark.long
def test_the_run_that_joins_the_stages_goes_on_too(tmp_path, database, drive):
    """Killed in sft, in ppo, while one ends and the other begins, and at the very end: one parent, two children."""
    words = (
        "stage=ppo",
        *STAGES["ppo"][2:],
        "upstream.sft={train: {steps: 2, batch_size: 4}}",
        "ppo.steps=2",
    )
    stage = Stage("both", tmp_path, database, drive, words)
    whole = stage.reference()
    assert [(status, parent) for _, status, parent, _ in whole["runs"]].count(("FINISHED", None)) == 1
    ends = [i for i, kind in enumerate(stage.events) if kind == "mlflow"]
    last = (ends[-1], ends[-2], ends[-1] - 1, len(stage.events) - 1)
    kills = sorted({*points(stage.events, 3, seed=1), *last})
    stage.prepare(*(f"at{kill}" for kill in kills))
    jobs = [job for kill in kills for job in (stage.job(f"at{kill}", kill), stage.job(f"at{kill}"))]
    assert drive(jobs) == [-signal.SIGKILL, 0] * len(kills)
    wrong = {(k, stage.events[k]): differences(outcome(tmp_path / f"at{k}"), whole) for k in kills}
    assert not any(wrong.values()), wrong


# ---------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, database: Path, drive: Driver) -> tuple[Stage, dict]:
    stage = Stage("sft", tmp_path_factory.mktemp("sft"), database, drive)
    return stage, stage.reference()


def at_step(stage: Stage, step: int) -> int:
    """The event in which this step's line is written: the first of its kind, `log`, after the one before."""
    # step, position and commit, for each of the steps
    return [i for i, kind in enumerate(stage.events) if kind == "log"][3 * (step - 1)]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGUSR1, signal.SIGINT)),
    ],
)
def test_a_signal_saves_and_says_so(sft, drive, number):
    stage, whole = sft
    stage.prepare(f"by{number}")
    jobs = [stage.job(f"by{number}", at_step(stage, 3), number)]
    assert drive(jobs) == [75]
    name = signal.Signals(number).name
    said = f"stopped by {name} at step 3; the same command continues"
    assert stage.log(f"by{number}").splitlines()[-1] == said
    (record,) = (stage.folder / f"by{number}").glob("sft/*/run.json")
    found = json.loads(record.read_text())
    assert (found["status"], found["error"]) == ("KILLED", said)
    assert [run[1] for run in runs(stage.folder / f"by{number}")] == ["KILLED"]
    assert drive([stage.job(f"by{number}")]) == [0]
    assert "continued from step 3" in stage.log(f"by{number}")
    assert differences(outcome(stage.folder / f"by{number}"), whole) == []


def test_a_signal_outside_of_the_steps_stops_at_once(sft, drive):
    stage, whole = sft
    stage.prepare("early")
    first = stage.events.index("mlflow")
    assert first < at_step(stage, 1)
    early = stage.job("early", first, signal.SIGTERM)
    assert drive([early, stage.job("early")]) == [75, 0]
    assert "stopped by SIGTERM at once; the same command continues" in stage.log("early")
    assert differences(outcome(stage.folder / "early"), whole) == []


# ---------------------------------------------------------------- damaged checkpoints


def flip(folder: Path, name: str, place: float) -> None:
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content))] ^= 4
    (folder / name).write_bytes(content)


DAMAGE = {
    "a bit of the tensors": lambda folder: flip(folder, "tensors.safetensors", 0.7),
    "a bit of the numbers": lambda folder: flip(folder, "state.json", 0.5),
    "a bit of the digests": lambda folder: flip(folder, "digests.json", 0.5),
    "tensors cut": lambda folder: os.truncate(folder / "tensors.safetensors", 5000),
    "numbers missing": lambda folder: (folder / "state.json").unlink(),
    "digests empty": lambda folder: os.truncate(folder / "digests.json", 0),
}


@pytest.fixture(scope="module")
def killed(sft, drive) -> Path:
    stage, _ = sft
    stage.prepare("killed")
    assert drive([stage.job("killed", at_step(stage, 5))]) == [-signal.SIGKILL]
    return stage.folder / "killed"


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[pytest.mark.long] if i else []) for i, how in enumerate(DAMAGE)]
)
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(sft, drive, killed, how):
    stage, whole = sft
    output = stage.folder / how.replace(" ", "_")
    shutil.copytree(killed, output)
    (state,) = output.glob("sft/*/state")
    assert sorted(path.name for path in state.iterdir()) == ["step_00003", "step_00004"]
    DAMAGE[how](state / "step_00004")
    assert drive([stage.job(output.name)]) == [0]
    log = stage.log(output.name)
    assert "the checkpoint of step 4 is left out: " in log
    assert "continued from step 3" in log
    assert differences(outcome(output), whole) == []


def test_without_a_sound_checkpoint_it_begins_again(sft, drive, killed):
    stage, whole = sft
    output = stage.folder / "none"
    shutil.copytree(killed, output)
    for folder in output.glob("sft/*/state/*"):
        flip(folder, "tensors.safetensors", 0.7)
    assert drive([stage.job("none")]) == [0]
    assert "no checkpoint is sound, so it begins again" in stage.log("none")
    assert differences(outcome(output), whole) == []


@pytest.mark.long
def test_resume_never_starts_another(sft, drive, killed):
    stage, whole = sft
    output = stage.folder / "never"
    shutil.copytree(killed, output)
    assert drive([stage.job("never", None, None, "resume=never")]) == [0]
    assert len(list(output.glob("sft/*/run.json"))) == 2
    assert "continued" not in stage.log("never")
    (made,) = output.glob("sft/*-2/adapter/adapter_model.safetensors")
    (name,) = (name for name in whole if name.endswith("adapter_model.safetensors"))
    assert made.read_bytes() == whole[name]
