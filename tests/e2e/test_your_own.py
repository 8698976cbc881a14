"""docs/your-own.md: its files, its commands and the errors that it shows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp import compose
from rlhf_exp.evaluation import rouge

PAGE = (Path(__file__).resolve().parents[2] / "docs/your-own.md").read_text(encoding="utf-8")
PROGRAM = "$ python -m rlhf_exp "
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PARTS = [part.splitlines() for _, block in BLOCKS for part in block.split("\n\n") if part.strip()]
# (command, the lines that it prints) of the blocks that show errors
REFUSED = [
    (part[0], part[1:])
    for part in PARTS
    if part[0].startswith(PROGRAM) and part[1:2] and part[1][:7] == "error: "
]


@pytest.fixture
def folder(tmp_path, tiny_path, monkeypatch):
    """The folder that the page makes: every block whose text before ends in its file's name."""
    found = re.findall(r"`([\w./]+)`[^`\n]*:\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in found} == {
        *("make.py", "my_reward.py"),
        *("my_conf/dataset/answers.yaml", "my_conf/model/mine.yaml", "my_conf/experiment/first.yaml"),
    }
    for name, text in found:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run([sys.executable, "make.py"], cwd=tmp_path, check=True)
    shutil.copytree(tiny_path, tmp_path / "my_model")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for name in ("my_reward", "my_rewards"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    sys.modules.pop("my_reward", None)


def test_the_first_row_is_the_one_shown(folder):
    assert (folder / "answers.jsonl").read_text().splitlines()[0] in PAGE.splitlines()


def test_the_commands_compose(folder):
    from rlhf_exp.stages.plan import needs

    shown = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith(PROGRAM)]
    sound = [line for line in shown if line not in {command for command, _ in REFUSED}]
    assert len(sound) >= 3
    for line in sound:
        words = shlex.split(line)[4:]
        assert words[:2] == ["--config-dir", "my_conf"]
        with compose.session("my_conf"):
            run, choices = compose.compose(words[2:])
            for stage in needs("eval" if run.stage == "pipeline" else run.stage, run):
                compose.upstream(stage, run, choices)


@pytest.mark.parametrize(
    ("command", "lines"), REFUSED, ids=lambda x: x.split()[-1] if isinstance(x, str) else ""
)
def test_the_errors_are_those_shown(cli, folder, command, lines):
    result = cli.call(*shlex.split(command)[4:])
    assert result.code == 2
    said = [line.replace(f"{folder}/", "").replace(str(folder), ".") for line in result.errors]
    assert [line for line in lines if line != "..." and line not in said] == []


def test_the_page_shows_errors():
    assert len(REFUSED) >= 6


@pytest.mark.long
def test_the_experiment_runs(cli, folder):
    result = cli.call(
        "--config-dir", "my_conf", "experiment=first", "threads=1", "ppo.steps=2", "tracking=none"
    )
    assert result.code == 0, result.err
    assert "the rule python:my_reward.vowels" in result.out


@pytest.mark.long
def test_rouge_is_of_each_answer_with_the_reference_of_its_prompt(cli, folder):
    words = (
        "experiment=first",
        "threads=1",
        "ppo.steps=1",
        "eval.samples=8",
        "eval.greedy=true",
        "tracking=none",
    )
    assert cli.call("--config-dir", "my_conf", *words).code == 0
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    references = {row["info"]["question"]: row["better"] for row in rows}
    evaluation = json.loads(next(folder.glob("outputs/eval/*/eval.json")).read_text())
    for policy in evaluation["policies"]:
        for prefix, kind in (("", "text"), ("greedy_", "greedy")):
            pairs = [
                (s["responses"][policy["name"]][kind], references[s["prompt"]]) for s in evaluation["samples"]
            ]
            for name in ("rouge1", "rouge2", "rougeL"):
                expected = sum(rouge.scores(*pair)[name] for pair in pairs) / len(pairs)
                assert policy["metrics"][prefix + name] == pytest.approx(expected)
    first = evaluation["policies"][0]["metrics"]  # SFT answers with a sentence of the references
    assert first["greedy_rouge1"] > 0.5 and first["greedy_rouge1"] != first["rouge1"]
