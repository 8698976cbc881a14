"""Adapters that are given instead of trained: found, checked against the base, hashed - before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_exp.errors import InputError
from rlhf_exp.model import shapes
from rlhf_exp.paths import cache_dir
from rlhf_exp.schema import Tracking
from rlhf_exp.stages.context import ADAPTER, HEAD, adapter_folder, head_file
from rlhf_exp.store.keys import fingerprint_folder
from rlhf_exp.store.runs import RunFolder

WEIGHTS, CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"


def locate(stage: str, given: str, tracking: Tracking, output_dir: str) -> Path:
    """The folder that `adapters.<stage>` names; an MLflow runs:/ URI is downloaded into the cache."""
    if given.startswith("runs:/"):
        from rlhf_exp.tracking.mlflow_store import download

        run = given.removeprefix("runs:/").strip("/").removesuffix(f"/{ADAPTER}")
        into = cache_dir() / "mlflow" / run.replace("/", "_")
        for part in (ADAPTER, HEAD) if stage == "reward" else (ADAPTER,):
            download(f"runs:/{run}/{part}", tracking, Path(output_dir), into)
        return into
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"adapters.{stage}={given}: there is no such folder")
    return folder


def check(stage: str, folder: Path, base: Path, base_hash: str) -> None:
    """InputError unless the folder holds a whole LoRA adapter of this base (and a head, for reward)."""
    key = f"adapters.{stage}={folder}"
    adapter = adapter_folder(folder)
    if (folder / "run.json").is_file():
        RunFolder(folder).verify()
    try:
        config = json.loads((adapter / CONFIG).read_text())
        kind = config.get("peft_type")
    except FileNotFoundError:
        raise InputError(f"{key}: no {CONFIG} in it: it is neither a run folder nor a PEFT folder") from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{key}: {CONFIG} cannot be read: {error}") from error
    if kind != "LORA":
        raise InputError(f"{key}: the adapter is of type {kind}, only LORA is supported")
    stored = shapes.header(adapter / WEIGHTS)
    if (adapter / BASE).is_file():
        owner = json.loads((adapter / BASE).read_text())
        if owner.get("hash") != base_hash:
            raise InputError(
                f"{key}: it belongs to another base model ({owner.get('name')}, {str(owner.get('hash'))[:12]}), "
                f"this one is {base.name} ({base_hash[:12]}); set model= to the adapter's base"
            )
    else:
        _check_shapes(key, stored, shapes.of_model(base))
    if stage == "reward":
        shapes.header(head_file(folder))


def _check_shapes(key: str, stored: shapes.Shapes, base: shapes.Shapes) -> None:
    """A foreign adapter says nothing of its base's content; its names and shapes must fit at least."""
    for name, shape in stored.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        weight = base.get(f"{module}.weight")
        side = {"A.weight": 1, "B.weight": 0}.get(part)  # A is [r, in], B is [out, r], the weight [out, in]
        if weight is None or side is None:
            raise InputError(f"{key}: it belongs to another base model: this one has no {module or name}")
        if len(shape) != 2 or len(weight) != 2 or shape[side] != weight[side]:
            raise InputError(
                f"{key}: it belongs to another base model: {name} is {shape}, the base's weight is {weight}"
            )


def content_key(folder: Path) -> str:
    """What stands for a given adapter in the keys of the runs that use it."""
    adapter = fingerprint_folder(adapter_folder(folder), (WEIGHTS, CONFIG))
    head = head_file(folder)
    return f"{adapter}+{fingerprint_folder(head.parent, (head.name,))}" if head.is_file() else adapter
