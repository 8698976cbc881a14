"""ppo=: the algorithm and its guards."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import group, leaf
from rlhf_exp.schema.names import ACTIONS


@dataclass
class Guards:
    """What is watched while PPO trains, and what follows (docs/guards.md). A bound of 0: that guard is off."""

    patience: int = leaf(
        10,
        doc="Iterations for which a guard that fired stays silent, so that its action can take hold.",
        ge=0,
    )
    baseline: int = leaf(
        3, doc="First iterations whose mean length is what length_share is a share of.", gt=0
    )
    empty_rate: float = leaf(0.5, doc="Fires above this share of answers without a visible character.", ge=0)
    empty_action: str = leaf("warn", doc="On too many empty answers.", choices=ACTIONS)
    length_floor: float = leaf(0.0, doc="Fires when answers are shorter, mean tokens without EOS.", ge=0)
    length_share: float = leaf(
        0.5, doc="Fires when the mean length is below this share of the first iterations'.", ge=0, lt=1
    )
    length_action: str = leaf("warn", doc="On short or shrunken answers.", choices=ACTIONS)
    eos_rate: float = leaf(
        0.05,
        doc="Fires when fewer answers end by themselves, unless the first iteration's did not either.",
        ge=0,
    )
    eos_action: str = leaf("warn", doc="On answers that no longer end.", choices=ACTIONS)
    distinct_2: float = leaf(
        0.1, doc="Fires below this distinct-2 (Li et al. 2016) over the batch, unless it began below.", ge=0
    )
    distinct_2_action: str = leaf("warn", doc="On answers that are all alike.", choices=ACTIONS)
    repetition: float = leaf(
        0.5, doc="Fires above this share of repeated 4-grams in an answer (Welleck et al. 2020).", ge=0
    )
    repetition_action: str = leaf("warn", doc="On answers that repeat themselves.", choices=ACTIONS)
    entropy: float = leaf(0.05, doc="Fires below this entropy, nats a token, unless it began below.", ge=0)
    entropy_action: str = leaf("warn", doc="On a policy that hardly draws any more.", choices=ACTIONS)
    kl: float = leaf(50.0, doc="Fires above this KL to the reference, nats an answer.", ge=0)
    kl_action: str = leaf("warn", doc="On a policy far from where it started.", choices=ACTIONS)
    clipfrac: float = leaf(0.5, doc="Fires above this share of clipped ratios.", ge=0)
    clipfrac_action: str = leaf("warn", doc="On updates that are mostly clipped away.", choices=ACTIONS)
    hacking_window: int = leaf(
        10,
        doc="Iterations over which the score rises while the gold score falls (reward_source.gold): overoptimisation "
        "(Gao et al. 2022); at least 4.",
        ge=0,
    )
    hacking_z: float = leaf(
        2.0,
        doc="How clear both trends must be, standard deviations of Kendall's S (Mann 1945); at 2 and 10 iterations "
        "pure noise has a trend in 1.4 % of windows.",
        gt=0,
    )
    hacking_action: str = leaf("warn", doc="On a score that rises while gold falls.", choices=ACTIONS)
    max_recoveries: int = leaf(
        2,
        doc="Recoveries from nan or inf (back to the last sound adapter, half the learning rate) before the run "
        "stops; 0: it stops at the first.",
        ge=0,
    )


@dataclass
class PPO:
    steps: int = leaf(100, doc="Iterations: one rollout and its updates each.", gt=0)
    batch_size: int = leaf(32, doc="Prompts an iteration.", gt=0)
    samples_per_prompt: int = leaf(1, doc="Answers to each prompt; at least 2 for rloo and grpo.", gt=0)
    epochs: int = leaf(4, doc="Passes over each rollout.", gt=0)
    minibatches: int = leaf(1, doc="Optimiser steps an epoch; divides batch_size.", gt=0)
    micro_batch_size: int = leaf(
        32,
        doc="Rows a forward of scoring and update; 0: as many as fit (docs/scale.md). Changes memory and speed, not "
        "the result.",
        ge=0,
        keyed=False,
    )
    micro_batch_tokens: int = leaf(
        0,
        doc="Tokens a forward of scoring and update, padding included, besides micro_batch_size; 0: no limit. Short "
        "answers then go together in larger numbers. Changes memory and speed, not the result.",
        ge=0,
        keyed=False,
    )
    # what an answer is worth
    score_scaling: str = leaf(
        "none",
        doc="reference: minus the score of the prompt's human reference (trlX's TL;DR example); running: minus mean, "
        "by standard deviation of all scores so far.",
        choices=("none", "running", "reference"),
    )
    reward_clip: float = leaf(10.0, doc="Scaled scores are clipped to +- this; 0: off.", ge=0)
    missing_eos: str = leaf(
        "penalty",
        doc="An answer that never ended: loses missing_eos_penalty, or scores missing_eos_score whatever it says "
        "(Huang et al. 2024, detail 'EOS trick').",
        choices=("penalty", "score"),
    )
    missing_eos_penalty: float = leaf(
        1.0, doc="Subtracted from the score of a response that never ended.", ge=0
    )
    missing_eos_score: float = leaf(-1.0, doc="Score of a response that never ended, for missing_eos=score.")
    length_penalty: float = leaf(
        0.0,
        doc="Subtracted for each token over length_budget; DAPO's overlong buffer of n tokens (Yu et al. 2025, eq. "
        "13): 1/n with a budget of max_new_tokens - n.",
        ge=0,
    )
    length_budget: int = leaf(0, doc="Tokens that are free of length_penalty, a sampled EOS included.", ge=0)
    kl_coef: float = leaf(
        0.05, doc="Weight of the per-token KL penalty in the reward (Ziegler et al. 2019, eq. 2).", ge=0
    )
    kl_estimator: str = leaf(
        "k1",
        doc="k1 = log p/q; k2 = k1^2/2; k3 = q/p - 1 - log q/p (Schulman 2020).",
        choices=("k1", "k2", "k3"),
    )
    kl_in: str = leaf(
        "reward",
        doc="Where the KL penalty is: in the reward, or in the loss (GRPO, Shao et al. 2024, eq. 3; with k2 or k3).",
        choices=("reward", "loss"),
    )
    kl_control: str = leaf(
        "fixed",
        doc="adaptive: kl_coef follows the KL to kl_target (Ziegler et al. 2019, section 2.2).",
        choices=("fixed", "adaptive"),
    )
    kl_target: float = leaf(6.0, doc="KL, nats an answer, that kl_control=adaptive steers to.", gt=0)
    kl_horizon: float = leaf(
        10_000.0, doc="Answers over which kl_control=adaptive corrects a fifth, at most.", gt=0
    )
    # advantages
    estimator: str = leaf(
        "gae",
        doc="gae (Schulman et al. 2016) has a critic; rloo (Ahmadian et al. 2024), grpo (Shao et al. 2024) and "
        "reinforce (moving-average baseline) have none: an answer is one action.",
        choices=("gae", "rloo", "grpo", "reinforce"),
    )
    gamma: float = leaf(1.0, doc="Discount (gae).", ge=0, le=1)
    lam: float = leaf(0.95, doc="GAE lambda (Schulman et al. 2016).", ge=0, le=1)
    whiten_rewards: bool = leaf(
        False,
        doc="gae only, others do not look at it: per-token rewards to variance 1, mean kept (Ziegler et "
        "al. 2019's code).",
    )
    whiten_advantages: bool = leaf(
        True,
        doc="gae only, others do not look at it: advantages to mean 0, variance 1 over the whole batch, "
        "padding excluded.",
    )
    # the update
    cliprange: float = leaf(0.2, doc="Ratio clip (Schulman et al. 2017, eq. 7).", gt=0)
    cliprange_high: float | None = leaf(
        None, doc="Another upper bound of the ratio clip (DAPO, Yu et al. 2025: 0.28); null: cliprange.", gt=0
    )
    dual_clip: float | None = leaf(
        None,
        doc="Bounds the loss of bad tokens at this times the advantage (Ye et al. 2020: 3); null: off.",
        gt=1,
    )
    loss_mean: str = leaf(
        "token",
        doc="Losses are a mean over the minibatch's tokens, or over its answers of each one's mean.",
        choices=("token", "sequence"),
    )
    target_kl: float | None = leaf(
        None,
        doc="The iteration's updates end when policy and rollout are 1.5 times this apart, nats a token "
        "(Spinning Up, TRL); null: never.",
        gt=0,
    )
    ratio_guard: float = leaf(
        0.0, doc="A minibatch whose mean ratio is above this is skipped and counted (TRL: 10); 0: off.", ge=0
    )
    entropy_coef: float = leaf(
        0.0,
        doc="Weight of the policy's entropy in the objective (Schulman et al. 2017, eq. 9); 0: off.",
        ge=0,
    )
    ema_decay: float = leaf(
        0.0,
        doc="Decay an update of the averaged policy, saved as ema (Ouyang et al. 2022: 0.992); 0: none.",
        ge=0,
        lt=1,
    )
    ptx_coef: float = leaf(
        0.0,
        doc="Weight of the language-model loss on demonstrations (Ouyang et al. 2022, eq. 2: 27.8); 0: off.",
        ge=0,
    )
    ptx_ratio: float = leaf(
        1.0, doc="Demonstrations an answer of the minibatch (Ouyang et al. 2022: 8).", gt=0
    )
    # the critic
    critic: str = leaf(
        "trunk",
        doc="trunk: head on the policy's hidden states; detached: the same, without its gradient reaching the "
        "policy; own: own adapter and head.",
        choices=("trunk", "own", "detached"),
    )
    critic_init: str = leaf(
        "auto",
        doc="zero: the head predicts 0, an own adapter is new; reward: critic=own starts as the reward model "
        "(Stiennon et al. 2020); auto: reward where it can be.",
        choices=("auto", "zero", "reward"),
    )
    critic_lr: float | None = leaf(
        None, doc="The critic's learning rate; null: optim.lr. Same schedule.", gt=0
    )
    critic_warmup: int = leaf(0, doc="First iterations in which only the critic is trained.", ge=0)
    vf_coef: float = leaf(0.1, doc="Weight of the value loss.", ge=0)
    cliprange_value: float | None = leaf(0.2, doc="Value clip around the rollout's values; null: off.", gt=0)
    save_every: int = leaf(10, doc="Iterations between kept policy adapters.", gt=0)
    best_metric: str = leaf(
        "auto",
        doc="What the best kept adapter has most of, any metric of an iteration; auto: objective/gold where there is "
        "a gold scorer, else objective/scores - kl_coef * objective/kl.",
    )
    guards: Guards = group(Guards, doc="What is watched while it trains, and what follows.")
    faults: list[str] = leaf(
        [],
        doc="Known mistakes of other recipes to repeat, by name (stages/faults.py); what each breaks is said.",
    )
