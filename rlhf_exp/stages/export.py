"""Export: a trained role as files that plain transformers and PEFT load, with a model card (model/export.py).

The folder `export/` of the run holds them. A reward model's scores there are those that it gives here minus a
constant, which the card and export.json say: the class has no bias.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlhf_exp.errors import InputError
from rlhf_exp.model import export
from rlhf_exp.model.base import HUB_ID, Base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.schema import ExportRun
from rlhf_exp.stages.card import FIGURES, Facts, card
from rlhf_exp.stages.context import EXPORT, Context
from rlhf_exp.stages.provenance import dataset_of
from rlhf_exp.store.runs import RunFolder

RECORD = "export.json"


def run(config: ExportRun, context: Context) -> dict[str, float]:
    """Write the role; the adapter's few megabytes go to the tracker too."""
    role, base = config.export.role, context.base
    adapter = context.adapter(role)
    head = ScalarHead.load(context.head(role)) if role == "reward" else None
    dtype = base.dtype if config.export.dtype == "auto" else getattr(torch, config.export.dtype)
    with Roles(base) as roles:
        name = BASE
        if adapter is not None:
            name = role
            roles.load(name, adapter)
        elif config.export.form == "adapter":
            raise InputError(
                f"export.form=adapter: {role} has no adapter, its weights are the base's: export.form=merged"
            )
        with context.folder.publish(EXPORT) as folder:
            if config.export.form == "merged":
                export.write_merged(roles, name, folder, dtype, head)
            else:
                export.write_adapter(roles, name, folder, base_name(config, base), head)
            facts = facts_of(config, context, folder, head)
            (folder / RECORD).write_text(json.dumps(facts._asdict(), indent=1, ensure_ascii=False) + "\n")
            (folder / "README.md").write_text(card(facts), encoding="utf-8")
    written = context.folder.path / EXPORT
    if config.export.form == "adapter":
        context.tracker.artifact(written, EXPORT)
    return {"export/bytes": float(sum(file.stat().st_size for file in written.rglob("*") if file.is_file()))}


def base_name(config: ExportRun, base: Base) -> str:
    """What others call the base: its hub id, else where it is on this machine."""
    path = config.model.path
    named = path is not None and HUB_ID.fullmatch(path) and not Path(path).is_dir()
    return path if named else str(base.path)


def facts_of(config: ExportRun, context: Context, folder: Path, head: ScalarHead | None) -> Facts:
    """What the card says, and export.json in full."""
    from transformers import AutoTokenizer

    role, parent = config.export.role, context.parents.get(config.export.role)
    record: dict[str, Any] = RunFolder(parent, role, "").read() if parent is not None else {}
    found = record.get("metrics", {})
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rows = context.base.model.get_input_embeddings().num_embeddings
    lora, trained = folder / "adapter_config.json", dataset_of(parent) if parent is not None else None
    template = trained.template if trained is not None else None
    return Facts(
        role=role,
        form=config.export.form,
        name=config.model.name,
        base=base_name(config, context.base),
        base_hash=context.base.hash,
        licence=config.model.licence,
        key=str(record.get("key", "")),
        metrics={key: value for key in FIGURES if (value := found.get(key)) is not None},
        lora=json.loads(lora.read_text()) if lora.is_file() else {},
        constant=float(head.bias.detach()) if head is not None else 0.0,
        pad=tokenizer.pad_token or "",
        resized=len(tokenizer) if head is not None and tokenizer.pad_token_id >= rows else 0,
        prompt=template.prompt if template else "",
        response=template.response if template else "",
        chat=bool(template and template.chat),
    )
