"""The ranks of one run: which of them this process is, and what they tell each other.

torchrun, or the SLURM launcher, starts the same command several times and says in the environment who is who: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A process that was started alone is rank 0 of 1: every function here
then gives its argument back, and torch.distributed is not even imported.

How work is divided is told in strategies/__init__.py. Nothing heavy is imported before `start`.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rlhf_exp.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# taken out of the environment by `start`: a library that finds one of them would divide the work a second time
# (RANK stays: it says who may write, also to what is not asked here)
TAKEN = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
TAKEN += tuple(
    f"{start}_{end}"
    for start in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD", "MPI")
    for end in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCALRANKID", "LOCALNRANKS")
)
MEETING = timedelta(minutes=5)  # for all ranks to come
# nothing is judged by the time it takes: a rank may write or upload for an hour while the others wait. A rank that is
# gone is noticed by strategies/watch.py
PATIENCE = timedelta(days=2)


class Place(NamedTuple):
    """Where this process stands among the ranks."""

    rank: int = 0
    size: int = 1
    local: int = 0  # among those of its machine: which device is its own


ALONE = Place()
_place: Place | None = None  # once read
_taken: dict[str, str] = {}
_started = False


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


def name() -> str:
    """Of this rank, for people."""
    return f"rank {rank()} on {socket.gethostname()}"


# ---------------------------------------------------------------- together


def start() -> None:
    """Meet the other ranks; alone, or the second time, nothing happens. InputError where they do not come.

    On CUDA each rank takes the device of its local number. Ranks that share one talk by gloo, since NCCL refuses.
    """
    global _started
    if world_size() == 1 or _started:
        _take()
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if devices := torch.cuda.device_count():
        torch.cuda.set_device(place().local % devices)
        if int(os.environ.get("LOCAL_WORLD_SIZE") or 1) <= devices:
            backend = "cpu:gloo,cuda:nccl"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        distributed.init_process_group(backend, timeout=MEETING)
        distributed.barrier()
    except (
        RuntimeError,
        ValueError,
    ) as error:  # torch's errors of its store and its sockets are RuntimeErrors
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name()}: the {world_size()} ranks did not meet at {address} within "
            f"{MEETING.total_seconds():.0f} s: {reason}"
        ) from error
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(PATIENCE)
    _take()
    _started = True


def start_alone() -> None:
    """A group of this process only, which DeepSpeed needs where there are no other ranks."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)


def _take() -> None:
    place()
    _taken.update({key: os.environ.pop(key) for key in TAKEN if key in os.environ})


@contextmanager
def environment() -> Iterator[None]:
    """The variables as the launcher gave them, for a library that wants to read them."""
    given = {"RANK": str(rank()), "WORLD_SIZE": str(world_size()), "LOCAL_RANK": str(place().local)}
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | given | _taken
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


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        gather(None)


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order; tensors in it must be on the CPU."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, value)
    return found


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, where alone it is called. Errors of input are raised on every rank."""
    if world_size() == 1:
        return make()
    from torch import distributed

    found: list[Any] = [_attempt(make) if is_main() else None]
    distributed.broadcast_object_list(found, src=0)
    return _unwrap(found)


def agree(make: Callable[[], T]) -> T:
    """What `make` returns here; where it fails on some rank, its error is raised on all: none waits for another.

    Of errors that all ranks have alike each is told once, of others also on which rank it is.
    """
    if world_size() == 1:
        return make()
    own = _attempt(make)
    _unwrap(gather((*own[:2], None)))  # the errors alone: results stay where they are
    return own[2]


def everywhere(make: Callable[[], T]) -> list[T]:
    """What `make` returns on each rank, in their order; errors as for `agree`."""
    if world_size() == 1:
        return [make()]
    found = gather(_attempt(make))
    _unwrap(found)
    return [value for _, _, value in found]


# what one rank may meet and all must hear of; anything else ends the rank, and so the run
SHARED = (InputError, FloatingPointError)
_Attempt = tuple[str | None, list[str], Any]  # name of the error's class, its lines, the value


def _attempt(make: Callable[[], T]) -> _Attempt:
    try:
        return None, [], make()
    except SHARED as error:
        lines = error.problems if isinstance(error, InputError) else [str(error)]
        return next(kind.__name__ for kind in SHARED if isinstance(error, kind)), list(lines), None


def _unwrap(found: Sequence[_Attempt]) -> Any:
    """The first value; raises what went wrong on any rank."""
    kinds = {kind.__name__: kind for kind in SHARED}
    wrong = [(rank, kind, lines) for rank, (kind, lines, _) in enumerate(found) if kind]
    if not wrong:
        return found[0][2]
    everyone = len(wrong) == len(found)
    told: dict[str, None] = {}
    for rank, _, lines in wrong:
        common = everyone and all(lines == other for _, _, other in wrong)
        told |= dict.fromkeys(lines if common or rank == 0 else [f"rank {rank}: {line}" for line in lines])
    kind = kinds[wrong[0][1]]
    error = kind(list(told)) if kind is InputError else kind("; ".join(told))
    error.agreed = True  # every rank raises it: rank 0 tells people
    raise error


# ---------------------------------------------------------------- rows


def shares(rows: Sequence[T], grouped: Callable[[Sequence[T]], list[list[T]]]) -> list[list[T]]:
    """`rows` dealt to the ranks like cards, each rank's in groups: of rank 0, of rank 1, ..., again of rank 0, ...

    All ranks have the same number of groups, the last ones of some may be empty: `mine` are this rank's. One rank has
    `grouped(rows)`.
    """
    hands = [grouped(rows[rank :: world_size()]) for rank in range(world_size())]
    most = max(map(len, hands))
    return [hand[k] if k < len(hand) else [] for k in range(most) for hand in hands]


def mine(groups: Sequence[T]) -> Sequence[T]:
    """Of what was dealt, this rank's."""
    return groups if world_size() == 1 else groups[rank() :: world_size()]


