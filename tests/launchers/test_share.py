"""Devices dealt out without overlap, threads divided: worked out by hand, then over drawn machines."""

from __future__ import annotations

import pytest
from hydra_plugins.rlhf_local_pool import _share
from hydra_plugins.rlhf_local_pool._share import Share, deal
from hypothesis import given
from hypothesis import strategies as st

from rlhf_exp.errors import InputError


@pytest.mark.parametrize(
    ("jobs", "settings", "shares"),
    [
        # four devices, one a trial: 16 cores in four
        (9, {"devices": ["0", "1", "2", "3"], "cores": 16}, [("0", 4), ("1", 4), ("2", 4), ("3", 4)]),
        # two a trial; the fifth is left
        (9, {"devices": list("01234"), "per_trial": 2, "cores": 8}, [("0,1", 4), ("2,3", 4)]),
        # fewer trials than devices
        (1, {"devices": ["GPU-a", "GPU-b"], "cores": 8}, [("GPU-a", 8)]),
        (9, {"devices": ["0", "1"], "workers": 1, "threads": 3, "cores": 8}, [("0", 3)]),
        # no device: cores // threads
        (9, {"threads": 3, "cores": 8}, [("", 3), ("", 3)]),
        (9, {"threads": 16, "cores": 8}, [("", 16)]),
        # neither: as many trials as there are, the cores divided
        (3, {"cores": 8}, [("", 2), ("", 2), ("", 2)]),
        (9, {"cores": 2}, [("", 1), ("", 1)]),
        (9, {"workers": 2, "cores": 9}, [("", 4), ("", 4)]),
        (9, {"workers": 3, "cores": 2}, [("", 1), ("", 1), ("", 1)]),
    ],
)
def test_the_shares_of_a_sweep(jobs, settings, shares):
    assert [(",".join(s.devices), s.threads) for s in deal(jobs, **settings)] == shares


@given(
    jobs=st.integers(1, 12),
    count=st.integers(0, 9),
    per_trial=st.integers(1, 3),
    threads=st.integers(0, 4),
    cores=st.integers(1, 16),
)
def test_no_device_is_dealt_twice_and_no_core_too_often(jobs, count, per_trial, threads, cores):
    devices = [str(n) for n in range(count)]
    if 0 < count < per_trial:
        with pytest.raises(InputError, match="but there are"):
            deal(jobs, devices=devices, per_trial=per_trial, threads=threads, cores=cores)
        return
    shares = deal(jobs, devices=devices, per_trial=per_trial, threads=threads, cores=cores)
    dealt = [device for share in shares for device in share.devices]
    assert len(dealt) == len(set(dealt)) and set(dealt) <= set(devices)
    assert all(len(share.devices) == (per_trial if count else 0) for share in shares)
    assert 1 <= len(shares) <= jobs
    if not threads:
        assert sum(share.threads for share in shares) <= max(cores, len(shares))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"per_trial": 0}, "devices_per_trial must be at least 1, got 0"),
        ({"devices": ["0", "0"]}, "devices: name each once, got 0, 0"),
        ({"devices": ["0", "1"], "workers": 3}, "3 trials of 1 CUDA device at a time, but there are 2"),
        ({"devices": ["0", "1"], "per_trial": 4}, "1 trials of 4 CUDA devices at a time, but there are 2"),
    ],
)
def test_what_cannot_be_dealt_is_said(settings, problem):
    with pytest.raises(InputError) as error:
        deal(4, cores=4, **settings)
    assert problem in error.value.problems[0]


def test_the_environment_of_a_share():
    found = Share(("2", "3"), 5).environment()
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "5"
    assert Share((), 1).environment()["CUDA_VISIBLE_DEVICES"] == "", "on the CPU no trial may take a device"


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [(None, 2, ["0", "1"]), ("3,5", 2, ["3", "5"]), ("GPU-8a, MIG-77", 2, ["GPU-8a", "MIG-77"]), ("", 0, [])],
)
def test_devices_have_the_names_that_the_environment_gives_them(monkeypatch, visible, count, names):
    import torch
    from hydra_plugins.rlhf_local_pool import _share

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert _share.devices({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == names


@pytest.mark.parametrize(
    ("visible", "wanted", "said"),
    [
        (["0", "1"], ["0", "1"], []),
        (["0", "1"], ["1", "7"], ["hydra.launcher.devices: no CUDA device 7 here: there are 0, 1"]),
        ([], ["0"], ["hydra.launcher.devices: no CUDA device 0 here: there are none"]),
        ([], ["GPU-a"], []),
        ([], [], []),
    ],
)
def test_devices_that_are_not_here(monkeypatch, visible, wanted, said):
    """CUDA_VISIBLE_DEVICES=7 on a machine with two shows none, and the trial would train on the CPU."""
    monkeypatch.setattr(_share, "devices", lambda: visible)
    assert _share.absent(wanted) == said
