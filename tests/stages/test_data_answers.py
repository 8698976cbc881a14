"""The data's own answers in an evaluation: which they are, how they are scored, where they are shown."""

from __future__ import annotations

import json
import math

import pytest

from rlhf_exp.data.load import load_view
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Evaluation, Fields, Generation, RewardSource, Views
from rlhf_exp.stages import data_answers, evaluate, written
from rlhf_exp.stages.data_answers import DEMONSTRATIONS, REFERENCES, answers_to, kind_of, prompts_of

LENGTH = RewardSource(kind="function", function="length")


@pytest.fixture
def lines(tmp_path):
    """lines(name, rows) -> the path of a JSONL file."""

    def write(name: str, rows: list[dict]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def own(run_config):
    """own(prompts, demonstrations, ...) -> an EvalRun on rows of the user's, none of them held back."""

    def make(prompts: str, demonstrations: str | None = None, reference: str | None = None, **values):
        dataset = {
            "name": "jsonl",
            "family": "jsonl",
            "views": Views(demonstrations, None, prompts),
            "fields": Fields(reference=reference),
            "evaluate_on": "train",
            "validation_share": 0.0,
            "heldout_share": 0.0,
        } | values.pop("dataset", {})
        made = {"eval": Evaluation(prompts=0, gold="none"), "reward_source": LENGTH, **values}
        return run_config("eval", dataset=dataset, generation=Generation(max_new_tokens=5), **made)

    return make


PROMPTS = [{"prompt": name} for name in ("one", "two", "three")]
# "one" has two answers, "three" none, and nobody asks "four"
WRITTEN = [
    {"prompt": "one", "response": "a"},
    {"prompt": "two", "response": "a b c"},
    {"prompt": "one", "response": "a b"},
    {"prompt": "four", "response": "a b c d e"},
]


def evaluation_of(config, given) -> tuple[dict, dict[str, float]]:
    metrics = evaluate.run(config, given)
    return json.loads((given.folder.path / "eval.json").read_text()), metrics


def test_demonstrations_of_the_prompts_are_a_row_of_its_own(own, lines, context):
    """The rule counts words: 1, 2 and 3 have the mean 2, and errors by prompt.

    Deviations -1 and 0 of "one" sum to -1, that of "two" is 1: sqrt(2 / 1 * (1 + 1)) / 3.
    """
    given = context()
    found, metrics = evaluation_of(own(lines("p", PROMPTS), lines("d", WRITTEN)), given)
    data = found["data"]
    assert (data["name"], data["kind"]) == ("data", "demonstrations")
    assert data["metrics"]["answers"] == 3 and data["metrics"]["prompts"] == 2
    assert data["metrics"]["reward"] == pytest.approx(2.0)
    assert data["metrics"]["reward_se"] == pytest.approx(math.sqrt(4) / 3)
    assert data["metrics"]["eos_rate"] == 1.0
    assert "kl" not in data["metrics"] and "gold" not in data["metrics"]
    assert metrics["data/reward"] == data["metrics"]["reward"]
    assert [policy["name"] for policy in found["policies"]] == ["base"]
    page = (given.folder.path / "report" / "report.html").read_text()
    assert "data: 3 demonstrations of 2 prompts" in page


def test_references_come_before_demonstrations(own, lines, context):
    rows = [{"prompt": "one", "best": "x y z w"}, {"prompt": "two", "best": "x y"}, {"prompt": "three"}]
    rows[2]["best"] = ""
    config = own(lines("p", rows), lines("d", WRITTEN), reference="best")
    assert kind_of(config) == REFERENCES
    found, _ = evaluation_of(config, context())
    assert found["data"]["kind"] == "references"
    assert found["data"]["metrics"]["answers"] == 2
    assert found["data"]["metrics"]["reward"] == pytest.approx(3.0)
    assert found["data"]["metrics"]["reward_se"] == pytest.approx(1.0)


def test_a_gold_scorer_judges_them_too(own, lines, context):
    config = own(lines("p", PROMPTS), lines("d", WRITTEN), eval=Evaluation(prompts=0, gold="regex:b"))
    found, metrics = evaluation_of(config, context())
    assert found["data"]["metrics"]["gold"] == pytest.approx(2 / 3) == metrics["data/gold"]


def test_no_answers_no_row(own, lines, context):
    found, metrics = evaluation_of(own(lines("p", PROMPTS)), context("none"))
    assert "data" not in found and not [name for name in metrics if name.startswith("data/")]
    found, _ = evaluation_of(own(lines("p", PROMPTS), lines("d", WRITTEN[3:])), context("others"))
    assert "data" not in found


def test_only_of_the_prompts_that_are_evaluated(run_config):
    """Of the reviews each opening has two continuations; those of other splits and prompts do not count."""
    config = run_config("eval", eval=Evaluation(prompts=7))
    prompts = prompts_of(config)
    assert len(prompts) == 7
    assert prompts == sorted(load_view(config.dataset, "prompts", "heldout"), key=lambda p: p.id)[:7]
    found = answers_to(prompts, config)
    assert found.kind == DEMONSTRATIONS
    assert sorted(found.places) == sorted([*range(7), *range(7)])
    written_to = {(d.prompt, d.response) for d in load_view(config.dataset, "demonstrations", "heldout")}
    assert {
        (prompts[i].prompt, text) for i, text in zip(found.places, found.texts, strict=True)
    } <= written_to


def test_no_demonstration_in_the_split_is_no_error(own, lines):
    """Half of twelve prompts are held back; the one demonstration is of a prompt that is not."""
    split = {"evaluate_on": "heldout", "heldout_share": 0.5}
    path = lines("p", [{"prompt": f"{number}"} for number in range(12)])
    (trained, *_) = load_view(own(path, dataset=split).dataset, "prompts", "train")
    elsewhere = lines("e", [{"prompt": trained.prompt, "response": "a"}])
    assert kind_of(own(path, elsewhere, dataset=split)) is None


def test_they_are_in_the_store_key_exactly_where_they_are_read(own, lines, run_config):
    config = own(lines("p", PROMPTS), lines("d", WRITTEN))
    before = data_answers.fingerprints(config)
    assert set(before) == {"demonstrations"}
    assert data_answers.fingerprints(own(lines("p", PROMPTS), lines("d2", WRITTEN[:2]))) != before
    rows = [{"prompt": "one", "best": "x"}]
    assert data_answers.fingerprints(own(lines("r", rows), lines("d", WRITTEN), reference="best")) == {}
    assert data_answers.fingerprints(run_config("sft")) == {}


def test_demonstrations_that_cannot_be_read_say_how_to_go_without(own, lines):
    config = own(lines("p", PROMPTS), lines("d", [{"prompt": "one", "answer": "a"}]))
    with pytest.raises(InputError) as caught:
        kind_of(config)
    (first, second) = caught.value.problems
    assert "no field 'response'" in first
    assert all("dataset.views.demonstrations=null leaves them out" in line for line in (first, second))
    assert data_answers.fingerprints(config) == {}  # preflight says it


def test_an_answer_that_was_cut_did_not_end():
    found = written.written([[1], [2]], [[5, 9], [5, 6]], eos_id=9)
    assert found.ended == [True, False]
    part = written.rows_of(found, [1])
    assert (part.prompts, part.responses, part.ended) == ([[2]], [[5, 6]], [False])


def test_what_is_read_has_to_fit_the_context_as_well_as_what_is_written(
    base, run_config, ppo_config, own, lines
):
    """Positions past the model's are refused for the data's answers too: by eval, references and demonstrations."""
    from dataclasses import replace
    from types import SimpleNamespace

    from rlhf_exp.stages import preflight

    positions = json.loads((base.path / "config.json").read_text())["max_position_embeddings"]
    plan = SimpleNamespace(base=SimpleNamespace(folder=base.path))

    def look(config) -> None:
        preflight._context(SimpleNamespace(config=config), plan)

    def stretched(config):
        return replace(config, dataset=replace(config.dataset, max_response_tokens=positions))

    silent = own(lines("p", PROMPTS))  # neither references nor demonstrations
    for config in (silent, ppo_config()):
        look(stretched(config))
    for config in (
        run_config("eval"),
        ppo_config({"ptx_coef": 1.0}),
        ppo_config({"score_scaling": "reference"}),
    ):
        look(config)
        with pytest.raises(InputError, match=r"dataset\.max_response_tokens"):
            look(stretched(config))


def test_human_summaries_of_real_posts(shared_data, run_config, context):
    """Their mean number of words, from the files alone; the tokenizer has few words, and cuts none of them."""
    import re

    from rlhf_exp.schema import Template

    folder = shared_data / "openai_summarize_tldr"
    config = run_config(
        "eval",
        dataset={
            "name": "tldr",
            "family": "tldr",
            "views": Views(str(folder), None, str(folder)),
            "template": Template(truncate="tldr"),
            "max_prompt_tokens": 64,
            "max_response_tokens": 400,
        },
        eval=Evaluation(prompts=12, gold="none"),
        generation=Generation(max_new_tokens=4),
        reward_source=LENGTH,
    )
    found, _ = evaluation_of(config, context())
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
    labels = {row["prompt"].strip(): row["label"].strip() for row in rows}
    words = [len(re.findall(r"\S*\w\S*", labels[prompt.prompt])) for prompt in prompts_of(config)]
    assert len(words) == 12 and found["data"]["kind"] == "references"
    assert found["data"]["metrics"]["reward"] == pytest.approx(sum(words) / 12)
