"""What a strategy refuses before anything is loaded, in one line each."""

from __future__ import annotations

import importlib.util

import pytest

from rlhf_exp import cli, compose
from rlhf_exp.strategies import require

PPO = ("stage=ppo", "ppo.batch_size=32", "ppo.micro_batch_size=4")
Z = "strategy.deepspeed"


def problems(*words: str, ranks: int = 2) -> list[str]:
    config, _ = compose.compose([*(words if words[0].startswith("stage") else (*PPO, *words))])
    return [*require.config_problems(config, ranks), *require.stage_problems(config, ranks)]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_what_is_in_conf_is_sound(strategy):
    assert problems(f"strategy={strategy}") == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_single_is_one_process(ranks):
    found = problems("strategy=single", ranks=ranks)
    assert len(found) == ranks - 1
    assert all(
        line.startswith("2 processes were started as ranks of one run, but strategy=single") for line in found
    )


def test_micro_times_accumulation_times_ranks_is_the_batch():
    words = ("strategy=zero2", f"{Z}.gradient_accumulation_steps=2")
    assert problems(*words) == [
        "strategy.deepspeed: micro 4 x accumulation 2 x ranks 2 = 16, ppo.batch_size says 32"
    ]
    assert problems(*words, ranks=4) == []


def test_a_micro_batch_that_is_found_out_later():
    words = ("strategy=zero2", "ppo.micro_batch_size=0", f"{Z}.gradient_accumulation_steps=2")
    assert problems(*words) == [
        "strategy.deepspeed.gradient_accumulation_steps says how a batch is cut, which ppo.micro_batch_size=0 finds "
        "out: leave one of them out"
    ]


def test_a_minibatch_is_what_a_step_takes():
    words = (
        "strategy=zero2",
        f"{Z}.gradient_accumulation_steps=4",
        "ppo.minibatches=2",
        "ppo.samples_per_prompt=2",
    )
    key = "ppo.batch_size x ppo.samples_per_prompt / ppo.minibatches"
    assert problems(*words, ranks=1) == [
        f"strategy.deepspeed: micro 4 x accumulation 4 x ranks 1 = 16, {key} says 32"
    ]
    assert problems(*words, ranks=2) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((f"{Z}.train_batch_size=64",), f"{Z}.train_batch_size=64 contradicts ppo.batch_size, which says 32"),
        (
            (f"{Z}.train_micro_batch_size_per_gpu=8",),
            f"{Z}.train_micro_batch_size_per_gpu=8 contradicts ppo.micro_batch_size=4: set that alone",
        ),
        (
            (f"{Z}.gradient_clipping=0.5",),
            f"{Z}.gradient_clipping=0.5 contradicts optim.max_grad_norm=1: set that alone",
        ),
        (
            ("+strategy.deepspeed.optimizer={type: Adam}",),
            f"{Z}.optimizer is ours to say: set optim, and leave it out",
        ),
        (
            (f"{Z}.zero_optimization.stage=1",),
            f"{Z}.zero_optimization.stage=1 contradicts strategy=zero2: choose strategy=zero1",
        ),
        (
            (f"{Z}.zero_optimisation={{}}",),
            f"unknown key {Z}.zero_optimisation; did you mean zero_optimization?",
        ),
    ],
)
def test_a_key_of_deepspeed_that_contradicts_ours(words, said):
    if words[0].startswith("+"):
        words = (words[0][1:], *words[1:])
    assert problems("strategy=zero2", *words) == [said]


ZERO = f"{Z}.zero_optimization"


