"""generation=: the sampler."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import leaf


@dataclass
class Generation:
    """The sampler. Its processors run in this order, which is transformers' (5.23):

    repetition_penalty, min_new_tokens, begin_suppress_tokens, temperature, top_k, top_p, min_p.
    """

    max_new_tokens: int = leaf(48, doc="Longest response in tokens, EOS included.", gt=0)
    min_new_tokens: int = leaf(
        1, doc="EOS is forbidden at the first this many positions; 1 is the empty-answer guard.", ge=0
    )
    begin_suppress_tokens: list[str] = leaf(
        [], doc="Tokens, by their text, that no answer begins with; `eos` stands for the EOS token."
    )
    stop: list[str] = leaf(
        [],
        doc="Texts that end an answer: EOS follows (not sampled), and who scores or reads the answer is shown it"
        ' without the stop text; each open answer\'s tail is decoded at every step. A line break is "\\n" in a file,'
        " $'generation.stop=[\"\\n\"]' in a shell.",
    )
    repetition_penalty: float = leaf(
        1.0,
        doc="Logits of tokens that came before, prompt included, are divided by this where positive and multiplied"
        " where negative (Keskar et al. 2019, section 4.1); 1: off.",
        gt=0,
    )
    temperature: float = leaf(1.0, doc="Softmax temperature of the sampler and of all log-probs.", gt=0)
    top_k: int = leaf(0, doc="Keep the k most probable tokens (Fan et al. 2018); 0: off.", ge=0)
    top_p: float = leaf(
        1.0, doc="Keep the smallest set of tokens with this mass (Holtzman et al. 2020); 1: off.", gt=0, le=1
    )
    min_p: float = leaf(
        0.0,
        doc="Keep tokens with this share of the best one's probability (Nguyen et al. 2024, eq. 1-2); 0: off.",
        ge=0,
        le=1,
    )
    greedy: bool = leaf(
        False,
        doc="The most probable token instead of a draw, for evaluation only; temperature, top_k, top_p and min_p"
        " change nothing then.",
    )
    logprob_mode: str = leaf(
        "sampled",
        doc="sampled: old, new and reference log-probs under the distribution that was sampled from, on its recorded"
        " kept sets; raw: temperature 1 and no processors, as most systems do, biased wherever one is on.",
        choices=("sampled", "raw"),
    )
