"""Known mistakes of other recipes' reward models: `reward.faults=[answers_without_eos]`. As faults.py is for PPO.

Nothing is waived for them: a reward model is used by runs that know nothing of how it was trained, and PPO's
self-check, which reads the reward model's own config, has to find what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf_exp.data.tokenised import Tokenised
from rlhf_exp.schema import Reward
from rlhf_exp.stages import faults
from rlhf_exp.stages.faults import Fault

KEY = "reward.faults"
FAULTS = {
    "answers_without_eos": Fault(
        "the reward model is trained on answers without EOS: how they end is not in its data, and an answer scored "
        "with its EOS is an input that it has never seen",
        "the baichuan LoRA recipe, StackLLaMA",
    ),
}


def require(reward: Reward) -> None:
    """InputError for a name that is no fault, with all that are."""
    faults.require(reward.faults, KEY, FAULTS)


def announce(reward: Reward) -> None:
    """Say on the screen what is broken on purpose."""
    for name in reward.faults:
        print(f"fault {name}: {FAULTS[name].breaks} (seen in {FAULTS[name].seen})", flush=True)


def answers(reward: Reward, rows: Sequence[list[int]], eos_id: int) -> list[list[int]]:
    """The ids of answers as the reward model is trained on them.

    One that was cut has no EOS to begin with; one that is nothing but EOS keeps it: an answer has a token.
    """
    if "answers_without_eos" not in reward.faults:
        return list(rows)
    return [row[:-1] if len(row) > 1 and row[-1] == eos_id else row for row in rows]


def tokenised(reward: Reward, found: Tokenised, eos_id: int) -> Tokenised:
    """The comparisons with `answers` of each side."""
    return replace(
        found, answers={side: answers(reward, rows, eos_id) for side, rows in found.answers.items()}
    )
