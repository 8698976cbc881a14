"""The reward model, read back with PEFT and safetensors alone: scores, accuracy, interval, centring."""

from __future__ import annotations

import json
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest

from rlhf_exp.data.load import load_view
from rlhf_exp.schema import Optim, Reward, Train
from rlhf_exp.stages import reward
from rlhf_exp.tracking import read_lines, read_metrics

HEAD = "head/head.safetensors"
WEIGHTS = "adapter/adapter_model.safetensors"
LONGEST = 36  # about half of the answers end within it


@pytest.fixture
def config(run_config):
    def make(steps=1, lr=1e-9, micro=8, rows=24, batch=24, center=True, **options):
        return run_config(
            "reward",
            dataset={"limit": rows, "validation_share": 0.15, "max_response_tokens": LONGEST},
            train=Train(steps=steps, batch_size=batch, micro_batch_size=micro),
            optim=Optim(lr=lr, schedule="constant"),
            reward=Reward(center=center, **options),
        )

    return make


def oracle(base, folder, rows) -> SimpleNamespace:
    """Scores of chosen and rejected: PEFT's own model, one sequence at a time, the head's file, the last token."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    head = load_file(folder / HEAD)

    def score(prompt: str, response: str) -> float:
        ids, answer = (
            base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {response}")
        )
        ids = ids[-24:] + [*answer, base.eos_id][:LONGEST]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return float(hidden[0, -1] @ head["weight"] + head["bias"])

    return SimpleNamespace(
        chosen=torch.tensor([score(row.prompt, row.chosen) for row in rows]),
        rejected=torch.tensor([score(row.prompt, row.rejected) for row in rows]),
    )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A reward model after a few steps, its metrics, and its training and validation pairs."""
    from rlhf_exp.schema import Dataset, Lora, Model, RewardRun, Views
    from rlhf_exp.stages.context import Context
    from rlhf_exp.store.runs import RunFolder
    from rlhf_exp.tracking import NullTracker

    folder = RunFolder(tmp_path_factory.mktemp("reward") / "run", "reward", "0" * 64)
    folder.start({})
    config = RewardRun(
        stage="reward",
        model=Model(name="tiny", source="builtin", lora_targets=["q_proj", "v_proj", "down_proj"]),
        lora=Lora(r=4, alpha=8.0),
        dataset=Dataset(
            name="reviews",
            family="reviews",
            views=Views(*["builtin:reviews"] * 3),
            max_prompt_tokens=24,
            max_response_tokens=LONGEST,
            validation_share=0.15,
            limit=24,
        ),
        train=Train(steps=6, batch_size=8, micro_batch_size=8),
        optim=Optim(lr=2e-3, schedule="constant"),
    )
    metrics = reward.run(config, Context(base, folder, NullTracker(), {}))
    rows = {split: load_view(config.dataset, "comparisons", split) for split in ("train", "validation")}
    return SimpleNamespace(path=folder.path, metrics=metrics, rows=rows)


def test_the_chosen_answers_of_the_training_score_zero_on_average(base, trained):
    scores = oracle(base, trained.path, trained.rows["train"])
    assert len(scores.chosen) == 24
    assert abs(float(scores.chosen.mean())) < 1e-5
    assert float(scores.chosen.std()) > 1e-3
    assert abs(float(scores.rejected.mean())) > 1e-3


def test_what_is_reported_of_the_validation_pairs(base, trained):
    rows, metrics = trained.rows["validation"], trained.metrics
    scores = oracle(base, trained.path, rows)
    right = int((scores.chosen > scores.rejected).sum())
    assert metrics["validation/pairs"] == len(rows) > 20
    assert metrics["validation/accuracy"] == pytest.approx(right / len(rows))
    interval = binomtest(right, len(rows)).proportion_ci(0.95, method="wilson")
    assert metrics["validation/accuracy_low"] == pytest.approx(interval.low, abs=1e-6)
    assert metrics["validation/accuracy_high"] == pytest.approx(interval.high, abs=1e-6)
    margin = scores.chosen - scores.rejected
    assert metrics["validation/loss"] == pytest.approx(float((1 + (-margin).exp()).log().mean()), abs=1e-5)
    assert metrics["validation/margin"] == pytest.approx(float(margin.mean()), abs=1e-5)


