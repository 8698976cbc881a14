"""The README.md of an export: what it is, what it stands on, and lines of Python that load and use it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Facts(NamedTuple):
    """What export.json holds."""

    role: str  # sft, ppo, dpo, kto, rft, reward
    form: str  # merged, adapter
    name: str  # of the model
    base: str  # hub id or folder
    base_hash: str
    licence: str
    key: str  # of the run that trained it; "" for a foreign adapter
    metrics: dict[str, float]  # of that run
    lora: dict[str, Any]  # adapter_config.json; {} where it is merged
    constant: float  # what a reward model's scores are less than those in rlhf_exp
    pad: str
    resized: int  # rows that the base's embedding is to have for PAD; 0: it has them
    prompt: str  # the template: format of a prompt, "" where it is not known
    response: str  # and of an answer
    chat: bool  # the prompt is made by the tokenizer's chat template instead


# of the run that trained it, as far as it has them
FIGURES = {
    "validation/accuracy": "accuracy on validation pairs",
    "validation/accuracy_low": "its 95 % interval, from",
    "validation/accuracy_high": "its 95 % interval, to",
    "validation/length_accuracy": "accuracy of the rule that the longer answer is better",
    "validation/ece": "expected calibration error",
    "objective/scores": "mean score at the end of training",
    "objective/kl": "KL to the SFT model, nats an answer",
    "train/loss": "training loss",
}
WHAT = {
    "sft": "A policy, trained on demonstrations (SFT).",
    "ppo": "A policy, trained by reinforcement learning from a reward (PPO).",
    "dpo": "A policy, trained on comparisons (direct preference optimisation).",
    "kto": "A policy, trained on wanted and unwanted answers (Kahneman-Tversky optimisation).",
    "rft": "A policy, trained on its own best answers (rejection-sampling fine-tuning).",
    "reward": "A reward model: a prompt with an answer to it gets a score.",
}


def card(facts: Facts) -> str:
    """Markdown with the front matter of a model card."""
    merged = facts.form == "merged"
    lines = [
        "---",
        f"base_model: {facts.base}",
        f"library_name: {'transformers' if merged else 'peft'}",
        f"pipeline_tag: {'text-classification' if facts.role == 'reward' else 'text-generation'}",
        f"tags: [rlhf, {'reward-model' if facts.role == 'reward' else facts.role}]",
        "---",
        "",
        f"# {facts.name}: {facts.role}",
        "",
        WHAT[facts.role] + (" All weights." if merged else " The adapter alone, to be put on its base."),
        "",
        *_facts(facts),
        "",
        "## How to load it",
        "```python",
        *(_reward(facts) if facts.role == "reward" else _policy(facts)),
        "```",
        *_notes(facts),
    ]
    return "\n".join(lines) + "\n"


def _facts(facts: Facts) -> list[str]:
    lines = [f"- base: `{facts.base}`, sha256 of its content {facts.base_hash}"]
    if facts.licence:
        lines.append(f"- licence of the base: {facts.licence}")
    if facts.lora:
        modules = ", ".join(sorted(facts.lora["target_modules"]))
        kind = "DoRA" if facts.lora.get("use_dora") else "LoRA"
        lines.append(f"- {kind}: rank {facts.lora['r']}, alpha {facts.lora['lora_alpha']:g}, on {modules}")
    if facts.key:
        lines.append(f"- trained by rlhf_exp, run {facts.key}")
    return lines + [f"- {FIGURES[key]}: {value:.4g}" for key, value in facts.metrics.items()]


def _policy(facts: Facts) -> list[str]:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *(["from peft import PeftModel"] if facts.lora else []),
        "",
        'folder = "."  # of this file',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if facts.lora:
        lines.append(f"base = AutoModelForCausalLM.from_pretrained({facts.base!r})")
        lines.append("model = PeftModel.from_pretrained(base, folder).eval()")
    else:
        lines.append("model = AutoModelForCausalLM.from_pretrained(folder).eval()")
    # the base's own files may name another token; a merged export names the one that was trained itself
    ends = ", eos_token_id=tokenizer.eos_token_id" if facts.lora else ""
    return [
        *lines,
        "",
        *_prompt(facts),
        f"output = model.generate(**inputs, max_new_tokens=64{ends})",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _prompt(facts: Facts) -> list[str]:
    if facts.chat:
        return [
            'messages = [{"role": "user", "content": "..."}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    return [f'inputs = tokenizer({_filled(facts.prompt, "prompt", repr("..."))}, return_tensors="pt")']


def _filled(template: str, name: str, value: str) -> str:
    """Python that puts `value` (Python too) into a format of the template."""
    holder = "{" + name + "}"
    return value if template in ("", holder) else f"{template!r}.replace({holder!r}, {value})"


def _reward(facts: Facts) -> list[str]:
    name = "AutoModelForSequenceClassification"
    lines = [
        f"from transformers import {name}, AutoTokenizer",
        *(["from peft import PeftModel"] if facts.lora else []),
        "",
        'folder = "."  # of this file',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    if facts.lora:
        lines.append(f"base = {name}.from_pretrained({facts.base!r}, num_labels=1)")
        if facts.resized:
            lines.append(f"base.resize_token_embeddings({facts.resized})  # PAD is a new token")
        lines.append("base.config.pad_token_id = tokenizer.pad_token_id")
        lines.append("model = PeftModel.from_pretrained(base, folder).eval()")
    else:
        lines.append(f"model = {name}.from_pretrained(folder).eval()")
    if facts.chat:
        prompt = [
            '    messages = [{"role": "user", "content": prompt}]',
            "    first = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)",
            '    first = first["input_ids"]',
        ]
    else:
        prompt = [f'    first = tokenizer({_filled(facts.prompt, "prompt", "prompt")})["input_ids"]']
    return [
        *lines,
        "",
        "",
        "def ids(prompt, response):",
        '    """Prompt and response are tokenised apart; EOS ends the response."""',
        *prompt,
        f"    last = {_filled(facts.response, 'response', 'response')}",
        '    last = tokenizer(last, add_special_tokens=False)["input_ids"]',
        "    return first + last + [tokenizer.eos_token_id]",
        "",
        "",
        'pairs = [("a prompt", "an answer"), ("a prompt", "another, longer answer")]',
        'batch = tokenizer.pad({"input_ids": [ids(*pair) for pair in pairs]}, return_tensors="pt")',
        "scores = model(**batch).logits[:, 0]",
    ]


def _notes(facts: Facts) -> list[str]:
    if facts.role != "reward":
        return []
    return [
        "",
        f"The score is that of the last token that is not PAD, `{facts.pad}`, which no text here ends with (EOS is "
        "another token).",
        f"rlhf_exp's own scores are these plus {facts.constant!r}: the constant that makes their mean 0 on typical "
        "answers. This class has no place for it; comparisons do not need it.",
    ]
