"""Cached decoding: prompts in, sampled answers out; finished rows leave the batch.

A step waits for the device once, for its tokens. Logits are held for one step, never [B, T, V].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_exp import distributed
from rlhf_exp.algorithms.support import Support
from rlhf_exp.data.collate import left_pad
from rlhf_exp.model.base import Base
from rlhf_exp.rollout.noise import uniform
from rlhf_exp.rollout.sampler import FIRST, MORE, Drawn, records, sample
from rlhf_exp.rollout.texts import Stops, forbidden
from rlhf_exp.schema import Generation

# last hidden states [b, d] -> what is added to the logits [b, V]
Adjust = Callable[[Tensor], Tensor]
SHRINK_AT = 0.75  # of the rows still open: below, the cache is copied without the finished ones


class Rollout(NamedTuple):
    """Sampled answers of B rows, in the order of the prompts.

    Where a stop text ended an answer, EOS follows it: the reward model then finds EOS where its training had it.
    That EOS is no choice of the policy, so its log-prob is 0 under every role and it is the only token of its kept
    set: the ratio is 1 there, the KL 0, the gradient 0, and PPO counts it in no mean (`Answers.steps`). The stop's
    own tokens were chosen and stay among the responses; what is scored or read is `judged`, without them. A stop
    text that only the last of max_new_tokens completes leaves no room for EOS: that answer was cut off, like any
    other whose EOS did not come.
    """

    prompts: list[list[int]]
    responses: list[list[int]]  # sampled ids, EOS included where the answer ended
    ended: list[bool]  # whether EOS came within max_new_tokens
    logprobs: list[Tensor]  # float32[T] a row, under the distribution that `generation.logprob_mode` names
    supports: list[Support] | None  # the kept tokens of each position, where log-probs need them
    stops: list[int | None] | None = None  # how many tokens of each answer came before its stop text
    masses: list[Tensor] | None = None  # float32[T] a row, with logprob_mode=raw: of what could be drawn


def spoken(rollout: Rollout) -> list[list[int]]:
    """The responses' ids without EOS and without the stop text."""
    stops = rollout.stops or [None] * len(rollout.responses)
    return [
        response[:stop] if stop is not None else response[:-1] if ended else response
        for response, ended, stop in zip(rollout.responses, rollout.ended, stops, strict=True)
    ]


def judged(rollout: Rollout) -> list[list[int]]:
    """The responses as a reward model or a reader is shown them: without the stop text, EOS where they ended."""
    words = zip(spoken(rollout), rollout.responses, rollout.ended, strict=True)
    return [[*said, response[-1]] if ended else said for said, response, ended in words]


