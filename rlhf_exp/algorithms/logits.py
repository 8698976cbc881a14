"""Hidden states to logits without rounding the logits.

A product of bfloat16 matrices is summed in float32 and then rounded to 8 significant bits: logits near 20 move by up
to 0.06, log-probs with them, and PPO's ratios by a few per cent where the policy has not changed. MiniMax-M1 (2025,
arXiv:2506.13585, section 3.2) found that this rounding of the output layer alone keeps sampler and trainer apart.
Both devices can hand over the float32 sums; on a CPU that takes the weight in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from rlhf_exp.algorithms.product import linear

LOGIT_BUDGET = 2**22  # logits worked on at once: 16 MB in float32, which a CPU's caches take in part
GPU_BUDGET = 8  # times as many, to keep it busy


def rows_at_once(weight: Tensor) -> int:
    """How many positions' logits with this output layer [V, d] are held together."""
    budget = LOGIT_BUDGET * (GPU_BUDGET if weight.is_cuda else 1)
    return max(1, budget // weight.shape[0])


class OutputLayer:
    """hidden [N, d] -> hidden @ weight.T + bias [N, V], summed and kept in float32 (float64: in float64).

    weight [V, d], bias [V] or None. The weight is used in `dtype`, that of the hidden states. No gradient reaches any
    of them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self._made_of = (weight, weight._version, dtype)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(torch.promote_types(dtype, torch.float32))
        self._half = dtype in (torch.bfloat16, torch.float16)
        self._wide = self.weight.float() if self._half and not weight.is_cuda else None

    def is_of(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether this was made of this weight, which nobody has changed since, for this dtype."""
        made, version, ours = self._made_of
        return made is weight and version == weight._version and ours == dtype

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        if not self._half:
            return linear(hidden, self.weight, self.bias)
        if self._wide is None:
            logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        else:
            with bfloat16_factors() if hidden.dtype == torch.bfloat16 else nullcontext():
                logits = torch.mm(hidden.float(), self._wide.T)
        return logits if self.bias is None else logits.add_(self.bias)


@contextmanager
def bfloat16_factors() -> Iterator[None]:
    """float32 products whose factors oneDNN rounds to bfloat16, where the CPU multiplies these.

    Nothing is lost by that where the factors come from bfloat16; a CPU that cannot takes float32 products.
    """
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
