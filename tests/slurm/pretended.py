"""In the place of rlhf_exp/stages/pipeline.py in a sweep's frozen code: 'trains' without a model, in no time.

What it does is said by run_name: `steps=20,pause=0.1,raises=3`, or `meet=4`. Each step's result follows from the one
before, so that a run that was interrupted and continued ends as one that was not, or is found out. steps.txt has a
line for each step that was done: a step that is there twice was trained twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from rlhf_exp.errors import Interrupted
from rlhf_exp.stages import signals
from rlhf_exp.sweeps import current

OBJECTIVES = ("objective",)


def run(config: Any, choices: dict[str, str]) -> float:
    plan = {name: float(value) for name, value in (part.split("=") for part in config.run_name.split(","))}
    if plan.get("meet"):
        return meet(int(plan["meet"]))
    return train(Path(config.output_dir) / str(current.trial().number), plan)


def train(folder: Path, plan: dict[str, float]) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "state.json"
    state = json.loads(file.read_text()) if file.exists() else {"step": 0, "digest": ""}
    with signals.listening(), signals.deferred():
        while state["step"] < plan["steps"]:
            time.sleep(plan.get("pause", 0))
            state = after(state)
            if state["step"] == plan.get("raises"):
                raise RuntimeError("the loss is not a number")
            with (folder / "steps.txt").open("a") as steps:
                steps.write(f"{state['step']} {os.getpid()}\n")
            (folder / "new").write_text(json.dumps(state))
            (folder / "new").replace(file)
            if name := signals.asked():
                raise Interrupted(f"stopped by {name} at step {state['step']}; the same command continues")
    return float(state["step"])


def after(state: dict[str, Any]) -> dict[str, Any]:
    """The next state."""
    step = state["step"] + 1
    return {"step": step, "digest": hashlib.sha256(f"{state['digest']}{step}".encode()).hexdigest()}


def meet(size: int) -> float:
    """All ranks add up 1, 2, 3 ...; each one writes who it is."""
    from rlhf_exp import distributed

    here = current.trial().folder
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with distributed.environment():
        given = {name: os.environ.get(name) for name in names}
    assert distributed.world_size() == size
    distributed.start()
    total = distributed.add({"ranks": distributed.rank() + 1})["ranks"]
    found = {**given, "sum": total, "node": os.environ["SLURMD_NODENAME"]}
    (here / f"rank{distributed.rank()}.json").write_text(json.dumps(found))
    return total
