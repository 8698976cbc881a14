"""Every configuration key: its type, default, range, meaning, and whether it can change a result.

One dataclass a config group, one root dataclass a stage, so that a key a stage does not have is an error. A
leaf that cannot change a result (paths, tracking, hardware) is left out of the store key: `keyed=False`.
Nothing but `fields` and the standard library is imported: this is on the path of `--cfg job`. It is one long
table; `docs/config.md` is made of it.
"""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_exp.fields import did_you_mean, group, leaf, leaves, undeclared, value_problem, walk

STAGES = ("sft", "reward", "ppo", "eval", "pipeline")
VIEWS = ("demonstrations", "comparisons", "prompts")
# which view of its dataset a stage reads
VIEW = {
    "sft": "demonstrations",
    "reward": "comparisons",
    "ppo": "prompts",
    "eval": "prompts",
    "pipeline": "prompts",
}


@dataclass
class Model:
    name: str = leaf(doc="The file's name in conf/model, for display.", keyed=False)
    path: str | None = leaf(
        None, doc="A local folder or a hub id; null: the folder that `source` makes.", keyed=False
    )
    source: str = leaf(
        "hub",
        doc="Who provides the files: the hub, a PyPI package (rlhf_exp.fetch), or code in this package.",
        choices=("hub", "pypi", "builtin"),
        keyed=False,
    )
    revision: str | None = leaf(None, doc="Branch, tag or commit of a hub model.", keyed=False)
    dtype: str = leaf(
        "auto",
        doc="auto: bfloat16 where the hardware multiplies it (CUDA, AMX, AVX512-BF16), else float32.",
        choices=("auto", "float32", "bfloat16"),
    )
    lora_targets: list[str] = leaf([], doc="Module names that LoRA wraps when lora.targets is [auto].")
    licence: str = leaf("", doc="Licence of the weights.", keyed=False)
    billion_params: float | None = leaf(
        None, doc="Size for the memory estimate if no files are here.", keyed=False, gt=0
    )
    layers: int | None = leaf(None, doc="Layers, for the memory estimate without files.", keyed=False, gt=0)
    hidden_size: int | None = leaf(
        None, doc="Width, for the memory estimate without files.", keyed=False, gt=0
    )
    vocab_size: int | None = leaf(
        None, doc="Vocabulary, for the memory estimate without files.", keyed=False, gt=0
    )


@dataclass
class Lora:
    r: int = leaf(16, doc="Rank (Hu et al. 2021).", gt=0)
    alpha: float = leaf(32.0, doc="Scale: the update is multiplied by alpha / r.", gt=0)
    dropout: float = leaf(
        0.0, doc="Dropout on the adapter's input, SFT and reward only; PPO runs without.", ge=0, lt=1
    )
    targets: list[str] = leaf(["auto"], doc="Module names to wrap; [auto] takes the model's lora_targets.")


@dataclass
class Views:
    """Where each view of the data is: a path, else RLHF_EXP_DATA/<last part>, else a hub id."""

    demonstrations: str | None = leaf(None, doc="Prompts with written answers (SFT).", keyed=False)
    comparisons: str | None = leaf(
        None, doc="Prompts with a chosen and a rejected answer (reward).", keyed=False
    )
    prompts: str | None = leaf(
        None, doc="Prompts, with references where there are any (PPO, eval).", keyed=False
    )


@dataclass
class Template:
    """How records become text. Prompt and response are tokenised separately and their ids joined."""

    name: str = leaf("plain", doc="For display.", keyed=False)
    prompt: str = leaf("{prompt}", doc="Format of the prompt.")
    response: str = leaf(" {response}", doc="Format of the response; the EOS token follows it.")
    truncate: str = leaf(
        "left",
        doc="A prompt that is too long loses its left end, right end, or (tldr) the post's last paragraphs.",
        choices=("left", "right", "tldr"),
    )


