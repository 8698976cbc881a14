// Hovering, hiding lines, paging through samples. Texts go in as text (textContent), never as markup.
"use strict";
(() => {
  const all = (what, where = document) => [...where.querySelectorAll(what)];
  const tip = document.getElementById("tip");
  const FAR = 26; // pixels from which a dot is no longer meant

  // ---- hovering: the nearest dot that is shown
  let ring = null;
  function leave() {
    tip.hidden = true;
    if (ring) ring.remove();
    ring = null;
  }
  function nearest(svg, event) {
    const matrix = svg.getScreenCTM();
    let found = null, least = FAR * FAR;
    for (const dot of all(".dot", svg)) {
      if (dot.closest(".off")) continue;
      const x = dot.dataset.x * matrix.a + matrix.e, y = dot.dataset.y * matrix.d + matrix.f;
      const away = (x - event.clientX) ** 2 + (y - event.clientY) ** 2;
      if (away < least) [found, least] = [{ dot, x, y }, away];
    }
    return found;
  }
  function hover(event) {
    const svg = event.currentTarget, found = nearest(svg, event);
    leave();
    if (!found) return;
    tip.textContent = found.dot.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = found.x + 14 + box.width > innerWidth ? found.x - 14 - box.width : found.x + 14;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(found.y - box.height / 2, innerHeight - box.height - 4))}px`;
    ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    for (const [name, value] of Object.entries({ cx: found.dot.dataset.x, cy: found.dot.dataset.y, r: 9, class: "hover" }))
      ring.setAttribute(name, value);
    found.dot.parentNode.append(ring);
  }
  for (const svg of all(".plot svg")) {
    svg.addEventListener("pointermove", hover);
    svg.addEventListener("pointerdown", hover);
    svg.addEventListener("pointerleave", leave);
  }
  addEventListener("scroll", leave, { passive: true });

  // ---- the legend: hovering shows one line alone, a click hides it
  const parts = group => all(`.plot [data-g="${group}"]`);
  for (const button of all(".legend button")) {
    const group = button.dataset.of;
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", shown);
      parts(group).forEach(part => part.classList.toggle("off", !shown));
      all(`.legend button[data-of="${group}"]`).forEach(other => other.setAttribute("aria-pressed", shown));
    });
    const fade = on => all(".plot [data-g]").forEach(
      part => part.classList.toggle("faded", on && part.dataset.g !== group));
    for (const [name, on] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]])
      button.addEventListener(name, () => fade(on && button.getAttribute("aria-pressed") === "true"));
  }

  // ---- samples
  const place = document.getElementById("samples");
  if (!place) return;
  const sets = JSON.parse(document.getElementById("samples-data").textContent);
  const select = place.querySelector("select"), shown = place.querySelector(".shown");
  const [back, next] = all("button", place), told = place.querySelector(".place");
  let at = 0;
  function element(name, kind, text) {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }
  function answer(one) {
    const made = element("section", "answer");
    made.append(element("h3", "", one.who));
    const text = one.text.trim() ? element("div", "text", one.text) : element("div", "quiet", "(empty)");
    text.dir = "auto";
    if (one.ended === false) text.append(element("span", "quiet", " (cut off)"));
    made.append(text);
    const scores = element("div", "scores");
    for (const name of ["gold", "reward"]) {
      if (typeof one[name] !== "number") continue;
      const score = element("span", name, `${name} `);
      score.append(element("b", "", (one[name] < 0 ? "\u2212" : "+") + Math.abs(one[name]).toFixed(2)));
      scores.append(score);
    }
    made.append(scores);
    return made;
  }
  function show() {
    const prompts = sets[select.selectedIndex].prompts;
    at = Math.max(0, Math.min(at, prompts.length - 1));
    const box = element("article", "sample"), prompt = element("div", "prompt text", prompts[at].prompt);
    prompt.dir = "auto";
    const answers = element("div", "answers");
    answers.append(...prompts[at].answers.map(answer));
    box.append(prompt, answers);
    shown.replaceChildren(box);
    told.textContent = `prompt ${at + 1} of ${prompts.length}`;
    back.disabled = at === 0;
    next.disabled = at === prompts.length - 1;
  }
  back.addEventListener("click", () => { at -= 1; show(); });
  next.addEventListener("click", () => { at += 1; show(); });
  select.addEventListener("change", () => { at = 0; show(); });
  place.addEventListener("keydown", event => {
    if (event.target === select) return;
    if (event.key === "ArrowLeft" && !back.disabled) back.click();
    if (event.key === "ArrowRight" && !next.disabled) next.click();
  });
  show();
})();
