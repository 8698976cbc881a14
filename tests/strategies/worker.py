"""A rank that runs one command after another, so that imports are paid for once: a JSON object a line.

{"cwd", "argv", "stop"}: stop=n has this rank asked by SIGTERM, as it seems, after step n of a stage. Answers with a
line for each: {"code", "out", "err"}. Its own stdin and stdout are the channel.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
from unittest import mock


@contextlib.contextmanager
def asked_after(step: int | None):
    from rlhf_exp.stages import signals

    looked, real = itertools.count(1), signals.asked
    if step is None:
        yield
        return
    with mock.patch.object(signals, "asked", lambda: "SIGTERM" if next(looked) == step else real()):
        yield


def main() -> None:
    with open(os.devnull, "w") as nowhere:
        channel, sys.stdout = sys.stdout, nowhere  # what others print must not get between the answers
        from rlhf_exp.cli import main as command

        for line in sys.stdin:
            asked = json.loads(line)
            os.chdir(asked["cwd"])
            out, err = io.StringIO(), io.StringIO()
            with (
                asked_after(asked["stop"]),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                code = command(asked["argv"])
            channel.write(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
            channel.flush()


if __name__ == "__main__":
    main()
