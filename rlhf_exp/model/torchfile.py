"""The shapes of the weights in a pytorch_model.bin: no torch, no weights read, and no code of the file run.

The file is a zip archive with a pickle, data.pkl, that says how to build a dict of tensors, and one entry of bytes
for each storage. A pickle may call anything by name. The reader here knows the four names that such a dict is made
of and refuses every other one, and even these build descriptions, not tensors. (Loading the weights is
transformers' business, which reads with torch.load(weights_only=True).)
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_exp.errors import InputError

Shapes = dict[str, tuple[int, ...]]

# bytes of an element
STORAGES = {
    **{"FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "DoubleStorage": 8},
    **{
        "LongStorage": 8,
        "IntStorage": 4,
        "ShortStorage": 2,
        "CharStorage": 1,
        "ByteStorage": 1,
        "BoolStorage": 1,
    },
}


class _Storage(NamedTuple):
    entry: str
    bytes: int


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    storage: _Storage


class _StorageType(NamedTuple):
    element: int


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], *_: Any) -> _Tensor:
    """In the place of torch._utils._rebuild_tensor_v2."""
    return _Tensor(tuple(size), storage)


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    """In the place of torch._utils._rebuild_parameter."""
    return tensor


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _tensor if name == "_rebuild_tensor_v2" else _parameter
        raise ValueError(f"it asks for {module}.{name}, which no file of weights needs")

    def persistent_load(self, reference: Any) -> _Storage:
        kind, element, entry, _, count = reference
        if kind != "storage":
            raise ValueError(f"it refers to {kind!r}")
        return _Storage(str(entry), element.element * count)


def header(path: Path) -> Shapes:
    """Tensor name -> shape of one file.

    Raises InputError if it is not such a file, is cut off, names code, or is of the format before torch 1.6.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            index = next((name for name in names if name.rpartition("/")[2] == "data.pkl"), None)
            if index is None:
                raise ValueError("it has no data.pkl")
            with archive.open(index) as file:
                tensors = _Reader(file).load()
            root = index.removesuffix("data.pkl")
            for name, tensor in tensors.items():
                there = archive.getinfo(f"{root}data/{tensor.storage.entry}").file_size
                if there != tensor.storage.bytes:
                    raise ValueError(f"{name} has {there} bytes, needed are {tensor.storage.bytes}")
            return {name: tensor.shape for name, tensor in tensors.items()}
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} {_not_a_zip(path)}") from error
    except Exception as error:  # a pickle of anything can fail in any way
        raise InputError(f"{path} is not a sound file of weights: {error}") from error


def _not_a_zip(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80":  # a pickle's first byte
        return (
            "is of the format before torch 1.6, which is not read: convert it once with "
            "torch.save(torch.load(PATH, weights_only=True), PATH)"
        )
    return "is not a sound file of weights: " + (
        "it is cut off" if start == b"PK" else "it is no zip archive"
    )
