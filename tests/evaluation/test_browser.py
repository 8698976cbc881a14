"""Tests of pages do not vanish in silence where a browser has to be."""

from __future__ import annotations

import re

import pytest

from rlhf_exp.paths import conf_dir
from tests.evaluation import browser

ROOT = conf_dir().parent


def test_without_a_browser_they_skip_or_where_one_is_required_fail(monkeypatch):
    monkeypatch.setattr(browser, "CHROMIUM", None)
    monkeypatch.setenv("RLHF_EXP_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium: apt-get install chromium"):
        browser.require()
    monkeypatch.setenv("RLHF_EXP_REQUIRE_BROWSER", "0")
    with pytest.raises(pytest.skip.Exception, match="no Chromium: apt-get install chromium"):
        browser.require()
    monkeypatch.setattr(browser, "CHROMIUM", "/usr/bin/chromium")
    browser.require()


def test_what_can_be_required_is_required_in_ci():
    """Of the page on tests every RLHF_EXP_REQUIRE_..., and a browser among them."""
    names = set(
        re.findall(r"RLHF_EXP_REQUIRE_\w+", (ROOT / "docs" / "testing.md").read_text(encoding="utf-8"))
    )
    assert "RLHF_EXP_REQUIRE_BROWSER" in names
    assert names == set(
        re.findall(r"(RLHF_EXP_REQUIRE_\w+)=1", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    )
