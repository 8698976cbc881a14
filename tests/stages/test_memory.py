"""The memory plan of a command, whether it fits, and micro-batches that are found: nothing of it changes a result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_exp import cli, compose, distributed
from rlhf_exp.distributed import exchange, identity
from rlhf_exp.errors import InputError
from rlhf_exp.memory import counted, kernels
from rlhf_exp.schema import Memory, Optim, Reward, Train
from rlhf_exp.stages import direct, ilql, memory, microbatch, plan, ppo, reward, sft

STAGES = {"sft": sft, "reward": reward, "dpo": direct, "ilql": ilql}


def adapter_of(run: Any) -> dict[str, torch.Tensor]:
    from rlhf_exp.model.roles import read_weights

    return read_weights(run.path / "adapter")


def train(
    stage: str, run_config: Any, context: Any, adapters: Any, name: str, **more: Any
) -> dict[str, torch.Tensor]:
    """Three steps of a stage; the adapter that it publishes."""
    given = {"train": Train(steps=3, batch_size=8, micro_batch_size=4), "optim": Optim(lr=1e-2)} | more
    if stage == "reward":
        given |= {"reward": Reward(probes=0, center=False)}
    config = run_config(stage, {"limit": 16}, **given)
    parents = {} if stage in ("sft", "reward") else {"sft": adapters["sft"]}
    if stage == "ilql":  # chosen answers +1, rejected ones -1
        config.ilql.data, config.ilql.eval_prompts, config.ilql.betas = "comparisons", 2, [0.0]
        config.generation.max_new_tokens, config.reward_source.kind = 2, "length"
    made = context(name, **parents)
    STAGES[stage].run(config, made)
    return adapter_of(made.folder)


@pytest.mark.parametrize("stage", STAGES)
def test_recomputation_trains_the_same_adapter(stage, run_config, context, adapters):
    plain = train(stage, run_config, context, adapters, "plain")
    memory_ = Memory(gradient_checkpointing=True)
    again = train(stage, run_config, context, adapters, "again", memory=memory_)
    assert any(value.abs().max() > 0 for name, value in plain.items() if "lora_B" in name)
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name


def test_recomputation_is_what_happens(run_config, context, adapters, monkeypatch):
    """Each layer of two is computed once more for each micro-batch."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    count = [0]
    plain = LlamaAttention.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += torch.is_grad_enabled()
        return plain(self, *arguments, **options)

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    seen = []
    for recompute in (False, True):
        count[0] = 0
        more = {
            "memory": Memory(gradient_checkpointing=recompute),
            "train": Train(steps=1, batch_size=8, micro_batch_size=4),
        }
        train("reward", run_config, context, adapters, f"run{recompute}", **more)
        seen.append(count[0])
    assert seen[1] == 2 * seen[0]


@pytest.mark.parametrize("critic", ["trunk", "own"])
def test_ppo_recomputes_each_role_in_itself(critic, ppo_config, context, adapters):
    found = []
    for name, recompute in (("plain", False), ("again", True)):
        settings = {"steps": 2, "epochs": 2, "micro_batch_size": 4, "critic": critic, "critic_init": "zero"}
        config = ppo_config(settings, memory=Memory(gradient_checkpointing=recompute))
        made = context(name, sft=adapters["sft"], reward=adapters["reward"])
        ppo.run(config, made)
        found.append(adapter_of(made.folder))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_packing_by_tokens_changes_nothing_but_rounding(ppo_config, context, adapters):
    found = []
    for name, tokens in (("rows", 0), ("tokens", 60)):
        config = ppo_config({"steps": 2, "epochs": 2, "micro_batch_tokens": tokens})
        made = context(name, sft=adapters["sft"], reward=adapters["reward"])
        ppo.run(config, made)
        found.append(adapter_of(made.folder))
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() < 1e-4, name


@pytest.mark.parametrize(
    ("lengths", "size", "tokens", "groups"),
    [
        ([3, 4, 9], 2, 0, [[0, 1], [2]]),
        ([3, 4, 5, 9], 9, 12, [[0, 1], [2], [3]]),  # three of 5 would be 15 with their padding
        ([3, 4, 4, 9], 9, 12, [[0, 1, 2], [3]]),
        ([20, 30], 9, 12, [[0], [1]]),  # longer than the limit: each by itself
        ([1, 1, 1, 1], 3, 100, [[0, 1, 2], [3]]),
        ([], 3, 5, []),
    ],
)
def test_groups_by_rows_and_tokens(lengths, size, tokens, groups):
    from rlhf_exp.data.collate import grouped

    assert grouped(range(len(lengths)), lengths, size, tokens) == groups


