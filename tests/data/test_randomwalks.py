"""The graph against scipy, the walks against what was published of them, scores worked out by hand."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.csgraph import shortest_path

from rlhf_exp.data import randomwalks
from rlhf_exp.data.load import fingerprint, load_view, statistics
from rlhf_exp.data.randomwalks import Graph, graph_of, optimality, shortest_walks, walks_of
from rlhf_exp.data.records import Comparison, Demonstration, Drop, prompt_id
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Dataset, RandomWalks, Template, Views

TASK = RandomWalks()
# a: goal. b -> a, c; c -> d; d -> a, b; e -> c
SMALL = Graph(successors=((0,), (0, 2), (3,), (0, 1), (2,)), shortest=(1, 2, 3, 2, 4), length=6)


def dataset(**values) -> Dataset:
    return Dataset(
        **{
            "name": "randomwalks",
            "family": "randomwalks",
            "views": Views("generated", "generated", "generated"),
            "template": Template(response="{response}"),
            "validation_share": 0.0,
            "heldout_share": 0.0,
            "evaluate_on": "train",
            **values,
        }
    )


def adjacency(successors) -> np.ndarray:
    matrix = np.zeros((len(successors), len(successors)))
    for i, ends in enumerate(successors):
        matrix[i, list(ends)] = 1
    return matrix


# ---------------------------------------------------------------- the graph


@given(st.integers(3, 26), st.floats(0.03, 0.4), st.integers(0, 10_000))
def test_shortest_walks_are_scipys(nodes, probability, seed):
    edges = np.random.default_rng(seed).random((nodes, nodes)) < probability
    successors = [tuple(np.flatnonzero(row)) for row in edges]
    distances = shortest_path(adjacency(successors), unweighted=True)[:, 0]
    expected = [int(d) + 1 if np.isfinite(d) else None for d in distances]
    expected[0] = 1
    assert shortest_walks(successors) == expected


def test_shortest_walks_by_hand():
    assert shortest_walks(SMALL.successors) == list(SMALL.shortest)
    assert shortest_walks([(0,), (2,), (1,)]) == [1, None, None]


def test_the_graph_is_that_of_numpys_random_state():
    """The edges are the first matrix of the seed's stream in which every node leads somewhere, as trlX draws them."""
    stream = np.random.RandomState(1000)
    edges = stream.rand(21, 21) > 0.9
    np.fill_diagonal(edges, False)
    while not edges.any(axis=1).all():
        edges = stream.rand(21, 21) > 0.9
        np.fill_diagonal(edges, False)
    edges[0] = [True] + [False] * 20
    assert (adjacency(graph_of(TASK).successors) == edges).all()


@pytest.mark.parametrize(("seed", "average", "different"), [(1000, 0.35151, 722), (1002, 0.79018, 163)])
def test_the_walks_are_the_published_ones(seed, average, different):
    """Average optimality .352 of seed 1000, and .79 of 1002; computed with trlX's own functions."""
    task = RandomWalks(graph_seed=seed)
    graph, walks = graph_of(task), walks_of(task)
    assert len(walks) == 1000
    assert len(set(walks)) == different
    assert mean(optimality(graph, walk) for walk in walks) == pytest.approx(average, abs=1e-5)
    assert walks_of(task) == walks  # the kept state is not used up


def test_walks_take_edges_and_stop_at_the_goal():
    graph = graph_of(TASK)
    for walk in walks_of(TASK):
        nodes = [ord(letter) - ord("a") for letter in walk]
        assert nodes[0] != 0 and 2 <= len(nodes) <= 10
        assert all(b in graph.successors[a] for a, b in pairwise(nodes))
        assert 0 not in nodes[:-1]
        assert nodes[-1] == 0 or len(nodes) == 10


def test_graphs_with_lost_nodes_are_refused():
    refused = []
    for seed in range(1000, 1300):
        try:
            graph_of(RandomWalks(graph_seed=seed))
        except InputError as error:
            refused.append(str(error))
    assert len(refused) == 63
    assert all("leads from" in line and "take another seed" in line for line in refused)
    with pytest.raises(
        InputError, match=r"^graph seed 1000 of the random walks: no walk of fewer than 4 nodes"
    ):
        graph_of(RandomWalks(length=4))  # some shortest walks have five


