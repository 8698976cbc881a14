from __future__ import annotations

import torch

from rlhf_exp.data.collate import left_pad, right_pad

PAD = 2  # also a token of the rows: it may be EOS


def test_right_pad():
    ids, lengths = right_pad([[5, PAD], [7, 8, PAD], [9]], PAD)
    assert ids.tolist() == [[5, PAD, PAD], [7, 8, PAD], [9, PAD, PAD]]
    assert lengths.tolist() == [2, 3, 1]
    assert ids.dtype == lengths.dtype == torch.int64


def test_left_pad():
    ids, mask = left_pad([[PAD, 5], [7, 8, PAD], [9]], PAD)
    assert ids.tolist() == [[PAD, PAD, 5], [7, 8, PAD], [PAD, PAD, 9]]
    assert mask.tolist() == [[False, True, True], [True, True, True], [False, False, True]]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool


def test_empty_rows_and_empty_batches():
    ids, lengths = right_pad([[], [3]], PAD)
    assert ids.tolist() == [[PAD], [3]] and lengths.tolist() == [0, 1]
    ids, mask = left_pad([[], []], PAD)
    assert ids.shape == mask.shape == (2, 0) and ids.dtype == torch.int64
    ids, lengths = right_pad([], PAD)
    assert ids.shape == (0, 0) and lengths.shape == (0,)
    ids, mask = left_pad([], PAD)
    assert ids.shape == mask.shape == (0, 0)
