"""Family `hc3`: the Human ChatGPT Comparison Corpus (Guo et al. 2023), demonstrations and prompts.

Row (all.jsonl of Hello-SimpleAI/HC3 and HC3-Chinese): {"question": .., "human_answers": [..],
"chatgpt_answers": [..], "source": "reddit_eli5" | "medicine" | ..} and in some copies "index". A question has
up to a dozen answers: each is a demonstration. Empty and null answers are left out
and counted. The per-domain files of the hub are the same rows without `source`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_exp.data.dialogues import items
from rlhf_exp.data.records import ELI5, BadRow, Demonstration, Drop, Prompt, prompt_id, string, text
from rlhf_exp.schema import Dataset

WHOSE = {"chatgpt": ("chatgpt",), "human": ("human",), "both": ("human", "chatgpt")}


def _lines(value: str, dataset: Dataset) -> str:
    """With \\n as the end of a line: some answers have \\r\\n, and some spell it as a backslash and an n."""
    if dataset.hc3.newlines:
        value = value.replace("\\r\\n", "\n").replace("\\n", "\n")
    return value.replace("\r\n", "\n").replace("\r", "\n")


def _question(row: Mapping[str, Any], dataset: Dataset) -> str:
    if dataset.hc3.sources:
        if "source" not in row:
            reason = "no field 'source', by which dataset.hc3.sources chooses: the hub's per-domain files have none"
            raise BadRow(f"{reason}; read all.jsonl, or leave dataset.hc3.sources empty")
        if text(row, "source") not in dataset.hc3.sources:
            raise Drop("of another source")
    question = _lines(text(row, "question"), dataset)
    if dataset.hc3.strip_eli5:
        question = ELI5.sub("", question).strip()
        if not question:
            raise Drop("no question")
    return question


def _answers(row: Mapping[str, Any], whose: str, dataset: Dataset) -> list[str]:
    """All answers of one kind, "" for those that are empty or null."""
    name = f"{whose}_answers"
    return [
        "" if value is None else _lines(string({name: value}, name), dataset).strip()
        for value in items(row, name)
    ]


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration | Drop]:
    """One for each answer of `dataset.hc3.answers`, those by people first."""
    question = _question(row, dataset)
    answers = [answer for whose in WHOSE[dataset.hc3.answers] for answer in _answers(row, whose, dataset)]
    if not answers:
        raise Drop("no answer")
    id = prompt_id(question)
    return [Demonstration(id, question, answer) if answer else Drop("empty answer") for answer in answers]


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    """The reference is the first answer by a person that is not empty, whatever `dataset.hc3.answers` is."""
    question = _question(row, dataset)
    reference = next(filter(None, _answers(row, "human", dataset)), None)
    return [Prompt(prompt_id(question), question, reference)]


VIEWS = {"demonstrations": demonstrations, "prompts": prompts}