@pytest.mark.parametrize(
    ("strategy", "word", "said"),
    [
        (
            "zero3_offload",
            f"{ZERO}.offload_param=cpu",
            f"{ZERO}.offload_param must hold settings such as {{device: cpu}}, got 'cpu'",
        ),
        (
            "zero2",
            f"{ZERO}.offload_optimizer=cpu",
            f"{ZERO}.offload_optimizer must hold settings such as {{device: cpu}}, got 'cpu'",
        ),
        ("zero2", f"{Z}.aio=3", f"{Z}.aio must be settings such as {{queue_depth: 8}}, got 3"),
        ("zero2", f"{Z}.aio={{depth: 8}}", f"unknown key {Z}.aio.depth"),
        (
            "zero2",
            f"{Z}.aio={{queue_depth: x}}",
            f"{Z}.aio.queue_depth must be a whole number from 1 on, got 'x'",
        ),
        (
            "zero2",
            f"{Z}.comms_logger={{enabled: maybe}}",
            f"{Z}.comms_logger.enabled must be true or false, got 'maybe'",
        ),
        (
            "zero2",
            f"{Z}.prescale_gradients=maybe",
            f"{Z}.prescale_gradients must be true or false, got 'maybe'",
        ),
        (
            "zero2",
            f"{Z}.prescale_gradients=true",
            f"{Z}.prescale_gradients=true needs {ZERO}.reduce_scatter=false, or strategy=zero1: leave it out",
        ),
        (
            "zero3",
            f"{Z}.gradient_predivide_factor=4",
            f"{Z}.gradient_predivide_factor=4 needs {ZERO}.reduce_scatter=false, or strategy=zero1: leave it out",
        ),
        (
            "zero1",
            f"{Z}.gradient_predivide_factor=0",
            f"{Z}.gradient_predivide_factor must be a number above 0, got 0",
        ),
        (
            "zero1",
            f"{Z}.communication_data_type=foo",
            f"{Z}.communication_data_type must be fp32, fp16 or bf16, got 'foo'",
        ),
        ("zero2", f"{ZERO}.stage=0", f"{ZERO}.stage must be 2 with strategy=zero2, got 0: leave it out"),
        ("zero2", f"{ZERO}.stage=x", f"{ZERO}.stage must be 2 with strategy=zero2, got 'x': leave it out"),
        (
            "zero2",
            f"{ZERO}.offload_param={{device: cpu}}",
            f"{ZERO}.offload_param is about the base's shards, and strategy=zero2 has none: choose "
            "strategy=zero3_offload, or leave it out",
        ),
        (
            "zero1",
            f"{ZERO}.stage3_max_live_parameters=100",
            f"{ZERO}.stage3_max_live_parameters is about the base's shards, and strategy=zero1 has none: choose "
            "strategy=zero3, or leave it out",
        ),
        ("zero2", f"{ZERO}={{1: 2}}", f"unknown key {ZERO}.1"),
        ("zero2", f"{Z}.zero_optimization=3", f"{ZERO} must hold settings such as {{stage: 2}}, got 3"),
    ],
)
def test_a_value_that_deepspeed_would_stumble_over(strategy, word, said):
    assert problems(f"strategy={strategy}", word) == [said]


@pytest.mark.parametrize(
    ("strategy", "word"),
    [
        ("zero1", f"{Z}.gradient_predivide_factor=4"),
        ("zero2", f"{ZERO}.offload_optimizer={{device: cpu}}"),
        ("zero3", f"{ZERO}.stage3_max_live_parameters=100"),
        ("zero2", f"{Z}.communication_data_type=fp32"),
        ("zero3", f"{Z}.aio={{queue_depth: 8, single_submit: false}}"),
        ("zero2", f"{Z}.comms_logger={{enabled: false}}"),
    ],
)
def test_values_that_it_takes(strategy, word):
    assert problems(f"strategy={strategy}", word) == []


def test_it_is_told_in_a_dry_run(capfd, tmp_path):
    words = ("stage=sft", "model=tiny", "strategy=zero1", f"{Z}.aio=3", f"output_dir={tmp_path}")
    assert cli.main([*words, "dry_run=true"]) == 2
    assert capfd.readouterr().err == f"error: {Z}.aio must be settings such as {{queue_depth: 8}}, got 3\n"


