"""A small store built by hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_exp.store.runs import RunFolder, run_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """A test cannot cut the power: what is flushed, and when, is looked at in test_atomic."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def outputs(tmp_path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def make_run(outputs) -> Callable[..., RunFolder]:
    """make_run("sft", "3f") is a finished run with key 3f3f3f...; end=None leaves it RUNNING."""

    def make(stage, pair, parents=None, end="FINISHED", metrics=None, resume="auto", data=None) -> RunFolder:
        folder = run_folder(outputs, stage, pair * 32, resume)
        roles = {
            role: {"stage": p.stage, "key": p.key, "path": str(p.path)} for role, p in (parents or {}).items()
        }
        base = {"name": "tiny", "hash": "ba" * 32, "dtype": "float32"}
        folder.start({"base": base, "data": data or {"prompts": "da" * 32}, "parents": roles})
        with folder.publish("adapter") as files:
            (files / "adapter_config.json").write_text('{"r": 4}')
            (files / "adapter_model.safetensors").write_bytes(bytes(range(200)))
        folder.write_text("config.yaml", f"# python -m rlhf_exp\nstage: {stage}\nseed: 0\n")
        (folder.path / "metrics.jsonl").write_text('{"step": 1}\n')
        if end == "FINISHED":
            folder.finish(metrics or {"loss": 0.5})
        elif end:
            folder.fail(end, "ValueError: no")
        return folder

    return make
