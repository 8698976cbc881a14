"""What an upstream stage takes over, and what `upstream.<stage>` does to it."""

from __future__ import annotations

from copy import deepcopy

import pytest

from rlhf_exp import compose
from rlhf_exp.errors import InputError
from rlhf_exp.paths import conf_dir

DATASETS = " and ".join(
    ", ".join(sorted(path.stem for path in (conf_dir() / "dataset").glob("*.yaml"))).rsplit(", ", 1)
)


def child(stage, *words):
    run, choices = compose.compose(words)
    return compose.upstream(stage, run, choices)


def test_values_flow_not_only_options():
    run, choices = child(
        "sft",
        *("stage=ppo", "model=tiny", "model.dtype=float32", "lora=attention", "lora.r=4", "seed=7"),
        *("threads=1", "output_dir=elsewhere", "resume=never", "device=cpu", "tracking=none"),
    )
    assert (run.stage, run.model.name, run.model.dtype) == ("sft", "tiny", "float32")
    assert (run.lora.r, run.lora.targets, run.seed) == (4, ["q_proj", "v_proj"], 7)
    assert (run.threads, run.output_dir, run.resume, run.device) == (1, "elsewhere", "never", "cpu")
    assert run.tracking.backend == "none"
    assert choices == {
        "stage": "sft",
        "model": "tiny",
        "lora": "attention",
        "dataset": "reviews",
        "dataset/template": "plain",
        "strategy": "single",
        "tracking": "none",
    }


def test_the_name_and_the_dry_run_stay_behind():
    run, _ = child("sft", "stage=ppo", "run_name=mine", "dry_run=true")
    assert run.run_name is None
    assert run.dry_run is False


def test_adapters_and_upstream_flow():
    run, _ = child("reward", "stage=ppo", "adapters.sft=base", "upstream.sft.seed=3")
    assert run.adapters.sft == "base"
    assert run.upstream.sft == {"seed": 3}


def test_a_stage_keeps_its_own_optimiser_and_length():
    alone = compose.compose(["stage=sft"])[0]
    run, _ = child("sft", "stage=ppo", "optim.lr=0.5", "optim.schedule=cosine")
    assert run.optim == alone.optim
    assert run.train == alone.train


def test_the_dataset_flows_with_its_values_where_it_has_the_view():
    words = ("stage=ppo", "dataset=tldr", "dataset.limit=5", "dataset/template=plain")
    run, choices = child("reward", *words)
    assert (run.dataset.name, run.dataset.limit, run.dataset.template.truncate) == ("tldr", 5, "left")
    assert (choices["dataset"], choices["dataset/template"]) == ("tldr", "plain")


def test_a_dataset_without_the_view_is_not_silently_replaced():
    """A reward model of the stage's default dataset would be one of other prompts, in another language."""
    words = ("stage=ppo", "dataset=tldr", "dataset.limit=5", "dataset.views.comparisons=null")
    with pytest.raises(InputError) as caught:
        child("reward", *words)
    assert caught.value.problems == [
        "upstream.reward: dataset tldr has no comparisons: choose one that has, 'upstream.reward={dataset: ...}', "
        "or give a ready adapter, adapters.reward=PATH"
    ]
    run, choices = child("reward", *words, "upstream.reward={dataset: reviews}")
    assert (run.dataset.name, run.dataset.limit) == ("reviews", 0)
    assert (choices["dataset"], choices["dataset/template"]) == ("reviews", "plain")
    run, choices = child("sft", *words)
    assert (run.dataset.name, choices["dataset"]) == ("tldr", "tldr")
    place = "upstream.reward={dataset: {views: {comparisons: rows.jsonl}}}"
    run, _ = child("reward", *words, place)
    assert (run.dataset.name, run.dataset.limit, run.dataset.views.comparisons) == ("tldr", 5, "rows.jsonl")


def test_pipeline_to_ppo_is_the_same_ppo():
    words = ("stage=pipeline", "ppo.kl_coef=0.3", "optim.lr=0.01", "generation.top_p=0.8")
    words += ("reward_source=length", "lora.alpha=8")
    parent, choices = compose.compose(words)
    run, chosen = compose.upstream("ppo", parent, choices)
    assert run.ppo == parent.ppo and run.ppo.kl_coef == 0.3
    assert run.optim == parent.optim and run.optim.lr == 0.01
    assert run.generation == parent.generation and run.generation.top_p == 0.8
    assert run.reward_source == parent.reward_source and run.reward_source.function == "length"
    assert run.lora.alpha == 8
    assert chosen["reward_source"] == "length"
    # and so the same as asked for directly
    direct = compose.compose(["stage=ppo", *words[1:]])[0]
    assert run == direct