def test_the_length_baseline_from_the_file(trained):
    """In the reviews the upbeat answer is the chosen one."""
    text = (files("rlhf_exp.data") / "reviews.jsonl").read_text()
    pairs = {row["opening"]: row for row in map(json.loads, text.splitlines())}
    won = 0.0
    for row in trained.rows["validation"]:
        up, down = (len(pairs[row.prompt][side]) for side in ("upbeat", "downbeat"))
        won += (up > down) + (up == down) / 2
    assert trained.metrics["validation/length_accuracy"] == pytest.approx(
        won / len(trained.rows["validation"])
    )


def test_the_pairs_that_it_gets_most_wrong(base, trained):
    samples = list(read_lines(trained.path / "samples.jsonl"))
    margins = [row["chosen_score"] - row["rejected_score"] for row in samples]
    assert margins == sorted(margins)
    scores = oracle(base, trained.path, trained.rows["validation"])
    assert margins == pytest.approx(sorted((scores.chosen - scores.rejected).tolist())[:8], abs=1e-5)


@pytest.mark.parametrize("micro", [24, 6])
def test_the_first_loss_is_bradley_terrys(base, config, context, micro):
    """At a learning rate of nearly 0 what is saved is what the first loss was computed with."""
    run, given = config(micro=micro), context()
    reward.run(run, given)
    scores = oracle(base, given.folder.path, load_view(run.dataset, "comparisons", "train"))
    margin = scores.chosen - scores.rejected
    logged = read_metrics(given.folder.path / "metrics.jsonl")[0]
    assert logged["train/loss"] == pytest.approx(float((1 + (-margin).exp()).log().mean()), abs=1e-4)
    assert logged["train/accuracy"] == pytest.approx(float((margin > 0).float().mean()), abs=1e-4)


def test_micro_batches_change_nothing(config, context):
    """Also in the last batch of an epoch, of five pairs here, which micro-batches of two do not divide."""
    found = {}
    for micro in (8, 2):
        given = context(f"micro{micro}")
        reward.run(config(steps=4, lr=1e-3, micro=micro, rows=13, batch=8), given)
        lines = read_metrics(given.folder.path / "metrics.jsonl")
        found[micro] = (
            load_file(given.folder.path / WEIGHTS) | load_file(given.folder.path / HEAD),
            [line["train/loss"] for line in lines],
            [line["train/accuracy"] for line in lines],
        )
    (one, losses, accuracies), (other, other_losses, other_accuracies) = found.values()
    assert losses == pytest.approx(other_losses, abs=2e-4)
    assert accuracies == pytest.approx(other_accuracies, abs=1e-4)
    for name, value in one.items():
        assert torch.allclose(value, other[name], atol=2e-4), name


def test_it_learns(config, context):
    given = context()
    reward.run(config(steps=15, lr=1e-2), given)
    metrics = read_metrics(given.folder.path / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 16))
    assert metrics[-1]["train/loss"] < 0.5 * metrics[0]["train/loss"]
    assert metrics[-1]["train/accuracy"] > 0.9


def test_without_centring_the_bias_stays(base, config, context):
    """Differences say nothing of it, so it has no gradient."""
    given = context()
    run = config(steps=2, lr=1e-2, center=False)
    reward.run(run, given)
    assert abs(float(load_file(given.folder.path / HEAD)["bias"])) < 1e-6
    scores = oracle(base, given.folder.path, load_view(run.dataset, "comparisons", "train"))
    assert abs(float(scores.chosen.mean())) > 1e-2


def test_the_head_starts_as_published(config, context):
    """N(0, 1 / (d + 1)) with d = 64, not zero (Stiennon et al. 2020)."""
    given = context()
    reward.run(config(), given)
    weight = load_file(given.folder.path / HEAD)["weight"]
    assert weight.shape == (64,)
    assert 0.7 < float(weight.std()) * 65**0.5 < 1.3


