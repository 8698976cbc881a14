"""ILQL by hand, by brute force, and on a chain of states that dynamic programming solves."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_exp.algorithms import logprob
from rlhf_exp.algorithms.ilql import (
    awac_loss,
    awac_weights,
    bellman_loss,
    bellman_targets,
    decoding_bonus,
    expectile_loss,
    polyak_update,
    taken_q,
    taken_q_and_nll,
    terminal_rewards,
    token_loss,
)

# ---------------------------------------------------------------- numbers worked out by hand


def test_the_reward_is_on_the_token_that_ends_the_answer(lengths_mask):
    """On the last action of each row, also of a padded one: not one step after it."""
    rewards = terminal_rewards(torch.tensor([2.0, -1.0, 0.5]), lengths_mask([3, 1, 2], 3))
    assert rewards.tolist() == [[0.0, 0.0, 2.0], [-1.0, 0.0, 0.0], [0.0, 0.5, 0.0]]


def test_an_answer_without_tokens_has_no_place_for_a_reward(lengths_mask):
    with pytest.raises(ValueError, match=r"rows \[1\] of mask have no token"):
        terminal_rewards(torch.zeros(2), lengths_mask([1, 0], 2))


def test_bellman_targets_by_hand(lengths_mask):
    rewards = torch.tensor([[0.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    values = torch.tensor([[7.0, 0.5, -1.0], [7.0, 4.0, 99.0]])
    # V of the next state, halved; none after the last token, though a number stands there
    expected = [[0.25, -0.5, 2.0], [2.0, 3.0, 0.0]]
    assert bellman_targets(rewards, values, lengths_mask([3, 2], 3), 0.5).tolist() == expected


def test_bellman_loss_by_hand(lengths_mask):
    q, targets = torch.tensor([[1.0, 3.0], [2.0, 50.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    # 1 + 4 + 9, over 7 tokens of a larger batch
    assert bellman_loss(q, targets, lengths_mask([2, 1], 2), 7) == 2.0


def test_expectile_loss_by_hand(lengths_mask):
    values, q = torch.tensor([[1.0, 1.0], [0.0, 50.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    # u = 2, -1, 0: 0.75 * 4 + 0.25 * 1
    assert_close(expectile_loss(values, q, lengths_mask([2, 1], 2), 0.75, 5), torch.tensor(3.25 / 5))


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_expectile_of_0_and_4(tau):
    """Equal shares of 0 and 4: tau (4 - v) = (1 - tau) v has the solution v = 4 tau, where the gradient vanishes."""
    mask, q = torch.ones(2, dtype=torch.bool), torch.tensor([0.0, 4.0])
    slopes = []
    for place in (4 * tau - 0.1, 4 * tau, 4 * tau + 0.1):
        v = torch.full((2,), place, requires_grad=True)
        expectile_loss(v, q, mask, tau, 1).backward()
        slopes.append(v.grad.sum().item())
    assert slopes[0] < -1e-2
    assert abs(slopes[1]) < 1e-6
    assert slopes[2] > 1e-2


def test_conservative_term_by_hand():
    """Q = (log 1, log 2, log 5) over three tokens: -log of 1/8, 2/8, 5/8."""
    features = torch.eye(1).repeat(3, 1)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    found = taken_q_and_nll(features, weight, None, torch.tensor([0, 1, 2]))
    assert_close(found.q, weight[:, 0])
    assert_close(found.nll, torch.tensor([math.log(8), math.log(4), math.log(1.6)]))


def test_awac_by_hand(lengths_mask):
    q, v = torch.tensor([[1.0, 0.0, 99.0]]), torch.tensor([[0.0, 0.5, 0.0]])
    weights = awac_weights(q, v, 2.0)
    assert_close(weights, torch.tensor([[math.e**2, math.e**-1, 100.0]]))  # the last would be e^198
    logprobs = torch.tensor([[-1.0, -3.0, -50.0]])
    loss = awac_loss(logprobs, weights, lengths_mask([2], 3), 4)
    assert_close(loss, torch.tensor((math.e**2 + 3 / math.e) / 4))
    assert awac_weights(q, v, 0.0).tolist() == [[1.0, 1.0, 1.0]]


def test_polyak_by_hand():
    target, online = (
        [torch.tensor([1.0, 2.0]), torch.tensor(0.0)],
        [torch.tensor([3.0, 2.0]), torch.tensor(8.0)],
    )
    polyak_update(target, online, 0.25)
    assert [t.tolist() for t in target] == [[1.5, 2.0], 2.0]
    polyak_update(target, online, 1.0)
    assert [t.tolist() for t in target] == [[3.0, 2.0], 8.0]
    assert [t.tolist() for t in online] == [[3.0, 2.0], 8.0]
    with pytest.raises(ValueError, match="zip"):
        polyak_update(target, online[:1], 0.5)


def test_the_decoding_distribution_by_hand():
    """pi_b = (1/2, 1/4, 1/4), exp(A) = (1, 2, 6): (1/2, 1/2, 3/2) / (5/2)."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    q = torch.tensor([[1.0, 2.0, 6.0]]).log() + 5.0
    found = (logits + decoding_bonus(q, torch.tensor([5.0]), 1.0)).softmax(1)
    assert_close(found, torch.tensor([[0.2, 0.2, 0.6]]))
    squared = (logits + decoding_bonus(q, torch.tensor([5.0]), 2.0)).softmax(1)
    assert_close(squared, torch.tensor([[0.5, 1.0, 9.0]]) / 10.5)


