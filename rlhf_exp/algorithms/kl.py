"""KL divergence between policy and reference, per token, and the reward that carries it."""

import math

import torch
from torch import Tensor

from rlhf_exp.algorithms.masked import last_token
from rlhf_exp.algorithms.shapes import at_least_float32, check_shapes


def kl_divergence_estimate(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1", mask: Tensor | None = None
) -> Tensor:
    """Estimate [...] in nats of KL(policy || ref) from one token sampled by the policy; nothing is clamped.

    Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), with r = ref / policy:
        k1 = -log r                unbiased, large variance, may be negative
        k2 = (log r)^2 / 2         biased, small variance
        k3 = (r - 1) - log r       unbiased, never negative
    logprobs, ref_logprobs [...] over the same support. With `mask` bool[...] padding gives zero and gets a
    zero gradient; without it padding stays whatever it was.
    """
    check_shapes(logprobs=(logprobs, "..."), ref_logprobs=(ref_logprobs, "..."))
    log_r = at_least_float32(ref_logprobs) - at_least_float32(logprobs)
    if mask is not None:
        check_shapes(logprobs=(logprobs, "..."), mask=(mask, "..."))
        log_r = torch.where(mask, log_r, 0)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        return log_r.expm1() - log_r
    raise ValueError(f"kl_estimator must be k1, k2 or k3, got {estimator!r}")


def full_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) [...] in nats, summed over the whole vocabulary of logits [..., V].

    Tokens with p = 0 (logit -inf) add nothing; a token with p > 0 and q = 0 makes it inf.
    """
    check_shapes(logits_p=(logits_p, "... V"), logits_q=(logits_q, "... V"))
    log_p = at_least_float32(logits_p).log_softmax(dim=-1)
    log_q = at_least_float32(logits_q).log_softmax(dim=-1)
    return (log_p.exp() * torch.where(log_p == -torch.inf, 0, log_p - log_q)).sum(dim=-1)


def kl_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float | Tensor) -> Tensor:
    """Rewards [B, T]: -kl_coef * kl at every response token and the score added at the last; zero on padding.

    Ziegler et al. 2019 (arXiv:1909.08593) eq. 2; Stiennon et al. 2020 (arXiv:2009.01325) section 3.4;
    Ouyang et al. 2022 (arXiv:2203.02155) eq. 2, without its pretraining term. scores [B] from the reward
    source, kl [B, T] in nats, mask bool[B, T]; dtype of `kl`. Raises ValueError for a row in which no token
    counts.
    """
    check_shapes(scores=(scores, "B"), kl=(kl, "B T"), mask=(mask, "B T"))
    rewards = torch.where(mask, -kl_coef * kl, 0)
    return rewards.scatter_add(1, last_token(mask).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The coefficient of the next iteration: raised where the KL is above its target, lowered where below.

    Ziegler et al. 2019 (arXiv:1909.08593) section 2.2:
        e_t      = clip((KL - KL_target) / KL_target, -0.2, 0.2)
        beta_t+1 = beta_t (1 + K_beta e_t)
    K_beta = episodes / horizon, as in the code of that paper (0.1 in its text). kl in nats an answer, as `target`;
    `episodes` answers were sampled since the last update. Raises ValueError unless target and horizon are positive,
    and for a horizon so short that one step could take the coefficient below 0.
    """
    for name, value in (("target", target), ("horizon", horizon)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if episodes >= 5 * horizon:
        raise ValueError(f"horizon must be more than a fifth of the {episodes} episodes, got {horizon}")
    error = min(max((kl - target) / target, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: at most so far is best-of-n from the policy that it samples.

    Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3; Hilton 2023, "KL divergence of max-of-n". It is exact where
    no two answers have the same score and each answer is improbable; in general it is an upper bound (Beirami et al.
    2024, arXiv:2401.01879, section 3). 0 for n = 1. Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n
