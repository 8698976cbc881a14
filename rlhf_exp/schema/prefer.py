"""prefer=: comparisons without people, and the rounds in which labels, reward model and PPO alternate."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import leaf
from rlhf_exp.schema.names import JUDGE, LEARNED


@dataclass
class Prefer:
    """Answers of policies, ordered by a rule or a model instead of people (docs/prefer.md).

    Labels by a model: Bai et al. 2022 (Constitutional AI, section 4.1), Lee et al. 2023 (RLAIF).
    """

    labellers: list[str] = leaf(
        [LEARNED],
        doc="What orders the answers: learned (a reward model trained on the data's own comparisons), a rule as in "
        "reward_source.function, or judge (a local model, `judge`). The first one's labels are written; how far the "
        "others agree with it and with each other is measured.",
    )
    policies: list[str] = leaf(
        ["sft"],
        doc="Who answers: sft, base, the folder of a run or adapter, or ppo, dpo, kto, rft, which are then trained "
        "on the data's own comparisons.",
    )
    samples: int = leaf(4, doc="Answers to each prompt from each policy.", ge=1)
    pairs: str = leaf(
        "best_worst",
        doc="Which pairs of a prompt's answers: the best and the worst, or all (Ouyang et al. 2022, section 3.5).",
        choices=("best_worst", "all"),
    )
    min_margin: float = leaf(
        0.0,
        doc="Leave out pairs that are nearer than this: in units of the rule or reward model; of a judge "
        "P(better) - P(worse), 0 to 1. Ties are always left out.",
        ge=0,
    )
    prompts: int = leaf(0, doc="Training prompts, drawn anew each round; 0: all.", ge=0)
    validation_prompts: int = leaf(0, doc="The same of validation.", ge=0)
    unfinished: str = leaf(
        "keep",
        doc="Answers that max_new_tokens cut off: a later stage reads them as if they ended there; or drop them.",
        choices=("keep", "drop"),
    )
    round: int = leaf(1, doc="Which round this is: part of the noise; `rounds` sets it.", ge=1)
    rounds: int = leaf(
        1,
        doc="How often prefer, reward and ppo alternate, each round labelling answers of the last one's policy (Bai "
        "et al. 2022, Training a Helpful and Harmless Assistant, section 4.5; Xiong et al. 2023).",
        ge=1,
        keyed=False,  # what the rounds before made arrives as the parents' keys, as with the next two
    )
    keep: str = leaf(
        "union",
        doc="What the reward model of a later round learns from: comparisons of all rounds so far, or the newest.",
        choices=("union", "newest"),
        keyed=False,
    )
    start: str = leaf(
        "sft",
        doc="Where the policy of a later round starts: the SFT model, or the last round's policy; the reference "
        "is the SFT model in any case.",
        choices=("sft", "last"),
        keyed=False,
    )


def rules_of(prefer: Prefer) -> dict[str, str]:
    """{config key: rule} of the labellers that are rules."""
    named = {f"prefer.labellers[{i}]": name for i, name in enumerate(prefer.labellers)}
    return {key: name for key, name in named.items() if name not in (LEARNED, JUDGE)}
