"""Two systems of the PPO benchmark: TRL 1.9.2's experimental PPOTrainer, as it comes and with a LoRA value model."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from shapes import CLIP, EPOCHS, GAMMA, KL_COEF, LAM, LORA_ALPHA, LORA_RANK, LR, TARGETS, VF_COEF, Shape
from side import Side


def run(shape: Shape, dtype: str, micro: int, side: Side, lora_value: bool) -> None:
    """Build the trainer; its loop waits at every step for the parent."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    folder, kind = shape.folder(), getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # TRL tells padding by the token: one that is not in the texts
    tokenizer.pad_token = "<pad>" if shape.name != "smollm2" else "<reponame>"
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)

    def classifier() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=kind)

    lora = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "target_modules": TARGETS}
    value = classifier()
    if lora_value:
        # get_peft_model wraps in place; the trainer wants the plain class around the wrapped layers
        get_peft_model(value, LoraConfig(task_type="SEQ_CLS", modules_to_save=[], **lora))
        value.score.requires_grad_(True)
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=shape.batch // micro,
        num_mini_batches=1,
        num_ppo_epochs=EPOCHS,
        total_episodes=shape.batch * 10_000,
        local_rollout_forward_batch_size=shape.batch,
        response_length=shape.response,
        temperature=1.0,
        kl_coef=KL_COEF,
        vf_coef=VF_COEF,
        gamma=GAMMA,
        lam=LAM,
        cliprange=CLIP,
        cliprange_value=CLIP,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_epsilon=1e-5,
        bf16=dtype == "bfloat16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        logging_steps=10**6,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"input_ids": shape.prompts()})
    clock = _Clock(side, shape)
    clock.wrap(ppo_trainer)
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=classifier(),
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        callbacks=[clock.callback()],
    )
    trainer.log = lambda *_, **__: None
    clock.ask()
    trainer.train()


class _Clock:
    """Times the parts of the trainer's loop: generation, until the advantages are whitened, the rest."""

    def __init__(self, side: Side, shape: Shape):
        self.side, self.shape = side, shape

    def ask(self) -> None:
        if not self.side.wait():
            raise SystemExit(0)
        self.start = self.generated = self.scored = time.perf_counter()

    def wrap(self, module: Any) -> None:
        generate, whiten = module.batch_generation, module.masked_whiten

        def timed_generate(*arguments: Any, **named: Any) -> Any:
            found = generate(*arguments, **named)
            self.generated = time.perf_counter()
            return found

        def timed_whiten(*arguments: Any, **named: Any) -> Any:
            found = whiten(*arguments, **named)
            self.scored = time.perf_counter()
            return found

        module.batch_generation, module.masked_whiten = timed_generate, timed_whiten

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                end = time.perf_counter()
                clock.side.report(
                    {
                        "rollout": clock.generated - clock.start,
                        "score": clock.scored - clock.generated,
                        "update": end - clock.scored,
                        "tokens": clock.shape.batch * clock.shape.response,
                    }
                )
                clock.ask()

        return Steps()
