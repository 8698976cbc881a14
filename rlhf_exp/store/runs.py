"""Run folders: outputs/<stage>/<first 12 hex digits of the key>, with a run.json that says what they are.

    folder = run_folder("outputs", "sft", key)
    with build_lock(folder.path, print):
        if not find("outputs", "sft", key):
            folder.start(inputs)
            with folder.publish("adapter") as files: ...
            folder.finish(metrics)

A run counts as made when its run.json says FINISHED, which `finish` writes last, and its files match the
manifest.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf_exp import __version__, distributed
from rlhf_exp.store import atomic, manifest, states
from rlhf_exp.store.manifest import MANIFEST, RECORD, CorruptArtifact

PREFIX = 12  # hex digits of the key in the folder's name
FOLDER_NAME = re.compile(rf"[0-9a-f]{{{PREFIX}}}(-\d+)?")  # -2, -3 ...: made with resume=never

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def plain(value: Any) -> Any:
    """`value` as strict JSON: paths as text, tuples as lists, numpy scalars as numbers, nan and inf null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str | int | float | None) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class RunFolder:
    """One run on the disk. Every change is atomic; one process writes (`build_lock`), any may read.

    Of several ranks that train together rank 0 writes; with the others all that writes does nothing.
    """

    def __init__(self, path: str | Path, stage: str | None = None, key: str | None = None):
        """`stage` and `key` (64 hex digits) are needed only for a run that has no run.json yet."""
        self.path = Path(path)
        self._stage, self._key = stage, key
        self._began: float | None = None  # time.monotonic() of start()
        self._spent = 0.0  # seconds of earlier attempts

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def stage(self) -> str:
        return self._stage or self.read().get("stage") or self.path.parent.name

    @property
    def key(self) -> str:
        """The whole key; of a folder without run.json only the part that its name holds."""
        return self._key or self.read().get("key") or self.path.name[:PREFIX]

    @property
    def short(self) -> str:
        """The key's first 6 digits, for people."""
        return self.key[:6]

    @property
    def status(self) -> str | None:
        """RUNNING (after a crash too: see locks.is_held), FINISHED, FAILED or KILLED; None before start()."""
        return self.read().get("status")

    def read(self) -> dict[str, Any]:
        """run.json; {} if there is none. CorruptArtifact if it is not what this class writes."""
        path = self.path / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            if (self.path / MANIFEST).exists():
                raise CorruptArtifact(self.path, [f"{path} is missing"]) from None
            return {}
        except (OSError, ValueError) as error:
            raise CorruptArtifact(self.path, [f"{path} cannot be read ({error})"]) from error
        if not isinstance(record, dict):
            raise CorruptArtifact(self.path, [f"{path} is not a JSON object"])
        return record

    def start(self, inputs: Mapping[str, Any], **fields: Any) -> None:
        """Make the folder and its run.json (RUNNING), or go on with an earlier attempt, whose seconds count.

        inputs: {"base": {name, hash, dtype}, "data": {view: fingerprint}, "parents": {role: {stage, key,
        path}}}.
        """
        if not distributed.is_main():
            return
        record = self.read()
        if record.get("status") == FINISHED:
            raise RuntimeError(f"{self.path} is finished; find() returns it, resume=never makes another")
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.fsync(self.path.parent)
        self._began, self._spent = time.monotonic(), float(record.get("seconds") or 0.0)
        self.update(
            status=RUNNING,
            started=record.get("started") or now(),
            ended=None,
            inputs=inputs,
            error=None,
            version=__version__,
            **fields,
        )

    def update(self, **fields: Any) -> None:
        """Set fields of run.json and leave the others; after finish() too (e.g. mlflow_run_id)."""
        record = {"stage": self.stage, "key": self.key, "metrics": {}} | self.read() | fields
        self._write(RECORD, json.dumps(plain(record), indent=1, allow_nan=False).encode())

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write manifest.json over all files but the logs (*.jsonl, *.log), then run.json as FINISHED.

        Then the checkpoints go.
        From here on the files that the manifest lists stay as they are.
        """
        if not distributed.is_main():
            return
        digest = manifest.write(self.path)
        self._end(status=FINISHED, metrics=metrics, manifest=digest)
        states.remove(self.path)  # only now: until here they are what a crash continues from

    def fail(self, status: str, error: str) -> None:
        """End the run as FAILED or KILLED; what it saved stays, and the same command continues."""
        if status not in (FAILED, KILLED):
            raise ValueError(f"a run fails as FAILED or KILLED, got {status}")
        if self.status == FINISHED:  # what went wrong afterwards does not undo the result
            return
        self._end(status=status, error=error)

    def _end(self, **fields: Any) -> None:
        seconds = self._spent + (time.monotonic() - self._began if self._began is not None else 0.0)
        self.update(ended=now(), seconds=round(seconds, 3), **fields)

    def verify(self) -> None:
        """CorruptArtifact unless the run is finished and each of its files is as it was then."""
        record = self.read()
        if record.get("status") != FINISHED:
            raise CorruptArtifact(
                self.path, [f"{self.path} is not a finished run (status {record.get('status')})"]
            )
        manifest.check(self.path, record.get("manifest"))

    def write_text(self, name: str, text: str) -> None:
        """Write or replace a file of the run, atomically; `name` may have folders in it."""
        if not distributed.is_main():  # which may be behind: rank 0 has finished the run by now
            return
        self._refuse_listed(name)
        self._write(name, text.encode())

    def write_json(self, name: str, content: Any) -> None:
        """As write_text, as strict JSON (`plain` says what becomes of other types)."""
        self.write_text(
            name, json.dumps(plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        )

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """Yield a temporary folder that becomes (or replaces) `name` in the run, whole or not at all."""
        if not distributed.is_main():
            with TemporaryDirectory() as nowhere:
                yield Path(nowhere)
            return
        self._refuse_listed(name)
        with atomic.new_folder(self.path / name) as folder:
            yield folder

    def discard(self, name: str) -> None:
        """Delete a published folder, e.g. the optimiser's state before finish(); none is no error."""
        if not distributed.is_main():
            return
        self._refuse_listed(name)
        if (self.path / name).is_dir():
            atomic.remove_folder(self.path / name)

    def _write(self, name: str, content: bytes) -> None:
        if not distributed.is_main():
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, content)

    def _refuse_listed(self, name: str) -> None:
        """A caller that changes a finished artifact would corrupt it: stop it there."""
        if self.read().get("status") != FINISHED:
            return
        if any(file == name or file.startswith(f"{name}/") for file in manifest.listed(self.path)):
            raise RuntimeError(f"{self.path} is finished: {name} is in its manifest and cannot change")


