"""Panels as images: each alone as SVG for the page, or side by side in a PNG.

Drawn with matplotlib's objects, never pyplot: no state is shared with the rest of the process. Colours are
Okabe & Ito's (2008), which colour-blind readers can tell apart; in the SVG they become CSS variables, so that
the page's light and dark themes apply. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# name of the CSS variable -> colour on white
THEME = {
    "ink": "#1c2128",
    "muted": "#5b6673",
    "line": "#c9d0d8",
    "grid": "#e9edf1",
    "paper": "#ffffff",
    "gold": "#d55e00",
    "reward": "#0072b2",
    "plain": "#007a5a",
}
# width and height of a panel in inches, letters are 10 to 12.5 points; on the page 340 to 540 pixels
PANEL, WIDE = (3.7, 2.6), (5.0, 3.5)
PAGE_PANEL, PAGE_WIDE = (4.0, 2.85), (4.7, 3.3)
PNG_DPI = 160


class Panel(NamedTuple):
    """`draw` fills axes that have title and frame; `label` then adds what depends on the figure's layout.

    `about` says in words what is shown (for screen readers).
    """

    title: str
    unit: str
    x_label: str
    about: str
    draw: Callable[[Axes], None]
    label: Callable[[Axes], None] | None = None


def svg(panel: Panel, size: tuple[float, float], name: str) -> str:
    """One panel as an <svg> element: text is text, colours are CSS variables, ids start with `name`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    with _defaults({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = _draw([panel], 1, size, 72, "none")
        FigureCanvasSVG(figure).print_svg(stream)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)  # among it the date
    view = re.search(r'viewBox="([^"]+)"', text)[1]
    text = re.sub(r"<svg[^>]*>", f'<svg viewBox="{view}" aria-hidden="true">', text, count=1)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would apply to the whole page
    text = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", _font, text)
    text = re.sub(r" font-family: [^;\"]*;| transform=\"rotate\(-?0 [^\"]*\"", "", text)
    text = text.replace("xlink:href", "href")  # the page declares no prefixes
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    for variable, colour in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def _font(match: re.Match[str]) -> str:
    """matplotlib names its own font; the page's is taken instead."""
    weight = "; font-weight: 600" if re.search(r"bold|[67]00", match[1]) else ""
    return f"font-size: {float(match[2]):g}px{weight}"


def write_png(path: Path, panels: Sequence[Panel], columns: int, size: tuple[float, float]) -> Path:
    """All panels side by side, row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _defaults({}):
        figure = _draw(panels, min(columns, len(panels)), size, PNG_DPI, THEME["paper"])
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
    return path


@contextmanager
def _defaults(settings: dict[str, str]) -> Iterator[None]:
    """matplotlib's own defaults and `settings`, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def _draw(
    panels: Sequence[Panel], columns: int, size: tuple[float, float], dpi: int, background: str
) -> Figure:
    """A figure of all panels. Its layout is computed once, here: savefig would do it twice more."""
    from matplotlib.figure import Figure

    rows = math.ceil(len(panels) / columns)
    shape = (size[0] * columns, size[1] * rows)
    figure = Figure(shape, dpi, layout="constrained", facecolor=background)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        _frame(axes, panel)
        panel.draw(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    layout = figure.get_layout_engine()
    layout.set(w_pad=0.08, h_pad=0.1, wspace=0.03, hspace=0.04)
    layout.execute(figure)
    figure.set_layout_engine("none")
    for axes, panel in zip(grid, panels, strict=False):
        if panel.label:
            panel.label(axes)
    return figure


def _frame(axes: Axes, panel: Panel) -> None:
    """Title and unit above, a light grid behind, no box."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(
        f"{panel.title}\n", loc="left", fontsize=12.5, fontweight="bold", color=THEME["ink"], pad=3
    )
    axes.annotate(
        panel.unit,
        (0, 1),
        (0, 5),
        "axes fraction",
        "offset points",
        fontsize=10,
        color=THEME["muted"],
        va="bottom",
    ).set_in_layout(False)
    axes.set_xlabel(panel.x_label, fontsize=10, color=THEME["muted"])
    axes.tick_params(labelsize=10, colors=THEME["muted"], length=0, pad=4)
    axes.set_facecolor("none")
    axes.grid(axis="y", color=THEME["grid"], lw=0.9)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(THEME["line"])
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=panel.x_label == "PPO step", steps=[1, 2, 5, 10]))
