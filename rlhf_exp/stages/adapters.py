"""Adapters that are given instead of trained: found, checked against the base, hashed - before torch is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.model import shapes, torchfile
from rlhf_exp.paths import cache_dir
from rlhf_exp.schema import Tracking
from rlhf_exp.stages.context import ADAPTER, HEAD, HEADS_FILE, ILQL, MODEL, adapter_folder, head_file
from rlhf_exp.store.keys import fingerprint_folder
from rlhf_exp.store.manifest import MANIFEST, RECORD
from rlhf_exp.store.runs import RunFolder

# settings of PEFT that leave out modules which the targets name
SELECTIVE = ("layers_to_transform", "exclude_modules", "target_parameters")
WEIGHTS, BIN, CONFIG, BASE = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
    "base.json",
)


def locate(stage: str, given: str, tracking: Tracking, output_dir: str, setting: str) -> Path:
    """The folder that `setting`, a config key, names; an MLflow runs:/ URI is downloaded into the cache."""
    if given.startswith("runs:/"):
        from rlhf_exp.tracking.mlflow_store import download

        run = given.removeprefix("runs:/").strip("/").removesuffix(f"/{ADAPTER}")
        into = cache_dir() / "mlflow" / run.replace("/", "_")
        more = {"reward": (HEAD,), ILQL: (ILQL,)}.get(stage, ())
        for part in (ADAPTER, *more):
            download(f"runs:/{run}/{part}", tracking, Path(output_dir), into)
        return into
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"{setting}={given}: there is no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{setting}={given}: the folder cannot be read: permission denied")
    if (folder / MODEL).is_dir():
        raise InputError(
            f"{setting}={given} holds a whole model, no adapter: set model.path={folder / MODEL} "
            "adapters.sft=base"
        )
    if not (adapter_folder(folder) / CONFIG).is_file():
        raise InputError(
            f"{setting}={given}: no {CONFIG} in it: it is neither a run folder nor a PEFT folder"
        )
    return folder


def check(stage: str, folder: Path, base: Path, base_hash: str, setting: str) -> None:
    """InputError unless the folder holds a whole LoRA adapter of this base (and a head, for reward)."""
    key = f"{setting}={folder}"
    adapter = adapter_folder(folder)
    if (folder / RECORD).is_file():
        RunFolder(folder).verify()
    config = _read(key, adapter / CONFIG)
    if stage != "reward" and _scores(folder, config):
        raise InputError(
            f"{key}: it is a reward model, which gives scores; here goes a policy, such as one of stage=sft"
        )
    if config.get("peft_type") != "LORA":
        raise InputError(f"{key}: the adapter is of type {config.get('peft_type')}, only LORA is supported")
    if (start := config.get("init_lora_weights", True)) not in (True, False, None, "gaussian"):
        raise InputError(
            f"{key}: it was initialised by {start}, which changes the base's weights; the base here is shared and "
            "stays as it is: convert the adapter to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    stored = torchfile.header(adapter / BIN) if _is_bin(adapter) else shapes.header(adapter / WEIGHTS)
    if (adapter / BASE).is_file():
        owner = _read(key, adapter / BASE)
        if owner.get("hash") != base_hash:
            raise InputError(
                f"{key}: it belongs to another base model ({owner.get('name')}, {str(owner.get('hash'))[:12]}), "
                f"this one is {base.name} ({base_hash[:12]}); set model= to the adapter's base"
            )
    _check_shapes(key, stored, shapes.of_model(base), config)
    if stage == "reward":
        _check_head(key, head_file(folder), shapes.output_width(base))


def _scores(folder: Path, config: dict[str, Any]) -> bool:
    """Whether it is a reward model's, by our own record or by what PEFT has saved: a policy may have a head too."""
    if (folder / RECORD).is_file():
        return RunFolder(folder).stage == "reward"
    return config.get("task_type") == "SEQ_CLS"


def _is_bin(adapter: Path) -> bool:
    """Whether its weights are in the format from before safetensors."""
    return (adapter / BIN).is_file() and not (adapter / WEIGHTS).is_file()


def _read(key: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: {path.name} cannot be read: {error}") from error
    return content


def _check_shapes(key: str, stored: shapes.Shapes, base: shapes.Shapes, config: dict[str, Any]) -> None:
    """Names, shapes and ranks must fit: a foreign adapter says nothing else of its base, and may be of no LoRA."""
    needed = {"A.weight", "B.weight"} | ({"magnitude_vector"} if config.get("use_dora") else set())
    sides: dict[str, set[str]] = {}
    for name, shape in stored.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in needed:
            raise InputError(f"{key}: it holds {name}: only adapters of plain LoRA and of DoRA are supported")
        if module.rpartition(".")[2] in shapes.OUTPUT:
            raise InputError(
                f"{key}: it has an adapter on the output layer, {module}, which is frozen and shared by all roles "
                "here (it would have no effect): train one without it"
            )
        weight = base.get(f"{module}.weight")
        if weight is None:
            raise InputError(f"{key}: it belongs to another base model: this one has no {module}")
        # A is [r, in], B is [out, r], DoRA's magnitudes are [out], the weight is [out, in]
        side = int(part == "A.weight")
        dims = 1 if part == "magnitude_vector" else 2
        if len(shape) != dims or len(weight) != 2 or shape[side] != weight[side]:
            raise InputError(
                f"{key}: it belongs to another base model: {name} is {shape}, the base's weight is {weight}"
            )
        if dims == 2 and not config.get("rank_pattern") and shape[1 - side] != config.get("r"):
            raise InputError(f"{key}: {name} is {shape}, but r in {CONFIG} is {config.get('r')}")
        sides.setdefault(module, set()).add(part)
    targets = config.get("target_modules")
    if isinstance(targets, list) and not any(config.get(name) for name in SELECTIVE):
        sides = {module: set() for module in shapes.wrapped(base, targets)} | sides
    if broken := sorted(module for module, parts in sides.items() if parts != needed):
        what = "LoRA weights A and B" + (" and DoRA magnitudes" if config.get("use_dora") else "")
        raise InputError(f"{key}: {WEIGHTS} is not whole: it has no {what} of {broken[0]}")


def _check_head(key: str, path: Path, hidden_size: int) -> None:
    if not path.is_file():
        raise InputError(f"{key}: no {path.name} with the adapter: it is not a reward model")
    if (found := shapes.header(path)) != {"weight": (hidden_size,), "bias": ()}:
        raise InputError(
            f"{key}: {path} is not a head for hidden states of size {hidden_size}: it holds {found}"
        )


def content_key(stage: str, folder: Path) -> str:
    """What stands for a given adapter in the keys of the runs that use it."""
    if stage == "ppo" and (folder / MANIFEST).is_file():  # `eval` looks at the kept checkpoints too
        return fingerprint_folder(folder, (MANIFEST,))
    weights = adapter_folder(folder)
    found = [fingerprint_folder(weights, (BIN if _is_bin(weights) else WEIGHTS, CONFIG))]
    # the head of a reward model; Q and V, which ilql decodes by
    for file in (head_file(folder), folder / ILQL / HEADS_FILE):
        if file.is_file():
            found.append(fingerprint_folder(file.parent, (file.name,)))
    return "+".join(found)
