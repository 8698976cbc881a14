"""Panels, labels, SVG and PNG."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from rlhf_exp.evaluation import figures, labels, outcome, render


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def words(svg: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ET.fromstring(svg).iter("text")]


def test_frontier_has_a_panel_for_each_score(evaluation):
    gold, reward = figures.frontier_panels(evaluation["policies"])
    assert (gold.title, reward.title) == ("Gold score against KL", "Reward against KL")
    assert gold.x_label == "KL from SFT (nats an answer)"
    assert "SFT: KL 0.0, gold score 0.10; 8: KL 1.2, gold score 0.30" in gold.about


def test_frontier_leaves_out_what_is_missing(evaluation):
    policies = evaluation["policies"]
    for policy in policies:
        policy["metrics"]["gold"] = None
    policies[1]["metrics"]["kl"] = math.nan
    (reward,) = figures.frontier_panels(policies)
    assert reward.title == "Reward against KL"
    assert "8:" not in reward.about and "16:" in reward.about
    assert figures.frontier_panels([{"name": "sft", "step": 0, "metrics": {}}]) == []


@pytest.mark.parametrize(
    ("on", "words"),
    [("heldout", "held-out mean"), ("validation", "validation mean"), ("train", "training-prompt mean")],
)
def test_the_frontier_says_on_which_prompts(evaluation, on, words):
    evaluation["evaluate_on"] = on
    for panel in figures.frontier_panels(evaluation["policies"], outcome.prompts(evaluation)):
        assert panel.unit == f"{words}, 95 % intervals; labels: PPO step"


def test_an_average_is_a_point_beside_the_line_and_the_data_are_none(with_data):
    panel, _ = figures.frontier_panels(with_data["policies"])
    svg = render.svg(panel, render.PAGE_WIDE, "f")
    assert {"SFT", "8", "16", "24", "ppo (ema)"} <= set(words(svg))
    line = next(
        path.get("d")
        for path in ET.fromstring(svg).iter("path")
        if "stroke: var(--gold)" in path.get("style", "") and "L" in path.get("d")
    )
    assert line.count("L") == 3  # sft, 8, 16, 24


def test_frontier_labels_each_checkpoint_and_joins_them_in_order(evaluation):
    policies = evaluation["policies"]
    base = {"name": "<a $b$>", "step": 0, "metrics": {"kl": 2.0, "gold": 0.0}}
    panel, _ = figures.frontier_panels([*reversed(policies), base])
    svg = render.svg(panel, render.PAGE_WIDE, "f")
    assert {"SFT", "8", "16", "24", "<a $b$>"} <= set(words(svg))
    line = next(
        path.get("d")
        for path in ET.fromstring(svg).iter("path")
        if "stroke: var(--gold)" in path.get("style", "") and path.get("d").count("L") == 3
    )
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", line)]
    assert xs == sorted(xs)  # by step, whatever the order of the file; base is not on the line


def test_curves_that_are_missing_make_room_for_the_next(curves):
    titles = [panel.title for panel in figures.curve_panels(curves, figures.TRAINING)]
    assert titles == ["Reward", "Gold score", "KL", "Answer length", "Entropy", "Ended by themselves"]
    for row in curves:
        del row["objective/gold"]
        row["response/distinct_2"] = 0.8
    titles = [panel.title for panel in figures.curve_panels(curves, figures.TRAINING)]
    assert titles == ["Reward", "KL", "Answer length", "Entropy", "Ended by themselves", "Distinct-2"]
    assert figures.curve_panels([], figures.TRAINING) == []
    assert figures.curve_panels([{"step": 1, "other": 2.0}], figures.TRAINING) == []


def test_values_that_are_not_finite_are_left_out_and_counted(curves):
    curves[3]["objective/scores"] = math.nan
    curves[23]["objective/scores"] = math.inf
    panel = figures.curve_panels(curves, figures.TRAINING)[0]
    assert panel.unit == "mean score of a batch (2 not finite)"
    assert panel.about == "from 0.1 at step 1 to 2.3 at step 23"
    render.svg(panel, render.PANEL, "p")


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 400])
def test_any_number_of_steps_draws(tmp_path, steps):
    rows = [{"step": i, "objective/kl": 0.0, "policy/ratio_mean": 1e6 + i} for i in range(1, steps + 1)]
    panels = [*figures.curve_panels(rows, figures.TRAINING), *figures.curve_panels(rows, figures.OPTIMISER)]
    render.write_png(tmp_path / "x.png", panels, 3, render.PANEL)
    assert png_size(tmp_path / "x.png") == (
        round(2 * render.PANEL[0] * render.PNG_DPI),
        round(render.PANEL[1] * render.PNG_DPI),
    )


def test_moving_average_by_hand():
    values = np.array([0.0, 5, 10, 0, 0, 5, 0, 0])
    # two to each side; at the ends over what is there
    expected = [5, 15 / 4, 15 / 5, 20 / 5, 15 / 5, 5 / 5, 5 / 4, 5 / 3]
    assert figures.moving_average(values) == pytest.approx(expected)
    assert figures.moving_average(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))


def test_svg_is_safe_to_put_into_a_page(curves):
    """No style sheet that would leak, ids of its own, the page's fonts and colours."""
    panel = figures.curve_panels(curves, figures.TRAINING)[0]
    svg = render.svg(panel, render.PAGE_PANEL, "one")
    root = ET.fromstring(svg)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids and all(name.startswith("one-") for name in ids)
    for target in re.findall(r"url\(#([^)]+)\)", svg) + re.findall(r'href="#([^"]+)"', svg):
        assert target in ids
    assert not list(root.iter("style")) and "font-family" not in svg and "<metadata" not in svg
    assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a colour that would not follow the theme"
    assert {"Reward", "mean score of a batch", "PPO step"} <= set(words(svg))
    assert root.get("viewBox") and not root.get("width")


def test_the_same_numbers_give_the_same_bytes(curves, tmp_path):
    panels = figures.curve_panels(curves, figures.TRAINING)[:1]
    assert render.svg(panels[0], render.PANEL, "a") == render.svg(panels[0], render.PANEL, "a")
    one, two = (render.write_png(tmp_path / name, panels, 3, render.PANEL) for name in ("1.png", "2.png"))
    assert one.read_bytes() == two.read_bytes()


def overlap(a, b) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_labels_cover_neither_each_other_nor_points():
    """Sixteen points in a row, closer than a label is wide: every label finds a free place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(i, 0) for i in range(16)]
    axes.scatter(*zip(*points, strict=True))
    figure.draw_without_rendering()
    labels.place(axes, points, [0.0] * 16, [str(100 + i) for i in range(16)], points, "#000000")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().extents for text in axes.texts]
    assert len(boxes) == 16
    for i, box in enumerate(boxes):
        assert not any(overlap(box, other) for other in boxes[:i])
        for x, y in axes.transData.transform(points):
            assert not overlap(box, (x - 2, y - 2, x + 2, y + 2))


def test_importing_loads_no_matplotlib_and_drawing_no_pyplot(tmp_path):
    code = (
        "import sys; from rlhf_exp.evaluation import report, figures, render, tables\n"
        "assert 'matplotlib' not in sys.modules and 'rich' not in sys.modules\n"
        "rows = [{'step': 1, 'objective/kl': 1.0}]\n"
        "from pathlib import Path\n"
        "render.write_png(Path('x.png'), figures.curve_panels(rows, figures.TRAINING), 3, render.PANEL)\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
