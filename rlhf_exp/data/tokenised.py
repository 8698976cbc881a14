"""A split of a view as token ids, made once: kept in the cache under a hash of everything it depends on.

    tokenised(tokenizer, tokenizer_key, dataset, "comparisons", "train") -> Tokenised

That is the texts, the template and the limits, the tokenizer and the versions of the libraries that run it. A file
that is not whole is made anew. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.data.encode import Cuts, encode_prompts, encode_responses
from rlhf_exp.data.load import load_view
from rlhf_exp.data.records import Record
from rlhf_exp.paths import cache_dir
from rlhf_exp.schema import Dataset
from rlhf_exp.store import atomic
from rlhf_exp.store.keys import canonical

if TYPE_CHECKING:
    import numpy as np

VERSION = 1  # of what is computed here and in encode.py: raise it when the same rows give other ids
ANSWERS = {"demonstrations": ("response",), "comparisons": ("chosen", "rejected"), "prompts": ()}

Ids = list[list[int]]


@dataclass
class Tokenised:
    """Token ids of the records of a split, in their order."""

    prompts: Ids
    answers: dict[str, Ids] = field(default_factory=dict)  # field of the record -> ids, EOS included
    cuts: Cuts = field(default_factory=Cuts)


def tokenised(tokenizer: Any, tokenizer_key: str, dataset: Dataset, view: str, split: str) -> Tokenised:
    """From the cache, else tokenised and put there. tokenizer_key: a hash of the tokenizer's files and settings."""
    records = load_view(dataset, view, split)
    path = cache_dir() / "tokenised" / f"{_key(tokenizer_key, dataset, view, records)}.safetensors"
    found = _read(path, ANSWERS[view])
    if found is None:
        found = _tokenise(tokenizer, dataset, view, records)
        _write(path, found)
    return found


def _key(tokenizer_key: str, dataset: Dataset, view: str, records: Sequence[Record]) -> str:
    """A hash of the texts themselves: what a loader makes of a file may change while the file does not."""
    texts = sha256()
    for record in records:
        texts.update(repr((record.prompt, *(getattr(record, name) for name in ANSWERS[view]))).encode())
    parts = {
        "version": VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
        "tokenizer": tokenizer_key,
        "texts": texts.hexdigest(),
        "template": canonical(dataset.template),
        "most": [dataset.max_prompt_tokens, dataset.max_response_tokens],
        "view": view,
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenise(tokenizer: Any, dataset: Dataset, view: str, records: Sequence[Record]) -> Tokenised:
    cuts = Cuts()
    prompts = encode_prompts(tokenizer, dataset, [record.prompt for record in records], cuts)
    answers = {
        name: encode_responses(tokenizer, dataset, [getattr(record, name) for record in records], cuts=cuts)
        for name in ANSWERS[view]
    }
    return Tokenised(prompts, answers, cuts)


def _write(path: Path, rows: Tokenised) -> None:
    import numpy as np
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    for name, ids in {"prompt": rows.prompts, **rows.answers}.items():
        arrays[f"{name}.lengths"] = np.array([len(row) for row in ids], dtype=np.int32)
        arrays[f"{name}.ids"] = np.array([id for row in ids for id in row], dtype=np.int32)
    cuts = rows.cuts
    arrays["cuts.prompt_tokens"] = np.array(cuts.prompt_tokens, dtype=np.int32)
    arrays["cuts.response_tokens"] = np.array(cuts.response_tokens, dtype=np.int32)
    arrays["cuts.number"] = np.array([cuts.prompts_cut, cuts.responses_cut], dtype=np.int64)
    content = save(arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the digest tells a file that was cut off or changed from a whole one
        atomic.write_bytes(path, sha256(content).digest() + content)
    except OSError:
        return  # a cache that cannot be written costs time, not the run


def _read(path: Path, answers: Sequence[str]) -> Tokenised | None:
    from safetensors.numpy import load

    try:
        whole = path.read_bytes()
    except OSError:
        return None
    digest, content = whole[:32], whole[32:]
    if sha256(content).digest() != digest:
        return None
    arrays = load(content)

    def rows(name: str) -> Ids:
        flat, ids, start = arrays[f"{name}.ids"].tolist(), [], 0
        for length in arrays[f"{name}.lengths"].tolist():
            ids.append(flat[start : start + length])
            start += length
        return ids

    cuts = Cuts(
        arrays["cuts.prompt_tokens"].tolist(),
        arrays["cuts.response_tokens"].tolist(),
        *arrays["cuts.number"].tolist(),
    )
    return Tokenised(rows("prompt"), {name: rows(name) for name in answers}, cuts)
