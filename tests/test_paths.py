"""Where the cache and the config tree are."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp import paths
from rlhf_exp.errors import InputError


def test_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RLHF_EXP_CACHE", "~/elsewhere")
    assert paths.cache_dir() == tmp_path / "elsewhere"
    monkeypatch.setenv("RLHF_EXP_CACHE", "relative")
    assert paths.cache_dir() == Path.cwd() / "relative"
    for unset in ("", None):
        monkeypatch.setenv("RLHF_EXP_CACHE", unset) if unset is not None else monkeypatch.delenv(
            "RLHF_EXP_CACHE"
        )
        assert paths.cache_dir() == tmp_path / ".cache" / "rlhf_exp"
    assert not (tmp_path / ".cache").exists()


def test_config_tree_of_the_wheel_comes_before_the_checkout(monkeypatch, tmp_path):
    package = tmp_path / "checkout" / "rlhf_exp"
    monkeypatch.setattr(paths, "PACKAGE", package)
    (package / "conf").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no config tree: .*reinstall"):
        paths.conf_dir()
    (package.parent / "conf").mkdir()
    (package.parent / "conf" / "config.yaml").touch()
    assert paths.conf_dir() == package.parent / "conf"
    (package / "conf" / "config.yaml").touch()
    assert paths.conf_dir() == package / "conf"
