"""Where a reward model's scores are 0: the loss sees differences only, so the constant is free.

Its mean over the chosen answers, the references (Stiennon et al. 2020, section 3.4), or samples of the SFT policy
(Ziegler et al. 2019, section 2) becomes 0, so that a score says how much better or worse an answer is than those. On
demand their standard deviation becomes 1 (Ziegler et al., ibid.): gain and bias of the head, whose order stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rlhf_exp.data.pairs import Pair
from rlhf_exp.data.records import Record
from rlhf_exp.errors import InputError
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.roles import BASE, Roles
from rlhf_exp.progress import Progress
from rlhf_exp.rewards.learned import score_sequences
from rlhf_exp.rollout.engine import generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import Generation, RewardRun
from rlhf_exp.stages import reward_faults
from rlhf_exp.stages.context import Context

CENTRED_ON = 256  # answers whose mean score becomes 0
SFT = "sft"


def center(
    config: RewardRun,
    context: Context,
    roles: Roles,
    head: ScalarHead,
    rows: Sequence[Record],
    pairs: Sequence[Pair],
) -> None:
    """Shift the bias so that the mean score of the answers that reward.center_on names is 0.

    rows and pairs: the training comparisons. InputError where reward.unit_std finds no deviation to scale by.
    """
    size, sampling = 2 * config.train.micro_batch_size, config.reward.center_on == "samples"
    if config.reward.center_on == "references":
        records, found = context.read(config.dataset, "demonstrations", "train")
        answers = reward_faults.answers(config.reward, found.answers["response"], roles.base.eos_id)
        sequences = [found.prompts[i] + answers[i] for i in spread(records)]
    else:
        sequences = [pairs[i].prompt + ([] if sampling else pairs[i].chosen) for i in spread(rows)]
    first = sampling * len(sequences)  # answers that are sampled before any is scored
    with Progress("center", first + len(sequences)) as progress:
        if sampling:
            sequences = sampled(
                config, context, roles, sequences, size, lambda done: progress.update(done, {})
            )
        scores = score_sequences(
            roles, "reward", head, sequences, size, lambda done: progress.update(first + done, {})
        )
    found = torch.tensor(scores, dtype=torch.float64)
    with torch.no_grad():
        head.bias -= found.mean()
        if config.reward.unit_std:
            deviation = float(found.std(correction=0))
            if not deviation > 0:
                raise InputError(
                    f"reward.unit_std scales by the deviation of {len(found)} scores, which is {deviation:g}: this "
                    "reward model tells none of these answers apart; leave it out, or look at optim.lr"
                )
            head.weight /= deviation
            head.bias /= deviation


def spread(rows: Sequence[Record]) -> list[int]:
    """At most CENTRED_ON rows of different prompts, by their hash: the file may be sorted."""
    first = {row.id: i for i, row in reversed(list(enumerate(rows)))}
    return [first[id] for id in sorted(first)[:CENTRED_ON]]


def sampled(
    config: RewardRun,
    context: Context,
    roles: Roles,
    prompts: Sequence[list[int]],
    size: int,
    tell: Callable[[int], None],
) -> list[list[int]]:
    """The prompts with an answer each of the SFT policy, at temperature 1, as PPO's answers begin.

    tell: is told how many there are so far.
    """
    role, folder = BASE, context.adapter(SFT)
    if folder is not None:
        role = SFT
        roles.load(role, folder)
    generation = Generation(max_new_tokens=config.dataset.max_response_tokens)
    found = []
    for start in range(0, len(prompts), size):
        some = list(prompts[start : start + size])
        keys = [row_key(config.seed, 0, start + i) for i in range(len(some))]
        rollout = generate(roles.base, lambda: roles.use(role), some, keys, generation)
        answers = reward_faults.answers(config.reward, rollout.responses, roles.base.eos_id)
        found += [prompt + answer for prompt, answer in zip(some, answers, strict=True)]
        tell(len(found))
    if role is not BASE:
        roles.remove(role)
    return found
