"""config.yaml and versions.json say what made a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata

import pytest
import yaml

import rlhf_exp
from rlhf_exp import schema
from rlhf_exp.store import frozen


@pytest.fixture
def config():
    config = schema.PPORun(stage="ppo")
    config.model.name, config.dataset.name, config.dataset.family = "tiny", "reviews", "reviews"
    return config


def test_config_is_readable_and_complete(tmp_path, config):
    config.dataset.template.prompt = "问题 {prompt}\n\nA:"
    config.optim.lr = 1e-5
    config.upstream.sft = {"optim": {"lr": 1e-4}}
    frozen.freeze(tmp_path, config, ["stage=ppo", "upstream.sft={optim: {lr: 1e-4}}"])
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    first, second = text.splitlines()[:2]
    assert first == "# python -m rlhf_exp stage=ppo 'upstream.sft={optim: {lr: 1e-4}}'"
    assert second == "stage: ppo"  # the schema's order, not the alphabet's
    content = yaml.safe_load(text)
    assert content["dataset"]["template"]["prompt"] == "问题 {prompt}\n\nA:"
    assert "问" in text
    assert content["optim"]["lr"] == 1e-5 and content["upstream"]["sft"] == {"optim": {"lr": 1e-4}}
    assert content["run_name"] is None and content["lora"]["targets"] == ["auto"]
    # every group is there
    assert list(content)[:4] == ["stage", "run_name", "output_dir", "dry_run"] and "reward_source" in content


def test_passwords_are_left_out(tmp_path, config):
    config.tracking.uri = "https://me:s3cret@mlflow.example.org/x"
    frozen.freeze(tmp_path, config, [f"tracking.uri={config.tracking.uri}"])
    for name in ("config.yaml", "versions.json"):
        text = (tmp_path / name).read_text()
        assert "s3cret" not in text and "https://me:***@mlflow.example.org/x" in text
    assert config.tracking.uri == "https://me:s3cret@mlflow.example.org/x"


def test_versions(tmp_path, config):
    frozen.freeze(tmp_path, config, ["stage=ppo", "seed=3"])
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["rlhf_exp"] == rlhf_exp.__version__
    assert found["python"] == platform.python_version()
    assert (
        found["argv"] == ["stage=ppo", "seed=3"] and found["command"] == "python -m rlhf_exp stage=ppo seed=3"
    )
    assert found["packages"]["omegaconf"] == metadata.version("omegaconf")
    assert {"torch", "transformers", "peft", "trl", "mlflow", "hydra-core"} <= set(found["packages"])
    assert found["platform"]


def test_a_package_that_is_not_installed_is_null(monkeypatch):
    monkeypatch.setattr(frozen, "PACKAGES", ("no-such-package-zzz",))
    assert frozen.versions([])["packages"] == {"no-such-package-zzz": None}


@pytest.fixture
def checkout(tmp_path):
    """A repository with the package, conf/ and one commit; returns (package folder, git)."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    for name in ("package/__init__.py", "conf/config.yaml", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    try:
        git("init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    git("add", ".")
    git("commit", "-m", "x")
    frozen.git_state.cache_clear()
    return tmp_path / "package", git


def test_git_commit_and_dirty(checkout):
    package, git = checkout
    assert frozen.git_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("package/__init__.py", True),
        ("package/new.py", True),
        ("conf/config.yaml", True),
        ("notes.txt", False),
    ],
)
def test_dirty_looks_at_code_and_configs(checkout, name, dirty):
    package, _ = checkout
    (package.parent / name).write_text("2")
    assert frozen.git_state(package)["dirty"] is dirty


def test_an_installed_package_inside_somebody_elses_repository_has_no_commit(checkout):
    package, _ = checkout
    installed = package.parent / ".venv" / "rlhf_exp"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert frozen.git_state(installed) is None


def test_a_git_hook_around_us_does_not_matter(checkout, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("GIT_DIR", str(tmp_path_factory.mktemp("elsewhere")))
    assert frozen.git_state(checkout[0]) is not None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    assert frozen.git_state(checkout[0]) is None


HEAVY = ("torch", "transformers", "peft", "trl", "mlflow", "hydra", "numpy")
SCRIPT = f"""
import sys
import rlhf_exp.store, rlhf_exp.store.__main__
from rlhf_exp import schema
from rlhf_exp.store import freeze
freeze(sys.argv[1], schema.SFTRun(stage="sft"), [])
with rlhf_exp.store.build_lock(sys.argv[1]):
    rlhf_exp.store.__main__.main(["--dir", sys.argv[1], "ls"])
print([name for name in {HEAVY} if name in sys.modules])
"""


def test_nothing_heavy_is_imported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