def test_beta_0_is_the_policy_bit_for_bit_and_v_changes_no_probability():
    logits, q = torch.randn(4, 9), 50 * torch.randn(4, 9)
    assert torch.equal(logits + decoding_bonus(q, torch.randn(4), 0.0), logits)
    one, other = (logits + decoding_bonus(q, v, 3.0) for v in (torch.zeros(4), torch.randn(4)))
    assert_close(one.softmax(1), other.softmax(1), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- brute force, padding, gradients


def ragged(lengths_mask):
    mask = lengths_mask([4, 1, 3], 4)
    return [torch.randn(3, 4, dtype=torch.float64) for _ in range(4)] + [mask]


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.95])
def test_losses_by_brute_force(tau, lengths_mask):
    q, values, rewards, logprobs, mask = ragged(lengths_mask)
    targets = bellman_targets(rewards, values, mask, 0.9)
    weights = awac_weights(q, values, 1.5)
    sums = [0.0, 0.0, 0.0]
    for b, length in enumerate([4, 1, 3]):
        for t in range(length):
            following = values[b, t + 1].item() if t + 1 < length else 0.0
            target = rewards[b, t].item() + 0.9 * following
            u = q[b, t].item() - values[b, t].item()
            sums[0] += (target - q[b, t].item()) ** 2
            sums[1] += abs(tau - (1 if u < 0 else 0)) * u * u
            sums[2] -= min(math.exp(1.5 * u), 100) * logprobs[b, t].item()
    found = (
        bellman_loss(q, targets, mask, 8),
        expectile_loss(values, q, mask, tau, 8),
        awac_loss(logprobs, weights, mask, 8),
    )
    for loss, total in zip(found, sums, strict=True):
        assert abs(loss.item() - total / 8) < 1e-9


