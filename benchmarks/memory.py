"""The memory plan beside what a stage really takes: `python benchmarks/memory.py` (docs/scale.md has its table).

The cases of a stage run in one process, through the command line. First everything is imported, and the stage runs
on the tiny model, so that the libraries' code is read in and compiled: that is the plan's line `process`, which is
left out here on both sides. Before each case resident memory (RSS) is noted and its high-water mark set back
(/proc/self/clear_refs). What is measured is that mark less what was there before: base, adapters, gradients,
moments, activations. On CUDA it is torch.cuda.max_memory_allocated. All rows have the longest prompt and answer that
the config allows.

By default every block is a mapping of its own, so that what is resident is in use: that is what a plan can count. A
real run keeps freed memory (model/pages.py) and loses some between blocks: --as-it-runs measures that.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.model import pages

ROWS = 24
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_USE, RUNS = "in-use", "as-it-runs"  # what is measured
DTYPES = ("float32", "bfloat16")
TINY = "tiny"  # the model that warms a process up
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
COMMON = ("tracking=none", "dataset=jsonl", "dataset.on_bad_row=error", "threads=1")
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
    model: str = "smollm2_135m"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.stage}-{self.dtype}-{self.rows}x{self.prompt}+{self.answer}"

    def argv(self, folder: Path) -> list[str]:
        """The command line."""
        data = folder / "rows.jsonl"
        found = [
            f"stage={self.stage}",
            *COMMON,
            f"model={self.model}",
            f"model.dtype={self.dtype}",
            f"output_dir={folder / self.name}",
        ]
        found += [f"dataset.views.{view}={data}" for view in ("demonstrations", "comparisons", "prompts")]
        found += [f"dataset.max_prompt_tokens={self.prompt}", f"dataset.max_response_tokens={self.answer}"]
        if self.stage == "ppo":
            found += [
                f"adapters.sft={folder / 'sft' if self.model != TINY else 'base'}",
                "ppo.steps=1",
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


def cases(stage: str, dtypes: Sequence[str] = DTYPES, more: Sequence[str] = ()) -> list[Case]:
    """All of a stage."""
    return [Case(stage, dtype, *shape, more=tuple(more)) for dtype in dtypes for shape in SHAPES[stage]]


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
    """Bytes of the peak that dry_run=true prints for the stage itself, the last one, without the process's own."""
    import torch

    from rlhf_exp.cli import main
    from rlhf_exp.memory.counted import PROCESS

    page = io.StringIO()
    with contextlib.redirect_stdout(page):
        code = main([*argv, "dry_run=true"])
    found = [match for line in page.getvalue().splitlines() if (match := PEAK.match(line))]
    if code or not found:
        raise SystemExit(f"no plan: {page.getvalue()[-2000:]}")
    whole = float(found[-1][2]) * {"GB": 1e9, "MB": 1e6}[found[-1][3]]
    return whole - (0 if torch.cuda.is_available() else PROCESS)


def own_mappings() -> None:
    """Each block above 64 kB is a mapping of its own, which goes back when it is freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(pages.MMAP_THRESHOLD, 2**16)
    libc.mallopt(pages.TRIM_THRESHOLD, 2**16)


def imported(as_it_runs: bool) -> None:
    """Everything that a stage imports, and how blocks are held."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    from transformers import Trainer  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    from rlhf_exp.stages import ppo, reward, sft  # noqa: F401

    if not as_it_runs:
        pages.keep_freed = own_mappings


def ran(argv: list[str]) -> None:
    from rlhf_exp.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as page:
        code = main(argv)
    if code:
        raise SystemExit(f"{argv}: {page.getvalue()[-2000:]}")


def measured(argv: list[str]) -> float:
    """Bytes that the stage took at its peak, above what the process had before."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ran(argv)
        return float(torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    ran(argv)
    return float(status("VmHWM") - before)


def child(kind: str, folder: Path, given: list[Case]) -> None:
    """Plan and measurement of each case, as a line of JSON."""
    imported(kind == RUNS)
    for dtype in dict.fromkeys(case.dtype for case in given):
        ran(Case(given[0].stage, dtype, 4, 24, 8, model=TINY).argv(folder))
    print(f"process: {status('VmRSS') / 1e9:.2f} GB", file=sys.stderr)
    for case in given:
        argv = case.argv(folder)
        print(json.dumps({"plan": planned(argv), "measured": measured(argv)}), flush=True)


def run(given: list[Case], kind: str = IN_USE) -> Iterator[dict[str, float]]:
    """Plan and measurement of each of a stage's cases, bytes; in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl")
        if given[0].stage == "ppo":
            write_adapter(Path(folder) / "sft")
        words = [
            sys.executable,
            __file__,
            "--child",
            kind,
            folder,
            json.dumps([vars(case) for case in given]),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (
            open(Path(folder) / "errors", "w+") as errors,
            subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder, env=environment
            ) as process,
        ):
            yield from (json.loads(line) for line in process.stdout if line.startswith('{"plan"'))
            code = process.wait()
            errors.seek(0)
            said = errors.read()
            if code:
                raise SystemExit(said[-3000:])
            print(said[said.find("process: ") :].partition("\n")[0], file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES))
    parser.add_argument("--more", nargs="*", default=[], help="settings for all cases")
    parser.add_argument("--shape", type=int, help="of a stage's shapes this one only")
    parser.add_argument(
        "--as-it-runs", action="store_true", help="with the freed memory that the process keeps"
    )
    options = parser.parse_args()
    print("| stage | dtype | rows x (prompt + answer) | plan GB | measured GB | plan / measured |")
    print("|---|---|---|---|---|---|", flush=True)
    for stage in options.stages:
        given = cases(stage, options.dtypes, options.more)
        if options.shape is not None:
            shape = SHAPES[stage][options.shape]
            given = [case for case in given if (case.rows, case.prompt, case.answer) == shape]
        for case, found in zip(given, run(given, RUNS if options.as_it_runs else IN_USE), strict=True):
            size = f"{case.rows} x ({case.prompt} + {case.answer})"
            plan, real = (found[name] / 1e9 for name in ("plan", "measured"))
            print(
                f"| {stage} | {case.dtype} | {size} | {plan:.2f} | {real:.2f} | {plan / real:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        listed = json.loads(sys.argv[4])
        child(
            sys.argv[2], Path(sys.argv[3]), [Case(**case | {"more": tuple(case["more"])}) for case in listed]
        )
    else:
        main()
