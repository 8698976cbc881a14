"""Pages on stages: every command in their code blocks composes, with everything upstream."""

from __future__ import annotations

import re
import shlex

import pytest

from rlhf_exp import compose
from rlhf_exp.paths import conf_dir
from rlhf_exp.rewards import functions
from rlhf_exp.schema import COMPARED, POLICY, ReportRun
from rlhf_exp.stages import rounds
from rlhf_exp.stages.nodes import Node
from rlhf_exp.stages.plan import needs

DOCS = conf_dir().parent / "docs"
PROGRAM = "python -m rlhf_exp "
# page -> its commands, so that none is missed
PAGES = {
    "best-of-all": 2,
    "prefer": 5,
    "report": 5,
    "evaluation": 7,
    "rft": 4,
    "preference-optimisation": 3,
    "reward-models": 2,
}


def commands(page: str) -> list[str]:
    """Lines of code that call the program, continued ones joined, without what is said of them two spaces on."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace(" \\\n    ", " ").splitlines()
    return [re.split(" {2,}", line)[0] for line in lines if line.startswith(PROGRAM)]


def upstream(run) -> list[str]:
    """The roles that a run stands on and that a config is composed for: not folders, nor earlier rounds."""
    nodes = {run.stage: Node(run.stage, run)}
    roles = [*needs(run.stage, run), *rounds.roles(run.stage, run, nodes, False)]
    given = [role for role in roles if getattr(run.adapters, role, None)]
    return [
        role
        for role in dict.fromkeys(roles)
        if role not in (*given, *rounds.OF) and not role.startswith((COMPARED, POLICY))
    ]


@pytest.mark.parametrize("command", [line for page in PAGES for line in commands(page)])
def test_every_command_composes(command):
    run, choices = compose.compose(shlex.split(command)[3:])
    if isinstance(run, ReportRun):  # stands on nothing
        return
    functions.check_config(run)
    for role in upstream(run):
        functions.check_config(compose.upstream(role, run, choices)[0])


@pytest.mark.parametrize("page", PAGES)
def test_no_command_is_missed(page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert len(commands(page)) == PAGES[page] == len(re.findall(f"^{PROGRAM}", text, re.MULTILINE))


def test_what_the_commands_stand_on():
    """So that the first test composes more than the command itself."""
    found = {}
    for words in (["stage=prefer", "prefer.labellers=[learned]"], ["experiment=best_of_all"]):
        found[words[0]] = upstream(compose.compose(words)[0])
    assert found["stage=prefer"] == ["sft", "labeller"]
    assert {"sft", "reward", "ppo", "rloo", "dpo", "rft", "ilql"} == set(found["experiment=best_of_all"])
