"""Real processes, gloo: whatever the strategy and the number of ranks, a run is that of one process.

The oracle is the one process, whose own formulas are tested elsewhere: losses and every other logged figure, the
gradients that each optimiser step is made of, and the published weights after five steps or more, in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import pytest

from tests.strategies.conftest import STAGES, STRATEGIES, Trained, done, require_same, require_same_run

SEVERAL = ("ddp", "zero1", "zero2", "zero3")
STRATEGY = pytest.mark.parametrize("strategy", SEVERAL)
FIVE = ("sft", "reward", "ppo", "dpo", "ilql")
# the whole rollout is one micro-batch, whose forward is kept for the update
KEPT = ("ppo.minibatches=1", "ppo.micro_batch_size=8")


@pytest.mark.timeout(300)
@STRATEGY
@pytest.mark.parametrize("stage", FIVE)
def test_two_ranks_train_as_one(stage, strategy, alone, two, runs):
    trained = done(two, runs, f"{strategy}2", stage, STRATEGIES[strategy])
    require_same(alone(stage), trained)
    if stage == "sft" and strategy != "zero3":
        only_adapters_travel(trained, strategy)


def only_adapters_travel(trained: Trained, strategy: str) -> None:
    """In each step their gradients, under ZeRO once more, and what was stepped; and who has a gradient at all."""
    from safetensors.torch import load_file

    gradients = load_file(trained.gradients[0])
    size = sum(x.numel() for x in gradients.values()) * 4  # of all steps
    sharded = strategy.startswith("zero")
    for sent in trained.sent:
        assert sent.pop("all_reduce") == pytest.approx(
            (2 if sharded else 1) * size + 4 * len(gradients), rel=1e-3
        )
        assert sent == ({"all_gather_into_tensor": size} if sharded else {})


@pytest.mark.timeout(300)
@pytest.mark.parametrize("micro", [1, 3])
def test_how_rows_are_cut_changes_nothing(micro, alone, two, runs):
    """Also where the ranks' numbers of micro-batches differ: 4 rows of a minibatch are 2 + 2, or 3 hands of one."""
    words = (*STRATEGIES["ddp"], f"ppo.micro_batch_size={micro}")
    require_same(alone("ppo"), done(two, runs, f"micro{micro}", "ppo", words))


ODD = {stage: ("train.batch_size=7", "train.micro_batch_size=1") for stage in STAGES}
ODD["ppo"] = ("ppo.batch_size=7", "ppo.minibatches=1", "ppo.micro_batch_size=1")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "stage", [stage if stage == "ppo" else pytest.param(stage, marks=pytest.mark.long) for stage in STAGES]
)
def test_a_rank_with_fewer_rows_computes_one_that_does_not_count(stage, alone, two, runs):
    """Under zero3 all ranks go through as many forwards: 4, of which one rank has 3 rows."""
    require_same(
        alone(stage, *ODD[stage]), done(two, runs, "odd", stage, (*STRATEGIES["zero3"], *ODD[stage]))
    )


@pytest.mark.long
@pytest.mark.timeout(1200)
@STRATEGY
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in FIVE])
def test_the_other_stages(stage, strategy, alone, two, runs):
    require_same(alone(stage), done(two, runs, f"{strategy}2", stage, STRATEGIES[strategy]))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", STAGES)
def test_shards_of_the_base_in_the_memory_of_the_host(stage, alone, two, runs):
    require_same(alone(stage), done(two, runs, "offload2", stage, STRATEGIES["zero3_offload"]))


def long_but(few: Collection[tuple], *values: Iterable) -> list:
    """All combinations, of which only a few are in each run of the tests."""
    marks = [pytest.mark.long, pytest.mark.timeout(1200)]
    return [each if each in few else pytest.param(*each, marks=marks) for each in itertools.product(*values)]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("stage", "strategy"), long_but([("sft", "zero2")], STAGES, SEVERAL))
def test_four_ranks(stage, strategy, alone, four, runs):
    require_same(alone(stage), done(four, runs, f"{strategy}4", stage, STRATEGIES[strategy]))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("stage", "micro", "strategy"),
    long_but(
        [("sft", 2, "ddp")],
        [stage for stage in STAGES if stage != "ppo"],
        [1, 2, 4],
        ["single", "ddp", "zero3"],
    ),
)
def test_any_accumulation(stage, micro, strategy, alone, one, two, runs):
    """Of one process: TRL's own SFTTrainer means entropy and accuracy over micro-batches, whatever their sizes."""
    words = (f"train.micro_batch_size={micro}", *STRATEGIES.get(strategy, ()))
    left_out = ("train/entropy", "train/token_accuracy") if (stage, strategy) == ("sft", "single") else ()
    ranks = one if strategy == "single" else two
    require_same(alone(stage), done(ranks, runs, f"{strategy}_micro{micro}", stage, words), left_out)


@pytest.mark.long
@pytest.mark.timeout(1200)
@STRATEGY
def test_a_forward_that_is_kept_for_the_update(strategy, alone, two, runs):
    trained = done(two, runs, f"{strategy}_kept", "ppo", (*KEPT, *STRATEGIES[strategy]))
    require_same(alone("ppo", *KEPT), trained)


SHORT = "train: {steps: 4, batch_size: 8, micro_batch_size: 8}"
WHOLE = {
    # sft, reward, ppo with the learned reward, eval
    "pipeline": ("experiment=smoke",),
    "prefer": (
        *("stage=prefer", "model=tiny", "dataset=reviews", f"upstream.sft={{{SHORT}}}", "prefer.prompts=12"),
        *("prefer.labellers=[length,learned]", "prefer.samples=3", "generation.max_new_tokens=8"),
        f"upstream.labeller={{{SHORT}}}",
    ),
    "probe": ("stage=probe", "model=tiny", "dataset=reviews", f"upstream.reward={{{SHORT}}}"),
}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize("target", WHOLE)
def test_a_stage_and_all_that_it_stands_on(target, strategy, one, two, runs):
    """What only answers, scores or reports too."""
    words = (*WHOLE[target], "model.dtype=float32", "threads=1", "tracking=none", "device=cpu")
    names = {f"{target}_alone": (one, ()), f"{target}_{strategy}": (two, STRATEGIES[strategy])}
    for name, (ranks, more) in names.items():
        answers = ranks.run(runs, [*words, *more, f"output_dir={name}"])
        assert [answer["code"] for answer in answers] == [0] * len(answers), answers[0]["err"]
    ours, theirs = ({file.parent for file in (runs / name).glob("*/*/run.json")} for name in names)
    found = {folder.relative_to(runs / f"{target}_alone") for folder in ours}
    assert found == {folder.relative_to(runs / f"{target}_{strategy}") for folder in theirs}
    assert len(found) > 1
    for run in found:
        require_same_run(*(runs / name / run for name in names))
