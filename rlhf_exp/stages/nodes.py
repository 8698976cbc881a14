"""What a plan is: stages as nodes, each with what it stands on, and how it is said to people; plan.py makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_exp.model import shapes
from rlhf_exp.rewards import functions, parts
from rlhf_exp.schema import GOLD, LEARNED, PPORun, RewardSource, RFTRun, Run, proxies, stage_of
from rlhf_exp.stages import gate, rounds
from rlhf_exp.stages.context import START
from rlhf_exp.store.runs import RunFolder


@dataclass
class BaseFacts:
    """A base model as the plan sees it, before it is loaded."""

    folder: Path | None  # None: a hub model that is not on this machine
    hash: str
    dtype: str
    device: str


@dataclass
class Node:
    """One stage of the plan: trained here, found finished, or given as an adapter.

    name: its role, which tells apart several of one stage: reward, reward_1, gold.
    """

    name: str
    config: Run | None
    parents: dict[str, Node] = field(default_factory=dict)
    given: Path | None = None
    setting: str = ""  # the config key that gives it
    key: str = ""
    data: dict[str, str] = field(default_factory=dict)  # view -> fingerprint
    functions: dict[str, str] = field(default_factory=dict)  # key of a scoring function -> fingerprint
    inputs: dict[str, Any] = field(default_factory=dict)
    found: RunFolder | None = None
    base: BaseFacts | None = (
        None  # what it is loaded on; the folder of a base that sft is still to make is None
    )
    patch_of: Node | None = None  # the reward model in whose place it is (gate.py)

    @property
    def stage(self) -> str:
        return stage_of(self.name)

    @property
    def folder(self) -> Path | None:
        """Where its result is, if it is there."""
        return self.given or (self.found.path if self.found else None)

    @property
    def is_base(self) -> bool:
        return self.stage == "sft" and self.config is None and self.given is None

    @property
    def makes_base(self) -> bool:
        """Whether all weights are trained, so that the result is a new base and not an adapter."""
        return self.stage == "sft" and self.config is not None and self.config.lora.full

    def __str__(self) -> str:
        if self.is_base:
            return "no sft adapter"
        if self.given:
            return f"{self.name} {self.key[:6]} (given: {self.given})"
        return f"{self.name} {self.key[:6]} ({'cached' if self.found else 'will be trained'})"


@dataclass
class Plan:
    target: Node
    nodes: list[Node]  # in the order in which they can be built
    base: BaseFacts
    config: Run

    @cached_property
    def shapes(self) -> shapes.Shapes:
        """The weights of the base, which sft may train all of but does not reshape."""
        folder = self.base.folder
        if self.config.model.from_scratch and not any(folder.glob("*.safetensors")):
            return shapes.of_config(folder)
        return shapes.of_model(folder)

    @property
    def missing(self) -> list[Node]:
        return [node for node in self.nodes if not (node.folder or node.is_base)]

    def lines(self) -> Iterator[str]:
        """The plan for people, a line for each role of the target stage and for each stage to build."""
        name, template = self.config.model.name, self.config.model.template
        if template != "plain" and self.config.dataset.template.name != template:
            yield (
                f"note: {name} was tuned with the template {template}; dataset/template is "
                f"{self.config.dataset.template.name}"
            )
        here = self.base.hash[:6] if self.base.folder else "(not on this machine)"
        yield f"base   = {name} {here}, {self.base.dtype} on {self.base.device}"
        nodes = {node.name: node for node in self.nodes}
        sft, ppo = nodes.get("sft"), nodes.get("ppo")
        policy = ppo or self.target.stage in ("ppo", "dpo", "kto", "rft")
        if sft is not None and policy:  # export may be given a policy alone
            if sft.makes_base:
                name = f"all weights of {sft}"
                yield f"policy = base ({name}) + a new adapter, trained"
                yield f"ref    = base ({name})"
            else:
                yield f"policy = base {name} + {(ppo or self.target).parents.get(START, sft)}, trained on"
                if self.target.stage != "rft":  # which has no reference
                    yield (
                        f"ref    = base {name} + {sft}, frozen"
                        if not sft.is_base
                        else f"ref    = base {name}"
                    )
            source = (ppo or self.target).config
            if isinstance(source, PPORun):
                yield from _scorers(source.reward_source, name, nodes)
                own = (
                    "its own adapter and head" if source.ppo.critic == "own" else "head on the policy's trunk"
                )
                if source.ppo.estimator != "gae":
                    own = f"none, {source.ppo.estimator} compares answers"
                yield f"critic = {own}"
            elif isinstance(source, RFTRun):
                yield from _scorers(source.reward_source, name, nodes)
        yield from rounds.lines(self)
        yield from gate.lines(self)
        for node in self.nodes:
            if not node.is_base:
                yield f"stage    {node}"


def _scorers(source: RewardSource, base: str, nodes: dict[str, Node]) -> Iterator[str]:
    """The plan's lines of what scores answers."""
    models = [str(nodes[role]) for role in proxies(source)]
    if models:
        each = "each of " if len(models) > 1 else ""
        learned = f"base {base} + {each}{', '.join(models)}"
        yield f"reward = {parts.said(source, learned)}, frozen"
    else:
        yield f"reward = the rule {parts.said(source)}"
    if source.gold == LEARNED:
        yield f"gold   = base {base} + {nodes[GOLD]}, frozen"
    elif source.gold != functions.NONE:
        yield f"gold   = the rule {source.gold}"
