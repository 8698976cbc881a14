"""The frozen base in 4 or 8 bits (bitsandbytes), so that every stage is QLoRA (Dettmers et al. 2023).

Only the matrices inside the layers are quantised: embeddings and output layer keep the base's dtype, and so do
norms and biases. Adapters are float32 as always. CUDA only: on a CPU bitsandbytes 0.50 repacks 4-bit weights at the
first forward without gradients, and every gradient through them is lost from then on, with no more than a warning.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlhf_exp.errors import InputError
from rlhf_exp.schema import Lora, Model, Optim

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

# Bytes a quantised number takes. 4 bits: one scale of 8 bits for 64 numbers, and one of 32 bits for 256 of those
# scales (Dettmers et al. 2023, section 3, double quantization); 8 bits: a float32 for each row, next to nothing.
BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


def require(model: Model, device: str, lora: Lora | None = None) -> None:
    """InputError unless the model can be loaded as `model.quantization` says on this device ("cpu" or "cuda")."""
    if model.quantization == "none":
        return
    key = f"model.quantization={model.quantization}"
    if model.from_scratch or (lora is not None and lora.full):
        raise InputError(
            f"{key}: quantised weights cannot be trained; set model.quantization=none for lora=full"
        )
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{key} needs the package bitsandbytes: pip install 'rlhf-exp[quant]'")
    if device != "cuda":
        raise InputError(f"{key} needs a CUDA device, this run is on {device}: set model.quantization=none")


def require_moments(optim: Optim, device: str) -> None:
    """InputError unless the moments can be kept as `optim.moments` says on this device ("cpu" or "cuda")."""
    if optim.moments == "float32":
        return
    key = f"optim.moments={optim.moments}"
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{key} needs the package bitsandbytes: pip install 'rlhf-exp[quant]'")
    if device != "cuda":
        raise InputError(f"{key} needs a CUDA device, this run is on {device}: set optim.moments=float32")


def config_of(model: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' config for `model.quantization`; None for none. 4 bits are NF4, multiplied in `dtype`."""
    if model.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if model.quantization == "8bit":  # LLM.int8 (Dettmers et al. 2022)
        # it would say at every multiplication that it takes the inputs in float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
