"""Checkpoints that continue a run exactly: all that one step leaves for the next, as safetensors and JSON.

    found = checkpoint.newest(context)
    if found.step: put_back(found.tree, ...)
    with context.log(stage, steps, SHOW, found) as log, Keeper(context, steps, log, snapshot) as keeper:
        for step in range(found.step + 1, steps + 1):
            ...
            keeper.after(step)

No pickle: a checkpoint runs no code when it is read. Logged numbers reach the tracker when the checkpoint that has
them is on the disk, so that no step is there twice.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.errors import Interrupted, Pruned
from rlhf_exp.stages import signals
from rlhf_exp.store import states
from rlhf_exp.strategies import moments
from rlhf_exp.sweeps import pruning
from rlhf_exp.tracking import RunLog

if TYPE_CHECKING:
    from rlhf_exp.stages.context import Context

FORMAT = 1
SHARD = "shard"  # in a tree: what this rank alone has
TENSORS, NUMBERS = "tensors.safetensors", "state.json"
SHARE = 0.02  # of the time that writing may take where checkpoint_every is 0

Tree = Any  # dicts, lists and tuples of tensors, numbers, texts, booleans and None


@dataclass
class Checkpoint:
    """Where a run goes on: after `step`; 0: it begins."""

    step: int
    tree: Tree
    log: dict[str, Any] | None  # RunLog.position; None: no log yet


def newest(context: Context) -> Checkpoint:
    """The latest sound checkpoint; says which ones are not, and where the run goes on."""
    if distributed.world_size() == 1:
        return _newest(context)
    found: list[Checkpoint] = []
    step = distributed.from_main(lambda: found.append(_newest(context)) or found[0].step)
    if found:
        return found[0]
    tree = read(states.place(context.folder.path, step))[0] if step else None
    return Checkpoint(step, tree, None)  # rank 0 has the log


def _newest(context: Context) -> Checkpoint:
    run = context.folder
    name = f"{run.stage} {run.short}"
    latest = max(states.steps(run.path), default=0)
    for step in states.steps(run.path):
        wrong = states.problem(run.path, step)
        if wrong is None:
            tree, header = read(states.place(run.path, step))
            wrong = _unusable(header, run.path)
        if wrong is None:
            print(f"{name}: continued from step {step}", flush=True)
            # an attempt that was further has told the tracker so far
            return Checkpoint(step, tree, {**header["log"], "tracked": max(header["log"]["tracked"], latest)})
        print(f"{name}: the checkpoint of step {step} is left out: {wrong}", flush=True)
    if latest:
        print(f"{name}: no checkpoint is sound, so it begins again", flush=True)
        return Checkpoint(0, None, RunLog.beginning(tracked=latest))
    return Checkpoint(0, None, None)


def _unusable(header: dict[str, Any], run: Path) -> str | None:
    if header.get("format") != FORMAT:
        return f"it has format {header.get('format')}, this version reads {FORMAT}"
    for name, size in header["log"]["bytes"].items():
        there = (run / name).stat().st_size if (run / name).exists() else 0
        if there < size:
            return f"{name} has {there} bytes of the {size} that it had then"
    return None


class Keeper:
    """Saves the run when it is due and when a signal asks; a context manager around the steps."""

    def __init__(self, context: Context, steps: int, log: RunLog, snapshot: Callable[[], Tree]):
        """snapshot: all that the next step needs, beside the random generators and the log's position."""
        self.context, self.steps, self.log, self.snapshot = context, steps, log, snapshot
        self._saved_at, self._cost = time.monotonic(), 0.0
        self._inside = ExitStack()

    def __enter__(self) -> Keeper:
        self._inside.enter_context(signals.deferred())
        return self

    def __exit__(self, *exception: object) -> None:
        self._inside.close()

    def after(self, step: int, last: bool = False) -> None:
        """Save if it is time; last: no step follows.

        Raises Interrupted, after saving, where a signal has come, and Pruned where a sweep's trial is to end here.
        """
        why = pruning.after(step, self.log.latest) if distributed.is_main() else None
        name, due, why = _agreed(signals.asked(), self._due(step), why)
        last = last or step == self.steps
        if name or last or due or why:
            began = time.monotonic()
            tree = self.snapshot()  # on every rank: the optimiser's state may be spread over them
            save(self.context, step, tree, self.log.position())
            self.log.commit()
            distributed.barrier()
            self._saved_at = time.monotonic()
            self._cost = self._saved_at - began
        if name:
            raise Interrupted(f"stopped by {name} at step {step}; the same command continues")
        if why and not last:
            raise Pruned(f"step {step}: {why}")

    def _due(self, step: int) -> bool:
        if step == self.steps:
            return True
        if every := self.context.checkpoint_every:
            return step % every == 0
        return (time.monotonic() - self._saved_at) * SHARE >= self._cost