def test_the_base_is_as_before(base, bf16_base, config, context, fingerprint, unchanged):
    for number, which in enumerate((base, bf16_base)):
        before = fingerprint(which)
        reward.run(config(steps=2, lr=1e-2), context(f"run{number}", on=which))
        unchanged(which, before)


# ---------------------------------------------------------------- other losses


def token_scorer(base, folder):
    """Prompt and response -> ids, and the score after each: PEFT's own model, nothing is padded."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    head = load_file(folder / HEAD)

    def scores(prompt: str, response: str) -> tuple[list[int], torch.Tensor]:
        ids, answer = (
            base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {response}")
        )
        ids = ids[-24:] + [*answer, base.eos_id][:LONGEST]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return ids, hidden[0] @ head["weight"] + head["bias"]

    return scores


def plain_losses(base, folder, rows, loss="last_token", label_smoothing=0.0, center_coef=0.0) -> float:
    """The mean loss of some pairs by the definitions, one pair at a time."""
    total, scores = 0.0, token_scorer(base, folder)
    for row in rows:
        (ids, c), (others, r) = (scores(row.prompt, text) for text in (row.chosen, row.rejected))
        places = [max(len(ids), len(others)) - 1]
        if loss == "token_wise":
            first = next(t for t in range(max(len(ids), len(others))) if ids[t : t + 1] != others[t : t + 1])
            places = range(first, max(len(ids), len(others)))
        margins = torch.stack([c[min(t, len(c) - 1)] - r[min(t, len(r) - 1)] for t in places])
        right, wrong = (1 + (-margins).exp()).log().mean(), (1 + margins.exp()).log().mean()
        total += float((1 - label_smoothing) * right + label_smoothing * wrong)
        total += center_coef * float(c[-1] + r[-1]) ** 2
    return total / len(rows)


@pytest.mark.parametrize("micro", [8, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "token_wise"},
        {"label_smoothing": 0.2},
        {"center_coef": 0.3},
        {"loss": "token_wise", "label_smoothing": 0.1, "center_coef": 0.01},
    ],
    ids=lambda options: "-".join(options),
)
def test_the_first_loss_of_every_kind_by_its_definition(base, config, context, options, micro):
    run, given = config(micro=micro, rows=8, batch=8, center=False, **options), context()
    reward.run(run, given)
    rows = load_view(run.dataset, "comparisons", "train")
    expected = plain_losses(base, given.folder.path, rows, **options)
    plain = plain_losses(base, given.folder.path, rows)
    logged = read_metrics(given.folder.path / "metrics.jsonl")[0]
    assert logged["train/loss"] == pytest.approx(expected, abs=1e-4)
    assert abs(expected - plain) > 1e-3  # the option is in play
    scores = oracle(base, given.folder.path, rows)
    right = float((scores.chosen > scores.rejected).float().mean())
    assert logged["train/accuracy"] == pytest.approx(right, abs=1e-4)


def test_token_wise_training_learns_the_last_tokens_too(config, context):
    given = context()
    reward.run(config(steps=15, lr=1e-2, loss="token_wise"), given)
    metrics = read_metrics(given.folder.path / "metrics.jsonl")
    assert metrics[-1]["train/loss"] < 0.7 * metrics[0]["train/loss"]
    assert metrics[-1]["train/accuracy"] > 0.9  # of the scores at the last tokens


def test_the_centring_term_moves_the_bias(base, config, context):
    """Without the shift at the end: the mean of a pair's scores goes to 0 by itself."""
    means = {}
    for name, coef in (("off", 0.0), ("on", 1.0)):
        given = context(name)
        run = config(steps=15, lr=2e-2, rows=8, batch=8, center=False, center_coef=coef)
        reward.run(run, given)
        scores = oracle(base, given.folder.path, load_view(run.dataset, "comparisons", "train"))
        means[name] = float((scores.chosen + scores.rejected).square().mean())
    assert means["on"] < 0.2 * means["off"]
