"""PPO towards a function of the user's: what it is called with, its place in the key, its mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SFT = "upstream.sft={train: {steps: 2, batch_size: 4, micro_batch_size: 4}}"
MINE = "reward_source=python", "reward_source.function=python:my_rewards.short"
SOURCE = """
import json

def short(prompts, responses):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps([prompts, responses]) + "\\n")
    return [-len(response) for response in responses]
"""


@pytest.fixture
def write(tmp_path):
    """write(source) puts my_rewards.py into the working directory, as an editor would between two commands."""

    def write(source: str) -> None:
        sys.modules.pop("my_rewards", None)
        (tmp_path / "my_rewards.py").write_text(source)

    before = list(sys.path)
    yield write
    sys.path[:] = before
    sys.modules.pop("my_rewards", None)


@pytest.fixture
def ppo(cli, tmp_path):
    """ppo(more words) -> the result of a short PPO run; its SFT is made once."""

    def call(*words: str):
        return cli.call(*cli.SHORT_PPO, "lora.r=2", SFT, *MINE, f"output_dir={tmp_path / 'out'}", *words)

    return call


def key_of(cli, tmp_path, status="FINISHED") -> set[str]:
    return {r["key"] for r in cli.records(tmp_path / "out")["ppo"] if r["status"] == status}


def test_it_is_the_reward_and_its_source_is_in_the_key(cli, ppo, write, tmp_path):
    write(SOURCE)
    result = ppo("ppo.steps=2")
    assert result.code == 0, result.err
    assert "reward = the rule python:my_rewards.short" in result.out
    calls = [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]
    assert [(len(prompts), len(responses)) for prompts, responses in calls] == [(4, 4)] * 2
    (folder,) = cli.runs(tmp_path / "out", "ppo")
    lines = cli.lines(folder / "metrics.jsonl")
    for line, (_, responses) in zip(lines, calls, strict=True):
        assert line["objective/scores"] == pytest.approx(-sum(map(len, responses)) / 4)

    first = key_of(cli, tmp_path)
    assert ppo("ppo.steps=2").code == 0
    assert key_of(cli, tmp_path) == first  # the same source: nothing is trained again
    assert len(Path("calls.jsonl").read_text().splitlines()) == 2
    write(SOURCE.replace("-len(", "-2 * len("))
    assert ppo("ppo.steps=2").code == 0
    assert len(key_of(cli, tmp_path)) == 2
    assert len(cli.records(tmp_path / "out")["sft"]) == 1  # nothing but PPO depends on it


def test_a_mistake_in_the_middle_is_one_line_and_what_is_finished_stays(cli, ppo, write, tmp_path):
    write("calls = 0\ndef short(prompts, responses):\n    global calls\n    calls += 1\n"
          "    return [0.0] * (len(responses) - (calls == 2))\n")  # fmt: skip
    result = ppo("ppo.steps=3", "ppo.save_every=1")
    assert result.code == 2
    assert result.errors == ["error: python:my_rewards.short: returned 3 scores for 4 responses"]
    (failed,) = cli.records(tmp_path / "out")["ppo"]
    assert failed["status"] == "FAILED"
    assert "returned 3 scores for 4 responses" in failed["error"]
    (folder,) = cli.runs(tmp_path / "out", "ppo")
    assert (folder / "checkpoints" / "step_00001" / "adapter_model.safetensors").is_file()
    assert [record["status"] for record in cli.records(tmp_path / "out")["sft"]] == ["FINISHED"]
    # mended, the same command goes on from the finished SFT
    write(SOURCE)
    result = ppo("ppo.steps=1")
    assert result.code == 0, result.err
    assert len(cli.records(tmp_path / "out")["sft"]) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("reward_source.function=python:my_rewards.shrot",),
            "reward_source.function=python:my_rewards.shrot: module my_rewards (HERE/my_rewards.py) has no "
            "function shrot",
        ),
        (
            ("reward_source.function=sentimnt",),
            "reward_source.function=sentimnt: there is no function sentimnt",
        ),
        (("reward_source.function='regex:['",), "reward_source.function=regex:[: is no regular expression"),
        (
            ("reward_source.function=relevance",),
            "reward_source.function=relevance: model minilm is not fetched",
        ),
    ],
)
@pytest.mark.usefixtures("nothing_loads")
def test_what_cannot_score_is_refused_before_anything_loads(ppo, write, words, line, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_exp.fetch.model_folder", lambda name: None)
    write(SOURCE)
    result = ppo(*words)
    assert result.code == 2
    (said,) = result.errors
    assert said.replace(str(Path.cwd()), "HERE").startswith(f"error: {line}")
    assert not list(tmp_path.glob("out/*/*"))


def test_the_gold_scorer_is_checked_too(cli, tmp_path):
    words = (
        "experiment=smoke",
        "threads=1",
        "eval.gold=lenght",
        "dry_run=true",
        f"output_dir={tmp_path / 'out'}",
    )
    result = cli.call(*words)
    assert result.errors == ["error: eval.gold=lenght: there is no function lenght; did you mean length?"]


def test_the_console_script_finds_it_in_the_working_directory(write, tmp_path):
    """Unlike `python -m`, a script has its own folder on the path and not the working directory."""
    write(SOURCE)
    script = tmp_path / "bin" / "rlhf-exp"
    script.parent.mkdir()
    script.write_text("import sys\nfrom rlhf_exp.cli import main\nsys.exit(main())\n")
    words = [
        "stage=ppo",
        "model=tiny",
        "adapters.sft=base",
        *MINE,
        "dry_run=true",
        f"output_dir={tmp_path / 'out'}",
    ]
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "the rule python:my_rewards.short" in done.stdout