def _agreed(name: str | None, due: bool, why: str | None) -> tuple[str | None, bool, str | None]:
    """Whether any rank was asked to stop, by which signal; whether rank 0 finds it time to save, or to end early."""
    said = distributed.gather((name, due, why))
    return next((asked for asked, *_ in said if asked), None), *said[0][1:]


# ---------------------------------------------------------------- what is saved


def state_of(
    parameters: Mapping[str, Sequence[Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, Tree]:
    """What every training has."""
    found = {
        "parameters": {name: list(group) for name, group in parameters.items()},
        "scheduler": scheduler.state_dict(),
    }
    if hasattr(optimizer, "shard"):  # each rank has a part of the moments
        return found | {"optimizer": optimizer.described(), SHARD: optimizer.shard()}
    return found | {"optimizer": optimizer.state_dict()}


@torch.no_grad()
def put_back(
    tree: dict[str, Tree],
    parameters: Mapping[str, Sequence[Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """What `state_of` saw, bit for bit; and the random generators."""
    for name, group in parameters.items():
        for parameter, value in zip(group, tree["parameters"][name], strict=True):
            parameter.copy_(value)
    optimizer.load_state_dict(tree["optimizer"])
    scheduler.load_state_dict(tree["scheduler"])
    set_random_state(tree["random"])


def random_state() -> dict[str, Tree]:
    """The global generators of torch (every CUDA device too), numpy and Python."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Tree]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


# ---------------------------------------------------------------- files


def save(context: Context, step: int, tree: dict[str, Tree], log: dict[str, Any]) -> None:
    """Write the checkpoint of `step`: rank 0, and beside it each rank its part where the moments are in shards."""
    shard, there = tree.pop(SHARD, None), Path()
    if not distributed.is_main():
        if shard is not None:
            there = distributed.from_main(lambda: there)
            moments.write(there, distributed.rank(), distributed.world_size(), shard)
            distributed.barrier()
        return
    with states.new(context.folder.path, step) as folder:
        write(folder, tree | {"random": random_state()}, {"format": FORMAT, "step": step, "log": log})
        if shard is not None:
            distributed.from_main(lambda: folder.absolute())
            moments.write(folder, 0, distributed.world_size(), shard)
            distributed.barrier()


def write(folder: Path, tree: Tree, header: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    numbers = _to_json(tree, tensors)
    save_file(tensors, folder / TENSORS)
    (folder / NUMBERS).write_text(json.dumps(header | {"tree": numbers}), encoding="utf-8")


def read(folder: Path) -> tuple[Tree, dict[str, Any]]:
    """The tree, its tensors on the CPU, and the header."""
    from safetensors.torch import load_file

    header = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
    tree = _from_json(header.pop("tree"), load_file(folder / TENSORS))
    if shards := moments.read(folder):
        tree["optimizer"] = moments.join(tree["optimizer"], shards)
    return tree, header


def _to_json(tree: Tree, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON; its tensors go to `tensors`. What JSON has no word for is {"$word": ...}."""
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree.detach().cpu().contiguous()
        return {"$tensor": name}
    if isinstance(tree, Mapping):
        return {"$items": [[_to_json(key, tensors), _to_json(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple):
        return {"$tuple": [_to_json(item, tensors) for item in tree]}
    if isinstance(tree, list):
        return [_to_json(item, tensors) for item in tree]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{type(tree).__name__} has no place in a checkpoint")


def _from_json(found: Any, tensors: Mapping[str, Tensor]) -> Tree:
    if isinstance(found, list):
        return [_from_json(item, tensors) for item in found]
    if not isinstance(found, dict):
        return found
    ((word, content),) = found.items()
    if word == "$tensor":
        return tensors[content]
    if word == "$tuple":
        return tuple(_from_json(item, tensors) for item in content)
    return {_from_json(key, tensors): _from_json(value, tensors) for key, value in content}
