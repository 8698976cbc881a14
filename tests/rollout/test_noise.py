from __future__ import annotations

import subprocess
import sys

import torch

from rlhf_exp.rollout.noise import row_key, splitmix, uniform


def test_splitmix_gives_the_published_stream():
    """The first outputs of SplitMix64 for seed 1234567 (Vigna's splitmix64.c, as in Rosetta Code's test vector)."""
    gamma, seed = 0x9E3779B97F4A7C15, 1234567
    stream = [splitmix((seed + i * gamma) % 2**64) for i in range(5)]
    assert stream == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_tensor_arithmetic_equals_the_integers():
    keys = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    for position in (0, 1, 7, 2**31):
        got = uniform(torch.tensor(keys), position).tolist()
        gamma = 0x9E3779B97F4A7C15
        assert got == [(splitmix((key + position * gamma) % 2**64) >> 11) / 2**53 for key in keys]


def test_uniform_over_rows_and_positions():
    keys = torch.tensor([row_key(0, 1, prompt) for prompt in range(500)])
    u = torch.stack([uniform(keys, position) for position in range(200)])
    assert u.min() >= 0
    assert u.max() < 1
    n = u.numel()
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    counts = torch.histc(u.float(), bins=64, min=0, max=1)
    chi2 = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert (
        chi2 < 63 + 4 * (2 * 63) ** 0.5
    )  # mean and standard deviation of chi-square with 63 degrees of freedom
    # neighbours in either direction are uncorrelated (standard error 1 / sqrt(n))
    for shifted in (u.roll(1, 0), u.roll(1, 1)):
        assert abs(float(torch.corrcoef(torch.stack([u.flatten(), shifted.flatten()]))[0, 1])) < 4 / n**0.5


def test_every_part_of_the_key_counts():
    keys = {
        row_key(*parts) for parts in [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)]
    }
    keys |= {row_key(1, 0, 2, 3), row_key(2, 1, 0, 3)}  # the order counts too
    assert len(keys) == 7
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_the_same_in_another_process():
    code = "from rlhf_exp.rollout.noise import row_key; print(row_key(3, 4, 2**62, 1))"
    shown = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert shown == [f"{row_key(3, 4, 2**62, 1)}\n"] * 2
