"""The tokenizer of a Baichuan folder, as a fast one, from its tokenizer.model.

What that file says is followed: pieces and their scores (BPE by score), byte fallback, symbols that are matched
before anything is merged (digits, some punctuation, <reserved_102> ...), and whether a text starts with a dummy
space (in Baichuan 1 it does). The published tokenizers add no BOS unless tokenizer_config.json asks for one;
neither does this.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import BatchEncoding, TokenizersBackend

from rlhf_exp.model.baichuan import sentencepiece
from rlhf_exp.model.baichuan.sentencepiece import Piece, SentencePieceModel

SPACE = "▁"
# symbols that the chat models use as marks of a role: a text that spells one must not place it
ROLE = re.compile(r"<reserved_\d+>")


class BaichuanTokenizer(TokenizersBackend):
    """Made from tokenizer.model, or from the tokenizer.json that it saved itself."""

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "tokenizer.model",
        "tokenizer_file": "tokenizer.json",
    }
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """What transformers calls to turn a folder's files into arguments of the constructor."""
        file = kwargs.get("vocab_file")
        if kwargs.get("tokenizer_file") or file is None:
            return super().convert_to_native_format(**kwargs)
        model = sentencepiece.read(Path(file))
        kwargs["tokenizer_object"] = build(model)
        kwargs["add_dummy_prefix"] = model.add_dummy_prefix
        for name, default in (("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")):
            kwargs.setdefault(name, default)
        return kwargs

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """Every text starts with a space if the model was trained so; offsets count without it.

        The space goes in here, since the tokenizers library can only put it before each stretch between two
        matched symbols, or leaves it out before a text that starts with a space, and SentencePiece does neither.
        """
        if not self.init_kwargs.get("add_dummy_prefix"):
            return super()._encode_plus(text, text_pair, **kwargs)
        if kwargs.get("is_split_into_words"):
            raise NotImplementedError("this tokenizer takes texts, not words")
        encoded = super()._encode_plus(_prefixed(text), _prefixed(text_pair), **kwargs)
        if "offset_mapping" in encoded:
            encoded["offset_mapping"] = _shifted(encoded["offset_mapping"])
        return encoded


class BaiChuanTokenizer(BaichuanTokenizer):
    """By the name that Baichuan-7B's tokenizer_config.json gives it."""


def _prefixed(text: Any) -> Any:
    if isinstance(text, str):
        return f" {text}" if text else text
    return text if text is None else [_prefixed(part) for part in text]


def _shifted(offsets: Any) -> Any:
    """(start, stop) one to the left, not below 0, in nested lists or a tensor."""
    if hasattr(offsets, "clamp"):
        return (offsets - 1).clamp(min=0)
    if isinstance(offsets, tuple):
        return tuple(max(0, place - 1) for place in offsets)
    return [_shifted(part) for part in offsets]


def build(model: SentencePieceModel) -> Tokenizer:
    """The same pieces, merges and rules for the tokenizers library, without the dummy prefix."""
    vocabulary = {piece.text: i for i, piece in enumerate(model.pieces)}
    unknown = next((p.text for p in model.pieces if p.type == sentencepiece.UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=list(merges(model.pieces)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(model)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        decoding.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.text, special=True, normalized=False)
            for piece in model.pieces
            if piece.type in (sentencepiece.UNKNOWN, sentencepiece.CONTROL) or _is_role(piece)
        ]
    )
    # matched in the normalised text, where a space is written as in the piece
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, special=False, normalized=True)
            for piece in model.pieces
            if piece.type == sentencepiece.USER_DEFINED and not _is_role(piece)
        ]
    )
    return tokenizer


def _is_role(piece: Piece) -> bool:
    return piece.type == sentencepiece.USER_DEFINED and ROLE.fullmatch(piece.text) is not None


def _normalizer(model: SentencePieceModel) -> Any:
    steps: list[Any] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Strip(left=not model.add_dummy_prefix, right=True))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def merges(pieces: list[Piece]) -> Iterator[tuple[str, str]]:
    """Pairs in the order in which they are merged: by the score of what they make.

    SentencePiece's BPE merges the pair that makes the piece of the highest score, the leftmost of several. Only
    normal pieces take part.
    """
    normal = {piece.text for piece in pieces if piece.type == sentencepiece.NORMAL}
    ranked = sorted((-piece.score, i) for i, piece in enumerate(pieces) if piece.type == sentencepiece.NORMAL)
    for _, i in ranked:
        text = pieces[i].text
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                yield text[:cut], text[cut:]
