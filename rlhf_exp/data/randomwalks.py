"""Family `randomwalks`: shortest paths on a random graph, learnt from random walks; code makes the rows.

The task of Chen et al. 2021 (Decision Transformer, figure 2) in the form of trlX's example: nodes are letters,
`a` is the goal, a walk is a word. The prompt is a walk's first node, the response the rest. Graph and walks come
from numpy's RandomState, whose stream is frozen, by the draws that trlX makes: the same seed gives the same graph
and the same walks there, so that published numbers compare.

Row: {"start": "b", "walk": "cda", "optimality": 0.5, "other": "ka", "other_optimality": 1.0}, where `other` is the
next walk from the same start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp.data.records import Comparison, Demonstration, Drop, Prompt, prompt_id
from rlhf_exp.errors import InputError
from rlhf_exp.schema import Dataset, RandomWalks

if TYPE_CHECKING:
    from numpy.random import RandomState

GOAL = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DRAWS = 5_000  # of graphs; with the defaults about 15 are enough
REPEATS = True  # walks that come twice are as likely to be imitated as they are to be walked


class Graph(NamedTuple):
    """Nodes 0 .. n - 1; the goal leads nowhere but to itself."""

    successors: tuple[tuple[int, ...], ...]
    shortest: tuple[int, ...]  # nodes of a shortest walk from each node to the goal, both ends counted
    length: int  # most nodes of a walk


def graph_of(task: RandomWalks) -> Graph:
    """The graph of a seed. InputError where a node has no walk to the goal of fewer than `length` nodes."""
    return _draw(task.nodes, task.edge_probability, task.length, task.graph_seed)[0]


def walks_of(task: RandomWalks) -> list[str]:
    """`walks` random walks, each until the goal or until it has `length` nodes."""
    graph, state = _draw(task.nodes, task.edge_probability, task.length, task.graph_seed)
    random = _copy(state)
    return ["".join(LETTERS[node] for node in _walk(graph, random)) for _ in range(task.walks)]


@lru_cache(maxsize=8)
def _draw(nodes: int, edge_probability: float, length: int, seed: int) -> tuple[Graph, RandomState]:
    """The graph, and the generator's state after it, from which the walks are drawn."""
    from numpy.random import RandomState

    random = RandomState(seed)
    for _ in range(DRAWS):
        edges = random.rand(nodes, nodes) > 1 - edge_probability
        successors = [tuple(j for j in range(nodes) if edges[i, j] and j != i) for i in range(nodes)]
        if all(successors):  # of the goal too: what is drawn must not depend on what is done with it next
            break
    else:
        raise InputError(
            f"no graph of {nodes} nodes with edge probability {edge_probability:g} in which each leads somewhere "
            f"in {DRAWS} draws: raise dataset.randomwalks.edge_probability"
        )
    successors[GOAL] = (GOAL,)
    shortest = shortest_walks(successors)
    lost = [LETTERS[i] for i, number in enumerate(shortest) if number is None or number >= length]
    if lost:
        # trlX scores those 0 / 0
        raise InputError(
            f"graph seed {seed} of the random walks: no walk of fewer than {length} nodes leads from "
            f"{', '.join(lost)} to the goal {LETTERS[GOAL]}: take another seed, a greater length or more edges"
        )
    return Graph(tuple(successors), tuple(shortest), length), random


def shortest_walks(successors: Sequence[Sequence[int]]) -> list[int | None]:
    """Nodes on a shortest walk from each node to the goal, both counted; None where there is none.

    Breadth first, from the goal against the edges.
    """
    found: list[int | None] = [None] * len(successors)
    found[GOAL], front, number = 1, {GOAL}, 1
    while front:
        number += 1
        front = {i for i, ends in enumerate(successors) if found[i] is None and front.intersection(ends)}
        for node in front:
            found[node] = number
    return found


def _copy(state: RandomState) -> RandomState:
    from numpy.random import RandomState

    random = RandomState()
    random.set_state(state.get_state())
    return random


def _walk(graph: Graph, random: RandomState) -> list[int]:
    node = GOAL
    while node == GOAL:
        node = int(random.randint(len(graph.successors)))
    walk = [node]
    while node != GOAL and len(walk) < graph.length:
        node = int(random.choice(graph.successors[node]))
        walk.append(node)
    return walk


def optimality(graph: Graph, walk: str) -> float:
    """How near a walk's length is to the shortest one's: (L - length) / (L - shortest), from 0 to 1.

    L is `length`. 0 for a walk that takes an edge which is not there, is no word of the nodes' letters, does not
    reach the goal or is longer than L (where trlX's score goes below 0). What follows the goal does not count.
    """
    nodes = [LETTERS.find(letter) for letter in walk]
    if not 0 <= (nodes[0] if nodes else -1) < len(graph.successors):
        return 0.0
    for place, node in enumerate(nodes):
        if place and node not in graph.successors[nodes[place - 1]]:
            return 0.0
        if node == GOAL:
            return max(0.0, graph.length - place - 1) / (graph.length - graph.shortest[nodes[0]])
    return 0.0


def rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """A row a walk; its `other` is the next walk from the same start, the last one's is the first."""
    graph, walks = graph_of(dataset.randomwalks), walks_of(dataset.randomwalks)
    of_start: dict[str, list[str]] = {}
    for walk in walks:
        of_start.setdefault(walk[0], []).append(walk)
    place = dict.fromkeys(of_start, 0)
    for walk in walks:
        same = of_start[walk[0]]
        place[walk[0]] += 1
        other = same[place[walk[0]] % len(same)]
        yield {
            "start": walk[0],
            "walk": walk[1:],
            "optimality": optimality(graph, walk),
            "other": other[1:],
            "other_optimality": optimality(graph, other),
        }


def demonstrations(row: Mapping[str, Any], dataset: Dataset) -> list[Demonstration]:
    """Every walk, good or bad: imitation averages far below the optimum."""
    return [Demonstration(prompt_id(row["start"]), row["start"], row["walk"])]


def comparisons(row: Mapping[str, Any], dataset: Dataset) -> list[Comparison]:
    """Two walks from the same start; the one of higher optimality is the chosen one."""
    if row["optimality"] == row["other_optimality"]:
        raise Drop("equally optimal walks")
    better = row["optimality"] > row["other_optimality"]
    chosen, rejected = (row["walk"], row["other"]) if better else (row["other"], row["walk"])
    return [Comparison(prompt_id(row["start"]), row["start"], chosen, rejected)]


def prompts(row: Mapping[str, Any], dataset: Dataset) -> list[Prompt]:
    """The start, each once."""
    return [Prompt(prompt_id(row["start"]), row["start"], None)]


GENERATE = rows
VIEWS = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