# ---------------------------------------------------------------- as many as fit


@pytest.fixture
def _no_code(monkeypatch):
    """As on a processor whose float32 products nobody compiles (memory/kernels.py)."""
    monkeypatch.setattr(kernels, "multiplies_float32", lambda: False)


def room(monkeypatch: pytest.MonkeyPatch, bytes_: float | None) -> None:
    monkeypatch.setattr(memory, "room_of", lambda config, device: bytes_)


@pytest.mark.usefixtures("_no_code")
def test_as_many_rows_as_fit_by_the_plan(run_config, context, monkeypatch, capsys):
    """By hand, of the tiny model (d 64, m 128, two layers, V 512) with LoRA of rank 4 on all seven matrices.

    16 bytes for each of 8192 trained numbers, 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192). A token keeps 3720 bytes in a
    layer: norms 2 * (256 + 4), x A^T 7 * 16, what the matrices read 4 * (3 * 64 + 128), q, k and v 3 * 256, sums of
    4 heads 16, gate and up 2 * 512; and 512 at the end. Of 7 + 5 tokens 11 are in TRL's tile, 8.25 floats each.
    """
    row = 12 * (2 * 3720 + 512) + 11 * (512 * 33 + 64 * 4)
    needs = {size: 16 * 8192 + size * row for size in (12, 6, 4, 3, 2, 1)}
    config = run_config("sft", train=Train(batch_size=12, micro_batch_size=0), optim=Optim())
    made = context()
    for (size, need), smaller in zip(needs.items(), (6, 4, 3, 2, 1, 1), strict=True):
        for more, expected in ((1, size), (-1, smaller)):
            room(monkeypatch, (need + more) / 0.75)  # of what is free
            found = microbatch.settle(config, made, [[1] * 7], [[1] * 5])
            assert found.train.micro_batch_size == expected
            assert f"micro-batch: {expected} of 12 rows" in capsys.readouterr().out
    room(monkeypatch, None)  # nobody knows: all
    assert microbatch.settle(config, made, [[1] * 7], [[1] * 5]).train.micro_batch_size == 12


@pytest.mark.usefixtures("_no_code")
def test_of_a_device_that_is_given_base_and_process_are_a_part(run_config, context, monkeypatch):
    row = 12 * (2 * 3720 + 512) + 11 * (512 * 33 + 64 * 4)
    whole = counted.PROCESS + 4 * 106_816 + 16 * 8192 + 3 * row
    for more, expected in ((1, 3), (-1, 2)):
        given = {"memory": Memory(gb=(whole + more) / 0.75 / 1e9), "optim": Optim()}
        config = run_config("sft", train=Train(batch_size=12, micro_batch_size=0), **given)
        found = microbatch.settle(config, context(f"run{expected}"), [[1] * 7], [[1] * 5])
        assert found.train.micro_batch_size == expected


@pytest.mark.usefixtures("_no_code")
def test_ppos_rows_need_not_divide(ppo_config, context, monkeypatch):
    config = ppo_config({"batch_size": 8, "micro_batch_size": 0})
    made = context()
    facts = microbatch.facts_here(config, made)
    base = 4 * facts.model.parameters + counted.PROCESS
    planned = microbatch.shortened(config, [[1] * 30], None)
    rollout = memory.need_of(microbatch.sized(planned, 1), facts) - base
    need = memory.need_of(microbatch.sized(planned, 7), facts) - base
    assert need > rollout
    room(monkeypatch, need / microbatch.MARGIN["cpu"] * 1.0001)
    assert microbatch.settle(config, made, [[1] * 30]).ppo.micro_batch_size == 7


@pytest.mark.parametrize("stage", STAGES)
def test_found_sizes_train_the_same(stage, run_config, context, adapters, monkeypatch):
    """Whole batches where there is room for them, and single rows where there is none."""
    given = Train(steps=2, batch_size=8, micro_batch_size=0)
    found = []
    for name, bytes_ in (("much", None), ("little", 1.0)):
        room(monkeypatch, bytes_)
        found.append(train(stage, run_config, context, adapters, name, train=given))
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() < 2e-3, name


