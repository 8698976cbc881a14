"""dataset= and its template."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import group, leaf
from rlhf_exp.schema.names import DATA, PREFER


@dataclass
class Views:
    """Where each view of the data is: a path, else RLHF_EXP_DATA/<last part or dataset's name>, else a hub id.

    owner/name:path/in/it.jsonl is one file of a hub dataset, owner/name@revision:.. at a branch, tag or commit.
    """

    demonstrations: str | None = leaf(None, doc="Prompts with written answers (SFT).", keyed=False)
    comparisons: str | None = leaf(
        None, doc="Prompts with a chosen and a rejected answer (reward).", keyed=False
    )
    prompts: str | None = leaf(
        None, doc="Prompts, with references where there are any (PPO, eval).", keyed=False
    )


@dataclass
class Template:
    """How records become text. Prompt and response are tokenised separately and their ids joined."""

    name: str = leaf("plain", doc="For display.", keyed=False)
    chat: bool = leaf(
        False,
        doc="The tokenizer's own chat template makes prompts; the formats below but `response` are not used.",
    )
    prompt: str = leaf("{prompt}", doc="Format of the (last) prompt.")
    response: str = leaf(" {response}", doc="Format of the response; the EOS token follows it.")
    turn: str = leaf("{prompt} {response}\n", doc="Format of each earlier exchange of a dialogue.")
    system: str = leaf("{system}\n", doc="Format of the system message, where there is one.")
    preamble: str = leaf("", doc="Text that stands before everything, once.")
    truncate: str = leaf(
        "left",
        doc="A prompt that is too long loses its left end, right end, or (tldr) the post's last paragraphs.",
        choices=("left", "right", "tldr"),
    )


@dataclass
class HC3:
    """Family hc3 (Guo et al. 2023): questions with answers by people and by ChatGPT."""

    answers: str = leaf(
        "chatgpt", doc="Whose answers are demonstrations.", choices=("chatgpt", "human", "both")
    )
    strip_eli5: bool = leaf(
        False, doc="Remove ' Please explain like I'm five.' and ' Explain like ..' from the end of questions."
    )
    newlines: bool = leaf(
        False, doc="Make lines of what some answers (one of seven in Chinese) spell as a backslash and an n."
    )
    sources: list[str] = leaf(
        [], doc="Keep only questions of these sources (reddit_eli5, medicine ...); []: all."
    )


@dataclass
class Fields:
    """Family jsonl: the name of each field, dots lead into objects (info.post)."""

    prompt: str = leaf("prompt", doc="The prompt.")
    response: str = leaf("response", doc="The answer of a demonstration.")
    chosen: str = leaf("chosen", doc="The preferred answer of a comparison.")
    rejected: str = leaf("rejected", doc="The other answer of a comparison.")
    reference: str | None = leaf(None, doc="A human answer to a prompt; null: there is none.")
    system: str | None = leaf(None, doc="The system message; null: there is none.")
    history: str | None = leaf(
        None, doc="Earlier exchanges, a list of [prompt, response]; null: there are none."
    )
    margin: str | None = leaf(
        None, doc="How much better the chosen answer is, a number (reward.margin_coef); null: not known."
    )
    source: str | None = leaf(
        None, doc="Where a comparison comes from, for accuracies by source; null: not known."
    )


@dataclass
class RandomWalks:
    """Family randomwalks: shortest paths on a random graph, after the example of trlX."""

    nodes: int = leaf(21, doc="Nodes of the graph.", ge=3, le=26)
    edge_probability: float = leaf(0.1, doc="Probability of each directed edge.", gt=0, le=1)
    walks: int = leaf(1000, doc="Random walks to imitate.", gt=0)
    length: int = leaf(10, doc="Most nodes of a walk.", ge=2)
    graph_seed: int = leaf(1000, doc="Seed of the graph and of the walks.", ge=0, le=2**32 - 1)


@dataclass
class Dataset:
    name: str = leaf(doc="The file's name in conf/dataset, for display.", keyed=False)
    family: str = leaf(doc="The loader in rlhf_exp/data that reads this schema.")
    views: Views = group(
        Views,
        doc="Where each view is: a path, else RLHF_EXP_DATA/<last part or dataset's name>, else a hub id: "
        "owner/name, owner/name:path/of/one/file.jsonl, owner/name@revision:path.",
    )
    template: Template = group(Template, doc="How records become text.")
    revision: str | None = leaf(None, doc="Branch, tag or commit of hub data; null: the newest.", keyed=False)
    fields: Fields = group(Fields, doc="Family jsonl: which field is what.")
    hc3: HC3 = group(HC3, doc="Family hc3.")
    randomwalks: RandomWalks = group(RandomWalks, doc="Family randomwalks.")
    prompt_words: int = leaf(
        4, doc="Families imdb, sst2: the first words that are the prompt; the rest is the answer.", gt=0
    )
    early_difference: str = leaf(
        "drop",
        doc="Comparisons whose dialogues differ before the last answer: leave out, or cut at the first difference.",
        choices=("drop", "cut"),
    )
    comparisons_from: str = leaf(
        DATA,
        doc="Where comparisons come from: the data's own view, or stage=prefer, which labels answers to the same "
        "prompts and is then run first (docs/prefer.md).",
        choices=(DATA, PREFER),
        keyed=False,  # what prefer made arrives as a parent's key
    )
    max_prompt_tokens: int = leaf(512, doc="Longer prompts are cut by the template's rule and counted.", gt=0)
    max_response_tokens: int = leaf(
        128, doc="Longer answers are cut (SFT, reward) and counted, EOS included.", gt=0
    )
    validation_share: float = leaf(0.1, doc="Share of prompts (by hash) for validation.", ge=0, lt=1)
    heldout_share: float = leaf(0.1, doc="Share of prompts (by hash) that only `eval` sees.", ge=0, lt=1)
    evaluate_on: str = leaf(
        "heldout",
        doc="The prompts of `eval`; validation: to choose settings by; train: for closed worlds such as randomwalks.",
        choices=("heldout", "validation", "train"),
    )
    limit: int = leaf(0, doc="At most this many training rows; 0 takes all.", ge=0)
    half: str | None = leaf(
        None,
        doc="Train on this half of the comparisons (by hash of the prompt) only; reward_source.gold=learned sets it.",
        choices=("first", "second"),
    )
    on_bad_row: str = leaf(
        "error", doc="A row that cannot be read: stop, or leave it out and count.", choices=("error", "skip")
    )
