"""Our formulas against TRL 1.9.2's PPO, in numbers that TRL's own code computed.

RECORDED is what `python -m tests.algorithms.record_trl` prints (it says how to get TRL's wheel) for its INPUTS: three
answers of 4, 2 and 3 tokens. TRL 1.9.2 is the last release that has PPO.

Where TRL is different, ours is worked out by hand:
- TRL gives the score of an answer that is shorter than the longest possible one to the place after its last token,
  and reads a value there; ours is on the last token, where the answer ends. `wide` has that place, for what shall be
  equal to TRL.
- TRL's whitening divides by n - 1, ours by n: a factor of sqrt((n - 1) / n).
- TRL fills the padding of log-probs with 1.0 and sums entropies and averages approximate KLs over it.
- approximate KL: TRL's is half the mean square of the log-ratio (k2), ours k3.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms.gae import gae
from rlhf_exp.algorithms.kl import kl_divergence_estimate, kl_rewards
from rlhf_exp.algorithms.logprob import entropy, token_logprobs
from rlhf_exp.algorithms.masked import masked_mean, masked_sum, whiten
from rlhf_exp.algorithms.ppo import policy_loss, value_loss
from tests.algorithms.record_trl import ARGS, INPUTS, LENGTHS, TEMPERATURE, tensor

RECORDED = {
    "k1": {
        "rewards": [
            [0.0125, -0.01875, -0.025, 1.49375],
            [-0.0125, 0.0125, -0.75, 0.0],
            [0.05, -0.0125, -0.00625, 0.25],
        ],
        "advantages": [
            [0.5764251757, 1.014582041, 1.70239888, 0.3108189375],
            [-0.4956063983, -1.398984496, 0.0, 0.0],
            [-1.05005616, -0.08416328254, -0.5754146974, 0.0],
        ],
        "returns": [
            [1.19057947, 1.265278861, 1.399990625, 1.49375],
            [-0.6038574688, -0.6483125, -0.75, 0.0],
            [0.2352634283, 0.2010455, 0.212, 0.25],
        ],
        "entropy": 2.25,
    },
    "k3": {  # with whitened rewards
        "rewards": [
            [-0.0801471455, -0.08282097889, -0.08700632629, 2.760438985],
            [-0.07965288184, -0.0801471455, -1.495966487, 0.0],
            [-0.1448795461, -0.07965288184, -0.07763748044, 0.3960844899],
        ],
        "advantages": [
            [0.643969252, 0.9785338498, 1.427465784, 0.8363163031],
            [-0.9649107672, -1.415876052, 0.0, 0.0],
            [-0.8479953373, -0.2295483089, -0.4279547232, 0.0],
        ],
        "returns": [
            [1.977425434, 2.219693521, 2.505238198, 2.760438985],
            [-1.389831276, -1.428367763, -1.495966487, 0.0],
            [0.03219450155, 0.1921584891, 0.275229377, 0.3960844899],
        ],
        "entropy": 2.25,
    },
    "losses": {
        "pg_loss": 0.07036779535,
        "pg_clipfrac": 0.4444444478,
        "vf_loss": 0.4485122007,
        "vf_clipfrac": 0.2727272809,
        "approxkl": 0.03645833333,
    },
    "logits": {"logprobs": [-0.1692211151, -5.489665138], "entropy": [0.5577806354, 0.4425292006]},
}
KL_COEF, GAMMA, LAM, CLIP = (ARGS[name] for name in ("kl_coef", "gamma", "lam", "cliprange"))


def recorded(group, name):
    return torch.tensor(RECORDED[group][name], dtype=torch.float64)


def same(ours, theirs, rtol=1e-8):
    assert_close(ours, theirs, rtol=rtol, atol=1e-9)


@pytest.fixture
def masks(lengths_mask):
    """The tokens of the answers, and with one place more where there is room."""
    return lengths_mask(LENGTHS, 4), lengths_mask([min(n + 1, 4) for n in LENGTHS], 4)


def trl_factor(mask):
    """From variance 1 over n to variance 1 over n - 1."""
    return math.sqrt((mask.sum().item() - 1) / mask.sum().item())


def rewards(estimator, mask, place):
    kl = kl_divergence_estimate(tensor("logprobs"), tensor("ref_logprobs"), estimator, mask)
    return kl_rewards(tensor("scores"), kl, place, KL_COEF)


def test_rewards(masks):
    mask, wide = masks
    same(rewards("k1", mask, wide), recorded("k1", "rewards"))


def test_whitened_rewards(masks):
    mask, wide = masks
    plain = rewards("k3", mask, wide)
    whitened, mean = whiten(plain, wide, shift_mean=False), masked_mean(plain, wide)
    # TRL adds 1e-8 to another variance
    same(torch.where(wide, (whitened - mean) * trl_factor(wide) + mean, 0), recorded("k3", "rewards"), 1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_advantages_and_returns(estimator, masks):
    mask, wide = masks
    out = gae(recorded(estimator, "rewards"), tensor("values"), wide, GAMMA, LAM)
    same(out.returns, recorded(estimator, "returns"))
    same(whiten(out.advantages, mask) * trl_factor(mask), recorded(estimator, "advantages"), 1e-6)


def test_the_recorded_returns_by_brute_force():
    """Eq. 16 of GAE with Python's numbers: the recording holds what it says."""
    r, v = RECORDED["k1"]["rewards"], [[*row, 0.0] for row in INPUTS["values"]]
    for b in range(3):
        for t in range(4):
            advantage = sum(
                (GAMMA * LAM) ** (u - t) * (r[b][u] + GAMMA * v[b][u + 1] - v[b][u]) for u in range(t, 4)
            )
            assert abs(advantage + v[b][t] - RECORDED["k1"]["returns"][b][t]) < 1e-8


