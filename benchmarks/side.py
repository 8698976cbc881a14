"""Both ends of the pipe between the benchmark and the systems it takes turns with, one process each."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path


class Side:
    """A system's end: waits for a turn, reports it. Everything else that is printed goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> bool:
        """Until the parent wants an iteration; False when it wants no more."""
        return sys.stdin.readline().strip() == "go"

    def report(self, figures: dict[str, float]) -> None:
        """Seconds by part, and the high-water mark of this process's memory in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(figures | {"peak": peak}), file=self._out, flush=True)


class Child:
    """The parent's end of one system."""

    def __init__(
        self, name: str, arguments: list[str], python_path: str, threads: int, script: str = "ppo.py"
    ):
        environment = os.environ | {
            "PYTHONPATH": python_path,
            "OMP_NUM_THREADS": str(threads),
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, str(Path(__file__).with_name(script)), "--system", name, *arguments]
        self.name, self.turns = name, []
        self._log = Path(os.environ.get("TMPDIR", "/tmp"), f"rlhf_exp_bench_{os.getpid()}_{name}.log")
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
        )

    def turn(self) -> dict[str, float]:
        """One iteration."""
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n" + self._log.read_text()[-3000:])
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)
        self._log.unlink()