def test_a_graph_that_does_not_come_is_given_up():
    with pytest.raises(InputError, match=r"^no graph of 21 nodes with edge probability 0\.01 in which"):
        graph_of(RandomWalks(edge_probability=0.01))


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("walk", "score"),
    [
        ("ba", 1.0),
        ("bcda", (6 - 4) / (6 - 2)),
        ("da", 1.0),
        ("dba", (6 - 3) / (6 - 2)),
        ("ecda", 1.0),
        ("bcdbca", 0.0),  # there is no edge from c to a
        ("bcdbcda", 0.0),  # seven nodes, the most are six
        ("dbcdba", 0.0),  # six nodes are as bad as not arriving
        ("bcd", 0.0),  # not arrived
        ("b", 0.0),
        ("", 0.0),
        ("bda", 0.0),  # no such edge
        ("za", 0.0),  # no such node
        ("fa", 0.0),
        ("b?", 0.0),
        ("Ba", 0.0),
        ("bacde", 1.0),  # what follows the goal does not count
        ("a", 1.0),
    ],
)
def test_optimality_by_hand(walk, score):
    assert optimality(SMALL, walk) == pytest.approx(score)


def test_only_shortest_walks_score_1():
    graph = graph_of(TASK)
    for walk in walks_of(TASK):
        shortest = walk[-1] == "a" and len(walk) == graph.shortest[ord(walk[0]) - ord("a")]
        assert (optimality(graph, walk) == 1.0) == shortest
        assert 0 <= optimality(graph, walk) <= 1


# ---------------------------------------------------------------- the views


def test_rows_as_records():
    row = {"start": "b", "walk": "cda", "optimality": 0.5, "other": "a", "other_optimality": 1.0}
    assert randomwalks.demonstrations(row, None) == [Demonstration(prompt_id("b"), "b", "cda")]
    (prompt,) = randomwalks.prompts(row, None)
    assert (prompt.prompt, prompt.reference) == ("b", None)
    assert randomwalks.comparisons(row, None) == [Comparison(prompt_id("b"), "b", "a", "cda")]
    turned = row | {"optimality": 1.0, "other_optimality": 0.5}
    assert randomwalks.comparisons(turned, None) == [Comparison(prompt_id("b"), "b", "cda", "a")]
    with pytest.raises(Drop, match="equally optimal"):
        randomwalks.comparisons(row | {"optimality": 1.0}, None)


def test_each_walk_is_compared_with_the_next_of_its_start():
    data = dataset(randomwalks=RandomWalks(walks=60))
    rows = list(randomwalks.rows(data))
    walks = walks_of(data.randomwalks)
    assert [row["start"] + row["walk"] for row in rows] == walks
    for i, row in enumerate(rows):
        later = [walk for walk in walks[i + 1 :] + walks[: i + 1] if walk[0] == row["start"]]
        assert row["start"] + row["other"] == later[0]


def test_repeated_walks_count_and_prompts_do_not_repeat():
    data = dataset()
    demonstrations = load_view(data, "demonstrations", "train")
    assert [d.prompt + d.response for d in demonstrations] == walks_of(TASK)
    prompts = load_view(data, "prompts", "train")
    assert sorted(p.prompt for p in prompts) == list("bcdefghijklmnopqrstu")
    assert statistics(data, "prompts").dropped == {"duplicate": 980}
    better = load_view(data, "comparisons", "train")
    graph = graph_of(TASK)
    assert len(better) == 1000 - statistics(data, "comparisons").dropped["equally optimal walks"]
    for c in better:
        assert optimality(graph, c.prompt + c.chosen) > optimality(graph, c.prompt + c.rejected)


def test_the_evaluation_is_on_the_prompts_of_the_training():
    assert load_view(dataset(), "prompts", "heldout") == load_view(dataset(), "prompts", "train")
    split = dataset(evaluate_on="heldout", heldout_share=0.5)
    heldout, train = ({p.prompt for p in load_view(split, "prompts", s)} for s in ("heldout", "train"))
    assert heldout and train and not heldout & train
    with pytest.raises(InputError, match="none of the 20 records falls into the heldout split"):
        load_view(dataset(evaluate_on="heldout"), "prompts", "heldout")


def test_an_evaluation_to_choose_by_is_on_validation_prompts():
    shares = {"validation_share": 0.3, "heldout_share": 0.3}
    splits = {
        name: {p.prompt for p in load_view(dataset(evaluate_on="heldout", **shares), "prompts", name)}
        for name in ("train", "validation", "heldout")
    }
    chosen = dataset(evaluate_on="validation", **shares)
    assert {p.prompt for p in load_view(chosen, "prompts", "heldout")} == splits["validation"]
    assert not splits["validation"] & splits["heldout"] and not splits["validation"] & splits["train"]
    with pytest.raises(InputError, match="none of the 20 records falls into the validation split"):
        load_view(dataset(evaluate_on="validation", validation_share=0.0), "prompts", "heldout")


def test_the_fingerprint_is_of_the_walks():
    same = {fingerprint(dataset(), view) for view in ("demonstrations", "prompts", "comparisons")}
    assert len(same) == 1
    assert fingerprint(dataset(randomwalks=RandomWalks(graph_seed=1002)), "prompts") not in same
