"""Which policies an evaluation looks at: the SFT model, then what PPO kept, its last adapter at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.schema import EvalRun
from rlhf_exp.stages.actions import BEST
from rlhf_exp.stages.actors import EMA
from rlhf_exp.stages.context import ADAPTER, CHECKPOINTS, MODEL, Context
from rlhf_exp.tracking import read_metrics

STEP = "step_"  # folders of kept adapters: checkpoints/step_00008
SFT, KEPT, LAST = "sft", "kept", "last"  # kinds; those of which there is one are groups of metrics too
AVERAGE, CHOSEN = "ema", "best"


@dataclass
class Candidate:
    """A policy to look at: its adapter's folder, None for the plain base."""

    name: str
    step: int  # of PPO, 0 before it
    adapter: Path | None
    kind: str = KEPT

    @property
    def on_path(self) -> bool:
        """Whether the policy itself was here at `step`; an average over many steps never was."""
        return self.kind != AVERAGE


def candidates(config: EvalRun, context: Context) -> list[Candidate]:
    """The SFT model (or the base), kept PPO adapters in order of their step, the average, the last adapter."""
    sft = context.adapter("sft")
    found = [Candidate("sft" if sft or made_by_sft(context.base.path) else "base", 0, sft, SFT)]
    if "ppo" not in context.parents:
        return found
    folder = context.parents["ppo"]
    found += kept(config, folder)
    curves = read_metrics(folder / "metrics.jsonl")
    end = int(curves[-1]["step"]) if curves else 1
    if config.eval.ema and (folder / EMA).is_dir():
        found.append(Candidate("ppo (ema)", end, folder / EMA, AVERAGE))
    return [*found, Candidate(f"ppo@{end}", end, context.adapter("ppo"), LAST)]


def kept(config: EvalRun, ppo: Path) -> list[Candidate]:
    """The kept adapters of a PPO run that are looked at; the best of the run is called that."""
    best = best_of(ppo) if config.eval.best else None
    folders = sorted((ppo / CHECKPOINTS).glob(f"{STEP}*")) if config.eval.checkpoints else []
    if best is not None and best not in folders:
        folders.append(best)
    found = []
    for folder in folders:
        step = int(folder.name.removeprefix(STEP))
        name, kind = (f"ppo (best: step {step})", CHOSEN) if folder == best else (f"ppo@{step}", KEPT)
        found.append(Candidate(name, step, folder, kind))
    return found


def best_of(ppo: Path) -> Path | None:
    """The kept adapter that best.json names; None if that is the last one, or there is no such file."""
    path = ppo / BEST
    if not path.is_file():
        return None  # a PEFT folder
    name = json.loads(path.read_text())["adapter"]
    return None if name == ADAPTER or not (ppo / name).is_dir() else ppo / name


def made_by_sft(folder: Path) -> bool:
    """Whether a base is what the sft stage made of all weights (lora.full): sft/<key>/model."""
    return folder.name == MODEL and folder.parent.parent.name == "sft"
