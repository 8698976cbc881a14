"""Where stage=prefer stands in a plan: who asks for it, what it asks for, and how prefer, reward and ppo alternate.

    sft -> prefer.1 -> reward.1 -> ppo.1 -> prefer.2 -> ... -> ppo.2 -> prefer -> reward -> ppo     (prefer.rounds=3)

A node of a round before the last has the round's number in its name, of the last none, so that whoever looks for
`reward` finds the one that counts. Round 0 is what prefer.policies=[ppo] asks for: a policy by the data's own
comparisons. Keys know parents by role, not by name: the first two of three rounds are the two of rounds=2. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_exp import compose
from rlhf_exp.data import labels
from rlhf_exp.errors import InputError
from rlhf_exp.rewards import parts
from rlhf_exp.schema import (
    GOLD,
    JUDGE,
    LABELLER,
    LEARNED,
    POLICY,
    PREFER,
    TRAINED,
    PPORun,
    Prefer,
    PreferRun,
    Run,
    labelled,
    rules_of,
    stage_of,
)
from rlhf_exp.stages import adapters, gate
from rlhf_exp.stages.context import START

if TYPE_CHECKING:
    from rlhf_exp.stages.nodes import Node, Plan

# roles in a round whose node is of the round before: the comparisons so far, and the policy to go on from
EARLIER = "earlier"
OF = {EARLIER: PREFER, START: "ppo"}
KNOWN = ("sft", "base", *TRAINED)  # what prefer.policies names instead of a folder
TOP = math.inf

Nodes = Mapping[str, "Node"]


def round_of(name: str) -> float:
    """The number in a node's name; TOP where there is none."""
    number = name.partition(".")[2]
    return int(number) if number else TOP


def rank(name: str, order: tuple[str, ...]) -> tuple[float, int]:
    """Sorts nodes so that each comes after all that it can stand on; order: the stages of one round."""
    if stage_of(name) == "sft":
        return -2, 0
    return (-1 if name == LABELLER else round_of(name)), order.index(stage_of(name))


def count(nodes: Nodes) -> int:
    """How many rounds there are: the top policy says."""
    ppo = nodes.get("ppo")
    return ppo.config.prefer.rounds if ppo is not None and isinstance(ppo.config, PPORun) else 1


def roles(name: str, config: Run, nodes: Nodes, new_base: bool) -> list[str]:
    """What a node asks for because of labels, beside what its stage needs anyway."""
    found = [PREFER] if labelled(config) else []
    number = min(round_of(name), count(nodes))
    if isinstance(config, PPORun) and config.prefer.start == "last" and number > 1:
        found.append(START)
    if isinstance(config, PreferRun):
        found += ["sft"] * new_base
        found += filter(None, (policy_role(*each) for each in enumerate(config.prefer.policies)))
        found += [LABELLER] * (LEARNED in config.prefer.labellers)
        found += [EARLIER] * (number > 1 and config.prefer.keep == "union")
    return found


def policy_role(place: int, policy: str) -> str | None:
    """The role of what prefer.policies has at `place`; None for the plain base."""
    if policy == "base":
        return None
    return policy if policy in KNOWN else f"{POLICY}{place}"


def place(role: str, asker: str, nodes: Nodes) -> str:
    """The name of the node that has `role` for the node `asker`."""
    if stage_of(role) == "sft" or role in (GOLD, LABELLER):
        return role
    rounds = count(nodes)
    number = int(min(round_of(asker), rounds))
    if role in OF or (stage_of(asker) == PREFER and role in TRAINED):
        number -= 1
    elif number == rounds and round_of(asker) == TOP:
        return role
    name = OF.get(role, role)
    return f"{name}.{number}"


def setting(name: str, target: str) -> str:
    """The key of `adapters` for a node: stage=prefer's own policies are given as such."""
    return name.removesuffix(".0") if target == PREFER else name


def config_of(name: str, config: Run, choices: dict[str, str], nodes: Nodes, half: str | None) -> Run:
    """The config of a node that is neither target nor given, of whatever round."""
    stage, number = stage_of(name), round_of(name)
    if stage in TRAINED and 0 < number < TOP:
        return deepcopy(nodes[stage].config)
    if stage != PREFER:
        return compose.upstream(name, config, choices, half)[0]
    ppo = nodes.get("ppo")
    parent = ppo.config if ppo is not None and ppo.config is not None else config
    found, _ = compose.upstream(PREFER, parent, choices)
    found.prefer.round = int(min(number, count(nodes)))
    if found.prefer.round > 1:
        found.prefer.policies = ["ppo"]
    return found


def given_policy(name: str, nodes: Nodes, config: Run) -> tuple[str, str]:
    """(config key, folder) of a node that prefer.policies gives."""
    number = int(name.removeprefix(POLICY))
    asking = (n.config.prefer.policies for n in nodes.values() if isinstance(n.config, PreferRun))
    return f"prefer.policies[{number}]", next(
        p[number] for p in asking if len(p) > number and p[number] not in KNOWN
    )


