"""Advantages without a critic: what an answer is worth beside other answers.

Each takes the whole-answer returns [N] (score minus the KL penalty, summed over the tokens) and gives one advantage
[N] an answer, the same for all of its tokens. Groups of k consecutive rows answer the same prompt.
"""

import torch
from torch import Tensor

from rlhf_exp.algorithms.masked import Moments
from rlhf_exp.algorithms.shapes import at_least_float32, check_shapes


def rloo(returns: Tensor, k: int) -> Tensor:
    """A_i = R_i - 1 / (k - 1) sum_{j != i} R_j: the others of the group are the baseline.

    REINFORCE leave-one-out, Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740), section 2.3. Unbiased, for
    the baseline does not depend on the answer. Raises ValueError unless k >= 2 divides N.
    """
    groups = _groups(returns, k)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (k - 1)
    return (groups - others).flatten()


def grpo(returns: Tensor, k: int, eps: float = 1e-4) -> Tensor:
    """A_i = (R_i - mean(R)) / (std(R) + eps) within each group; 0 where all of a group are equal.

    Group relative policy optimisation, Shao et al. 2024 (arXiv:2402.03300), section 4.1.2 (outcome supervision). The
    standard deviation is that of the k answers (divided by k). Raises ValueError unless k >= 2 divides N.
    """
    groups = _groups(returns, k)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, correction=0, keepdim=True) + eps)).flatten()


def reinforce(returns: Tensor, earlier: Moments) -> Tensor:
    """A_i = R_i - b, b the mean of all `earlier` returns; of this batch where there are none yet.

    Williams 1992 with the moving-average baseline of Ahmadian et al. 2024 (arXiv:2402.14740), section 2.2.
    """
    check_shapes(returns=(returns, "N"))
    returns = at_least_float32(returns)
    baseline = torch.where(earlier.count > 0, earlier.mean, returns.double().mean())
    return (returns.double() - baseline).to(returns.dtype)


def _groups(returns: Tensor, k: int) -> Tensor:
    check_shapes(returns=(returns, "N"))
    if k < 2 or len(returns) % k:
        raise ValueError(
            f"groups of {k} answers to a prompt: need at least 2, and {len(returns)} to be a multiple"
        )
    return at_least_float32(returns).reshape(-1, k)
