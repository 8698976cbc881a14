"""The reward model, read back with PEFT and safetensors alone: scores, accuracy, interval, centring."""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest

from rlhf_exp.data.load import load_view
from rlhf_exp.errors import InputError
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


# ---------------------------------------------------------------- prompts computed once


def test_sharing_prompts_changes_nothing(config, context, capsys):
    """Losses, accuracies, weights and what is reported; in rows of one pair, or of as many as fit."""
    found = {}
    for name, options in {
        "separate": {"share_prompts": False},
        "shared": {},
        "few tokens": {"micro_batch_tokens": 90},
        "token-wise, separate": {"share_prompts": False, "loss": "token_wise"},
        "token-wise": {"loss": "token_wise"},
    }.items():
        given = context(name)
        metrics = reward.run(config(steps=3, lr=1e-3, rows=13, batch=8, **options), given)
        lines = read_metrics(given.folder.path / "metrics.jsonl")
        weights = load_file(given.folder.path / WEIGHTS) | load_file(given.folder.path / HEAD)
        found[name] = [line["train/loss"] for line in lines], weights, metrics
    assert "cannot share" not in capsys.readouterr().out
    for name, plain in (
        ("shared", "separate"),
        ("few tokens", "separate"),
        ("token-wise", "token-wise, separate"),
    ):
        (losses, weights, metrics), (others, expected, theirs) = found[name], found[plain]
        assert losses == pytest.approx(others, abs=1e-5)
        assert metrics["validation/margin"] == pytest.approx(theirs["validation/margin"], abs=1e-4)
        for tensor, value in weights.items():
            # Adam divides by the gradient's size: what is 0 but for rounding moves as far as the rate lets it
            assert torch.allclose(value, expected[tensor], atol=2e-4), tensor


def test_a_model_that_cannot_share_says_so_and_trains_the_same(config, context, capsys, monkeypatch):
    monkeypatch.setattr(reward, "cannot_share", lambda base: "its attention has softcap")
    given = context()
    reward.run(config(steps=2, lr=1e-3), given)
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot share" in line]
    assert said == [
        "prompts are computed for each answer again: this model cannot share them: its attention has softcap"
    ]
    assert len(read_metrics(given.folder.path / "metrics.jsonl")) == 2


def test_the_evaluation_is_written(base, trained):
    found = json.loads((trained.path / "evaluation" / "evaluation.json").read_text())
    scores = oracle(base, trained.path, trained.rows["validation"])
    margins = scores.chosen - scores.rejected
    assert found["pairs"] == len(margins)
    assert found["accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert found["margin"]["std"] == pytest.approx(float(margins.std(correction=0)), abs=1e-5)
    confidence = margins.abs().sigmoid()
    edges = torch.tensor([0.5 + i / 20 for i in range(11)])
    expected = 0.0
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = confidence[inside].mean() - (margins[inside] > 0).float().mean()
            expected += float(inside.float().mean() * gap.abs())
    assert found["calibration"]["ece"] == pytest.approx(expected, abs=1e-4)
    assert trained.metrics["validation/ece"] == found["calibration"]["ece"]
    assert (trained.path / "evaluation" / "margins.png").read_bytes()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- margins


@pytest.fixture
def graded(run_config, tmp_path):
    """Comparisons in a file, with a margin and a source each."""
    rows = [
        {
            "q": f"The soup number {i}",
            "a": f"was good {i}.",
            "b": "was bad.",
            "m": i % 4 / 3,
            "s": "ab"[i % 2],
        }
        for i in range(40)
    ]
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(center=False, fields=None, **options):
        from rlhf_exp.schema import Fields, Views

        named = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "m", "source": "s"} | (fields or {})
        return run_config(
            "reward",
            dataset={
                "family": "jsonl",
                "name": "graded",
                "views": Views(comparisons=str(path)),
                "fields": Fields(**named),
                "max_response_tokens": LONGEST,
                "validation_share": 0.3,
            },
            train=Train(steps=1, batch_size=64, micro_batch_size=8),
            optim=Optim(lr=1e-9, schedule="constant"),
            reward=Reward(center=center, probes=0, **options),
        )

    return make


