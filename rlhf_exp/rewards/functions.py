"""What scores a response besides a reward model, by name: as reward (`reward_source.function`), a part of it or gold.

    sentiment  length            rules
    regex:PATTERN                1 where the pattern is found
    relevance[:FOLDER]           similarity of prompt and response by a sentence encoder
    optimality[:GRAPH SEED]      of a random walk (dataset=randomwalks)
    python:module.function       the user's own

Each takes prompts and responses and returns a number for each response. To add one: a Function in FUNCTIONS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as with_values
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_exp.data import randomwalks
from rlhf_exp.errors import InputError
from rlhf_exp.fields import did_you_mean
from rlhf_exp.rewards import relevance, rules, user
from rlhf_exp.rewards.parts import readable
from rlhf_exp.schema import LEARNED, EvalRun, ILQLRun, PPORun, PreferRun, RandomWalks, RFTRun, Run, rules_of

Texts = Sequence[str]
NONE = "none"  # of eval.gold, reward_source.gold, eval.judge
JUDGES = ("gold", "model")  # of eval.judge besides learned and rules


@dataclass(frozen=True)
class Function:
    """`check` raises InputError for an argument that cannot be; `files` are those whose content decides scores."""

    score: Callable[[str, Texts, Texts, str], list[float]]  # argument, prompts, responses, device
    check: Callable[[str], Any]
    files: Callable[[str], list[Path]] = lambda argument: []


def _no_argument(argument: str) -> None:
    if argument:
        raise InputError(f"takes no argument, got {argument}")


def _pattern(argument: str) -> None:
    if not argument:
        raise InputError("needs a pattern: regex:PATTERN")
    try:
        re.compile(argument)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"is no regular expression: {error}") from error


def _graph(argument: str) -> randomwalks.Graph:
    """Nodes, edges and length are the defaults of dataset.randomwalks."""
    if argument and not (argument.isascii() and argument.isdigit() and int(argument) < 2**32):
        raise InputError(f"expected the seed of a graph, optimality:1000, got {argument}")
    return randomwalks.graph_of(_walks(argument))


def _walks(argument: str) -> RandomWalks:
    return RandomWalks(graph_seed=int(argument)) if argument else RandomWalks()


def _optimality(argument: str, prompts: Texts, responses: Texts, device: str) -> list[float]:
    graph = _graph(argument)
    walks = ("".join(f"{p}{r}".split()) for p, r in zip(prompts, responses, strict=True))
    return [randomwalks.optimality(graph, walk) for walk in walks]


def _encoder_files(folder: str) -> list[Path]:
    return [relevance.locate(folder)]


FUNCTIONS = {
    "sentiment": Function(lambda _, p, r, device: rules.sentiment(p, r), _no_argument),
    "length": Function(lambda _, p, r, device: rules.length(p, r), _no_argument),
    "regex": Function(lambda pattern, p, r, device: rules.regex(pattern, p, r), _pattern),
    "relevance": Function(relevance.score, relevance.locate, _encoder_files),
    "optimality": Function(_optimality, _graph),
    "python": Function(lambda name, p, r, device: user.score(name, p, r), user.load, user.files),
}


def _of(spec: str, key: str = "reward_source.function") -> tuple[Function, str]:
    name, _, argument = spec.partition(":")
    if name not in FUNCTIONS:
        # where a reward model can stand too
        known = [*FUNCTIONS, *([LEARNED] if key != "reward_source.function" else [])]
        known += JUDGES if key == "eval.judge" else ()
        hint = did_you_mean(name, known) or f"; choose one of {', '.join(known)}"
        if "." in spec:
            hint = f"; a function of your own is python:{spec}"
        raise InputError(f"there is no function {name}{hint}")
    return FUNCTIONS[name], argument


def check(spec: str, key: str = "reward_source.function") -> None:
    """Raise InputError, in which `key` is the config key that holds it, unless `spec` can score. Loads no model."""
    with _named(f"{key}={spec}"):
        function, argument = _of(spec, key)
        function.check(argument)


def score(spec: str, prompts: Texts, responses: Texts, device: str = "cpu") -> list[float]:
    """A score for each response. `device`: where an encoder computes. InputError: as `check`, or it fails."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
    with _named(spec):
        function, argument = _of(spec)
        return function.score(argument, prompts, responses, device) if prompts else []


def fingerprint(spec: str, key: str = "reward_source.function") -> str | None:
    """sha256 (hex) of what is not in `spec` itself: a user's source, an encoder's files; None for the others."""
    from rlhf_exp.model.base import content_hash

    with _named(f"{key}={spec}"):
        function, argument = _of(spec, key)
        found = [
            content_hash(path) if path.is_dir() else sha256(path.read_bytes()).hexdigest()
            for path in function.files(argument)
        ]
    return "+".join(found) or None


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the function's name before the lines of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError([f"{name}: {problem}" for problem in error.problems]) from error


def of_config(config: Run) -> dict[str, str]:
    """{key: spec} of the functions that a run of ppo, ilql, rft, eval or prefer scores with."""
    if isinstance(config, PreferRun):
        return rules_of(config.prefer)
    if not isinstance(config, PPORun | ILQLRun | RFTRun | EvalRun):
        return {}
    found = {part.key: part.spec for part in readable(config.reward_source)[0]}
    if isinstance(config, EvalRun):
        found |= {"eval.gold": config.eval.gold, "eval.judge": config.eval.judge}
    else:
        found["reward_source.gold"] = config.reward_source.gold
    # what is no rule; of reward_source.function `learned` would be a rule of that name
    models = {"reward_source.function": (), "eval.judge": (LEARNED, NONE, *JUDGES)}
    return {key: spec for key, spec in found.items() if spec not in models.get(key, (LEARNED, NONE))}


def check_config(config: Run) -> None:
    """`check` of all functions of a run, and that optimality is about the graph that the prompts are from."""

    def act(spec: str, key: str) -> None:
        check(spec, key)
        _same_graph(config, key, spec)

    _each(config, act)


def _each(config: Run, act: Callable[[str, str], Any]) -> dict[str, Any]:
    """{key: act(spec, key)} of the functions of a run. InputError with the problems of all, unreadable parts too."""
    source = getattr(config, "reward_source", None)
    found, problems = {}, readable(source)[1] if source else []
    for key, spec in of_config(config).items():
        try:
            found[key] = act(spec, key)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found


def _same_graph(config: Run, key: str, spec: str) -> None:
    name, _, argument = spec.partition(":")
    if name != "optimality" or config.dataset.family != "randomwalks":
        return
    ours = config.dataset.randomwalks
    theirs = with_values(_walks(argument), walks=ours.walks)  # how many walks were drawn does not matter
    if ours != theirs:
        raise InputError(
            f"{key}={spec}: it scores walks on the graph of {_said(theirs)}, but dataset.randomwalks is "
            f"{_said(ours)}: they must be the same"
        )


def _said(task: RandomWalks) -> str:
    return (
        f"seed {task.graph_seed} ({task.nodes} nodes, edge probability {task.edge_probability:g}, "
        f"walks of {task.length})"
    )


def fingerprints(config: Run) -> dict[str, str]:
    """{key: fingerprint} of the functions of a run whose content is not in the config: part of the store's key."""
    return {key: value for key, value in _each(config, fingerprint).items() if value}
