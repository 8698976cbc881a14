"""dry_run=true on a sweep: what it says beside a store with a finished run, worked out by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from rlhf_exp.cli import main

WORDS = (
    *("model=tiny", "model.dtype=float32", "threads=1", "dataset=reviews", "tracking=none"),
    "output_dir=outputs",
)
SFT = "{{train: {{{}, batch_size: {}, micro_batch_size: 4}}}}"
CACHED, MORE, WIDE = SFT.format("steps: 2", 4), SFT.format("steps: 3", 4), SFT.format("epochs: 2", 16)


def files() -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in Path().rglob("*")}


def edit(run: Path, **fields: object) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | fields))


@pytest.mark.timeout(300)
def test_what_a_sweep_would_train_and_for_how_long(tiny_path, capsys):
    """Three SFTs (one is there) by two KL coefficients; of PPO nothing was ever measured."""
    one = ("stage=sft", "train.steps=2", "train.batch_size=4", "train.micro_batch_size=4")
    assert main([*one, *WORDS]) == 0
    (run,) = Path("outputs/sft").glob("[0-9a-f]*")
    edit(run, seconds=8.0)
    # a later run of another batch size: further away from those with batches of 4
    other = shutil.copytree(run, run.with_name("f" * 12))
    edit(other, key="f" * 64, seconds=20.0, ended="2999-01-01T00:00:00+00:00")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["train"]["batch_size"] = 8
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()

    before = files()
    swept = (f"upstream.sft={CACHED},{MORE},{WIDE}", "ppo.kl_coef=.1,.2", "hydra.sweep.dir=sweep")
    assert main(["-m", "stage=ppo", "reward_source=length", *WORDS, *swept, "dry_run=true"]) == 0
    assert files() == before, "nothing is written"

    out, err = capsys.readouterr()
    assert err == ""
    key = run.name[:6]
    lines = [re.sub(r"\b(?!ffff)[0-9a-f]{6}\b", lambda found: "HERE" if found[0] == key else "KEY", line)
             for line in out.splitlines()]  # fmt: skip
    values = [f"{{train:{{{steps},batch_size:{size},micro_batch_size:4}}}}"
              for steps, size in (("steps:2", 4), ("steps:3", 4), ("epochs:2", 16))]  # fmt: skip
    trials = [(sft, kl) for sft in values for kl in ("0.1", "0.2")]
    assert lines[0] == "6 trials"
    assert lines[1:7] == [
        f"  trial {number} upstream.sft={sft} ppo.kl_coef={kl}: ppo KEY (unknown)"
        for number, (sft, kl) in enumerate(trials)
    ]
    # 8 s for 2 steps: 3 take 12 s. 20 s for 2: 562 rows twice in batches of 16 are 2 * 36 steps, 720 s
    assert lines[7:10] == [
        "  cached for 2 trials: sft HERE (cached)",
        "  trained once for 2 trials: sft KEY (0:12)",
        "  trained once for 2 trials: sft KEY (12:00)",
    ]
    assert lines[10:13] == [
        "to build: 8 runs, one after the other 12:12 (0.2 hours); 6 of them unknown: no finished run of ppo with "
        "this model",
        f"  measured: sft/{run.name}, 4 s a step, 0 s beside",
        f"  measured: sft/{other.name}, 10 s a step, 0 s beside; other train.batch_size",
    ]
    assert re.fullmatch(r"memory: at most [\d.]+ GB, in \w+ of ppo KEY; dry_run=true without .*", lines[13])
    assert len(lines) == 14
