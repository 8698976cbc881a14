"""How near a response's meaning is to the prompt's: cosine similarity of a sentence encoder's vectors.

Reimers & Gurevych 2019, Sentence-BERT: the mean of the last hidden states over the tokens, normalised. By default
the encoder is all-MiniLM-L6-v2 (English), which `python -m rlhf_exp.fetch minilm` gets; any other whose vectors are
such means will do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "minilm"  # of rlhf_exp.fetch
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BATCH = 64  # texts a forward
SHORT = 512  # tokens, of an encoder whose config does not say how many positions it has: BERT's


class Encoder(NamedTuple):
    model: Any
    tokenizer: Any
    length: int  # tokens it was trained for; longer texts lose their end


def locate(folder: str) -> Path:
    """The encoder's folder; "": the fetched one. InputError where there is none, or one that pools otherwise."""
    if not folder:
        from rlhf_exp.model.base import resolve
        from rlhf_exp.schema import Model

        return resolve(Model(name=DEFAULT, source="pypi"))
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json")
    if not _pooling(path).get("pooling_mode_mean_tokens", True):
        raise InputError(f"the encoder in {folder} does not pool by the mean (1_Pooling/config.json)")
    return path


def find(encoder: str, download: bool = False) -> Path | None:
    """The folder of `minilm`, of a folder or of a hub id, which is None where it is not here and not to be fetched.

    Raises InputError for anything else.
    """
    if encoder == DEFAULT:
        return locate("")
    if Path(encoder).expanduser().is_dir() or not HUB_ID.fullmatch(encoder):
        return locate(encoder)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "1_Pooling/*"]
    for local in (True, False)[: 1 + download]:
        try:
            folder = Path(snapshot_download(encoder, local_files_only=local, allow_patterns=wanted))
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                return locate(str(folder))
        except InputError:
            raise
        except Exception as error:  # the hub library's several ways to say "not there"
            if not local:
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise InputError(
                    f"{encoder} is not on this machine and could not be downloaded ({reason})"
                ) from error
    if download:
        raise InputError(f"{encoder} has no config.json or no safetensors")
    return None


def fingerprint(encoder: str) -> str:
    """What stands for an encoder in a store key."""
    from rlhf_exp.model.base import content_hash

    folder = find(encoder)
    return f"hub:{encoder}" if folder is None else content_hash(folder)


def score(folder: str, prompts: Sequence[str], responses: Sequence[str], device: str) -> list[float]:
    """Cosine similarity of each prompt and its response, -1 to 1; 0 where one of them is empty."""
    encoder = _load(locate(folder), device)
    unique = list(dict.fromkeys([*prompts, *responses]))
    vectors = dict(zip(unique, encode(encoder, unique), strict=True))
    return [
        float(vectors[prompt] @ vectors[response]) if prompt.strip() and response.strip() else 0.0
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def measure(
    folder: str, prompts: Sequence[str], references: Sequence[str | None], answers: Sequence[str], device: str
) -> dict[str, float]:
    """Mean cosine of the answers and their prompts, and of those that have a reference and that."""
    found = {"relevance": score(folder, prompts, answers, device)}
    pairs = [(r, a) for r, a in zip(references, answers, strict=True) if r is not None]
    if pairs:
        found["reference_relevance"] = score(folder, *zip(*pairs, strict=True), device)
    return {name: sum(values) / len(values) for name, values in found.items()}


def encode(encoder: Encoder, texts: Sequence[str]) -> list[Tensor]:
    """A vector float32[d] of length 1 for each text, on the CPU."""
    import torch

    found: list[Any] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    device = encoder.model.device
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = encoder.tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=encoder.length,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            hidden = encoder.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        for i, vector in zip(rows, torch.nn.functional.normalize(mean, dim=1).cpu(), strict=True):
            found[i] = vector
    return found


@lru_cache(maxsize=2)
def _load(folder: Path, device: str) -> Encoder:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from rlhf_exp.model.quiet import no_progress_bars

    try:
        with no_progress_bars(), torch.random.fork_rng(devices=[]):
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, **local).to(device)
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # a foreign folder can make it say anything
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"cannot load the encoder in {folder}: {reason}") from error
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return Encoder(model.requires_grad_(False).eval(), tokenizer, longest(folder, positions))


def longest(folder: Path, positions: int) -> int:
    """Tokens that an encoder with so many positions was trained for."""
    return min(_json(folder / "sentence_bert_config.json").get("max_seq_length") or positions, positions)


def _pooling(folder: Path) -> dict[str, Any]:
    return _json(folder / "1_Pooling" / "config.json")


def _json(path: Path) -> dict[str, Any]:
    """A file of the sentence-transformers format; nothing where it is not there or not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