def test_policy_loss(masks):
    mask, _ = masks
    arguments = tensor("new_logprobs"), tensor("logprobs"), recorded("k1", "advantages"), mask
    out = policy_loss(*arguments, CLIP, CLIP, denominator=9)
    same(out.loss, recorded("losses", "pg_loss"))
    same(out.clipfrac, recorded("losses", "pg_clipfrac"), 1e-7)  # TRL counts in float32


def test_value_loss(masks):
    _, wide = masks
    returns = recorded("k1", "returns")
    out = value_loss(tensor("new_values"), tensor("values"), returns, wide, ARGS["cliprange_value"], 11)
    same(out.loss, recorded("losses", "vf_loss"))
    same(out.clipfrac, recorded("losses", "vf_clipfrac"), 1e-7)


def test_log_probs_and_entropy_of_logits():
    logits, tokens = tensor("logits"), torch.tensor(INPUTS["tokens"])
    # TRL divides by the temperature + 1e-7
    same(token_logprobs(logits, tokens, TEMPERATURE), recorded("logits", "logprobs"), 1e-6)
    same(entropy(logits, TEMPERATURE), recorded("logits", "entropy"), 1e-6)


# ---------------------------------------------------------------- where TRL is different: by hand


def test_the_score_is_on_the_last_token_and_not_after_it(masks):
    mask, _ = masks
    ours, theirs = rewards("k1", mask, mask), recorded("k1", "rewards")
    same(ours[0], theirs[0])  # no room after it
    # kl .25 and -.25, times .05; score -.75
    same(ours[1], torch.tensor([-0.0125, 0.0125 - 0.75, 0, 0], dtype=torch.float64))
    assert theirs[1, 2] == -0.75
    # the last token's advantage: r - V = -.7375 - .125; TRL's sees the score through gamma, lambda and V after
    # the end: .0125 + .97 * .625 - .125 + .97 * .95 * (-.75 - .625)
    out = gae(ours, tensor("values"), mask, GAMMA, LAM)
    assert abs(out.advantages[1, 1].item() - -0.8625) < 1e-9
    their_advantage = 0.0125 + 0.97 * 0.625 - 0.125 + 0.97 * 0.95 * (-0.75 - 0.625)
    assert abs((recorded("k1", "returns") - tensor("values"))[1, 1].item() - their_advantage) < 1e-9


def test_the_entropy_is_summed_over_tokens_and_not_over_padding(masks):
    mask, _ = masks
    # 1.25 + .5 + 2 + .125, .25 + 1.5, 3 + .75 + .375; TRL's: less 1 for each of 3 places of padding
    spoiled = tensor("logprobs").masked_fill(~mask, 1.0)
    ours = masked_sum(-spoiled, mask) / 3
    assert ours == (3.875 + 1.75 + 4.125) / 3
    assert RECORDED["k1"]["entropy"] == ours - 3 / 3


def test_the_approximate_kl_is_k3_over_tokens(masks):
    mask, _ = masks
    new, old = (tensor(name).masked_fill(~mask, 1.0) for name in ("new_logprobs", "logprobs"))
    out = policy_loss(new, old, torch.zeros(3, 4).double(), mask, CLIP, CLIP, denominator=9)
    steps = [0.25, -0.25, 0.25, -0.125, -0.5, 0.125, 0.5, -0.375, 0.125]
    assert abs(out.approxkl.item() - sum(math.exp(d) - 1 - d for d in steps) / 9) < 1e-9
    # TRL's: half the squares, over 9 tokens and 3 places of padding
    assert abs(RECORDED["losses"]["approxkl"] - sum(d * d / 2 for d in steps) / 12) < 1e-9
