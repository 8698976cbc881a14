"""Comparisons without people: policies answer prompts, a labeller orders the answers, pairs are written as data.

    prompts of train and validation -> samples of each policy -> margins by each labeller -> comparisons.jsonl

As in Bai et al. 2022 (Constitutional AI, section 4.1) and Lee et al. 2023 (RLAIF), with rules and reward models as
labellers too. Held-out prompts are never answered. A row is a comparison of family jsonl (data/labels.py), so that
the prompt's hash puts it into the split that the prompt is in. An interrupted run goes on from its last checkpoint.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from rlhf_exp import distributed
from rlhf_exp.data import labels
from rlhf_exp.data.load import longer_chosen, statistics
from rlhf_exp.data.records import Comparison, Prompt
from rlhf_exp.errors import InputError
from rlhf_exp.evaluation.agreement import Agreement, agreement
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.rewards.ranking import Margins, orders, picks
from rlhf_exp.rollout.engine import generate, judged
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import PREFER, Dataset, PreferRun
from rlhf_exp.stages import checkpoint
from rlhf_exp.stages.checkpoint import Keeper
from rlhf_exp.stages.context import PREFERENCES, ROWS, Context
from rlhf_exp.stages.labellers import Group, Labeller, labellers
from rlhf_exp.stages.rounds import EARLIER, policy_role

SHOW = (
    ("prefer/comparisons", "pairs", ".0f"),
    ("prefer/left_out", "left out", ".0f"),
    ("prefer/margin", "margin", ".3f"),
)
SHOWN = 6  # pairs in prefer.json and on the screen
EMPTY, EQUAL, UNFINISHED = "empty answers", "equal answers", "unfinished answers"
REPEATED = "pairs that were there already"

Asked = tuple[Prompt, list[int]]  # a prompt and its token ids


@dataclass
class Tally:
    """All that is known so far; plain, so that a checkpoint can hold it."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    unfinished: int = 0
    orders: dict[str, list[int]] = field(default_factory=dict)  # labeller -> its order of every pair
    prompts: list[int] = field(default_factory=list)  # the place of each of these pairs' prompt

    def metrics(self) -> dict[str, float]:
        margins = [row["margin"] for row in self.rows]
        found = {"prefer/comparisons": float(len(margins)), "prefer/answers": float(self.answers)}
        found["prefer/left_out"] = float(sum(self.dropped.values()))
        if margins:
            found["prefer/margin"] = math.fsum(margins) / len(margins)
        if self.answers:
            found["prefer/unfinished"] = self.unfinished / self.answers
        return found


