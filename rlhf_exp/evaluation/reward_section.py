"""The reward model in the report: how good its preferences are, and what its probes found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_exp.evaluation import preference_figures, render
from rlhf_exp.evaluation.markup import Content, Html, tag
from rlhf_exp.evaluation.render import Panel

PROBES = (4.7, 4.3)  # inches of a panel with a row for each kind of probe


class RewardModel(NamedTuple):
    """One of the models whose scores are the reward."""

    name: str
    pairs: Mapping[str, Any] | None  # what `preference.assess` found; None where it is not known
    probes: Sequence[Panel] = ()


def section(models: Sequence[RewardModel]) -> Content:
    """Margins, calibration and probes of each; nothing where nothing is known."""
    known = [model for model in models if model.pairs or model.probes]
    if not known:
        return
    yield tag("h2", "The reward model" if len(known) == 1 else "The reward models")
    yield tag("p", "What the policy was trained to please, as measured when it was trained.", cls="note")
    for place, model in enumerate(known):
        if len(known) > 1:
            yield tag("h3", model.name)
        if model.pairs:
            yield tag("p", said(model.pairs))
            drawn = preference_figures.panels(model.pairs)
            yield tag("div", _figures(drawn, render.PAGE_WIDE, f"preference{place}x"), cls="panels wide")
        if model.probes:
            yield tag(
                "p",
                "Probes are answers that say nothing, or are broken in a known way: how often one scores above the "
                "real answer to the same prompt, and by how much.",
                cls="note",
            )
            yield tag("div", _figures(model.probes, PROBES, f"probe{place}x"), cls="panels wide")


def said(pairs: Mapping[str, Any]) -> str:
    """The figures of `preference.assess` in a sentence or two."""
    low, high = pairs["accuracy_low"], pairs["accuracy_high"]
    return (
        f"It prefers the chosen answer in {pairs['accuracy']:.1%} of {pairs['pairs']:,} validation pairs (95 %: "
        f"{low:.1%} to {high:.1%}); the rule that the longer answer wins is right in "
        f"{pairs['length_accuracy']:.1%}. Its expected calibration error is {pairs['calibration']['ece']:.3f}."
    )


def _figures(panels: Sequence[Panel], size: tuple[float, float], name: str) -> Iterator[Html]:
    for i, panel in enumerate(panels):
        picture = Html(render.svg(panel, size, f"{name}{i}"))
        yield tag("figure", picture, role="img", aria_label=f"{panel.title}, {panel.unit}: {panel.about}")
