"""Labels beside the points of a figure, where they cover neither each other nor points, bars or the line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 10.5  # of the letters, in points
# where a label may stand, best first: (right, up) of the point, in sizes of the label
_PLACES = [(0, 1), (1, 0.75), (1, -0.75), (-1, 0.75), (0, -1), (-1, -0.75), (1, 0), (-1, 0)]
Box = tuple[float, float, float, float]  # left, bottom, right, top


def place(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    errors: Sequence[float],
    labels: Sequence[str],
    line: Sequence[tuple[float, float]],
    colour: str,
) -> None:
    """Write each label next to its point, at the place that covers the least; one after the other.

    points and errors (half the height of a bar) in data units; `line`: corners of the line that joins points.
    The figure's layout and limits must be settled: they decide what is near in pixels.
    """
    scale = axes.figure.dpi / 72
    pixels = axes.transData.transform(points)
    frame = axes.get_window_extent()
    taken = [_around(x, y, 5 * scale, 5 * scale) for x, y in pixels]
    for (x, y), error in zip(points, errors, strict=True):
        (px, low), (_, high) = axes.transData.transform([(x, y - error), (x, y + error)])
        taken.append((px - 2 * scale, low, px + 2 * scale, high))
    taken += _beads(axes.transData.transform(line) if line else [], 3 * scale)
    for point, (x, y), label in zip(points, pixels, labels, strict=True):
        width, height = 0.62 * SIZE * scale * len(label), SIZE * scale
        choices = []
        for rank, (right, up) in enumerate(_PLACES):
            middle = x + right * (width / 2 + 7 * scale), y + up * (height / 2 + 7 * scale)
            box = _around(*middle, width / 2, height / 2)
            cost = sum(_overlap(box, other) for other in taken) + _outside(box, frame.extents) + rank
            choices.append((cost, rank, middle, box))
        _, _, middle, box = min(choices)
        taken.append(box)
        offset = (middle[0] - x) / scale, (middle[1] - y) / scale
        style = {
            "ha": "center",
            "va": "center",
            "fontsize": SIZE,
            "color": colour,
            "annotation_clip": False,
            "parse_math": False,
        }
        axes.annotate(label, point, offset, textcoords="offset points", **style).set_in_layout(False)


def _around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _beads(corners: Sequence[tuple[float, float]], radius: float) -> list[Box]:
    """A line as a row of small boxes."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = int(max(abs(x1 - x0), abs(y1 - y0)) / (2 * radius)) + 1
        for i in range(count):
            share = (i + 0.5) / count
            boxes.append(_around(x0 + share * (x1 - x0), y0 + share * (y1 - y0), radius, radius))
    return boxes


def _overlap(a: Box, b: Box) -> float:
    """Common area in square pixels."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _outside(box: Box, frame: Sequence[float]) -> float:
    """Area that lies beyond the frame, dearer than any cover."""
    width, height = box[2] - box[0], box[3] - box[1]
    return 10 * (width * height - _overlap(box, tuple(frame)))
