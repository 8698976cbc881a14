"""What of a finished stage goes to the tracker."""

from __future__ import annotations

import pytest

from rlhf_exp.stages import pipeline
from rlhf_exp.store.runs import RunFolder


class Recorder:
    """A tracker that remembers what it was given."""

    def __init__(self):
        self.figures: dict[str, float] = {}
        self.artifacts: list[tuple[str, str]] = []

    def metrics(self, values, step):
        self.figures |= values

    def artifact(self, path, folder):
        self.artifacts.append((path.name, folder))


@pytest.mark.parametrize(
    ("there", "sent"),
    [
        (("adapter", "head", "checkpoints"), ["adapter", "head"]),
        (("adapter", "critic", "ema", "head"), ["adapter", "critic", "ema", "head"]),
        (("adapter", "head", "probe"), ["adapter", "head", "probe"]),
    ],
    ids=["ppo", "averaged policy", "reward"],
)
def test_each_result_is_uploaded_under_its_own_name(tmp_path, there, sent):
    folder = RunFolder(tmp_path / "run", "ppo", "0" * 64)
    folder.start({})
    for name in there:
        with folder.publish(name) as path:
            (path / "file").write_text(name)
    folder.finish({"objective/scores": 1.5, "objective/gold": None})
    tracker = Recorder()
    pipeline.upload(folder, tracker)
    assert sorted(tracker.artifacts) == [(name, name) for name in sent]
    assert tracker.figures == {"final/objective/scores": 1.5}
