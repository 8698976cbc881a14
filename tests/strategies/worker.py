"""A rank that runs one command after another. All are forks of one process that has imported everything (preload.py).

Asked by a dict: cwd, argv, stop=n (this rank is asked by SIGTERM, as it seems, after step n of a stage), late
(seconds by which it is behind), gradients (a file for what every optimiser step is made of). Answers with a dict:
code, out, err, sent (travels.py).
"""

from __future__ import annotations

import atexit
import contextlib
import io
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from unittest import mock

from tests.strategies import travels


@contextlib.contextmanager
def asked_after(step: int | None) -> Iterator[None]:
    from rlhf_exp.stages import signals

    looked, real = itertools.count(1), signals.asked
    if step is None:
        yield
        return
    with mock.patch.object(signals, "asked", lambda: "SIGTERM" if next(looked) == step else real()):
        yield


@contextlib.contextmanager
def late_by(seconds: float) -> Iterator[None]:
    """This rank is behind the others wherever it writes into a run folder, and after every meeting."""
    from rlhf_exp import distributed
    from rlhf_exp.store.runs import RunFolder

    def late(function, before: bool):
        def waited(*args, **kwargs):
            time.sleep(seconds * before)
            found = function(*args, **kwargs)
            time.sleep(seconds * (not before))
            return found

        return waited

    writes = ("start", "update", "write_text", "write_json", "publish", "discard", "finish", "fail")
    with contextlib.ExitStack() as stack:
        for name in writes if seconds else ():
            stack.enter_context(
                mock.patch.object(RunFolder, name, late(getattr(RunFolder, name), before=True))
            )
        for name in ("barrier", "from_main", "agree") if seconds else ():
            meeting = late(getattr(distributed, name), before=False)
            stack.enter_context(mock.patch.object(distributed, name, meeting))
        yield


@contextlib.contextmanager
def gradients_in(file: str | None, sharded: bool) -> Iterator[None]:
    """Write the gradients with which the trained weights' optimiser is asked to step: "<step>.<weight>"."""
    if file is None:
        yield
        return
    from safetensors.torch import save_file
    from torch.optim import AdamW
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    found, steps = {}, itertools.count()

    def look(optimizer, *_):
        # the strategy's own, or torch's; not the one that DeepSpeed steps a shard with
        if type(optimizer) is not AdamW or not sharded:
            step = next(steps)
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            found.update({f"{step}.{i}": p.grad.clone() for i, p in enumerate(weights) if p.grad is not None})

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
        save_file(found, file)


def serve(link: Connection, environment: Mapping[str, str]) -> None:
    """What a rank does until its link is closed."""
    from rlhf_exp.cli import main

    os.environ.update(environment)
    # what others print must not get between the lines of pytest
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(EOFError):
        while True:
            link.send(answer(main, link.recv()))
    atexit._run_exitfuncs()  # a process of multiprocessing leaves them out


def answer(main, asked: Mapping) -> dict:
    os.chdir(asked["cwd"])
    travels.sent.clear()
    out, err = io.StringIO(), io.StringIO()
    sharded = any("strategy=zero" in word for word in asked["argv"])
    with (
        asked_after(asked["stop"]),
        late_by(asked["late"]),
        gradients_in(asked["gradients"], sharded),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(asked["argv"])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "sent": dict(travels.sent)}