def turns(groups: Sequence[list[int]], all_take_part: bool) -> Iterator[tuple[list[int], bool]]:
    """This rank's groups of rows, each with True; the empty ones are left out.

    all_take_part: a forward needs every rank (ZeRO-3 gathers weights in it). Then the ranks go through the same
    number of groups: in place of an empty one comes another's row with False, to be computed and not counted.
    """
    if world_size() == 1:
        yield from ((rows, True) for rows in groups)
        return
    spare = next((rows for rows in groups if rows), [])[:1]
    own = list(mine(groups)) + [[]] * (-(-len(groups) // world_size()) - len(mine(groups)))
    for rows in own:
        if rows or (all_take_part and spare):
            yield rows or spare, bool(rows)


# ---------------------------------------------------------------- sums


def add(figures: Mapping[str, float]) -> dict[str, float]:
    """Sums over the ranks by name; the same float on every rank."""
    if world_size() == 1:
        return dict(figures)
    total: dict[str, float] = {}
    for found in gather(dict(figures)):
        for name, value in found.items():
            total[name] = total[name] + value if name in total else value
    return total


def union(found: dict[int, T]) -> dict[int, T]:
    """What all ranks have found, by row; each row was one rank's."""
    if world_size() == 1:
        return found
    return {row: value for each in gather(found) for row, value in each.items()}


def highest(value: float) -> float:
    """The largest over the ranks; nan where one has it."""
    if world_size() == 1:
        return value
    values = gather(value)
    return next((x for x in values if x != x), max(values))


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Each becomes its sum over the ranks, in place; those of one dtype travel as one."""
    if world_size() == 1 or not tensors:
        return
    import torch
    from torch import distributed

    for dtype in dict.fromkeys(x.dtype for x in tensors):
        some = [x for x in tensors if x.dtype == dtype]
        flat = torch.cat([x.reshape(-1) for x in some])
        distributed.all_reduce(flat)
        for x, summed in zip(some, flat.split([x.numel() for x in some]), strict=True):
            x.copy_(summed.view_as(x))


def sum_gradients(parameters: Iterator[torch.nn.Parameter] | Sequence[torch.nn.Parameter]) -> None:
    """Gradients become their sums over the ranks; a parameter that has none on any rank still has none."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    parameters = list(parameters)
    if not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    distributed.all_reduce(has, op=distributed.ReduceOp.MAX)
    some = [p for p, found in zip(parameters, has.tolist(), strict=True) if found]
    for parameter in some:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_tensors([p.grad for p in some])


def silence() -> None:
    """Ranks but 0 print nothing: what they would say, rank 0 says."""
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
