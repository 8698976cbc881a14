"""Which stages a command needs, what each stands on, and which are there already.

Every upstream config is composed and every input hashed here, before anything is loaded or trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_exp import compose
from rlhf_exp.data.load import fingerprint
from rlhf_exp.errors import InputError
from rlhf_exp.model import base as base_model
from rlhf_exp.schema import VIEW, EvalRun, PPORun, Run
from rlhf_exp.stages import STAGES, adapters
from rlhf_exp.store.keys import run_key
from rlhf_exp.store.runs import RunFolder, find

ORDER = ("sft", "reward", "ppo", "eval")  # each stage comes after all that it can stand on
NO_SFT = "base"  # adapters.sft=base: the plain base takes the SFT model's place


@dataclass
class BaseFacts:
    """The base model as the plan sees it, before it is loaded."""

    folder: Path | None  # None: a hub model that is not on this machine
    hash: str
    dtype: str
    device: str


@dataclass
class Node:
    """One stage of the plan: trained here, found finished, or given as an adapter."""

    stage: str
    config: Run | None
    parents: dict[str, Node] = field(default_factory=dict)
    given: Path | None = None
    key: str = ""
    data: dict[str, str] = field(default_factory=dict)  # view -> fingerprint
    inputs: dict[str, Any] = field(default_factory=dict)
    found: RunFolder | None = None

    @property
    def folder(self) -> Path | None:
        """Where its result is, if it is there."""
        return self.given or (self.found.path if self.found else None)

    @property
    def is_base(self) -> bool:
        return self.stage == "sft" and self.config is None and self.given is None

    def __str__(self) -> str:
        if self.is_base:
            return "no sft adapter"
        if self.given:
            return f"{self.stage} {self.key[:6]} (given: {self.given})"
        return f"{self.stage} {self.key[:6]} ({'cached' if self.found else 'will be trained'})"


@dataclass
class Plan:
    target: Node
    nodes: list[Node]  # in the order in which they can be built
    base: BaseFacts
    config: Run

    @property
    def missing(self) -> list[Node]:
        return [node for node in self.nodes if not (node.folder or node.is_base)]

    def lines(self) -> Iterator[str]:
        """The plan for people, a line for each role of the target stage and for each stage to build."""
        name = self.config.model.name
        here = self.base.hash[:6] if self.base.folder else "(not on this machine)"
        yield f"base   = {name} {here}, {self.base.dtype} on {self.base.device}"
        nodes = {node.stage: node for node in self.nodes}
        sft, reward, ppo = (nodes.get(stage) for stage in ("sft", "reward", "ppo"))
        if ppo or self.target.stage == "ppo":
            yield f"policy = base {name} + {sft}, trained on"
            yield f"ref    = base {name} + {sft}, frozen" if not sft.is_base else f"ref    = base {name}"
            source = (ppo or self.target).config
            if source is not None:
                function = f"the rule {source.reward_source.function}"
                yield "reward = " + (f"base {name} + {reward}, frozen" if reward else function)
                own = (
                    "its own adapter and head" if source.ppo.critic == "own" else "head on the policy's trunk"
                )
                yield f"critic = {own}"
        for node in self.nodes:
            if not node.is_base:
                yield f"stage    {node}"


def needs(stage: str, config: Run) -> tuple[str, ...]:
    """The stages that `stage` stands on."""
    if stage in ("sft", "reward"):
        return ()
    assert isinstance(config, PPORun | EvalRun)
    reward = ("reward",) if config.reward_source.kind == "learned" else ()
    return ("sft", *reward) if stage == "ppo" else ("sft", *reward, "ppo")


def make(config: Run, choices: dict[str, str]) -> Plan:
    """Compose, check and hash everything that `config` needs. Raises InputError with every problem."""
    stage, problems = config.stage, []
    if stage == "pipeline":
        stage = "eval"
        target_config, _ = compose.upstream("eval", config, choices)
    else:
        target_config = config
    nodes: dict[str, Node] = {}
    # from the target down: a stage asks for what it stands on
    for name in ORDER[ORDER.index(stage) :: -1]:
        if name == stage or any(name in needs(n.stage, n.config) for n in nodes.values() if n.config):
            try:
                nodes[name] = _node(name, stage, config, target_config, choices)
            except InputError as error:
                problems += error.problems
    nodes = {name: nodes[name] for name in ORDER if name in nodes}
    try:
        base = base_facts(config, download=False)
    except InputError as error:
        problems += error.problems
    for node in nodes.values():
        try:
            if node.config is not None:
                node.data = {VIEW[node.stage]: fingerprint(node.config.dataset, VIEW[node.stage])}
            elif node.given:
                node.key = adapters.content_key(node.stage, node.given)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(dict.fromkeys(problems))
    if base.folder is None and not config.dry_run:
        base = base_facts(config, download=True)  # gigabytes: only now that the rest is sound
    for node in nodes.values():
        if node.config is not None:
            node.parents = {name: nodes[name] for name in needs(node.stage, node.config)}
            _identify(node, base, fresh=config.resume == "never" and config.stage in (node.stage, "pipeline"))
    return Plan(nodes[stage], list(nodes.values()), base, config)


def _node(name: str, target: str, config: Run, target_config: Run, choices: dict[str, str]) -> Node:
    if name == target:
        return Node(name, target_config)
    given = getattr(config.adapters, name)
    if name == "sft" and given == NO_SFT:
        return Node(name, None)
    if given:
        return Node(name, None, given=adapters.locate(name, given, config.tracking, config.output_dir))
    return Node(name, compose.upstream(name, config, choices)[0])


def base_facts(config: Run, download: bool) -> BaseFacts:
    """Find (or, for a hub model, fetch) the base and hash it."""
    folder = base_model.resolve(config.model, download=download)
    device = base_model.resolve_device(config.device)
    dtype = base_model.resolve_dtype(config.model.dtype, device)
    if folder is None:
        return BaseFacts(None, f"hub:{config.model.path}@{config.model.revision}", dtype, device)
    return BaseFacts(folder, base_model.content_hash(folder), dtype, device)


def _identify(node: Node, base: BaseFacts, fresh: bool) -> None:
    """The node's key, what goes into it, and the finished run with that key."""
    parents = {name: parent.key if not parent.is_base else NO_SFT for name, parent in node.parents.items()}
    node.key = run_key(
        node.config,
        dtype=base.dtype,
        base=base.hash,
        data=node.data,
        parents=parents,
        version=STAGES[node.stage].version,
    )
    node.inputs = {
        "base": {"name": node.config.model.name, "hash": base.hash, "dtype": base.dtype},
        "data": node.data,
        "parents": {
            name: {"stage": name, "key": parents[name], "path": parent.folder}
            for name, parent in node.parents.items()
        },
    }
    node.found = None if fresh else find(node.config.output_dir, node.stage, node.key)
