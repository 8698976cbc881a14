"""A cluster for the tests of this folder, and a sweep whose trials only pretend to train."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_exp import compose
from rlhf_exp.paths import conf_dir
from rlhf_exp.sweeps import folder, trial
from tests.slurm.cluster import Cluster, missing

STUB = Path(__file__).with_name("pretended.py")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes; skips where SLURM is not installed, unless RLHF_EXP_REQUIRE_SLURM=1 (CI)."""
    if names := missing():
        reason = f"SLURM is not installed (no {', '.join(names)}): apt-get install slurm-wlm munge"
        if os.environ.get("RLHF_EXP_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for this process and its children."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return cluster


@pytest.fixture
def pretended(tmp_path: Path):
    """pretended(trials): a sweep's folder with trials that pretended.py 'trains'; what it is to do is in run_name."""

    def make(plans: list[str]) -> Path:
        sweep = tmp_path / "sweep"
        folder.create(sweep, ["-m", "stage=sft"], conf=conf_dir())
        shutil.copy(STUB, folder.code(sweep) / "rlhf_exp" / "stages" / "pipeline.py")
        config, choices = compose.compose(
            ["stage=sft", "model=tiny", "dataset=reviews", "tracking=none", f"output_dir={tmp_path}/outputs"]
        )
        for number, plan in enumerate(plans):
            config.run_name = plan
            trial.write(sweep / str(number), number, [f"run_name={plan}"], config, choices)
        return sweep

    return make
