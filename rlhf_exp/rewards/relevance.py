"""How near a response's meaning is to the prompt's: cosine similarity of a sentence encoder's vectors.

Reimers & Gurevych 2019, Sentence-BERT: the mean of the last hidden states over the tokens, normalised. By default
the encoder is all-MiniLM-L6-v2 (English), which `python -m rlhf_exp.fetch minilm` gets; any other whose vectors are
such means will do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "minilm"  # of rlhf_exp.fetch
BATCH = 64  # texts a forward


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


def score(folder: str, prompts: Sequence[str], responses: Sequence[str], device: str) -> list[float]:
    """Cosine similarity of each prompt and its response, -1 to 1; 0 where one of them is empty."""
    encoder = _load(locate(folder), device)
    unique = list(dict.fromkeys([*prompts, *responses]))
    vectors = dict(zip(unique, encode(encoder, unique), strict=True))
    return [
        float(vectors[prompt] @ vectors[response]) if prompt.strip() and response.strip() else 0.0
        for prompt, response in zip(prompts, responses, strict=True)
    ]


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
    length = min(_json(folder / "sentence_bert_config.json").get("max_seq_length") or positions, positions)
    return Encoder(model.requires_grad_(False).eval(), tokenizer, length)


def _pooling(folder: Path) -> dict[str, Any]:
    return _json(folder / "1_Pooling" / "config.json")


def _json(path: Path) -> dict[str, Any]:
    """A file of the sentence-transformers format; nothing where it is not there or not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
