"""What there is, the largest micro-batch that the plan allows, and backing off where a device says otherwise."""

from __future__ import annotations

import pytest

from rlhf_exp.memory import free


class Full(Exception):
    """A device's memory has run out."""


def device(most: int, seen: list[int]):
    """Takes up to `most` rows."""

    def attempt(size: int) -> None:
        seen.append(size)
        if size > most:
            raise Full

    return attempt


def test_micro_batches_divide_a_batch_or_not():
    assert free.sizes(12, whole=True) == [12, 6, 4, 3, 2, 1]
    assert free.sizes(3, whole=False) == [3, 2, 1]


@pytest.mark.parametrize(("room", "size"), [(None, 8), (800, 8), (799, 4), (100, 1), (5, 1)])
def test_the_first_that_fits_by_the_plan(room, size):
    assert free.largest([8, 4, 2, 1], lambda rows: 100.0 * rows, room) == size


@pytest.mark.parametrize(
    ("most", "size", "tried"),
    [(99, 32, [32]), (31, 16, [32, 16]), (12, 8, [32, 16, 8]), (1, 1, [32, 16, 8, 4, 2, 1])],
)
def test_after_a_failure_at_most_half_is_tried(most, size, tried):
    seen: list[int] = []
    assert free.tried(list(range(32, 0, -1)), device(most, seen), Full) == size
    assert seen == tried


def test_sizes_between_that_do_not_divide_are_passed_over():
    seen: list[int] = []
    assert free.tried([12, 6, 4, 3, 2, 1], device(5, seen), Full) == 3
    assert seen == [12, 6, 3]


def test_it_recovers_between_attempts_and_gives_up_after_one_row():
    seen: list[int] = []
    recovered: list[int] = []
    with pytest.raises(free.OutOfMemory):
        free.tried([4, 2, 1], device(0, seen), Full, lambda: recovered.append(len(seen)))
    assert (seen, recovered) == ([4, 2, 1], [1, 2, 3])
    with pytest.raises(free.OutOfMemory):  # whose smallest size is not 1
        free.tried([4, 3], device(0, seen), Full)
    assert seen[3:] == [4, 3]


def test_an_attempts_tensors_are_gone_when_it_recovers():
    """The error holds the frames of what failed, and these their tensors."""
    import weakref

    class Tensor:
        pass

    held: list[weakref.ref] = []

    def attempt(size: int) -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise Full(tensor)

    alive: list[bool] = []
    with pytest.raises(free.OutOfMemory):
        free.tried([1], attempt, Full, lambda: alive.append(held[-1]() is not None))
    assert alive == [False]


def test_other_errors_are_not_taken_for_a_full_device():
    def attempt(size: int) -> None:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        free.tried([2, 1], attempt, Full)


def test_free_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   2000 kB\n")
    assert free.of_host(tmp_path / "meminfo", tmp_path) == 2000 * 1024
    for name, text in (("max", "1000000"), ("current", "400000"), ("stat", "anon 5\ninactive_file 100000")):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert free.of_host(tmp_path / "meminfo", tmp_path) == 700_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free.of_host(tmp_path / "meminfo", tmp_path) == 2000 * 1024
    assert free.of_host(tmp_path / "nowhere", tmp_path / "nowhere") is None
