from __future__ import annotations

import pytest
import torch

from rlhf_exp.model.heads import ScalarHead
from rlhf_exp.rewards.learned import score_sequences


def test_score_is_read_at_the_last_real_token_whatever_the_batch(base, roles):
    """PAD is EOS here: a score found by token identity would be read before the answer's own EOS, or at padding."""
    assert base.pad_id == base.eos_id
    head = ScalarHead(base.hidden_size).reset(0)
    sequences = [[5, 6, 7, 2], [9, 2], [2, 2, 2], [8, 30, 31, 32, 33, 2]]
    expected = []
    for sequence in sequences:
        with torch.no_grad():
            hidden = roles.trunk("ref", torch.tensor([sequence]))
        expected.append(head(hidden[0, len(sequence) - 1]).item())
    for size in (1, 2, 4):
        got = score_sequences(roles, "ref", head, sequences, size)
        assert got == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 4


def test_it_is_told_how_many_are_done(roles, base):
    told = []
    score_sequences(roles, "ref", ScalarHead(base.hidden_size), [[5, 2]] * 5, 2, told.append)
    assert told == [2, 4, 5]
