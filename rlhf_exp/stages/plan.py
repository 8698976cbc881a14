"""Which stages a command needs, what each stands on, and which are there already.

Every upstream config is composed and every input hashed here, before anything is loaded or trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from rlhf_exp import compose
from rlhf_exp.data.load import fingerprint
from rlhf_exp.errors import InputError
from rlhf_exp.model import base as base_model
from rlhf_exp.model import quantize
from rlhf_exp.rewards import functions
from rlhf_exp.schema import (
    COMPARED,
    GOLD,
    LEARNED,
    POLICY,
    EvalRun,
    ILQLRun,
    PPORun,
    RFTRun,
    Run,
    data_views,
    member_of,
    proxies,
    samples_sft,
    stage_of,
)
from rlhf_exp.stages import STAGES, adapters, data_answers, gate, policies, rounds
from rlhf_exp.stages.context import MODEL
from rlhf_exp.stages.nodes import BaseFacts, Node, Plan
from rlhf_exp.store.keys import run_key
from rlhf_exp.store.runs import RunFolder, find

# each stage comes after all that it can stand on
ORDER = ("sft", "prefer", "reward", "probe", "ppo", "ilql", "dpo", "kto", "rft", "eval", "export")
# halves of the comparisons: for COMPARING, for the gold scorer that judges what comes of them
FIRST, SECOND = "first", "second"
COMPARING = ("reward", "dpo", "kto")
NO_SFT = "base"  # adapters.sft=base: the plain base takes the SFT model's place


def needs(stage: str, config: Run, new_base: bool = False) -> tuple[str, ...]:
    """The roles of what `stage` stands on. new_base: sft trains all weights, so that its result is the base."""
    if stage in ("sft", "prefer"):  # what prefer stands on depends on the round: rounds.py
        return ()
    if stage in ("dpo", "kto"):
        return ("sft",)
    if stage == "reward":
        return ("sft",) if new_base or samples_sft(config) else ()
    if stage == "probe":
        return ("sft", "reward") if new_base else ("reward",)
    if stage == "export":
        return tuple(dict.fromkeys([*["sft"] * new_base, config.export.role]))
    assert isinstance(config, PPORun | ILQLRun | RFTRun | EvalRun)
    gold = config.eval.gold if isinstance(config, EvalRun) else config.reward_source.gold
    scorers = (*proxies(config.reward_source), *([GOLD] if gold == LEARNED else []))
    return ("sft", *scorers, *policies.roles(config.eval)) if stage == "eval" else ("sft", *scorers)


def make(config: Run, choices: dict[str, str], built: Mapping[str, RunFolder] | None = None) -> Plan:
    """Compose, check and hash everything that `config` needs. Raises InputError with every problem.

    built: key -> run that this command has made already, which resume=never would not find.
    """
    stage, problems = config.stage, []
    if stage == "pipeline":
        stage = "eval"
        target_config, _ = compose.upstream("eval", config, choices)
    else:
        target_config = config
    nodes: dict[str, Node] = {}
    new_base = _makes_base(config, choices)
    todo, seen = [stage], {stage}
    while todo:  # from the target down: a stage asks for what it stands on
        name = max(todo, key=_rank)
        todo.remove(name)
        try:
            half = _half(name, nodes)
            nodes[name] = _node(name, stage, config, target_config, choices, half, nodes)
        except InputError as error:
            problems += error.problems
            continue
        asked = [place for place in _parents(nodes[name], nodes, new_base).values() if place not in seen]
        todo += dict.fromkeys(asked)
        seen |= set(asked)
    nodes = {name: nodes[name] for name in sorted(nodes, key=_rank)}
    problems += rounds.problems(nodes, nodes.get(stage))
    if isinstance(target_config, EvalRun):
        problems += policies.problems(target_config.eval)
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
                views = data_views(node.config)
                node.data = {view: fingerprint(node.config.dataset, view) for view in views}
                node.data |= data_answers.fingerprints(node.config)
                node.functions = functions.fingerprints(node.config) | rounds.fingerprints(node.config)
                node.functions |= policies.contents(node.config, nodes)
            elif node.given:
                node.key = adapters.content_key(node.stage, node.given)
        except InputError as error:
            problems += error.problems
    problems += _shared_comparisons(nodes)
    if stage in ("sft", "prefer", "reward", "probe", "dpo", "kto", "export"):
        used = {rounds.setting(name, stage) for name in seen}  # also what was asked for and is not there
        problems += [
            f"adapters.{name} is for stages that stand on {name}, which {stage} does not: leave it out"
            for name in ("sft", "reward", "labeller", "ppo", "dpo", "kto", "rft", "ilql")
            if getattr(config.adapters, name) and name not in used
        ]
    if problems:
        raise InputError(dict.fromkeys(problems))
    if base.folder is None and not config.dry_run:
        base = base_facts(config, download=True)  # gigabytes: only now that the rest is sound
    ordered: list[Node] = []
    for node in list(nodes.values()):
        if node.config is not None:
            node.parents = {role: nodes[name] for role, name in _parents(node, nodes, new_base).items()}
            node.base = _base_of(node, nodes.get("sft"), base)
            fresh = config.resume == "never" and config.stage in (node.name, "pipeline")
            _identify(node, fresh, built or {})
            if again := gate.patched(node, nodes):
                _identify(again, fresh, built or {})
                ordered.append(node)
                node = nodes[again.name] = again
        ordered.append(node)
    return Plan(nodes[stage], ordered, base, config)


def _rank(name: str) -> tuple[float, int]:
    return rounds.rank(name, ORDER)


def _parents(node: Node, nodes: Mapping[str, Node], new_base: bool) -> dict[str, str]:
    """{role: name of the node that has it} of what a node stands on."""
    if node.config is None:
        return {}
    asked = (
        *needs(node.stage, node.config, new_base),
        *rounds.roles(node.name, node.config, nodes, new_base),
    )
    return {role: rounds.place(role, node.name, nodes) for role in asked}


def _half(name: str, nodes: dict[str, Node]) -> str | None:
    """The half of the comparisons that a stage is trained on; None: all, there is no gold to be kept apart."""
    if name == GOLD:
        return SECOND
    sources = (n.config.reward_source for n in nodes.values() if hasattr(n.config, "reward_source"))
    return FIRST if stage_of(name) in COMPARING and any(s.gold == LEARNED for s in sources) else None


def _shared_comparisons(nodes: dict[str, Node]) -> Iterator[str]:
    """That gold and what it is to judge are trained on the same rows, because of what `upstream` says."""
    gold = nodes.get(GOLD)
    rivals = (node for node in nodes.values() if node.stage in COMPARING and node is not gold)
    for node in rivals if gold else ():
        if not node.data or node.data != gold.data:
            continue
        halves = [each.config.dataset.half for each in (node, gold)]
        if set(halves) != {FIRST, SECOND}:
            ours, golds = ("null" if half is None else half for half in halves)
            yield (
                f"reward_source.gold=learned needs comparisons that {node.name} is not trained on, but "
                f"dataset.half is {ours} in upstream.{node.name} and {golds} in upstream.gold: leave them out"
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
    nodes: dict[str, Node],
) -> Node:
    if name == target:
        return Node(name, target_config)
    if name.startswith(POLICY):
        return rounds.locate(name, nodes, config)
    if name.startswith(COMPARED):
        folder, setting = policies.locate(name, target_config, config.tracking, config.output_dir)
        return Node(name, None, given=folder, setting=setting)
    member, ensemble = member_of(name), config.adapters.reward_ensemble
    if member is not None and ensemble:
        setting, given = "adapters.reward_ensemble", ensemble[member]
    else:
        own = rounds.setting(name, target)
        setting, given = f"adapters.{own}", getattr(config.adapters, own, None)
    if name == "sft" and given == NO_SFT:
        return Node(name, None)
    if given:
        folder = adapters.locate(stage_of(name), given, config.tracking, config.output_dir, setting)
        return Node(name, None, given=folder, setting=setting)
    return Node(name, rounds.config_of(name, config, choices, nodes, half))


def base_facts(config: Run, download: bool) -> BaseFacts:
    """Find (or, for a hub model, fetch) the base and hash it."""
    folder = base_model.resolve(config.model, download=download)
    if config.dry_run and config.memory.device != "auto":  # a plan for another machine's device
        device = config.memory.device
        dtype = "bfloat16" if device == "cuda" else base_model.resolve_dtype("auto", device)
        dtype = dtype if config.model.dtype == "auto" else config.model.dtype
    else:
        device = base_model.resolve_device(config.device)
        quantize.require(config.model, device)
        dtype = base_model.resolve_dtype(config.model.dtype, device)
    if folder is None:
        return BaseFacts(None, f"hub:{config.model.path}@{config.model.revision}", dtype, device)
    return BaseFacts(folder, base_model.content_hash(folder, config.model, config.seed), dtype, device)


def _identify(node: Node, fresh: bool, built: Mapping[str, RunFolder]) -> None:
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
    node.found = built.get(node.key) or (
        None if fresh else find(node.config.output_dir, node.stage, node.key)
    )
