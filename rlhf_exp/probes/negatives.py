"""Synthetic negatives: comparisons of a real answer with a probe of a kind that the reward model should not like.

They are rows as all others, for the same loss: a patched reward model is one that has a few more comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from rlhf_exp.data.records import Comparison
from rlhf_exp.data.tokenised import Tokenised
from rlhf_exp.probes.answers import Probe, Real, build, reals
from rlhf_exp.schema import Dataset, Reward


def added(
    tokenizer: Any,
    dataset: Dataset,
    records: Sequence[Comparison],
    rows: Tokenised,
    reward: Reward,
    seed: int,
) -> tuple[list[Comparison], Tokenised]:
    """The comparisons and, after them, synthetic ones: reward.negatives_share of all rows, as many of each kind.

    A kind that cannot be made of enough comparisons (an answer of one word has no truncated form) gives as many as
    there are. No kinds: nothing is added.
    """
    kinds, share = reward.negatives, reward.negatives_share
    if not kinds:
        return list(records), rows
    whole = reals(records, rows, tokenizer.eos_token_id)
    wanted = round(share / (1 - share) * len(records))
    more: list[tuple[str, Real, Probe]] = []
    for place, kind in enumerate(kinds):
        quota = wanted // len(kinds) + (place < wanted % len(kinds))
        names = [f"{kind}:{seed}:{real.record.id}" for real in whole]
        order = sorted(range(len(whole)), key=lambda i: sha256(names[i].encode()).digest())
        found: list[Probe] = []
        while order and len(found) < quota:
            some, order = order[:quota], order[quota:]
            found += build(tokenizer, dataset, whole, kind, seed, some, negatives=True)
        more += [(kind, whole[probe.row], probe) for probe in found[:quota]]
    counts = Counter(kind for kind, _, _ in more)
    said = ", ".join(f"{kind} {counts[kind]}" for kind in kinds)
    print(f"synthetic negatives: {len(more)} beside {len(records)} real pairs ({said})", flush=True)
    joined = Tokenised(
        rows.prompts + [real.prompt for _, real, _ in more],
        {
            "chosen": rows.answers["chosen"] + [real.chosen for _, real, _ in more],
            "rejected": rows.answers["rejected"] + [probe.ids for _, _, probe in more],
        },
        rows.cuts,
    )
    synthetic = (
        Comparison(real.record.id, real.record.prompt, real.record.chosen, probe.text)
        for _, real, probe in more
    )
    return [*records, *synthetic], joined
