"""Who a process is, how rows are dealt, how moments in shards come together: without other processes."""

from __future__ import annotations

import os

import pytest
import torch

from rlhf_exp import distributed
from rlhf_exp.distributed import Place, exchange, identity
from rlhf_exp.errors import InputError
from rlhf_exp.strategies import moments

SOUND = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_the_environment_says_who_it_is():
    assert identity._read(SOUND) == Place(1, 4, 0)
    assert identity._read({}) == Place(0, 1, 0)
    assert identity._read({"WORLD_SIZE": "1", "RANK": "0"}) == Place(0, 1, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "", "MASTER_PORT": ""}, "says WORLD_SIZE=4, but not RANK, MASTER_PORT"),
        ({"RANK": "4"}, "RANK=4 is not one of WORLD_SIZE=4 ranks"),
        ({"RANK": "one"}, "must be whole numbers"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port that ranks could meet at: torchrun --standalone"),
    ],
)
def test_half_an_environment_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        identity._read(SOUND | changes)


def test_a_library_sees_what_the_launcher_gave_and_nobody_else_does(monkeypatch):
    monkeypatch.setattr(identity, "_place", None)
    monkeypatch.setattr(identity, "_taken", {})
    for key, value in SOUND.items():
        monkeypatch.setenv(key, value)
    identity.take()
    assert "WORLD_SIZE" not in os.environ
    assert "LOCAL_RANK" not in os.environ
    with distributed.environment():
        assert {key: os.environ[key] for key in SOUND} == SOUND
    assert "WORLD_SIZE" not in os.environ


def of(rank: int, size: int, monkeypatch) -> None:
    monkeypatch.setattr(identity, "_place", Place(rank, size, rank))


def pairs(hand):
    return [list(hand[i : i + 2]) for i in range(0, len(hand), 2)]


@pytest.mark.parametrize(
    ("size", "dealt"),
    [
        (1, [[0, 1], [2, 3], [4]]),
        (2, [[0, 2], [1, 3], [4], []]),
        (3, [[0, 3], [1, 4], [2]]),
        (6, [[0], [1], [2], [3], [4], []]),
    ],
)
def test_rows_are_dealt_like_cards(size, dealt, monkeypatch):
    of(0, size, monkeypatch)
    assert distributed.shares(range(5), pairs) == dealt


def test_every_rank_takes_its_own_groups_and_all_have_as_many_turns(monkeypatch):
    found = {}
    for rank in range(2):
        of(rank, 2, monkeypatch)
        groups = distributed.shares(range(5), pairs)
        found[rank] = list(distributed.turns(groups, all_take_part=True))
        assert list(distributed.turns(groups, all_take_part=False)) == [t for t in found[rank] if t[1]]
    assert found == {0: [([0, 2], True), ([4], True)], 1: [([1, 3], True), ([0], False)]}


def test_groups_that_nobody_dealt_are_taken_in_turn(monkeypatch):
    """What is not a multiple of the ranks: the last ones have one turn less, or compute without counting."""
    of(1, 2, monkeypatch)
    assert list(distributed.turns([[3], [4], [5]], all_take_part=True)) == [([4], True), ([3], False)]
    assert list(distributed.turns([], all_take_part=True)) == []


def test_errors_of_several_ranks_are_told_once():
    def attempt(*lines):
        return ("InputError", list(lines), None) if lines else (None, [], 1)

    for found, told in (
        ([attempt("a"), attempt("a")], ["a"]),
        ([attempt(), attempt("b", "c")], ["rank 1: b", "rank 1: c"]),
        ([attempt("a"), attempt("b")], ["a", "rank 1: b"]),
    ):
        with pytest.raises(InputError) as caught:
            exchange._unwrap(found)
        assert caught.value.problems == told
    assert exchange._unwrap([attempt(), attempt()]) == 1


def test_moments_of_any_number_of_shards_are_those_of_adamw(tmp_path):
    """Two groups; the first has 7 numbers, cut into shards of 4 with one of padding."""
    weights = [torch.nn.Parameter(torch.arange(n, dtype=torch.float32).view(shape)) for n, shape in PARTS]
    groups = [{"params": weights[:2]}, {"params": weights[2:], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for weight in weights:
        weight.grad = torch.cos(weight.detach())
    optimizer.step()
    expected = optimizer.state_dict()
    for rank in range(2):
        shard = {}
        for i, members in enumerate((weights[:2], weights[2:])):
            for name in moments.MOMENTS:
                flat = torch.cat([optimizer.state[w][name].reshape(-1) for w in members])
                size = -(-len(flat) // 2)
                shard[f"{i}.{name}"] = torch.cat([flat, torch.full((2 * size - len(flat),), 9.0)])[
                    rank * size : (rank + 1) * size
                ]
        moments.write(tmp_path, rank, 2, shard)
    described = {
        "param_groups": expected["param_groups"],
        "shapes": [[[2, 2], [3]], [[5]]],
        "steps": [1.0, 1.0],
    }
    found = moments.join(described, moments.read(tmp_path))
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        for name, value in state.items():
            assert torch.equal(found["state"][number][name], value), (number, name)


PARTS = ((4, (2, 2)), (3, (3,)), (5, (5,)))
