"""The root dataclass of each stage."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_exp.fields import group, leaf, walk
from rlhf_exp.schema.data import Dataset
from rlhf_exp.schema.model import Lora, Model, Strategy
from rlhf_exp.schema.names import STAGES, VIEW
from rlhf_exp.schema.ppo import PPO
from rlhf_exp.schema.sampling import Generation
from rlhf_exp.schema.scoring import Evaluation, Probe, RewardSource
from rlhf_exp.schema.training import ILQL, Optim, Reward, Train


@dataclass
class Export:
    """What stage=export writes, for plain transformers and PEFT to load."""

    role: str = leaf(
        "ppo",
        doc="Whose weights: the policy of sft or of ppo (AutoModelForCausalLM), or the reward model "
        "(AutoModelForSequenceClassification).",
        choices=("sft", "ppo", "reward"),
    )
    form: str = leaf(
        "merged",
        doc="merged: all weights, the adapter added to the base's; adapter: its few MB, to be put on the base.",
        choices=("merged", "adapter"),
    )
    dtype: str = leaf(
        "auto",
        doc="Of merged weights; auto: what the base runs in. Adapters are float32.",
        choices=("auto", "float32", "bfloat16"),
    )


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
    reward_ensemble: list[str] = leaf(
        [],
        doc="Instead of training the members of reward_source.ensemble: one adapter for each.",
        keyed=False,
    )
    gold: str | None = leaf(None, doc="Instead of training the model of gold=learned.", keyed=False)
    ppo: str | None = leaf(None, doc="Instead of training ppo (for eval).", keyed=False)


@dataclass
class Upstream:
    """Overrides for upstream stages, e.g. 'upstream.sft={dataset: hc3_zh, optim: {lr: 1e-4}}'."""

    sft: dict[str, Any] = leaf({}, doc="For the sft stage.", keyed=False)
    reward: dict[str, Any] = leaf({}, doc="For the reward stage.", keyed=False)
    gold: dict[str, Any] = leaf(
        {}, doc="For the reward stage that makes the gold scorer, on top of upstream.reward.", keyed=False
    )
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
        doc="auto: reuse what has the same key, and continue what is unfinished; never: start another.",
        choices=("auto", "never"),
        keyed=False,
    )
    checkpoint_every: int = leaf(
        0,
        doc="Steps (iterations of ppo) between the checkpoints that an interrupted run continues from; 0: as often "
        "as writing them takes no more than 2 % of the time.",
        ge=0,
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
class ProbeRun(Run):
    probe: Probe = group(Probe, doc="What is looked at.")


@dataclass
class PPORun(Run):
    ppo: PPO = group(PPO, doc="The algorithm.")
    optim: Optim = group(Optim, doc="Optimiser.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="What scores a response.")
    selfcheck: str = leaf(
        "strict",
        doc="Before PPO trains, what has to hold is looked at on a few prompts: strict stops if it does not, warn "
        "says so.",
        choices=("strict", "warn", "off"),
        keyed=False,
    )


@dataclass
class ILQLRun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")
    ilql: ILQL = group(ILQL, doc="The algorithm.")
    generation: Generation = group(Generation, doc="The sampler of the evaluation.")
    reward_source: RewardSource = group(
        RewardSource, doc="What scores the demonstrations, and the answers of the evaluation."
    )


@dataclass
class EvalRun(Run):
    eval: Evaluation = group(Evaluation, doc="What is measured.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="The proxy score.")


@dataclass
class ExportRun(Run):
    export: Export = group(Export, doc="What is written.")


@dataclass
class PipelineRun(PPORun):
    """All stages in a row; the top-level keys are PPO's, the others are set under `upstream`."""

    eval: Evaluation = group(Evaluation, doc="What is measured at the end.")


RUNS: dict[str, type[Run]] = {
    "sft": SFTRun,
    "reward": RewardRun,
    "probe": ProbeRun,
    "ppo": PPORun,
    "ilql": ILQLRun,
    "eval": EvalRun,
    "export": ExportRun,
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


def view_of(config: Run) -> str:
    """The view of its dataset that a run reads; of an export, what is exported."""
    if isinstance(config, ExportRun):
        return VIEW[config.export.role]
    return config.ilql.data if isinstance(config, ILQLRun) else VIEW[config.stage]


def views_of(config: Run) -> tuple[str, ...]:
    """All views that a run reads: PPO with ppo.ptx_coef, and reward.center_on=references, read demonstrations too."""
    more = isinstance(config, PPORun) and config.stage == "ppo" and config.ppo.ptx_coef > 0
    if isinstance(config, ExportRun):
        return ()
    if isinstance(config, RewardRun):
        more = config.reward.center and config.reward.center_on == "references"
    return (view_of(config), *(("demonstrations",) if more else ()))


def samples_sft(config: Run) -> bool:
    """Whether a reward model's scores are centred on samples of the SFT policy, which it then stands on."""
    return isinstance(config, RewardRun) and config.reward.center and config.reward.center_on == "samples"
