"""Seconds a step and peak memory a rank of PPO for each strategy, on one and two ranks of this machine.

    python benchmarks/scale.py --out scale.json                                 SmolLM2, 1 and 2 ranks, all strategies
    python benchmarks/scale.py --ranks 2 --strategies ddp zero2 -- ppo.steps=5   words after -- go to the command

Each cell is a run of its own, one after another; the first iteration, in which libraries are loaded and ops compiled,
is not counted. Memory is the peak of the whole process (of the device besides, where there is one).
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
from collections.abc import Sequence
from pathlib import Path

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
WORDS = (
    *("stage=ppo", "model=smollm2_135m", "adapters.sft=base", "reward_source=length", "tracking=none"),
    *(
        "ppo.steps=4",
        "ppo.batch_size=8",
        "ppo.micro_batch_size=4",
        "ppo.epochs=1",
        "generation.max_new_tokens=32",
    ),
    *("generation.min_new_tokens=31", "selfcheck=off", "resume=never"),
)
RANK = "rank"  # the first word of a process that is one


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


def measure(strategy: str, ranks: int, words: Sequence[str]) -> dict[str, object]:
    """One cell of the table."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        processes = []
        for number in range(ranks):
            environment = dict(os.environ)
            if ranks > 1:
                environment |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
                environment |= {
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            command = [sys.executable, __file__, RANK, str(place / f"{number}.json"), *WORDS, *words]
            command += [f"strategy={strategy}", f"output_dir={place}"]
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        said = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            return {"strategy": strategy, "ranks": ranks, "failed": said[0].strip().splitlines()[-1:]}
        (log,) = place.glob("ppo/*/metrics.jsonl")
        steps = [json.loads(line) for line in log.read_text().splitlines()][1:]
        parts = ("time/rollout", "time/score", "time/update")
        peaks = [json.loads((place / f"{number}.json").read_text()) for number in range(ranks)]
        return {
            "strategy": strategy,
            "ranks": ranks,
            "seconds": statistics.median(sum(step[part] for part in parts) for step in steps),
            **{part: statistics.median(step[part] for step in steps) for part in parts},
            "gigabytes": max(peak["bytes"] for peak in peaks) / 1e9,
            "device_gigabytes": max((peak.get("device_bytes", 0) for peak in peaks), default=0) / 1e9,
        }


def row(cell: dict[str, object]) -> str:
    """A line of the table."""
    begin = f"| {cell['strategy']} | {cell['ranks']} | "
    if "failed" in cell:
        return f"{begin}failed: {' '.join(cell['failed'])} | | |"
    device = f" | {cell['device_gigabytes']:.2f}" if cell["device_gigabytes"] else ""
    return f"{begin}{cell['seconds']:.2f} | {cell['gigabytes']:.2f}{device} |"


def main() -> int:
    if sys.argv[1:2] == [RANK]:
        return rank(sys.argv[2], sys.argv[3:])
    ours, _, words = " ".join(sys.argv[1:]).partition(" -- ")
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    flags.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    flags.add_argument("--out", help="where the cells are written as JSON")
    given = flags.parse_args(ours.split())
    cells = []
    print("| strategy | ranks | seconds a step | GB a rank |\n|---|---|---|---|", flush=True)
    for ranks in given.ranks:
        for strategy in given.strategies:
            if (strategy == "single") != (ranks == 1) and strategy in ("single", "ddp"):
                continue  # one rank of ddp is single, and single is one rank
            cells.append(measure(strategy, ranks, words.split()))
            print(row(cells[-1]), flush=True)
            if given.out:
                Path(given.out).write_text(json.dumps(cells, indent=1))
    return int(any("failed" in cell for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
