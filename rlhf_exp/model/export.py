"""A role as files that plain transformers and PEFT load: merged into the base's weights, or the adapter alone.

A policy is an AutoModelForCausalLM. A reward model is an AutoModelForSequenceClassification with one label, which
has no bias, and takes the score of the last token that is not PAD: so PAD must be a token that no text ends with.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_exp.errors import InputError
from rlhf_exp.model import roles as role_files
from rlhf_exp.model.base import Base
from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.model.loading import OURS_ONLY
from rlhf_exp.model.roles import PREFIX, Roles

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

SHARD = "5GB"
NEW_PAD = "<|pad|>"
# of published tokenizers, for padding or for nothing, best first
PADS = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<reserved_0>",
)
HEAD = "score"  # what transformers calls the layer with the label


def classifier(model_type: str) -> bool:
    """Whether transformers has a class for reward models of this architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def published(model_type: str) -> bool:
    """Whether transformers has a class for language models of this architecture; Baichuan's are this package's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# ---------------------------------------------------------------- weights


@torch.no_grad()
def merged(roles: Roles, role: str | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The base's tensors with the role's update added, in `dtype`, under the names that they have without adapters.

    Sums and products are in float32 and rounded once. Of tensors that are one (tied embeddings) there is the first.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model, updated = roles.base.model, {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and role is not None and role in module.lora_A:
            updated[f"{name}.weight"] = _updated(module, role)
    found, seen = {}, set()
    for name, value in model.state_dict().items():
        if any(f".{part}." in name for part in role_files.PARTS):
            continue
        place = (value.data_ptr(), value.shape, value.stride())
        if place in seen and value.numel():
            continue
        seen.add(place)
        plain = name.replace(".base_layer.", ".")
        value = updated.get(plain, value)
        found[plain] = value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
    return found


def _updated(layer: Any, role: str) -> Tensor:
    """W + s B A (Hu et al. 2021, eq. 3), with DoRA m (W + s B A) / |W + s B A| (Liu et al. 2024, eq. 5)."""
    from peft.tuners.lora.layer import transpose

    weight, update = layer.get_base_layer().weight.float(), layer.get_delta_weight(role).float()
    whole = weight + update
    if role not in layer.lora_magnitude_vector:
        return whole
    swapped = layer.fan_in_fan_out
    # norms and magnitudes are of the outputs, which are the rows of a [out, in] matrix
    norms = transpose(whole, swapped).norm(dim=1)
    factor = layer.lora_magnitude_vector[role].weight.float() / norms
    return transpose(factor.unsqueeze(1), swapped) * whole


def write_merged(
    roles: Roles, role: str | None, folder: Path, dtype: torch.dtype, head: ScalarHead | None = None
) -> None:
    """Weights, config.json and the tokenizer's files; with `head` those of a reward model."""
    from huggingface_hub import save_torch_state_dict

    base = roles.base
    state, config = merged(roles, role, dtype), published_config(base)
    tokenizer = copy.deepcopy(base.tokenizer)
    if head is not None:
        config = _as_classifier(config, add_pad(tokenizer))
        name, weight = score_layer(config)
        state = {key: value for key, value in state.items() if key in weight} | {
            f"{name}.weight": head.weight.detach().to("cpu", dtype)[None].contiguous()
        }
        if missing := sorted(weight - set(state)):
            raise InputError(
                f"the reward model cannot be written: this architecture's class wants {missing[0]}"
            )
        _grow(state, base, config.vocab_size)
    else:
        config.eos_token_id = base.eos_id
        _generation(base, config).save_pretrained(folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    save_torch_state_dict(state, folder, max_shard_size=SHARD, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def published_config(base: Base) -> PreTrainedConfig:
    """The config as the files have it: the loaded one has its dropouts at 0."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.path, **OURS_ONLY)


def _generation(base: Base, config: PreTrainedConfig) -> GenerationConfig:
    """What `generate` is to do: as the base's files say, but an answer ends at the EOS that was trained, too."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(base.path)
    except OSError:  # no such file
        found = GenerationConfig.from_model_config(config)
    given = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    ends = list(dict.fromkeys([base.eos_id, *(token for token in given if token is not None)]))
    found.eos_token_id = ends if len(ends) > 1 else base.eos_id
    return found


def _as_classifier(config: PreTrainedConfig, pad_id: int) -> PreTrainedConfig:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    config.num_labels, config.pad_token_id = 1, pad_id
    config.vocab_size = max(config.vocab_size, pad_id + 1)
    config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[config.model_type]]
    return config


def score_layer(config: PreTrainedConfig) -> tuple[str, set[str]]:
    """The name of the class's output layer, and the names of all other tensors of the class."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, **OURS_ONLY)
    names = set(model.state_dict())
    trunk = {f"{model.base_model_prefix}.{name}" for name in model.base_model.state_dict()}
    (own,) = names - trunk
    return own.removesuffix(".weight"), trunk


def _grow(state: dict[str, Tensor], base: Base, rows: int) -> None:
    """Zeros for a PAD that the model has no embedding of: what is behind the end is never seen."""
    embedding = base.model.get_input_embeddings()
    name = next(n for n, module in base.model.named_modules() if module is embedding) + ".weight"
    if (lacking := rows - len(state[name])) > 0:
        state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, lacking))


# ---------------------------------------------------------------- the adapter alone


def write_adapter(
    roles: Roles, role: str, folder: Path, base_name: str, head: ScalarHead | None = None
) -> None:
    """PEFT's files and the tokenizer's; with `head` its weight is among them, as the module that PEFT saves whole."""
    from safetensors.torch import load_file, save_file

    roles.save(role, folder)
    path = folder / role_files.CONFIG
    config = json.loads(path.read_text()) | {"base_model_name_or_path": base_name}
    tokenizer = copy.deepcopy(roles.base.tokenizer)
    if head is not None:
        pad_id = add_pad(tokenizer)
        name, _ = score_layer(_as_classifier(published_config(roles.base), pad_id))
        tensors = load_file(folder / role_files.WEIGHTS)
        tensors[f"{PREFIX}{name}.weight"] = head.weight.detach().cpu()[None].contiguous()
        save_file(tensors, folder / role_files.WEIGHTS, metadata={"format": "pt"})
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [name]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------- PAD


def add_pad(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the tokenizer a PAD that is no EOS, and return its id.

    Its own, if it is another token than those that begin and end texts; else one that published tokenizers keep for
    padding or for nothing; else UNK, which no answer ends with, for EOS follows; else a new token, whose id may be
    one that the model has no embedding for (`_grow`).
    """
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in used:
        return tokenizer.pad_token_id
    vocabulary = tokenizer.get_vocab()
    known = [token for token in (*PADS, tokenizer.unk_token) if token is not None and token in vocabulary]
    free = [token for token in known if vocabulary[token] not in used]
    if free:
        tokenizer.pad_token = free[0]
    else:
        tokenizer.add_special_tokens({"pad_token": NEW_PAD})
    return tokenizer.pad_token_id
