"""Between the reward model and what learns from its scores: are its probes within their limits (reward_source.gate)?

warn says so, fail stops, patch has the reward model trained again with synthetic negatives of the kinds that are not.
That is one more run of stage reward whose `reward.negatives` names the kinds, so it has a key of its own; the plan
knows it once the first reward model is there. A model whose scores tell no real answers apart fails whatever its
probes are; no negatives mend it, so that patch stops too. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp.errors import InputError
from rlhf_exp.schema import PROBES, UNPATCHED, Limits, RewardSource, proxies
from rlhf_exp.store.manifest import RECORD, CorruptArtifact
from rlhf_exp.store.runs import FINISHED, RunFolder, plain

if TYPE_CHECKING:
    from rlhf_exp.stages.plan import Node, Plan

PROBE, REPORT, PICTURE = "probe", "probe.json", "probe.png"  # a run's folder of probes, and what is in it
GATE = "gate"  # the folder of a run on a patched reward model: what the patch changed
TRAINED = ("ppo", "ilql", "rft")  # stages that learn from scores


class Failure(NamedTuple):
    """A probe above its limit."""

    kind: str
    share: float
    limit: float

    def __str__(self) -> str:
        return f"{self.kind} {self.share:.2f} (limit {self.limit:g})"


def failures(report: Mapping[str, Any], limits: Limits) -> list[Failure]:
    """The probes whose share is above its limit, in the order of the limits; one that was not made is none."""
    shares = {name: part["share"] for name, part in (report["kinds"] | report["invariances"]).items()}
    return [
        Failure(kind, shares[kind], limit)
        for kind, limit in asdict(limits).items()
        if shares.get(kind) is not None and shares[kind] > limit
    ]


def useless(report: Mapping[str, Any]) -> str | None:
    """What is wrong with the scores of the real answers themselves; no probe is ever above such."""
    if any(row[name] is None for row in report["real"] for name in ("chosen", "rejected")):
        return "gives answers scores that are nan or inf"  # written before `measure` refused them
    return "gives all chosen answers the same score" if report.get("spread") == 0 else None


def source_of(nodes: Iterable[Node]) -> RewardSource | None:
    """The reward source of what learns from scores; else of what only measures by them."""
    found = {node.stage: node.config.reward_source for node in nodes if hasattr(node.config, "reward_source")}
    return next((found[stage] for stage in (*TRAINED, "eval") if stage in found), None)


def report_of(node: Node, output_dir: str) -> dict[str, Any] | None:
    """The probes of a reward model that is there: its run's own, else those of a run of stage probe on it.

    Both are of validation pairs: it knows those that it was trained on, and held-out ones are for the end.
    Those of stage probe have `probed`, how many pairs, which its config may have made few.
    """
    if node.folder is None:
        return None
    if (own := node.folder / PROBE / REPORT).is_file():
        return json.loads(own.read_text(encoding="utf-8"))
    found = []
    for path in Path(output_dir).glob(f"{PROBE}/*/{RECORD}"):
        try:
            record = RunFolder(path.parent).read()
        except CorruptArtifact:
            continue
        parent = record.get("inputs", {}).get("parents", {}).get("reward", {})
        if record.get("status") == FINISHED and parent.get("key") == node.key:
            report = json.loads((path.parent / PROBE / REPORT).read_text(encoding="utf-8"))
            if set(PROBES) <= set(report["kinds"]) and report.get("split") == "validation":
                found.append((record["ended"], report | {"probed": report["pairs"]}))
    return max(found, key=lambda pair: pair[0])[1] if found else None


# ---------------------------------------------------------------- patch


def patched(node: Node, nodes: Mapping[str, Node]) -> Node | None:
    """What takes the place of a reward model that is there and fails under gate=patch; it then bears another name."""
    source = source_of(nodes.values())
    if source is None or source.gate != "patch" or node.name not in proxies(source) or node.config is None:
        return None
    report = report_of(node, node.config.output_dir)
    kinds = [] if report is None else [f.kind for f in failures(report, source.limits) if f.kind in PROBES]
    if not kinds:
        return None
    config = deepcopy(node.config)
    known = {*kinds, *config.reward.negatives}
    config.reward.negatives = [kind for kind in PROBES if kind in known]
    config.reward.negatives_share = source.patch_share
    again = replace(node, config=config, patch_of=node)
    node.name = UNPATCHED + node.name.removeprefix("reward")
    return again


def undecided(plan: Plan) -> list[Node]:
    """What has to be trained before the plan can say which reward models gate=patch trains again, in order."""
    source = source_of(plan.nodes)
    if source is None or source.gate != "patch":
        return []
    asked = [
        node
        for node in plan.nodes
        if node.name in proxies(source) and node in plan.missing and node.patch_of is None
    ]
    below = [parent for node in asked for parent in node.parents.values()]
    return [node for node in plan.missing if node in below or node in asked]


def lines(plan: Plan) -> Iterator[str]:
    """The plan's lines about the gate."""
    if undecided(plan):
        yield "gate   = patch, once the reward model is trained and probed"
    for node in plan.nodes:
        if node.patch_of is not None:
            kinds = ", ".join(node.config.reward.negatives)
            yield f"gate   = patch: {node.name} {node.key[:6]} is trained against {kinds} too"


# ---------------------------------------------------------------- warn and fail


