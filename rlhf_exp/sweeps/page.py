"""A sweep's page in multirun/: the part between its marks is written from the sweep's folder, table and picture.

    <!-- results -->
    ...
    <!-- /results -->

The page's own text (question, command) is written by hand and stays.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_exp.errors import InputError
from rlhf_exp.progress import duration
from rlhf_exp.store import atomic
from rlhf_exp.sweeps import collect, folder, table

BEGIN, END = "<!-- results -->", "<!-- /results -->"
IMAGES = "images"


def write(sweep: Path, page: Path) -> None:
    """Put the results of `sweep` into `page`, and its picture into images/ beside it. Raises InputError."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{page} cannot be read ({error.strerror})") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(
            f"{page} needs one line {BEGIN} and after it one line {END}: what is between is written"
        )
    rows = table.rows(sweep)
    if not rows:
        raise InputError(f"{sweep} has no trials")
    shown = picture(sweep, rows, page)
    part = "\n\n".join([said(sweep, rows), table.markdown(rows).rstrip(), *shown])
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    atomic.write_bytes(page, f"{before}{BEGIN}\n{part}\n{after}".encode())
    collect.say(f"written: {page}")


def said(sweep: Path, rows: list[dict[str, Any]]) -> str:
    """When, with what, for how long."""
    known = folder.read(sweep)
    counts = ", ".join(f"{number} {status}" for status, number in collect.count(rows).items())
    seconds = sum(row["seconds"] or 0.0 for row in rows)
    commit = f", commit {known['commit'][:10]}" if known.get("commit") else ""
    command = f"python -m rlhf_exp {shlex.join(known['argv'])}"
    return (
        f"Run on {known['created'][:10]} (version {known['version']}{commit}): {len(rows)} trials, {counts}; "
        f"{duration(seconds)} in all, upstream stages included.\n\n```\n{command}\n```"
    )


def picture(sweep: Path, rows: list[dict[str, Any]], page: Path) -> list[str]:
    """The lines that show the picture, if there is one: the report's frontier, else the objective of each trial."""
    target = page.parent / IMAGES / f"{page.stem}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    pictures = sorted((sweep / collect.REPORT).glob("*.png"))
    if pictures:
        shutil.copyfile(pictures[0], target)
    elif not draw(rows, target):
        return []
    return [f"![{page.stem}]({IMAGES}/{target.name})"]


def draw(rows: list[dict[str, Any]], target: Path) -> bool:
    """The objective of each trial that is done as bars; False where there is none."""
    done = [row for row in rows if row["objective"] is not None]
    if not done:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.bar([_name(row) for row in done], [row["objective"] for row in done], color="#3b6ea5")
    axes.set_ylabel(table.metric(done))
    axes.tick_params(axis="x", labelrotation=30)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return True


def _name(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row["overrides"].items())
