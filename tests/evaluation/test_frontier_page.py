"""The page of stage=report: complete, escaped, alone, and readable without a browser's help."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from rlhf_exp.evaluation import frontier_plot
from rlhf_exp.evaluation.comparison import groups
from rlhf_exp.evaluation.frontier_lines import pictures
from rlhf_exp.evaluation.frontier_page import Report, page
from rlhf_exp.evaluation.frontier_png import write
from rlhf_exp.evaluation.frontier_samples import data, sets
from rlhf_exp.evaluation.frontier_tables import tables
from rlhf_exp.evaluation.trials import read
from rlhf_exp.schema import Report as Settings
from rlhf_exp.store.listing import scan
from tests.evaluation.run_folders import held_out, write_eval, write_ppo, write_sweep

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- \u2028 \"'&"


def build(root, warnings=(), **values) -> str:
    found, settings = groups(read(scan(root))[0]), Settings(**values)
    drawn = pictures(found, settings)
    made = tables(found, drawn, settings.objectives)
    facts = {"inputs": str(root), "command": "python -m rlhf_exp stage=report"}
    return page(Report("Frontier", found, drawn, made, list(warnings), facts, settings.fit))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("page") / "outputs"
    write_sweep(root)
    return root


@pytest.fixture(scope="module")
def html(root):
    return build(root, ["mind the gap"], fit="bon")


class Elements(HTMLParser):
    """Every element with its attributes, and text by the element that holds it."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def of(self, kind):
        return [attributes for tag, attributes in self.found if tag == kind]


def text_of(html: str) -> str:
    return " ".join(" ".join(t for tag, t in Elements(html).texts if tag not in ("style", "script")).split())


def test_the_sections_are_there_with_their_figures(html):
    said = text_of(html)
    for words in (
        "On held-out prompts the highest gold score is 0.8, of kl_coef=0.02 (step 20, mean of 2 seeds) at a KL of 4.",
        "mind the gap",
        "5 runs",
        "3 finished",
        "Held-out prompts",
        "Training curves",
        "Best under a KL limit",
        "Pareto set",
        "R = start + d (α − β d)",
        "arXiv:2210.10760",
        "stopped by a signal",
        "How the configs differ",
        "ppo.kl_coef",
        "python -m rlhf_exp stage=report",
    ):
        assert words in said, words


def test_every_dot_has_its_figures(html):
    dots = [a for tag, a in Elements(html).found if "data-tip" in a and "dot" in a.get("class", "").split()]
    tips = [a["data-tip"] for a in dots]
    assert "kl_coef=0.02\nstep 20, mean of 2 seeds\nGold score 0.8\nKL 4" in tips
    assert "kl_coef=0.02\nppo@20, step 20, seed 1\nGold score 0.9 ± 0.05\nKL 4" in tips
    assert "kl_coef=0.2\nppo@10, step 10\nWin rate 0.5625\nKL 0.25" in tips
    assert any(tip.startswith("kl_coef=0.02: peak of the fit\nKL ") for tip in tips)
    assert all(float(a["data-x"]) >= 0 and float(a["data-y"]) for a in dots)


def test_the_page_loads_nothing_and_runs_only_its_own_script(html):
    elements = Elements(html)
    assert not re.search(r"https?://|url\((?!#)|@import", html.replace("http://www.w3.org/2000/svg", ""))
    assert {tag for tag, _ in elements.found} & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
    } == set()
    assert all(not name.startswith("on") for _, attributes in elements.found for name in attributes)
    (policy,) = [a["content"] for a in elements.of("meta") if a.get("http-equiv")]
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert (
        policy
        == f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    )
    assert [a.get("type") for a in elements.of("script")] == ["application/json", None]


def test_ids_are_each_there_once(html):
    ids = [attributes["id"] for _, attributes in Elements(html).found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([\w-]+)\)", html))
    assert used <= set(ids)