@pytest.mark.parametrize("loss", ["last_token", "token_wise"])
def test_the_loss_with_margins_by_its_definition(base, graded, context, loss):
    run, given = graded(margin_coef=2.0, loss=loss), context()
    metrics = reward.run(run, given)
    rows = load_view(run.dataset, "comparisons", "train")
    total, scores = 0.0, token_scorer(base, given.folder.path)
    for row in rows:
        assert row.margin in (0, 1 / 3, 2 / 3, 1)
        (ids, c), (others, r) = (scores(row.prompt, text) for text in (row.chosen, row.rejected))
        end = max(len(ids), len(others))
        first = next(t for t in range(end) if ids[t : t + 1] != others[t : t + 1])
        places = range(first, end) if loss == "token_wise" else [end - 1]
        apart = torch.stack([c[min(t, len(c) - 1)] - r[min(t, len(r) - 1)] for t in places])
        total += float((1 + (2 * row.margin - apart).exp()).log().mean())
    logged = read_metrics(given.folder.path / "metrics.jsonl")[0]
    assert logged["train/loss"] == pytest.approx(total / len(rows), abs=1e-4)
    # and by source
    assert {name for name in metrics if "source" in name} == {
        "validation/source/a/accuracy",
        "validation/source/b/accuracy",
    }


def test_margins_that_are_not_there_are_asked_for_before_anything_loads(graded):
    from rlhf_exp.stages import margins

    margins.require(graded(margin_coef=1.0))
    margins.require(graded(fields={"margin": None}))
    with pytest.raises(InputError, match=r"reward.margin_coef=1 needs comparisons with margins"):
        margins.require(graded(margin_coef=1.0, fields={"margin": None}))


@pytest.mark.parametrize(
    ("field", "value", "said"), [("margin", "q", "finite number, is text"), ("margin", "z", "no field 'z'")]
)
def test_a_margin_that_is_no_number_is_a_bad_row(graded, field, value, said):
    with pytest.raises(InputError, match=said):
        load_view(graded(fields={field: value}).dataset, "comparisons", "train")


# ---------------------------------------------------------------- centring


def test_references_score_zero_on_average(base, config, context):
    given = context()
    run = config(steps=2, lr=1e-2, center_on="references")
    reward.run(run, given)
    rows = load_view(run.dataset, "demonstrations", "train")
    assert len(rows) == 24
    rows = list({row.id: row for row in reversed(rows)}.values())  # the first of each prompt
    assert len(rows) < 24
    score = token_scorer(base, given.folder.path)
    found = [float(score(row.prompt, row.response)[1][-1]) for row in rows]
    assert abs(sum(found) / len(found)) < 1e-5
    assert max(found) - min(found) > 1e-3


@pytest.mark.parametrize("on", ["references", "chosen"])
def test_a_gain_makes_the_deviation_1_and_leaves_the_order(base, config, context, on):
    """And what it divides is all of the head: bias and weight."""
    folders, scores = [], []
    for unit in (False, True):
        given = context(f"unit-{unit}")
        reward.run(config(steps=2, lr=1e-2, center_on=on, unit_std=unit), given)
        folders.append(given.folder.path)
    view = "demonstrations" if on == "references" else "comparisons"
    rows = load_view(config().dataset, view, "train")
    rows = list({row.id: row for row in reversed(rows)}.values())
    for folder in folders:
        score = token_scorer(base, folder)
        given = [(row.prompt, row.response if on == "references" else row.chosen) for row in rows]
        scores.append(torch.stack([score(*pair)[1][-1] for pair in given]).double())
    plain, scaled = scores
    assert scaled.mean().abs() < 1e-4
    assert float(scaled.std(correction=0)) == pytest.approx(1, rel=1e-4)
    assert torch.allclose(scaled, plain / plain.std(correction=0), rtol=0, atol=2e-4)


def test_scores_that_are_all_equal_cannot_be_scaled(config, context, monkeypatch):
    from rlhf_exp.stages import centring

    monkeypatch.setattr(centring, "score_sequences", lambda *more: [0.5] * len(more[3]))
    with pytest.raises(
        InputError, match=r"reward\.unit_std scales by the deviation of \d+ scores, which is 0: "
    ):
        reward.run(config(steps=1, rows=6, batch=6, unit_std=True), context())


