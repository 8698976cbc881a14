"""What is printed at the end, and in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_exp.schema import Tracking
from rlhf_exp.stages import summary
from rlhf_exp.stages.context import EVALUATION, MARGINS
from rlhf_exp.stages.gate import PROBE, REPORT
from rlhf_exp.store.runs import RunFolder

ACCURACY = {
    "validation/accuracy": 0.71875,
    "validation/accuracy_low": 0.5461,
    "validation/accuracy_high": 0.8442,
    "validation/length_accuracy": 0.53125,
    "validation/pairs": 32.0,
}
LINE = (
    "reward bbbbbb  validation accuracy 0.7188, from 0.5461, to 0.8442, length-only baseline 0.5312, pairs 32"
)


@pytest.fixture
def show(tmp_path, monkeypatch, capsys):
    """The lines printed for finished stages, the last of which was asked for; files: in its run folder."""

    def run(*stages: tuple[str, dict[str, float]], files: tuple[str, ...] = ()) -> list[str]:
        nodes = []
        for letter, (stage, metrics) in zip("abc", stages, strict=False):
            folder = RunFolder(tmp_path / stage, stage, letter * 64)
            folder.start({})
            folder.finish(metrics)
            nodes.append(SimpleNamespace(name=stage, stage=stage, key=letter * 64, found=folder))
        for name in files:
            (nodes[-1].found.path / name).parent.mkdir(parents=True)
            (nodes[-1].found.path / name).write_text("{}")
        config = SimpleNamespace(tracking=Tracking(backend="none"))
        monkeypatch.setattr(summary, "_probes", lambda report: print("the table of the probes"))
        summary.show(SimpleNamespace(nodes=nodes, target=nodes[-1], config=config))
        return capsys.readouterr().out.splitlines()

    return run


def test_the_accuracy_is_under_the_table_of_the_probes(show):
    files = (f"{PROBE}/{REPORT}", f"{EVALUATION}/{MARGINS}")
    found = show(("sft", {"train/loss": 2.5, "data/rows": 7.0}), ("reward", ACCURACY), files=files)
    assert found[:5] == ["sft    aaaaaa  loss 2.5, rows 7", "the table of the probes", "", LINE, ""]
    assert found[5].startswith("run folder ")
    assert found[6].startswith("margins ")
    assert sum("validation accuracy" in line for line in found) == 1


def test_of_a_parent_it_is_above(show):
    ppo = {"objective/scores": 1.25, "objective/kl": 3.0}
    found = show(("sft", {"train/loss": 2.5}), ("reward", ACCURACY), ("ppo", ppo))
    assert [line.split()[0] for line in found[:3]] == ["sft", "reward", "ppo"]
    assert found[2:4] == ["ppo    cccccc  score 1.25, KL 3", ""]
