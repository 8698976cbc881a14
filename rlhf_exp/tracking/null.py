"""The tracker of `tracking=none`: stages never ask whether there is a tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


class NullTracker:
    run_id: str | None = None

    def params(self, values: Mapping[str, object]) -> None:
        pass

    def metrics(self, values: Mapping[str, object], step: int) -> None:
        pass

    def tags(self, values: Mapping[str, object]) -> None:
        pass

    def artifact(self, path: Path, folder: str = "") -> None:
        pass

    def table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        pass

    def child(
        self, name: str, tags: Mapping[str, object] | None = None, run_id: str | None = None
    ) -> NullTracker:
        return NullTracker()

    def settled(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def finish(self, status: str, error: BaseException | str | None = None) -> None:
        pass
