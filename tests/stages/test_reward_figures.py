"""What an evaluation shows of the reward models that score."""

from __future__ import annotations

import pytest

from rlhf_exp.data.records import Comparison
from rlhf_exp.probes import show
from rlhf_exp.probes.answers import Probe, Real
from rlhf_exp.probes.measure import measure
from rlhf_exp.schema import Limits, RewardSource
from rlhf_exp.stages import probe, reward_eval, reward_figures
from rlhf_exp.stages.context import EVALUATION

ROWS = [Comparison(1, "p", "good one", "bad"), Comparison(2, "q", "fine", "awful")]


@pytest.fixture
def reward_run(context):
    """A reward run's folder with what it measured; three scores in order, one not."""

    def make(name: str, scores: list[tuple[float, float]], probes: bool = True):
        given = context(name)
        reward_eval.publish(given, ROWS, scores)
        if probes:
            pairs = [Real(row, [5], [7, 8, 2], [9, 2]) for row in ROWS]
            kinds = {"empty": [Probe(i, "", [2]) for i in range(2)]}
            report = measure(pairs, kinds, lambda rows: [float(len(a)) for _, a in rows], {})
            probe.publish(given.folder, report | {"split": "validation"})
        return given.folder.path

    return make


def test_each_model_brings_what_its_run_has(run_config, context, reward_run, adapters, monkeypatch):
    source = RewardSource(ensemble=3, limits=Limits(empty=0.35))
    limits, panels = [], show.panels

    def spy(report, given, before=None):
        limits.append(given["empty"])
        return panels(report, given, before)

    parents = {
        "reward": reward_run("one", [(1.0, 0.0), (2.0, 0.0)]),
        "reward_1": reward_run("two", [(1.0, 0.0), (0.0, 2.0)], probes=False),
        "reward_2": adapters["reward"],  # an adapter alone
    }
    monkeypatch.setattr(show, "panels", spy)
    one, two, three = reward_figures.models(run_config("eval", reward_source=source), context(**parents))
    assert (one.name, one.pairs["accuracy"], len(one.probes)) == ("reward", 1.0, 3)
    assert (two.name, two.pairs["accuracy"], tuple(two.probes)) == ("reward_1", 0.5, ())
    assert (three.name, three.pairs, tuple(three.probes)) == ("reward_2", None, ())
    assert limits == [0.35]
    assert (parents["reward"] / EVALUATION / "margins.png").is_file()


def test_a_rule_has_no_model(run_config, context):
    source = RewardSource(kind="function", function="length")
    assert reward_figures.models(run_config("eval", reward_source=source), context()) == []
