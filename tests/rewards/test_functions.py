"""What scores a response by name: rules, their arguments, what a run scores with."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_exp.data.randomwalks import graph_of
from rlhf_exp.errors import InputError
from rlhf_exp.rewards import functions
from rlhf_exp.schema import RUNS, Dataset, Evaluation, Model, RandomWalks, RewardSource, Views


@pytest.mark.parametrize(
    ("text", "compound"),
    [  # published in VADER's own README
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was good.", 0.4404),
        ("Today SUX!", -0.5461),
    ],
)
def test_sentiment_gives_the_published_scores(text, compound):
    assert functions.score("sentiment", ["p"], [text]) == [compound]


def test_sentiment_of_nothing_is_zero_and_the_prompt_does_not_count():
    assert (
        functions.score("sentiment", ["great, great"] * 4, ["", " \n", "the table", "汤很好喝"]) == [0.0] * 4
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("  \n ", 0),
        ("one", 1),
        ("it's two\twords ...", 3),
        ("- — !", 0),
        ("a 3-D film", 3),
        ("汤很好喝。", 4),
    ],
)
def test_length_counts_words(text, words):
    assert functions.score("length", ["p"], [text]) == [words]


def test_mixed_scripts_are_counted_by_their_own_rule():
    assert functions.score("length", ["p"] * 2, ["我用 PyTorch训练", "PyTorch训练"]) == [5, 3]


def test_a_score_for_each_response_in_order():
    assert functions.score("length", ["p"] * 3, ["a b c", "a", "a b"]) == [3, 1, 2]
    assert functions.score("length", [], []) == []


@pytest.mark.parametrize(
    ("pattern", "scores"),
    [
        ("[.!?]$", [1, 0, 1, 0]),
        ("^A", [1, 0, 0, 0]),
        ("(?i)b", [1, 1, 0, 0]),
        ("a:b", [0, 1, 0, 0]),  # what follows the first colon is the pattern
        ("", None),
    ],
)
def test_regex_searches_the_response(pattern, scores):
    if scores is None:
        with pytest.raises(InputError, match=r"^reward_source\.function=regex:: needs a pattern"):
            functions.check("regex:")
        return
    functions.check(f"regex:{pattern}")
    assert functions.score(f"regex:{pattern}", ["A."] * 4, ["A b.", "a:b", "so?", ""]) == scores


def test_optimality_reads_the_walk_from_prompt_and_response():
    """Whatever their share; spaces do not count. What optimality is, is tested in tests/data."""
    graph = graph_of(RandomWalks(graph_seed=1002))
    start = next(i for i, number in enumerate(graph.shortest) if number == 3)
    between = next(i for i in graph.successors[start] if 0 in graph.successors[i])
    start, between = (chr(ord("a") + i) for i in (start, between))
    walks = [
        (start, f"{between}a"),
        (f"{start}{between}", "a"),
        (start, f" {between} a"),
        (start, "a"),
        ("", ""),
    ]
    assert functions.score("optimality:1002", *zip(*walks, strict=True)) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert (
        functions.score("optimality", ["s"], ["da"])
        == functions.score("optimality:1000", ["s"], ["da"])
        == [1]
    )


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("sentimnt", "there is no function sentimnt; did you mean sentiment?"),
        (
            "nothing",
            "there is no function nothing; choose one of sentiment, length, regex, relevance, optimality, python",
        ),
        ("rewards.mine", "there is no function rewards.mine; a function of your own is python:rewards.mine"),
        ("length:3", "takes no argument, got 3"),
        ("regex:(", "is no regular expression: missing ), unterminated subpattern at position 0"),
        ("optimality:-1", "expected the seed of a graph, optimality:1000, got -1"),
        ("optimality:9999999999", "expected the seed of a graph, optimality:1000, got 9999999999"),
        ("relevance:nowhere", "nowhere is no model folder: it has no config.json"),
        ("relevance", "model minilm is not fetched: run `python -m rlhf_exp.fetch minilm` once"),
    ],
)
def test_what_cannot_be_is_one_line(spec, line, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path))
    for act, start in (
        (lambda: functions.check(spec, "eval.gold"), f"eval.gold={spec}: "),
        (lambda: functions.score(spec, ["p"], ["r"]), f"{spec}: "),
        (lambda: functions.fingerprint(spec), f"reward_source.function={spec}: "),
    ):
        if spec in ("length:3", "regex:(", "optimality:-1", "optimality:9999999999") and "eval" not in start:
            continue  # arguments are checked once
        with pytest.raises(InputError) as caught:
            act()
        # where a reward model could stand too, it is among what there is
        more = ", learned" if start.startswith("eval") and "choose one of" in line else ""
        assert caught.value.problems == [start + line + more]


def test_a_graph_with_lost_nodes_cannot_be():
    with pytest.raises(
        InputError, match=r"^reward_source\.function=optimality:3: graph seed 3 of the random walks: no"
    ):
        functions.check("optimality:3")


def test_prompts_and_responses_must_pair():
    with pytest.raises(ValueError, match="2 prompts, but 1 responses"):
        functions.score("length", ["p", "q"], ["r"])


# ---------------------------------------------------------------- of a run


def run(stage, function="sentiment", gold="none", kind="function", **dataset):
    data = Dataset(
        name="x", family=dataset.pop("family", "reviews"), randomwalks=RandomWalks(**dataset), views=Views()
    )
    own = {"eval": Evaluation(gold=gold)} if stage == "eval" else {}
    source = RewardSource(kind=kind, function=function)
    return RUNS[stage](
        stage=stage,
        model=Model(name="m"),
        dataset=data,
        **own,
        **({} if stage == "sft" else {"reward_source": source}),
    )


def test_the_functions_of_a_run():
    assert functions.of_config(run("sft")) == {}
    assert functions.of_config(run("ppo")) == {"reward_source.function": "sentiment"}
    assert functions.of_config(run("ppo", kind="learned")) == {}
    both = {"reward_source.function": "length", "eval.gold": "sentiment"}
    assert functions.of_config(run("eval", "length", "sentiment")) == both
    assert functions.of_config(run("eval", kind="learned", gold="length")) == {"eval.gold": "length"}


def test_every_function_of_a_run_is_checked():
    with pytest.raises(InputError) as caught:
        functions.check_config(run("eval", "lenght", "regex:["))
    assert [line.split(":")[0] for line in caught.value.problems] == [
        "reward_source.function=lenght",
        "eval.gold=regex",
    ]
    functions.check_config(run("eval", "lenght", kind="learned"))


@pytest.mark.parametrize(
    ("spec", "task", "other"),
    [
        ("optimality", {}, None),
        ("optimality:1002", {"graph_seed": 1002, "walks": 7}, None),
        ("optimality", {"graph_seed": 1002}, "seed 1002 (21 nodes, edge probability 0.1, walks of 10)"),
        ("optimality:1000", {"length": 12}, "seed 1000 (21 nodes, edge probability 0.1, walks of 12)"),
    ],
)
def test_walks_are_scored_on_their_own_graph(spec, task, other):
    config = run("ppo", spec, family="randomwalks", **task)
    if other is None:
        functions.check_config(config)
        return
    with pytest.raises(InputError) as caught:
        functions.check_config(config)
    assert caught.value.problems == [
        f"reward_source.function={spec}: it scores walks on the graph of seed 1000 (21 nodes, edge probability "
        f"0.1, walks of 10), but dataset.randomwalks is {other}: they must be the same"
    ]


def test_fingerprints_are_of_what_the_config_does_not_hold():
    assert functions.fingerprints(run("ppo")) == {}
    assert functions.fingerprints(run("eval", "regex:x", "optimality")) == {}
    user = functions.fingerprints(run("ppo", "python:rlhf_exp.rewards.rules.length"))
    source = Path(functions.rules.__file__).read_bytes()
    assert user == {"reward_source.function": hashlib.sha256(source).hexdigest()}


def test_importing_the_table_loads_nothing_heavy():
    code = "import sys, rlhf_exp.rewards.functions; print({'vaderSentiment', 'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