def test_what_does_not_fit_is_said_before_it_trains(run_config, context, monkeypatch):
    config = run_config("sft", train=Train(batch_size=16, micro_batch_size=16), optim=Optim())
    room(monkeypatch, 1e5)
    made = replace(context(), typed=lambda setting: f"'upstream.sft={setting}'")
    with pytest.raises(InputError) as caught:
        sft.run(config, made)
    (line,) = caught.value.problems
    assert line.startswith("sft needs ")
    assert "of memory, but there are 100 kB: set " in line
    assert "'upstream.sft=train.micro_batch_size=4' (saves " in line


def test_what_does_not_fit_on_another_rank_ends_this_one_too(run_config, context, monkeypatch):
    """Else it would wait in its first sum for a rank that has left."""
    config = run_config("sft", train=Train(batch_size=16, micro_batch_size=8), optim=Optim())
    made = context()
    monkeypatch.setattr(identity, "_place", distributed.Place(0, 2, 0))
    other = ("InputError", ["sft needs more than there is"], None)
    monkeypatch.setattr(exchange, "gather", lambda own: [own, other])
    room(monkeypatch, None)
    with pytest.raises(InputError) as caught:
        microbatch.settle(config, made, [[1] * 7], [[1] * 5])
    assert caught.value.problems == ["rank 1: sft needs more than there is"]


def test_a_stage_before_the_target_gives_its_advice_as_it_is_typed(capfd, monkeypatch, tmp_path):
    """What only the data's lengths tell, once the base is loaded."""
    monkeypatch.setattr(memory, "require_weights", lambda plan: None)
    room(monkeypatch, 1e5)
    words = ["stage=ppo", "model=tiny", "tracking=none", "reward_source=length", f"output_dir={tmp_path}"]
    assert cli.main(words) == 2
    (line,) = (each for each in capfd.readouterr().err.splitlines() if each.startswith("error: "))
    assert line.startswith("error: sft needs ")
    assert "'upstream.sft={train: {micro_batch_size: " in line


def test_advice_can_be_typed(tmp_path):
    """A lever of a stage that the command needs goes below `upstream`; what all stages share does not."""
    with compose.session():
        config, choices = compose.compose(["stage=ppo", "model=tiny", f"output_dir={tmp_path}"])
        todo = plan.make(config, choices)
        nodes = {node.name: node for node in todo.nodes}
        typed = [
            memory.typed("train.micro_batch_size=4", nodes["sft"], todo),
            memory.typed("memory.gradient_checkpointing=true", nodes["sft"], todo),
            memory.typed("ppo.micro_batch_size=8", nodes["ppo"], todo),
        ]
        member = replace(nodes["reward"], name="reward_1")
        assert memory.typed("lora=default", member, todo) == "'upstream.reward={lora: default}'"
        assert typed == [
            "'upstream.sft={train: {micro_batch_size: 4}}'",
            "memory.gradient_checkpointing=true",
            "ppo.micro_batch_size=8",
        ]
        again = [f"stage=ppo model=tiny output_dir={tmp_path}", *(word.strip("'") for word in typed)]
        changed, choices = compose.compose([*again[0].split(), *again[1:]])
        sft = {node.name: node.config for node in plan.make(changed, choices).nodes}["sft"]
        assert sft.train.micro_batch_size == 4 and sft.memory.gradient_checkpointing


ADVICE = ("stage=sft", "model=tiny", "memory.device=cuda", "memory.ranks=4", "dry_run=true")


@pytest.mark.parametrize(
    ("words", "there", "not_there"),
    [
        (("strategy=ddp",), ("zero2", "zero3", "4bit", "8bit"), ()),
        (("strategy=ddp", "model.quantization=4bit"), ("zero2",), ("zero3",)),
        (("strategy=ddp", "lora=dora"), ("zero2",), ("zero3",)),
        (("strategy=ddp", "lora=full"), ("lora=default",), ("zero2", "zero3")),
        (("strategy=ddp", "optim.moments=8bit"), (), ("zero2", "zero3")),
        (("strategy=zero1",), ("zero2", "4bit"), ("8bit",)),
        (("strategy=zero3",), ("model.quantization=4bit strategy=zero2",), ("8bit",)),
    ],
)
def test_nothing_is_advised_that_would_be_refused(words, there, not_there, tmp_path, monkeypatch):
    """As a user types it: each setting goes with the command into a new one."""
    from rlhf_exp.strategies import require

    monkeypatch.setattr("rlhf_exp.memory.levers.LEAST", -1.0)  # also what saves next to nothing
    with compose.session():
        typed = [*ADVICE, *words, f"output_dir={tmp_path}"]
        config, choices = compose.compose(typed)
        todo = plan.make(config, choices)
        facts = memory.facts_of(todo.target, todo)
        settings = [lever.setting for lever in memory.helps(todo.target.config, facts)]
        assert settings
        said = " ".join(settings)
        assert [name in said for name in there] == [True] * len(there)
        assert [name in said for name in not_there] == [False] * len(not_there)
        for setting in settings:
            changed, _ = compose.compose([*typed, *setting.split()])
            assert list(require.stage_problems(changed, 4)) == [], setting


