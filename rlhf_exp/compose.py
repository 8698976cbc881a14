"""From overrides to a checked config dataclass; below this there is no Hydra and no OmegaConf.

`compose` and `upstream` work inside a running application (a single run or a trial of a sweep) and on their
own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rlhf_exp import conftree, overrides, schema
from rlhf_exp.errors import InputError
from rlhf_exp.fields import did_you_mean, leaves, value_problem
from rlhf_exp.paths import conf_dir

ROOT = "config"
# what an upstream stage takes over from the run that needs it, as far as both have it
INHERITED = (
    "model",
    "lora",
    "strategy",
    "memory",
    "tracking",
    "seed",
    "output_dir",
    "resume",
    "device",
    "threads",
)
INHERITED += ("adapters", "upstream")
SCORERS = (schema.GOLD, schema.LABELLER)  # reward models that have settings of their own
# roles whose settings come on top of those of their stage
ON_TOP = {**dict.fromkeys(SCORERS, "reward"), schema.RLOO: "ppo"}
GOLD_SEED = 1000  # added to the seed of the gold scorer: past any ensemble's
TEMPLATE = "dataset/template"
COMPOSING = re.compile(r"^In '([^']+)': (?:\w+ raised while composing config: )?")
UNKNOWN_KEY = re.compile(r"(?P<file>\S+\.yaml): Key '[^']+' not in '\w+' \(at (?P<key>\S+)\)")
HYDRA_KEY = re.compile(r"Could not override '(?P<key>hydra\.\S+)'\. Key '[^']+' not in '\w+' \(at \S+\)")
FREE = ("upstream.", f"{overrides.DEEPSPEED}.")
FOR_A_MODEL = ("model", "lora", "strategy")  # groups of config.yaml that not every stage has
POLICY = ("ppo", "generation", "reward_source", "eval", "prefer", "judge")
FROM = "dataset.comparisons_from"
# lines of Hydra's and OmegaConf's messages that do not say what is wrong
ADVICE = ("Available options", "Config search path", "Search path", "See http", "To append to")
TYPES = ("object_type=", "reference_type=")
_frozen: ContextVar[Path | None] = ContextVar("the config tree of the running session", default=None)


@contextmanager
def session(config_dir: str | Path | None = None, frozen: Path | None = None) -> Iterator[Any]:
    """Hydra reading our tree, and `config_dir` after it: the running one if there is one, else a new one.

    frozen: another copy of the tree, which is then ours within the block.
    """
    if _ours_runs(frozen):
        yield GlobalHydra.instance().hydra
        return
    tree = frozen or _frozen.get() or conf_dir()
    launchers = tree.parent / "launchers"
    if launchers.is_dir() and str(launchers) not in sys.path:
        sys.path.append(str(launchers))  # a checkout that is not installed; a wheel has them in hydra_plugins
    schema.register()
    others = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    settings = {"job_name": "rlhf_exp", "version_base": "1.3"}
    with _afterwards(others, tree), hydra.initialize_config_dir(str(tree), **settings):
        loader = GlobalHydra.instance().config_loader()
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise InputError(f"--config-dir {config_dir}: there is no such folder")
            search_path = loader.get_search_path()
            extra = f"file://{Path(config_dir).absolute()}"
            search_path.prepend("command-line", extra, anchor=SearchPathQuery(provider="schema"))
            loader.repository.initialize_sources(search_path)
        yield GlobalHydra.instance().hydra


@contextmanager
def _afterwards(others: Any, tree: Path) -> Iterator[None]:
    """`tree` is ours; afterwards put the Hydra of another application back in its place."""
    token = _frozen.set(tree)
    try:
        yield
    finally:
        _frozen.reset(token)
        GlobalHydra.instance().hydra = others


def _folders() -> list[Path]:
    """The config trees of the running Hydra, without its own and the schemas."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    return [Path(source.path) for source in sources if source.scheme() == "file"]


def _ours_runs(frozen: Path | None = None) -> bool:
    tree = frozen or _frozen.get() or conf_dir()
    return GlobalHydra.instance().is_initialized() and tree in _folders()


