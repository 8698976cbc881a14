"""A picture of a sweep in the MLflow UI, for the documentation: a server of its own, headless Chromium.

python tests/sweeps/screenshot.py SWEEP_FOLDER docs/images/mlflow_sweep.png

The sweep's run is unfolded, and the columns are what was swept, what came of it, and nothing else. Such a view can be
had from MLflow by a tag of the experiment ("share view"); the tag is set in a copy of the database.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from rlhf_exp.sweeps import collect, folder, ledger, table  # noqa: E402
from rlhf_exp.tracking import tracking_uri  # noqa: E402
from rlhf_exp.tracking.location import database_path  # noqa: E402
from tests.evaluation.browser import CHROMIUM, SWITCHES  # noqa: E402

WIDTH, ROW, REST = 1400, 33, 330  # pixels: of the page, of a run, of all that is above and below the runs
WAIT = 400.0  # seconds, for server and page: the machine may be busy
PAUSE = 5.0  # seconds: figures and panels come after the rows
KEY = "sweep"
METRICS = (
    *("last/gold", "last/kl", "objective/gold", "objective/scores", "objective/kl", "last/reward"),
    *("response/length_mean", "validation/accuracy"),
)
SHOWN = 4  # of these, the first that there are
ALWAYS = {"attributes.`Run Name`": 230, "runDateAndNestInfo": 140, "duration": 80}  # columns, pixels
# the runs below the sweep's are folded away until somebody clicks on its expander
UNFOLD = """(() => {
    const found = document.querySelector('.ag-row button[data-component-id*=runnamecellrenderer]');
    if (found) found.click();
    return Boolean(found);
})()"""
# what takes the place of the runs: the assistant, the note that this is a shared view, the menu
CLOSE = """['Close', 'Hide banner', 'Toggle sidebar'].map(name => {
    const found = document.querySelector(`button[aria-label="${name}"]`);
    if (found) found.click();
    return Boolean(found);
})"""
ROWS = "document.querySelectorAll('.ag-center-cols-container [role=row], .ag-center-cols-container .ag-row').length"


class Page:
    """A page of a browser without a window, driven through a pipe (Chrome DevTools Protocol)."""

    def __init__(self, send: int, receive: int):
        self.send, self.receive = send, receive
        self.number, self.rest, self.session = 0, b"", ""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to one command; events in between are passed over."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                if not (more := os.read(self.receive, 1 << 16)):
                    raise RuntimeError("the browser has ended")
                self.rest += more
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def value(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str, what: str) -> None:
        end = time.monotonic() + WAIT
        while not self.value(script):
            if time.monotonic() > end:
                raise RuntimeError(f"the page does not show {what}")
            time.sleep(1)


@contextmanager
def browser() -> Iterator[Page]:
    """Chromium with an empty page; it reads commands from its descriptor 3 and answers on 4."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [f"--{name}" for name in SWITCHES.split()]
        options += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(
            ["bash", "-c", script, "chromium", str(CHROMIUM), *options],
            pass_fds=[theirs_in, theirs_out],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            page = Page(ours_out, ours_in)
            target = page.call("Target.createTarget", url="about:blank")["targetId"]
            page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            yield page
        finally:
            process.terminate()
            process.wait(timeout=60)
            os.close(ours_out)
            os.close(ours_in)


def shoot(url: str, runs: int, target: Path) -> None:
    """The page at `url`, its one sweep unfolded to so many runs, as a picture."""
    with browser() as page:
        size = {"width": WIDTH, "height": REST + ROW * (runs + 1), "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.call("Page.navigate", url=url)
        page.until(ROWS, "any run")
        time.sleep(PAUSE)
        page.value(CLOSE)
        page.until(UNFOLD, "a run with children")
        page.until(f"{ROWS} > {runs}", f"{runs} children")
        time.sleep(PAUSE)
        picture = page.call("Page.captureScreenshot", format="png")["data"]
        target.write_bytes(base64.b64decode(picture))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(uri: str) -> Iterator[str]:
    """The address of an MLflow server on this database."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log)
        try:
            end = time.monotonic() + WAIT
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=120)


def view(sweep: Path, database: Path, parent: str) -> tuple[str, int]:
    """Set the view of the sweep in a database; returns the experiment, and how many children the sweep's run has."""
    children = "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ?"
    with closing(sqlite3.connect(database)) as file:
        (runs,) = file.execute(f"SELECT COUNT(*) FROM ({children})", (parent,)).fetchone()
        named = f"SELECT DISTINCT key FROM latest_metrics WHERE run_uuid IN ({children})"
        names = {name for (name,) in file.execute(named, (parent,))}
        of_run = "SELECT experiment_id FROM runs WHERE run_uuid = ?"
        (experiment,) = file.execute(of_run, (parent,)).fetchone()
        metrics = [f"final/{name}" for name in METRICS if f"final/{name}" in names][:SHOWN]
        chosen = {f"params.`{key}`": 105 for key in table.swept(ledger.states(sweep))}
        chosen |= {f"metrics.`{name}`": 180 for name in metrics}
        widths = ALWAYS | chosen
        content = {"selectedColumns": list(chosen), "columnOrder": list(widths), "columnWidths": widths}
        file.execute(
            "INSERT OR REPLACE INTO experiment_tags (key, value, experiment_id) VALUES (?, ?, ?)",
            (f"mlflow.sharedViewState.{KEY}", json.dumps(content), experiment),
        )
        # other sweeps, and runs that stand alone, are not in the picture
        others = f"UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid != ? AND run_uuid NOT IN ({children})"
        file.execute(others, (parent, parent))
        file.commit()
    return str(experiment), runs


def main(sweep: Path, target: Path) -> None:
    run = collect.config_of(sweep)
    known = folder.read(sweep)
    uri = tracking_uri(run.tracking, Path(known["cwd"]) / run.output_dir)
    database = database_path(uri)
    if database is None:
        raise SystemExit(f"{uri}: the picture is made of an SQLite database")
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "mlflow.db"
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(copy)) as mine:
            source.backup(mine)  # what is in its journal as well
        experiment, runs = view(sweep, copy, known["mlflow_run_id"])
        with server(f"sqlite:///{copy}") as address:
            shoot(f"{address}/#/experiments/{experiment}/runs?viewStateShareKey={KEY}", runs, target)
    print(f"written: {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]))
