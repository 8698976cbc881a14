"""Optimiser, length and batches, and what reward, dpo, kto and ilql train."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass

from rlhf_exp.fields import leaf


@dataclass
class Optim:
    lr: float = leaf(1e-4, doc="Peak learning rate (AdamW).", gt=0)
    schedule: str = leaf(
        "linear", doc="Learning rate after the warm-up.", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = leaf(0.0, doc="Share of the steps that warm up linearly.", ge=0, lt=1)
    eps: float = leaf(1e-5, doc="Adam's epsilon; 1e-5 as in Huang et al. 2024, detail 'Adam eps'.", gt=0)
    beta1: float = leaf(0.9, doc="Adam's decay of the mean gradient.", ge=0, lt=1)
    beta2: float = leaf(
        0.999, doc="Adam's decay of the squared gradient; InstructGPT and DeepSpeed-Chat: 0.95.", ge=0, lt=1
    )
    weight_decay: float = leaf(0.0, doc="Decoupled weight decay.", ge=0)
    max_grad_norm: float = leaf(1.0, doc="Gradient norm clip.", gt=0)
    moments: str = leaf(
        "float32",
        doc="Adam's two moments; 8bit: 2 bytes a trained number in place of 8 (Dettmers et al. 2022, bitsandbytes, "
        "CUDA).",
        choices=("float32", "8bit"),
    )


@dataclass
class Train:
    """Length of a stage that learns from given answers (sft, reward, dpo, kto, ilql)."""

    epochs: float = leaf(1.0, doc="Passes over the data; ignored when steps > 0.", gt=0)
    steps: int = leaf(0, doc="Optimiser steps; 0: by epochs.", ge=0)
    batch_size: int = leaf(16, doc="Rows (pairs for reward, dpo and kto) an optimiser step.", gt=0)
    micro_batch_size: int = leaf(
        16,
        doc="Rows (pairs) a forward; divides batch_size; 0: as many as fit (docs/scale.md). Changes memory, not the "
        "result.",
        ge=0,
        keyed=False,
    )


@dataclass
class Reward:
    """The reward model: LoRA adapter + scalar head, Bradley-Terry loss (Ouyang et al. 2022, eq. 1)."""

    loss: str = leaf(
        "last_token",
        doc="What is compared in training: the scores at the last tokens, or those after every token from the first "
        "difference on (token_wise: trlX's TL;DR example, DeepSpeed-Chat). A score is always the last token's.",
        choices=("last_token", "token_wise"),
    )
    label_smoothing: float = leaf(
        0.0, doc="Share of labels taken to be swapped (Mitchell 2023, eq. 3); 0: off.", ge=0, lt=0.5
    )
    center_coef: float = leaf(
        0.0,
        doc="Weight of (chosen + rejected)^2 in the loss (Eisenstein et al. 2023: 0.01); 0: off.",
        ge=0,
    )
    margin_coef: float = leaf(
        0.0,
        doc="The loss wants the scores this times a comparison's margin apart (Touvron et al. 2023, eq. 2); 0: off. "
        "The data has to hold margins (dataset.fields.margin).",
        ge=0,
    )
    center: bool = leaf(
        True, doc="Shift the head's bias so that the training answers of center_on score 0 on average."
    )
    center_on: str = leaf(
        "chosen",
        doc="chosen: the preferred answers; references: the demonstrations (Stiennon et al. 2020, section 3.4, the "
        "human summaries); samples: answers that the SFT policy, then trained first, gives (Ziegler et al. 2019).",
        choices=("chosen", "references", "samples"),
    )
    unit_std: bool = leaf(
        False,
        doc="Scale the head too, so that these answers' scores have standard deviation 1 (Ziegler et al. 2019, "
        "section 2): reward models on one scale, which a kl_coef fits.",
    )
    share_prompts: bool = leaf(
        True,
        doc="Compute a pair's prompt once for both answers, the same scores for less work; models that cannot take "
        "it compute it twice, and it is said.",
        keyed=False,
    )
    micro_batch_tokens: int = leaf(
        8192,
        doc="Tokens a forward, prompts counted once, besides train.micro_batch_size; 0: no limit. Changes memory, "
        "not the result.",
        ge=0,
        keyed=False,
    )
    faults: list[str] = leaf(
        [],
        doc="Known mistakes of other recipes to repeat, by name (stages/reward_faults.py); what each breaks is said.",
    )
    negatives: list[str] = leaf(
        [],
        doc="Kinds of probes (docs/probes.md) that are rejected answers of more training pairs; "
        "reward_source.gate=patch sets it.",
    )
    negatives_share: float = leaf(
        0.2, doc="Share of these among all training pairs, as many of each kind.", gt=0, lt=1
    )
    probes: int = leaf(
        32,
        doc="Validation pairs that are probed at the end; 0: none. Changes no weight: stage=probe probes a trained "
        "model with more.",
        ge=0,
        keyed=False,
    )


@dataclass
class DPO:
    """Direct preference optimisation (Rafailov et al. 2023) and its kin, on comparisons; `train` says how long."""

    loss: str = leaf(
        "sigmoid",
        doc="sigmoid: DPO (Rafailov et al. 2023, eq. 7); ipo: a squared distance to 1 / (2 beta) (Azar et al. 2023, "
        "eq. 17), of log-ratios divided by the answers' lengths, as in TRL.",
        choices=("sigmoid", "ipo"),
    )
    beta: float = leaf(
        0.1,
        doc="Strength of the KL to the reference (Rafailov et al. 2023: 0.1, summaries 0.5); of ipo its tau.",
        gt=0,
    )
    label_smoothing: float = leaf(
        0.0,
        doc="Share of labels taken to be swapped, for loss=sigmoid: cDPO (Mitchell 2023, eq. 3); 0: off.",
        ge=0,
        lt=0.5,
    )


@dataclass
class KTO:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): chosen answers are desirable, rejected ones are not."""

    beta: float = leaf(
        0.1, doc="How soon a gain or loss saturates (Ethayarajh et al. 2024, L_KTO; TRL: 0.1).", gt=0
    )
    desirable_weight: float = leaf(
        1.0, doc="Weight of desirable answers (Ethayarajh et al. 2024: lambda_D, 1).", gt=0
    )
    undesirable_weight: float = leaf(
        1.0, doc="Weight of undesirable answers (Ethayarajh et al. 2024: lambda_U, 1).", gt=0
    )


