"""A reward model as a scorer of (prompt, answer) rows; answers of one prompt share its forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from rlhf_exp.data.collate import right_pad
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import Roles
from rlhf_exp.probes.measure import Rows
from rlhf_exp.rewards.learned import last_token_scores, score_sequences

PADDING = 7  # PAD tokens after every row


class LearnedScorer:
    """The same scores in several ways of computing them: by itself, padded, among others."""

    def __init__(
        self,
        roles: Roles,
        role: str | None,
        head: ScalarHead,
        size: int,
        tell: Callable[[int], None] = lambda done: None,
    ):
        """size: answers a forward; tell: is told how many prompts are done so far."""
        self.roles, self.role, self.head, self.size = roles, role, head, size
        self.tell, self.done = tell, 0

    @torch.no_grad()
    def __call__(self, rows: Rows) -> list[float]:
        """Scores in the order of the rows: a prompt is computed once, its keys and values serve all its answers."""
        scores = [0.0] * len(rows)
        places = sorted(range(len(rows)), key=lambda i: rows[i][0])
        for prompt, group in itertools.groupby(places, key=lambda i: rows[i][0]):
            for some in _chunks(sorted(group, key=lambda i: len(rows[i][1])), self.size):
                answers = [rows[i][1] for i in some]
                for i, score in zip(some, self._shared(prompt, answers), strict=True):
                    scores[i] = score
            self.done += 1
            self.tell(self.done)
        return scores

    def _shared(self, prompt: list[int], answers: Sequence[list[int]]) -> list[float]:
        """Scores of some answers to one prompt. Padding stands behind each answer, where no real token sees it."""
        from transformers import DynamicCache

        base = self.roles.base
        if len(answers) == 1:
            return score_sequences(self.roles, self.role, self.head, [prompt + answers[0]], 1)
        cache = DynamicCache(config=base.model.config)
        ids, lengths = (x.to(base.device) for x in right_pad(answers, base.pad_id))
        with self.roles.use(self.role):
            base.trunk(
                input_ids=torch.tensor([prompt], device=base.device), past_key_values=cache, use_cache=True
            )
            cache.reorder_cache(torch.zeros(len(answers), dtype=torch.int64, device=base.device))
            hidden = base.trunk(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        return self.head(hidden[torch.arange(len(ids), device=base.device), lengths - 1]).tolist()

    def alone(self, rows: Rows) -> list[float]:
        """Each row by itself, prompt and answer in one forward: what the others are compared with."""
        return score_sequences(self.roles, self.role, self.head, _sequences(rows), 1)

    @torch.no_grad()
    def padded(self, rows: Rows) -> list[float]:
        """Each row by itself, with PAD behind it."""
        base, scores = self.roles.base, []
        for sequence in _sequences(rows):
            ids = torch.tensor([sequence + [base.pad_id] * PADDING], device=base.device)
            lengths = torch.tensor([len(sequence)], device=base.device)
            scores += last_token_scores(self.roles, self.role, self.head, ids, lengths).tolist()
        return scores

    def neighbours(self, rows: Rows) -> list[float]:
        """All in batches with each other, long and short ones, each padded to the longest."""
        return score_sequences(self.roles, self.role, self.head, _sequences(rows), self.size)


def _sequences(rows: Rows) -> list[list[int]]:
    return [prompt + answer for prompt, answer in rows]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
