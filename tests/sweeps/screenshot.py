"""A picture of a sweep in the MLflow UI, for the documentation: a server of its own, headless Chromium.

python tests/sweeps/screenshot.py SWEEP_FOLDER docs/images/mlflow_sweep.png
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from rlhf_exp.sweeps import collect, folder  # noqa: E402
from rlhf_exp.tracking import tracking_uri  # noqa: E402
from tests.evaluation.browser import CHROMIUM, SWITCHES  # noqa: E402

SIZE = "1900,760"
WAIT = (
    40_000  # milliseconds of the page's own time: it asks the server several times before it shows its table
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(url: str, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def shoot(url: str, target: Path) -> None:
    """The page at `url` as a picture."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            *(f"--{name}" for name in SWITCHES.split()),
            f"--user-data-dir={profile}",
            f"--window-size={SIZE}",
            f"--virtual-time-budget={WAIT}",
            f"--screenshot={target.absolute()}",
        ]
        subprocess.run([str(CHROMIUM), *options, url], check=True, timeout=400, capture_output=True)


def main(sweep: Path, target: Path) -> None:
    run = collect.config_of(sweep)
    parent = folder.read(sweep)["mlflow_run_id"]
    uri = tracking_uri(run.tracking, Path(folder.read(sweep)["cwd"]) / run.output_dir)
    from mlflow import MlflowClient

    experiment = MlflowClient(tracking_uri=uri).get_run(parent).info.experiment_id
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log)
        try:
            answers(f"http://127.0.0.1:{port}/health")
            # the children alone: under their parent they are folded away
            shown = quote(f"tags.`mlflow.parentRunId` = '{parent}'")
            shoot(f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?searchFilter={shown}", target)
        finally:
            server.terminate()
            server.wait(timeout=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
