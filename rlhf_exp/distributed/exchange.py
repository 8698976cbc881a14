"""What ranks tell each other, and errors that all of them have to hear of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf_exp.distributed.identity import is_main, world_size
from rlhf_exp.errors import InputError

T = TypeVar("T")


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
