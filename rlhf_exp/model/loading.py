"""What `load_base` reads from a model's folder: config, weights, tokenizer; and whether they are what they say.

Nothing of the folder runs: classes are transformers' or ours, and code that comes with a model is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# transformers asks on the terminal where this is not said
OURS_ONLY: dict[str, Any] = {"trust_remote_code": False}
# of the logits' largest: rounding, which grows with them
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}


def read_config(folder: Path) -> PreTrainedConfig:
    """The model's config with its own dropouts (GPT-2, OPT) at 0: a Trainer's train mode would switch them on.

    Raises InputError for a file that describes no model that transformers or this package has a class for.
    """
    from transformers import AutoConfig

    from rlhf_exp.model import baichuan

    baichuan.register()
    try:
        config = AutoConfig.from_pretrained(folder, **OURS_ONLY)
    except Exception as error:  # a foreign file can make it say anything
        raise _refusal(folder, error) from error
    _no_dropout(config)
    return config


def _no_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):  # a config in the config
            _no_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _refusal(folder: Path, error: Exception) -> InputError:
    try:
        remote = bool(json.loads((folder / "config.json").read_text()).get("auto_map"))
    except (OSError, ValueError, AttributeError):
        remote = False
    if remote and "trust_remote_code" in str(error):
        return InputError(
            f"the model in {folder} comes with code of its own (auto_map in config.json), which is not run here, and "
            "transformers has no class for it: choose a model that transformers knows"
        )
    reason = str(error).strip().partition("\n")[0] or "no reason given"
    return InputError(f"cannot load the model in {folder}: {type(error).__name__}: {reason}")


def read_model(model: Model, folder: Path, dtype: torch.dtype, device: str, seed: int) -> PreTrainedModel:
    """The weights from the files, or drawn from the seed (`model.from_scratch`). InputError for what is not whole."""
    from transformers import AutoModelForCausalLM

    from rlhf_exp.model import quantize

    config = read_config(folder)
    arguments: dict[str, Any] = {"config": config, "dtype": dtype, **OURS_ONLY}
    if model.quantization != "none":  # put on its device while it is read: it cannot be moved
        arguments |= {"quantization_config": quantize.config_of(model, dtype), "device_map": {"": device}}
    try:
        if model.from_scratch:
            return _draw(config, dtype, seed).to(device)
        loaded, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    except Exception as error:
        raise _refusal(folder, error) from error
    if wrong := sorted(found["missing_keys"]) or sorted(map(str, found.get("mismatched_keys", ()))):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(
            f"the files in {folder} are not a whole model of its config.json: {wrong[0]}{more} is missing or has "
            "another shape, and would be drawn at random"
        )
    return loaded if model.quantization != "none" else loaded.to(device)


def _draw(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model of the config's shape, its weights drawn as its architecture prescribes, from the seed alone."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **OURS_ONLY)


def read_tokenizer(model: Model, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with `model.eos_token` as the token that ends an answer; its pad token stays."""
    from transformers import AutoTokenizer

    from rlhf_exp.model import baichuan

    baichuan.register()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **OURS_ONLY)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"cannot read the tokenizer in {folder}: {type(error).__name__}: {reason}"
        ) from error
    if model.eos_token is not None and model.eos_token not in tokenizer.get_vocab():
        raise InputError(
            f"model.eos_token={model.eos_token!r} is not one token of the tokenizer in {folder}; its own is "
            f"{tokenizer.eos_token!r} (model.eos_token=null)"
        )
    if model.eos_token is not None:
        tokenizer.eos_token = model.eos_token
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {folder} has no EOS token, so no answer could end")
    return tokenizer


def require_straight_logits(model: PreTrainedModel, folder: Path) -> None:
    """InputError unless logits are hidden states times the output layer: with soft caps log-probs would be wrong."""
    import torch

    ids = torch.tensor([[0, 1, 2, 3]], device=model.device)
    training = model.training
    model.eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        straight = torch.nn.functional.linear(
            hidden.to(head.weight.dtype), head.weight, getattr(head, "bias", None)
        ).float()
    model.train(training)
    allowed = TOLERANCE[str(head.weight.dtype).removeprefix("torch.")] * float(logits.abs().max())
    if not float((logits - straight).abs().max()) <= allowed:
        raise InputError(
            f"the model in {folder} changes its logits after the output layer (a soft cap or a scale), which is not "
            "supported: its log-probs would be wrong"
        )
