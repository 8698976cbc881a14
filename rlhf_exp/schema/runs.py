"""The root dataclass of each stage."""
# ruff: noqa: RUF009  (leaf and group return dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_exp.fields import group, leaf, walk
from rlhf_exp.schema.data import Dataset
from rlhf_exp.schema.early import EarlyStop
from rlhf_exp.schema.memory import Memory
from rlhf_exp.schema.model import Lora, Model, Strategy
from rlhf_exp.schema.names import PREFER, STAGES, VIEW
from rlhf_exp.schema.ppo import PPO
from rlhf_exp.schema.prefer import Prefer
from rlhf_exp.schema.report import Report
from rlhf_exp.schema.rft import RFT
from rlhf_exp.schema.sampling import Generation
from rlhf_exp.schema.scoring import Evaluation, Judge, Probe, RewardSource
from rlhf_exp.schema.training import DPO, ILQL, KTO, Optim, Reward, Train


@dataclass
class Export:
    """What stage=export writes, for plain transformers and PEFT to load."""

    role: str = leaf(
        "ppo",
        doc="Whose weights: the policy of sft, ppo, dpo, kto or rft (AutoModelForCausalLM), or the reward model "
        "(AutoModelForSequenceClassification).",
        choices=("sft", "ppo", "reward", "dpo", "kto", "rft"),
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
    labeller: str | None = leaf(
        None, doc="Instead of training the reward model of prefer.labellers=[learned].", keyed=False
    )
    ppo: str | None = leaf(
        None, doc="Instead of training ppo (for eval); a run of dpo or kto is a policy too.", keyed=False
    )
    dpo: str | None = leaf(None, doc="Instead of training dpo.", keyed=False)
    kto: str | None = leaf(None, doc="Instead of training kto.", keyed=False)
    rft: str | None = leaf(None, doc="Instead of training rft.", keyed=False)
    ilql: str | None = leaf(
        None, doc="Instead of training ilql (for eval): a run folder, which has the heads too.", keyed=False
    )


@dataclass
class Upstream:
    """Overrides for upstream stages, e.g. 'upstream.sft={dataset: hc3_zh, optim: {lr: 1e-4}}'."""

    sft: dict[str, Any] = leaf({}, doc="For the sft stage.", keyed=False)
    reward: dict[str, Any] = leaf({}, doc="For the reward stage.", keyed=False)
    gold: dict[str, Any] = leaf(
        {}, doc="For the reward stage that makes the gold scorer, on top of upstream.reward.", keyed=False
    )
    labeller: dict[str, Any] = leaf(
        {},
        doc="For the reward stage that makes the model of prefer.labellers=[learned], on top of upstream.reward.",
        keyed=False,
    )
    prefer: dict[str, Any] = leaf({}, doc="For the prefer stage.", keyed=False)
    ppo: dict[str, Any] = leaf({}, doc="For the ppo stage.", keyed=False)
    dpo: dict[str, Any] = leaf({}, doc="For the dpo stage.", keyed=False)
    kto: dict[str, Any] = leaf({}, doc="For the kto stage.", keyed=False)
    rft: dict[str, Any] = leaf({}, doc="For the rft stage.", keyed=False)
    ilql: dict[str, Any] = leaf({}, doc="For the ilql stage.", keyed=False)
    rloo: dict[str, Any] = leaf(
        {}, doc="For a ppo stage with ppo.estimator=rloo, on top of upstream.ppo (for eval).", keyed=False
    )


@dataclass
class Command:
    """What every stage has, also those that only read."""

    stage: str = leaf(doc="Which stage this is.", choices=STAGES)
    run_name: str | None = leaf(None, doc="Name shown in MLflow; null: the stage and its key.", keyed=False)
    output_dir: str = leaf("outputs", doc="Run folders are output_dir/<stage>/<key>.", keyed=False)
    dry_run: bool = leaf(False, doc="Print the plan and the memory estimate, then stop.", keyed=False)


@dataclass
class Run(Command):
    """What every stage has that stands on a model."""

    seed: int = leaf(0, doc="Seed of data order, initialisation and sampling.", ge=0)
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
    device: str = leaf(
        "auto", doc="auto: CUDA if there is one.", choices=("auto", "cpu", "cuda"), keyed=False
    )
    threads: int = leaf(0, doc="CPU threads; 0: one a core.", ge=0, keyed=False)
    model: Model = group(Model, doc="The base model.")
    lora: Lora = group(Lora, doc="The adapters' shape.")
    dataset: Dataset = group(Dataset, doc="The data.")
    strategy: Strategy = group(Strategy, doc="How work is spread over devices.", keyed=False)
    memory: Memory = group(Memory, doc="What saves memory, and the memory plan.", keyed=False)
    tracking: Tracking = group(Tracking, doc="Where metrics go.", keyed=False)
    adapters: Adapters = group(Adapters, doc="Ready adapters instead of upstream stages.", keyed=False)
    upstream: Upstream = group(Upstream, doc="Overrides for upstream stages.", keyed=False)
    early_stop: EarlyStop = group(EarlyStop, doc="When a trial of a sweep ends itself.", keyed=False)


@dataclass
class SFTRun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")


@dataclass
class PreferRun(Run):
    prefer: Prefer = group(Prefer, doc="Who answers, who orders the answers, which pairs are kept.")
    generation: Generation = group(Generation, doc="The sampler.")
    judge: Judge = group(Judge, doc="The local model of prefer.labellers=[judge].")


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
    prefer: Prefer = group(
        Prefer,
        doc="The prefer stage, where dataset.comparisons_from=prefer, and its rounds.",
        keyed=False,  # what it made arrives as the parents' keys
    )
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
class DPORun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")
    dpo: DPO = group(DPO, doc="The algorithm.")


@dataclass
class KTORun(Run):
    train: Train = group(Train, doc="Length and batches.")
    optim: Optim = group(Optim, doc="Optimiser.")
    kto: KTO = group(KTO, doc="The algorithm.")


@dataclass
class RFTRun(Run):
    train: Train = group(Train, doc="Length and batches, of each round.")
    optim: Optim = group(Optim, doc="Optimiser, begun anew in each round.")
    rft: RFT = group(RFT, doc="How many answers are sampled, and which are learned.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="What scores the sampled answers.")


@dataclass
class EvalRun(Run):
    eval: Evaluation = group(Evaluation, doc="What is measured.")
    generation: Generation = group(Generation, doc="The sampler.")
    reward_source: RewardSource = group(RewardSource, doc="The proxy score.")
    judge: Judge = group(Judge, doc="The local model of eval.judge=model.")


@dataclass
class ExportRun(Run):
    export: Export = group(Export, doc="What is written.")


@dataclass
class ReportRun(Command):
    """Reads runs: it has no model, no data, no seed, and trains nothing."""

    inputs: Any = leaf(
        doc="What is compared: a folder with run folders (outputs, a sweep's), a list of run folders, or the name of "
        "an MLflow experiment.",
        keyed=False,  # what is read there is in the key
    )
    report: Report = group(Report, doc="What is compared and drawn.")
    tracking: Tracking = group(Tracking, doc="Where metrics go.", keyed=False)


@dataclass
class PipelineRun(PPORun):
    """All stages in a row; the top-level keys are PPO's, the others are set under `upstream`."""

    eval: Evaluation = group(Evaluation, doc="What is measured at the end.")
    judge: Judge = group(
        Judge, doc="The local model of eval.judge=model; the one that labels is set by upstream.prefer."
    )


RUNS: dict[str, type[Command]] = {
    "sft": SFTRun,
    "prefer": PreferRun,
    "reward": RewardRun,
    "probe": ProbeRun,
    "ppo": PPORun,
    "ilql": ILQLRun,
    "dpo": DPORun,
    "kto": KTORun,
    "rft": RFTRun,
    "eval": EvalRun,
    "export": ExportRun,
    "report": ReportRun,
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


def labelled(config: Run) -> bool:
    """Whether a run reads comparisons of stage=prefer, which it then stands on."""
    return config.dataset.comparisons_from == PREFER and "comparisons" in views_of(config)


def data_views(config: Run) -> tuple[str, ...]:
    """The views that a run reads from data, not from a stage before it."""
    return tuple(view for view in views_of(config) if view != "comparisons" or not labelled(config))


def samples_sft(config: Run) -> bool:
    """Whether a reward model's scores are centred on samples of the SFT policy, which it then stands on."""
    return isinstance(config, RewardRun) and config.reward.center and config.reward.center_on == "samples"