def run(config: PreferRun, context: Context) -> dict[str, float]:
    """Sample, label, write comparisons.jsonl and prefer.json."""
    asked = [each for split in ("train", "validation") for each in prompts_of(config, context, split)]
    size = max(1, ROWS // (config.prefer.samples * len(config.prefer.policies)))
    parts = [asked[start : start + size] for start in range(0, len(asked), size)]
    found = checkpoint.newest(context)
    tally = Tally(**found.tree["tally"]) if found.step else Tally()
    with Roles(context.base) as roles, context.log("prefer", len(parts), SHOW, found) as log:
        players = policies(config, context, roles)
        named = labellers(config, context, roles)
        with Keeper(context, len(parts), log, lambda: {"tally": asdict(tally)}) as keeper:
            for step in range(found.step + 1, len(parts) + 1):
                groups = answers(config, context, roles, players, parts[step - 1], tally)
                before = len(tally.rows)
                add(config, groups, named, tally)
                log.step(step, tally.metrics())
                log.samples(step, tally.rows[before : before + SHOWN])
                keeper.after(step)
    return publish(config, context, tally, len(asked))


def prompts_of(config: PreferRun, context: Context, split: str) -> list[Asked]:
    """The prompts of a split that are answered, in the order of the data; which, the seed and the round draw."""
    rows, tokens = context.read(config.dataset, "prompts", split)
    prefer = config.prefer
    most = prefer.prompts if split == "train" else prefer.validation_prompts
    drawn = sorted(range(len(rows)), key=lambda i: row_key(config.seed, prefer.round, rows[i].id))
    return [(rows[i], tokens.prompts[i]) for i in sorted(drawn[: most or None])]


def policies(config: PreferRun, context: Context, roles: Roles) -> dict[str, str | None]:
    """{name for people: role on the base} of who answers; adapters are loaded."""
    found: dict[str, str | None] = {}
    for place, policy in enumerate(config.prefer.policies):
        parent = policy_role(place, policy)
        adapter = context.adapter(parent) if parent else None
        found[policy] = BASE if adapter is None else f"answers_{place}"
        if adapter is not None:
            roles.load(found[policy], adapter)
    return found


def answers(
    config: PreferRun,
    context: Context,
    roles: Roles,
    players: dict[str, str | None],
    asked: Sequence[Asked],
    tally: Tally,
) -> list[Group]:
    """The different answers of all policies to some prompts; what is not looked at further is counted."""
    count, groups = config.prefer.samples, [Group(*each, [], [], []) for each in asked]
    rows = [i for i in range(len(asked)) for _ in range(count)]
    for place, (policy, role) in enumerate(players.items()):
        keys = [
            row_key(config.seed, config.prefer.round, asked[i][0].id, place * count + sample)
            for i, sample in zip(rows, list(range(count)) * len(asked), strict=True)
        ]
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            rollout = generate(
                context.base,
                lambda role=role: roles.use(role),
                [asked[i][1] for i in some],
                keys[start : start + ROWS],
                config.generation,
            )
            shown = judged(rollout)
            texts = context.base.tokenizer.batch_decode(shown, skip_special_tokens=True)
            for i, ids, text, ended in zip(some, shown, texts, rollout.ended, strict=True):
                _take(groups[i], policy, ids, text.strip(), ended, config.prefer.unfinished, tally)
    return groups


def _take(
    group: Group, policy: str, ids: list[int], text: str, ended: bool, unfinished: str, tally: Tally
) -> None:
    """Put an answer into its prompt's group, or count why not. A file of comparisons cannot hold an empty one."""
    tally.answers += 1
    tally.unfinished += not ended
    reason = None
    if not text:
        reason = EMPTY
    elif not ended and unfinished == "drop":
        reason = UNFINISHED
    elif text in group.texts:
        reason = EQUAL
    if reason:
        tally.dropped[reason] = tally.dropped.get(reason, 0) + 1
        return
    group.texts.append(text)
    group.responses.append(ids)
    group.sources.append(policy)


def add(config: PreferRun, groups: Sequence[Group], named: dict[str, Labeller], tally: Tally) -> None:
    """Label the groups and take down the pairs of the first labeller, and every labeller's orders."""
    prefer, first = config.prefer, config.prefer.labellers[0]
    dropped = Counter(tally.dropped)
    several = [group for group in groups if len(group.texts) > 1]
    said: dict[str, list[Margins]] = {name: label(several) for name, label in named.items()}
    for name, tables in said.items():
        tally.orders.setdefault(name, []).extend(order for margins in tables for order in orders(margins))
    place = tally.prompts[-1] + 1 if tally.prompts else 0
    for number, group in enumerate(several, place):
        tally.prompts += [number] * math.comb(len(group.texts), 2)
    known = iter(said[first])
    for group in groups:
        margins = next(known) if len(group.texts) > 1 else [[0.0]]
        for pick in picks(margins, prefer.pairs, prefer.min_margin, dropped):
            who = dict.fromkeys(sorted(group.sources[i] for i in (pick.better, pick.worse)))
            chosen, rejected = group.texts[pick.better], group.texts[pick.worse]
            row = labels.row(group.prompt.prompt, chosen, rejected, pick.margin, " + ".join(who), first)
            tally.rows.append(row | {"round": prefer.round})
    tally.dropped = dict(dropped)


def publish(config: PreferRun, context: Context, tally: Tally, prompts: int) -> dict[str, float]:
    """Write both files, read the comparisons as later stages will, and report. InputError where none is left."""
    if not tally.rows:
        raise InputError(
            f"none of {tally.answers} answers to {prompts} prompts gives a pair ({said(tally.dropped)}): raise "
            "prefer.samples or generation.temperature, lower prefer.min_margin, or take another labeller"
        )
    earlier = context.parents.get(EARLIER)
    before = [] if earlier is None else labels.read(earlier / labels.FILE)
    unique: dict[str, dict[str, Any]] = {}
    for row in [*before, *tally.rows]:
        unique.setdefault(labels.identity(row), row)
    rows = list(unique.values())
    if repeated := len(before) + len(tally.rows) - len(rows):
        tally.dropped[REPEATED] = repeated
    context.folder.write_text(labels.FILE, labels.text_of(rows))
    distributed.barrier()  # rank 0 has written it
    counts = splits(config.dataset, context)
    agreed = {
        (a, b): agreement(tally.orders[a], tally.orders[b], tally.prompts)
        for a, b in combinations(config.prefer.labellers, 2)
    }
    report(config, context, tally, rows, counts, agreed)
    context.tracker.artifact(context.folder.path / labels.FILE)
    pairs = [Comparison(0, "", row["chosen"], row["rejected"]) for row in rows]
    found = tally.metrics() | {f"prefer/{split}": float(number) for split, number in counts.items()}
    found |= {"prefer/comparisons": float(len(rows)), "prefer/longer_chosen": longer_chosen(pairs)}
    # by place, from 1: a tracker does not take every name that a labeller may have (regex)
    places = {name: place for place, name in enumerate(config.prefer.labellers, 1)}
    for name, given in tally.orders.items():
        found[f"prefer/verdicts_{places[name]}"] = sum(map(abs, given)) / max(1, len(given))
    for (a, b), each in agreed.items():
        pair = f"{places[a]}_{places[b]}"
        found |= {f"prefer/agreement_{pair}/{key}": float(value) for key, value in each._asdict().items()}
    return found


def splits(dataset: Dataset, context: Context) -> dict[str, int]:
    """How many comparisons of the written file fall into each split. InputError where one that is needed is empty."""
    views = replace(dataset.views, comparisons=str((context.folder.path / labels.FILE).absolute()))
    counts = dict(statistics(replace(dataset, views=views, comparisons_from=PREFER), "comparisons").records)
    for split, needed in (("train", True), ("validation", dataset.validation_share > 0)):
        if needed and not counts[split]:
            raise InputError(
                f"no pair of {split} prompts is left of those that stage=prefer labelled: raise prefer.samples, or "
                f"the prompts (prefer.{'' if split == 'train' else 'validation_'}prompts)"
            )
    return counts


def report(
    config: PreferRun,
    context: Context,
    tally: Tally,
    rows: list[dict[str, Any]],
    counts: dict[str, int],
    agreed: dict[tuple[str, str], Agreement],
) -> None:
    """prefer.json: what was asked, kept and left out, how labellers agree, a few pairs; and a line of it."""
    context.folder.write_json(
        PREFERENCES,
        {
            "round": config.prefer.round,
            "labellers": config.prefer.labellers,
            "policies": config.prefer.policies,
            "answers": tally.answers,
            "comparisons": {"all": len(rows), **counts},
            "by round": dict(Counter(str(row["round"]) for row in rows)),
            "left out": tally.dropped,
            "agreement": [{"labellers": pair, **each._asdict()} for pair, each in agreed.items()],
            "samples": tally.rows[:SHOWN],
        },
    )
    kept = ", ".join(f"{number} {split}" for split, number in counts.items() if number)
    print(
        f"comparisons: {tally.answers} answers -> {len(rows)} pairs: {kept}; left out: {said(tally.dropped)}"
    )
    for (a, b), each in agreed.items():
        print(
            f"agreement of {a} and {b}: {each.share:.3f} of {each.pairs} pairs (95 %: {each.low:.3f} to "
            f"{each.high:.3f}), kappa {each.kappa:.3f}",
            flush=True,
        )


def said(dropped: dict[str, int]) -> str:
    """What was left out, by reason, for people."""
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "nothing"