def losses(q, values, rewards, logprobs, mask, denominator):
    targets = bellman_targets(rewards, values, mask, 0.9)
    return (
        bellman_loss(q, targets, mask, denominator)
        + expectile_loss(values, q, mask, 0.8, denominator)
        + awac_loss(logprobs, awac_weights(q, values, 1.0), mask, denominator)
        + token_loss(logprobs, mask, denominator)
    )


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e30])
def test_contents_of_padding_do_not_matter(fill, lengths_mask):
    *tensors, mask = ragged(lengths_mask)
    results = []
    for spoiled in (False, True):
        leaves = [torch.where(mask, x, fill) if spoiled else x.clone() for x in tensors]
        leaves = [x.requires_grad_() for x in leaves]
        loss = losses(*leaves, mask, 8)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves if x.grad is not None)])
        assert all((x.grad[~mask] == 0).all() for x in leaves if x.grad is not None)
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_micro_batches_add_up(lengths_mask):
    *tensors, mask = ragged(lengths_mask)
    whole = losses(*tensors, mask, 8)
    parts = [losses(*(x[rows] for x in tensors), mask[rows], 8) for rows in ([0, 1], [2])]
    assert_close(sum(parts), whole)
    means = [losses(*(x[rows] for x in tensors), mask[rows], mask[rows].sum()) for rows in ([0, 1], [2])]
    assert abs(sum(means) / 2 - whole) > 1e-2


def test_who_gets_a_gradient(lengths_mask):
    """Targets are constants: V is not pulled towards Q by the Bellman loss, nor Q towards V by the other."""
    q, values, rewards, logprobs, mask = (
        x.requires_grad_() if x.is_floating_point() else x for x in ragged(lengths_mask)
    )
    bellman_loss(q, bellman_targets(rewards, values, mask, 0.9), mask, 1).backward()
    assert q.grad is not None and values.grad is None and rewards.grad is None
    q.grad = None
    expectile_loss(values, q, mask, 0.7, 1).backward()
    assert values.grad is not None and q.grad is None
    values.grad = None
    awac_loss(logprobs, awac_weights(q, values, 1.0), mask, 1).backward()
    assert logprobs.grad is not None and q.grad is None and values.grad is None


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_give_the_values_and_gradients_of_the_whole(chunk, bias):
    given = [torch.randn(5, 4), torch.randn(11, 4)] + ([torch.randn(11)] if bias else [])
    actions = torch.tensor([3, 10, 0, 3, 7])
    upstream = torch.randn(5), torch.randn(5)  # other numbers for each position
    gradients = []
    for chunked in (True, False):
        leaves = [x.double().clone().requires_grad_() for x in given]
        features, weight, b = (*leaves, None)[:3]
        if chunked:
            q, nll = taken_q_and_nll(features, weight, b, actions, chunk)
            assert_close(taken_q(features, weight, b, actions), q)
        else:
            table = features @ weight.T + (0 if b is None else b)
            q = table[range(5), actions]
            nll = -logprob.token_logprobs(table, actions)
        (q @ upstream[0].double() + nll @ upstream[1].double()).backward()
        gradients.append([q.detach(), nll.detach(), *(x.grad for x in leaves)])
    assert_close(*gradients)


def test_no_more_than_a_chunk_is_held():
    """What a forward keeps for the backward, in numbers: never [N, V]."""
    features, weight = torch.randn(64, 2, requires_grad=True), torch.randn(500, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        taken_q_and_nll(features, weight, None, torch.zeros(64, dtype=torch.long), 4)
    assert max(kept) < 64 * 500 / 8


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.5, math.nan])
def test_ranges(bad, lengths_mask):
    x, mask = torch.zeros(1, 2), lengths_mask([2], 2)
    with pytest.raises(ValueError, match="tau must lie in"):
        expectile_loss(x, x, mask, bad, 1)
    with pytest.raises(ValueError, match="gamma must lie in"):
        bellman_targets(x, x, mask, bad - 3)
    with pytest.raises(ValueError, match="denominator"):
        bellman_loss(x, x, mask, 0)


def test_a_gap_in_an_answer_is_an_error():
    x, mask = torch.zeros(1, 3), torch.tensor([[True, False, True]])
    with pytest.raises(ValueError, match=r"rows \[0\] of mask are not right-padded"):
        bellman_targets(x, x, mask, 1.0)


# ---------------------------------------------------------------- a Markov chain that can be solved

# Three tokens; an answer is up to three of them and ends early at token 0. A state is what was said so far.
TOKENS, LONGEST = 3, 3


