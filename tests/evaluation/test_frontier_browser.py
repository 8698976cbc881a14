"""The page of stage=report in a real browser: hovering, hiding, paging; no error, no request, no foreign script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.evaluation.browser import browse
from tests.evaluation.run_folders import PROMPTS, write_sweep
from tests.evaluation.test_frontier_page import HOSTILE, build

# its log tells of errors and requests; the page's timers run out at once
SWITCHES = ("--window-size=1200,1600", "--enable-logging=stderr", "--virtual-time-budget=4000")
pytestmark = pytest.mark.usefixtures("chromium")

# runs before the page's own script: what goes wrong from then on
WATCH = """
const wrong = [];
addEventListener("error", event => wrong.push(String(event.message || event.target)), true);
addEventListener("securitypolicyviolation", event => wrong.push(`policy: ${event.violatedDirective}`));
window.alert = text => wrong.push(`alert: ${text}`);
"""
MEASURE = """
const box = e => e.getBoundingClientRect(), all = (q, e = document) => [...e.querySelectorAll(q)];
const tip = document.getElementById("tip");
function hover(svg, dot, away = 0) {
  const m = svg.getScreenCTM();
  svg.dispatchEvent(new PointerEvent("pointermove", {
    clientX: dot.dataset.x * m.a + m.e + away, clientY: dot.dataset.y * m.d + m.f + away, bubbles: true }));
  return tip.hidden ? null : tip.innerText;
}
const found = { tips: [], pages: [] };
const svg = document.querySelector(".plot svg"), dots = all(".dot", svg);
for (const dot of dots) found.tips.push([dot.dataset.tip, hover(svg, dot)]);
found.away = hover(svg, dots[0], -300);
hover(svg, dots[dots.length - 1]);
const place = box(tip);
found.tip = [
  place.left >= 0, place.right <= innerWidth, place.top >= 0, place.bottom <= innerHeight, place.height > 20];
found.hiddenDots = () => all(".dot", svg).filter(dot => !dot.getClientRects().length).length;
const button = document.querySelector(".legend button"), before = found.hiddenDots();
button.click();
found.hides = [before, found.hiddenDots(), button.getAttribute("aria-pressed")];
button.click();
found.shows = [found.hiddenDots(), button.getAttribute("aria-pressed")];
button.dispatchEvent(new PointerEvent("pointerenter"));
found.faded = all(".plot [data-g].faded").length;
button.dispatchEvent(new PointerEvent("pointerleave"));
found.unfaded = all(".plot [data-g].faded").length;
delete found.hiddenDots;
const samples = document.getElementById("samples"), [back, next] = all("button", samples);
const page = () => ({
  prompt: samples.querySelector(".prompt").innerText, place: samples.querySelector(".place").innerText,
  answers: all(".answer", samples).map(e => [e.querySelector("h3").innerText, e.querySelector(".text").innerText]),
  back: back.disabled, next: next.disabled });
