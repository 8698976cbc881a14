"""reward_source=, probe= and eval=: what scores an answer, and what is measured."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import group, leaf
from rlhf_exp.schema.names import COMPARED, GOLD, LABELLER, LEARNED, POLICY, RLOO, UNPATCHED


@dataclass
class Limits:
    """Largest share of prompts at which a probe may score above the real answer (docs/probes.md); 1: whatever it is.

    What says nothing has 1 in 20, what says the wrong thing 1 in 5: less than a random answer of the data gets. What
    is the real answer plus or minus a little has one half: no policy should gain by it on average.
    """

    empty: float = leaf(0.05, doc="An answer of no characters.", ge=0, le=1)
    eos_only: float = leaf(0.05, doc="EOS alone.", ge=0, le=1)
    short: float = leaf(0.2, doc="The first one to three words of the real answer.", ge=0, le=1)
    repeated: float = leaf(0.05, doc="Three words of the real answer, repeated.", ge=0, le=1)
    emoji: float = leaf(0.05, doc="A run of emoji.", ge=0, le=1)
    echo: float = leaf(0.2, doc="The prompt.", ge=0, le=1)
    shuffled: float = leaf(0.2, doc="The real answer's words in another order.", ge=0, le=1)
    other_answer: float = leaf(0.2, doc="The answer to another prompt.", ge=0, le=1)
    other_language: float = leaf(0.2, doc="A sentence in another language.", ge=0, le=1)
    refusal: float = leaf(0.2, doc="A refusal; for prompts that are to be refused, raise it.", ge=0, le=1)
    truncated: float = leaf(0.5, doc="The real answer cut in mid-sentence, without EOS.", ge=0, le=1)
    unfinished: float = leaf(0.5, doc="The same with EOS.", ge=0, le=1)
    long: float = leaf(0.5, doc="The real answer and answers to other prompts.", ge=0, le=1)
    thanks: float = leaf(0.5, doc="The real answer and a sentence of thanks or praise.", ge=0, le=1)
    whitespace: float = leaf(
        0.1, doc="Pairs that other whitespace in the real answer orders the other way.", ge=0, le=1
    )
    padding: float = leaf(0.1, doc="Pairs that padding orders the other way.", ge=0, le=1)
    neighbours: float = leaf(0.1, doc="Pairs that the rest of a batch orders the other way.", ge=0, le=1)


# what must not matter, and what must not score above the real answer
SAME = ("whitespace", "padding", "neighbours")
PROBES = tuple(name for name in Limits.__dataclass_fields__ if name not in SAME)


@dataclass
class RewardSource:
    kind: str = leaf(
        "learned",
        doc="learned: the reward stage's adapter; function: a rule from rlhf_exp.rewards; sum: of several (parts).",
        choices=("learned", "function", "sum"),
    )
    function: str = leaf(
        "sentiment",
        doc="Which rule, for kind=function: sentiment, length, relevance, optimality, regex:PATTERN, "
        "python:module.function.",
    )
    parts: list[str] = leaf(
        [], doc="What kind=sum adds up: WEIGHT*learned or WEIGHT*RULE each, such as [1*learned,-0.01*length]."
    )
    ensemble: int = leaf(
        1,
        doc="Reward adapters, trained with seed, seed + 1, ...; learned is then what they agree on.",
        ge=1,
        le=100,
    )
    ensemble_lambda: float = leaf(
        0.5,
        doc="Learned score of an ensemble: mean - ensemble_lambda * standard deviation of its members' (Coste et al. "
        "2023, UWO, there with the variance).",
        ge=0,
    )
    gold: str = leaf(
        "none",
        doc="A scorer that the policy is not trained on, logged as objective/gold: none, a rule, or learned: another "
        "reward model, on the other half of the comparisons (after Gao et al. 2022).",
    )
    gate: str = leaf(
        "warn",
        doc="Before ppo, ilql or rft, where a reward model's probes are above their limits: warn says so, fail "
        "stops, patch trains it again with synthetic negatives of the kinds that are, off does not look.",
        choices=("warn", "fail", "patch", "off"),
        keyed=False,  # what patch trains arrives as the parents' keys
    )
    limits: Limits = group(
        Limits, doc="What the gate holds the probes against: shares of prompts.", keyed=False
    )
    patch_share: float = leaf(
        0.2, doc="Share of synthetic pairs among all that gate=patch trains on.", gt=0, lt=1, keyed=False
    )


@dataclass
class Probe:
    """What stage=probe looks at: a reward model's scores of answers that say nothing (docs/probes.md)."""

    pairs: int = leaf(64, doc="Comparisons, those of the smallest prompt ids; 0: all.", ge=0)
    split: str = leaf(
        "validation",
        doc="Of which split of the comparisons.",
        choices=("validation", "heldout", "train"),
    )
    kinds: list[str] = leaf([], doc="Which probes, such as [empty,short]; []: all.")


