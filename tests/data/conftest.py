"""Hand-written rows in the published schemas, a tokenizer one can count by hand, the folder of real rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_exp.schema import Dataset, Template, Views

PLAIN = Template(name="plain", prompt="{prompt}", response=" {response}", truncate="left")
TLDR = Template(name="tldr", prompt="{prompt}", response=" {response}", truncate="tldr")


@pytest.fixture
def write(tmp_path):
    """write(name, rows or text or bytes) -> path below tmp_path; rows become lines of JSON."""

    def write(name: str, content) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def dataset():
    """dataset(family, place of every view, **fields) -> schema.Dataset; all rows are in train by default."""

    def dataset(family: str, place: object, **fields) -> Dataset:
        views = place if isinstance(place, Views) else Views(str(place), str(place), str(place))
        shares = {"validation_share": 0.0, "heldout_share": 0.0}
        template = TLDR if family == "tldr" else PLAIN
        own = {"name": family, "family": family, "views": views, "template": template, **shares}
        return Dataset(**(own | fields))

    return dataset


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, so that lengths are string lengths; "</s>" (id 256) is EOS and PAD."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: id for id, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Samples of the published datasets, kept outside the repository (CI sets RLHF_EXP_TEST_DATA)."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RLHF_EXP_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real rows: {folder} does not exist (set RLHF_EXP_TEST_DATA)")
    return folder
