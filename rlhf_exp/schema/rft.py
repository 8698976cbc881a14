"""rft=: rejection-sampling fine-tuning, how many answers are sampled and which are learned."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import leaf


@dataclass
class RFT:
    """Fine-tuning on the policy's own best answers (docs/rft.md); `train` says how long, in each round.

    Best of n: Stiennon et al. 2020; fine-tuning on them: Touvron et al. 2023 (Llama 2), section 3.2.3;
    Yuan et al. 2023 (RFT); Dong et al. 2023 (RAFT).
    """

    samples: int = leaf(8, doc="Answers to each prompt in each round: the n of best-of-n.", ge=2)
    keep: int = leaf(
        1,
        doc="Of each prompt's answers the best so many are learned (Touvron et al. 2023 and Dong et al. 2023: 1); 0: "
        "all that reach the threshold (Yuan et al. 2023: every correct one).",
        ge=0,
    )
    threshold: float | None = leaf(
        None,
        doc="Answers with a lower score are not learned, in units of reward_source; null: none is too low.",
    )
    unfinished: str = leaf(
        "keep",
        doc="Answers that max_new_tokens cut off: learned as they are, without EOS; or drop them.",
        choices=("keep", "drop"),
    )
    prompts: int = leaf(
        0, doc="Training prompts that are answered in a round, drawn anew each round; 0: all.", ge=0
    )
    rounds: int = leaf(
        1,
        doc="How often the policy is sampled and then trained on, each round from where the last one left it (Dong "
        "et al. 2023).",
        ge=1,
    )
    pool: str = leaf(
        "newest",
        doc="What a later round learns: the newest round's answers (Dong et al. 2023), or the union of all rounds' "
        "(Touvron et al. 2023, who found that the newest alone forgets).",
        choices=("newest", "union"),
    )
