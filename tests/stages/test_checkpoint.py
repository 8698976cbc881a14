"""What a checkpoint holds comes back bit for bit; when one is due; which can be used."""

from __future__ import annotations

import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch

from rlhf_exp.errors import Interrupted
from rlhf_exp.stages import checkpoint, signals
from rlhf_exp.stages.checkpoint import Keeper
from rlhf_exp.store import states


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()


def test_a_tree_comes_back_as_it_was(tmp_path):
    odd = torch.tensor([math.nan, -0.0, 1e-45, math.inf])
    tree = {
        "tensors": [odd, odd.bfloat16(), torch.arange(6).reshape(2, 3).T, torch.tensor(2.0), torch.zeros(0)],
        "keys": {1: "a", "1": "b", (2, 3): None},
        "numbers": [0.1 + 0.2, 2**70, True, -0.0, math.inf],
        "$word": ("tuple", ["list"], {}),
    }
    checkpoint.write(tmp_path, tree, {"format": 1})
    found, header = checkpoint.read(tmp_path)
    assert header == {"format": 1}
    assert [bits(x) for x in found["tensors"]] == [bits(x) for x in tree["tensors"]]
    for part in ("keys", "numbers", "$word"):
        assert repr(found[part]) == repr(tree[part])


@pytest.mark.parametrize("what", [{1, 2}, object(), np.float32(1), b"x"])
def test_what_has_no_place_is_refused(tmp_path, what):
    with pytest.raises(TypeError, match="has no place in a checkpoint"):
        checkpoint.write(tmp_path, [what], {})


def test_the_random_generators_go_on(tmp_path):
    checkpoint.write(tmp_path, checkpoint.random_state(), {})
    random.gauss(0, 1)  # which keeps a second number for later
    np.random.standard_normal()

    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)

    checkpoint.write(tmp_path, checkpoint.random_state(), {})
    expected = draw()
    draw()
    checkpoint.set_random_state(checkpoint.read(tmp_path)[0])
    assert draw() == expected


def trainer(steps: int):
    """A parameter with AdamW and a falling learning rate, after some steps."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([{"params": [weight]}, {"params": [], "lr": 0.5}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    parts = {"w": [weight]}, optimizer, scheduler

    def step() -> None:
        (weight**3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    for _ in range(steps):
        step()
    return weight, parts, step


def test_optimiser_and_schedule_go_on_bit_for_bit(tmp_path):
    weight, parts, step = trainer(3)
    tree = checkpoint.state_of(*parts) | {"random": checkpoint.random_state()}
    checkpoint.write(tmp_path, tree, {})
    step()
    step()
    other, others, go_on = trainer(0)
    checkpoint.put_back(checkpoint.read(tmp_path)[0], *others)
    go_on()
    go_on()
    assert bits(other) == bits(weight)
    assert others[2].get_last_lr() == parts[2].get_last_lr()


# ---------------------------------------------------------------- when


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(checkpoint.time, "monotonic", found)
    return found


def saved(context) -> list[int]:
    return states.steps(context.folder.path)


def test_writing_takes_two_percent_of_the_time(context, clock, monkeypatch):
    context, steps = context(), []

    def save(context, step, tree, position):
        steps.append(step)
        clock.now += 1.0  # a second each

    monkeypatch.setattr(checkpoint, "save", save)
    with context.log("ppo", 1000, ()) as log, Keeper(context, 1000, log, dict) as keeper:
        for step in range(1, 200):
            clock.now += 1.0
            keeper.after(step)
        keeper.after(1000)
    # the first shows what it costs; then 50 s of work for a second of writing
    assert steps == [1, 51, 101, 151, 1000]


def test_every_so_many_steps_and_at_the_end(context):
    context = context()
    context.checkpoint_every = 3
    seen = []
    with context.log("ppo", 8, ()) as log, Keeper(context, 8, log, dict) as keeper:
        for step in range(1, 9):
            keeper.after(step)
            seen.append(saved(context)[:1])
    assert seen == [[], [], [3], [3], [3], [6], [6], [8]]


def test_the_last_step_may_come_early(context):
    context = context()
    context.checkpoint_every = 100
    with context.log("ppo", 8, ()) as log, Keeper(context, 8, log, dict) as keeper:
        keeper.after(2, last=True)
    assert saved(context) == [2]


def test_a_signal_in_the_steps_saves_then_ends(context, capfd):
    context = context()
    context.checkpoint_every = 100
    with signals.listening(), context.log("ppo", 8, ()) as log, Keeper(context, 8, log, dict) as keeper:
        keeper.after(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        log.step(2, {"a": 1.0})
        with pytest.raises(Interrupted, match="stopped by SIGUSR1 at step 2; the same command continues"):
            keeper.after(2)
    assert saved(context) == [2]
    assert "SIGUSR1: saving after this step, then stopping; once more stops at once" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "raises"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_second_signal_and_one_outside_end_at_once(number, raises, capfd):
    before = signal.getsignal(number)
    with signals.listening():
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.asked() == "SIGUSR1"
            with pytest.raises(raises):
                os.kill(os.getpid(), number)
        with pytest.raises(raises):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert signals.asked() is None


# ---------------------------------------------------------------- which


def checkpoints(context) -> None:
    with context.log("ppo", 9, ()) as log:
        for step in (1, 2):
            log.step(step, {"a": step})
            checkpoint.save(context, step, {"at": step}, log.position())
            log.commit()


def test_the_newest_sound_one(context, capsys):
    context = context()
    assert checkpoint.newest(context).step == 0
    checkpoints(context)
    found = checkpoint.newest(context)
    assert (found.step, found.tree["at"], found.log["tracked"]) == (2, 2, 2)
    assert capsys.readouterr().out.splitlines()[-1].endswith("continued from step 2")


def test_one_whose_log_is_shorter_than_it_was_is_left_out(context, capsys):
    context = context()
    checkpoints(context)
    path = context.folder.path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 1)
    found = checkpoint.newest(context)
    assert (found.step, found.log["tracked"]) == (1, 2)
    assert "the checkpoint of step 2 is left out: metrics.jsonl has" in capsys.readouterr().out


def test_one_of_another_format_is_left_out(context, monkeypatch, capsys):
    context = context()
    checkpoints(context)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    found = checkpoint.newest(context)
    assert (found.step, found.tree, found.log["tracked"]) == (0, None, 2)
    assert json.dumps(found.log["bytes"]) == '{"metrics.jsonl": 0, "samples.jsonl": 0}'
    assert "it has format 1, this version reads 2" in capsys.readouterr().out
