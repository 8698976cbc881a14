"""The ranks of one run: which of them this process is, and what they tell each other.

torchrun, or the SLURM launcher, starts the same command several times and says in the environment who is who: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A process that was started alone is rank 0 of 1: every function here
then gives its argument back, and torch.distributed is not even imported.

How work is divided is told in strategies/__init__.py. Nothing heavy is imported before `start`.

    identity.py   who this process is          rows.py       whose row is whose
    meeting.py    how ranks find each other    sums.py       what each has of its rows, put together
    exchange.py   what they tell each other
"""

from rlhf_exp.distributed.exchange import agree, barrier, everywhere, from_main, gather
from rlhf_exp.distributed.identity import (
    Place,
    environment,
    is_main,
    name,
    on_this_machine,
    place,
    rank,
    world_size,
)
from rlhf_exp.distributed.meeting import leave, part, silence, start, start_alone
from rlhf_exp.distributed.rows import mine, shares, turns
from rlhf_exp.distributed.sums import add, highest, sum_gradients, sum_tensors, union

__all__ = [
    "Place",
    "add",
    "agree",
    "barrier",
    "environment",
    "everywhere",
    "from_main",
    "gather",
    "highest",
    "is_main",
    "leave",
    "mine",
    "name",
    "on_this_machine",
    "part",
    "place",
    "rank",
    "shares",
    "silence",
    "start",
    "start_alone",
    "sum_gradients",
    "sum_tensors",
    "turns",
    "union",
    "world_size",
]
