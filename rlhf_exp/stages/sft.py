"""Supervised fine-tuning with LoRA, on TRL's SFTTrainer: the loss counts the response's tokens and its EOS.

Ouyang et al. 2022, step 1. The adapter goes onto the shared base and is taken off again afterwards.
"""

from __future__ import annotations

from rlhf_exp.data.load import load_view, statistics
from rlhf_exp.data.templates import Cuts, encode_prompts, encode_responses
from rlhf_exp.model.roles import Roles, lora_config
from rlhf_exp.rollout.engine import generate
from rlhf_exp.rollout.noise import row_key
from rlhf_exp.schema import Generation, SFTRun
from rlhf_exp.stages import supervised
from rlhf_exp.stages.context import ADAPTER, Context
from rlhf_exp.stages.optim import adamw, schedule

SHOW = (("train/loss", "loss", ".3f"), ("train/token_accuracy", "accuracy", ".2f"), ("optim/lr", "lr", ".1e"))
NAMES = {
    "loss": "train/loss",
    "mean_token_accuracy": "train/token_accuracy",
    "entropy": "train/entropy",
    "grad_norm": "train/grad_norm",
    "learning_rate": "optim/lr",
    "num_tokens": "train/tokens",
}
IGNORED = -100  # label of a token that does not count
SAMPLES = 4  # answers written at the end


def run(config: SFTRun, context: Context) -> dict[str, float]:
    """Train the policy adapter; publish it."""
    from trl import SFTConfig, SFTTrainer

    base, cuts = context.base, Cuts()
    rows = load_view(config.dataset, "demonstrations", "train")
    prompts = encode_prompts(base.tokenizer, config.dataset, [row.prompt for row in rows], cuts)
    responses = encode_responses(base.tokenizer, config.dataset, [row.response for row in rows], cuts=cuts)
    data = supervised.dataset_of(
        input_ids=[p + r for p, r in zip(prompts, responses, strict=True)],
        labels=[[IGNORED] * len(p) + r for p, r in zip(prompts, responses, strict=True)],
    )
    steps = supervised.steps_of(config.train, len(rows))
    with (
        Roles(base) as roles,
        supervised.as_before(base),
        supervised.trainer_arguments(config, base, steps) as arguments,
        context.log("sft", steps, SHOW) as log,
    ):
        roles.new("policy", lora_config(config.lora, config.model), config.seed)
        optimizer = adamw(roles.parameters("policy"), config.optim)
        # max_length: the templates cut, and count what they cut
        arguments = supervised.on_one_device(SFTConfig(**arguments, max_length=None, pad_to_multiple_of=None))
        with roles.use("policy"):
            trainer = SFTTrainer(
                model=base.model,
                args=arguments,
                train_dataset=data,
                processing_class=base.tokenizer,
                optimizers=(optimizer, schedule(optimizer, config.optim, steps)),
                callbacks=[supervised.LogTo(log, NAMES)],
            )
            supervised.without_printing(trainer)
            result = trainer.train()
        base.model.eval()
        log.samples(steps, samples(config, context, roles, prompts))
        with context.folder.publish(ADAPTER) as folder:
            roles.save("policy", folder)
    metrics = {"train/loss": result.training_loss, "data/rows": float(len(rows))}
    return metrics | statistics(config.dataset, "demonstrations").metrics() | cuts.metrics()


def samples(
    config: SFTRun, context: Context, roles: Roles, prompts: list[list[int]]
) -> list[dict[str, object]]:
    """A few answers of the trained policy to training prompts, to read."""
    chosen = prompts[:SAMPLES]
    keys = [row_key(config.seed, 0, i) for i in range(len(chosen))]
    generation = Generation(max_new_tokens=min(64, config.dataset.max_response_tokens))
    rollout = generate(context.base, lambda: roles.use("policy"), chosen, keys, generation)
    decode = context.base.tokenizer.batch_decode
    texts = zip(decode(rollout.prompts), decode(rollout.responses, skip_special_tokens=True), strict=True)
    return [{"prompt": prompt, "response": response} for prompt, response in texts]
