"""Run folders written by hand, as the store writes them: a config, a record, logs; no weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlhf_exp import schema

PROMPTS = ("The soup", "Our table", "请写一段评论：汤")


def key_of(*words: object) -> str:
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def config(stage: str, **values: Any) -> dict[str, Any]:
    """A stage's config as config.yaml holds it; `ppo__kl_coef=.1` sets a key."""
    run = schema.RUNS[stage](stage=stage)
    run.model.name, run.dataset.name, run.dataset.family = "tiny", "reviews", "reviews"
    for name, value in values.items():
        *sections, last = name.split("__")
        target = run
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, last), name
        setattr(target, last, value)
    return asdict(run)


def write_run(
    root: Path,
    stage: str,
    *,
    state: str = "FINISHED",
    error: str | None = None,
    parents: Mapping[str, str] | None = None,
    started: int = 1,
    **values: Any,
) -> Path:
    """root/<stage>/<key> with run.json and config.yaml. parents: role -> key, the role is the stage."""
    key = key_of(stage, sorted(values.items()), sorted((parents or {}).items()))
    folder = root / stage / key[:12]
    folder.mkdir(parents=True)
    when = f"2026-01-01T00:{started:02d}:00+00:00"
    record = {
        "stage": stage,
        "key": key,
        "metrics": {},
        "status": state,
        "started": when,
        "ended": when,
        "error": error,
        "inputs": {
            "base": {"name": "tiny"},
            "data": {"prompts": "d0"},
            "parents": {r: {"stage": r.partition(".")[0], "key": k} for r, k in (parents or {}).items()},
        },
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text(yaml.safe_dump(config(stage, **values), sort_keys=False))
    return folder


def key(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["key"]


def write_ppo(root: Path, points: Sequence[tuple[float, float, float]] = (), **values: Any) -> Path:
    """A PPO run whose training curve is (KL, reward, gold) step by step, and a sample of its last."""
    folder = write_run(root, "ppo", **values)
    lines = [
        {
            "step": i,
            "objective/kl": kl,
            "objective/scores": reward,
            "objective/gold": gold,
            "time/update": 1.0,
        }
        for i, (kl, reward, gold) in enumerate(points, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"prompt": PROMPTS[0], "response": " was good", "score": 0.5, "ended": True}
    rows = [{"step": step, **sample} for step in (1, len(points))]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_eval(
    root: Path, ppo: Path, points: Sequence[tuple[int | None, float, Mapping[str, float]]], **values: Any
) -> Path:
    """An evaluation of a PPO run: (step, KL, other metrics) a policy, step 0 is SFT, None an average."""
    folder = write_run(root, "eval", parents={"ppo": key(ppo)}, started=values.pop("started", 30), **values)
    names = ["sft" if step == 0 else "ppo (ema)" if step is None else f"ppo@{step}" for step, _, _ in points]
    policies = [
        {"name": name, "step": step, "metrics": {"kl": kl, "length": 5.0, **metrics}}
        for name, (step, kl, metrics) in zip(names, points, strict=True)
    ]
    samples = [
        {
            "prompt": prompt,
            "responses": {
                n: {"text": f"{n} says {i}", "reward": -1.5, "gold": i / 2, "ended": True} for n in names
            },
        }
        for i, prompt in enumerate(PROMPTS)
    ]
    (folder / "eval.json").write_text(json.dumps({"policies": policies, "samples": samples}))
    return folder


# ---------------------------------------------------------------- a small sweep

CURVE = {  # kl_coef -> seed -> (KL, reward, gold) by step
    0.02: {
        0: [(0, -1, 0.1), (1, 0, 0.4), (4, 1, 0.7), (9, 2, 0.6), (16, 3, 0.3)],
        1: [(0, -1, 0.2), (1, 0, 0.5), (4, 1, 0.9), (9, 2, 0.7), (16, 3, 0.4)],
    },
    0.2: {0: [(0, -1, 0.1), (0.25, -0.5, 0.25), (0.5, -0.25, 0.3), (0.75, 0, 0.375), (1, 0.25, 0.4)]},
}


def held_out(points: Sequence[tuple[float, float, float]]) -> list[tuple[int, float, dict[str, float]]]:
    """The same figures as an evaluation's: step 0 first, then 10, 20 ..."""
    return [
        (10 * i, kl, {"reward": reward, "gold": gold, "gold_se": 0.05, "win_rate": 0.5 + gold / 4})
        for i, (kl, reward, gold) in enumerate(points)
    ]


def write_sweep(root: Path) -> list[Path]:
    """Two settings, one with two seeds, evaluated; one killed half way, one that failed."""
    folders = []
    for kl_coef, seeds in CURVE.items():
        for seed, points in seeds.items():
            ppo = write_ppo(root, points, seed=seed, ppo__kl_coef=kl_coef, started=len(folders) + 1)
            folders += [ppo, write_eval(root, ppo, held_out(points), seed=seed)]
    killed = {"state": "KILLED", "error": "stopped by a signal", "ppo__kl_coef": 0.5, "started": 20}
    folders.append(write_ppo(root, [(0, -1, 0.1), (0.5, 0, 0.2)], **killed))
    failed = "Traceback (most recent call last):\n  File ...\nValueError: <b>the loss is nan</b>\n"
    folders.append(write_ppo(root, [(0, 5, 5)], state="FAILED", error=failed, ppo__kl_coef=0.0, started=21))
    return folders