def _same_key(output_dir: str | Path, stage: str, key: str) -> list[RunFolder]:
    """Folders whose name says `key`."""
    parent, start = Path(output_dir) / stage, key[:PREFIX]
    if not parent.is_dir():
        return []
    names = [p.name for p in parent.iterdir() if p.name.startswith(start) and FOLDER_NAME.fullmatch(p.name)]
    return [RunFolder(parent / name) for name in sorted(names)]


def run_folder(output_dir: str | Path, stage: str, key: str, resume: str = "auto") -> RunFolder:
    """Where a run with this key is built; the folder exists afterwards.

    auto: <12 digits>, the same for everyone, so that two processes meet at one build lock; what an earlier
    attempt left there is continued. never: the first free name of <12 digits>, -2, -3 ..., which nobody else
    gets.
    """
    parent = Path(output_dir) / stage
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        path = parent / (key[:PREFIX] + (f"-{number}" if number > 1 else ""))
        try:
            path.mkdir()
        except FileExistsError:
            if resume == "never" or not _is_for(path, key):
                continue
        return RunFolder(path, stage, key)
    raise RuntimeError(f"{parent}: more than 9999 runs with key {key[:PREFIX]}")


def _is_for(path: Path, key: str) -> bool:
    """Whether a folder is this key's, not that of another key with the same first digits."""
    return RunFolder(path, key=key).read().get("key", key) == key


def find(output_dir: str | Path, stage: str, key: str) -> RunFolder | None:
    """The run with this key that finished last, verified; None if none has finished.

    CorruptArtifact if that one does not verify, or if nothing has finished and a folder's run.json cannot be
    read: a damaged result is reported, neither used nor built again behind the user's back.
    """
    finished, unreadable = [], None
    for number, folder in enumerate(_same_key(output_dir, stage, key)):
        try:
            record = folder.read()
        except CorruptArtifact as error:
            unreadable = error
            continue
        if record.get("status") == FINISHED and record.get("key") == key:
            finished.append((str(record.get("ended")), number, folder))
    if finished:
        newest = max(finished, key=lambda item: item[:2])[2]
        newest.verify()
        return newest
    if unreadable:
        raise unreadable
    return None
