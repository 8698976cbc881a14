"""Baichuan and Baichuan 2 for transformers 5, whose own classes they never became.

The published folders carry Python code of 2023 that cannot run under transformers 5, and running code out of a
model's folder is nothing this project does. These classes read the same folders: config.json, weights under
their published names, tokenizer.model.

    register()    transformers' Auto classes know `model_type: baichuan`; folders load without their code
"""

from __future__ import annotations


def register() -> None:
    """Tell transformers' Auto classes of model type `baichuan`. Calling it again changes nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf_exp.model.baichuan.config import BaichuanConfig
    from rlhf_exp.model.baichuan.modeling import BaichuanForCausalLM
    from rlhf_exp.model.baichuan.tokenizer import BaiChuanTokenizer, BaichuanTokenizer

    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
    # both names that a published tokenizer_config.json gives; the last one is the mapping's
    for tokenizer in (BaiChuanTokenizer, BaichuanTokenizer):
        AutoTokenizer.register(BaichuanConfig, tokenizer, exist_ok=True)
