"""A PPO iteration of rlhf_exp against TRL 1.9.2's experimental PPOTrainer: time by part, memory, share of the limit.

    python benchmarks/ppo.py                          both models, both dtypes
    python benchmarks/ppo.py --shape llama --dtype bfloat16 --turns 5

Each system is a process of its own, and they take turns, so that whatever else the machine does meets all of
them. Figures are medians over the turns after the first; ratios are medians of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from shapes import SHAPES, Shape  # noqa: E402
from side import Child, Side  # noqa: E402

TRL = "trl==1.9.2"
SYSTEMS = ("rlhf_exp", "trl", "trl_lora")
TITLES = {"rlhf_exp": "rlhf_exp", "trl": "TRL 1.9.2", "trl_lora": "TRL 1.9.2, LoRA value model"}
PARTS = ("rollout", "score", "update")


def trl_folder() -> Path:
    """TRL in a folder of its own: the environment's is one that has no PPO any more. Installed on the first call."""
    cache = Path(os.environ.get("RLHF_EXP_CACHE", Path.home() / ".cache" / "rlhf_exp"))
    folder = cache / "benchmarks" / TRL.replace("==", "-")
    if not (folder / "trl" / "__init__.py").is_file():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), TRL]
        subprocess.run(command, check=True)
    return folder


def rate(dtype: str, shape: Shape, seconds: float = 0.5) -> float:
    """Matrix products, operations a second, best of several: tokens of a micro-batch times the model's sizes.

    By the fastest library that torch has here for them, whichever a system takes.
    """
    import torch

    from rlhf_exp.algorithms.product import linear

    kind = getattr(torch, dtype)
    x = torch.randn(shape.batch * (shape.prompt + shape.response), shape.hidden).to(kind)
    weight = torch.randn(shape.intermediate, shape.hidden).to(kind)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * x.shape[0] * weight.numel() / best


def compare(shape: Shape, dtype: str, options: argparse.Namespace) -> None:
    """Take turns and print a table."""
    import torch

    torch.set_num_threads(options.threads)
    arguments = ["--shape", shape.name, "--dtype", dtype, "--threads", str(options.threads)]
    arguments += ["--micro", str(options.micro or shape.batch)]
    root = str(HERE.parent)
    paths = {name: root if name == "rlhf_exp" else f"{trl_folder()}{os.pathsep}{root}" for name in SYSTEMS}
    shape.folder()
    children = [Child(name, arguments, paths[name], options.threads) for name in options.systems]
    turns: dict[str, list[dict[str, float]]] = {child.name: [] for child in children}
    rates = []
    for turn in range(options.turns + 1):  # the first is for warming up
        for child in children:
            found = child.turn()
            if turn:
                turns[child.name].append(found)
        rates.append(rate(dtype, shape))
    for child in children:
        child.close()
    speed = max(rates)
    limit = shape.flops() / speed
    print(
        f"\n{shape.name} {dtype}: {shape.prompt} + {shape.response} tokens, batch {shape.batch}, "
        f"{options.threads} thread(s), {options.turns} turns, load {os.getloadavg()[0]:.1f}; "
        f"{shape.flops() / 1e12:.2f} TFLOP at {speed / 1e9:.0f} GFLOP/s: {limit:.2f} s\n"
    )
    print(
        "| system | rollout s | score s | update s | total s | times ours | peak GB | ours / its | of the limit |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, found in turns.items():
        print("| " + " | ".join(row(name, found, turns.get("rlhf_exp", found), limit)) + " |", flush=True)


def row(name: str, found: list[dict[str, float]], ours: list[dict[str, float]], limit: float) -> list[str]:
    """One system's line of the table."""
    totals, own = ([sum(turn[part] for part in PARTS) for turn in turns] for turns in (found, ours))
    ratio = statistics.median(a / b for a, b in zip(totals, own, strict=True))
    peak, own_peak = (turns[-1]["peak"] for turns in (found, ours))
    return [
        TITLES[name],
        *(f"{statistics.median(turn[part] for turn in found):.2f}" for part in PARTS),
        f"{statistics.median(totals):.2f}",
        f"{ratio:.2f}",
        f"{peak / 1e9:.2f}",
        f"{own_peak / peak:.2f}",
        f"{limit / statistics.median(totals):.1%}",
    ]


def play(name: str, shape: Shape, dtype: str, options: argparse.Namespace) -> None:
    """Be one of the systems (in a child process)."""
    import torch

    torch.set_num_threads(options.threads)
    micro, side = options.micro or shape.batch, Side()
    if name == "rlhf_exp":
        import ours

        ours.run(shape, dtype, micro, side)
    else:
        import trl_side

        trl_side.run(shape, dtype, micro, side, lora_value=name == "trl_lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama", "smollm2"])
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--micro", type=int, help="rows a forward, in every system; default: the batch")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.system:
        play(options.system, SHAPES[options.shape[0]], options.dtype[0], options)
        return
    for name in options.shape:
        for dtype in options.dtype:
            compare(SHAPES[name], dtype, options)


if __name__ == "__main__":
    main()