def test_the_same_value_again_is_no_contradiction():
    words = ("train_batch_size=32", "train_micro_batch_size_per_gpu=4", "gradient_accumulation_steps=4")
    assert problems("strategy=zero1", *(f"{Z}.{word}" for word in words), f"{Z}.gradient_clipping=1.0") == []


def test_a_wrong_value_is_told_by_its_key():
    (line,) = problems("strategy=zero2", f"{Z}.zero_optimization.reduce_bucket_size=many")
    assert line.startswith(f"{Z}.zero_optimization.reduce_bucket_size: ")
    assert line.endswith("got 'many'")


def test_settings_of_deepspeed_without_deepspeed():
    assert problems("strategy=ddp", f"{Z}.train_batch_size=4") == [
        f"{Z} is for strategy=zero1, zero2 and zero3, but strategy=ddp: leave it out"
    ]


def test_more_ranks_than_prompts():
    assert problems("strategy=ddp", "ppo.batch_size=2", ranks=4) == [
        "ppo: 4 ranks, but 2 prompts in a batch (ppo.batch_size): each rank needs one; raise the batch, or start "
        "fewer ranks"
    ]
    # as many answers as there may be: what is shared out are prompts
    assert problems("strategy=ddp", "ppo.batch_size=1", "ppo.samples_per_prompt=8") == [
        "ppo: 2 ranks, but 1 prompt in a batch (ppo.batch_size): each rank needs one; raise the batch, or start "
        "fewer ranks"
    ]
    assert problems("strategy=ddp", "ppo.batch_size=4", "ppo.minibatches=4", ranks=2) == [
        "ppo: 2 ranks, but 1 row in a batch (ppo.batch_size / ppo.minibatches): each rank needs one; raise the "
        "batch, or start fewer ranks"
    ]


@pytest.mark.parametrize(("stage", "unit"), [("sft", "rows"), ("reward", "pairs"), ("dpo", "pairs")])
def test_more_ranks_than_a_stage_shares_out(stage, unit):
    words = (f"stage={stage}", "strategy=ddp", "train.batch_size=2", "train.micro_batch_size=2")
    assert problems(*words) == []
    assert problems(*words, ranks=3) == [
        f"{stage}: 3 ranks, but 2 {unit} in a batch (train.batch_size): each rank needs one; raise the batch, or "
        "start fewer ranks"
    ]


def test_offload_to_a_folder_that_cannot_be_written():
    """/proc is closed to root too."""
    (line,) = offload("/proc/shards")
    assert line.startswith(
        f"{Z}.zero_optimization.offload_param.nvme_path=/proc/shards cannot be written: /proc: "
    )


def test_offload_to_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = offload(tmp_path / "file" / "shards")
    assert line.endswith(f"cannot be written: {tmp_path / 'file'} is no folder")


@pytest.mark.parametrize("there", [True, False])
def test_offload_to_a_disk_needs_an_op_that_is_compiled(there, tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: there)
    said = f"{Z}.zero_optimization.offload_param.device=nvme needs DeepSpeed's async_io, which cannot be built here"
    found = offload(tmp_path)
    assert len(found) == (not there)
    assert all(line.startswith(said) for line in found)


def offload(folder) -> list[str]:
    key = f"{Z}.zero_optimization.offload_param"
    return problems("strategy=zero3_offload", f"{key}.device=nvme", f"{key}.nvme_path={folder}")


def test_without_the_package(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else real(name, *rest)
    )
    assert problems("strategy=zero2") == [
        "strategy=zero2 needs the package deepspeed, which is not installed: pip install deepspeed, or choose "
        "strategy=ddp"
    ]
    assert problems("strategy=ddp") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [(("lora=dora",), "lora.dora"), (("model.quantization=4bit",), "model.quantization=4bit")],
)
def test_what_a_base_in_shards_cannot_have(words, said):
    (line,) = problems("strategy=zero3", *words)
    assert line.startswith(said)
    assert problems("strategy=zero2", *words) == []
