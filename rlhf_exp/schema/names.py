"""The words that several groups share: stages, views of a dataset, roles, actions of a guard."""

from __future__ import annotations

STAGES = ("sft", "reward", "probe", "ppo", "ilql", "eval", "export", "pipeline")
VIEWS = ("demonstrations", "comparisons", "prompts")
# which view of its dataset a stage reads
VIEW = {
    "sft": "demonstrations",
    "reward": "comparisons",
    "probe": "comparisons",
    "ppo": "prompts",
    "ilql": "demonstrations",  # or what ilql.data says
    "eval": "prompts",
    "export": "prompts",  # or that of export.role; it is read by what may have to be trained first
    "pipeline": "prompts",
}
LEARNED = "learned"  # of reward_source.kind, in reward_source.parts, of the two golds
GOLD = "gold"  # the role of a gold scorer that is learned
UNPATCHED = "unpatched"  # begins the role of a reward model that reward_source.gate=patch has trained again
ACTIONS = ("warn", "raise_kl", "lower_lr", "rollback", "stop")  # of a guard