@pytest.mark.parametrize("with_sft", [True, False])
def test_samples_of_the_sft_policy_score_zero_on_average(
    base, config, context, adapters, monkeypatch, with_sft
):
    """The answers are those of the policy that the run stands on; without one, of the base."""
    from rlhf_exp.stages import centring

    seen = []
    plain = centring.score_sequences

    def spy(roles, role, head, sequences, *more):
        seen.extend(sequences)
        return plain(roles, role, head, sequences, *more)

    monkeypatch.setattr(centring, "score_sequences", spy)
    given = context(**({"sft": adapters["sft"]} if with_sft else {}))
    run = config(steps=1, rows=6, batch=6, center_on="samples")
    reward.run(run, given)
    assert len(seen) == 6
    score = head_scores(base, given.folder.path)
    assert abs(sum(score(ids) for ids in seen) / 6) < 1e-5
    assert sampled_by(base, adapters["sft"] if with_sft else None, seen, run)


def head_scores(base, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    head = load_file(folder / HEAD)

    def score(ids):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        return float(hidden[0, -1] @ head["weight"] + head["bias"])

    return score


def sampled_by(base, adapter, sequences, run) -> bool:
    """Whether the answers are likelier under this policy than under the other (the base, or another adapter)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    prompts = {
        len(base.tokenizer(row.prompt)["input_ids"][-24:])
        for row in load_view(run.dataset, "comparisons", "train")
    }
    assert all(len(ids) > min(prompts) for ids in sequences)

    def likelihood(model) -> float:
        total = 0.0
        for ids in sequences:
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            total += float(logprobs.gather(1, torch.tensor(ids)[1:, None]).sum())
        return total

    of_base = likelihood(plain)
    if adapter is None:
        return True
    return likelihood(PeftModel.from_pretrained(plain, adapter)) > of_base


@pytest.mark.parametrize(("center_on", "total"), [("chosen", 6), ("samples", 12)])
def test_it_shows_how_far_it_is(base, config, context, capsys, center_on, total):
    """Answers scored, and before them answers sampled, four at a time: a line at the first step and at the last."""
    reward.run(config(steps=1, rows=6, batch=6, micro=2, center_on=center_on), context())
    found = capsys.readouterr().out.splitlines()
    said = [line.split() for line in found if line.startswith("center ")]
    assert (said[0][1], said[-1][1]) == (f"4/{total}", f"{total}/{total}")
    assert (said[0][-2], said[-1][-1]) == ("eta", "done")
    (trained,) = [line for line in found if line.startswith("reward ")]  # said once, and not again at its end
    assert trained.endswith("done")


def test_the_bar_of_the_training_has_ended_by_then(base, config, context, monkeypatch):
    """Two bars on one terminal would write over each other."""
    from rlhf_exp import progress
    from rlhf_exp.stages import centring

    alive, seen = [], []

    class Bar(progress.Progress):
        def __enter__(self):
            alive.append(self.stage)
            return super().__enter__()

        def __exit__(self, *given):
            if self.stage in alive:
                alive.remove(self.stage)
            super().__exit__(*given)

        def update(self, step, metrics):
            seen.append(tuple(alive))
            super().update(step, metrics)

    monkeypatch.setattr("rlhf_exp.stages.context.Progress", Bar)
    monkeypatch.setattr(centring, "Progress", Bar)
    reward.run(config(steps=1, rows=6, batch=6), context())
    assert set(seen) == {("reward",), ("center",)}


def test_samples_make_the_sft_stage_a_parent(config):
    from rlhf_exp.stages.plan import needs

    assert needs("reward", config()) == ()
    assert needs("reward", config(center_on="samples")) == ("sft",)
    assert needs("reward", config(center=False, center_on="samples")) == ()


def test_references_need_demonstrations(config):
    from rlhf_exp.schema import problems, views_of

    assert problems(config(center=False, unit_std=True)) == [
        "reward.unit_std is a part of centring, which reward.center=false turns off: set that, or leave it out"
    ]
    run = config(center_on="references")
    assert views_of(run) == ("comparisons", "demonstrations") and views_of(config()) == ("comparisons",)
    assert problems(run) == []
    run.dataset.views.demonstrations = None
    assert any("center_on=references needs dataset.views.demonstrations" in line for line in problems(run))