def test_hostile_texts_are_text(tmp_path):
    ppo = write_ppo(tmp_path, [(0, 1, 1), (1, 2, 2)], run_name=HOSTILE[:50], state="KILLED", error=HOSTILE)
    folder = write_eval(tmp_path, ppo, held_out([(0, 1, 0.5), (4, 1, 0.4)]))
    content = json.loads((folder / "eval.json").read_text())
    content["samples"][0]["prompt"] = HOSTILE
    for name, answer in content["samples"][0]["responses"].items():
        answer["text"] = HOSTILE + name
    content["policies"][1]["name"] = HOSTILE
    (folder / "eval.json").write_text(json.dumps(content))
    html = build(tmp_path, [HOSTILE])
    elements = Elements(html)
    assert len(elements.of("script")) == 2
    assert not elements.of("img")
    assert all(not name.startswith("on") for _, attributes in elements.found for name in attributes)
    held = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
    texts = [a["text"] for entry in held for prompt in entry["prompts"] for a in prompt["answers"]]
    assert HOSTILE + "sft" in texts, "the text itself is whole"


def test_data_within_a_script_never_ends_it():
    written = data({"a": "</script><!--\u2028", "b": "\x00\ud800"})
    assert "<" not in written and "\u2028" not in written
    assert json.loads(written) == {"a": "</script><!--\u2028", "b": "\ufffd\ufffd"}


def test_samples_side_by_side(root):
    found = {entry["title"]: entry["prompts"] for entry in sets(groups(read(scan(root))[0]))}
    last = found["the last policy of each trial"]
    assert [a["who"] for a in last[0]["answers"]] == ["sft", "kl_coef=0.02 (ppo@40)", "kl_coef=0.2 (ppo@40)"]
    assert [prompt["prompt"] for prompt in last][2] == "请写一段评论：汤"
    checkpoints = found["checkpoints of kl_coef=0.02, seed 1"]
    assert [a["who"] for a in checkpoints[0]["answers"]] == ["sft", "ppo@10", "ppo@20", "ppo@30", "ppo@40"]
    assert found["last batch of kl_coef=0.5"][0]["answers"][0]["text"] == " was good"


def test_without_points_and_samples_the_page_says_so(tmp_path):
    write_ppo(tmp_path, [], state="FAILED", error="nothing worked")
    said = text_of(build(tmp_path))
    assert "No run has both a score and a KL, so there is no frontier to draw." in said
    assert "No run kept samples." in said
    assert "nothing worked" in said
    assert "They do not, but for the seed." in said


def test_a_single_point_and_equal_scores_are_drawn(tmp_path):
    write_ppo(tmp_path, [(0, 1, 1)])
    write_ppo(tmp_path, [(0, 1, 1), (0.5, 1, 1)], seed=3, ppo__kl_coef=0.9)
    html = build(tmp_path)
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))


def test_estimates_below_zero_are_left_of_the_start(tmp_path):
    write_ppo(tmp_path, [(0, 1, 1), (-0.25, 2, 2), (4, 3, 3)])
    picture = pictures(groups(read(scan(tmp_path))[0]), Settings())[0]
    x, _ = frontier_plot.scales(picture)
    assert frontier_plot.LEFT <= x(-0.25) < x(0) < x(1) < x(4) < frontier_plot.WIDTH - frontier_plot.RIGHT
    assert x(4) - x(1) == pytest.approx(x(1) - x(0), abs=0.02), "spaced by the root"


@pytest.mark.parametrize(
    ("most", "ticks"),
    [(37, [0, 1, 5, 10, 20, 30]), (1, [0, 0.1, 0.2, 0.5, 1]), (5.4, [0, 0.2, 0.5, 1, 2, 3, 5])],
)
def test_ticks_of_the_kl(most, ticks):
    assert frontier_plot.RootScale(0, most, 0, 100).ticks(12) == pytest.approx(ticks)


def test_many_trials_have_colours_and_shapes(tmp_path):
    for i in range(20):
        write_ppo(tmp_path, [(0, 1, 1), (1 + i, 2, 2)], ppo__kl_coef=i / 10)
    html = build(tmp_path)
    legend = [a for a in Elements(html).of("button") if "data-of" in a]
    assert [a["data-of"] for a in legend] == [str(i) for i in range(20)]
    assert len({a["class"] for a in legend}) == frontier_plot.COLOURS


def test_pictures_as_files(root, tmp_path):
    found = pictures(groups(read(scan(root))[0]), Settings(fit="bon"))
    first = {path.name: path.read_bytes() for path in write(tmp_path, found)}
    assert set(first) == {"frontier_heldout.png", "frontier_training.png"}
    assert all(content.startswith(b"\x89PNG") for content in first.values())
    assert {path.name: path.read_bytes() for path in write(tmp_path, found)} == first
