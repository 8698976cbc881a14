"""AdamW whose moments, and with zero2 reduced gradients, DeepSpeed shards over the ranks (Rajbhandari et al. 2020).

For everybody else it is torch's AdamW on the trained weights: the same groups, the same `step`, the same state_dict.
Inside, DeepSpeed's engine owns one flat copy of each group. A step hands it the (summed, clipped) gradients by one
backward, of sum(copy * gradient), has it reduce and step its shards and gather the weights, and copies these back.

The engine never sees the model: no hook of it fires while roles are switched, and the trap that a second backward
before a step replaces the first one's gradients under ZeRO cannot be stepped into. What that costs is one more
reduction of the adapters' megabytes, and a copy of them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_exp import distributed
from rlhf_exp.schema import Strategy
from rlhf_exp.strategies import moments

# what the engine is told beside strategy.deepspeed: the rest of it is done here
OURS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,  # left out, it would clip at 1
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, also where the moments are on the host
    "steps_per_print": 2**31,
}
THEIRS = ("train_batch_size", *OURS)  # of strategy.deepspeed, compared with ours by require.py


class Copies(nn.Module):
    """A flat copy of each group of trained weights: the engine's model."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]):
        super().__init__()
        self.flat = nn.ParameterList(nn.Parameter(_flat(group)) for group in groups)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """A number whose gradient is `gradients`."""
        return sum((copy * gradient).sum() for copy, gradient in zip(self.flat, gradients, strict=True))