def test_pipeline_and_ppo_to_eval():
    parent, choices = compose.compose(["stage=pipeline", "eval.prompts=5", "generation.temperature=0.7"])
    run, _ = compose.upstream("eval", parent, choices)
    assert (run.eval.prompts, run.generation.temperature) == (5, 0.7)
    run, _ = child("eval", "stage=ppo", "generation.temperature=0.7", "reward_source=sentiment")
    assert (run.generation.temperature, run.reward_source.kind) == (0.7, "function")
    assert run.eval.prompts == 64


def test_how_to_evaluate_does_not_change_what_was_trained():
    alone = compose.compose(["stage=ppo"])[0]
    run, _ = child("ppo", "stage=eval", "generation.temperature=0.7", "reward_source=sentiment")
    assert (
        run.generation == alone.generation
    )  # how answers are read does not change how the policy was trained
    assert run.reward_source.kind == "function"  # what is evaluated as reward is what it was trained on


def test_upstream_wins():
    words = ("stage=ppo", "lora.r=4", "seed=1", "dataset.limit=5")
    given = "upstream.sft={lora: {r: 2}, optim: {lr: 1e-3}, train.steps: 9, dataset: {limit: 6}}"
    run, _ = child("sft", *words, given)
    assert (run.lora.r, run.optim.lr, run.train.steps, run.dataset.limit) == (2, 1e-3, 9, 6)
    assert (run.lora.alpha, run.seed, run.dataset.name) == (32, 1, "reviews")
    # and only for that stage
    run, _ = child("reward", *words, given)
    assert (run.lora.r, run.dataset.limit) == (4, 5)


def test_dotted_words_are_the_same_as_dicts():
    dotted = child("sft", "stage=ppo", "upstream.sft.optim.lr=1e-3", "upstream.sft.dataset=tldr")
    assert dotted == child("sft", "stage=ppo", "upstream.sft={optim: {lr: 1e-3}, dataset: tldr}")
    assert (dotted[0].optim.lr, dotted[0].dataset.name) == (1e-3, "tldr")


def test_an_option_replaces_what_would_flow():
    words = ("stage=ppo", "model=tiny", "model.dtype=float32", "lora=attention", "lora.r=4")
    words += ("dataset.limit=5", "dataset/template=tldr")
    run, choices = child("sft", *words, "upstream.sft={lora: default, dataset: tldr}")
    assert (run.lora.r, run.lora.targets) == (16, ["auto"])
    assert (run.dataset.name, run.dataset.limit) == ("tldr", 0)
    assert (choices["lora"], choices["dataset"]) == ("default", "tldr")
    assert (run.model.name, run.model.dtype) == ("tiny", "float32")


def test_the_template_of_a_chosen_dataset_is_its_own():
    run, choices = child("sft", "stage=ppo", "dataset/template=plain", "upstream.sft={dataset: tldr}")
    assert (run.dataset.template.truncate, choices["dataset/template"]) == ("tldr", "tldr")


@pytest.mark.parametrize("of", ["tldr", "alpaca_en"])
def test_the_template_of_the_run_goes_with_another_dataset(of):
    """An answer in another form than SFT taught would be strange to the policy; PPO's prompts are in the run's."""
    words = ("stage=ppo", "dataset=hc3_zh", "dataset/template=chat")
    run, choices = child("sft", *words, f"upstream.sft={{dataset: {of}}}")
    assert run.dataset.name == of
    assert (run.dataset.template.name, run.dataset.template.chat) == ("chat", True)
    assert run.dataset.template.response == "{response}" and run.dataset.template.truncate == "left"
    assert choices["dataset/template"] == "chat"
    # to a stage that has to have another dataset, too
    run, choices = child("reward", *words, "upstream.reward={dataset: tldr}")
    assert (run.dataset.name, run.dataset.template.chat, choices["dataset/template"]) == (
        "tldr",
        True,
        "chat",
    )


def test_but_a_stage_can_have_its_own():
    given = "upstream.sft={dataset: tldr, dataset/template: alpaca, dataset.template.preamble: Hm}"
    run, choices = child("sft", "stage=ppo", "dataset=hc3_zh", "dataset/template=chat", given)
    template = run.dataset.template
    assert (template.name, template.chat, template.preamble) == ("alpaca", False, "Hm")
    assert choices["dataset/template"] == "alpaca"


