"""Products with a frozen weight by the faster of the two libraries that torch has for float32 on a CPU.

torch takes MKL, which on processors other than Intel's keeps to registers of half the width: there oneDNN takes less
than half the time (benchmarks/parts.py). In bfloat16 torch takes oneDNN itself. Which one it is depends on the
processor alone, never on a measurement: the same machine gives the same numbers.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_exp.processor import INTEL, vendor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] or None -> x @ weight.T + bias [..., out].

    For inside an autograd function or without gradients: what oneDNN computes carries none.
    """
    if x.dtype == torch.float32 == weight.dtype and x.device.type == "cpu" and x.numel() and onednn():
        rows = x.reshape(-1, x.shape[-1])  # always two axes: with three it may sum in another order
        found = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return found.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


@cache
def onednn() -> bool:
    """Whether float32 products go to oneDNN: torch has both libraries, and the processor is not Intel's."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and vendor() not in ("", INTEL)
