"""SFT: TRL's loss against our own from full logits; micro-batches; the base afterwards."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.data.load import load_view
from rlhf_exp.schema import Lora, Optim, Train
from rlhf_exp.stages import sft
from rlhf_exp.tracking import read_lines, read_metrics
from tests.stages.conftest import tiny

WEIGHTS = "adapter/adapter_model.safetensors"
LONGEST = 36  # about half of the responses end within it


@pytest.fixture
def config(run_config):
    """SFTRun of a few steps on sixteen rows."""

    def make(steps=1, lr=1e-9, micro=16, rows=16, batch=16, schedule="constant", dropout=0.0):
        return run_config(
            "sft",
            dataset={"limit": rows, "max_response_tokens": LONGEST},
            lora=Lora(r=4, alpha=8.0, dropout=dropout),
            train=Train(steps=steps, batch_size=batch, micro_batch_size=micro),
            optim=Optim(lr=lr, schedule=schedule),
        )

    return make


def first(context) -> dict[str, float]:
    return read_metrics(context.folder.path / "metrics.jsonl")[0]


def plain_loss(base, rows) -> tuple[float, float, float]:
    """Mean -log p over response tokens and EOS; over all tokens; and the share of response tokens guessed right."""
    losses, everything, right, ends = [], [], [], 0
    for row in rows:
        prompt, response = (
            base.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row.prompt, f" {row.response}")
        )
        prompt, response = prompt[-24:], [*response, base.eos_id][:LONGEST]
        ends += response[-1] == base.eos_id
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([prompt + response])).logits[0, :-1]
        targets = torch.tensor((prompt + response)[1:])
        loss = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        everything.append(loss)
        losses.append(loss[len(prompt) - 1 :])
        right.append((logits.argmax(-1) == targets)[len(prompt) - 1 :].float())
    return (
        float(torch.cat(losses).mean()),
        float(torch.cat(everything).mean()),
        float(torch.cat(right).mean()),
    )


@pytest.mark.parametrize("micro", [16, 4, 1])
def test_the_loss_counts_the_response_and_its_eos(base, config, context, micro):
    """At a learning rate of nearly 0, and with LoRA's B at 0, the first loss is that of the base."""
    run = config(micro=micro)
    given = context()
    sft.run(run, given)
    rows = load_view(run.dataset, "demonstrations", "train")
    assert len(rows) == 16
    response, everything, right = plain_loss(base, rows)
    assert first(given)["train/loss"] == pytest.approx(response, abs=2e-4)
    assert abs(response - everything) > 1e-3  # the prompt's tokens would show
    if micro == 16:
        assert first(given)["train/token_accuracy"] == pytest.approx(right, abs=1e-4)


def test_micro_batches_change_nothing(config, context):
    """Answers differ in length, so a mean of means would differ. The last batch of an epoch is a small one."""
    found = {}
    for micro in (8, 2):
        given = context(f"micro{micro}")
        sft.run(config(steps=4, lr=1e-3, micro=micro, rows=21, batch=8), given)
        found[micro] = (
            load_file(given.folder.path / WEIGHTS),
            [line["train/loss"] for line in read_metrics(given.folder.path / "metrics.jsonl")],
        )
    (one, losses), (other, other_losses) = found.values()
    assert losses == pytest.approx(other_losses, abs=1e-4)
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=1e-4), name
    assert max(float(v.abs().max()) for k, v in one.items() if "lora_B" in k) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns_and_says_so(config, context, base, bf16_base, dtype):
    given = context(on=base if dtype == "float32" else bf16_base)
    result = sft.run(config(steps=12, lr=1e-2, schedule="linear"), given)
    metrics = read_metrics(given.folder.path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 0.5
    rates = [line["optim/lr"] for line in metrics]
    assert rates[0] == pytest.approx(1e-2)
    assert rates[6] == pytest.approx(5e-3)
    assert result["train/loss"] == pytest.approx(sum(line["train/loss"] for line in metrics) / 12, abs=1e-3)
    assert result["data/rows"] == 16
    samples = list(read_lines(given.folder.path / "samples.jsonl"))
    assert len(samples) == 4
    assert set(samples[0]) == {"step", "prompt", "response"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_base_is_as_before(base, config, context, fingerprint, unchanged, dropout):
    before = fingerprint(base)
    given = context()
    sft.run(config(steps=2, lr=1e-2, dropout=dropout, micro=4), given)
    unchanged(base, before)


def test_the_base_is_as_before_when_it_fails(base, config, context, fingerprint, unchanged, monkeypatch):
    before = fingerprint(base)
    monkeypatch.setattr(sft, "samples", lambda *_: 1 / 0)
    given = context()
    with pytest.raises(ZeroDivisionError):
        sft.run(config(steps=1), given)
    unchanged(base, before)
    assert not (given.folder.path / "adapter").exists()


def test_in_bfloat16_the_base_is_as_before(bf16_base, config, context, fingerprint, unchanged):
    before = fingerprint(bf16_base)
    given = context(on=bf16_base)
    sft.run(config(steps=2, lr=1e-3), given)
    unchanged(bf16_base, before)
    assert {v.dtype for v in load_file(given.folder.path / WEIGHTS).values()} == {torch.float32}


@pytest.fixture
def own_base():
    """A base that the test may change."""
    from rlhf_exp.model.base import load_base

    return load_base(tiny(), "cpu")


def test_full_training_takes_adamws_step_with_all_weights(base, own_base, config, context):
    """Against a step of our own: full logits, mean over response tokens, clipped norm, torch's AdamW."""
    from copy import deepcopy

    from transformers import AutoModelForCausalLM

    run = config(lr=1e-3, rows=8, batch=8)
    run.lora.full = True
    given = context(on=own_base)
    result = sft.run(run, given)
    trained = AutoModelForCausalLM.from_pretrained(given.folder.path / "model", dtype="auto")

    model = deepcopy(base.model).requires_grad_(True)
    losses = []
    for row in load_view(run.dataset, "demonstrations", "train"):
        prompt, response = (
            base.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row.prompt, f" {row.response}")
        )
        prompt, response = prompt[-24:], [*response, base.eos_id][:LONGEST]
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        losses.append(-logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    loss = torch.cat(losses).mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    assert result["train/loss"] == pytest.approx(float(loss), abs=2e-4)
    expected, before = model.state_dict(), base.model.state_dict()
    for name, value in trained.state_dict().items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name
        assert torch.allclose(value, expected[name], atol=2e-5), name
    assert not (given.folder.path / "adapter").exists()
    assert not any(p.requires_grad for p in own_base.model.parameters())
