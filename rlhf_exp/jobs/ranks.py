"""Who a process is among the tasks of its job, for torch.distributed, out of SLURM's own variables.

srun starts the tasks; torchrun has no part in it, since it would want to start them itself.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping

FIRST_PORT, PORTS = 12_000, 20_000  # below what systems give out by themselves (32768 on)
REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def environment(slurm: Mapping[str, str], address_of: Callable[[str], str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; empty for a single task.

    slurm: the environment that srun gave the task. address_of: from a node's name to where it can be reached. The
    port follows from the job's id, so that two jobs on one node differ and all tasks of a job agree without talking.
    """
    size = int(slurm.get("SLURM_STEP_NUM_TASKS") or slurm.get("SLURM_NTASKS") or 1)
    if size == 1:
        return {}
    node = int(slurm.get("SLURM_NODEID", 0))
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_by_node(slurm["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": address_of(first_node(slurm)),
        "MASTER_PORT": str(FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % PORTS),
    }


def tasks_by_node(text: str) -> list[int]:
    """SLURM's `2(x3),1`: [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        found = REPEATED.fullmatch(part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text} cannot be read")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_node(slurm: Mapping[str, str]) -> str:
    """The name of the node that has rank 0."""
    from submitit.slurm.slurm import _parse_node_list

    return _parse_node_list(slurm.get("SLURM_STEP_NODELIST") or slurm["SLURM_JOB_NODELIST"])[0]


def address_of(node: str) -> str:
    """Where a node can be reached: its NodeAddr, for its name need not resolve; the name where SLURM is silent."""
    try:
        said = subprocess.run(
            ["scontrol", "--oneliner", "show", "node", node],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return node
    found = re.search(r"\bNodeAddr=(\S+)", said.stdout)
    return found[1] if found else node


def threads(slurm: Mapping[str, str]) -> str | None:
    """CPUs that the task may use, for OMP_NUM_THREADS; None where the job asked for none in particular.

    torch counts those of the machine, and two jobs that share a node would then be in each other's way.
    """
    if "OMP_NUM_THREADS" in slurm:
        return None
    return slurm.get("SLURM_CPUS_PER_TASK")


def apply() -> int:
    """Set the variables for this process and return its rank."""
    os.environ |= environment(os.environ, address_of)
    if number := threads(os.environ):
        os.environ["OMP_NUM_THREADS"] = number
    return int(os.environ.get("RANK", 0))
