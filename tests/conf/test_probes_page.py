"""docs/probes.md: its commands compose, and its tables have every probe with its limit."""

from __future__ import annotations

import re
import shlex

import pytest

from rlhf_exp import compose
from rlhf_exp.paths import conf_dir
from rlhf_exp.schema import PROBES, SAME, Limits
from rlhf_exp.stages.plan import needs

TEXT = (conf_dir().parent / "docs" / "probes.md").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = [re.split(" {2,}[a-z]", line)[0] for line in TEXT.splitlines() if line.startswith("python -m ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command):
    run, choices = compose.compose(shlex.split(command)[3:])
    for role in needs(run.stage, run):
        compose.upstream(role, run, choices)


def test_the_tables_have_every_probe_and_its_limit():
    assert len(COMMANDS) >= 7
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| (\d\.\d+) \|", TEXT, re.M))
    assert {name: float(limit) for name, limit in rows.items()} == {
        name: getattr(Limits(), name) for name in (*PROBES, *SAME)
    }
