"""Probes and the gate from the command line: a patched reward model is made once, fail and bad words are one line."""

from __future__ import annotations

import json
import re

import pytest
import yaml

SFT = "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}"
REWARD = (
    "upstream.reward={dataset: {limit: 24}, train: {steps: 2, batch_size: 4, micro_batch_size: 4}, "
    "reward: {probes: 6}}"
)
# a model after two steps prefers about half of everything; kinds of which one answer above is one too many
STRICT = ("reward_source.limits.emoji=0", "reward_source.limits.short=0", "reward_source.limits.echo=0")
# and the others do not count
LAX = tuple(
    f"reward_source.limits.{kind}=1"
    for kind in (
        *("empty", "eos_only", "repeated", "shuffled", "other_answer", "other_language", "refusal"),
        *("truncated", "unfinished", "long", "thanks", "whitespace", "padding", "neighbours"),
    )
)


@pytest.fixture
def run(cli, tmp_path):
    """run(more words) -> the result of a short command on one output folder."""

    def call(*words: str, code: int = 0, base: tuple[str, ...] = cli.SHORT_PPO):
        lora = () if base[0] == "stage=probe" else (SFT,)
        output = f"output_dir={tmp_path / 'out'}"
        result = cli.call(*base, "lora.r=2", "dataset.max_response_tokens=64", *lora, REWARD, output, *words)
        assert result.code == code, result.out + result.err
        return result

    return call


