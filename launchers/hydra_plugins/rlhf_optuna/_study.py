"""The study: an sqlite file in the sweep's folder, which says at any moment what was asked and what came of it.

A trial is RUNNING from the moment it is asked for until its result is told. If the process is killed in between, the
next one finds it RUNNING: with a result in the ledger it is told now; otherwise it is launched again under the same
number and with the same overrides, so that its folder, and what its stages saved, are found again. Nothing is
enqueued twice, no number is used twice.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import optuna
import sqlalchemy
from hydra_plugins.rlhf_optuna import _outcome, _samplers
from hydra_plugins.rlhf_optuna._outcome import Verdict
from hydra_plugins.rlhf_optuna._space import Space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from rlhf_exp.errors import InputError
from rlhf_exp.store.frozen import with_password, without_password
from rlhf_exp.store.preflight import require_writable
from rlhf_exp.sweeps.passwords import STORAGE

FILE = "study.db"
# what we note of a trial, and of the study
NUMBER, OVERRIDES, SWEEP, REASON, SEED = "number", "overrides", "sweep", "reason", "seed"
# of a database: a driver that is missing, a URL with a mistake, a server that is away, a study of another optuna
TROUBLE = (
    sqlalchemy.exc.SQLAlchemyError,
    optuna.exceptions.OptunaError,
    ImportError,
    ValueError,
    RuntimeError,
)
WAIT_SECONDS = 60  # for another process's lock on the database


@dataclass
class Asked:
    """A trial to be launched as number `number` of the sweep."""

    number: int
    trial: Trial
    overrides: list[str]


class Study:
    """sampler, pruner: their config. A study of another space or other objectives is an InputError."""

    def __init__(
        self,
        sweep: Path,
        space: Space,
        directions: Sequence[str],
        *,
        objectives: Sequence[str] = (_outcome.OBJECTIVE,),
        sampler: Mapping[str, Any],
        pruner: Mapping[str, Any],
        storage: str | None = None,
        name: str | None = None,
    ):
        self.sweep, self.space, self.objectives = Path(sweep).absolute(), space, list(objectives)
        self._sampler = dict(sampler)
        self._own = storage is None  # every trial in it is of this sweep
        self.storage = storage or f"sqlite:///{self.sweep / FILE}"  # without a password
        own_sampler, own_pruner = _samplers.sampler(sampler, space, 0, 0), _samplers.pruner(pruner)
        with _explained(self.storage):
            self.study = optuna.create_study(
                study_name=name or self.sweep.name,
                storage=_open(self.storage),
                sampler=own_sampler,
                pruner=own_pruner,
                directions=list(directions),
                load_if_exists=True,
            )
        self._check(directions)
        given = sampler.get(_samplers.SEED)
        if SEED not in self.study.user_attrs:
            self.study.set_user_attr(SEED, secrets.randbits(31) if given is None else int(given))
        self.seed: int = self.study.user_attrs[SEED]

    def _check(self, directions: Sequence[str]) -> None:
        """That an earlier study is this one."""
        known = [direction.name.lower() for direction in self.study.directions]
        earlier = self.study.user_attrs.get("objectives", self.objectives)
        if known != list(directions) or earlier != self.objectives:
            raise InputError(
                f"the study in {self.storage} has the objectives {_said(earlier, known)}, not "
                f"{_said(self.objectives, directions)}: choose another hydra.sweep.dir or study_name"
            )
        self.study.set_user_attr("objectives", self.objectives)

    # ------------------------------------------------------------ trials

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials of this sweep, by their numbers in it; of these states, all without any."""
        found = [one for one in self.study.get_trials(deepcopy=False) if self._is_ours(one)]
        found = [one for one in found if not states or one.state in states]
        return sorted(found, key=self.number)

    def _is_ours(self, trial: FrozenTrial) -> bool:
        return self._own or trial.user_attrs.get(SWEEP) == str(self.sweep)

    def number(self, trial: FrozenTrial) -> int:
        """The trial's number in the sweep: that of the study, unless sweeps share it."""
        return trial.number if self._own else trial.user_attrs[NUMBER]

    def batch(self, size: int, n_trials: int) -> list[Asked]:
        """What to launch next: what was interrupted, then new ones, until the sweep has n_trials. [] at its end."""
        running = self.trials(TrialState.RUNNING)[:size]
        found = [self._again(trial) for trial in running]
        known = self.trials()
        upcoming = 1 + max(map(self.number, known), default=-1)
        for number in range(upcoming, min(n_trials, upcoming + size - len(found))):
            found.append(self._new(number))
        return found

    def _again(self, frozen: FrozenTrial) -> Asked:
        """A trial that was asked for by a process that is no more."""
        number = self.number(frozen)
        self._seat(number)
        trial = Trial(self.study, frozen._trial_id)
        overrides = frozen.user_attrs.get(OVERRIDES)
        return Asked(number, trial, list(overrides) if overrides else self._suggest(trial, number))

    def _new(self, number: int) -> Asked:
        self._seat(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.study.ask()
        if self._own:
            number = trial.number  # another one if somebody has enqueued a trial
        return Asked(number, trial, self._suggest(trial, number))

    def _seat(self, number: int) -> None:
        """The sampler of a trial. Sweeps that share a study draw apart, whatever their seed."""
        apart = () if self._own else (crc32(str(self.sweep).encode()),)
        self.study.sampler = _samplers.sampler(self._sampler, self.space, self.seed, number, *apart)

    def _suggest(self, trial: Trial, number: int) -> list[str]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                params = {
                    key: trial._suggest(key, one.distribution) for key, one in self.space.searched.items()
                }
        except ValueError as error:  # optuna's word for a choice that has other values than before
            raise InputError(
                f"the study in {self.storage} has another search space ({error}): choose another hydra.sweep.dir"
            ) from None
        overrides = self.space.overrides(params)
        if not self._own:
            trial.set_user_attr(SWEEP, str(self.sweep))
            trial.set_user_attr(NUMBER, number)
        trial.set_user_attr(OVERRIDES, overrides)  # last: without it the trial has not been launched
        return overrides

    # ------------------------------------------------------------ results

    def settle(self, trial: Trial | FrozenTrial, verdict: Verdict) -> None:
        """Tell how a trial ended; of one that is not over nothing is told, and what was told before stays."""
        if verdict.state is None:
            return
        try:
            if verdict.reason:
                self.study._storage.set_trial_user_attr(trial._trial_id, REASON, verdict.reason)
            self.study.tell(trial.number, verdict.values, state=verdict.state, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return
        except RuntimeError as error:
            # the grid's end: optuna says it by Study.stop, which is for its own loop; the trial has been told
            if "Study.stop" not in str(error):
                raise

    def settle_ended(self) -> None:
        """Tell what the ledger knows of trials whose results a killed process could not tell any more."""
        for trial in self.trials(TrialState.RUNNING):
            if found := _outcome.of_ledger(self.sweep, self.number(trial), self.objectives):
                self.settle(trial, found)

    def best(self) -> list[FrozenTrial]:
        """Of one objective: complete trials, the best first (equal ones by number). Of several: the Pareto front."""
        complete = self.trials(TrialState.COMPLETE)
        signs = [-1.0 if one == StudyDirection.MAXIMIZE else 1.0 for one in self.study.directions]
        losses = {one.number: [s * v for s, v in zip(signs, one.values, strict=True)] for one in complete}
        if len(signs) > 1:
            complete = [
                one
                for one in complete
                if not any(_dominates(losses[other.number], losses[one.number]) for other in complete)
            ]
        return sorted(complete, key=lambda one: (losses[one.number], one.number))


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether `first` is nowhere worse than `second` and somewhere better; less is better."""
    return all(a <= b for a, b in zip(first, second, strict=True)) and list(first) != list(second)


def check_storage(url: str) -> None:
    """That a database can be opened; nothing is made in it. Raises InputError."""
    with _explained(url):
        place = sqlalchemy.make_url(with_password(url, "hydra.sweeper.storage", STORAGE))
        file = place.database if place.get_backend_name() == "sqlite" else None
        if file and file != ":memory:" and not file.startswith("file:") and not os.path.lexists(file):
            above = Path(file).absolute().parent
            if not above.is_dir():
                raise InputError(f"hydra.sweeper.storage={url} cannot be opened: there is no folder {above}")
            require_writable(above, "hydra.sweeper.storage")
            return  # to connect would make it
        engine = sqlalchemy.create_engine(place, poolclass=sqlalchemy.pool.NullPool)
        with engine.connect() as connection:
            sqlalchemy.inspect(connection).get_table_names()


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """What goes wrong with a database, in a line without its password."""
    try:
        yield
    except TROUBLE as error:
        said = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        line = f"hydra.sweeper.storage={url} cannot be opened: {said}"
        raise InputError(without_password(line)) from None


def _open(url: str) -> Any:
    url = with_password(url, "hydra.sweeper.storage", STORAGE)
    if not url.startswith("sqlite"):
        return url
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": WAIT_SECONDS}})


def _said(objectives: Sequence[str], directions: Sequence[str]) -> str:
    return ", ".join(f"{name} ({way})" for name, way in zip(objectives, directions, strict=False))
