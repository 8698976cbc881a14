"""An optimiser's moments in a checkpoint, one file a rank, and together again as torch's AdamW has them.

So any number of ranks, and any strategy, continues from what any other has left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "optimizer-{rank:05d}-of-{ranks:05d}.safetensors"
PATTERN = re.compile(r"optimizer-\d{5}-of-\d{5}\.safetensors")
MOMENTS = ("exp_avg", "exp_avg_sq")


def write(folder: Path, rank: int, ranks: int, shard: Mapping[str, Tensor]) -> None:
    """This rank's part: "<group>.<moment>" -> its piece of all of the group's weights, one after the other."""
    from safetensors.torch import save_file

    found = {name: value.detach().cpu().contiguous() for name, value in shard.items()}
    save_file(found, folder / FILE.format(rank=rank, ranks=ranks))


def read(folder: Path) -> list[dict[str, Tensor]]:
    """All ranks' parts, in their order; none where the moments were not in shards."""
    from safetensors.torch import load_file

    return [load_file(path) for path in sorted(folder.iterdir()) if PATTERN.fullmatch(path.name)]


def join(described: Mapping[str, Any], shards: list[dict[str, Tensor]]) -> dict[str, Any]:
    """torch's state_dict of AdamW.

    described: param_groups as there; shapes and steps, a list of shapes and a number (None: no step yet) a group.
    """
    state: dict[int, dict[str, Tensor]] = {}
    number = 0
    for i, (shapes, step) in enumerate(zip(described["shapes"], described["steps"], strict=True)):
        sizes = [int(torch.Size(shape).numel()) for shape in shapes]
        if step is not None:
            whole = {
                name: torch.cat([shard[f"{i}.{name}"] for shard in shards])[: sum(sizes)].split(sizes)
                for name in MOMENTS
            }
            for k, shape in enumerate(shapes):
                moments = {name: parts[k].view(tuple(shape)).clone() for name, parts in whole.items()}
                state[number + k] = {"step": torch.tensor(float(step)), **moments}
        number += len(shapes)
    return {"state": state, "param_groups": described["param_groups"]}
