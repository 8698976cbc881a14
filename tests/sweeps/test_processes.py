"""Many processes at once on one store and one MLflow database that is not there yet."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from rlhf_exp import compose
from rlhf_exp.paths import conf_dir
from rlhf_exp.sweeps import folder, ledger, trial

WORDS = ("model=tiny", "model.dtype=float32", "threads=1", "train.steps=3")
SIZE = ("train.batch_size=2", "train.micro_batch_size=2")
SFT = "upstream.sft={train: {steps: 2, batch_size: 2, micro_batch_size: 2}}"
LOADED = [
    *("rlhf_exp.stages.pipeline", "rlhf_exp.stages.sft", "rlhf_exp.stages.direct", "rlhf_exp.model.base"),
    *("transformers.models.llama.modeling_llama", "peft", "mlflow.store.tracking.sqlalchemy_store"),
]


def frozen(count: int, place: Path, *words: str) -> list[Path]:
    """`count` trials of one sweep, two of each learning rate."""
    folder.create(place, [], conf=conf_dir())
    found = []
    for number in range(count):
        lr = f"optim.lr={(number // 2 + 1) / 1e4}"
        lines = [*words, *WORDS, *SIZE, lr, f"output_dir={place.parent / 'outputs'}"]
        config, choices = compose.compose(lines)
        found.append(trial.write(place / str(number), number, lines, config, choices))
    return found


def settled(place: Path, count: int, steps: dict[str, int]) -> None:
    """Every trial went to its end at the first attempt, no run was made twice, and MLflow has every metric."""
    states = ledger.states(place)
    assert [state.status for state in states.values()] == ["done"] * count
    assert [state.attempts for state in states.values()] == [1] * count

    output = place.parent / "outputs"
    runs = {stage: [p for p in (output / stage).iterdir() if p.name[0] != "."] for stage in steps}
    *upstream, last = steps
    expected = dict.fromkeys(upstream, 1) | {last: (count + 1) // 2}
    assert {stage: len(found) for stage, found in runs.items()} == expected
    with closing(sqlite3.connect(output / "mlflow.db")) as database:
        assert {status for (status,) in database.execute("SELECT status FROM runs")} == {"FINISHED"}
        (experiments,) = database.execute(
            "SELECT COUNT(*) FROM experiments WHERE name = 'rlhf_exp'"
        ).fetchone()
        tags = dict.fromkeys([run for (run,) in database.execute("SELECT run_uuid FROM runs")])
        for run in tags:
            rows = database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run,))
            tags[run] = dict(rows.fetchall())
        # the folder of a command's run, whose children those of its stages are, is the store
        of_stage = {run: found for run, found in tags.items() if found["folder"] != str(output)}
        assert experiments == 1
        assert Counter(found["stage"] for found in of_stage.values()) == expected
        for run, found in of_stage.items():
            lines = (Path(found["folder"]) / "metrics.jsonl").read_text().splitlines()
            wanted = [(row["step"], row["train/loss"]) for row in map(json.loads, lines)]
            losses = "SELECT step, value FROM metrics WHERE key = 'train/loss' AND run_uuid = ? ORDER BY step"
            assert database.execute(losses, (run,)).fetchall() == wanted
            assert len(wanted) == steps[found["stage"]]


# ---------------------------------------------------------------- processes


def process(place: Path, home: str) -> None:
    """Run a trial in a fresh process; what it prints is beside it."""
    os.chdir(home)
    with (place / "log.txt").open("w") as log:
        sys.stdout = sys.stderr = log
        trial.run(place)


def together(places: list[Path]) -> None:
    """A process for each, started in the same moment by one that has loaded all they need, as that takes longest."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    running = [context.Process(target=process, args=(place, os.getcwd())) for place in places]
    for one in running:
        one.start()
    for one in running:
        one.join()
    said = {place.name: (place / "log.txt").read_text() for place in places}
    assert [one.exitcode for one in running] == [0] * len(places), said
    assert not any("tracking:" in text for text in said.values()), said  # nothing was late, refused or lost


@pytest.mark.timeout(300)  # seconds on a quiet machine
def test_three_processes(tmp_path, tiny_path):
    together(frozen(3, tmp_path / "sweep", "stage=sft"))
    settled(tmp_path / "sweep", 3, {"sft": 3})


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_sixteen_processes(tmp_path, tiny_path):
    """One SFT for all, two trials of each of eight learning rates, and all write into the same new database."""
    together(frozen(16, tmp_path / "sweep", "stage=dpo", SFT))
    settled(tmp_path / "sweep", 16, {"sft": 2, "dpo": 3})