def record(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def negatives(folder) -> list[str]:
    return yaml.safe_load((folder / "config.yaml").read_text())["reward"]["negatives"]


def test_a_patched_model_is_made_once_and_ppo_stands_on_it(cli, run, tmp_path):
    out = tmp_path / "out"
    patch = ("reward_source.gate=patch", *STRICT, *LAX, "reward_source.patch_share=0.5")
    first = run(*patch)
    rewards = {tuple(negatives(path)): path for path in cli.runs(out, "reward")}
    assert len(rewards) == 2 and () in rewards
    ((kinds, patched),) = ((kinds, path) for kinds, path in rewards.items() if kinds)
    shares = json.loads((rewards[()] / "probe" / "probe.json").read_text())["kinds"]
    assert list(kinds) == [kind for kind in ("short", "emoji", "echo") if shares[kind]["share"] > 0]
    assert record(patched)["metrics"]["data/pairs"] == 48
    assert record(rewards[()])["metrics"]["data/pairs"] == 24

    (ppo,) = cli.runs(out, "ppo")
    assert record(ppo)["inputs"]["parents"]["reward"]["key"] == record(patched)["key"]
    change = json.loads((ppo / "gate" / "gate.json").read_text())["reward"]
    assert change["keys"] == {"before": record(rewards[()])["key"], "after": record(patched)["key"]}
    assert change["accuracy"]["pairs"] == record(patched)["metrics"]["validation/pairs"]
    assert change["accuracy"]["after"] == pytest.approx(record(patched)["metrics"]["validation/accuracy"])
    assert (ppo / "gate" / "reward.png").is_file()
    assert "gate   = patch, once the reward model is trained and probed" in first.out
    assert f"is trained against {', '.join(kinds)} too" in first.out
    assert re.search(
        r"accuracy on \d+ real pairs of \d+ prompts: 0\.\d+ before, 0\.\d+ after; difference", first.out
    )

    second = run(*patch)  # nothing is left to do
    assert "will be trained" not in second.out
    swept = run(*patch, "ppo.kl_coef=0.2")  # another ppo, the same models
    assert len(cli.runs(out, "reward")) == 2 and len(cli.runs(out, "ppo")) == 2
    assert re.findall(r"stage +(\w+) \w+ \(will be trained\)", swept.out) == ["ppo"]
    by_hand = run(  # the same model, asked for by its own stage
        *(f"reward.negatives=[{','.join(kinds)}]", "reward.negatives_share=0.5", "reward.probes=6"),
        *("train.steps=2", "train.batch_size=4", "train.micro_batch_size=4", "dataset.limit=24"),
        base=("stage=reward", *cli.SHORT_PPO[1:5]),
    )
    assert f"run folder   {patched}" in by_hand.out or patched.name in by_hand.out
    assert len(cli.runs(out, "reward")) == 2


def test_without_a_failure_ppo_has_the_model_that_it_has_without_the_gate(cli, run, tmp_path):
    run("reward_source.gate=off")
    (ppo,) = cli.runs(tmp_path / "out", "ppo")
    result = run("reward_source.gate=patch", *LAX, *(word.replace("=0", "=1") for word in STRICT))
    assert "will be trained" not in result.out
    assert cli.runs(tmp_path / "out", "ppo") == [ppo] and len(cli.runs(tmp_path / "out", "reward")) == 1


def test_fail_stops_before_ppo_and_at_once_where_the_model_is_there(cli, run, tmp_path):
    words = ("reward_source.gate=fail", "reward_source.limits.short=0", "reward_source.limits.echo=0")
    first = run(*words, code=2)  # trained, probed, refused
    (reward,) = cli.runs(tmp_path / "out", "reward")
    (line,) = first.errors
    assert line.startswith(
        f"error: reward_source.gate=fail: reward {reward.name[:6]} scores too many of these"
    )
    assert re.search(r"(short|echo) \d\.\d\d \(limit 0\)", line)
    assert cli.runs(tmp_path / "out", "ppo") == []
    second = run(*words, code=2)
    assert second.errors == first.errors and second.out == ""


def test_warn_is_a_line_and_changes_no_key(cli, run, tmp_path):
    run("reward_source.gate=off")
    result = run("reward_source.gate=warn", "reward_source.limits.short=0", "reward_source.patch_share=0.3")
    assert len(cli.runs(tmp_path / "out", "ppo")) == 1 and "will be trained" not in result.out
    other = run("reward_source.limits.short=0", "reward_source.limits.echo=0", "ppo.kl_coef=0.3")
    assert other.out.count("gate: reward ") == 1


def test_a_given_reward_model_is_judged_by_a_run_of_stage_probe(cli, run, tmp_path):
    run("reward_source.gate=off")
    (reward,) = cli.runs(tmp_path / "out", "reward")
    given = f"adapters.reward={tmp_path / 'given'}"
    (tmp_path / "given").mkdir()
    for name in ("adapter", "head"):
        (tmp_path / "given" / name).symlink_to(reward / name)
    words = (given, "reward_source.gate=fail", "reward_source.limits.short=0", "reward_source.limits.echo=0")
    assert "was not probed: run stage=probe adapters.reward=" in run(*words, code=2).errors[0]
    probe = ("stage=probe", *cli.SHORT_PPO[1:5])
    shown = run(given, "probe.pairs=6", base=probe)
    assert "eos_only EOS alone" in shown.out and "of 6 real pairs" in shown.out
    (folder,) = cli.runs(tmp_path / "out", "probe")
    assert (folder / "probe" / "probe.png").is_file()
    own = json.loads((reward / "probe" / "probe.json").read_text())
    assert json.loads((folder / "probe" / "probe.json").read_text())["kinds"] == own["kinds"]
    assert "scores too many of these" in run(*words, code=2).errors[0]


@pytest.mark.long
def test_a_pipeline_of_its_own_trains_once_before_it_knows(cli, run, tmp_path):
    """resume=never: the first reward model is not looked for in the store, and not made a second time either."""
    words = ("resume=never", "reward_source.gate=patch", *STRICT, *LAX, "eval.prompts=2", "eval.samples=1")
    run(*words, base=("stage=pipeline", *cli.SHORT_PPO[1:]))
    assert len(cli.runs(tmp_path / "out", "reward")) == 2
    (ppo,), (evaluation,) = (cli.runs(tmp_path / "out", stage) for stage in ("ppo", "eval"))
    keys = {record(path)["inputs"]["parents"]["reward"]["key"] for path in (ppo, evaluation)}
    (patched,) = (path for path in cli.runs(tmp_path / "out", "reward") if negatives(path))
    assert keys == {record(patched)["key"]}


# ---------------------------------------------------------------- bad words


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("stage=probe", "probe.kinds=[emty]"),
            "probe.kinds: there is no probe emty; did you mean empty?",
        ),
        (("stage=probe", "probe.kinds=[short,short]"), "probe.kinds names a probe twice: short, short"),
        (
            ("stage=reward", "reward.negatives=[padding]"),
            "reward.negatives: there is no probe padding; there are empty, eos_only, short, repeated, emoji, echo, "
            "shuffled, other_answer, other_language, refusal, truncated, unfinished, long, thanks",
        ),
        (
            ("stage=ppo", "reward_source.limits.empty=1.2"),
            "reward_source.limits.empty must be at most 1, got 1.2",
        ),
        (
            ("stage=ppo", "reward_source.limits.thanks=-0.1"),
            "reward_source.limits.thanks must be at least 0, got -0.1",
        ),
        (
            ("stage=ppo", "reward_source.limits.emty=0.1"),
            "unknown key reward_source.limits.emty; did you mean reward_source.limits.empty?",
        ),
        (
            ("stage=ppo", "reward_source.gate=stop"),
            "reward_source.gate must be one of warn, fail, patch, off, got stop",
        ),
        (
            ("stage=ppo", "reward_source.patch_share=1"),
            "reward_source.patch_share must be less than 1, got 1.0",
        ),
        (
            ("stage=ppo", "reward_source=length", "reward_source.gate=fail"),
            "reward_source.gate=fail is of learned reward models, but the reward source has none: leave it out, or "
            "choose reward_source=learned",
        ),
        (
            ("stage=ppo", "reward_source.gate=patch", "adapters.reward=somewhere"),
            "reward_source.gate=patch trains the reward model again, but adapters.reward gives it: leave that out, "
            "or set reward_source.gate=warn",
        ),
        (
            ("stage=probe", "dataset.validation_share=0"),
            "probe.split=validation needs dataset.validation_share above 0",
        ),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_bad_words_are_one_line(cli, tmp_path, words, line):
    result = cli.call(*words, "model=tiny", "tracking=none", f"output_dir={tmp_path / 'out'}")
    assert (result.code, result.out) == (2, "")
    assert result.errors == [f"error: {line}"]
    assert not list(tmp_path.glob("out/*/*"))


def test_a_rule_as_reward_is_not_asked_for_probes(cli, tmp_path):
    words = ("reward_source=length", SFT, f"output_dir={tmp_path / 'out'}", "lora.r=2")
    result = cli.call(*cli.SHORT_PPO, *words)
    assert result.code == 0 and "gate" not in result.out