def answers() -> list[tuple[int, ...]]:
    whole = [a for n in range(1, LONGEST + 1) for a in itertools.product(range(TOKENS), repeat=n)]
    return [a for a in whole if 0 not in a[:-1] and (a[-1] == 0 or len(a) == LONGEST)]


def reward(answer: tuple[int, ...]) -> float:
    """Anything without a pattern that a token could be judged by alone."""
    return math.sin(7 * sum(3**i * (token + 1) for i, token in enumerate(answer)))


def solve(gamma: float, pick) -> tuple[dict, dict]:
    """Q and V by recursion from the ends; `pick` makes V of the Qs of a state."""
    q, v = {}, {}

    def value(state: tuple[int, ...]) -> float:
        for token in range(TOKENS):
            after = (*state, token)
            ends = token == 0 or len(after) == LONGEST
            q[state, token] = reward(after) if ends else gamma * value(after)
        v[state] = pick([q[state, token] for token in range(TOKENS)])
        return v[state]

    value(())
    return q, v


def fit(tau: float, gamma: float, steps: int = 4000) -> tuple[dict, dict]:
    """Twin tables of Q, a table of V, trained with the functions above on each answer once."""
    data = answers()
    states = sorted({answer[:t] for answer in data for t in range(len(answer))})
    width = max(map(len, data))
    mask = torch.arange(width) < torch.tensor([len(a) for a in data])[:, None]
    index = torch.tensor([[states.index(a[: min(t, len(a) - 1)]) for t in range(width)] for a in data])
    actions = torch.tensor([[*a, *[0] * (width - len(a))] for a in data])
    rewards = terminal_rewards(torch.tensor([reward(a) for a in data], dtype=torch.float64), mask)
    q = [torch.randn(len(states), TOKENS, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    target = [table.detach().clone() for table in q]
    v = torch.zeros(len(states), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([*q, v], lr=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        values, tokens = v[index], mask.sum()
        goal = bellman_targets(rewards, values, mask, gamma)
        smaller = torch.minimum(*(table[index, actions] for table in target))
        loss = expectile_loss(values, smaller, mask, tau, tokens)
        for table in q:
            loss = loss + bellman_loss(table[index, actions], goal, mask, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        polyak_update(target, q, 0.1)
    found = {(s, a): target[0][i, a].item() for i, s in enumerate(states) for a in range(TOKENS)}
    return found, {s: v[i].item() for i, s in enumerate(states)}


def nearest(expected: dict, found: dict) -> float:
    assert expected.keys() == found.keys()
    return max(abs(expected[key] - found[key]) for key in expected)


def test_expectile_1_is_value_iteration():
    """V is the best continuation, not the average one; each step's greedy token is the optimal policy's."""
    q, v = fit(tau=0.999, gamma=0.9)
    best_q, best_v = solve(0.9, max)
    assert nearest(best_q, q) < 0.02
    assert nearest(best_v, v) < 0.02
    for state in best_v:
        scores = torch.tensor([[q[state, a] for a in range(TOKENS)]])
        bonus = decoding_bonus(scores, torch.tensor([v[state]]), 100.0)
        assert int(bonus.argmax()) == max(range(TOKENS), key=lambda a: best_q[state, a])
    mean_q, _ = solve(0.9, lambda qs: sum(qs) / len(qs))
    assert nearest(best_q, mean_q) > 0.2


def test_expectile_one_half_is_the_value_of_the_data():
    """V is the mean over the data's tokens: here each answer occurs once, so a prefix counts by its answers."""
    _, v = fit(tau=0.5, gamma=0.9)
    data = answers()

    def mean(state):
        def share(token):
            return sum(a[: len(state) + 1] == (*state, token) for a in data)

        def of(token):
            after = (*state, token)
            return reward(after) if token == 0 or len(after) == LONGEST else 0.9 * mean(after)

        return sum(share(a) * of(a) for a in range(TOKENS)) / sum(share(a) for a in range(TOKENS))

    assert nearest({state: mean(state) for state in v}, v) < 0.01
