"""Real processes, gloo: whatever the strategy and the number of ranks, a run is that of one process.

The oracle is the one process, whose own formulas are tested elsewhere: losses, gradient norms and every other logged
figure, and the published weights after five optimiser steps, in float32.
"""

from __future__ import annotations

import pytest

from tests.strategies.conftest import STAGES, STRATEGIES, done, require_same


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_one(stage, alone, two, runs):
    require_same(alone(stage), done(two, runs, "ddp2", stage, STRATEGIES["ddp"]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_ppo_in_shards_is_ppo(strategy, alone, two, runs):
    require_same(alone("ppo"), done(two, runs, f"{strategy}2", "ppo", STRATEGIES[strategy]))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ddp"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_in_shards(strategy, stage, alone, two, runs):
    require_same(alone(stage), done(two, runs, f"{strategy}2_all", stage, STRATEGIES[strategy]))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks(strategy, stage, alone, four, runs):
    require_same(alone(stage), done(four, runs, f"{strategy}4", stage, STRATEGIES[strategy]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("micro", [1, 3])
def test_how_rows_are_cut_changes_nothing(micro, alone, two, runs):
    """Also where the ranks' numbers of micro-batches differ: 4 rows of a minibatch are 2 + 2, or 3 hands of one."""
    words = (*STRATEGIES["ddp"], f"ppo.micro_batch_size={micro}")
    require_same(alone("ppo"), done(two, runs, f"micro{micro}", "ppo", words))
