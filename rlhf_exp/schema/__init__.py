"""Every configuration key: its type, default, range, meaning, and whether it can change a result.

One dataclass a config group, one root dataclass a stage, so that a key a stage does not have is an error. A
leaf that cannot change a result (paths, tracking, hardware) is left out of the store key: `keyed=False`.
Nothing but `fields` and the standard library is imported: this is on the path of `--cfg job`. `docs/config.md` is
made of it.
"""

from rlhf_exp.schema.data import HC3, Dataset, Fields, RandomWalks, Template, Views
from rlhf_exp.schema.model import Lora, Model, Strategy
from rlhf_exp.schema.names import ACTIONS, GOLD, LEARNED, STAGES, UNPATCHED, VIEW, VIEWS
from rlhf_exp.schema.ppo import PPO, Guards
from rlhf_exp.schema.rules import problems
from rlhf_exp.schema.runs import (
    RUNS,
    Adapters,
    EvalRun,
    Export,
    ExportRun,
    ILQLRun,
    PipelineRun,
    PPORun,
    ProbeRun,
    RewardRun,
    Run,
    SFTRun,
    Tracking,
    Upstream,
    keys,
    register,
    samples_sft,
    view_of,
    views_of,
)
from rlhf_exp.schema.sampling import Generation
from rlhf_exp.schema.scoring import (
    PROBES,
    SAME,
    Evaluation,
    Limits,
    Probe,
    RewardSource,
    learns,
    member_of,
    proxies,
    stage_of,
)
from rlhf_exp.schema.training import ILQL, Optim, Reward, Train

__all__ = [
    "ACTIONS",
    "GOLD",
    "HC3",
    "ILQL",
    "LEARNED",
    "PPO",
    "PROBES",
    "RUNS",
    "SAME",
    "STAGES",
    "UNPATCHED",
    "VIEW",
    "VIEWS",
    "Adapters",
    "Dataset",
    "EvalRun",
    "Evaluation",
    "Export",
    "ExportRun",
    "Fields",
    "Generation",
    "Guards",
    "ILQLRun",
    "Limits",
    "Lora",
    "Model",
    "Optim",
    "PPORun",
    "PipelineRun",
    "Probe",
    "ProbeRun",
    "RandomWalks",
    "Reward",
    "RewardRun",
    "RewardSource",
    "Run",
    "SFTRun",
    "Strategy",
    "Template",
    "Tracking",
    "Train",
    "Upstream",
    "Views",
    "keys",
    "learns",
    "member_of",
    "problems",
    "proxies",
    "register",
    "samples_sft",
    "stage_of",
    "view_of",
    "views_of",
]
