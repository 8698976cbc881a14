"""One system of the PPO benchmark: rlhf_exp's own iteration, as `stage=ppo` runs it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from shapes import CLIP, EPOCHS, GAMMA, KL_COEF, LAM, LORA_ALPHA, LORA_RANK, LR, TARGETS, VF_COEF, Shape
from side import Side


def run(shape: Shape, dtype: str, micro: int, side: Side) -> None:
    """Build everything, then an iteration each time the parent asks for one."""
    from rlhf_exp.data.records import Prompt
    from rlhf_exp.model.base import load_base
    from rlhf_exp.model.heads import ScalarHead
    from rlhf_exp.model.roles import Roles, lora_config
    from rlhf_exp.schema import PPO, Generation, Lora, Model, Optim, PPORun, RewardSource
    from rlhf_exp.stages.actors import Actors
    from rlhf_exp.stages.optim import adamw
    from rlhf_exp.stages.ppo import Carried, iterate
    from rlhf_exp.stages.references import References
    from rlhf_exp.stages.state import State

    folder = shape.folder()
    model = Model(name=shape.name, path=str(folder), dtype=dtype, lora_targets=TARGETS)
    if shape.name == "smollm2":
        model.eos_token = shape.eos(None)
    base = load_base(model, "cpu")
    lora = Lora(r=LORA_RANK, alpha=LORA_ALPHA)
    ppo = PPO(
        batch_size=shape.batch,
        micro_batch_size=micro,
        epochs=EPOCHS,
        kl_coef=KL_COEF,
        vf_coef=VF_COEF,
        gamma=GAMMA,
        lam=LAM,
        cliprange=CLIP,
        cliprange_value=CLIP,
    )
    config = PPORun(
        model=model,
        lora=lora,
        ppo=ppo,
        optim=Optim(lr=LR, schedule="constant"),
        generation=Generation(max_new_tokens=shape.response),
        reward_source=RewardSource(kind="learned"),
    )
    encoded = shape.prompts()
    prompts = [Prompt(id=i, prompt=f"prompt {i}", reference=None) for i in range(shape.batch)]
    with Roles(base) as roles, tempfile.TemporaryDirectory() as temporary:
        roles.new("policy", lora_config(lora, model), seed=0)
        roles.save("policy", Path(temporary, "sft"))
        roles.load("ref", Path(temporary, "sft"))
        roles.new("reward", lora_config(lora, model), seed=1, trainable=False)
        reward_head = ScalarHead(base.hidden_size).reset(2).requires_grad_(False)
        actors = Actors(roles, "ref", "policy", ScalarHead(base.hidden_size), {"reward": reward_head})
        optimizer = adamw(actors.groups(ppo), config.optim)
        carried = Carried(State.start(ppo, base.device), References(config))
        step = 0
        while side.wait():
            step += 1
            metrics, _ = iterate(config, actors, optimizer, step, prompts, encoded, carried)
            parts = {name: metrics[f"time/{name}"] for name in ("rollout", "score", "update")}
            side.report(parts | {"tokens": metrics["response/length_mean"] * shape.batch})