def test_so_does_a_template_that_was_changed_for_the_run():
    words = ("stage=ppo", "dataset.template.response='{response}'", "dataset.template.preamble=Say:")
    run, choices = child("sft", *words, "upstream.sft={dataset: tldr, dataset.template.preamble: Write:}")
    template = run.dataset.template
    assert (template.name, template.response, template.preamble) == ("plain", "{response}", "Write:")
    assert choices["dataset/template"] == "plain"


@pytest.mark.parametrize("given", ["{dataset/template: tldr}", "{dataset: {template: tldr}}"])
def test_a_template_alone_leaves_the_rest_of_the_dataset(given):
    run, choices = child("sft", "stage=ppo", "dataset.limit=5", f"upstream.sft={given}")
    assert (run.dataset.name, run.dataset.limit, run.dataset.template.truncate) == ("reviews", 5, "tldr")
    assert choices["dataset/template"] == "tldr"


def test_the_parent_is_left_as_it_was():
    given = "upstream.sft={lora: {r: 2}, dataset: {limit: 6, template: tldr}}"
    run, choices = compose.compose(["stage=pipeline", given])
    before = deepcopy((run, choices))
    sft, _ = compose.upstream("sft", run, choices)
    sft.model.lora_targets.append("x")
    assert (run, choices) == before


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ({"optim": {"lrr": 1}}, ["unknown key optim.lrr; did you mean optim.lr?"]),
        ({"modle": "tiny"}, ["unknown key modle; did you mean model?"]),
        ({"ppo": {"kl_coef": 1}}, ["stage sft has no key ppo.kl_coef; ppo and pipeline have it"]),
        (
            {"dataset": "tldrr"},
            [f"unknown dataset tldrr; did you mean tldr? there are {DATASETS}"],
        ),
        ({"optim": {"lr": "fast"}}, ["optim.lr must be a number, got fast"]),
        (
            {"optim": {"lr": -1}, "lora": {"r": 0}},
            ["optim.lr must be more than 0, got -1.0", "lora.r must be more than 0, got 0"],
        ),
        (
            {"train": {"batch_size": 16, "micro_batch_size": 3}},
            ["train.micro_batch_size must divide train.batch_size, got 3 and 16"],
        ),
        (
            {"dataset": {"views": {"demonstrations": None}}},
            [
                "dataset reviews has no demonstrations: choose one that has, 'upstream.sft={dataset: ...}', "
                "or give a ready adapter, adapters.sft=PATH"
            ],
        ),
        ({"stage": "ppo"}, ["stage cannot be set for an upstream stage: it is one for all stages"]),
        (
            {"experiment": "smoke"},
            ["experiment cannot be set for an upstream stage: it is one for all stages"],
        ),
        ({"model": "tiny"}, ["model cannot be set for an upstream stage: it is one for all stages"]),
        (
            {"model": {"dtype": "float32"}},
            ["model cannot be set for an upstream stage: it is one for all stages"],
        ),
        ({"device": "cpu"}, ["device cannot be set for an upstream stage: it is one for all stages"]),
        (
            {"upstream": {"reward": {"seed": 1}}},
            ["upstream cannot be set for an upstream stage: it is one for all stages"],
        ),
    ],
)
def test_what_is_wrong_names_the_stage_and_the_key(given, problems):
    run, choices = compose.compose(["stage=ppo"])
    run.upstream.sft = given
    with pytest.raises(InputError) as error:
        compose.upstream("sft", run, choices)
    assert error.value.problems == [f"upstream.sft: {problem}" for problem in problems]


def test_on_the_command_line_it_is_found_before_anything_starts():
    with pytest.raises(InputError) as error:
        compose.compose(
            ["stage=ppo", "upstream.sft={optim: {lrr: 1}}", "upstream.reward.seed=-1", "lora.r=0"]
        )
    assert error.value.problems == [
        "upstream.sft: unknown key optim.lrr; did you mean optim.lr?",
        "upstream.reward: seed must be at least 0, got -1",
        "lora.r must be more than 0, got 0",
    ]


def test_a_stage_without_an_upstream_entry():
    with pytest.raises(InputError) as error:
        compose.compose(["stage=ppo", "upstream.eval.seed=1", "upstream.sftt={seed: 1}"])
    assert error.value.problems == [
        "unknown key upstream.eval.seed; did you mean seed or upstream.reward?",
        "unknown key upstream.sftt; did you mean upstream.sft?",
    ]
