"""The memory plan beside what a stage really takes: `python benchmarks/memory.py` (docs/scale.md has its table).

Each case is a process of its own. Everything is imported first; then its resident memory (RSS) is noted, the
high-water mark of it set back (/proc/self/clear_refs), and the stage runs through the command line. What is measured
is that mark less what was there before: the base, adapters, gradients, moments, activations. On CUDA it is
torch.cuda.max_memory_allocated. All rows have the longest prompt and answer that the config allows.

By default every block is a mapping of its own, so that what is resident is in use: that is what a plan can count. A
real run keeps freed memory (model/pages.py) and loses some between blocks: --as-it-runs measures that.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.model import pages

ROWS = 24
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_USE, RUNS = "in-use", "as-it-runs"  # what is measured
WORDS = (
    "time",
    "people",
    "water",
    "house",
    "river",
    "stone",
    "light",
    "music",
    "paper",
    "garden",
    "winter",
    "story",
)
# (rows a forward, tokens of a prompt, of an answer)
SHAPES = {
    "sft": ((4, 192, 64), (4, 64, 64)),
    "reward": ((2, 192, 64), (4, 96, 32)),
    "ppo": ((4, 96, 32), (8, 48, 32)),
}
COMMON = ("model=smollm2_135m", "tracking=none", "dataset=jsonl", "dataset.on_bad_row=error", "threads=1")
PEAK = re.compile(r"^peak of (\w+) about ([\d.]+) (GB|MB)")


@dataclass(frozen=True)
class Case:
    """One stage in one shape."""

    stage: str
    dtype: str
    rows: int
    prompt: int
    answer: int
    more: tuple[str, ...] = ()

    def argv(self, folder: Path) -> list[str]:
        """The command line."""
        data = folder / "rows.jsonl"
        found = [
            f"stage={self.stage}",
            *COMMON,
            f"model.dtype={self.dtype}",
            f"output_dir={folder / 'outputs'}",
        ]
        found += [f"dataset.views.{view}={data}" for view in ("demonstrations", "comparisons", "prompts")]
        found += [f"dataset.max_prompt_tokens={self.prompt}", f"dataset.max_response_tokens={self.answer}"]
        if self.stage == "ppo":
            found += [
                f"adapters.sft={folder / 'sft'}",
                "ppo.steps=2",
                "ppo.epochs=2",
                f"ppo.batch_size={2 * self.rows}",
            ]
            found += [f"ppo.micro_batch_size={self.rows}", f"generation.max_new_tokens={self.answer}"]
            found += [
                f"generation.min_new_tokens={self.answer - 1}",
                "reward_source=length",
                "selfcheck=warn",
            ]
        else:
            found += [
                "train.steps=2",
                f"train.batch_size={2 * self.rows}",
                f"train.micro_batch_size={self.rows}",
            ]
        if self.stage == "reward":
            found += ["reward.probes=0", "reward.center=false"]
        return [*found, *self.more]


def cases(stages: list[str], dtypes: list[str]) -> list[Case]:
    """All of them."""
    return [Case(stage, dtype, *shape) for stage in stages for dtype in dtypes for shape in SHAPES[stage]]


def write_rows(path: Path) -> None:
    """Texts longer than any of the shapes: the templates cut them."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    rows = [
        {"prompt": f"{i} {text(400)}", "response": text(200), "chosen": text(200), "rejected": text(200)}
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_adapter(folder: Path) -> None:
    """An SFT adapter that changes nothing (B is 0): PPO then has one to start from, and a reference."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from rlhf_exp.fetch import model_folder
    from rlhf_exp.model import shapes
    from rlhf_exp.model.roles import PREFIX, WEIGHTS

    lora = LoraConfig(r=16, lora_alpha=32.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    lora.save_pretrained(folder)
    tensors = {}
    for name, (out, width) in shapes.wrapped(shapes.of_model(model_folder("smollm2_135m")), TARGETS).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(16, width) / width**0.5
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(out, 16)
    save_file(tensors, folder / WEIGHTS)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status, such as VmRSS."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def planned(argv: list[str]) -> float:
    """Bytes of the peak that dry_run=true prints for the stage itself, the last one."""
    from rlhf_exp.cli import main

    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        code = main([*argv, "dry_run=true"])
    found = [match for line in page.getvalue().splitlines() if (match := PEAK.match(line))]
    if code or not found:
        raise SystemExit(f"no plan: {page.getvalue()[-2000:]}")
    return float(found[-1][2]) * {"GB": 1e9, "MB": 1e6}[found[-1][3]]


def own_mappings() -> None:
    """Each block above 64 kB is a mapping of its own, which goes back when it is freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(pages.MMAP_THRESHOLD, 2**16)
    libc.mallopt(pages.TRIM_THRESHOLD, 2**16)


def measured(argv: list[str], as_it_runs: bool) -> float:
    """Bytes that the stage took at its peak, above what the process had with all imported."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    from rlhf_exp.cli import main
    from rlhf_exp.stages import ppo, reward, sft  # noqa: F401

    if not as_it_runs:
        pages.keep_freed = own_mappings
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    with contextlib.redirect_stdout(io.StringIO()) as page:
        code = main(argv)
    if code:
        raise SystemExit(f"{argv}: {page.getvalue()[-2000:]}")
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(status("VmHWM") - before)


def child(kind: str, argv: list[str]) -> None:
    plan = planned(argv)
    print(json.dumps({"plan": plan, "measured": measured(argv, kind == RUNS)}))


def run(case: Case, kind: str = IN_USE) -> dict[str, float]:
    """Plan and measurement of a case, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl")
        if case.stage == "ppo":
            write_adapter(Path(folder) / "sft")
        words = [sys.executable, __file__, "--child", kind, *case.argv(Path(folder))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:] or done.stdout[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--more", nargs="*", default=[], help="settings for all cases")
    parser.add_argument("--shape", type=int, help="of a stage's shapes this one only")
    parser.add_argument(
        "--as-it-runs", action="store_true", help="with the freed memory that the process keeps"
    )
    options = parser.parse_args()
    print("| stage | dtype | rows x (prompt + answer) | plan GB | measured GB | plan / measured |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in cases(options.stages, options.dtypes):
        if (
            options.shape is not None
            and (case.rows, case.prompt, case.answer) != SHAPES[case.stage][options.shape]
        ):
            continue
        case = Case(*list(vars(case).values())[:5], more=tuple(options.more))
        found = run(case, RUNS if options.as_it_runs else IN_USE)
        size = f"{case.rows} x ({case.prompt} + {case.answer})"
        gb = [found[name] / 1e9 for name in ("plan", "measured")]
        print(
            f"| {case.stage} | {case.dtype} | {size} | {gb[0]:.2f} | {gb[1]:.2f} | {gb[0] / gb[1]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