def tree() -> conftree.Tree:
    """Groups and options; call it inside a `session`."""
    return conftree.read(_folders())


def compose(given: Sequence[str]) -> tuple[schema.Run, dict[str, str]]:
    """The config that these overrides make, and which option each group has.

    Groups without a choice (experiment, when none is chosen) are not in the choices. Raises InputError with
    every problem, a line each.
    """
    with session():
        if problems := overrides.check(given, tree()):
            raise InputError(problems)
        config = load(given)
        choices = choices_of(config.hydra)
        return to_run(config), choices


def defaults(stage: str) -> dict[str, Any]:
    """Key -> value of a stage as conf/ sets it; keys without any (???) are left out."""
    with session():
        config = without_hydra(load([f"stage={stage}"]))
    found: dict[str, Any] = {}

    def visit(prefix: str, node: DictConfig) -> None:
        for name in node:
            if OmegaConf.is_missing(node, name):
                continue
            value, key = node[name], f"{prefix}{name}"
            if OmegaConf.is_dict(value):
                visit(f"{key}.", value)
            else:
                found[key] = OmegaConf.to_object(value) if OmegaConf.is_list(value) else value

    visit("", config)
    return found


def opened(given: Sequence[str]) -> list[str]:
    """The overrides as Hydra wants them.

    Keys below `upstream.<stage>` and strategy.deepspeed are free, and need its `++`; groups of config.yaml that the
    stage does not have (a report has no model) are taken out by its `~`.
    """
    lines = [f"++{line.lstrip('+')}" if line.lstrip("+").startswith(FREE) else line for line in given]
    stage = next((line.removeprefix("stage=") for line in given if line.startswith("stage=")), None)
    groups = FOR_A_MODEL if stage in schema.RUNS else ()
    return lines + [f"~{group}" for group in groups if not conftree.has_group(stage, group)]


def load(given: Sequence[str]) -> DictConfig:
    """Compose with Hydra, its own node included. Raises InputError for what is wrong in the files."""
    try:
        # also yaml's errors, and whatever Hydra stumbles over: it reads files and words, nothing else runs
        with explained(Exception):
            return hydra.compose(ROOT, overrides=opened(given), return_hydra_config=True)
    except InputError as error:
        raise InputError([_better(problem, given) for problem in error.problems]) from error.__cause__


def _better(problem: str, given: Sequence[str]) -> str:
    """Say better than Hydra that a file (mostly an experiment) has no stage, or a wrong key."""
    if "You must specify 'stage'" in problem:
        return overrides.no_stage(tree())
    if found := UNKNOWN_KEY.fullmatch(problem):
        stage = overrides.stage_of(overrides.parse(given)[0], tree())
        return f"{found['file']}: {overrides.Checker(tree(), stage).unknown(found['key'])}"
    if found := HYDRA_KEY.fullmatch(problem):
        wrong, known = _beside(found["key"], given)
        return f"unknown key {wrong}{did_you_mean(wrong, known)}"
    return problem


def _beside(key: str, given: Sequence[str]) -> tuple[str, list[str]]:
    """Of a key of Hydra's node: the first part of it that is not there, and what is there in its place.

    With the launcher and the sweeper that are chosen.
    """
    rest = [line for line in opened(given) if not line.lstrip("+~").startswith("hydra.")]
    with explained(Exception):
        node = hydra.compose(ROOT, overrides=rest, return_hydra_config=True)
    section = ""
    for name in key.split("."):
        if not OmegaConf.is_dict(node) or name not in node:
            break
        section, node = f"{section}{name}.", node._get_node(name)
    names = list(node) if OmegaConf.is_dict(node) and not node._is_none() else []
    return section + key.removeprefix(section).partition(".")[0], [f"{section}{name}" for name in names]


