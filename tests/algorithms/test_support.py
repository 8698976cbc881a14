import pytest
import torch

from rlhf_exp.algorithms.support import Support

ALLOWED = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()


def support():
    return Support.from_mask(ALLOWED)


def as_sets(support, vocab_size=4):
    """The kept sets as python lists, read id by id."""
    ids, sets = support.ids.tolist(), []
    for count in support.counts.tolist():
        sets.append(sorted(ids[:count]))
        ids = ids[count:]
    assert not ids
    return sets


def test_from_mask_by_hand():
    assert support().ids.tolist() == [0, 2, 0, 1, 2, 3, 3]
    assert support().counts.tolist() == [2, 0, 4, 1]
    assert support().ids.dtype == torch.int32
    assert support().counts.dtype == torch.int64


def test_to_mask_reads_from_mask_back():
    assert torch.equal(support().to_mask(4), ALLOWED)
    # a larger vocabulary only adds tokens that are not kept
    wider = support().to_mask(6)
    assert torch.equal(wider[:, :4], ALLOWED)
    assert not wider[:, 4:].any()


def test_order_within_a_position_does_not_matter():
    shuffled = Support(torch.tensor([2, 0, 3, 1, 0, 2, 3], dtype=torch.int32), support().counts)
    assert torch.equal(shuffled.to_mask(4), ALLOWED)


@pytest.mark.parametrize("index", [[0], [1], [3, 0], [2, 2, 1], [0, 1, 2, 3], []])
def test_rows_is_indexing_of_the_mask(index):
    index = torch.tensor(index, dtype=torch.int64)
    rows = support().rows(index)
    assert torch.equal(rows.to_mask(4), ALLOWED[index])
    assert rows.ids.dtype == torch.int32


def test_select_is_boolean_indexing_of_the_mask():
    for bits in range(16):
        mask = torch.tensor([bool(bits >> i & 1) for i in range(4)])
        assert torch.equal(support().select(mask).to_mask(4), ALLOWED[mask])


def test_concat_joins_positions_in_order():
    joined = Support.concat([support(), support().rows(torch.tensor([3]))])
    assert as_sets(joined) == [[0, 2], [], [0, 1, 2, 3], [3], [3]]
    with pytest.raises(ValueError, match="at least one"):
        Support.concat([])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_split_gives_consecutive_pieces(size):
    pieces = support().split(size)
    assert [len(piece.counts) for piece in pieces] == [len(p) for p in ALLOWED.split(size)]
    assert as_sets(Support.concat(pieces)) == as_sets(support())
    for piece, mask in zip(pieces, ALLOWED.split(size), strict=True):
        assert torch.equal(piece.to_mask(4), mask)


def test_counts_that_do_not_add_up_are_an_error():
    with pytest.raises(ValueError, match="counts add up to 6 but the support has 7 ids"):
        Support(support().ids, torch.tensor([2, 0, 3, 1])).to_mask(4)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="allowed must be bool"):
        Support.from_mask(ALLOWED.float())
    with pytest.raises(ValueError, match="index has shape"):
        support().rows(torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="counts has shape"):
        support().select(torch.ones(3, dtype=torch.bool))
