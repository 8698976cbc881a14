"""The report in a real browser: what is visible, on a desktop and on a phone, in light and dark."""

from __future__ import annotations

import html
import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
from matplotlib.image import imread

from rlhf_exp.evaluation.report import write_report
from tests.evaluation.browser import browse

SIZE = "--window-size=1200,900"
pytestmark = pytest.mark.usefixtures("chromium")

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
MEASURE = """
const box = e => e.getBoundingClientRect(), all = q => [...document.querySelectorAll(q)];
const seen = all(".panels svg").filter(e => e.checkVisibility());
parent.postMessage({
  title: document.title,
  page: document.documentElement.scrollWidth,
  window: window.innerWidth,
  text: document.querySelector("main").innerText,
  figures: seen.map(e => [box(e).left, box(e).width, box(e).height]),
  letters: seen.flatMap(e => [...e.querySelectorAll("text")])
    .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a),
  answers: [...document.querySelector(".answers").children].map(e => [box(e).left, box(e).top]),
  outside: seen.filter(e => [...e.querySelectorAll("text")]
    .some(t => box(t).right > box(e.parentElement).right || box(t).left < box(e.parentElement).left)).length,
  clipped: all(".answers, .prompt, .text, .command, .tile").filter(e => e.scrollWidth > e.clientWidth).length,
  ink: getComputedStyle(document.body).color,
  back: getComputedStyle(document.body).backgroundColor,
  svgInk: getComputedStyle(document.querySelector("svg text")).fill,
}, "*");
"""
# frames, since a browser's own window has a least width
FRAMES = """<!doctype html><script>
addEventListener("message", message => {
  const entry = document.body.appendChild(document.createElement("pre"));
  entry.textContent = JSON.stringify(message.data);
});
</script><body>
<iframe src=copy.html style="border: 0; width: 1200px; height: 900px"></iframe>
<iframe src=copy.html style="border: 0; width: 400px; height: 900px"></iframe>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, made_evaluation, made_curves) -> Path:
    evaluation = deepcopy(made_evaluation)
    responses = evaluation["samples"][0]["responses"]
    evaluation["samples"][0]["prompt"] = "请写一段评论：汤"
    responses["sft"]["text"] = HOSTILE
    responses["ppo@8"]["text"] = "好喝" * 40 + "unbreakable" * 30
    facts = {
        "model": "tiny",
        "dataset": "reviews",
        "mlflow": "python -m mlflow ui --backend-store-uri " + "x" * 200,
    }
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, "PPO on reviews", evaluation, made_curves, facts)[0]


def measure(page: Path, folder: Path, *options: str) -> dict[int, dict]:
    """Width of the window -> what is laid out and visible there.

    On a copy that allows the measuring script, and so would allow any that slipped in.
    """
    source = page.read_text(encoding="utf-8")
    source, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    assert removed == 1
    copy = source.replace("</main>", f"</main><script>{MEASURE}</script>")
    (folder / "copy.html").write_text(copy, encoding="utf-8")
    (folder / "frames.html").write_text(FRAMES, encoding="utf-8")
    dom, _ = browse(folder / "frames.html", folder, SIZE, "--dump-dom", *options)
    found = [json.loads(html.unescape(entry)) for entry in re.findall(r"<pre>(.*?)</pre>", dom, re.DOTALL)]
    return {entry["window"]: entry for entry in found}


@pytest.fixture(scope="module")
def light(page, tmp_path_factory) -> dict[int, dict]:
    return measure(page, tmp_path_factory.mktemp("light"))


@pytest.mark.parametrize("width", [1200, 400])
def test_everything_is_visible(light, width):
    found = light[width]
    for words in (
        "PPO on reviews",
        "the gold score rose from 0.10 to 0.50",
        "Gold score against KL",
        "请写一段评论：汤",
        HOSTILE,
        "answer 2 of ppo@24",
        "python -m mlflow ui",
    ):
        assert words in found["text"]
    assert found["title"] == "PPO on reviews", "a response ran as a script"


@pytest.mark.parametrize(("width", "columns"), [(1200, 3), (400, 1)])
def test_layout_fits_the_window(light, width, columns):
    found = light[width]
    assert found["page"] <= width, "the page scrolls sideways"
    assert found["outside"] == 0, "letters leave their figure"
    assert found["clipped"] == 0, "texts run out of their boxes"
    assert len(found["figures"]) == 2 + 6  # the optimiser's are folded
    assert len({round(left) for left, _, _ in found["figures"][2:]}) == columns
    assert all(w > 300 and 0.5 < h / w < 0.9 for _, w, h in found["figures"])
    assert min(found["letters"]) >= 9.5, "letters of a figure are too small to read"
    lefts, tops = ({round(place[i]) for place in found["answers"]} for i in (0, 1))
    assert (len(lefts), len(tops)) == ((4, 1) if columns > 1 else (1, 4))


def test_dark_theme(page, light, tmp_path):
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    bright, dark = light[1200], measure(page, tmp_path, "--blink-settings=preferredColorScheme=0")[1200]
    assert brightness(bright["back"]) > 200 > 100 > brightness(bright["ink"])
    assert brightness(dark["ink"]) > 200 > 60 > brightness(dark["back"])
    assert brightness(dark["svgInk"]) > 120 > brightness(bright["svgInk"])


def test_screenshot_shows_the_page_as_it_is(page, tmp_path):
    """With its own security policy: styles and figures must get through it."""
    browse(page, tmp_path, SIZE, f"--screenshot={tmp_path / 'page.png'}")
    pixels = imread(tmp_path / "page.png")[:, :, :3]
    assert pixels.shape == (900, 1200, 3)
    orange = (abs(pixels - [184 / 255, 79 / 255, 0]) < 0.02).all(axis=2)
    assert orange[:350].sum() > 100, "the gold score's headline is not in its colour"
    assert orange[450:].sum() > 100, "the gold score's figure is not there"
    assert 0.01 < (pixels.mean(axis=2) < 0.5).mean() < 0.5, "no text, or no style"
