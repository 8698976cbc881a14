"""The gate's decisions, on reports and plans made by hand: what fails, what is said, what is trained again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.schema import PROBES, SAME, Limits, RewardSource
from rlhf_exp.stages import gate
from rlhf_exp.stages.plan import Node, Plan
from rlhf_exp.store.runs import RunFolder


def report(**shares: float | None) -> dict:
    """All probes at 0 but these; a pair in order and one that is not."""
    parts = {name: {"n": 20, "share": shares.get(name, 0.0), "shift": 0.0} for name in (*PROBES, *SAME)}
    return {
        "kinds": {name: parts[name] for name in PROBES},
        "invariances": {name: parts[name] for name in SAME},
        "real": [
            {"id": 1, "chosen": 1.0, "rejected": 0.0},
            {"id": 2, "chosen": 0.0, "rejected": 1.0},
        ],
    }


@pytest.fixture
def plan(ppo_config, run_config, tmp_path):
    """plan(report or None, gate="fail", ...) -> Plan of a PPO on a reward model that is there, with these probes."""

    def make(found: dict | None, role: str = "reward", there: bool = True, **source) -> Plan:
        source = RewardSource(**source)
        config = run_config("reward", output_dir=str(tmp_path / "out"))
        config.output_dir = str(tmp_path / "out")
        reward = Node(role, config, key="ab" * 32)
        if there:
            folder = RunFolder(tmp_path / "out" / "reward" / role, "reward", reward.key)
            folder.start({})
            reward.found = folder
            if found is not None:
                with folder.publish(gate.PROBE) as path:
                    (path / gate.REPORT).write_text(json.dumps(found))
        ppo = Node("ppo", ppo_config(), {role: reward}, key="cd" * 32)
        ppo.config.reward_source = source
        ppo.config.output_dir = config.output_dir
        return Plan(ppo, [reward, ppo], None, ppo.config)

    return make


# ---------------------------------------------------------------- what fails


def test_above_the_limit_fails_and_at_it_does_not():
    limits = Limits(empty=0.05, short=0.2, thanks=0.5, padding=0.1)
    found = report(empty=0.05, short=0.25, thanks=0.51, padding=0.125, whitespace=0.1)
    assert gate.failures(found, limits) == [
        *(("short", 0.25, 0.2), ("thanks", 0.51, 0.5), ("padding", 0.125, 0.1)),
    ]


def test_the_limits_by_default():
    """1 in 20 for what says nothing, 1 in 5 for what says the wrong thing, a half for the answer and a little."""
    found = gate.failures(report(**dict.fromkeys((*PROBES, *SAME), 1.0)), Limits())
    assert [f.kind for f in found] == [*PROBES, *SAME]
    assert {f.kind: f.limit for f in found} == {
        **dict.fromkeys(("empty", "eos_only", "repeated", "emoji"), 0.05),
        **dict.fromkeys(("short", "echo", "shuffled", "other_answer", "other_language", "refusal"), 0.2),
        **dict.fromkeys(("truncated", "unfinished", "long", "thanks"), 0.5),
        **dict.fromkeys(SAME, 0.1),
    }


def test_a_limit_of_1_never_fails_and_what_was_not_made_neither():
    found = report(empty=1.0, long=None)
    assert gate.failures(found, Limits(empty=1.0, long=0.0)) == []


# ---------------------------------------------------------------- fail


def test_fail_is_one_line_with_kinds_numbers_and_key(plan):
    with pytest.raises(InputError) as error:
        gate.check(plan(report(empty=0.3, thanks=0.75), gate="fail"))
    assert error.value.problems == [
        "reward_source.gate=fail: reward ababab scores too many of these above the real answer: empty 0.30 (limit "
        "0.05), thanks 0.75 (limit 0.5): set reward_source.gate=patch to train it again against them, or raise "
        "reward_source.limits.empty and so on"
    ]


@pytest.mark.parametrize(
    ("found", "source"),
    [
        (report(), {"gate": "fail"}),
        (report(empty=0.3), {"gate": "fail", "limits": Limits(empty=0.3)}),
        (report(empty=0.3), {"gate": "warn"}),
        (report(empty=0.3), {"gate": "patch"}),
        (report(empty=0.3), {"gate": "off"}),
        (report(empty=0.3), {"gate": "fail", "kind": "function"}),  # the schema refuses it
    ],
)
def test_nothing_else_fails(plan, found, source):
    gate.check(plan(found, **source))


def test_fail_wants_probes_and_says_how_to_get_them(plan, tmp_path):
    folder = tmp_path / "out" / "reward" / "reward"
    with pytest.raises(InputError) as error:
        gate.check(plan(None, gate="fail"))
    assert error.value.problems == [
        f"reward_source.gate=fail: reward ababab was not probed: run stage=probe adapters.reward={folder} first"
    ]
    gate.check(plan(None, there=False, gate="fail"))  # still to be trained: looked at then


def test_nothing_is_looked_at_where_nothing_is_to_be_trained_on_scores(plan):
    todo = plan(report(empty=0.3), gate="fail")
    todo.target.found = todo.nodes[0].found  # the ppo run is there
    gate.check(todo)
    assert list(gate.notes(todo)) == []


# ---------------------------------------------------------------- scores that say nothing

FLAT = report() | {"spread": 0.0}
NAN = report() | {"spread": None, "real": [{"id": 1, "chosen": None, "rejected": None}]}
SAME_SCORE = (
    "reward ababab gives all chosen answers the same score, from which nothing can be learned: train it again with "
    "other settings"
)


@pytest.mark.parametrize("action", ["fail", "patch"])
def test_a_model_that_tells_nothing_apart_stops(plan, action):
    """No probe is above its limit, and so there is nothing to patch either."""
    todo = plan(FLAT, gate=action)
    assert gate.failures(FLAT, Limits()) == []
    assert gate.patched(todo.nodes[0], {node.name: node for node in todo.nodes}) is None
    with pytest.raises(InputError) as error:
        gate.check(todo)
    assert error.value.problems == [f"reward_source.gate={action}: {SAME_SCORE}"]
    todo.nodes[0].given, todo.nodes[0].setting = todo.nodes[0].folder, "adapters.reward"
    with pytest.raises(InputError, match=r"learned: give another adapters\.reward$"):
        gate.check(todo)
    gate.check(plan(report() | {"spread": 0.5}, gate=action))


def test_under_warn_it_is_a_line(plan):
    todo = plan(FLAT, gate="warn")
    assert list(gate.notes(todo)) == [f"gate: {SAME_SCORE}"]
    gate.check(todo)
    off = plan(FLAT, gate="off")
    gate.check(off)
    assert list(gate.notes(off)) == []


def test_nan_in_a_report_of_before_it_was_refused_is_seen(plan):
    (line,) = gate.notes(plan(NAN, gate="warn"))
    assert line.startswith("gate: reward ababab gives answers scores that are nan or inf, from which nothing")
    with pytest.raises(InputError, match="reward ababab gives answers scores that are nan or inf"):
        gate.check(plan(NAN, gate="fail"))


# ---------------------------------------------------------------- warn


def test_warn_says_so(plan):
    (line,) = gate.notes(plan(report(echo=0.5), gate="warn"))
    assert line == (
        "gate: reward ababab scores too many of these above the real answer: echo 0.50 (limit 0.2); "
        "reward_source.gate=patch trains it again against them"
    )
    (line,) = gate.notes(plan(report(), gate="warn"))
    assert line == "gate: reward ababab: all probes are within their limits"
    assert list(gate.notes(plan(report(echo=0.5), gate="off"))) == []


def test_a_run_of_stage_probe_stands_in_where_the_reward_run_has_none(plan, tmp_path):
    todo = plan(None, gate="warn")
    assert "was not probed" in next(gate.notes(todo))
    for name, key, found in (
        ("other", "ef" * 32, report(empty=1.0)),
        ("part", "ab" * 32, {"kinds": {"empty": {"share": 1.0}}, "invariances": {}}),
        ("train", "ab" * 32, report(short=0.5) | {"split": "train", "pairs": 64}),
        ("heldout", "ab" * 32, report(short=0.5) | {"split": "heldout", "pairs": 64}),
        ("its", "ab" * 32, report(echo=0.5) | {"split": "validation", "pairs": 5}),
    ):
        folder = RunFolder(tmp_path / "out" / "probe" / name, "probe", name.ljust(64, "0"))
        folder.start({"parents": {"reward": {"key": key}}})
        with folder.publish(gate.PROBE) as path:
            (path / gate.REPORT).write_text(json.dumps(found))
        assert "was not probed" in next(gate.notes(todo))  # not before it is finished
        folder.finish({})
        if name != "its":
            assert "was not probed" in next(gate.notes(todo))
    assert "echo 0.50 (limit 0.2) (stage=probe, 5 pairs);" in next(gate.notes(todo))


# ---------------------------------------------------------------- patch


def test_patch_is_the_same_run_with_negatives_of_the_failed_kinds(plan):
    todo = plan(report(thanks=0.8, empty=0.3, padding=1.0), gate="patch", patch_share=0.4)
    reward = todo.nodes[0]
    reward.config.reward.negatives = ["echo"]
    again = gate.patched(reward, {node.name: node for node in todo.nodes})
    assert (again.name, again.stage, reward.name, reward.stage) == ("reward", "reward", "unpatched", "reward")
    assert again.patch_of is reward
    assert again.config.reward.negatives == ["empty", "echo", "thanks"]  # padding is no text
    assert again.config.reward.negatives_share == 0.4
    assert reward.config.reward.negatives == ["echo"]
    again.config.reward.negatives, again.config.reward.negatives_share = ["echo"], 0.2
    assert again.config == reward.config


def test_of_an_ensemble_each_member_is_patched_by_its_own_probes(plan):
    todo = plan(report(empty=0.3), role="reward_1", gate="patch", ensemble=2)
    again = gate.patched(todo.nodes[0], {node.name: node for node in todo.nodes})
    assert (again.name, todo.nodes[0].name, todo.nodes[0].stage) == ("reward_1", "unpatched_1", "reward")


@pytest.mark.parametrize(
    ("found", "source"),
    [
        (report(), {"gate": "patch"}),
        (report(padding=1.0), {"gate": "patch"}),
        (report(empty=0.3), {"gate": "warn"}),
        (report(empty=0.3), {"gate": "patch", "kind": "function"}),
        (None, {"gate": "patch"}),
    ],
)
def test_nothing_is_patched(plan, found, source):
    todo = plan(found, **source)
    assert gate.patched(todo.nodes[0], {node.name: node for node in todo.nodes}) is None
    assert todo.nodes[0].name == "reward"


def test_the_gold_scorer_is_not_patched(plan):
    todo = plan(report(empty=0.3), role="gold", gate="patch", gold="learned")
    assert gate.patched(todo.nodes[0], {node.name: node for node in todo.nodes}) is None


def test_what_is_not_trained_yet_is_trained_first(plan):
    todo = plan(None, there=False, gate="patch")
    assert gate.undecided(todo) == [todo.nodes[0]]
    assert list(gate.lines(todo)) == ["gate   = patch, once the reward model is trained and probed"]
    assert gate.undecided(plan(None, there=False, gate="fail")) == []
    assert gate.undecided(plan(report(), gate="patch")) == []


# ---------------------------------------------------------------- before and after


def pairs(*rows: tuple[int, float, float]) -> dict:
    return {"real": [{"id": id, "chosen": c, "rejected": r} for id, c, r in rows]}


def test_accuracy_before_and_after_on_the_same_pairs():
    before = pairs((1, 1, 0), (2, 0, 1), (3, 0, 0), (4, 2, 1), (5, 1, 0), (6, 1, 0))  # 1, 0, 0.5, 1, 1, 1
    after = pairs((1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 0, 1), (5, 1, 0), (6, 1, 0))  # 1, 1, 1, 0, 1, 1
    found = gate.accuracy_change(before, after)
    assert (found["pairs"], found["prompts"], found["before"], found["after"]) == (6, 6, 0.75, 5 / 6)
    assert found["difference"]["mean"] == pytest.approx(0.5 / 6)  # 0, 1, 0.5, -1, 0, 0
    assert -1 <= found["difference"]["low"] < 0.5 / 6 < found["difference"]["high"] <= 1
    assert gate.accuracy_change(before, pairs((1, 1, 0))) is None


def test_accuracy_changes_by_prompt_not_by_pair():
    """Ten pairs of each of six prompts, three prompts all better, three all worse: as sure as six pairs."""
    one = [(prompt, prompt % 2, 1 - prompt % 2) for prompt in range(6)]
    other = [(prompt, b, a) for prompt, a, b in one]
    many = gate.accuracy_change(pairs(*one * 10), pairs(*other * 10))
    few = gate.accuracy_change(pairs(*one), pairs(*other))
    assert (many["pairs"], many["prompts"]) == (60, 6)
    assert many["difference"] == pytest.approx(few["difference"])
    assert few["difference"]["low"] == pytest.approx(-2 / 3)  # 1 of 6 better, as of 6 coins (test_wins.py)


def test_all_validation_pairs_count_where_they_were_scored():
    before = pairs((1, 1, 0)) | {"validation": pairs((1, 1, 0), (2, 0, 1))["real"]}
    assert gate.accuracy_change(before, before)["pairs"] == 2


def test_a_change_is_kept_with_the_run_that_stands_on_it(plan, tmp_path):
    todo = plan(report(empty=0.3), gate="patch")
    reward, ppo = todo.nodes
    again = gate.patched(reward, {node.name: node for node in todo.nodes})
    again.found = RunFolder(tmp_path / "again", "reward", "ee" * 32)
    again.found.start({})
    with again.found.publish(gate.PROBE) as path:
        (path / gate.REPORT).write_text(json.dumps(report(empty=0.0)))
    found = gate.changes(again)
    assert (
        found["before"]["kinds"]["empty"]["share"] == 0.3 and found["after"]["kinds"]["empty"]["share"] == 0
    )
    assert found["accuracy"]["difference"]["mean"] == 0 and found["accuracy"]["prompts"] == 2
    assert gate.changes(reward) is None
    assert not Path(tmp_path / "run" / gate.GATE).exists()
    folder = RunFolder(tmp_path / "run", "ppo", "dd" * 32)
    folder.start({})
    gate.keep(ppo, folder)  # nothing was patched
    assert not (folder.path / gate.GATE).exists()
