"""docs/reward-sources.md: its commands compose, with everything upstream, and it names what there is."""

from __future__ import annotations

import shlex

import pytest

from rlhf_exp import compose
from rlhf_exp.paths import conf_dir
from rlhf_exp.rewards import functions
from rlhf_exp.stages.plan import needs

PAGE = conf_dir().parent / "docs" / "reward-sources.md"
PROGRAM = "python -m rlhf_exp "
COMMANDS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(PROGRAM)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command):
    words = [word for word in shlex.split(command)[3:] if not word.startswith("sweep=")]
    run, choices = compose.compose(words)
    functions.check_config(run)
    for role in needs("eval" if run.stage == "pipeline" else run.stage, run):
        compose.upstream(role, run, choices)


def test_the_page_has_commands_and_every_option():
    assert len(COMMANDS) >= 8
    rows = "\n".join(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|"))
    options = {path.stem for path in (conf_dir() / "reward_source").glob("*.yaml")}
    assert {option for option in options if f"{option}`" not in rows} == set()
