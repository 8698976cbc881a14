"""python kill_driver.py: command lines in forked children, some of which are killed (SIGKILL) on their way.

Each line of stdin is JSON: a list of jobs [log file, kill, signal, words ...]. In each child every call of a watched
function is an event; it is killed before event number `kill` (null: never; then its events go to LOG.events). The
exit statuses are a line of JSON on stdout. The parent imports once what costs seconds, and never computes, so that a
fork is safe.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

# kind -> what is watched: a function of a module, or a method of one of its classes
WATCHED = {
    "rollout": ["rlhf_exp.stages.ppo.generate", "rlhf_exp.stages.evaluate.generate"],
    "scoring": [
        *("rlhf_exp.stages.ppo.score", "rlhf_exp.stages.ppo.prepare", "rlhf_exp.stages.sft.samples"),
        "rlhf_exp.stages.selection.score",
    ],
    "update": ["torch.optim.AdamW.step", "torch.nn.utils.clip_grad_norm_", "torch.Tensor.backward"],
    "log": [
        "rlhf_exp.tracking.RunLog.step",
        "rlhf_exp.tracking.RunLog.commit",
        "rlhf_exp.tracking.RunLog.position",
    ],
    "mlflow": ["mlflow.MlflowClient.log_batch", "mlflow.MlflowClient.set_terminated"],
    "disk": [
        "os.fsync",
        "os.rename",
        "os.replace",
        "safetensors.torch.save_file",
        "rlhf_exp.store.states.remove",
    ],
}


class Countdown:
    """Kills this process before event number `kill`; notes the events otherwise."""

    def __init__(self, kill: int | None, number: int):
        self.kill, self.number, self.events = kill, number, []

    def __call__(self, kind: str) -> None:
        if self.kill is not None and len(self.events) == self.kill:
            os.kill(os.getpid(), self.number)
        self.events.append(kind)

    def arm(self) -> None:
        for kind, names in WATCHED.items():
            for name in names:
                owner, attribute = find(name)
                if owner is not None:
                    setattr(owner, attribute, self.counted(kind, getattr(owner, attribute)))

    def counted(self, kind, call):
        @functools.wraps(call)
        def counting(*arguments, **keywords):
            self(kind)
            return call(*arguments, **keywords)

        return counting


def find(name: str):
    """The module or class that holds what `name` names; None where there is no such thing."""
    words = name.split(".")
    for length in range(len(words) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(words[:length]))
        except ImportError:
            continue
        for word in words[length:-1]:
            owner = getattr(owner, word, None)
        return (owner, words[-1]) if hasattr(owner, words[-1]) else (None, "")
    return None, ""


def child(log: Path, kill: int | None, number: int, words: list[str]) -> int:
    from rlhf_exp.cli import main

    # a shell's background job ignores Ctrl-C, and so would this child
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    countdown = Countdown(kill, number)
    countdown.arm()
    code = main(words)
    if kill is None:
        log.with_suffix(".events").write_text(json.dumps(countdown.events))
    return code


def main() -> None:
    for name in ("torch", "transformers", "peft", "trl", "mlflow", "datasets", "accelerate", "hydra"):
        importlib.import_module(name)
    for name in (
        "cli",
        "compose",
        "stages.pipeline",
        "stages.ppo",
        "stages.sft",
        "stages.reward",
        "stages.ilql",
        "stages.direct_trainer",
    ):
        importlib.import_module(f"rlhf_exp.{name}")
    from trl import SFTTrainer  # noqa: F401

    for line in sys.stdin:
        print(json.dumps([status_of(*job) for job in json.loads(line)]), flush=True)


def status_of(log: str, kill: int | None, number: int | None, *words: str) -> int:
    """The child's exit code; negative: the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = child(Path(log), kill, number or signal.SIGKILL, list(words))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


if __name__ == "__main__":
    main()
