"""What is wrong with a composed config: each value by itself, then the rules that join several keys."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf_exp.fields import did_you_mean, leaves, undeclared, value_problem
from rlhf_exp.schema.names import GOLD_METRIC, ITERATION, LEARNED, PART_METRIC, PREFER
from rlhf_exp.schema.runs import (
    RUNS,
    Command,
    DPORun,
    EvalRun,
    ILQLRun,
    KTORun,
    PipelineRun,
    PPORun,
    PreferRun,
    ProbeRun,
    ReportRun,
    RewardRun,
    RFTRun,
    Run,
    SFTRun,
    keys,
    view_of,
    views_of,
)
from rlhf_exp.schema.scoring import PROBES, SAME, learns


def _across(config: Command) -> Iterator[str]:
    """Rules that join several keys."""
    if isinstance(config, ReportRun):
        yield from _across_report(config)
        return
    view = view_of(config)
    made = view == "comparisons" and config.dataset.comparisons_from == PREFER  # by a stage before
    if not made and getattr(config.dataset.views, view) is None:
        yield f"dataset.views.{view} is null: dataset {config.dataset.name} has no {view} for {config.stage}"
    if config.lora.targets == ["auto"] and not config.model.lora_targets:
        yield f"lora.targets is [auto], but model {config.model.name} has no lora_targets: name the modules"
    if config.lora.full and config.stage != "sft":
        yield (
            f"lora.full is for sft, not for {config.stage}: the other stages share one base; to train all weights "
            "first: 'upstream.sft={lora: full}'"
        )
    if not config.lora.targets:
        yield "lora.targets must name a module, or be [auto]"
    if isinstance(config, SFTRun | RewardRun | ILQLRun | DPORun | KTORun | RFTRun):
        batch, micro = config.train.batch_size, config.train.micro_batch_size
        if batch % min(batch, micro or batch):
            yield f"train.micro_batch_size must divide train.batch_size, got {micro} and {batch}"
    if (
        hasattr(config, "optim")
        and config.optim.moments == "8bit"
        and config.strategy.name.startswith("zero")
    ):
        yield (
            f"optim.moments=8bit is of strategy=single or ddp: strategy={config.strategy.name} shards the moments in "
            "float32 instead; leave one of the two out"
        )
    yield from _across_preferences(config)
    if isinstance(config, PreferRun):
        yield from _across_prefer(config)
    if isinstance(config, RewardRun):
        yield from _unknown_probes("reward.negatives", config.reward.negatives)
    if isinstance(config, ProbeRun):
        yield from _unknown_probes("probe.kinds", config.probe.kinds, (*PROBES, *SAME))
    if isinstance(config, RewardRun) and config.reward.unit_std and not config.reward.center:
        yield "reward.unit_std is a part of centring, which reward.center=false turns off: set that, or leave it out"
    references = isinstance(config, RewardRun) and "demonstrations" in views_of(config)
    if references and config.dataset.views.demonstrations is None:
        yield (
            "reward.center_on=references needs dataset.views.demonstrations, which is null: dataset "
            f"{config.dataset.name} has none; choose reward.center_on=chosen or samples"
        )
    if isinstance(config, PPORun):
        batch, minibatches = config.ppo.batch_size, config.ppo.minibatches
        if batch % minibatches:
            yield f"ppo.minibatches must divide ppo.batch_size, got {minibatches} and {batch}"
        yield from _across_ppo(config)
    if isinstance(config, ILQLRun) and not (config.ilql.betas and min(config.ilql.betas) >= 0):
        yield f"ilql.betas must hold a number, and none below 0, got {config.ilql.betas}"
    if isinstance(config, RFTRun):
        yield from _across_rft(config)
    if isinstance(config, PPORun | EvalRun | ILQLRun | RFTRun):
        yield from _across_source(config)
    if hasattr(config, "generation"):
        least, most = config.generation.min_new_tokens, config.generation.max_new_tokens
        if least >= most:
            rule = "generation.min_new_tokens must be less than generation.max_new_tokens"
            yield f"{rule}, got {least} and {most}"
        if isinstance(config, PPORun) and config.generation.greedy:
            yield "generation.greedy is for evaluation: PPO learns from samples; leave it to stage=eval"
        if "" in config.generation.stop:
            yield "generation.stop holds an empty text, which would end every answer at once: leave it out"
        if any(re.search(r"\\[nrt](?![a-z])", text) for text in config.generation.stop):
            yield (
                "generation.stop holds a backslash and a letter where a line break may be meant: on the command "
                'line write $\'generation.stop=["\\n"]\', in a file "\\n"'
            )
    validation, heldout = config.dataset.validation_share, config.dataset.heldout_share
    if validation + heldout >= 1:
        yield (
            "dataset.validation_share + dataset.heldout_share must be less than 1, got "
            f"{validation} + {heldout}"
        )


def _across_report(config: ReportRun) -> Iterator[str]:
    given, report = config.inputs, config.report
    listed = given if isinstance(given, list) else [given]
    if not listed or not all(isinstance(each, str | int) and str(each).strip() for each in listed):
        yield f"inputs must be a folder, a list of run folders, or an MLflow experiment, got {given!r}"
    if not report.objectives or len(set(report.objectives)) < len(report.objectives):
        yield f"report.objectives must name a metric, and none twice, got {report.objectives}"
    if report.kl in report.objectives:
        yield f"report.objectives has {report.kl}, which is the x-axis (report.kl)"
    if report.kl_limits != sorted(set(report.kl_limits)) or min(report.kl_limits, default=0) < 0:
        yield f"report.kl_limits must rise from 0 or more, got {report.kl_limits}"


def _across_prefer(config: PreferRun) -> Iterator[str]:
    prefer = config.prefer
    if not prefer.labellers:
        yield "prefer.labellers is empty: say what orders the answers, such as [sentiment], [learned] or [judge]"
    if not prefer.policies:
        yield "prefer.policies is empty: say who answers, such as [sft]"
    for key, names in (("labellers", prefer.labellers), ("policies", prefer.policies)):
        if len(set(names)) < len(names):
            yield f"prefer.{key} names one twice: {', '.join(names)}"
    if prefer.policies and len(prefer.policies) * prefer.samples < 2:
        yield (
            f"prefer.samples={prefer.samples} of one policy is one answer, which compares with nothing: set it to 2 "
            "or more, or name another policy"
        )
    if config.generation.greedy and prefer.samples > 1:
        yield f"generation.greedy gives prefer.samples={prefer.samples} equal answers: leave it out"


def _across_rft(config: RFTRun) -> Iterator[str]:
    rft = config.rft
    if rft.keep > rft.samples:
        yield f"rft.keep={rft.keep} is more than there are answers to a prompt, rft.samples={rft.samples}"
    if rft.keep in (0, rft.samples) and rft.threshold is None:
        yield (
            f"rft.keep={rft.keep} learns every answer, good or bad: set rft.threshold, the score that is good "
            "enough, or keep fewer than rft.samples"
        )
    if config.generation.greedy:
        yield f"generation.greedy gives rft.samples={rft.samples} equal answers: leave it out"


def _across_preferences(config: Run) -> Iterator[str]:
    if isinstance(config, DPORun) and config.dpo.loss != "sigmoid" and config.dpo.label_smoothing:
        yield (
            f"dpo.label_smoothing={config.dpo.label_smoothing:g} is of dpo.loss=sigmoid (cDPO), but dpo.loss="
            f"{config.dpo.loss}: set it to 0"
        )
    if isinstance(config, KTORun) and config.train.batch_size < 2:
        yield (
            f"kto estimates the KL from prompts with answers to other prompts of the batch: train.batch_size must be "
            f"at least 2 pairs, got {config.train.batch_size}"
        )


def _unknown_probes(key: str, given: list[str], known: tuple[str, ...] = PROBES) -> Iterator[str]:
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            yield f"{key}: there is no probe {name}{hint}"
    if len(set(given)) < len(given):
        yield f"{key} names a probe twice: {', '.join(given)}"


def _across_gate(config: PPORun | EvalRun | ILQLRun | RFTRun) -> Iterator[str]:
    source, given = config.reward_source, config.adapters
    if source.gate not in ("fail", "patch"):
        return
    if not learns(source):
        yield (
            f"reward_source.gate={source.gate} is of learned reward models, but the reward source has none: leave it "
            "out, or choose reward_source=learned"
        )
    for key, value in (("reward", given.reward), ("reward_ensemble", given.reward_ensemble)):
        if value and source.gate == "patch":
            yield (
                f"reward_source.gate=patch trains the reward model again, but adapters.{key} gives it: leave that "
                "out, or set reward_source.gate=warn"
            )


def _across_source(config: PPORun | EvalRun | ILQLRun | RFTRun) -> Iterator[str]:
    source, given = config.reward_source, config.adapters
    yield from _across_gate(config)
    if source.kind == "sum" and not source.parts:
        yield "reward_source.kind=sum needs reward_source.parts, such as [1*learned,-0.01*length]"
    if source.kind != "sum" and source.parts:
        yield f"reward_source.parts is for reward_source.kind=sum, which is {source.kind}"
    if source.ensemble > 1 and not learns(source):
        yield (
            f"reward_source.ensemble={source.ensemble} is of learned reward models, but the reward source has none: "
            "set it to 1, or choose reward_source=learned"
        )
    compared = isinstance(config, ILQLRun) and config.ilql.data == "comparisons"
    if compared and source.gold == LEARNED and config.dataset.half != "first":
        yield (
            "ilql.data=comparisons would learn from those that reward_source.gold=learned is trained on: set "
            "dataset.half=first"
        )
    members = len(given.reward_ensemble)
    if members and members != source.ensemble:
        yield (
            f"adapters.reward_ensemble names {members} adapters, but reward_source.ensemble={source.ensemble}: "
            "they must be as many"
        )
    if given.reward and (members or source.ensemble > 1):
        yield "adapters.reward is one reward model: for an ensemble set adapters.reward_ensemble=[...] instead"
    if isinstance(config, EvalRun | PipelineRun):
        yield from _across_judge(config)
    if isinstance(config, EvalRun | PipelineRun) and config.eval.gold == LEARNED != source.gold:
        yield (
            "eval.gold=learned is the model of reward_source.gold=learned, which halves the comparisons between it "
            f"and the reward model: set that too (it is {source.gold})"
        )


def _across_judge(config: EvalRun | PipelineRun) -> Iterator[str]:
    judge, source = config.eval.judge, config.reward_source
    if judge == LEARNED and not learns(source):
        yield (
            "eval.judge=learned is the reward model, but the reward source has none: choose a rule, gold or model, "
            "or reward_source=learned"
        )
    if judge == "gold" and config.eval.gold == "none":
        yield "eval.judge=gold compares by eval.gold, which is none: set it, or choose another judge"
    if judge == "model" and not config.judge.model:
        yield "eval.judge=model needs judge.model: a folder or hub id of a model that can judge, or base"
    if isinstance(config, EvalRun) and judge != "model" and config.judge.model:
        yield f"judge.model={config.judge.model} is for eval.judge=model, which is {judge}: set that, or leave it out"
    if judge == "none" and config.eval.against is not None:
        yield (
            f"eval.against={config.eval.against} is for win rates, which eval.judge makes: set it (learned, gold, "
            "model or a rule)"
        )


def _across_ppo(config: PPORun) -> Iterator[str]:
    ppo = config.ppo
    if ppo.estimator in ("rloo", "grpo") and ppo.samples_per_prompt < 2:
        yield (
            f"ppo.estimator={ppo.estimator} compares answers to the same prompt: ppo.samples_per_prompt must be at "
            f"least 2, got {ppo.samples_per_prompt}"
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        yield "ppo.kl_in=loss needs ppo.kl_estimator=k2 or k3: the gradient of k1 is 0 on average"
    if ppo.kl_in == "loss" and ppo.kl_control == "adaptive":
        yield "ppo.kl_control=adaptive steers the penalty in the reward: it needs ppo.kl_in=reward"
    if ppo.kl_control == "adaptive":
        answers = ppo.batch_size * ppo.samples_per_prompt
        if answers >= 5 * ppo.kl_horizon:
            yield (
                f"ppo.kl_horizon={ppo.kl_horizon:g} is too short for {answers} answers an iteration: one step could "
                "take kl_coef below 0; it must be more than a fifth of them"
            )
        if ppo.kl_coef == 0:
            yield "ppo.kl_control=adaptive multiplies ppo.kl_coef, which is 0 and would stay so: start above 0"
    if ppo.critic_warmup >= ppo.steps:
        yield (
            f"ppo.critic_warmup={ppo.critic_warmup} leaves the policy no iteration: it must be less than ppo.steps="
            f"{ppo.steps}"
        )
    if ppo.estimator != "gae" and (ppo.critic_lr is not None or ppo.critic != "trunk"):
        yield f"ppo.critic and ppo.critic_lr are of a critic, but ppo.estimator={ppo.estimator} has none"
    if ppo.critic_warmup and ppo.estimator != "gae":
        yield f"ppo.critic_warmup={ppo.critic_warmup} trains a critic, but ppo.estimator={ppo.estimator} has none"
    if ppo.critic_init == "reward" and (ppo.critic != "own" or not learns(config.reward_source)):
        yield "ppo.critic_init=reward needs ppo.critic=own and reward_source.kind=learned (or a sum with it)"
    yield from _across_guards(config)
    yield from _across_best(config)
    if ppo.ptx_coef > 0 and config.dataset.views.demonstrations is None:
        yield (
            f"ppo.ptx_coef={ppo.ptx_coef} trains on demonstrations too, but dataset.views.demonstrations is null: "
            f"dataset {config.dataset.name} has none"
        )


def _across_guards(config: PPORun) -> Iterator[str]:
    guards, ppo = config.ppo.guards, config.ppo
    for key, _, value in leaves(guards):
        if value == "raise_kl" and (ppo.kl_in == "loss" or ppo.kl_coef == 0):
            yield (
                f"ppo.guards.{key}=raise_kl raises the penalty in the reward: it needs ppo.kl_in=reward and "
                "ppo.kl_coef above 0"
            )
    if guards.hacking_action != "warn" and config.reward_source.gold == "none":
        yield (
            f"ppo.guards.hacking_action={guards.hacking_action} is for a gold score that falls, which "
            "reward_source.gold makes: set it (learned or a rule), or leave the action out"
        )
    if 0 < guards.hacking_window < 4:
        yield f"ppo.guards.hacking_window must be at least 4, or 0 for off, got {guards.hacking_window}"


def _across_best(config: PPORun) -> Iterator[str]:
    name, ppo = config.ppo.best_metric, config.ppo
    if name == "auto":
        return
    critic, several = ppo.estimator == "gae", config.reward_source.kind == "sum"
    needs = {  # metrics that not every run has: whether this one does, and what makes it so
        GOLD_METRIC: (config.reward_source.gold != "none", "reward_source.gold"),
        "objective/ensemble_std": (config.reward_source.ensemble > 1, "reward_source.ensemble above 1"),
        "objective/score_minus_ref": (ppo.score_scaling == "reference", "ppo.score_scaling=reference"),
        "policy/kl_loss": (ppo.kl_in == "loss", "ppo.kl_in=loss"),
        "critic/loss": (critic, "ppo.estimator=gae"),
        "critic/clipfrac": (critic, "ppo.estimator=gae"),
        "critic/explained_variance": (critic, "ppo.estimator=gae"),
        "ptx/loss": (ppo.ptx_coef > 0, "ppo.ptx_coef above 0"),
    }
    if name in needs:
        there, made = needs[name]
        if not there:
            yield f"ppo.best_metric={name} is a metric of runs with {made} only: set that, or choose another"
    elif not (name in ITERATION or (several and name.startswith(PART_METRIC))):
        near = did_you_mean(name, (*ITERATION, *needs)) or f"; there are {', '.join(ITERATION)}"
        yield f"ppo.best_metric={name} is no metric of an iteration{near}"


def problems(config: Command, *, across: bool = True) -> list[str]:
    """Every problem of a composed config, one line each; empty when it is sound.

    Rules that join keys are looked at only where each key by itself is sound; `across=False` leaves them out.
    """
    known = keys(config.stage) if config.stage in RUNS else []
    found = [f"unknown key {key}{did_you_mean(key, known)}" for key in undeclared(config)]
    found += [line for key, f, value in leaves(config) if (line := value_problem(key, f, value))]
    return found or (list(_across(config)) if across else [])
