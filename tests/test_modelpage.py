"""docs/models.md is made of conf/model, and what is there."""

from __future__ import annotations

import re

import yaml

from rlhf_exp import modelpage
from rlhf_exp.paths import conf_dir
from tests.conftest import ROOT

DOCS = ROOT / "docs" / "models.md"


def test_the_page_is_current():
    assert DOCS.read_text(encoding="utf-8") == modelpage.page(), (
        "run: python -m rlhf_exp.modelpage > docs/models.md"
    )


def test_the_page_has_every_model_with_its_licence():
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]+) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    files = sorted((conf_dir() / "model").glob("*.yaml"))
    assert rows == [(path.stem, yaml.safe_load(path.read_text())["licence"]) for path in files]


def test_the_tokenizers_that_begin_with_a_space_say_so():
    """Those of Baichuan 1 (tests/model/test_baichuan_tokenizer.py)."""
    sections = {part.partition("\n")[0]: part for part in modelpage.page().split("\n## ")}
    said = {name for name, part in sections.items() if "begins every text with a space" in part}
    assert said == {"baichuan7b", "baichuan13b"}


def test_memory_by_hand():
    entry = {"billion_params": 8.0303, "vocab_size": 128256, "hidden_size": 4096}
    # bf16: 2 bytes each; 4 bit: 2 x 128256 x 4096 numbers (1.05 billion) stay at 2 bytes, the others take 0.516
    assert modelpage._memory(entry) == ("16", "5.7")
    assert modelpage._memory({}) == ("", "")