@contextmanager
def explained(*also: type[Exception]) -> Iterator[None]:
    """Hydra's and OmegaConf's own errors, and others where they can only be theirs, become an InputError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, *also) as error:
        raise InputError(explain(error)) from error


def explain(error: BaseException) -> str:
    """A message of Hydra, OmegaConf or yaml in one line: what happened and where, without its advice."""
    texts = [str(error)]
    if isinstance(error.__cause__, OmegaConfBaseException):
        texts.append(str(error.__cause__))
    kept = []
    for line in "\n".join(texts).splitlines():
        words = line.strip()
        if words.startswith(ADVICE + TYPES) or line.startswith("\t"):
            continue
        kept.append(f"(at {words.removeprefix('full_key: ')})" if words.startswith("full_key: ") else words)
    return COMPOSING.sub(r"\1.yaml: ", " ".join(filter(None, kept)))


def choices_of(node: DictConfig) -> dict[str, str]:
    """Our groups' chosen options, from Hydra's node."""
    chosen = OmegaConf.to_container(node.runtime.choices)
    ours = {group: option for group, option in chosen.items() if not group.startswith("hydra/")}
    return {group: option for group, option in ours.items() if option is not None and group != "sweep"}


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy of a composed config without Hydra's node."""
    config = config.copy()
    with open_dict(config):
        config.pop("hydra", None)
    return config


def yaml(config: DictConfig, section: str | None = None, resolve: bool = False) -> str:
    """A composed config as text, or one section (or key) of it; what `--cfg job` prints."""
    shown = without_hydra(config)
    if section is not None and section != "_global_":
        shown = OmegaConf.select(shown, section, default=MISSING)
        if shown == MISSING:
            raise InputError(f"--package {section}: there is no such section")
    return OmegaConf.to_yaml(shown, resolve=resolve) if OmegaConf.is_config(shown) else f"{shown}\n"


def to_run(config: DictConfig, *, across: bool = True) -> schema.Run:
    """The dataclass of a composed config, checked: below this point there is no OmegaConf."""
    config = without_hydra(config)
    with explained():
        if missing := sorted(OmegaConf.missing_keys(config)):
            known = {key: f for key, f, _ in leaves(schema.RUNS[config.stage]())}
            raise InputError([value_problem(key, known[key], MISSING) or key for key in missing])
        run = OmegaConf.to_object(config)
    if problems := schema.problems(run, across=across):
        raise InputError(problems)
    return run


def upstream(
    role: str, parent: schema.Run, choices: dict[str, str], half: str | None = None
) -> tuple[schema.Run, dict[str, str]]:
    """The config of a stage that `parent` needs: its defaults, then what flows, then `upstream.<stage>`.

    role: the stage, or one of several of the same stage: `reward_1` and so on differ from `reward` in the seed only,
    `gold` in the seed and in what `upstream.gold` sets on top of `upstream.reward`, `labeller` likewise; `rloo`
    is ppo with another estimator, set by `upstream.rloo` on top of `upstream.ppo`. half: of the comparisons, unless
    those say which. What stands before any labels of stage=prefer (gold, labeller, round 0) has the data's own
    comparisons.

    Model, lora, strategy, tracking, seed and the like flow with their values; the dataset where it has the
    view that the stage reads (else one must be chosen); to ppo and eval also what they share with a ppo or
    pipeline run (the optimiser only from pipeline to ppo). A template that is not the parent's dataset's own is the
    run's: it flows to a stage with another dataset too, unless that is given one. Raises InputError whose lines
    start with `upstream.<stage>: `.
    """
    stage = schema.stage_of(role)
    name = role if role in ON_TOP else stage  # of its settings
    with session():
        given = _given(name, parent)
        if role in SCORERS or role.endswith(".0") or stage == "prefer":  # what comes before any labels
            given.values[FROM] = schema.DATA
        if role == schema.RLOO:
            given.values["ppo.estimator"] = role
        source = schema.DATA if "dataset" in given.options else parent.dataset.comparisons_from
        labelled = given.values.get(FROM, source) == schema.PREFER
        view = "prompts" if labelled and schema.VIEW[stage] == "comparisons" else schema.VIEW[stage]
        has_view = bool(given.values.get(f"dataset.views.{view}", getattr(parent.dataset.views, view)))
        if not has_view and "dataset" not in given.options:
            raise InputError(
                f"upstream.{name}: dataset {parent.dataset.name} has no {view}: choose one that has, "
                f"'upstream.{name}={{dataset: ...}}', or give a ready adapter, adapters.{name}=PATH"
            )
        flowing = _flowing(stage, parent, has_view)
        groups = {g: option for g, option in choices.items() if g.partition("/")[0] in flowing}
        if "dataset" in given.options:
            groups.pop(TEMPLATE, None)  # of the dataset that was left
            if TEMPLATE not in given.options and (template := _template_of_run(parent, choices)):
                groups |= {group: option for group, option in choices.items() if group == TEMPLATE}
                values = {f"dataset.template.{key}": value for key, value in asdict(template).items()}
                given.values = values | given.values
        chosen = {"stage": stage, **groups, **given.options}
        try:
            composed = load([f"{group}={option}" for group, option in chosen.items()])
            if half is not None:
                given.values.setdefault("dataset.half", half)
            run = _inherit(to_run(composed, across=False), parent, flowing, given)
            run.seed += _seed_offset(role, parent)
            if problems := schema.problems(run):
                raise InputError(problems)
        except InputError as error:
            raise InputError([f"upstream.{name}: {problem}" for problem in error.problems]) from error
        return run, choices_of(composed.hydra)


