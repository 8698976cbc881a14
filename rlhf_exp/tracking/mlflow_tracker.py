"""One MLflow run: metrics are buffered, and no trouble with the store reaches the training.

Metrics go out in batches (one alone costs 4-22 ms, 1,000 together 90 ms): at FLUSH_COUNT of them, after
FLUSH_SECONDS, and at the end. A metric's timestamp is the run's start plus its step in milliseconds, not the
clock: what is logged again after a resume is then the same row, and MLflow keeps one.

What cannot be sent stays buffered (metrics.jsonl has it in any case), one line on stderr says so, and a later
flush tries again: after 10 s, then less and less often.
"""

from __future__ import annotations

import getpass
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.tracking import location, values
from rlhf_exp.tracking.null import NullTracker
from rlhf_exp.tracking.tracker import Tracker, describe

FLUSH_COUNT = 1000
FLUSH_SECONDS = 10.0
LONGEST_PAUSE = 120.0  # between automatic attempts while the store is in trouble
BUFFER_LIMIT = 100_000  # metric values, some 20 MB; beyond it the oldest are given up
FINISH_ATTEMPTS = 2
PARENT_TAG = "mlflow.parentRunId"
_TABLES_TAG = "mlflow.loggedArtifacts"  # the UI's list of artifacts to show as tables


def create_run(client: Any, experiment_id: str, name: str, tags: Mapping[str, object]) -> Any:
    """A new run with the tags that the UI shows as user and source; or the one that a killed process left empty.

    MLflow chooses the id, so a process that is killed before it notes the id leaves a run that nobody knows. Tags
    with a `folder`, which only one process at a time may write, say whose it is.
    """
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "unknown"
    ours = {"mlflow.user": user, "mlflow.source.name": "rlhf_exp", "mlflow.source.type": "LOCAL", **tags}
    texts = _texts({**ours, "host": platform.node()}, values.TAG_LENGTH)
    if "folder" in tags and (left := _left_empty(client, experiment_id, texts)):
        for key, text in texts.items():
            client.set_tag(left.info.run_id, key, text, synchronous=True)
        return left
    return client.create_run(experiment_id, run_name=name, tags=texts)


def _left_empty(client: Any, experiment_id: str, tags: Mapping[str, str]) -> Any | None:
    """The newest run of this folder on this machine that runs, and into which nothing was written."""
    wanted = f"tags.key = '{tags['key']}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment_id], wanted):
        same = all(run.data.tags.get(name) == tags[name] for name in ("folder", "host", "stage"))
        if same and not run.data.params and not run.data.metrics:
            return run
    return None