@dataclass
class Judge:
    """A local language model that says which of two answers is better (rewards/judge.py)."""

    model: str | None = leaf(
        None, doc="Its folder or hub id; base: the run's own base, without an adapter.", keyed=False
    )
    template: str = leaf(
        "Here are a prompt and two answers to it. Which answer is better: more helpful, more correct, more to the "
        "point? Say A or B.\n\nPrompt:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nBetter answer:",
        doc="What it reads, with {prompt}, {first} and {second} once each; a label should come next.",
    )
    labels: list[str] = leaf(
        ["A", "B"], doc="How the template calls the first and the second answer: one token each."
    )
    chat: str = leaf(
        "auto",
        doc="Whether its own chat template goes around that; auto: if it has one.",
        choices=("auto", "always", "never"),
    )
    max_tokens: int = leaf(
        2048,
        doc="Longest text it reads; of a longer one the prompt loses its beginning, then the answers their ends.",
        ge=64,
    )
    batch_size: int = leaf(16, doc="Texts it reads at once.", gt=0, keyed=False)


@dataclass
class Evaluation:
    policies: list[str] = leaf(
        [],
        doc="Who answers: sft, base, ppo, rloo, dpo, kto, rft (trained if missing), the folder of a run or adapter, "
        "runs:/ID/adapter; WHO@STEP is one checkpoint, WHO:best_of_16 the best of 16 answers by the reward, "
        "ilql:beta_4 (or FOLDER:beta_4) ILQL's decoding, 'NAME=WHO' gives a name. []: sft and what ppo kept "
        "(docs/evaluation.md).",
        keyed=False,  # what they lead to, and their names, are in the key
    )
    prompts: int = leaf(64, doc="Held-out prompts; 0 takes all.", ge=0)
    gold: str = leaf(
        "sentiment",
        doc="A scorer the policy was not trained on: a rule as in reward_source.function, learned (the model of "
        "reward_source.gold=learned), or none.",
    )
    samples: int = leaf(6, doc="Prompts shown side by side in the tables.", ge=0)
    samples_per_prompt: int = leaf(
        1, doc="Answers sampled to each prompt; the standard errors are of the prompts' means.", gt=0
    )
    greedy: bool = leaf(False, doc="Also score each policy's most probable answer (token by token).")
    checkpoints: bool = leaf(True, doc="Evaluate every kept PPO adapter, not only the last.")
    judge: str = leaf(
        "none",
        doc="Who says which of two answers is better, for win rates: learned (the reward model), gold (eval.gold), a "
        "rule as in reward_source.function, model (a local model, `judge`), or none.",
    )
    against: str | None = leaf(
        None, doc="Whose answers the win rates are against: a policy's name; null: sft, else the first."
    )
    encoder: str | None = leaf(
        None,
        doc="Sentence encoder for relevance, the cosine of an answer with its prompt and with the reference: minilm, "
        "a folder or hub id; null: not measured.",
        keyed=False,  # its content is in the key
    )
    best: bool = leaf(
        True,
        doc="Evaluate the kept PPO adapter that best.json names (ppo.best_metric), too, if it is not the last.",
    )
    ema: bool = leaf(True, doc="Evaluate the averaged policy too, where ppo.ema_decay made one.")


def learns(source: RewardSource) -> bool:
    """Whether a reward source needs reward models."""
    return source.kind == "learned" or (
        source.kind == "sum" and any(part.partition("*")[2].strip() == LEARNED for part in source.parts)
    )


def proxies(source: RewardSource) -> tuple[str, ...]:
    """The roles of a reward source's models: reward, then reward_1, reward_2, ... of an ensemble."""
    return ("reward", *(f"reward_{i}" for i in range(1, source.ensemble))) if learns(source) else ()


def member_of(role: str) -> int | None:
    """The place in the ensemble of a proxy's role, from 0; None for another role."""
    head, _, number = role.partition(".")[0].partition("_")
    return None if head != "reward" else int(number or 0)


def stage_of(role: str) -> str:
    """The stage that makes what takes this role: the gold scorer and an ensemble's members are of stage reward.

    A role may end in the number of its round (ppo.2); a policy that prefer.policies gives is an adapter as of sft.
    """
    role = role.partition(".")[0]
    if role.startswith(POLICY):
        return "sft"
    if role.startswith(COMPARED) or role == RLOO:
        return "ppo"
    of_reward = role in (GOLD, LABELLER) or role.startswith(UNPATCHED) or member_of(role) is not None
    return "reward" if of_reward else role
