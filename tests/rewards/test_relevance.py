"""The encoder's vectors against a text at a time without padding; the published one where it is fetched."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, BertTokenizerFast

from rlhf_exp.errors import InputError
from rlhf_exp.fetch import model_folder
from rlhf_exp.rewards import functions, relevance

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["how", "do", "i", "bake", "bread", "mix", "flour", "and", "water", "stocks", "fell"],
]
TEXTS = ["how do i bake bread", "mix flour and water", "stocks fell", "bread", "bread bread " * 20, "xyz"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random BERT in the layout of sentence-transformers."""
    path = tmp_path_factory.mktemp("encoder")
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    return path


def vector(folder, text: str) -> torch.Tensor:
    """Mean of the last hidden states of one text, cut at 12 tokens with [CLS] and [SEP]; no batch, no padding."""
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()][:10]
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[2, *ids, 3]])).last_hidden_state[0]
    mean = hidden.mean(dim=0)
    return mean / mean.norm()


def test_vectors_are_means_whatever_the_batch(folder, monkeypatch):
    expected = torch.stack([vector(folder, text) for text in TEXTS])
    for size in (1, 2, 64):
        monkeypatch.setattr(relevance, "BATCH", size)
        found = torch.stack(relevance.encode(relevance._load(folder, "cpu"), TEXTS))
        assert torch.allclose(found, expected, atol=1e-5)
    assert len({round(float(v), 4) for v in expected[:, 0]}) == len(TEXTS)


def test_the_score_is_the_cosine_of_prompt_and_response(folder):
    prompts, responses = [TEXTS[0], TEXTS[0], TEXTS[0], "", " "], [TEXTS[1], TEXTS[2], TEXTS[0], TEXTS[0], ""]
    scores = functions.score(f"relevance:{folder}", prompts, responses)
    expected = [
        float(vector(folder, p) @ vector(folder, r)) for p, r in zip(prompts[:3], responses[:3], strict=True)
    ]
    assert scores == pytest.approx([*expected, 0.0, 0.0], abs=1e-5)
    assert scores[2] == pytest.approx(1.0, abs=1e-5)
    assert scores[1] < 0.999


def test_what_is_no_encoder_is_refused(folder, tmp_path):
    functions.check(f"relevance:{folder}")
    other = tmp_path / "cls"
    (other / "1_Pooling").mkdir(parents=True)
    (other / "config.json").write_text("{}")
    (other / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False}))
    with pytest.raises(InputError, match=r"cls does not pool by the mean \(1_Pooling/config.json\)$"):
        functions.check(f"relevance:{other}")
    (other / "1_Pooling" / "config.json").unlink()
    with pytest.raises(InputError, match=r"^relevance:.*cls: cannot load the encoder in .*cls: "):
        functions.score(f"relevance:{other}", ["p"], ["r"])


def test_the_fingerprint_is_of_the_weights(folder, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first = functions.fingerprint(f"relevance:{folder}")
    assert functions.fingerprint(f"relevance:{copy}") == first
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert functions.fingerprint(f"relevance:{copy}") != first


def test_minilm_says_what_its_card_says():
    """The example of sentence-transformers' documentation of all-MiniLM-L6-v2."""
    if model_folder("minilm") is None:
        pytest.skip("minilm is not fetched: python -m rlhf_exp.fetch minilm")
    prompts = ["That is a happy person"] * 3
    responses = ["That is a very happy person", "That is a happy dog", "Today is a sunny day"]
    scores = functions.score("relevance", prompts, responses)
    assert scores == pytest.approx([0.943, 0.695, 0.257], abs=0.002)


def test_an_encoder_is_found_by_folder_or_by_hub_id(folder, monkeypatch):
    assert relevance.find(str(folder)) == folder
    assert relevance.find("owner/nobody-has-it") is None  # not here, and not to be fetched
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
    assert relevance.fingerprint(str(folder)) != "hub:owner/name"
    for name in ("./nowhere", "nowhere", "a/b/c"):
        with pytest.raises(InputError, match="is no model folder"):
            relevance.find(name)


def test_means_over_answers_and_over_those_with_a_reference(folder):
    prompts, answers = TEXTS[:3], ["mix flour and water", "", "bread"]
    cosines = [
        float(vector(folder, p) @ vector(folder, a)) if a else 0.0
        for p, a in zip(prompts, answers, strict=True)
    ]
    found = relevance.measure(str(folder), prompts, [None, None, "bread"], answers, "cpu")
    assert found == pytest.approx({"relevance": sum(cosines) / 3, "reference_relevance": 1.0}, abs=1e-5)
    assert set(relevance.measure(str(folder), prompts, [None] * 3, answers, "cpu")) == {"relevance"}