class ZeroAdamW(torch.optim.AdamW):
    """See above. parameters: as torch's, in float32."""

    def __init__(self, parameters: Any, strategy: Strategy, **settings: Any):
        super().__init__(parameters, **settings)
        self._copies = Copies([group["params"] for group in self.param_groups])
        inner = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": [copy]}
            for group, copy in zip(self.param_groups, self._copies.flat, strict=True)
        ]
        self._inner = torch.optim.AdamW(inner)
        self._engine = engine(self._copies, self._inner, strategy)
        # DeepSpeed has put its shard of each copy in the place of the copy
        self._shards: list[Tensor] = [group["params"][0] for group in self._inner.param_groups]
        self.state = self._inner.state  # whoever clears it, clears the moments

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """As torch's: a weight without a gradient stays, and so do its moments."""
        groups = [group["params"] for group in self.param_groups]
        kept = self._without_gradient(groups)
        for copy, shard, group in zip(self._copies.flat, self._shards, groups, strict=True):
            flat = _flat(group)  # others may have changed the weights: a checkpoint, a guard
            copy.data.copy_(flat)
            shard.data.copy_(self._cut(flat))
        for ours, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({key: value for key, value in ours.items() if key != "params"})
        gradients = [
            torch.cat([_zeros(p) if p.grad is None else p.grad.reshape(-1) for p in group])
            for group in groups
        ]
        with torch.enable_grad():
            self._engine.backward(self._copies(gradients))
        self._engine.step()
        for copy, group in zip(self._copies.flat, groups, strict=True):
            for p, value in zip(group, copy.data.split([p.numel() for p in group]), strict=True):
                if p.grad is not None:
                    p.copy_(value.view_as(p))
        self._put_back(kept)

    # ---------------------------------------------------------------- weights without a gradient

    def _without_gradient(self, groups: Sequence[Sequence[Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Of each group of which some or all have none: what its shard's moments are now."""
        return {
            i: {name: value.clone() for name, value in self.state.get(shard, {}).items()}
            for i, (shard, group) in enumerate(zip(self._shards, groups, strict=True))
            if any(p.grad is None for p in group)
        }

    def _put_back(self, kept: dict[int, dict[str, Tensor]]) -> None:
        for i, before in kept.items():
            group, shard = self.param_groups[i]["params"], self._shards[i]
            if all(p.grad is None for p in group):
                self.state.pop(shard, None)
                if before:
                    self.state[shard] = before
                continue
            stays = self._cut(torch.cat([torch.full((p.numel(),), p.grad is None) for p in group]))
            for name in moments.MOMENTS:
                now = self.state[shard][name]
                old = before[name] if before else torch.zeros_like(now)
                now.copy_(torch.where(stays.to(now.device), old, now))

    # ---------------------------------------------------------------- checkpoints

    def described(self) -> dict[str, Any]:
        """What moments.join needs beside the shards."""
        groups, number = [], 0
        for group in self.param_groups:
            places = list(range(number, number + len(group["params"])))
            groups.append(group | {"params": places})
            number += len(places)
        states = [self.state.get(shard) for shard in self._shards]
        return {
            "param_groups": groups,
            "shapes": [[list(p.shape) for p in group["params"]] for group in self.param_groups],
            "steps": [float(state["step"]) if state else None for state in states],
        }

    def shard(self) -> dict[str, Tensor]:
        """This rank's part of the moments."""
        return {
            f"{i}.{name}": self.state[shard][name]
            for i, shard in enumerate(self._shards)
            if self.state.get(shard)
            for name in moments.MOMENTS
        }

    def state_dict(self) -> dict[str, Any]:
        """torch's AdamW's, of all ranks' shards together: on every rank, called by all."""
        own = {name: value.detach().cpu() for name, value in self.shard().items()}
        return moments.join(self.described(), distributed.gather(own))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What torch's AdamW, or this one on any number of ranks, gave."""
        states = state_dict["state"]
        number = 0
        for shard, group, saved in zip(
            self._shards, self.param_groups, state_dict["param_groups"], strict=True
        ):
            group.update({key: value for key, value in saved.items() if key != "params"})
            own = [states.get(number + i) for i in range(len(group["params"]))]
            number += len(own)
            self.state.pop(shard, None)
            if not any(own):
                continue
            flat = {
                name: torch.cat(
                    [
                        _zeros(p) if each is None else each[name].reshape(-1).to(p)
                        for p, each in zip(group["params"], own, strict=True)
                    ]
                )
                for name in moments.MOMENTS
            }
            step = next(each["step"] for each in own if each)
            cut = {name: self._cut(value).to(shard) for name, value in flat.items()}
            self.state[shard] = {"step": torch.as_tensor(step).clone().float(), **cut}

    # ---------------------------------------------------------------- shards

    def _cut(self, flat: Tensor) -> Tensor:
        """This rank's shard of a flat [N]; DeepSpeed pads the last ones with zeros."""
        size = self._size_of(flat.numel())
        padded = torch.cat([flat, flat.new_zeros(size * distributed.world_size() - flat.numel())])
        return padded[distributed.rank() * size : (distributed.rank() + 1) * size]

    def _size_of(self, numel: int) -> int:
        return next(
            shard.numel()
            for shard, copy in zip(self._shards, self._copies.flat, strict=True)
            if copy.numel() == numel
        )


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros(p.numel(), dtype=p.dtype, device=p.device)


def engine(module: nn.Module, optimizer: torch.optim.Optimizer | None, strategy: Strategy) -> Any:
    """DeepSpeed's engine of a module by strategy.deepspeed; of zero3 its adapters' part, as zero2."""
    given = {key: value for key, value in strategy.deepspeed.items() if key not in THEIRS}
    zero = dict(given.get("zero_optimization", {}))
    zero = {key: value for key, value in zero.items() if key in FOR_THE_OPTIMISER}
    # a buffer that is taken anew in each step: 5 10^8 numbers if nobody says how many it has to hold
    zero.setdefault("reduce_bucket_size", max(p.numel() for p in module.parameters()))
    stage = 1 if strategy.name == "zero1" else 2
    settings = given | OURS | {"zero_optimization": zero | {"stage": stage}}
    with quietly() as deepspeed:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]


# settings of zero_optimization that mean something here; the others are of stage 3 (parameters.py)
FOR_THE_OPTIMISER = (
    *(
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "reduce_scatter",
        "reduce_bucket_size",
    ),
    *("contiguous_gradients", "round_robin_gradients", "offload_optimizer"),
)


@contextlib.contextmanager
def quietly() -> Iterator[Any]:
    """DeepSpeed, ready to use: it finds our ranks, compiles nothing on a CPU, and keeps its log to itself."""
    with distributed.environment(), contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        # of DeepSpeed's calls of torch, at each first one
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        if not torch.cuda.is_available():
            # an op for shared memory that would be compiled (a minute, and a compiler): gloo does it
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not torch.distributed.is_initialized():
            distributed.start_alone()
        yield deepspeed
