"""Who this process is among the ranks, by what its starter says in the environment."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from rlhf_exp.errors import InputError

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# taken out of the environment by `start`: a library that finds one of them would divide the work a second time
# (RANK stays: it says who may write, also to what is not asked here)
TAKEN = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
TAKEN += tuple(
    f"{start}_{end}"
    for start in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD", "MPI")
    for end in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCALRANKID", "LOCALNRANKS")
)


class Place(NamedTuple):
    """Where this process stands among the ranks."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among those of its machine: which device is its own


ALONE = Place()
_place: Place | None = None  # once read
_taken: dict[str, str] = {}


def place() -> Place:
    """Who this process is. Raises InputError for an environment that names a rank and leaves out the rest."""
    global _place
    if _place is None:
        _place = ALONE  # also where the next line raises: somebody has to say so
        _place = _read(os.environ)
    return _place


def _read(environment: Mapping[str, str]) -> Place:
    if environment.get("WORLD_SIZE", "1") == "1":
        return ALONE
    lacking = [name for name in NEEDED if not environment.get(name)]
    if lacking:
        raise InputError(
            f"the environment says WORLD_SIZE={environment['WORLD_SIZE']}, but not {', '.join(lacking)}: start the "
            "ranks with torchrun or hydra/launcher=slurm"
        )
    if environment["MASTER_PORT"] == "0":
        raise InputError(
            "MASTER_PORT=0 is no port that ranks could meet at: torchrun --standalone finds a free one"
        )
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK") or rank)
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {error}") from error
    if not 0 <= rank < size:
        raise InputError(f"RANK={rank} is not one of WORLD_SIZE={size} ranks, which count from 0")
    return Place(rank, size, local)


def rank() -> int:
    return place().rank


def world_size() -> int:
    return place().size


def is_main() -> bool:
    """Whether this is rank 0, which alone writes files, and talks to MLflow and to people."""
    return place().rank == 0


def on_this_machine() -> int:
    """How many of the ranks share this machine: as the starter says, else all of them."""
    said = _taken.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or ""
    return min(int(said), world_size()) if said.isdecimal() and int(said) else world_size()


def name() -> str:
    """Of this rank, for people."""
    return f"rank {rank()} on {socket.gethostname()}"


def take() -> None:
    """Out of the environment, what would have a library divide the work again."""
    place()
    _taken.update({key: os.environ.pop(key) for key in TAKEN if key in os.environ})


@contextmanager
def environment() -> Iterator[None]:
    """The variables as the launcher gave them, for a library that wants to read them."""
    given = {"RANK": str(rank()), "WORLD_SIZE": str(world_size()), "LOCAL_RANK": str(place().local)}
    given |= _taken
    for key, alone in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        given[key] = os.environ.get(key, alone)
    before = {key: os.environ.get(key) for key in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
