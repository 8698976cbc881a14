"""The report in a real browser: what is visible, on a desktop and on a phone, in light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from rlhf_exp.evaluation.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
MEASURE = """
const box = e => e.getBoundingClientRect();
document.body.insertAdjacentHTML("beforeend", "<pre id=measured></pre>");
document.getElementById("measured").textContent = JSON.stringify({
  title: document.title,
  page: document.documentElement.scrollWidth,
  window: window.innerWidth,
  text: document.querySelector("main").innerText,
  figures: [...document.querySelectorAll(".panels svg")].map(e => [box(e).left, box(e).width, box(e).height]),
  letters: [...document.querySelectorAll(".panels svg text")].filter(e => box(e).width)
    .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a),
  answers: [...document.querySelector(".answers").children].map(e => [box(e).left, box(e).top]),
  ink: getComputedStyle(document.body).color,
  back: getComputedStyle(document.body).backgroundColor,
  svgInk: getComputedStyle(document.querySelector("svg text")).fill,
});
"""


def browse(page: Path, folder: Path, width: int, *options: str) -> str:
    """What the browser prints."""
    switches = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync hide-scrollbars disable-dev-shm-usage"
    )
    command = [CHROMIUM, *(f"--{name}" for name in switches.split()), f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", *options, page.as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)
    finally:
        shutil.rmtree(folder / "profile", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def page(tmp_path, evaluation, curves) -> Path:
    responses = evaluation["samples"][0]["responses"]
    evaluation["samples"][0]["prompt"] = "请写一段评论：汤"
    responses["sft"]["text"] = HOSTILE
    responses["ppo@8"]["text"] = "好喝" * 40 + "unbreakable" * 30
    facts = {
        "model": "tiny",
        "dataset": "reviews",
        "mlflow": "python -m mlflow ui --backend-store-uri " + "x" * 200,
    }
    return write_report(tmp_path / "report", "PPO on reviews", evaluation, curves, facts)[0]


def measured(page: Path, folder: Path, width: int, *options: str) -> dict:
    """Sizes and text as laid out; on a copy that allows the measuring script, and so any that slipped in."""
    source = page.read_text(encoding="utf-8")
    source, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    assert removed == 1
    copy = folder / "copy.html"
    copy.write_text(source.replace("</main>", f"</main><script>{MEASURE}</script>"), encoding="utf-8")
    dom = browse(copy, folder, width, "--dump-dom", *options)
    return json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1]))


@pytest.mark.parametrize(("width", "columns"), [(1200, 3), (400, 1)])
def test_layout_and_visible_text(page, tmp_path, width, columns):
    found = measured(page, tmp_path, width)
    assert found["window"] == width
    assert found["page"] <= width, "the page scrolls sideways"
    text = found["text"]
    for words in (
        "PPO on reviews",
        "Gold score",
        "请写一段评论：汤",
        HOSTILE,
        "answer 2 of ppo@24",
        "python -m mlflow ui",
    ):
        assert words in text
    assert found["title"] == "PPO on reviews", "a response ran as a script"
    visible = [figure for figure in found["figures"] if figure[1]]
    assert len(visible) == 2 + 6  # the optimiser's are folded
    assert len({round(left) for left, _, _ in visible[2:]}) == columns
    assert all(w > 0.8 * min(width, 400) - 40 and 0.5 < h / w < 0.9 for _, w, h in visible)
    assert min(found["letters"]) >= 9.5
    lefts, tops = ({round(place[i]) for place in found["answers"]} for i in (0, 1))
    assert (len(lefts), len(tops)) == ((4, 1) if columns > 1 else (1, 4))


def test_dark_theme(page, tmp_path):
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    light = measured(page, tmp_path, 1200)
    dark = measured(page, tmp_path, 1200, "--blink-settings=preferredColorScheme=0")
    assert brightness(light["back"]) > 200 > 100 > brightness(light["ink"])
    assert brightness(dark["ink"]) > 200 > 60 > brightness(dark["back"])
    assert brightness(dark["svgInk"]) > 120 > brightness(light["svgInk"])


def test_screenshot_shows_the_page_as_it_is(page, tmp_path):
    """With its own security policy: styles and figures must get through it."""
    browse(page, tmp_path, 400, f"--screenshot={tmp_path / 'page.png'}")
    pixels = imread(tmp_path / "page.png")[:, :, :3]
    assert pixels.shape == (900, 400, 3)
    orange = (abs(pixels - [184 / 255, 79 / 255, 0]) < 0.02).all(axis=2)
    assert orange.sum() > 100, "the gold score's colour is nowhere"
    assert 0.02 < (pixels.mean(axis=2) < 0.5).mean() < 0.5, "no text, or no style"
