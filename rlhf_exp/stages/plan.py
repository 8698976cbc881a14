"""Which stages a command needs, what each stands on, and which are there already.

Every upstream config is composed and every input hashed here, before anything is loaded or trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_exp import compose
from rlhf_exp.data.load import fingerprint
from rlhf_exp.errors import InputError
from rlhf_exp.model import base as base_model
from rlhf_exp.model import quantize, shapes
from rlhf_exp.rewards import functions, parts
from rlhf_exp.schema import (
    GOLD,
    LEARNED,
    EvalRun,
    ILQLRun,
    PPORun,
    RewardSource,
    Run,
    member_of,
    proxies,
    stage_of,
    views_of,
)
from rlhf_exp.stages import STAGES, adapters
from rlhf_exp.stages.context import MODEL
from rlhf_exp.store.keys import run_key
from rlhf_exp.store.runs import RunFolder, find

ORDER = ("sft", "reward", "ppo", "ilql", "eval")  # each stage comes after all that it can stand on
FIRST, SECOND = "first", "second"  # of the comparisons: for the reward model, for the gold scorer
NO_SFT = "base"  # adapters.sft=base: the plain base takes the SFT model's place


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
        if ppo or self.target.stage == "ppo":
            if sft.makes_base:
                name = f"all weights of {sft}"
                yield f"policy = base ({name}) + a new adapter, trained"
                yield f"ref    = base ({name})"
            else:
                yield f"policy = base {name} + {sft}, trained on"
                yield f"ref    = base {name} + {sft}, frozen" if not sft.is_base else f"ref    = base {name}"
            source = (ppo or self.target).config
            if source is not None:
                yield from _scorers(source.reward_source, name, nodes)
                own = (
                    "its own adapter and head" if source.ppo.critic == "own" else "head on the policy's trunk"
                )
                if source.ppo.estimator != "gae":
                    own = f"none, {source.ppo.estimator} compares answers"
                yield f"critic = {own}"
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


def needs(stage: str, config: Run, new_base: bool = False) -> tuple[str, ...]:
    """The roles of what `stage` stands on. new_base: sft trains all weights, so that its result is the base."""
    if stage == "sft":
        return ()
    if stage == "reward":
        return ("sft",) if new_base else ()
    assert isinstance(config, PPORun | ILQLRun | EvalRun)
    gold = config.eval.gold if isinstance(config, EvalRun) else config.reward_source.gold
    scorers = (*proxies(config.reward_source), *([GOLD] if gold == LEARNED else []))
    return ("sft", *scorers, "ppo") if stage == "eval" else ("sft", *scorers)


def make(config: Run, choices: dict[str, str]) -> Plan:
    """Compose, check and hash everything that `config` needs. Raises InputError with every problem."""
    stage, problems = config.stage, []
    if stage == "pipeline":
        stage = "eval"
        target_config, _ = compose.upstream("eval", config, choices)
    else:
        target_config = config
    nodes: dict[str, Node] = {}
    new_base = _makes_base(config, choices)
    # from the target down: a stage asks for what it stands on
    for each in ORDER[ORDER.index(stage) :: -1]:
        asked = [name for n in nodes.values() if n.config for name in needs(n.stage, n.config, new_base)]
        for name in [stage] if each == stage else dict.fromkeys(n for n in asked if stage_of(n) == each):
            try:
                half = _half(name, nodes)
                nodes[name] = _node(name, stage, config, target_config, choices, half)
            except InputError as error:
                problems += error.problems
    nodes = {name: node for each in ORDER for name, node in nodes.items() if node.stage == each}
    if config.model.from_scratch and not new_base:
        problems.append(
            "model.from_scratch=true gives random weights, which have to be trained first: add "
            + ("lora=full" if stage == "sft" else "'upstream.sft={lora: full}'")
        )
    try:
        base = base_facts(config, download=False)
    except InputError as error:
        problems += error.problems
    for node in nodes.values():
        try:
            if node.config is not None:
                views = views_of(node.config)
                node.data = {view: fingerprint(node.config.dataset, view) for view in views}
                node.functions = functions.fingerprints(node.config)
            elif node.given:
                node.key = adapters.content_key(node.stage, node.given)
        except InputError as error:
            problems += error.problems
    problems += _shared_comparisons(nodes)
    if stage in ("sft", "reward"):
        problems += [
            f"adapters.{name} is for stages that stand on {name}, which {stage} does not: leave it out"
            for name in ("sft", "reward", "ppo")
            if getattr(config.adapters, name) and name not in nodes
        ]
    if problems:
        raise InputError(dict.fromkeys(problems))
    if base.folder is None and not config.dry_run:
        base = base_facts(config, download=True)  # gigabytes: only now that the rest is sound
    for node in nodes.values():
        if node.config is not None:
            node.parents = {name: nodes[name] for name in needs(node.stage, node.config, new_base)}
            node.base = _base_of(node, nodes.get("sft"), base)
            _identify(node, fresh=config.resume == "never" and config.stage in (node.stage, "pipeline"))
    return Plan(nodes[stage], list(nodes.values()), base, config)


def _half(name: str, nodes: dict[str, Node]) -> str | None:
    """The half of the comparisons that a reward model is trained on; None: all, there is no gold to be kept apart."""
    if name == GOLD:
        return SECOND
    sources = (n.config.reward_source for n in nodes.values() if hasattr(n.config, "reward_source"))
    return FIRST if stage_of(name) == "reward" and any(s.gold == LEARNED for s in sources) else None


def _shared_comparisons(nodes: dict[str, Node]) -> Iterator[str]:
    """That reward model and gold scorer are trained on the same rows, because of what `upstream` says."""
    gold = nodes.get(GOLD)
    rivals = (node for node in nodes.values() if node.stage == "reward" and node is not gold)
    for node in rivals if gold else ():
        if not node.data or node.data != gold.data:
            continue
        halves = [each.config.dataset.half for each in (node, gold)]
        if set(halves) != {FIRST, SECOND}:
            ours, golds = ("null" if half is None else half for half in halves)
            yield (
                f"reward_source.gold=learned needs comparisons that the reward model is not trained on, but "
                f"dataset.half is {ours} in upstream.reward and {golds} in upstream.gold: leave them out"
            )


def _makes_base(config: Run, choices: dict[str, str]) -> bool:
    """Whether sft trains all weights. False where its config is wrong: making its node says how."""
    if config.stage == "sft":
        return config.lora.full
    if config.adapters.sft or not config.upstream.sft:
        return False
    try:
        return compose.upstream("sft", config, choices)[0].lora.full
    except InputError:
        return False


def _base_of(node: Node, sft: Node | None, base: BaseFacts) -> BaseFacts:
    """The base that a stage is loaded on: the given one, or the one that sft makes of it."""
    if node.makes_base:
        if (
            node.config.model.from_scratch and base.folder
        ):  # drawn from the seed of sft, which `upstream` may set
            base = replace(
                base, hash=base_model.content_hash(base.folder, node.config.model, node.config.seed)
            )
        return replace(base, dtype="float32")  # small steps would vanish in bfloat16 weights
    if sft is None or not sft.makes_base:
        return base
    return replace(base, folder=sft.folder / MODEL if sft.folder else None, hash=f"sft:{sft.key}")


def _node(
    name: str,
    target: str,
    config: Run,
    target_config: Run,
    choices: dict[str, str],
    half: str | None,
) -> Node:
    if name == target:
        return Node(name, target_config)
    member, ensemble = member_of(name), config.adapters.reward_ensemble
    if member is not None and ensemble:
        setting, given = "adapters.reward_ensemble", ensemble[member]
    else:
        setting, given = f"adapters.{name}", getattr(config.adapters, name, None)
    if name == "sft" and given == NO_SFT:
        return Node(name, None)
    if given:
        folder = adapters.locate(stage_of(name), given, config.tracking, config.output_dir, setting)
        return Node(name, None, given=folder, setting=setting)
    return Node(name, compose.upstream(name, config, choices, half)[0])


def base_facts(config: Run, download: bool) -> BaseFacts:
    """Find (or, for a hub model, fetch) the base and hash it."""
    folder = base_model.resolve(config.model, download=download)
    device = base_model.resolve_device(config.device)
    quantize.require(config.model, device)
    dtype = base_model.resolve_dtype(config.model.dtype, device)
    if folder is None:
        return BaseFacts(None, f"hub:{config.model.path}@{config.model.revision}", dtype, device)
    return BaseFacts(folder, base_model.content_hash(folder, config.model, config.seed), dtype, device)


def _identify(node: Node, fresh: bool) -> None:
    """The node's key, what goes into it, and the finished run with that key."""
    base = node.base
    parents = {name: parent.key if not parent.is_base else NO_SFT for name, parent in node.parents.items()}
    node.key = run_key(
        node.config,
        dtype=base.dtype,
        base=base.hash,
        data=node.data,
        parents=parents,
        version=STAGES[node.stage].version,
        extra=node.functions,
    )
    node.inputs = {
        "base": {"name": node.config.model.name, "hash": base.hash, "dtype": base.dtype},
        "data": node.data,
        "functions": node.functions,
        "parents": {
            name: {"stage": parent.stage, "key": parents[name], "path": parent.folder}
            for name, parent in node.parents.items()
        },
    }
    node.found = None if fresh else find(node.config.output_dir, node.stage, node.key)
