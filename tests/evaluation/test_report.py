"""The report as a file: parsed with html.parser."""

from __future__ import annotations

import math
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_exp.evaluation import render
from rlhf_exp.evaluation.report import write_report
from rlhf_exp.evaluation.samples import LONG

FACTS = {
    "model": "tiny (0.1 M parameters)",
    "dataset": "reviews",
    "held-out prompts": "64",
    "sft key": "3fa9c1",
    "command": "python -m rlhf_exp experiment=smoke",
    "mlflow": "python -m mlflow ui --backend-store-uri 'sqlite:////home/me/a b.db'",
}
VOID = {"meta", "br", "img"}
ADDRESSES = ("src", "srcset", "href", "action", "data", "poster", "background", "formaction", "xlink:href")


class Page(HTMLParser):
    """Elements with their attributes, the text of each kind of element, and whether all tags are closed."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self._open), data))

    def names(self) -> set[str]:
        return {name for name, _ in self.elements}

    def text(self, inside: str = "main") -> str:
        return " ".join(" ".join(data for path, data in self.texts if inside in path).split())

    def rows(self) -> list[str]:
        """The lines of the table."""
        return [
            row.strip() for row in re.split(r"(?=\b(?:sft|ppo@\d+)\b)", self.text("tbody")) if row.strip()
        ]


@pytest.fixture
def write(tmp_path, evaluation, curves, monkeypatch):
    """write(...) -> the parsed page; to tmp_path/report, with empty images in place of the figures."""

    def png(path, panels, columns, size):
        path.touch()
        return path

    def page(facts=FACTS, curves=curves, evaluation=evaluation, title="PPO on reviews") -> Page:
        monkeypatch.setattr(render, "svg", lambda panel, size, name: '<svg viewBox="0 0 1 1"></svg>')
        monkeypatch.setattr(render, "write_png", png)
        write_report(tmp_path / "report", title, evaluation, curves, facts)
        return Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))

    return page


@pytest.fixture(scope="module")
def whole(tmp_path_factory, made_evaluation, made_curves) -> list[Path]:
    """The files of a report with its figures."""
    folder = tmp_path_factory.mktemp("whole") / "a" / "b"
    return write_report(folder, "PPO on reviews", made_evaluation, made_curves, FACTS)


def test_files_and_sizes(whole):
    assert [path.name for path in whole] == ["report.html", "frontier.png", "training.png", "optimiser.png"]
    assert sorted(whole) == sorted(whole[0].parent.iterdir())
    sizes = {path.name: struct.unpack(">II", path.read_bytes()[16:24]) for path in whole[1:]}
    assert sizes == {"frontier.png": (1600, 560), "training.png": (1776, 832), "optimiser.png": (1184, 416)}
    assert whole[0].stat().st_size < 300_000


def test_figures_are_inline_and_described(whole):
    page = Page(whole[0].read_text(encoding="utf-8"))
    figures = [attributes for name, attributes in page.elements if name == "figure"]
    assert len(figures) == 2 + 6 + 2
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert page.text("svg").count("PPO step") == 10  # 8 axes, and what the labels of the frontier are
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    needs_nothing_else(page)


def test_the_same_input_gives_the_same_files(whole, tmp_path, made_evaluation, made_curves):
    again = write_report(tmp_path, "PPO on reviews", made_evaluation, made_curves, FACTS)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in whole]


def test_page_has_every_part(write):
    page = write()
    text = page.text()
    assert page.text("h1") == "PPO on reviews" == page.text("title")
    assert (
        page.text("h2") == "What the reward costs Training All policies Samples This run Every number: MLflow"
    )
    assert "tiny (0.1 M parameters) reviews 64 held-out prompts" in text
    assert "After 24 PPO steps the gold score rose from 0.10 to 0.50" in text
    assert "A step took 6 s on average: rollout 3 s, score 0.5 s, update 2.5 s." in text
    assert "python -m rlhf_exp experiment=smoke" in page.text("code")
    assert FACTS["mlflow"] in page.text("code") and "open http://127.0.0.1:5000 in a browser" in text
    assert "sft key 3fa9c1" in page.text("dl")
    assert {"lang": "en"} in [attributes for name, attributes in page.elements if name == "html"]
    assert any("width=device-width" in a.get("content", "") for name, a in page.elements if name == "meta")


def test_headline_tiles(write):
    text = write().text()
    # 0.4 +- 1.96 * sqrt(0.06^2 + 0.04^2)
    assert "Gold score 0.50 sft 0.10 +0.40 +0.26 to +0.54" in text
    assert "Length 12.0 tokens sft 14.2 −2.2" in text
    assert "Empty 0% sft 0% unchanged" in text
    assert "from the two standard errors as if independent" in text


def test_headline_prefers_paired_intervals_and_counts_shares_in_points(write, evaluation):
    after = evaluation["policies"][-1]
    after["gain"] = {"gold": {"mean": 0.4, "low": 0.31, "high": 0.5}}
    after["metrics"]["empty_rate"] = 0.125
    text = write().text()
    assert "+0.40 +0.31 to +0.50" in text and "bootstrap over the prompts" in text
    assert "Reward 2.25 sft −0.50 +2.75 KL" in text  # no interval, since the gain has none
    assert "Empty 12% sft 0% +12 points" in text


def test_table_of_policies(write):
    assert write().rows() == [
        "sft 0.10 ± 0.06 −0.50 ± 0.20 0.0 14.2 0.75 0% 97%",
        "ppo@8 0.30 ± 0.05 0.75 ± 0.20 1.2 13.5 0.75 0% 97%",
        "ppo@16 0.62 ± 0.04 1.50 ± 0.10 4.0 13.0 0.75 0% 97%",
        "ppo@24 0.50 ± 0.04 2.25 ± 0.10 7.0 12.0 0.75 0% 97%",
    ]


def test_the_data_stand_above_the_policies(write, with_data):
    page = write()
    assert page.text("tbody").startswith("data 0.94 ± 0.05 9.25 ± 0.25 – 21.5 0.88 0% 100% sft 0.10 ± 0.06")
    assert (
        "± is one standard error. data: 128 demonstrations of 64 prompts, scored as they are." in page.text()
    )
    best = [text for path, text in page.texts if "td" in path and text.strip() in ("9.25", "0.94")]
    assert len(best) == 2
    assert "best" not in [a.get("class") for name, a in page.elements if name == "td"][:7]
    # an average is no checkpoint: the headline is of the last one
    assert "After 24 PPO steps the gold score rose from 0.10 to 0.50" in page.text()


def test_samples_side_by_side(write):
    page = write()
    text = page.text("article")
    for i in range(3):
        assert text.count(f"The soup in place {i}") == 1
        for name, gold, reward in (
            ("sft", 0, 0),
            ("ppo@8", 0.25, 1),
            ("ppo@16", 0.5, 2),
            ("ppo@24", 0.75, 3),
        ):
            assert f"{name} answer {i} of {name} gold +{gold:.2f} reward +{reward + i:.2f}" in text


def test_at_most_five_columns_of_samples(write, evaluation):
    responses = [sample["responses"] for sample in evaluation["samples"]]
    for step in range(32, 80, 8):
        evaluation["policies"].append({"name": f"ppo@{step}", "step": step, "metrics": {}})
        for row in responses:
            row[f"ppo@{step}"] = {"text": "x"}
    page = write()
    names = re.findall(r"sft|ppo@\d+", page.text("h3"))
    assert names == ["sft", "ppo@16", "ppo@32", "ppo@56", "ppo@72"] * 3
    assert "5 of 10 policies" in page.text()


HOSTILE = [
    "<script>alert(1)</script>",
    "</main></body><img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "&lt;script&gt; &amp; &#60;",
    "</style><link rel=stylesheet href=http://evil.example/x.css>",
    "<!-- <a href='javascript:alert(1)'>",
    "]]><![CDATA[",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_from_outside_stays_text(write, evaluation, hostile):
    plain = write()
    evaluation["samples"][0]["prompt"] = hostile
    evaluation["samples"][0]["responses"]["sft"]["text"] = hostile
    evaluation["samples"][1]["responses"]["sft"]["text"] = hostile + " long" * LONG
    page = write(facts=FACTS | {"note": hostile, "model": hostile, "mlflow": hostile}, title=hostile)
    assert page.names() == plain.names()
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    wanted = " ".join(hostile.split())
    for inside in ("title", "h1", "article", "dd", "code"):
        assert wanted in page.text(inside)


def test_policy_names_and_figures_are_escaped_too(write, evaluation):
    evaluation["policies"][1]["name"] = "<b>x</b>"
    evaluation["samples"][0]["responses"]["<b>x</b>"] = {"text": "<i>y</i>"}
    start = '"><i onclick="x'  # stands in the figure's description, an attribute
    evaluation["policies"].append({"name": start, "step": 0, "metrics": {"kl": 1.0, "gold": 0.5}})
    page = write()
    assert "i" not in page.names()
    assert any(start in (attributes.get("aria-label") or "") for _, attributes in page.elements)
    assert "<b>x</b>" in page.text("tbody") and "<i>y</i>" in page.text("article")


def needs_nothing_else(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & page.names()
    for name, attributes in page.elements:
        for key in ADDRESSES:
            assert not attributes.get(key) or attributes[key].startswith("#"), (name, key)
        assert not re.search(r"url\((?!#)", attributes.get("style") or "")
    style = page.text("style")
    assert "@import" not in style and "url(" not in style
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_an_address_is_text_not_a_link(write):
    page = write(facts=FACTS | {"mlflow": "https://mlflow.example/#/experiments/1"})
    needs_nothing_else(page)
    assert "https://mlflow.example/#/experiments/1" in page.text("code")


def test_long_texts_fold_but_are_all_there(write, evaluation):
    long = " ".join(f"word{i}" for i in range(300))
    evaluation["samples"][0]["responses"]["ppo@8"]["text"] = long
    page = write()
    assert long in page.text("article")
    assert f"show all {len(long):,} characters" in page.text("summary")


def test_empty_cut_and_missing_answers(write, evaluation):
    responses = evaluation["samples"][0]["responses"]
    responses["sft"]["text"] = "\u200b \n"
    responses["ppo@8"]["ended"] = False
    del responses["ppo@24"]
    text = write().text("article")
    assert "sft (empty)" in text and "answer 0 of ppo@8 (cut off)" in text and "ppo@24 – The soup" in text


def test_control_characters_and_half_surrogates(write, evaluation):
    evaluation["samples"][0]["responses"]["sft"]["text"] = "a\x00b\x1bc\ud800d 汤"
    assert "a\ufffdb\ufffdc\ufffdd 汤" in write().text("article")


def test_without_gold(write, evaluation, curves):
    for policy in evaluation["policies"]:
        policy["metrics"] = {k: v for k, v in policy["metrics"].items() if "gold" not in k}
    for sample in evaluation["samples"]:
        for answer in sample["responses"].values():
            answer["gold"] = None
    for row in curves:
        del row["objective/gold"]
    page = write()
    assert "gold" not in page.text().lower()
    assert "the reward rose from −0.50 to 2.25" in page.text()


def test_with_nan(write, evaluation, curves):
    evaluation["policies"][-1]["metrics"] |= {"gold": math.nan, "kl": math.inf}
    evaluation["samples"][0]["responses"]["sft"]["reward"] = math.nan
    curves[5]["objective/scores"] = math.nan
    page = write()
    assert page.rows()[3].startswith("ppo@24 nan ± 0.04 2.25 ± 0.10 inf")
    assert "ppo@24: not a finite number: Gold score, KL." in page.text()
    assert "reward nan" in page.text("article")


def test_with_one_policy_no_samples_no_curves_no_facts(write, evaluation, tmp_path):
    alone = {"policies": evaluation["policies"][:1], "samples": []}
    page = write(evaluation=alone, curves=[], facts={})
    text = page.text()
    assert "nothing to compare" in text and "No samples were kept" in text and "No training curves" in text
    assert "MLflow" not in text and "This run" not in text
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["frontier.png", "report.html"]


def test_with_bare_policies(write):
    """Policies without a single metric still make a page."""
    page = write(evaluation={"policies": [{"name": "sft", "step": 0, "metrics": {}}]}, curves=[], facts={})
    assert "no frontier to draw" in page.text()
