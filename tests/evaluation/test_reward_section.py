"""The reward model in the report: its figures in words and as pictures, on a desktop and on a phone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_exp.data.records import Comparison
from rlhf_exp.evaluation import preference
from rlhf_exp.evaluation.report import write_report
from rlhf_exp.evaluation.reward_section import RewardModel
from rlhf_exp.probes import show
from rlhf_exp.probes.answers import Probe, Real
from rlhf_exp.probes.measure import measure as measure_probes
from rlhf_exp.schema import PROBES
from tests.evaluation.test_report import FACTS, Page, needs_nothing_else
from tests.evaluation.test_report_browser import measure


def assessed() -> dict:
    """Four pairs, three of them right; the chosen answer is the longer one in two."""
    texts = [("longer", "short"), ("longer", "short"), ("short", "longer"), ("short", "longer")]
    rows = [Comparison(i, f"prompt {i}", chosen, rejected) for i, (chosen, rejected) in enumerate(texts)]
    return preference.assess(rows, [(2.0, 0.0), (0.0, 1.0), (1.0, 0.0), (3.0, 0.0)])


def probed() -> list:
    """Every kind of probe, of three pairs, by a scorer that likes length."""
    pairs = [
        Real(Comparison(i, f"prompt {i}", "c", "r"), [5], [7] * (i + 2) + [2], [8, 2, 2, 2]) for i in range(3)
    ]
    kinds = {kind: [Probe(i, "x", [9] * (k % 9 + 1)) for i in range(3)] for k, kind in enumerate(PROBES)}
    report = measure_probes(pairs, kinds, lambda rows: [float(len(answer)) for _, answer in rows], {})
    return show.panels(report, dict.fromkeys(PROBES, 0.2))


@pytest.fixture
def page(tmp_path, made_evaluation, made_curves):
    def write(*models: RewardModel) -> Page:
        path = write_report(tmp_path / "report", "PPO", made_evaluation, made_curves, FACTS, models)[0]
        return Page(path.read_text(encoding="utf-8"))

    return write


def test_its_figures_are_said_and_drawn(page):
    found = page(RewardModel("reward", assessed(), probed()))
    text = found.text()
    assert "It prefers the chosen answer in 75.0% of 4 validation pairs (95 %: 30.1% to 95.4%)" in text
    assert "the rule that the longer answer wins is right in 50.0%" in text
    assert [word for word in ("The reward model", "The reward models") if word in text] == [
        "The reward model"
    ]
    labels = [a["aria-label"] for name, a in found.elements if name == "figure"]
    mine = labels[-5:]
    assert len(labels) == 2 + 6 + 2 + 5
    titles = ("Margins", "Calibration", "Scored above the real answer", "Mean shift", "Score and length")
    assert all(label.startswith(title) for label, title in zip(mine, titles, strict=True))
    assert all(kind in found.text("svg") for kind in PROBES)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    needs_nothing_else(found)
    heads = found.text("h2")
    assert heads.index("All policies") < heads.index("The reward model") < heads.index("Samples")


def test_what_is_not_known_is_not_shown(page):
    assert "reward model" not in page().text("h2")
    assert "reward model" not in page(RewardModel("reward", None)).text("h2")
    alone = page(RewardModel("reward", assessed()))
    assert "Margins" in alone.text("svg")
    assert "Probes are" not in alone.text()
    probes = page(RewardModel("reward", None, probed()))
    assert "Probes are" in probes.text()
    assert "It prefers" not in probes.text()


def test_of_an_ensemble_each_has_its_name(page):
    found = page(RewardModel("reward", assessed()), RewardModel("reward_1", assessed(), probed()))
    assert "The reward models" in found.text("h2")
    assert found.text().count("It prefers the chosen answer") == 2
    names = [data for path, data in found.texts if path[-1:] == ("h3",) and data.startswith("reward")]
    assert names == ["reward", "reward_1"]
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_letter_is_in_a_colour_of_the_theme(page):
    """matplotlib's black would be black on the dark page too; text without any takes black as well."""
    found = page(RewardModel("reward", assessed(), probed()))
    letters = [attributes for name, attributes in found.elements if name == "text"]
    assert len(letters) > 100
    assert [a for a in letters if "var(--" not in (a.get("style") or "") + (a.get("fill") or "")] == []


@pytest.mark.usefixtures("chromium")
def test_it_fits_desktop_and_phone(tmp_path, made_evaluation, made_curves):
    models = [RewardModel("reward", assessed(), probed())]
    page: Path = write_report(tmp_path / "report", "PPO", made_evaluation, made_curves, FACTS, models)[0]
    found = measure(page, tmp_path)
    for width, columns in ((1200, 2), (400, 1)):
        seen = found[width]
        assert seen["page"] <= width, "the page scrolls sideways"
        assert seen["outside"] == 0, "letters leave their figure"
        assert len(seen["figures"]) == 2 + 6 + 5
        assert len({round(left) for left, _, _ in seen["figures"][-5:]}) == columns
        assert min(seen["letters"]) >= 9.5, "letters of a figure are too small to read"
        assert re.search(r"It prefers the chosen answer in 75\.0%", seen["text"])
