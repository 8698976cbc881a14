"""SFT: TRL's loss against our own from full logits; micro-batches; the base afterwards."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rlhf_exp.data.load import load_view
from rlhf_exp.schema import Lora, Optim, Train
from rlhf_exp.stages import sft
from rlhf_exp.tracking import read_lines, read_metrics

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
