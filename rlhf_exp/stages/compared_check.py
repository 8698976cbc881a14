"""What can be found wrong with an evaluation's policies and its judge before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_exp.errors import InputError
from rlhf_exp.rewards import judge
from rlhf_exp.schema import EvalRun
from rlhf_exp.stages import policies
from rlhf_exp.stages.nodes import Node, Plan


def require(node: Node, plan: Plan) -> None:
    """InputError, a line for each problem; node: the evaluation, of which nothing may be trained yet."""
    config, problems = node.config, []
    assert isinstance(config, EvalRun)
    for check in (_judge, _reference, _policies):
        try:
            problems += check(node, config, plan)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)


def _judge(node: Node, config: EvalRun, plan: Plan) -> list[str]:
    if config.eval.judge == "model":
        judge.check(config.judge, plan.base.folder)
    return []


def _reference(node: Node, config: EvalRun, plan: Plan) -> Iterator[str]:
    """sft is trained for the evaluation alone only where it is named, or by default: another SFT is another KL."""
    sft = node.parents["sft"]
    named = not config.eval.policies or any(entry.who == "sft" for entry in policies.entries(config.eval))
    asked = any("sft" in other.parents for other in plan.missing if other is not node)
    if sft in plan.missing and not named and not asked:
        yield (
            "eval.policies does not name sft, which KL is measured from and which is not trained yet: name it, or "
            "give it, adapters.sft=PATH (adapters.sft=base: from the plain base)"
        )


def _policies(node: Node, config: EvalRun, plan: Plan) -> Iterator[str]:
    """As at the start of the evaluation (candidates.py), of each entry whose run is there; else what is known."""
    from rlhf_exp.stages import candidates  # imports torch

    sft = node.parents["sft"]
    parents = {role: p.folder for role, p in node.parents.items() if p.folder and not p.makes_base}
    folder = plan.base.folder
    sft_base = sft.makes_base or (folder is not None and candidates.made_by_sft(folder))
    if all(parent.folder or parent.is_base for parent in node.parents.values()):
        candidates.reference_of(config.eval, candidates.listed(config.eval, parents, sft_base))
        return
    called, found = policies.names(config.eval, parents), []
    for entry in policies.entries(config.eval):
        if entry.role in parents:
            try:
                found += candidates.of_entry(config.eval, entry, called[entry.place], parents, sft_base)
            except InputError as error:
                yield from error.problems
            continue
        ppo = node.parents[entry.who].config if entry.who in policies.STEPPED else None
        if entry.step is not None and ppo is not None:
            steps, every = ppo.ppo.steps, ppo.ppo.save_every
            if not 0 < entry.step <= steps or (entry.step % every and entry.step != steps):
                yield (
                    f"{entry.key}={entry.text}: step {entry.step} will not be kept: ppo.save_every={every} keeps its "
                    f"multiples, and the last, {steps}"
                )
    candidates.require_different(found)
    against = config.eval.against
    known = list(called.values()) or ["sft", "base", "ppo"]
    if against is not None and not any(
        against == k or against.startswith((f"{k}@", f"{k} (", f"{k}:")) for k in known
    ):
        yield (
            f"eval.against={against}: no policy of this evaluation will be called that; there will be "
            f"{', '.join(known)}"
        )
