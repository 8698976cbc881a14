"""What oneDNN keeps of the code that it compiles: `python benchmarks/kernels.py` (memory/kernels.py, docs/scale.md).

Resident memory, as products of 1, 2, 3 .. rows with a bfloat16 matrix are computed: each shape is compiled, and kept
until there are 1024.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

MOST, SHOWN = 2000, (256, 512, 1024, 2000)


def resident() -> float:
    """MB of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e6


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    weight, rows = torch.randn(192, 576).bfloat16(), torch.randn(MOST, 576).bfloat16()
    F.linear(rows, weight)
    before = resident()
    print("| shapes | MB |")
    print("|---|---|")
    for number in range(1, MOST + 1):
        F.linear(rows[:number], weight)
        if number in SHOWN:
            print(f"| {number} | {resident() - before:.0f} |", flush=True)


if __name__ == "__main__":
    main()
