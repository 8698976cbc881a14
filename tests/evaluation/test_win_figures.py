"""Win rates in the report: who is shown, what the figure and the table say, the terminal's column."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from rlhf_exp.evaluation import figures, findings, outcome, render, win_figures
from rlhf_exp.evaluation.report import write_report
from rlhf_exp.evaluation.tables import summary_table, table_rows

RATES = {"ppo@8": (0.625, 0.55, 0.7), "ppo@16": (0.4375, 0.375, 0.5), "ppo@24": (0.75, math.nan, math.nan)}


@pytest.fixture
def judged(evaluation) -> dict:
    """Three checkpoints against sft, the last on a single prompt."""
    for policy in evaluation["policies"]:
        if policy["name"] in RATES:
            rate, low, high = RATES[policy["name"]]
            policy["metrics"] |= {"win_rate": rate, "win_rate_low": low, "win_rate_high": high}
            policy["metrics"] |= {"win_rate_ties": 0.25, "win_rate_se": 0.03}
    evaluation["judge"] = {"by": "the rule length", "against": "sft"}
    return evaluation


def words(panel, evaluation) -> list[str]:
    svg = ET.fromstring(render.svg(panel, win_figures.size(evaluation), "w"))
    return ["".join(element.itertext()).strip() for element in svg.iter("text")]


def test_without_a_judge_there_is_no_section(evaluation):
    assert win_figures.panel(evaluation) is None
    assert list(win_figures.section(evaluation)) == []


def test_the_figure_has_a_row_for_each_policy_but_the_one_they_are_against(judged):
    panel = win_figures.panel(judged)
    assert panel.title == "Win rate against sft"
    shown = words(panel, judged)
    assert [name for name in shown if name.startswith("ppo")] == list(RATES) and "sft" not in shown
    assert panel.about == "ppo@8 62.5% (55.0% to 70.0%); ppo@16 43.8% (37.5% to 50.0%); ppo@24 75.0% (–)"


def test_a_name_is_no_formula(judged):
    judged["policies"][1]["name"] = "a$_1$b"
    assert "a$_1$b" in words(win_figures.panel(judged), judged)


def test_the_page_and_the_picture(judged, tmp_path):
    written = write_report(tmp_path, "x", judged, [], {})
    page = (tmp_path / "report.html").read_text()
    assert tmp_path / "wins.png" in written
    assert "than that of sft, to the same prompt with the same noise, by the rule length. A tie" in page
    assert "<td>43.8%</td><td>37.5% to 50.0%</td><td>25%</td>" in page
    assert "Same in both orders" not in page
    judged["policies"][1]["metrics"]["judge_consistent"] = 0.875
    write_report(tmp_path, "x", judged, [], {})
    page = (tmp_path / "report.html").read_text()
    assert "Same in both orders" in page and "<td>88%</td>" in page


def test_the_terminal_has_a_column(judged):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(judged))
    (line,) = (line for line in console.export_text().splitlines() if line.strip().startswith("ppo@24"))
    assert "75% ±3%*" in line


def test_the_table_has_a_row_for_each_and_the_same_columns(with_data):
    rows = table_rows(with_data)
    assert [row["policy"] for row in rows] == ["data", "sft", "ppo@8", "ppo@16", "ppo (ema)", "ppo@24"]
    assert len({tuple(row) for row in rows}) == 1
    assert rows[1]["gold"] == 0.1 and rows[0]["kl"] is None and rows[4]["step"] is None


@pytest.fixture
def two_runs(evaluation) -> list[dict]:
    """SFT, two checkpoints of each of two runs, and a policy that is none."""
    policies = evaluation["policies"]
    for policy, run in zip(policies[1:], ("one", "two", "two"), strict=True):
        policy["run"] = run
    policies.insert(2, {**policies[1], "name": "one@16", "step": 16})
    last = {"name": "dpo", "step": None, "metrics": {**policies[-1]["metrics"], "gold": 0.25}}
    return [*policies, last]


def test_each_run_has_its_own_line(two_runs, monkeypatch):
    drawn = []
    panel, _ = figures.frontier_panels(two_runs)

    class Axes:
        def plot(self, xs, ys, **_):
            drawn.append(list(zip(xs, ys, strict=True)))

        def __getattr__(self, _):
            return lambda *a, **k: None

    panel.draw(Axes())
    # gold against kl: both lines begin at sft (0, .1)
    assert drawn == [[(0, 0.1), (1.25, 0.3), (1.25, 0.3)], [(0, 0.1), (4.0, 0.625), (7.0, 0.5)]]


def test_of_several_runs_the_last_that_is_listed_is_spoken_of(two_runs):
    assert outcome.last(two_runs)["name"] == "dpo"
    assert findings.verdict(two_runs).startswith("With dpo the gold score rose from 0.10 to 0.25")
    one = [policy for policy in two_runs if policy.get("run") != "one"]
    assert outcome.last(one)["name"] == "ppo@24"  # a single run: its last checkpoint
    assert outcome.called(one[0], one) == "sft"


def test_two_stages_of_one_evaluation_are_two_runs(two_runs, monkeypatch):
    """eval.policies=[sft,ppo,rloo]: stages have no `run`, only a role."""
    found = [policy for policy in two_runs if policy["name"] != "dpo"]
    for policy, role in zip(found[1:], ("ppo", "ppo", "rloo", "rloo"), strict=True):
        policy |= {"run": "", "role": role, "name": f"{role}@{policy['step']}"}
    assert outcome.last(found)["name"] == outcome.called(found[-1], found) == "rloo@24"
    assert findings.verdict(found).startswith("With rloo@24 the gold score ")
    test_each_run_has_its_own_line(found, monkeypatch)
    panel, _ = figures.frontier_panels(found)
    assert panel.unit == "held-out mean, 95 % intervals"
    assert "ppo@8: KL 1.2, gold score 0.30; ppo@16: " in panel.about and "; rloo@24: " in panel.about
    alone = [policy for policy in found if policy.get("role") != "ppo"]
    assert findings.verdict(alone).startswith("After 24 RLOO steps the gold score ")
    assert outcome.called(alone[-1], alone) == "the last checkpoint"
    assert figures.frontier_panels(alone)[0].unit.endswith("; labels: RLOO step")