@dataclass
class ILQL:
    """Implicit language Q-learning (Snell et al. 2022): Q and V from a fixed data set; `train` says how long."""

    data: str = leaf(
        "demonstrations",
        doc="demonstrations: their answers, scored by reward_source; comparisons: the chosen answer +1, the rejected"
        " one -1 (as trlX's example for HH).",
        choices=("demonstrations", "comparisons"),
    )
    normalise_rewards: bool = leaf(True, doc="Mean 0, variance 1 over the training data.")
    head: str = leaf(
        "mlp",
        doc="Q heads: mlp d -> 2d -> V; linear d -> V; tied d -> 2d -> d on the model's own output layer, for large"
        " vocabularies: 7B with 64k tokens trains in 3 GB instead of 22.",
        choices=("mlp", "linear", "tied"),
    )
    gamma: float = leaf(0.99, doc="Discount.", ge=0, le=1)
    tau: float = leaf(
        0.7,
        doc="Expectile of V (Kostrikov et al. 2021): 0.5 mean, towards 1 the best token.",
        gt=0,
        lt=1,
    )
    cql_coef: float = leaf(
        0.1,
        doc="Weight of the conservative term, which lowers Q of tokens the data lack (Kumar et al. 2020).",
        ge=0,
    )
    awac_coef: float = leaf(1.0, doc="Weight of the policy's own loss, the weighted log-likelihood.", ge=0)
    awac_beta: float = leaf(
        0.0, doc="Weights exp(beta * advantage) in that loss (Nair et al. 2020); 0: all 1, as SFT.", ge=0
    )
    polyak: float = leaf(
        0.02,
        doc="Share of the twins that their copies take over a step; decoding uses the copies, which lag by about"
        " 1 / polyak steps.",
        gt=0,
        le=1,
    )
    betas: list[float] = leaf(
        [0.0, 1.0, 4.0, 16.0],
        doc="Evaluated: decoding from softmax(logits + beta * (Q - V)); 0 is the policy without Q.",
    )
    eval_prompts: int = leaf(
        64, doc="Prompts answered at the end (validation; training where there is none); 0: all.", ge=0
    )
    eval_samples: int = leaf(1, doc="Sampled answers to each of them.", gt=0)