def problems(nodes: Nodes, target: Node | None) -> Iterator[str]:
    """What only the whole plan shows to be wrong."""
    if target is None:
        return
    if isinstance(target.config, PreferRun) and target.config.prefer.rounds > 1:
        yield "prefer.rounds is of stage=ppo and pipeline, in which prefer, reward and ppo alternate: leave it out"
    ppo = nodes.get("ppo")
    rounds = count(nodes)
    if rounds > 1 and "prefer.1" not in nodes:
        yield (
            f"prefer.rounds={rounds} trains a reward model on comparisons of stage=prefer in each round: set "
            "dataset.comparisons_from=prefer, a learned reward_source, and no adapters.reward"
        )
    if rounds > 1 and ppo.config.reward_source.gate == "patch":
        yield f"reward_source.gate=patch cannot be had with prefer.rounds={rounds}: choose warn, fail or off"


def fingerprints(config: Run) -> dict[str, str]:
    """{key: fingerprint} of what labels and is not in the config: the judge's weights."""
    if not isinstance(config, PreferRun) or JUDGE not in config.prefer.labellers:
        return {}
    from rlhf_exp.rewards import judge

    if not config.judge.model:
        raise InputError("judge.model is not set: a folder or hub id of a model that can judge, or base")
    return {"judge.model": judge.fingerprint(config.judge, "own base")}


def with_labels(node: Node) -> Run:
    """The node's config with the path of the comparisons that its parent has made."""
    if PREFER not in node.parents:
        return node.config
    data = node.config.dataset
    file = str((node.parents[PREFER].folder / labels.FILE).absolute())
    return replace(node.config, dataset=replace(data, views=replace(data.views, comparisons=file)))


def locate(name: str, nodes: Nodes, config: Run) -> Node:
    """The node of an adapter that prefer.policies gives."""
    from rlhf_exp.stages.nodes import Node

    key, given = given_policy(name, nodes, config)
    if not given.startswith((".", "/", "~", "runs:/")) and "/" not in given:
        raise InputError(
            f"{key}={given}: policies are {', '.join(KNOWN)}, or the folder of a run or adapter (./{given})"
        )
    return Node(
        name, None, given=adapters.locate("sft", given, config.tracking, config.output_dir, key), setting=key
    )


def lines(plan: Plan) -> Iterator[str]:
    """The plan's lines about labels, and what had better not be."""
    asking = [node for node in plan.nodes if isinstance(node.config, PreferRun)]
    if asking:
        number = len(asking)
        later = f"; in rounds 2 to {number} by the last round's policy" if number > 1 else ""
        yield f"labels = {said(asking[0].config.prefer)}{later}"
    ruled = {rule for node in asking for rule in rules_of(node.config.prefer).values()}
    yield from same_as_reward(plan)
    judges = {node.config.judge.model for node in asking if JUDGE in node.config.prefer.labellers}
    for key, rule in golds(plan):
        if rule in ruled or (key == "judge.model" and rule in judges):
            yield (
                f"note: {key}={rule} also labels the comparisons (prefer.labellers), so that it cannot show whether "
                "the policy games its labeller: choose another gold"
            )


def same_as_reward(plan: Plan) -> Iterator[str]:
    """A note on each gold that is a part of the reward: what is trained on cannot show that it is gamed."""
    source = gate.source_of(plan.nodes)
    rewarded = {part.spec for part in parts.readable(source)[0]} - {LEARNED} if source else set()
    for key, rule in golds(plan):
        if key in ("eval.gold", "reward_source.gold") and rule in rewarded:
            yield (
                f"note: {key}={rule} is also the reward, or a part of it (reward_source), so that it cannot show "
                "whether the policy games its reward: choose another gold"
            )


def said(prefer: Prefer) -> str:
    """Who labels what, for people."""
    first, *others = prefer.labellers
    compared = f", compared with {', '.join(others)}" if others else ""
    each = "each of " if len(prefer.policies) > 1 else ""
    return f"{first}{compared}; {prefer.samples} answers a prompt by {each}{', '.join(prefer.policies)}"


def golds(plan: Plan) -> Iterator[tuple[str, str]]:
    """(config key, spec) of the plan's gold scorers."""
    found = {}
    for node in plan.nodes:
        if hasattr(node.config, "eval"):
            found["eval.gold"], found["eval.judge"] = node.config.eval.gold, node.config.eval.judge
        if hasattr(node.config, "reward_source"):
            found.setdefault("reward_source.gold", node.config.reward_source.gold)
        if found.get("eval.judge") == "model" and hasattr(node.config, "judge"):
            found["judge.model"] = node.config.judge.model
    yield from found.items()
