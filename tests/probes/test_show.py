"""The table, the examples and the picture of a report."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from rlhf_exp.probes import show
from rlhf_exp.probes.answers import Probe
from rlhf_exp.probes.measure import measure
from rlhf_exp.schema import PROBES, SAME


def test_every_kind_has_words():
    assert tuple(show.ABOUT) == PROBES and tuple(show.SAME) == SAME


def longer(rows):
    return [float(len(answer)) for _, answer in rows]


@pytest.fixture
def report(real):
    """empty never above, long always; one pair of three in order."""
    probes = {
        "empty": [Probe(i, "", [2]) for i in range(3)],
        "long": [Probe(i, f"rambling {i}\n\x1b[31m", [1] * 9) for i in range(3)],
        "thanks": [],
    }
    return measure(real, probes, longer, {"padding": ([Probe(0, "", real[0].chosen)], longer)})


def text(found, width=80) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(found)
    return [line.strip() for line in console.export_text().splitlines()]


def row(lines: list[str], kind: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(kind))
    return line.split()


def test_the_table_fits_and_says_all(report):
    lines = text(show.table(report))
    assert max(map(len, lines)) <= 80
    assert row(lines, "empty")[-4:] == ["0", "0-56", "-2.00", "3"]
    assert row(lines, "long")[-4:] == ["100", "44-100", "+6.00", "3"]
    assert row(lines, "thanks it")[-3:] == ["-", "-", "0"]
    assert row(lines, "padding")[-4:] == ["0", "0-79", "0.00", "1"]
    assert "of 3 real pairs 33 % in order (6-79)" in lines
    assert "score and length correlate +1.00 over answers, +1.00 within pairs" in " ".join(lines)


def test_a_scorer_that_tells_nothing_apart_is_told(report, real):
    said = "all chosen answers have the same score: this model tells none apart"
    assert said not in " ".join(text(show.table(report)))
    flat = measure(real, {"empty": [Probe(0, "", [2])]}, lambda rows: [0.1] * len(rows))
    assert said in " ".join(text(show.table(flat)))


def test_the_table_with_what_was_before_fits_too(report, real):
    before = measure(real, {"empty": [Probe(0, "", [2] * 9)], "thanks": []}, longer)
    lines = text(show.table(report, before=before))
    assert max(map(len, lines)) <= 80
    assert row(lines, "empty")[-5:] == ["100", "0", "0-56", "-2.00", "3"]
    assert row(lines, "long")[-5] == "-"  # was not probed before


def test_what_is_above_its_limit_is_red(report):
    console = Console(width=80, force_terminal=True, color_system="standard", legacy_windows=False)
    with console.capture() as captured:
        console.print(show.table(report, {"empty": 0.05, "long": 0.5}))
    lines = captured.get().splitlines()
    assert "\x1b[1;31m" in next(line for line in lines if "long" in line and "it, then" in line)
    assert "\x1b[1;31m" not in next(line for line in lines if "no characters" in line)


def test_examples_are_lines_that_cannot_steer_a_terminal(report):
    (line,) = show.examples(report, ["empty", "long", "thanks"])
    assert line == "long: +9.00 rambling 2 [31m   where +2.00 chosen 13   to ...prompt 13"  # shift 7


def test_the_picture_marks_limits_and_what_was_before(report, real):
    before = measure(real, {"empty": [Probe(0, "", [2] * 9)], "long": []}, longer)
    panels = show.panels(report, {"empty": 0.05, "long": 0.5}, before)
    assert [panel.title for panel in panels] == [
        *("Scored above the real answer", "Mean shift of the score", "Score and length"),
    ]
    axes = Figure().subplots()
    panels[0].draw(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["empty", "long"]
    points = [collection.get_offsets().tolist()[0] for collection in axes.collections]
    assert points == [[1.0, 0], [0.0, 0], [1.0, 1]]  # before, then now; long was not probed before
    limits = [line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[1]]
    assert limits == [0.05, 0.5]
    axes = Figure().subplots()
    panels[1].draw(axes)
    shifts = [collection.get_offsets().tolist()[0][0] for collection in axes.collections]
    assert shifts == pytest.approx([5.0, -2.0, 6.0])  # the spread of both is 1


def test_a_report_without_probes_has_a_picture(real, tmp_path):
    path = show.write_picture(tmp_path / "p.png", measure(real, {}, longer), {})
    assert path.read_bytes()[:4] == b"\x89PNG"
