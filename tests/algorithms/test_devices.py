"""Nothing makes a tensor on a device of its own choosing.

With the default device set to "meta", a tensor made without `device=` has no data and cannot meet a CPU one.
"""

import torch

from rlhf_exp.algorithms import baselines, gae, ilql, kl, logprob, masked, pairwise, ppo
from rlhf_exp.algorithms.repetition import Repetition
from rlhf_exp.algorithms.support import Support


def test_results_stay_on_the_device_of_the_arguments(lengths_mask):
    mask = lengths_mask([3, 1], 4)
    x, scores = torch.randn(2, 4), torch.randn(2)
    allowed = torch.rand(5, 7) < 0.5
    hidden, weight, targets = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
    allowed[torch.arange(5), targets] = True
    came_before = Repetition(
        1.3, torch.randint(7, (2, 3)), torch.tensor([0, 0, 1, 1, 1]), torch.ones(5).long()
    )
    positions, index = torch.arange(5) == 1, torch.tensor([2, 0])
    hidden.requires_grad_()
    with torch.device("meta"):
        support = Support.from_mask(allowed)
        results = [
            masked.masked_mean(x, mask),
            masked.masked_var(x, mask),
            *masked.Moments.of(x, mask),
            masked.whiten(x, mask),
            masked.last_token(mask),
            masked.sequence_weights(mask),
            *support.rows(index),
            *support.select(positions),
            *Support.concat(support.split(2)),
            support.to_mask(7),
            logprob.token_logprobs(hidden @ weight.T, targets, allowed=allowed),
            logprob.entropy(hidden @ weight.T, allowed=allowed),
            *logprob.linear_logprobs(hidden, weight, None, targets, 1.0, support, (positions, [6]), 2),
            *logprob.linear_logprobs(hidden, weight, None, targets, chunk_size=2, repetition=came_before),
            kl.kl_divergence_estimate(x, x, "k3", mask),
            kl.full_kl(x, x),
            kl.kl_rewards(scores, x, mask, 0.1),
            *gae.gae(x, x, mask, 1.0, 0.95),
            *ppo.policy_loss(x, x, x, mask, 0.2, 0.2, 4, masked.sequence_weights(mask), 3.0),
            *ppo.value_loss(x, x, x, mask, 0.2, 4),
            ppo.explained_variance(x, x, mask),
            ilql.terminal_rewards(scores, mask),
            ilql.bellman_targets(x, x, mask, 0.9),
            ilql.bellman_loss(x, x, mask, 4),
            ilql.expectile_loss(x, x, mask, 0.8, 4),
            *ilql.taken_q_and_nll(hidden, weight, None, targets, 2),
            ilql.taken_q(hidden, weight, None, targets),
            ilql.awac_loss(x, ilql.awac_weights(x, x, 1.0), mask, 4),
            ilql.decoding_bonus(x, scores, 2.0),
            pairwise.pairwise_loss(scores, scores),
            pairwise.token_wise_loss(x, x, mask),
            pairwise.compared_tokens(mask.long(), mask.long(), mask.sum(1), mask.sum(1)),
            pairwise.held(x, mask.sum(1)),
            pairwise.centering_loss(scores, scores),
            baselines.rloo(scores, 2),
            baselines.grpo(scores, 2),
            baselines.reinforce(scores, masked.Moments.of(x, mask)),
            pairwise.pairwise_accuracy(scores, scores),
        ]
    assert all(result.device.type == "cpu" for result in results)