class _Row:
    """One answer while it is written."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.masses: list[float] = []
        self.kept: list[Tensor] = []
        self.stop: int | None = None

    def end_at(self, stop: int, eos_id: int) -> None:
        """EOS after a stop text, before which there are `stop` tokens."""
        self.tokens.append(eos_id)
        self.logprobs.append(0.0)
        self.masses.append(1.0)
        self.stop = stop

    def support(self) -> Support:
        kept = self.kept
        if self.stop is not None:
            kept = [*kept, torch.tensor(self.tokens[-1:], dtype=torch.int32)]
        return Support(torch.cat(kept), torch.tensor([len(ids) for ids in kept]))


@torch.no_grad()
def generate(
    base: Base,
    role: Callable[[], AbstractContextManager[None]],
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    generation: Generation,
    adjust: Adjust | None = None,
) -> Rollout:
    """Sample one answer to each prompt.

    role: a context manager in which the base computes as the policy, e.g. `lambda: roles.use("policy")`. keys: of
    `noise.row_key`, one a row: they alone decide the noise. Prompts must not be empty. `adjust` changes the
    distribution before the processors (ILQL's Q). Raises InputError for a suppressed token that is not in the
    vocabulary, FloatingPointError for logits that are no distribution. Several ranks share the prompts; all return
    all answers.
    """
    if distributed.world_size() > 1:
        from rlhf_exp.rollout import division

        return division.generate(_generate, base, role, prompts, keys, generation, adjust)
    return _generate(base, role, prompts, keys, generation, adjust)


def _generate(
    base: Base,
    role: Callable[[], AbstractContextManager[None]],
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    generation: Generation,
    adjust: Adjust | None = None,
) -> Rollout:
    """`generate` on this rank."""
    decoding = _Decoding(base, prompts, keys, generation, adjust)
    with role(), base.whole():
        for step in range(generation.max_new_tokens):
            if not decoding.advance(step):
                break
    rows = decoding.finished()
    return Rollout(
        [list(prompt) for prompt in prompts],
        [row.tokens for row in rows],
        [row.tokens[-1] == base.eos_id for row in rows],
        [torch.tensor(row.logprobs) for row in rows],
        [row.support() for row in rows] if records(generation) else None,
        [row.stop for row in rows] if generation.stop else None,
        [torch.tensor(row.masses) for row in rows] if generation.logprob_mode == "raw" else None,
    )


class _Decoding:
    """A batch of rows being written: what the next forward needs, on the device, and the answers so far."""

    def __init__(
        self,
        base: Base,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        generation: Generation,
        adjust: Adjust | None = None,
    ):
        from rlhf_exp.rollout.cache import cache_for

        self.base, self.generation, self.adjust = base, generation, adjust
        self.rows = [_Row() for _ in prompts]
        # what each row of the batch writes; None: it is finished and still in the batch
        self.open: list[_Row | None] = list(self.rows)
        self.ids, self.mask = (x.to(base.device) for x in left_pad(prompts, base.pad_id))
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.keys = torch.tensor(list(keys), dtype=torch.int64, device=base.device)
        # tokens so far, for the repetition penalty; padding on the left repeats the last one, which is real
        self.seen = (
            self.ids.where(self.mask, self.ids[:, -1:]) if generation.repetition_penalty != 1 else None
        )
        self.cache = cache_for(base.model.config)
        # models that tell positions from the mask alone (BLOOM) take none
        self.takes_positions = "position_ids" in inspect.signature(type(base.trunk).forward).parameters
        self.limits = forbidden(generation, base.tokenizer, base.eos_id)
        self.stops = Stops(base.tokenizer, generation.stop) if generation.stop else None
        self.candidates = FIRST
        self.kept: list[tuple[list[_Row | None], list[int], Tensor]] = []  # a step: rows, counts, all ids

    def advance(self, step: int) -> bool:
        """Write one token for every open answer; False when none is open any more."""
        drawn, tokens, logprobs, masses = self._draw(step)
        for row, token, logprob, mass in zip(self.open, tokens, logprobs, masses, strict=True):
            if row is not None:
                row.tokens.append(int(token))
                row.logprobs.append(logprob)
                row.masses.append(mass)
        ended = [token == self.base.eos_id for token in tokens]
        self.open = [None if end else row for row, end in zip(self.open, ended, strict=True)]
        if self.stops is not None and step + 1 < self.generation.max_new_tokens:
            self._stop(self.stops)
        stay = [i for i, row in enumerate(self.open) if row is not None]
        if stay:
            self._next(drawn.tokens, stay)
        return bool(stay)

    def _draw(self, step: int) -> tuple[Drawn, list[float], list[float], list[float]]:
        """The draws, and on this side of the device tokens, log-probs and masses; takes down the kept sets."""
        logits, u = self._logits(), uniform(self.keys, step)
        while True:
            drawn = sample(logits, u, self.generation, step, self.limits, self.seen, self.candidates)
            columns = [drawn.tokens, drawn.logprobs, drawn.sound]
            mass = torch.ones_like(drawn.logprobs) if drawn.mass is None else drawn.mass
            columns += [mass] if drawn.kept is None else [mass, drawn.kept.counts, drawn.kept.short]
            # the one wait of a step; float64 holds each of these exactly
            tokens, logprobs, sound, masses, *rest = torch.stack([x.double() for x in columns]).tolist()
            self._require_sound(sound, step)
            if not rest:
                return drawn, tokens, logprobs, masses
            counts, short = rest
            if any(short):
                self.candidates *= MORE
                continue
            while self.candidates > FIRST and self.candidates > MORE * max(counts):
                self.candidates //= MORE
            if records(self.generation):
                self._keep(drawn.kept.ids, [int(count) for count in counts])
            return drawn, tokens, logprobs, masses

    def _logits(self) -> Tensor:
        """[b, V] for the next token of each row."""
        positions = {"position_ids": self.positions} if self.takes_positions else {}
        hidden = self.base.trunk(
            input_ids=self.ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
        ).last_hidden_state[:, -1]
        weight, bias = self.base.output_layer
        # rounded in bfloat16, unlike the scoring forward's (logits.py): a step is bound by reading the weight
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
        return logits if self.adjust is None else logits.float() + self.adjust(hidden)

    def _require_sound(self, sound: list[float], step: int) -> None:
        for row, fine in zip(self.open, sound, strict=True):
            if row is not None and not fine:
                raise FloatingPointError(
                    f"row {self.rows.index(row)}, answer token {step}: the logits hold nan or inf, or every "
                    "token is forbidden"
                )

    def _keep(self, ids: Tensor, counts: list[int]) -> None:
        """Take down the first counts[i] of each open row's ids [b, K]."""
        counts = [0 if row is None else count for row, count in zip(self.open, counts, strict=True)]
        total, sizes = sum(counts), torch.tensor(counts).to(ids.device)
        place = torch.arange(len(ids), device=ids.device).repeat_interleave(sizes, output_size=total)
        rank = torch.arange(total, device=ids.device) - (sizes.cumsum(0) - sizes)[place]
        self.kept.append((self.open, counts, ids[place, rank].int()))

    def _stop(self, stops: Stops) -> None:
        """End answers at stop texts, not before min_new_tokens other tokens: that guards against empty answers."""
        places = [i for i, row in enumerate(self.open) if row is not None]
        found = stops.before([self.open[i].tokens for i in places])
        for i, stop in zip(places, found, strict=True):
            if stop is not None and stop >= self.generation.min_new_tokens:
                self.open[i].end_at(stop, self.base.eos_id)
                self.open[i] = None

    def _next(self, tokens: Tensor, stay: list[int]) -> None:
        """Prepare the next forward; where many rows are finished, they leave and `stay` remain."""
        self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        if self.seen is not None:
            self.seen = torch.cat([self.seen, self.ids], dim=1)
        if len(stay) > SHRINK_AT * len(self.open):
            return
        self.open = [self.open[i] for i in stay]
        index = torch.tensor(stay).to(self.base.device)
        # not batch_select_indices, which the layers of recurrent models lack
        self.cache.reorder_cache(index)
        self.ids, self.positions, self.mask, self.keys = (
            x[index] for x in (self.ids, self.positions, self.mask, self.keys)
        )
        if self.seen is not None:
            self.seen = self.seen[index]

    def finished(self) -> list[_Row]:
        """The answers, each with its kept sets."""
        if self.kept:
            ids = torch.cat([ids for _, _, ids in self.kept]).cpu()
            rows = [row for rows, _, _ in self.kept for row in rows]
            counts = [count for _, counts, _ in self.kept for count in counts]
            for row, kept in zip(rows, ids.split(counts), strict=True):
                if row is not None:
                    row.kept.append(kept)
        return self.rows
