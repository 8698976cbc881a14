"""Early stopping: the rule by hand, and a run that is stopped and goes on as if it had never been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.cli import main
from rlhf_exp.schema import EarlyStop
from rlhf_exp.sweeps import current, ledger, pruning

# running averages by step 3: (1+2+3)/3 = 2, (4+4+4)/3 = 4, (0+3+6)/3 = 3; their median is 3
OTHERS = [{1: 1.0, 2: 2.0, 3: 3.0, 4: 90.0}, {1: 4.0, 2: 4.0, 3: 4.0}, {1: 0.0, 2: 3.0, 3: 6.0}]


@pytest.mark.parametrize(
    ("mine", "lower", "least", "expected"),
    [
        ({1: 2.5, 2: 1.0, 3: 0.0}, False, 3, (2.5, 3.0)),  # its best so far counts, not its last
        ({1: 3.0, 2: 1.0, 3: 0.0}, False, 3, None),  # as good as the median is not worse
        ({3: 2.9, 4: 100.0}, False, 3, (2.9, 3.0)),  # what comes after the step does not count
        ({1: 2.5}, False, 4, None),  # too few others
        ({}, False, 3, None),
        ({1: 9.0, 3: 3.5}, True, 3, (3.5, 3.0)),  # a loss: the lowest is the best
        ({1: 9.0, 3: 2.5}, True, 3, None),
    ],
)
def test_the_median_rule(mine, lower, least, expected):
    assert pruning.median_rule(mine, OTHERS, 3, lower=lower, least=least) == expected


def test_trials_that_have_not_come_that_far():
    """A curve that begins later is left out: at step 2 two averages, 1.5 and 4, median 2.75."""
    others = [OTHERS[0], OTHERS[1], {3: 100.0}]
    assert pruning.median_rule({1: 2.7}, others, 2, lower=False, least=2) == (2.7, 2.75)
    assert pruning.median_rule({1: 2.7}, others, 2, lower=False, least=3) is None


def others(sweep: Path) -> None:
    """OTHERS as trials 0 to 2 that are done, and one that failed."""
    for number, curve in enumerate([*OTHERS, {1: 999.0}]):
        with current.inside(current.Trial(sweep / str(number), number)):
            for step, value in curve.items():
                pruning.report_intermediate(step, value)
        ledger.append(sweep, "ended", number=number, status="failed" if number == 3 else "done")


def test_a_trial_looks_at_those_that_are_done(tmp_path):
    others(tmp_path)
    config = EarlyStop(rule="median", grace=2)
    with current.inside(current.Trial(tmp_path / "7", 7)), pruning.watched(config):
        assert pruning.after(1, {"objective/gold": -5.0}) is None, "within its grace"
        assert pruning.after(2, {"objective/gold": float("nan")}) is None
        said = pruning.after(3, {"objective/gold": 2.0, "objective/scores": 50.0})
    assert said == (
        "best objective/gold so far 2, the median of 3 trials that are done is 3 (early_stop.rule=median)"
    )
    assert pruning.values(tmp_path / "7") == {1: -5.0, 3: 2.0}


def test_guards_sweepers_and_what_is_upstream(tmp_path):
    trial = current.Trial(tmp_path / "7", 7)
    metrics = {"train/loss": 1.0, "guard/kl": 1.0}
    with current.inside(trial):
        with pruning.watched(EarlyStop()):
            assert pruning.after(1, metrics) is None
            pruning.prune(trial.folder, "worse")
            assert pruning.after(2, metrics) == "worse"
            pruning.forget(trial.folder)
        with pruning.watched(EarlyStop(guards=True)):
            assert pruning.after(3, metrics) == "guard kl fired (early_stop.guards)"
        with pruning.watched(None):  # upstream of the trial
            assert pruning.after(4, metrics) is None
    with pruning.watched(EarlyStop(guards=True)):  # no trial
        assert pruning.after(5, metrics) is None
    assert pruning.values(trial.folder) == {1: 1.0, 2: 1.0, 3: 1.0}
    assert pruning.should_stop() is None


def test_a_value_that_comes_again_after_a_resume_counts_once(tmp_path):
    with current.inside(current.Trial(tmp_path, 0)):
        for step, value in ((1, 1.0), (2, 2.0), (2, 3.0)):
            pruning.report_intermediate(step, value)
    assert pruning.values(tmp_path) == {1: 1.0, 2: 3.0}


WORDS = (
    *("stage=sft", "model=tiny", "model.dtype=float32", "threads=1", "tracking=none"),
    *("train.steps=6", "train.batch_size=4", "train.micro_batch_size=4"),
)


def files(run: Path) -> dict[str, bytes]:
    """Everything that a clock does not touch."""
    return {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}


def test_a_stopped_run_is_not_published_and_goes_on_bit_for_bit(tmp_path, capsys):
    assert main([*WORDS, "output_dir=undisturbed"]) == 0
    # three trials that were much better on average; sft's loss starts near 10
    for number in range(3):
        folder = tmp_path / "sweep" / str(number)
        with current.inside(current.Trial(folder, number)):
            pruning.report_intermediate(1, 0.01)
        ledger.append(tmp_path / "sweep", "ended", number=number, status="done")
    from rlhf_exp import compose
    from rlhf_exp.sweeps import trial

    words = [*WORDS, "output_dir=outputs", "early_stop.rule=median", "early_stop.grace=2"]
    config, choices = compose.compose(words)
    outcome = trial.run(trial.write(tmp_path / "sweep" / "3", 3, words, config, choices))
    assert outcome.status == "stopped"
    assert outcome.reason.startswith("step 3: best train/loss so far ")
    assert outcome.value is None
    (run,) = (path for path in Path("outputs/sft").iterdir() if path.name[0] != ".")
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["error"]) == ("KILLED", outcome.reason)
    assert not (run / "manifest.json").exists() and not (run / "adapter").exists()
    assert list(pruning.values(tmp_path / "sweep" / "3")) == [1, 2, 3]

    capsys.readouterr()
    assert (
        main([*WORDS, "output_dir=outputs"]) == 0
    )  # the trial's own command, without early_stop: the same key
    assert "continued from step 3" in capsys.readouterr().out
    (other,) = (path for path in Path("undisturbed/sft").iterdir() if path.name[0] != ".")
    assert run.name == other.name
    assert files(run) == files(other)
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
