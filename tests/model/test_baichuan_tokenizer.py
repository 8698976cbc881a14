"""Baichuan's tokenizer against the sentencepiece library, which made tests/model/baichuan_ids.json (release 0.2.3).

Where the library is installed it is asked directly, too.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_exp.data.encode import encode_prompts, encode_responses
from rlhf_exp.errors import InputError
from rlhf_exp.model import baichuan
from rlhf_exp.model.baichuan import sentencepiece
from rlhf_exp.model.baichuan.tokenizer import BaiChuanTokenizer, BaichuanTokenizer
from rlhf_exp.schema import Dataset, Template, Views
from tests.model.baichuan_folder import HERE, write_baichuan

RECORDED = json.loads((HERE / "baichuan_ids.json").read_text())
KIND = {"baichuan1": "7b", "baichuan2": "baichuan2-7b"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, BaichuanTokenizer]:
    baichuan.register()
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        name: AutoTokenizer.from_pretrained(write_baichuan(root / name, kind)) for name, kind in KIND.items()
    }


@pytest.fixture(params=list(RECORDED))
def name(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(tokenizers, name) -> BaichuanTokenizer:
    return tokenizers[name]


def test_both_published_names_give_a_fast_tokenizer_of_ours(tokenizers):
    assert type(tokenizers["baichuan1"]) is BaiChuanTokenizer
    assert type(tokenizers["baichuan2"]) is BaichuanTokenizer
    for tokenizer in tokenizers.values():
        assert tokenizer.is_fast and len(tokenizer) == 1000
        assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.pad_token_id == 0
        assert tokenizer.model_max_length == 4096


def test_ids_equal_sentencepieces(tokenizer, name):
    rows = RECORDED[name]
    found = tokenizer([row["text"] for row in rows])[
        "input_ids"
    ]  # with special tokens: there are none to add
    for ids, row in zip(found, rows, strict=True):
        assert ids == row["ids"], row["text"]
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"]


def test_decoding_equals_sentencepieces(tokenizer, name):
    for row in RECORDED[name]:
        assert tokenizer.decode(row["ids"]) == row["decoded"], row["text"]


def test_what_is_encoded_comes_back(tokenizer, name):
    rows = [row for row in RECORDED[name] if "▁" not in row["text"]]  # which stands for a space
    for row in rows:
        assert tokenizer.decode(tokenizer(row["text"])["input_ids"]) == row["text"]


def test_any_text_is_cut_as_sentencepiece_cuts_it(tokenizer, name):
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    model = library.SentencePieceProcessor(model_file=str(HERE / f"{name}.model"))
    draw = random.Random(0)
    alphabet = "  \n\taeinorst  the movie  哈今天气很好我，。！１2 3.!-`<>😀é鸞▁"
    for _ in range(500):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 40)))
        ids = model.encode(text)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == model.decode(ids)


def test_dummy_prefix_is_the_files(tokenizers):
    """In Baichuan 1: '<reserved_102>' -> '▁', '<reserved_102>', as its published tokenizer gives."""
    pieces = [tokenizers[name].tokenize("<reserved_102>") for name in RECORDED]
    assert pieces == [["▁", "<reserved_102>"], ["<reserved_102>"]]
    assert tokenizers["baichuan1"].tokenize(" the") == ["▁", "▁the"]
    assert tokenizers["baichuan2"].tokenize(" the") == ["▁the"]
    assert tokenizers["baichuan1"].tokenize("") == []


def test_offsets_are_places_in_the_text(tokenizer):
    text = "The  movie 3\n哈哈<h2>ok <reserved_102>."
    encoded = tokenizer(text, return_offsets_mapping=True)
    covered = set()
    for token, (start, stop) in zip(encoded.tokens(), encoded["offset_mapping"], strict=True):
        covered |= set(range(start, stop))
        if token.startswith("<0x"):  # each of a character's bytes stands for the character
            assert stop - start == 1
            continue
        piece = token.replace("▁", " ")
        assert text[start:stop] == piece or (start == 0 and text[:stop] == piece[1:]), token
    assert covered == set(range(len(text)))
    batch = tokenizer([text, "a"], return_offsets_mapping=True)["offset_mapping"]
    assert batch[0] == encoded["offset_mapping"]
    tensor = tokenizer([text], return_offsets_mapping=True, return_tensors="pt")["offset_mapping"]
    assert [tuple(pair) for pair in tensor[0].tolist()] == encoded["offset_mapping"]


def test_a_saved_tokenizer_is_the_same(tokenizer, name, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichuan"}))
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)  # from tokenizer.json alone
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(again, BaichuanTokenizer)
    for row in RECORDED[name]:
        assert again(row["text"])["input_ids"] == row["ids"], row["text"]
        assert again.decode(row["ids"]) == row["decoded"]


def test_bos_and_eos_are_added_where_the_config_asks(tmp_path, name):
    folder = write_baichuan(tmp_path / name, KIND[name])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert tokenizer("the")["input_ids"] == [1, *plain]


def dataset(template: Template) -> Dataset:
    return Dataset(name="d", family="reviews", views=Views(), template=template, max_prompt_tokens=40)


@pytest.mark.parametrize("spelled", ["</s>", "<reserved_102>", "<unk>"])
def test_rows_cannot_place_special_tokens_but_templates_can(tokenizer, spelled):
    """The chat models' roles are user-defined symbols, which SentencePiece finds in any text."""
    template = Template(prompt="<reserved_102>{prompt}<reserved_103>", response="{response}")
    ids = encode_prompts(tokenizer, dataset(template), [f"a {spelled} b"])[0]
    user, assistant = tokenizer.convert_tokens_to_ids(["<reserved_102>", "<reserved_103>"])
    special = tokenizer.convert_tokens_to_ids(spelled)
    assert ids.count(user) == 1 and ids[-1] == assistant
    assert ids.count(special) == (special == user)
    answer = encode_responses(tokenizer, dataset(template), [f"a {spelled} b"])[0]
    assert special not in answer[:-1] and answer[-1] == 2
    assert tokenizer.decode(answer[:-1]) == f"a {spelled} b"


