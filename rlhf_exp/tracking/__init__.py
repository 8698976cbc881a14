"""Where a run's numbers go besides its own folder: MLflow, or nowhere (imported when a run opens)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf_exp import distributed
from rlhf_exp.schema import Tracking
from rlhf_exp.tracking.location import how_to_open, tracking_uri
from rlhf_exp.tracking.null import NullTracker
from rlhf_exp.tracking.runlog import RunLog, read_lines, read_metrics, resend
from rlhf_exp.tracking.tracker import Tracker, tracked

__all__ = [
    "NullTracker",
    "RunLog",
    "Tracker",
    "how_to_open",
    "open_tracker",
    "read_lines",
    "read_metrics",
    "require_store",
    "resend",
    "tracked",
    "tracking_uri",
]


def open_tracker(
    tracking: Tracking,
    output_dir: Path | str,
    name: str,
    tags: Mapping[str, object] | None = None,
    parent_id: str | None = None,
    run_id: str | None = None,
) -> Tracker:
    """Open a run called `name`.

    `parent_id` makes it a child of that run; `run_id` continues an existing one. A store that cannot be used
    is an InputError here, before anything expensive starts; once a run is open, trouble with the store never
    raises.
    """
    if tracking.backend == "none" or not distributed.is_main():
        return NullTracker()
    from rlhf_exp.tracking.mlflow_store import open_run

    return open_run(tracking, Path(output_dir), name, tags, parent_id, run_id)


def require_store(tracking: Tracking, output_dir: Path | str) -> None:
    """InputError, within seconds, unless runs can be opened; an own database is made if it is not there."""
    if tracking.backend != "none" and distributed.is_main():
        from rlhf_exp.tracking.mlflow_store import require_store

        require_store(tracking, Path(output_dir))