def check(plan: Plan) -> None:
    """InputError where something is to learn from scores, and a model that is there must not give them.

    gate=fail: for any probe above its limit; gate=patch: for scores that say nothing.
    """
    source = source_of(plan.nodes)
    if source is None or source.gate not in ("fail", "patch") or not _learning(plan):
        return
    problems = []
    for node in _models(plan, source):
        if node.folder is None:
            continue
        report, name = report_of(node, plan.config.output_dir), f"{node.name} {node.key[:6]}"
        if report is not None and (wrong := useless(report)):
            problems.append(f"reward_source.gate={source.gate}: {name} {wrong}{_instead(node)}")
        elif source.gate == "patch":
            continue
        elif report is None:
            problems.append(
                f"reward_source.gate=fail: {name} was not probed: run stage=probe adapters.reward={node.folder} first"
            )
        elif found := failures(report, source.limits):
            problems.append(
                f"reward_source.gate=fail: {name} scores too many of these above the real answer: "
                f"{', '.join(map(str, found))}"
                f"{_of_how_many(report)}: set reward_source.gate=patch to train it again against them, or "
                f"raise reward_source.limits.{found[0].kind}{' and so on' if found[1:] else ''}"
            )
    if problems:
        raise InputError(problems)


def notes(plan: Plan) -> Iterator[str]:
    """Lines on each reward model that is about to be trained on: what its probes found."""
    source = source_of(plan.nodes)
    if source is None or source.gate == "off" or not _learning(plan):
        return
    for node in _models(plan, source):
        report, name = report_of(node, plan.config.output_dir), f"{node.name} {node.key[:6]}"
        if report is None:
            yield f"gate: {name} was not probed: stage=probe adapters.reward={node.folder} would"
        elif wrong := useless(report):
            yield f"gate: {name} {wrong}{_instead(node)}"
        elif found := failures(report, source.limits):
            advice = (
                "" if source.gate == "patch" else "; reward_source.gate=patch trains it again against them"
            )
            yield (
                f"gate: {name} scores too many of these above the real answer: {', '.join(map(str, found))}"
                f"{_of_how_many(report)}{advice}"
            )
        else:
            yield f"gate: {name}: all probes are within their limits{_of_how_many(report)}"


def _instead(node: Node) -> str:
    what = f"give another {node.setting}" if node.given else "train it again with other settings"
    return f", from which nothing can be learned: {what}"


def _of_how_many(report: Mapping[str, Any]) -> str:
    return f" (stage=probe, {report['probed']} pairs)" if "probed" in report else ""


def _models(plan: Plan, source: RewardSource) -> list[Node]:
    """Those of the policy that is trained next: each round of prefer, reward and ppo has its own (rounds.py)."""
    learner = next((node for node in plan.missing if node.stage in TRAINED), None)
    dot, number = learner.name.partition(".")[1:] if learner else ("", "")
    names = {f"{role}{dot}{number}" for role in proxies(source)}
    return [node for node in plan.nodes if node.name in names]


def _learning(plan: Plan) -> bool:
    return any(node.stage in TRAINED for node in plan.missing)


# ---------------------------------------------------------------- before and after


def changes(node: Node) -> dict[str, Any] | None:
    """What a patch changed: both reports and, pair by pair, the accuracy on real pairs; None for other nodes."""
    if node.patch_of is None:
        return None
    before, after = (report_of(each, each.config.output_dir) for each in (node.patch_of, node))
    if before is None or after is None:
        return None
    return {
        "kinds": node.config.reward.negatives,
        "keys": {"before": node.patch_of.key, "after": node.key},
        "accuracy": accuracy_change(before, after),
        "before": before,
        "after": after,
    }


def accuracy_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy on the same validation pairs, and its difference with the paired 95 % interval, prompts resampled."""
    from rlhf_exp.evaluation.interval import paired_bootstrap
    from rlhf_exp.probes.measure import right

    rows = [report.get("validation") or report["real"] for report in (before, after)]
    if [row["id"] for row in rows[0]] != [row["id"] for row in rows[1]]:
        return None
    then, now = ([right(row["chosen"], row["rejected"]) for row in each] for each in rows)
    prompts = [row["id"] for row in rows[0]]
    difference = paired_bootstrap(then, now, prompts)
    n = len(then)
    found = {"pairs": n, "prompts": len(set(prompts)), "before": sum(then) / n, "after": sum(now) / n}
    return found | {"difference": difference._asdict()}


def show(plan: Plan) -> None:
    """Print the tables and the accuracies of what was patched."""
    for node in plan.nodes:
        if (found := changes(node)) is None:
            continue
        from rich.console import Console

        from rlhf_exp.probes.show import table

        limits = asdict(source_of(plan.nodes).limits)
        print(
            f"gate: {node.name} {node.key[:6]} in place of {node.patch_of.key[:6]}, trained against ", end=""
        )
        print(", ".join(found["kinds"]), flush=True)
        Console().print(table(found["after"], limits, found["before"]))
        if accuracy := found["accuracy"]:
            d = accuracy["difference"]
            sure = f"95 %: {d['low']:+.3f} to {d['high']:+.3f}"
            if math.isnan(d["low"]):
                sure = "too few prompts for an interval"
            print(
                f"accuracy on {accuracy['pairs']} real pairs of {accuracy['prompts']} prompts: "
                f"{accuracy['before']:.3f} before, {accuracy['after']:.3f} after; "
                f"difference {d['mean']:+.3f} ({sure})",
                flush=True,
            )


def keep(node: Node, folder: RunFolder) -> None:
    """gate/gate.json and gate/gate.png in the run that stands on a patched reward model."""
    found = {name: changes(parent) for name, parent in node.parents.items()}
    found = {name: change for name, change in found.items() if change is not None}
    if not found or node.stage not in TRAINED:
        return
    from rlhf_exp.probes.show import write_picture

    limits = asdict(node.config.reward_source.limits)
    with folder.publish(GATE) as path:
        text = json.dumps(plain(found), indent=1, allow_nan=False, ensure_ascii=False)
        (path / "gate.json").write_text(text + "\n", encoding="utf-8")
        for name, change in found.items():
            write_picture(path / f"{name}.png", change["after"], limits, change["before"])
