"""Prunes trials while they run: a thread of the sweeper looks into their folders.

A trial appends its values to a file in its folder and looks for the word to stop beside it (rlhf_exp.sweeps.pruning).
So the study is opened by one process only: sqlite is not made for many writers, still less on a network's disk, and a
node of a cluster needs neither optuna nor the database. The thread works with every launcher, also with one that runs
the trial in this very process; the price is that the word comes a step or two late.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import optuna
from hydra_plugins.rlhf_optuna._study import Asked, Study

from rlhf_exp.sweeps import pruning


@contextmanager
def watching(study: Study, batch: Sequence[Asked], seconds: float) -> Iterator[None]:
    """While the block runs, and once more at its end, hear the batch's values and ask hopeless trials to stop."""
    if len(study.objectives) > 1 or isinstance(study.study.pruner, optuna.pruners.NopPruner):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_loop, args=(study, batch, seconds, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for asked in batch:
            hear(study, asked, ended=True)


def _loop(study: Study, batch: Sequence[Asked], seconds: float, done: threading.Event) -> None:
    said = False
    while not done.wait(seconds):
        for asked in batch:
            try:
                hear(study, asked)
            except Exception as error:  # a database that is locked, a full disk: the trials go on
                if not said:
                    print(
                        f"pruning: {type(error).__name__}: {error}; tried again", file=sys.stderr, flush=True
                    )
                said = True


def hear(study: Study, asked: Asked, ended: bool = False) -> None:
    """Report a trial's new values, each followed by the pruner's verdict on it; ended: too late to stop it."""
    folder = study.sweep / str(asked.number)
    known = study.study._storage.get_trial(asked.trial._trial_id).intermediate_values
    for step, value in pruning.values(folder).items():
        if step in known:  # also of an attempt before this one
            continue
        asked.trial.report(value, step)
        if asked.trial.should_prune() and not ended and pruning.asked(folder) is None:
            kind = type(study.study.pruner).__name__.removesuffix("Pruner")
            pruning.prune(folder, f"pruned at step {step}: {value:g} ({kind})")
