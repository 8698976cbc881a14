"""Reads tokenizer.model, a SentencePiece model, without the sentencepiece library.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece). What a BPE tokenizer needs of it
are the pieces with their scores and types and a few switches, which the wire format gives away in a page of code.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_exp.errors import InputError

# SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    type: int = NORMAL


@dataclass
class SentencePieceModel:
    """Ids are places in `pieces`. Defaults are those of the .proto file."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    charsmap: bytes = b""  # a compiled Unicode normalisation; empty: none
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def read(path: Path) -> SentencePieceModel:
    """InputError for a file that is no SentencePiece model, or one of another kind than BPE."""
    try:
        model = _parse(path.read_bytes())
    except (OSError, ValueError, struct.error, IndexError, TypeError) as error:
        raise InputError(f"{path} is not a sound SentencePiece model: {error}") from error
    if not model.pieces or model.model_type != BPE:
        raise InputError(f"{path} is not a SentencePiece model of type BPE")
    return model


def _parse(data: bytes) -> SentencePieceModel:
    """ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec."""
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            entries = dict(_fields(value))
            score = struct.unpack("<f", entries[2])[0] if 2 in entries else 0.0
            model.pieces.append(Piece(entries.get(1, b"").decode(), score, entries.get(3, NORMAL)))
        elif number == 2:
            entries = dict(_fields(value))
            model.model_type = entries.get(3, 1)
            model.byte_fallback = bool(entries.get(35, False))
        elif number == 3:
            entries = dict(_fields(value))
            model.charsmap = entries.get(2, b"")
            model.add_dummy_prefix = bool(entries.get(3, True))
            model.remove_extra_whitespaces = bool(entries.get(4, True))
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field of a message; ValueError where the bytes are no message."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + size > len(data):
            raise ValueError(f"it ends within a field at byte {place}")
        yield number, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """(value, place after it) of a base-128 number, least significant digits first."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
        if shift > 63:
            raise ValueError(f"a number without an end at byte {place}")