def _template_of_run(parent: schema.Run, choices: dict[str, str]) -> schema.Template | None:
    """The parent's template if it was chosen, or changed, for the run; None if it is its dataset's own."""
    own = to_run(load([f"stage={parent.stage}", f"dataset={choices['dataset']}"]), across=False)
    return None if parent.dataset.template == own.dataset.template else parent.dataset.template


def _given(name: str, parent: schema.Run) -> overrides.Settings:
    """What `upstream.<name>` sets; for gold scorer, labeller and rloo on top of what their stage is set to."""
    names = (ON_TOP[name], name) if name in ON_TOP else (name,)
    found = overrides.Settings()
    for each in names:
        given = overrides.settings(schema.stage_of(each), getattr(parent.upstream, each, {}), tree())
        if given.problems:
            raise InputError([f"upstream.{each}: {problem}" for problem in given.problems])
        found = overrides.Settings(found.options | given.options, found.values | given.values)
    return found


def _seed_offset(role: str, parent: schema.Run) -> int:
    """A seed of its own for each reward model: equal ones would start, and so err, alike."""
    if role == schema.GOLD:
        return 0 if "seed" in parent.upstream.gold else GOLD_SEED
    return schema.member_of(role) or 0


def _flowing(stage: str, parent: schema.Run, has_view: bool) -> list[str]:
    """The fields of the parent that the upstream stage takes over; has_view: its dataset is one of them."""
    names = list(INHERITED) + ["dataset"] * has_view
    if isinstance(parent, schema.PPORun) and stage in ("ppo", "eval"):
        names += POLICY
        if stage == "ppo":
            names += ["optim", "selfcheck", "early_stop"]
    if isinstance(parent, schema.PPORun) and stage in ("rft", "ilql"):
        names += ["generation", "reward_source"]
    if isinstance(parent, schema.PPORun) and stage == "prefer":
        # not `judge`: the pipeline's is of its evaluation, and shall not be the one that labels
        names += ["prefer", "generation"]
    if isinstance(parent, schema.EvalRun) and stage in ("ppo", "rft", "ilql"):
        names.append("reward_source")  # what is evaluated as reward is what it was trained on
    theirs = {f.name for f in fields(parent)} & {f.name for f in fields(schema.RUNS[stage])}
    return [name for name in names if name in theirs]


def _inherit(
    run: schema.Run, parent: schema.Run, flowing: list[str], given: overrides.Settings
) -> schema.Run:
    """Take the parent's values, keep the options chosen for this stage, then set the values given for it."""
    composed = deepcopy(run)
    for name in flowing:
        setattr(run, name, deepcopy(getattr(parent, name)))
    for group in sorted(given.options):
        *sections, last = group.split("/")
        source, target = composed, run
        for section in sections:
            source, target = getattr(source, section), getattr(target, section)
        setattr(target, last, getattr(source, last))
    node = OmegaConf.structured(run)
    for key, value in given.values.items():
        OmegaConf.update(node, key, value)
    return OmegaConf.to_object(node)