def test_chunks_are_told_where_they_save(capfd, tmp_path):
    """The tiny model's logits are fewer than what a chunk and its gradient take."""
    words = (
        "stage=ppo",
        "adapters.sft=base",
        "reward_source=length",
        "dry_run=true",
        f"output_dir={tmp_path}",
    )
    assert cli.main([*words, "model=tiny"]) == 0
    assert "log-probs in chunks" not in capfd.readouterr().out
    assert cli.main([*words, "model=llama2_7b", "memory.device=cuda"]) == 0
    (line,) = (each for each in capfd.readouterr().out.splitlines() if "log-probs in chunks" in each)
    assert line.startswith("log-probs in chunks (always on): ")


def test_ranks_on_one_machine_share_what_is_free(run_config, monkeypatch):
    """Four of eight ranks are here: a quarter; of two GPUs, which two ranks have each, the half of one."""
    config = run_config("sft")
    monkeypatch.setattr(identity, "_place", distributed.Place(1, 8, 1))
    monkeypatch.setattr(identity, "_taken", {"LOCAL_WORLD_SIZE": "4"})
    monkeypatch.setattr(memory.free, "of_host", lambda: 8e9)
    assert memory.room_of(config, "cpu") == 2e9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6e9, 9e9))
    assert memory.room_of(config, "cuda") == 3e9
    monkeypatch.setattr(identity, "_taken", {})  # nobody says: all of them
    assert memory.room_of(config, "cpu") == 1e9
    monkeypatch.setattr(memory.free, "of_host", lambda: None)
    assert memory.room_of(config, "cpu") is None
    assert memory.room_of(run_config("sft", memory=Memory(gb=3)), "cpu") == 3e9


def test_on_a_full_device_half_is_tried(ppo_config, context, monkeypatch):
    """The plan said all 8: the device has room for 3 rows, so that 4 fails and 2 passes."""
    config = ppo_config({"batch_size": 8, "micro_batch_size": 0})
    made, seen = context(), []

    class Full(Exception):
        pass

    def attempt(config: Any, base: Any, size: int, facts: Any) -> None:
        seen.append(size)
        if size > 3:
            raise Full

    monkeypatch.setattr(torch.cuda, "OutOfMemoryError", Full)
    monkeypatch.setattr(microbatch, "attempt", attempt)
    facts = replace(microbatch.facts_here(config, made), device="cuda")
    monkeypatch.setattr(microbatch, "facts_here", lambda config, context: facts)
    room(monkeypatch, None)
    assert microbatch.settle(config, made, [[1] * 30]).ppo.micro_batch_size == 2
    assert seen == [8, 4, 2]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_an_attempt_leaves_nothing_behind(stage, run_config, ppo_config, context, fingerprint, unchanged):
    config = ppo_config() if stage == "ppo" else run_config(stage, train=Train(batch_size=4), optim=Optim())
    made = context()
    before, state = fingerprint(made.base), torch.random.get_rng_state()
    microbatch.attempt(config, made.base, 2, microbatch.facts_here(config, made))
    unchanged(made.base, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_filler_is_what_a_forward_does_not_hold(run_config, context, monkeypatch):
    """Adapter, gradients, moments and logits of the plan, in bytes."""
    config = run_config("sft", train=Train(batch_size=4, micro_batch_size=2), optim=Optim())
    made, asked = context(), []
    plain = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **k: (asked.append(a[0]) if k.get("dtype") == torch.uint8 else None, plain(*a, **k))[1],
    )
    facts = microbatch.facts_here(config, made)
    microbatch.attempt(config, made.base, 2, facts)
    rank = memory.rank_of(config, facts).device
    kinds = (counted.GRADIENTS, counted.OPTIMISER, counted.LOGITS, counted.PARAMETERS)
    assert asked == [
        int(sum(i.bytes for i in rank if i.kind in kinds and i.role != "base" and i.there(counted.FORWARD)))
    ]