def test_a_response_that_begins_with_a_space_has_two_in_baichuan_1(tokenizers):
    """What the notes of conf/model say; in "{response}" it has the one that the model was trained with."""
    found = {}
    for name in RECORDED:
        for form in (" {response}", "{response}"):
            data = dataset(Template(response=form))
            (ids,) = encode_responses(tokenizers[name], data, ["the"], eos=False)
            found[name, form] = tokenizers[name].convert_ids_to_tokens(ids)
    assert found["baichuan1", " {response}"] == ["▁", "▁the"]
    assert found["baichuan1", "{response}"] == ["▁the"] == found["baichuan2", " {response}"]


def test_a_long_prompt_loses_its_left_end(tokenizer):
    template = Template(prompt="Q: {prompt}\nA:", response="{response}")
    whole = Dataset(name="d", family="reviews", views=Views(), template=template, max_prompt_tokens=900)
    text = "the movie was 好 " * 30
    full, short = (encode_prompts(tokenizer, data, [text])[0] for data in (whole, dataset(template)))
    front = tokenizer("Q: ")["input_ids"]
    assert len(short) == 40
    keep = len(short) - len(front) + 1
    assert short[-keep + 4 :] == full[-keep + 4 :] and short[:2] == full[:2]


# ---------------------------------------------------------------- the file


def test_the_parsed_model_is_what_was_trained():
    first, second = (sentencepiece.read(HERE / f"{name}.model") for name in RECORDED)
    assert (first.add_dummy_prefix, second.add_dummy_prefix) == (True, False)
    for model in (first, second):
        assert len(model.pieces) == 1000
        assert model.model_type == 2 and model.byte_fallback and model.charsmap == b""
        assert not model.remove_extra_whitespaces
        assert [piece.text for piece in model.pieces[:6]] == ["<unk>", "<s>", "</s>", "<SEP>", "<CLS>", "\n"]
        assert [piece.type for piece in model.pieces[:4]] == [2, 3, 3, 4]
        assert sum(piece.type == 6 for piece in model.pieces) == 256
        # BPE: the score of the n-th merge is -n
        scores = [piece.score for piece in model.pieces if piece.type == 1]
        assert scores == [-float(n) for n in range(len(scores))]
    assert "▁▁▁▁" in {piece.text for piece in second.pieces if piece.type == 4}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not a SentencePiece model of type BPE"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a sound SentencePiece model"),
        ((HERE / "baichuan1.model").read_bytes()[:5000], "not a sound SentencePiece model"),
        (b"\xff" * 40, "not a sound SentencePiece model"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, reason):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        sentencepiece.read(path)


def test_a_missing_tokenizer_is_said(tmp_path: Path):
    from rlhf_exp.model.base import load_base
    from rlhf_exp.schema import Model

    folder = write_baichuan(tmp_path / "model", "7b")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load_base(Model(name="baichuan", path=str(folder)), "cpu")
