"""Seconds a step and peak memory a rank of PPO for each strategy, on one and two ranks of this machine.

    python benchmarks/scale.py --out scale.json                                 SmolLM2, 1 and 2 ranks, all strategies
    python benchmarks/scale.py --ranks 2 --strategies ddp zero2 -- ppo.steps=5   words after -- go to the command

Each cell is a run of its own, one after another; the ranks of one share the cores. The first iteration, in which
libraries are loaded and ops compiled, is not counted. Memory is the peak of the whole process (of the device besides,
where there is one). With --out each cell is written as it is done, and the same command leaves out those that are
there; at the end it prints the table of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
WORDS = (
    *("stage=ppo", "model=smollm2_135m", "adapters.sft=base", "reward_source=length", "tracking=none"),
    *("ppo.steps=4", "ppo.batch_size=8", "ppo.micro_batch_size=4", "ppo.epochs=1"),
    *("generation.max_new_tokens=32", "generation.min_new_tokens=31", "selfcheck=off", "resume=never"),
)
PARTS = ("time/rollout", "time/score", "time/update")
RANK = "rank"  # the first word of a process that is one

Cell = dict[str, object]


def rank(out: str, words: Sequence[str]) -> int:
    """Run the command as one of its ranks, and note this process's peak."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from rlhf_exp.cli import main

    code = main(words)
    found = {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["device_bytes"] = torch.cuda.max_memory_allocated()
    Path(out).write_text(json.dumps(found))
    return code


def environments(ranks: int) -> list[dict[str, str]]:
    """Of each rank's process."""
    if ranks == 1:
        return [dict(os.environ)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def started(place: Path, cell: Cell, environment: dict[str, str], number: int) -> subprocess.Popen[str]:
    """One rank of a cell's run; what it says is in `place`."""
    threads = max(1, len(os.sched_getaffinity(0)) // cell["ranks"])
    words = [*WORDS, f"threads={threads}", *cell["words"], f"strategy={cell['strategy']}"]
    command = [sys.executable, __file__, RANK, str(place / f"{number}.json"), *words, f"output_dir={place}"]
    with (place / f"{number}.log").open("w") as log:
        return subprocess.Popen(
            command, env=environment | {"OMP_NUM_THREADS": str(threads)}, stdout=log, stderr=log, text=True
        )


def measure(cell: Cell) -> Cell:
    """The cell with its figures, or with why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        place, began = Path(folder), time.monotonic()
        processes = [
            started(place, cell, each, number) for number, each in enumerate(environments(cell["ranks"]))
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            said = [line for file in place.glob("*.log") for line in file.read_text().splitlines()]
            errors = [line for line in said if line.startswith("error:")] or said[-1:]
            return cell | {"failed": "; ".join(errors)}
        (log,) = place.glob("ppo/*/metrics.jsonl")
        steps = [json.loads(line) for line in log.read_text().splitlines()][1:]
        peaks = [json.loads((place / f"{number}.json").read_text()) for number in range(len(codes))]
    return cell | {
        "seconds": statistics.median(sum(step[part] for part in PARTS) for step in steps),
        **{part: statistics.median(step[part] for step in steps) for part in PARTS},
        "gigabytes": max(peak["bytes"] for peak in peaks) / 1e9,
        "device_gigabytes": max(peak.get("device_bytes", 0) for peak in peaks) / 1e9,
        "whole_run": time.monotonic() - began,
    }


def same(cell: Cell, other: Cell) -> bool:
    """Whether they are of one command."""
    return all(cell[name] == other[name] for name in ("strategy", "ranks", "words"))


def table(cells: Sequence[Cell]) -> str:
    """A line for each strategy and number of ranks."""
    device = any(cell.get("device_gigabytes") for cell in cells)
    head = ["strategy", "ranks", "seconds a step", "of them rollout", "scoring", "update", "GB a rank"]
    rows = [head + ["GB of its device"] * device]
    rows.append(["---"] * len(rows[0]))
    for cell in cells:
        begin = [f"`{cell['strategy']}`", str(cell["ranks"])]
        if "failed" in cell:
            rows.append([*begin, f"failed: {cell['failed']}", *[""] * (len(rows[0]) - 3)])
            continue
        figures = [cell[name] for name in ("seconds", *PARTS, "gigabytes", *["device_gigabytes"] * device)]
        rows.append([*begin, *(f"{figure:.2f}" for figure in figures)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    if sys.argv[1:2] == [RANK]:
        return rank(sys.argv[2], sys.argv[3:])
    ours, _, words = " ".join(sys.argv[1:]).partition(" -- ")
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    flags.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    flags.add_argument("--out", type=Path, help="where the cells are written as JSON, and read from")
    given = flags.parse_args(ours.split())
    done = json.loads(given.out.read_text()) if given.out and given.out.exists() else []
    cells: list[Cell] = []
    for ranks in given.ranks:
        for strategy in given.strategies:
            if (strategy == "single") != (ranks == 1) and strategy in ("single", "ddp"):
                continue  # one rank of ddp is single, and single is one rank
            asked: Cell = {"strategy": strategy, "ranks": ranks, "words": words.split()}
            known = [cell for cell in done if same(cell, asked) and "failed" not in cell]
            cells.append(known[-1] if known else measure(asked))
            print(table(cells[-1:]).splitlines()[-1], flush=True)
            if given.out:
                others = [cell for cell in done if not any(same(cell, new) for new in cells)]
                given.out.write_text(json.dumps([*others, *cells], indent=1))
    print(f"\n{table(cells)}")
    return int(any("failed" in cell for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
