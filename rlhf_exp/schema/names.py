"""The words that several groups share: stages, views of a dataset, roles, actions of a guard."""

from __future__ import annotations

STAGES = (
    "sft",
    "prefer",
    "reward",
    "probe",
    "ppo",
    "ilql",
    "dpo",
    "kto",
    "rft",
    "eval",
    "export",
    "report",
    "pipeline",
)
VIEWS = ("demonstrations", "comparisons", "prompts")
# which view of its dataset a stage reads
VIEW = {
    "sft": "demonstrations",
    "prefer": "prompts",
    "reward": "comparisons",
    "probe": "comparisons",
    "ppo": "prompts",
    "ilql": "demonstrations",  # or what ilql.data says
    "dpo": "comparisons",
    "kto": "comparisons",
    "rft": "prompts",
    "eval": "prompts",
    "export": "prompts",  # or that of export.role; it is read by what may have to be trained first
    "pipeline": "prompts",
}
LEARNED = "learned"  # of reward_source.kind, in reward_source.parts, of the two golds
GOLD = "gold"  # the role of a gold scorer that is learned
POLICY = "policy_"  # begins the role of an adapter that prefer.policies gives, its place follows
COMPARED = "compared_"  # begins the role of what eval.policies gives, its place follows
LABELLER = "labeller"  # the role of a reward model that labels answers for stage=prefer
JUDGE = "judge"  # in prefer.labellers: a local model
TRAINED = ("ppo", "dpo", "kto", "rft")  # policies in prefer.policies that are trained first
RLOO = "rloo"  # the role of a second ppo stage, with ppo.estimator=rloo, that eval.policies names
DATA, PREFER = "data", "prefer"  # of dataset.comparisons_from
UNPATCHED = "unpatched"  # begins the role of a reward model that reward_source.gate=patch has trained again
ACTIONS = ("warn", "raise_kl", "lower_lr", "rollback", "stop")  # of a guard
# metrics of every PPO iteration, as ppo.best_metric may name them
ITERATION = (
    *(
        f"objective/{name}"
        for name in ("scores", "scores_std", "rewards", "kl", "kl_max", "kl_coef", "entropy")
    ),
    "objective/kl_untruncated",  # of samplers that reshape the distribution
    *(f"response/{name}" for name in ("length_mean", "length_min", "eos_rate", "empty_rate", "repetition")),
    *(f"response/{name}" for name in ("distinct_1", "distinct_2", "distinct_3", "kept_mass")),
    *(f"policy/{name}" for name in ("loss", "approxkl", "clipfrac", "ratio_mean", "ratio_max", "grad_norm")),
    *("policy/skipped", "policy/nonfinite"),
)
GOLD_METRIC = "objective/gold"
PART_METRIC = "objective/part_"  # begins those of the parts of reward_source.kind=sum
