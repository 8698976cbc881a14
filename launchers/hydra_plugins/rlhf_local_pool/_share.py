"""Who gets what: CUDA devices dealt out without overlap, CPU threads divided."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_exp.errors import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# what the libraries underneath read when they are loaded
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Share:
    """What one trial at a time has. devices: names as CUDA_VISIBLE_DEVICES has them; () on CPU."""

    devices: tuple[str, ...]
    threads: int

    def environment(self) -> dict[str, str]:
        return {VISIBLE: ",".join(self.devices), **dict.fromkeys(THREADS, str(self.threads))}

    def __str__(self) -> str:
        cpu = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"cuda:{','.join(self.devices)}, {cpu}" if self.devices else cpu


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The CUDA devices of this machine that the environment shows, by the names it has for them."""
    import torch

    count = torch.cuda.device_count()  # asks the driver's library, and leaves the devices alone
    named = [name.strip() for name in environment.get(VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def absent(wanted: Sequence[str]) -> list[str]:
    """A line if some of these numbers are no device here: CUDA would leave the trial without any, on the CPU.

    Other names (GPU-..., MIG-...) are the driver's to know.
    """
    numbers = [name for name in wanted if name.isdigit()]
    there = devices() if numbers else []
    if not (gone := [name for name in numbers if name not in there]):
        return []
    have = f"there are {', '.join(there)}" if there else "there are none"
    return [f"hydra.launcher.devices: no CUDA device {', '.join(gone)} here: {have}"]


def problems(per_trial: int, workers: int | None, threads: int | None, devices: Sequence[str]) -> list[str]:
    """What no machine could give, a line each."""
    given = {"devices_per_trial": (per_trial, 1), "workers": (workers, 1), "threads": (threads, 0)}
    found = [
        f"hydra.launcher.{name} must be at least {least}, got {value}"
        for name, (value, least) in given.items()
        if value is not None and value < least
    ]
    if len(set(devices)) < len(devices):
        found.append(f"hydra.launcher.devices: name each once, got {', '.join(devices)}")
    return found


def deal(
    jobs: int,
    *,
    devices: Sequence[str] = (),
    per_trial: int = 1,
    workers: int | None = None,
    threads: int = 0,
    cores: int,
) -> list[Share]:
    """The shares of a sweep of so many jobs: as many as trials run at a time, at most `jobs`.

    threads 0: the cores are divided. Without devices nor a number of workers or threads, each trial has one thread at
    least and the trials as many as there are. Raises InputError where a trial would have too few devices.
    """
    if wrong := problems(per_trial, workers, threads, devices):
        raise InputError(wrong)
    groups: list[tuple[str, ...]] = []
    if devices:
        whole = len(devices) // per_trial * per_trial
        groups = [tuple(devices[at : at + per_trial]) for at in range(0, whole, per_trial)]
        if not groups or (workers or 0) > len(groups):
            raise InputError(
                f"hydra.launcher: {workers or 1} trials of {per_trial} CUDA device{'s' * (per_trial > 1)} "
                f"at a time, but there are {len(devices)}"
            )
    most = len(groups) if groups else max(1, cores // threads) if threads else cores
    count = max(1, min(workers or most, jobs))
    share = threads or max(1, cores // count)
    return [Share(groups[place] if groups else (), share) for place in range(count)]