@dataclass
class Dataset:
    name: str = leaf(doc="The file's name in conf/dataset, for display.", keyed=False)
    family: str = leaf(doc="The loader in rlhf_exp/data that reads this schema.")
    views: Views = group(Views, doc="Where each view is.")
    template: Template = group(Template, doc="How records become text.")
    max_prompt_tokens: int = leaf(512, doc="Longer prompts are cut by the template's rule and counted.", gt=0)
    max_response_tokens: int = leaf(
        128, doc="Longer answers are cut (SFT, reward) and counted, EOS included.", gt=0
    )
    validation_share: float = leaf(0.1, doc="Share of prompts (by hash) for validation.", ge=0, lt=1)
    heldout_share: float = leaf(0.1, doc="Share of prompts (by hash) that only `eval` sees.", ge=0, lt=1)
    limit: int = leaf(0, doc="At most this many training rows; 0 takes all.", ge=0)
    on_bad_row: str = leaf(
        "error", doc="A row that cannot be read: stop, or leave it out and count.", choices=("error", "skip")
    )


@dataclass
class Optim:
    lr: float = leaf(1e-4, doc="Peak learning rate (AdamW).", gt=0)
    schedule: str = leaf(
        "linear", doc="Learning rate after the warm-up.", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = leaf(0.0, doc="Share of the steps that warm up linearly.", ge=0, lt=1)
    eps: float = leaf(1e-5, doc="Adam's epsilon; 1e-5 as in Huang et al. 2024, detail 'Adam eps'.", gt=0)
    weight_decay: float = leaf(0.0, doc="Decoupled weight decay.", ge=0)
    max_grad_norm: float = leaf(1.0, doc="Gradient norm clip.", gt=0)


@dataclass
class Train:
    """Length of a supervised stage (sft, reward)."""

    epochs: float = leaf(1.0, doc="Passes over the data; ignored when steps > 0.", gt=0)
    steps: int = leaf(0, doc="Optimiser steps; 0: by epochs.", ge=0)
    batch_size: int = leaf(16, doc="Rows (pairs for reward) an optimiser step.", gt=0)
    micro_batch_size: int = leaf(
        16,
        doc="Rows (pairs) a forward; divides batch_size. Changes memory, not the result.",
        gt=0,
        keyed=False,
    )


@dataclass
class Reward:
    """The reward model: LoRA adapter + scalar head, Bradley-Terry loss (Ouyang et al. 2022, eq. 1)."""

    center: bool = leaf(
        True,
        doc="Shift the head's bias so that the training demonstrations or chosen answers score 0 on average.",
    )


@dataclass
class Generation:
    max_new_tokens: int = leaf(48, doc="Longest response in tokens, EOS included.", gt=0)
    min_new_tokens: int = leaf(
        1, doc="EOS is forbidden at the first this many positions; 1 is the empty-answer guard.", ge=0
    )
    temperature: float = leaf(1.0, doc="Softmax temperature of the sampler and of all log-probs.", gt=0)
    top_k: int = leaf(0, doc="Keep the k most probable tokens (Fan et al. 2018); 0: off.", ge=0)
    top_p: float = leaf(
        1.0, doc="Keep the smallest set of tokens with this mass (Holtzman et al. 2020); 1: off.", gt=0, le=1
    )


@dataclass
class PPO:
    steps: int = leaf(100, doc="Iterations: one rollout and its updates each.", gt=0)
    batch_size: int = leaf(32, doc="Prompts (one response each) an iteration.", gt=0)
    epochs: int = leaf(4, doc="Passes over each rollout.", gt=0)
    minibatches: int = leaf(1, doc="Optimiser steps an epoch; divides batch_size.", gt=0)
    micro_batch_size: int = leaf(
        32,
        doc="Rows a forward of scoring and update; changes memory and speed, not the result.",
        gt=0,
        keyed=False,
    )
    kl_coef: float = leaf(
        0.05, doc="Weight of the per-token KL penalty in the reward (Ziegler et al. 2019, eq. 2).", ge=0
    )
    kl_estimator: str = leaf(
        "k1",
        doc="k1 = log p/q; k2 = k1^2/2; k3 = q/p - 1 - log q/p (Schulman 2020).",
        choices=("k1", "k2", "k3"),
    )
    gamma: float = leaf(1.0, doc="Discount.", ge=0, le=1)
    lam: float = leaf(0.95, doc="GAE lambda (Schulman et al. 2016).", ge=0, le=1)
    cliprange: float = leaf(0.2, doc="Ratio clip (Schulman et al. 2017, eq. 7).", gt=0)
    cliprange_value: float = leaf(0.2, doc="Value clip around the rollout's values.", gt=0)
    vf_coef: float = leaf(0.1, doc="Weight of the value loss.", ge=0)
    critic: str = leaf(
        "trunk",
        doc="trunk: head on the policy's hidden states; own: own adapter and head, from the reward model's.",
        choices=("trunk", "own"),
    )
    whiten_advantages: bool = leaf(True, doc="Mean 0, variance 1 over the whole batch, padding excluded.")
    reward_clip: float = leaf(10.0, doc="Scores are clipped to +- this; 0: off.", ge=0)
    missing_eos_penalty: float = leaf(
        1.0, doc="Subtracted from the score of a response that never ended.", ge=0
    )
    save_every: int = leaf(10, doc="Iterations between kept policy adapters.", gt=0)


@dataclass
class RewardSource:
    kind: str = leaf(
        "learned",
        doc="learned: the reward stage's adapter; function: a rule from rlhf_exp.rewards.",
        choices=("learned", "function"),
    )
    function: str = leaf("sentiment", doc="Which rule, for kind=function.", choices=("sentiment", "length"))


@dataclass
class Evaluation:
    prompts: int = leaf(64, doc="Held-out prompts; 0 takes all.", ge=0)
    gold: str = leaf(
        "sentiment", doc="A scorer the policy was not trained on.", choices=("sentiment", "length", "none")
    )
    samples: int = leaf(6, doc="Prompts shown side by side in the tables.", ge=0)
    checkpoints: bool = leaf(True, doc="Evaluate every kept PPO adapter, not only the last.")


@dataclass
class Strategy:
    name: str = leaf("single", doc="How work is spread over devices.", choices=("single",), keyed=False)


@dataclass
class Tracking:
    backend: str = leaf(
        "mlflow", doc="Where metrics go besides metrics.jsonl.", choices=("mlflow", "none"), keyed=False
    )
    uri: str | None = leaf(
        None, doc="MLflow tracking URI; null: MLFLOW_TRACKING_URI, else sqlite in output_dir.", keyed=False
    )
    experiment: str = leaf("rlhf_exp", doc="MLflow experiment name.", keyed=False)


@dataclass
class Adapters:
    """Ready adapters instead of an upstream stage: a run folder, a PEFT folder, or an MLflow runs:/ URI."""

    sft: str | None = leaf(None, doc="Instead of training sft; 'base': the base model as it is.", keyed=False)
    reward: str | None = leaf(None, doc="Instead of training reward.", keyed=False)
    ppo: str | None = leaf(None, doc="Instead of training ppo (for eval).", keyed=False)


@dataclass
class Upstream:
    """Overrides for upstream stages, e.g. 'upstream.sft={dataset: hc3_zh, optim: {lr: 1e-4}}'."""

    sft: dict[str, Any] = leaf({}, doc="For the sft stage.", keyed=False)
    reward: dict[str, Any] = leaf({}, doc="For the reward stage.", keyed=False)
    ppo: dict[str, Any] = leaf({}, doc="For the ppo stage.", keyed=False)


@dataclass
class Run:
    """What every stage has."""

    stage: str = leaf(doc="Which stage this is.", choices=STAGES)
    seed: int = leaf(0, doc="Seed of data order, initialisation and sampling.", ge=0)
    run_name: str | None = leaf(None, doc="Name shown in MLflow; null: the stage and its key.", keyed=False)
    output_dir: str = leaf("outputs", doc="Run folders are output_dir/<stage>/<key>.", keyed=False)
    resume: str = leaf(
        "auto",
        doc="auto: reuse what has the same key; never: start another.",
        choices=("auto", "never"),
        keyed=False,
    )
    dry_run: bool = leaf(False, doc="Print the plan and the memory estimate, then stop.", keyed=False)
    device: str = leaf(
        "auto", doc="auto: CUDA if there is one.", choices=("auto", "cpu", "cuda"), keyed=False
    )
    threads: int = leaf(0, doc="CPU threads; 0: one a core.", ge=0, keyed=False)
    model: Model = group(Model, doc="The base model.")
    lora: Lora = group(Lora, doc="The adapters' shape.")
    dataset: Dataset = group(Dataset, doc="The data.")
    strategy: Strategy = group(Strategy, doc="How work is spread over devices.", keyed=False)
    tracking: Tracking = group(Tracking, doc="Where metrics go.", keyed=False)
    adapters: Adapters = group(Adapters, doc="Ready adapters instead of upstream stages.", keyed=False)
    upstream: Upstream = group(Upstream, doc="Overrides for upstream stages.", keyed=False)


@dataclass
class SFTRun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")


@dataclass
class RewardRun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")
    reward: Reward = group(Reward, doc="The reward model.")


@dataclass
class PPORun(Run):
    ppo: PPO = group(PPO, doc="The algorithm.")
    optim: Optim = group(Optim, doc="Optimiser.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="What scores a response.")


@dataclass
class EvalRun(Run):
    eval: Evaluation = group(Evaluation, doc="What is measured.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="The proxy score.")


@dataclass
class PipelineRun(PPORun):
    """All stages in a row; the top-level keys are PPO's, the others are set under `upstream`."""

    eval: Evaluation = group(Evaluation, doc="What is measured at the end.")


RUNS: dict[str, type[Run]] = {
    "sft": SFTRun,
    "reward": RewardRun,
    "ppo": PPORun,
    "eval": EvalRun,
    "pipeline": PipelineRun,
}


def register() -> None:
    """Put every stage's dataclass into Hydra's ConfigStore as schema/<stage>."""
    from hydra.core.config_store import ConfigStore

    if "schema" in ConfigStore.instance().repo:
        return  # once a process: it takes a while
    for name, node in RUNS.items():
        ConfigStore.instance().store(
            group="schema", name=name, node=node, package="_global_", provider="rlhf_exp"
        )


def keys(stage: str) -> list[str]:
    """Every dotted key of a stage, sections included, in order of declaration."""
    return [key for key, _, _ in walk(RUNS[stage]())]


def _across(config: Run) -> Iterator[str]:
    """Rules that join several keys."""
    if getattr(config.dataset.views, VIEW[config.stage]) is None:
        view = VIEW[config.stage]
        yield f"dataset.views.{view} is null: dataset {config.dataset.name} has no {view} for {config.stage}"
    if config.lora.targets == ["auto"] and not config.model.lora_targets:
        yield f"lora.targets is [auto], but model {config.model.name} has no lora_targets: name the modules"
    if not config.lora.targets:
        yield "lora.targets must name a module, or be [auto]"
    if isinstance(config, SFTRun | RewardRun):
        batch, micro = config.train.batch_size, config.train.micro_batch_size
        if batch % min(batch, micro):
            yield f"train.micro_batch_size must divide train.batch_size, got {micro} and {batch}"
    if isinstance(config, PPORun):
        batch, minibatches = config.ppo.batch_size, config.ppo.minibatches
        if batch % minibatches:
            yield f"ppo.minibatches must divide ppo.batch_size, got {minibatches} and {batch}"
    if isinstance(config, PPORun | EvalRun):
        least, most = config.generation.min_new_tokens, config.generation.max_new_tokens
        if least >= most:
            rule = "generation.min_new_tokens must be less than generation.max_new_tokens"
            yield f"{rule}, got {least} and {most}"
    validation, heldout = config.dataset.validation_share, config.dataset.heldout_share
    if validation + heldout >= 1:
        yield (
            "dataset.validation_share + dataset.heldout_share must be less than 1, got "
            f"{validation} + {heldout}"
        )


def problems(config: Run, *, across: bool = True) -> list[str]:
    """Every problem of a composed config, one line each; empty when it is sound.

    Rules that join keys are looked at only where each key by itself is sound; `across=False` leaves them out.
    """
    known = keys(config.stage) if config.stage in RUNS else []
    found = [f"unknown key {key}{did_you_mean(key, known)}" for key in undeclared(config)]
    found += [line for key, f, value in leaves(config) if (line := value_problem(key, f, value))]
    return found or (list(_across(config)) if across else [])