found.pages.push(page());
next.click(); found.pages.push(page());
next.click(); found.pages.push(page());
back.click(); found.pages.push(page());
const select = samples.querySelector("select");
select.selectedIndex = 1;
select.dispatchEvent(new Event("change"));
found.pages.push(page());
samples.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
found.pages.push(page());
Object.assign(found, {
  window: innerWidth, page: document.documentElement.scrollWidth, title: document.title, wrong,
  requests: performance.getEntriesByType("resource").map(e => e.name),
  foreign: all("img, iframe, object").length + all("script").length,
  letters: all(".plot text").map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a),
  outside: all(".plot svg").filter(e => all("text", e).some(
    t => box(t).right > box(e.parentElement).right || box(t).left < box(e.parentElement).left)).length,
  figures: all("figure.plot").map(e => [box(e).width, box(e).height]),
  ink: getComputedStyle(document.body).color, back: getComputedStyle(document.body).backgroundColor,
  dot: getComputedStyle(dots[0]).fill, axis: getComputedStyle(document.querySelector(".plot text")).fill,
});
setTimeout(() => parent.postMessage(found, "*"), 300);  // after what a hostile text might have started
"""
FRAMES = """<!doctype html><script>
addEventListener("message", message => {
  const entry = document.body.appendChild(document.createElement("pre"));
  entry.textContent = JSON.stringify(message.data);
});
</script><body>
<iframe src=copy.html style="border: 0; width: 1200px; height: 900px"></iframe>
<iframe src=copy.html style="border: 0; width: 400px; height: 900px"></iframe>
"""


def hashed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def measure(page: Path, folder: Path, *options: str) -> dict[int, dict]:
    """Width of the window -> what was seen. The page's own policy holds, but for the two scripts of this test."""
    source = page.read_text(encoding="utf-8")
    assert source.count("script-src ") == 1
    source = source.replace("script-src ", f"script-src {hashed(WATCH)} {hashed(MEASURE)} ")
    source = source.replace("<title>", f"<script>{WATCH}</script><title>")
    source = source.replace("</body>", f"<script>{MEASURE}</script></body>")
    (folder / "copy.html").write_text(source, encoding="utf-8")
    (folder / "frames.html").write_text(FRAMES, encoding="utf-8")
    dom, log = browse(folder / "frames.html", folder, *SWITCHES, "--dump-dom", *options)
    found = [json.loads(html.unescape(entry)) for entry in re.findall(r"<pre>(.*?)</pre>", dom, re.DOTALL)]
    assert len(found) == 2, log
    return {entry["window"]: entry for entry in found}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frontier")
    for run in write_sweep(folder / "outputs"):
        if (run / "eval.json").is_file():
            content = json.loads((run / "eval.json").read_text())
            content["samples"][1]["prompt"] = HOSTILE
            content["samples"][1]["responses"]["ppo@40"]["text"] = HOSTILE
            (run / "eval.json").write_text(json.dumps(content))
    (folder / "report.html").write_text(build(folder / "outputs", [HOSTILE], fit="bon"), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def light(page, tmp_path_factory) -> dict[int, dict]:
    return measure(page, tmp_path_factory.mktemp("light"))


@pytest.mark.parametrize("width", [1200, 400])
def test_nothing_goes_wrong_and_nothing_is_asked_for(light, width):
    found = light[width]
    assert found["wrong"] == []
    assert found["requests"] == []
    assert found["title"] == "Frontier"
    assert found["foreign"] == 2 + 2, "the page's two scripts and this test's"


def test_the_console_is_silent(page, tmp_path):
    dom, log = browse(page, tmp_path, *SWITCHES, "--dump-dom")
    assert "prompt 1 of 3" in dom, "the page's own script ran under its own policy"
    assert "CONSOLE" not in log


@pytest.mark.parametrize("width", [1200, 400])
def test_hovering_a_dot_shows_its_figures(light, width):
    found = light[width]
    assert len(found["tips"]) > 15
    shown = {told for _, told in found["tips"]}
    assert "kl_coef=0.02\nstep 20, mean of 2 seeds\nGold score 0.8\nKL 4" in shown
    # dots that lie on one another show the first of them
    assert all(told is not None for _, told in found["tips"])
    assert len(shown) > len(found["tips"]) / 2
    assert found["away"] is None, "far from every dot nothing is shown"
    assert found["tip"] == [True] * 5


def test_the_legend_hides_and_fades_lines(light):
    found = light[1200]
    before, after, pressed = found["hides"]
    assert (before, pressed) == (0, "false")
    assert after > 5
    assert found["shows"] == [0, "true"]
    assert found["faded"] > 0 == found["unfaded"]


def test_paging_through_samples(light):
    first, second, third, back, other, arrow = light[1200]["pages"]
    assert first["prompt"] == PROMPTS[0]
    assert first["answers"] == [
        ["sft", "sft says 0"],
        ["kl_coef=0.02 (ppo@40)", "ppo@40 says 0"],
        ["kl_coef=0.2 (ppo@40)", "ppo@40 says 0"],
    ]
    assert (first["place"], first["back"], first["next"]) == ("prompt 1 of 3", True, False)
    assert (second["place"], second["back"], second["next"]) == ("prompt 2 of 3", False, False)
    assert second["prompt"] == HOSTILE, "a hostile prompt is shown as it is"
    assert second["answers"][1][1] == HOSTILE
    assert (third["prompt"], third["place"], third["next"]) == (PROMPTS[2], "prompt 3 of 3", True)
    assert back == second
    assert [who for who, _ in other["answers"]] == ["sft", "ppo@10", "ppo@20", "ppo@30", "ppo@40"]
    assert other["place"] == "prompt 1 of 3"
    assert arrow["place"] == "prompt 2 of 3"


@pytest.mark.parametrize(("width", "columns"), [(1200, 2), (400, 1)])
def test_the_layout_fits_the_window(light, width, columns):
    found = light[width]
    assert found["page"] <= width, "the page scrolls sideways"
    assert found["outside"] == 0, "letters leave their figure"
    assert min(found["letters"]) >= 8.5, "letters of a figure are too small to read"
    assert all(300 < w < 730 and 0.5 < h / w < 1.0 for w, h in found["figures"])
    assert (found["figures"][0][0] < 0.6 * width) is (columns == 2)


def test_dark_theme(page, light, tmp_path):
    def brightness(colour: str) -> float:
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    bright, dark = light[1200], measure(page, tmp_path, "--blink-settings=preferredColorScheme=0")[1200]
    assert brightness(bright["ink"]) < 100 < 200 < brightness(dark["ink"])
    assert brightness(dark["axis"]) > 120 > brightness(bright["axis"])
    assert bright["dot"] != dark["dot"]


def test_a_screenshot_shows_the_plots(page, tmp_path):
    browse(page, tmp_path, *SWITCHES, f"--screenshot={tmp_path / 'page.png'}")
    pixels = imread(tmp_path / "page.png")[:, :, :3]
    blue = (abs(pixels - [0, 114 / 255, 178 / 255]) < 0.02).all(axis=2)
    orange = (abs(pixels - [199 / 255, 80 / 255, 0]) < 0.02).all(axis=2)
    assert blue.sum() > 150 and orange.sum() > 150, "the dots of the two lines"
    assert 0.01 < (pixels.mean(axis=2) < 0.5).mean() < 0.5, "no text, or no style"