def existing(client: Any, run_id: str) -> Any | None:
    """The run, unless the store does not have it any more."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def reopened(client: Any, uri: str, run: Any, tags: Mapping[str, object]) -> MlflowTracker:
    """Go on with a run that ended, or whose process did."""
    client.update_run(run.info.run_id, status="RUNNING")
    tracker = MlflowTracker(client, uri, run)
    tracker.tags(tags)
    return tracker


def _texts(pairs: Mapping[str, object], length: int) -> dict[str, str]:
    return {values.clean_name(key): values.cut(values.as_text(value), length) for key, value in pairs.items()}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class MlflowTracker:
    """One run of an MLflow store (see `Tracker`); `open_run` and `child` make them."""

    def __init__(
        self,
        client: Any,
        uri: str,
        run: Any,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.run_id: str | None = run.info.run_id
        self.uri = uri
        self._client, self._clock, self._sleep = client, clock, sleep
        self._experiment_id: str = run.info.experiment_id
        self._start_ms: int = run.info.start_time
        self._known_params: dict[str, str] = dict(run.data.params)
        self._tables: list[dict[str, str]] = json.loads(run.data.tags.get(_TABLES_TAG, "[]"))
        self._params: dict[str, str] = {}  # pending, as the next three
        self._tags: dict[str, str] = {}
        self._metrics: list[Any] = []
        self._artifacts: dict[str, Callable[[], None]] = {}  # by place in the store: the latest counts
        self._last_flush = clock()
        self._pause = 0.0  # > 0: the last attempt failed
        self._warned: set[str] = set()
        self._lost = 0  # metric values
        self._refused = 0  # parameters, tags, artifacts
        self._ended = False

    def params(self, values_: Mapping[str, object]) -> None:
        for key, text in _texts(values.flatten(values_), values.PARAM_LENGTH).items():
            known = self._known_params.setdefault(key, text)
            if known == text:
                self._params[key] = text
            else:  # MLflow never changes a parameter: after a resume the new value becomes a tag
                self._tags[values.clean_name(f"resumed.{key}")] = text
        self._send()

    def tags(self, values_: Mapping[str, object]) -> None:
        self._tags |= _texts(values_, values.TAG_LENGTH)
        self._send()

    def metrics(self, values_: Mapping[str, object], step: int) -> None:
        from mlflow.entities import Metric

        for key, value in values_.items():
            try:
                figure = values.number(value)
            except TypeError as error:
                self._warn("value", f"tracking: metric {key} left out: {error}")
                continue
            timestamp = self._start_ms + int(step)
            self._metrics.append(Metric(values.clean_name(key), figure, timestamp, int(step)))
        if (over := len(self._metrics) - BUFFER_LIMIT) > 0:
            del self._metrics[:over]
            self._lost += over
        age = self._clock() - self._last_flush
        if self._ended or age >= FLUSH_SECONDS or len(self._metrics) >= FLUSH_COUNT:
            self._send()

    def artifact(self, path: Path, folder: str = "") -> None:
        path = Path(path)

        def send() -> None:
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder or None)
            elif path.exists():
                self._client.log_artifact(self.run_id, str(path), folder or None)
            else:
                self._refused += 1
                self._warn("artifact", f"tracking: artifact {path} left out: it does not exist")

        self._artifacts[f"{folder}/{path}"] = send
        self._send()

    def table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        place = f"{values.clean_name(name)}.json"
        text = values.table_json(rows)  # now: the caller may change its rows

        def send() -> None:
            self._client.log_text(self.run_id, text, place)
            entry = {"path": place, "type": "table"}
            listed = json.dumps([*self._tables, entry])
            if entry not in self._tables and len(listed) <= values.TAG_LENGTH:
                self._client.set_tag(self.run_id, _TABLES_TAG, listed, synchronous=True)
                self._tables.append(entry)

        self._artifacts[place] = send
        self._send()

    def child(
        self, name: str, tags: Mapping[str, object] | None = None, run_id: str | None = None
    ) -> Tracker:
        """A run under this one; if the store is in trouble right now, one that records nothing."""
        all_tags = {**(tags or {}), PARENT_TAG: self.run_id}
        try:
            with location.calling(self.uri, self._limits()):
                if run_id and (run := existing(self._client, run_id)):
                    return reopened(self._client, self.uri, run, all_tags)
                run = create_run(self._client, self._experiment_id, name, all_tags)
        except Exception as error:
            say(
                f"tracking: no run for {name} in {self._where} ({location.reason(error)}); it goes on without"
            )
            return NullTracker()
        return MlflowTracker(self._client, self.uri, run, self._clock, self._sleep)

    def settled(self) -> bool:
        return not (self._metrics or self._lost)

    def flush(self) -> None:
        self._send(force=True)

    def finish(self, status: str, error: BaseException | str | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        if error is not None:
            line, text = describe(error)
            self._tags["rlhf_exp.error"] = values.cut(line, values.TAG_LENGTH)
            place = "traceback.txt"
            self._artifacts[place] = lambda: self._client.log_text(self.run_id, text, place)
        for attempt in range(FINISH_ATTEMPTS):
            self._sleep(attempt)
            sent = self._send(force=True)
            closed = self._close(status)
            if sent and closed:
                break
        if unsent := len(self._metrics) + self._lost:
            say(f"tracking: {unsent} metric values never reached {self._where}; metrics.jsonl has them")
        if others := len(self._artifacts) + len(self._params) + len(self._tags) + self._refused:
            say(f"tracking: {others} parameters, tags or artifacts never reached {self._where}")
        if not closed:
            say(f"tracking: run {self.run_id} ended {status}, but {self._where} could not be told")

    def _close(self, status: str) -> bool:
        """Set the run's final status, and the number of values that are lost."""
        try:
            with location.calling(self.uri, self._limits()):
                if lost := self._lost + len(self._metrics):
                    self._client.set_tag(self.run_id, "rlhf_exp.lost_metrics", str(lost), synchronous=True)
                self._client.set_terminated(self.run_id, status)
            return True
        except Exception:
            return False

    @property
    def _where(self) -> str:
        return location.shown(self.uri)

    def _limits(self) -> Mapping[str, str]:
        """A store that failed last time is not waited for again."""
        return location.PROBE if self._pause else location.SEND

    def _send(self, force: bool = False) -> bool:
        """Try to send what is pending; True if nothing is left. `force` ignores the pause after a failure."""
        if self._pause and not force and self._clock() - self._last_flush < self._pause:
            return False
        try:
            with location.calling(self.uri, self._limits()):
                self._send_pairs(self._params, "params")
                self._send_pairs(self._tags, "tags")
                self._send_metrics()
                for place, send in list(self._artifacts.items()):
                    send()
                    del self._artifacts[place]
        except Exception as error:
            self._pause = min(max(2 * self._pause, FLUSH_SECONDS), LONGEST_PAUSE)
            self._warn(
                "store",
                f"tracking: trouble with {self._where} ({location.reason(error)}); training goes on, "
                "metrics.jsonl has every value, and what is missing here is sent when the store is back",
            )
            return False
        else:
            self._pause = 0.0
            return True
        finally:
            self._last_flush = self._clock()

    def _send_metrics(self) -> None:
        def size(metric: Any) -> int:
            return 100 + 6 * len(metric.key)

        for batch in list(values.batches(self._metrics, values.METRICS_A_BATCH, size)):
            self._lost += self._log("metrics", batch)
            # only now: if Ctrl-C comes before, they are sent again and MLflow keeps one of each
            del self._metrics[: len(batch)]

    def _send_pairs(self, pending: dict[str, str], kind: str) -> None:
        from mlflow.entities import Param, RunTag

        def size(pair: Any) -> int:
            return 60 + 6 * len(pair.key + pair.value)

        pairs = [(Param if kind == "params" else RunTag)(key, text) for key, text in pending.items()]
        for batch in values.batches(pairs, values.PARAMS_A_BATCH, size):
            self._refused += self._log(kind, batch)
            for pair in batch:
                del pending[pair.key]

    def _log(self, kind: str, batch: list[Any]) -> int:
        """Send a batch. Items that the server refuses as invalid do not block the rest; their number."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(self.run_id, **{kind: batch}, synchronous=True)
            return 0
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(batch) == 1:
                self._warn("refused", f"tracking: {batch[0].key} was refused ({location.reason(error)})")
                return 1
        return sum(self._log(kind, [item]) for item in batch)

    def _warn(self, about: str, line: str) -> None:
        """The first trouble of each kind is worth a line, the hundredth is not."""
        if about not in self._warned:
            self._warned.add(about)
            say(line)
