"""dpo and kto: losses by hand, whose log-probs they are, TRL's own training as oracle, what is left behind."""

from __future__ import annotations

import math
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_exp.data.load import load_view
from rlhf_exp.data.pairs import Pair, pairs_of
from rlhf_exp.data.tokenised import tokenised
from rlhf_exp.errors import InputError, Interrupted
from rlhf_exp.model.base import load_base
from rlhf_exp.model.roles import Roles
from rlhf_exp.schema import DPO, KTO, Lora, Optim, Train
from rlhf_exp.stages import checkpoint, direct, supervised
from rlhf_exp.tracking import read_lines, read_metrics
from tests.stages.conftest import tiny

WEIGHTS = "adapter/adapter_model.safetensors"
PROMPT, LONGEST = 24, 30
ALGORITHMS = {
    "dpo": {"dpo": DPO()},
    "cdpo": {"dpo": DPO(label_smoothing=0.2)},
    "ipo": {"dpo": DPO(loss="ipo")},
    "kto": {"kto": KTO()},
}


@pytest.fixture
def config(run_config):
    """DPORun or KTORun of a few steps; name: of ALGORITHMS."""

    def make(name="dpo", steps=1, lr=1e-9, micro=16, rows=16, batch=16, schedule="constant", **values):
        return run_config(
            "kto" if name == "kto" else "dpo",
            dataset={"limit": rows, "max_response_tokens": LONGEST},
            train=Train(steps=steps, batch_size=batch, micro_batch_size=micro),
            optim=Optim(lr=lr, schedule=schedule),
            **{**ALGORITHMS[name], **values},
        )

    return make


def lines(context) -> list[dict[str, float]]:
    return read_metrics(context.folder.path / "metrics.jsonl")


@contextmanager
def trainer_on(base, adapters, run, pairs):
    """The stage's trainer of the adapter `other` against `sft`, not yet training."""
    from rlhf_exp.stages.direct_trainer import build

    with (
        Roles(base) as roles,
        supervised.as_before(base),
        supervised.trainer_arguments(run, base, 1) as arguments,
    ):
        arguments["per_device_train_batch_size"] = run.train.batch_size
        roles.load("policy", adapters["other"], trainable=True)
        roles.load("ref", adapters["sft"])
        with roles.use("policy"):
            trainer = build(run, arguments, roles, "ref", pairs)
            base.model.training = True
            yield trainer


# ---------------------------------------------------------------- losses by hand

# prompt, then tokens of the chosen and of the rejected answer
TWO = [Pair([11, 12], [21, 22], [31]), Pair([13], [23], [32, 33, 34])]
# log-probs of the answers' tokens: policy and reference, chosen then rejected
CHOSEN = {"policy": [[-1.0, -0.5], [-2.0]], "ref": [[-1.2, -0.8], [-1.6]]}  # log-ratios 0.5, -0.4
REJECTED = {"policy": [[-3.0], [-1.0, -1.5, -1.7]], "ref": [[-2.5], [-1.0, -1.5, -1.5]]}  # -0.5, -0.2


def speaker(who: str):
    """A model whose log-probs are those above, where TRL asks for one at all."""

    def model(input_ids, labels, **_):
        rows = []
        for ids in input_ids.tolist():
            pair = next(i for i, pair in enumerate(TWO) if ids[: len(pair.prompt)] == pair.prompt)
            answers = CHOSEN if ids[len(TWO[pair].prompt)] == TWO[pair].chosen[0] else REJECTED
            values = answers[who][pair]
            row = [0.0] * (len(TWO[pair].prompt) - 1) + values
            rows.append(row + [0.0] * (input_ids.shape[1] - 1 - len(row)))
        found = torch.tensor(rows)
        assert torch.equal(labels[:, 1:] != -100, found != 0)  # an answer's tokens and no others
        return SimpleNamespace(
            log_probs=found,
            entropy=torch.zeros_like(found),
            mean_logits=torch.zeros_like(found),
            is_top1=torch.zeros_like(found, dtype=torch.bool),
        )

    return model


def loss_of(trainer) -> float:
    (batch,) = (batch for _, batch in trainer.batches([0, 1]))
    trainer.ref_model = speaker("ref")
    return float(trainer.compute_loss(speaker("policy"), batch))


def test_sigmoid_by_hand(base, adapters, config):
    """Rafailov et al. 2023, eq. 7: log-ratios' differences are 0.5 + 0.5 and -0.4 + 0.2."""
    with trainer_on(base, adapters, config(dpo=DPO(beta=0.5)), TWO) as trainer:
        expected = (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.1))) / 2
        assert expected == pytest.approx(0.609237, abs=1e-6)
        assert loss_of(trainer) == pytest.approx(expected, abs=1e-6)


def test_cdpo_by_hand(base, adapters, config):
    """Mitchell 2023, eq. 3: (1 - e) times the loss, e times that of the swapped pair."""
    with trainer_on(base, adapters, config(dpo=DPO(beta=0.5, label_smoothing=0.2)), TWO) as trainer:
        first = 0.8 * math.log(1 + math.exp(-0.5)) + 0.2 * math.log(1 + math.exp(0.5))
        second = 0.8 * math.log(1 + math.exp(0.1)) + 0.2 * math.log(1 + math.exp(-0.1))
        assert (first + second) / 2 == pytest.approx(0.649237, abs=1e-6)
        assert loss_of(trainer) == pytest.approx((first + second) / 2, abs=1e-6)


def test_ipo_by_hand(base, adapters, config):
    """Azar et al. 2023, eq. 17 with 1 / (2 tau) = 1, log-ratios a token: .5/2 + .5/1 and -.4/1 + .2/3."""
    with trainer_on(base, adapters, config(dpo=DPO(loss="ipo", beta=0.5)), TWO) as trainer:
        assert loss_of(trainer) == pytest.approx((0.25**2 + (4 / 3) ** 2) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "terms"),
    [
        # 1 - sigmoid(.5 (r - .1)) of the chosen, 1 - sigmoid(.5 (.1 - r)) of the rejected
        ([0.4, -0.2, 0.0, 0.2], (0.450166, 0.562177, 0.425557, 0.462570)),
        # the estimate is -0.1: a KL is not below 0
        ([-0.4, 0.2, 0.0, -0.2], (0.437823, 0.549834, 0.437823, 0.475021)),
    ],
)
def test_kto_by_hand(base, adapters, config, kl, terms):
    """Ethayarajh et al. 2024, L_KTO: lambda_y - v, with the desirable answers counted twice."""
    run = config("kto", kto=KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=1.0))
    with trainer_on(base, adapters, run, TWO) as trainer:
        (batch,) = (batch for _, batch in trainer.batches([0, 1]))
        trainer.ref_model = speaker("ref")
        trainer._kl = {False: torch.tensor(kl) - 1.0, True: torch.full((4,), -1.0)}
        loss = float(trainer.compute_loss(speaker("policy"), batch))
        assert loss == pytest.approx((2 * terms[0] + 2 * terms[1] + terms[2] + terms[3]) / 4, abs=1e-5)


# ---------------------------------------------------------------- what TRL is given


def test_batches_are_our_tokens_and_their_masks_the_answers(base, adapters, config):
    """PAD is EOS here: masks come from lengths, and an answer's EOS counts."""
    assert base.pad_id == base.eos_id
    pairs = [Pair([5, 6, 7], [8, base.eos_id], [9, 10, 11, base.eos_id]), Pair([12], [13], [base.eos_id])]
    with trainer_on(base, adapters, config(micro=1), pairs) as trainer:
        seen = []
        for count, batch in trainer.batches([0, 1]):
            assert count == 1
            for ids, real, counts in zip(*(batch[name].tolist() for name in batch), strict=True):
                whole = [token for token, inside in zip(ids, real, strict=True) if inside]
                seen.append((whole, [token for token, inside in zip(ids, counts, strict=True) if inside]))
    expected = [(p.prompt + answer, answer) for p in pairs for answer in (p.chosen, p.rejected)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("micro", [1, 3])
def test_ktos_other_answers_follow_other_prompts(base, adapters, config, micro):
    """Each answer of the step stands once after its own prompt and once after another one's, however it is cut."""
    pairs = [Pair([i], [10 + i, 20 + i], [30 + i]) for i in range(1, 6)]
    with trainer_on(base, adapters, config("kto", micro=micro), pairs) as trainer:
        batches = trainer.batches([3, 0, 4])
        assert sum(count for count, _ in batches) == 3
        own, moved, labels = [], [], []
        for _, batch in batches:
            lengths = batch["attention_mask"].sum(1).tolist()
            own += [tuple(ids[:n]) for ids, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
            lengths = batch["KL_attention_mask"].sum(1).tolist()
            moved += [tuple(ids[:n]) for ids, n in zip(batch["KL_input_ids"].tolist(), lengths, strict=True)]
            labels += batch["label"].tolist()
        good = {(4, 14, 24), (1, 11, 21), (5, 15, 25)}
        bad = {(4, 34), (1, 31), (5, 35)}
        assert {row for row, label in zip(own, labels, strict=True) if label} == good
        assert {row for row, label in zip(own, labels, strict=True) if not label} == bad
        assert not set(moved) & (good | bad)
        assert sorted(row[0] for row in moved) == [1, 1, 4, 4, 5, 5]
        assert sorted(row[1:] for row in moved) == sorted(row[1:] for row in good | bad)
        # the last batch of an epoch may be one pair: it borrows the answers of the next
        ((_, alone),) = trainer.batches([4])
        assert [row[:n] for row, n in zip(alone["KL_input_ids"].tolist(), (3, 2), strict=True)] == [
            [5, 11, 21],
            [5, 31],
        ]


def test_a_quantised_bases_adapters_stay_float32(base, adapters, config, monkeypatch):
    monkeypatch.setattr(base.model, "is_loaded_in_4bit", True, raising=False)
    with trainer_on(base, adapters, config(), TWO) as trainer:
        assert trainer.model.is_loaded_in_4bit
        trained = [p for p in base.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        stored = load_file(adapters["other"] / "adapter_model.safetensors")
        assert sum(float(p.detach().double().sum()) for p in trained) == pytest.approx(
            sum(float(value.double().sum()) for value in stored.values()), abs=1e-9
        )


# ---------------------------------------------------------------- policy and reference


def plain_logprobs(base, adapter: Path | None, rows, field: str) -> torch.Tensor:
    """log p of each answer, EOS included, by plain transformers and PEFT: one row at a time, full logits."""
    from peft import PeftModel

    model = load_base(tiny(), "cpu").model
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    found = []
    for row in rows:
        prompt, response = (
            base.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (row.prompt, f" {getattr(row, field)}")
        )
        prompt, response = prompt[-PROMPT:], [*response, base.eos_id][:LONGEST]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(found).double()


@pytest.mark.parametrize(
    ("name", "sft"), [("dpo", "sft"), ("cdpo", "dropout"), ("dpo", None), ("kto", "dropout")]
)
def test_it_starts_as_the_reference_does(base, adapters, config, context, name, sft):
    """Margins are exactly 0 and the loss log 2 (KTO: one half); dropout, which would show, is off."""
    given = context(**({"sft": adapters[sft]} if sft else {}))
    run = config(name, micro=4)
    direct.run(run, given)
    (first,) = lines(given)
    assert first["train/loss"] == pytest.approx(0.5 if name == "kto" else math.log(2), abs=1e-6)
    assert first["rewards/margins"] == first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    rows = load_view(run.dataset, "comparisons", "train")
    assert len(rows) == 16
    for field in ("chosen", "rejected"):
        expected = plain_logprobs(base, adapters[sft] if sft else None, rows, field)
        assert first[f"logps/{field}"] == pytest.approx(float(expected.mean()), abs=1e-3)
    if name == "kto":
        assert first["train/kl"] == 0.0


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_implicit_rewards_are_against_the_sft_adapter(base, adapters, config, context, name):
    """The held-out margins after training, from the published adapter and SFT's in plain transformers."""
    beta = {"dpo": DPO(beta=0.3), "kto": KTO(beta=0.3)}[name]
    run = config(name, steps=3, lr=1e-2, rows=32, **{name: beta})
    given = context(sft=adapters["sft"])
    found = direct.run(run, given)
    rows = load_view(run.dataset, "comparisons", "validation")
    after, before, plain = (
        plain_logprobs(base, folder, rows, "chosen") - plain_logprobs(base, folder, rows, "rejected")
        for folder in (given.folder.path / "adapter", adapters["sft"], None)
    )
    margins = 0.3 * (after - before)
    assert found["validation/margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert found["validation/accuracy"] == pytest.approx(float((margins > 0).double().mean()), abs=1e-6)
    assert found["validation/pairs"] == len(rows)
    assert found["validation/accuracy_low"] < found["validation/accuracy"] < found["validation/accuracy_high"]
    # against the bare base it would be another number
    assert abs(float((0.3 * (after - plain)).mean()) - found["validation/margin"]) > 1e-2


def test_the_reference_is_the_sft_adapter_whatever_the_policy_is(base, adapters, config, tmp_path):
    """The policy is another adapter here; a changed SFT adapter changes the reference's log-probs alone."""
    changed = tmp_path / "changed"
    shutil.copytree(adapters["sft"], changed)
    stored = load_file(changed / "adapter_model.safetensors")
    save_file({name: value * 1.5 for name, value in stored.items()}, changed / "adapter_model.safetensors")
    run = config(rows=6)
    rows = load_view(run.dataset, "comparisons", "train")
    pairs = pairs_of(tokenised(base.tokenizer, base.tokenizer_key, run.dataset, "comparisons", "train"))
    found = []
    for sft in (adapters["sft"], changed):
        with trainer_on(base, adapters | {"sft": sft}, run, pairs) as trainer:
            ((_, batch),) = trainer.batches(list(range(len(pairs))))
            order = trainer.parts(range(len(pairs)))[0]
            for model, adapter in ((trainer.model, adapters["other"]), (trainer.ref_model, sft)):
                for values, field in zip(
                    trainer.compute_ref_log_probs(model, batch), ("chosen", "rejected"), strict=True
                ):
                    expected = plain_logprobs(base, adapter, [rows[i] for i in order], field)
                    assert values.double() == pytest.approx(expected, abs=1e-3)
                    found.append(values)
    policy, reference, same_policy, other_reference = found[0], found[2], found[4], found[6]
    assert torch.equal(policy, same_policy)
    assert (reference - other_reference).abs().max() > 1
    assert (reference - policy).abs().max() > 1


# ---------------------------------------------------------------- TRL's own training


def by_trl(trainer, settings, base, adapter, run, columns, folder, **options) -> dict[str, torch.Tensor]:
    """The adapter after three steps of TRL's own `train()` on a PeftModel; columns: token ids, named as TRL does."""
    from peft import PeftModel

    class Plain(trainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    arguments = settings(
        output_dir=str(folder / "trl"),
        max_steps=3,
        learning_rate=1e-2,
        adam_epsilon=run.optim.eps,
        max_grad_norm=1.0,
        weight_decay=0.0,
        seed=run.seed,
        data_seed=run.seed,
        max_length=None,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    theirs = Plain(
        model=PeftModel.from_pretrained(load_base(tiny(), "cpu").model, adapter, is_trainable=True),
        args=arguments,
        train_dataset=supervised.dataset_of(**columns),
        processing_class=base.tokenizer,
    )
    supervised.without_printing(theirs)
    theirs.train()
    weights = theirs.model.state_dict().items()
    return {
        key.replace(".default", ""): value for key, value in weights if "lora_" in key and ".ref." not in key
    }


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_three_steps_are_those_of_trl(base, adapters, config, context, name, tmp_path):
    """DPOTrainer.train() with its own copy of the SFT adapter, batches and reference its own."""
    from trl import DPOConfig, DPOTrainer

    run = config(name, steps=3, lr=1e-2, rows=12, batch=6, schedule="linear")
    given = context(sft=adapters["sft"])
    direct.run(run, given)
    ours = load_file(given.folder.path / WEIGHTS)

    pairs = pairs_of(tokenised(base.tokenizer, base.tokenizer_key, run.dataset, "comparisons", "train"))
    columns = {
        f"{part}_ids": [getattr(pair, part) for pair in pairs] for part in ("prompt", "chosen", "rejected")
    }
    settings = {"loss_type": [run.dpo.loss], "beta": run.dpo.beta, "lr_scheduler_type": "linear"}
    settings["per_device_train_batch_size"] = 6
    expected = by_trl(DPOTrainer, DPOConfig, base, adapters["sft"], run, columns, tmp_path, **settings)
    assert set(expected) == set(ours)
    start = load_file(adapters["sft"] / "adapter_model.safetensors")
    for key, value in expected.items():
        assert torch.allclose(ours[key], value, atol=1e-5, rtol=0), key
    assert max(float((ours[key] - start[key]).abs().max()) for key in ours) > 1e-3


def test_three_steps_of_kto_are_those_of_trl(base, adapters, config, context, tmp_path):
    """KTOTrainer.train() in the order that our steps had, with the KL's answers that its own rotation gives."""
    from trl import KTOConfig, KTOTrainer

    run = config("kto", steps=3, lr=1e-2, rows=12, batch=6, kto=KTO(desirable_weight=4.0))
    given = context(sft=adapters["sft"])
    from rlhf_exp.stages import direct_trainer

    steps: list[list[int]] = []
    original = direct_trainer.KTOSteps.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            direct_trainer.KTOSteps, "batches", lambda self, rows: steps.append(rows) or original(self, rows)
        )
        direct.run(run, given)
    ours = load_file(given.folder.path / WEIGHTS)
    assert [len(rows) for rows in steps] == [6, 6, 6]
    assert max(line["train/kl"] for line in lines(given)) > 0.1
    assert sorted(steps[0] + steps[1]) == list(range(12))
    assert steps[0] != sorted(steps[0])  # shuffled

    pairs = pairs_of(tokenised(base.tokenizer, base.tokenizer_key, run.dataset, "comparisons", "train"))
    columns = {"prompt_ids": [], "completion_ids": [], "KL_completion_ids": [], "label": []}
    for rows in steps:
        answers = [pairs[i].chosen for i in rows] + [pairs[i].rejected for i in rows]
        columns["prompt_ids"] += [pairs[i].prompt for i in rows] * 2
        columns["completion_ids"] += answers
        columns["KL_completion_ids"] += [answers[-1], *answers[:-1]]
        columns["label"] += [True] * 6 + [False] * 6
    settings = {"beta": run.kto.beta, "desirable_weight": 4.0, "lr_scheduler_type": "constant"}
    settings["per_device_train_batch_size"] = 12
    expected = by_trl(KTOTrainer, KTOConfig, base, adapters["sft"], run, columns, tmp_path, **settings)
    assert set(expected) == set(ours)
    for key, value in expected.items():
        assert torch.allclose(ours[key], value, atol=1e-5, rtol=0), key


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["ipo", "kto"])
def test_micro_batches_change_nothing(adapters, config, context, name):
    """Answers differ in length, the last batch of an epoch is a small one, and KTO's KL is that of the step."""
    found = {}
    for micro in (8, 3, 1):
        given = context(f"micro{micro}", sft=adapters["sft"])
        run = config(name, steps=4, lr=1e-3, rows=21, batch=8)
        run.train.micro_batch_size = micro
        if name == "kto":  # all answers become likelier, so that the KL is above 0
            run = replace(run, kto=KTO(desirable_weight=4.0))
        direct.run(run, given)
        found[micro] = load_file(given.folder.path / WEIGHTS), lines(given)
    (one, metrics), *others = found.values()
    for other, other_metrics in others:
        for line, other_line in zip(metrics, other_metrics, strict=True):
            assert line == pytest.approx(other_line, abs=2e-4, rel=1e-4)
        for key, value in one.items():
            assert torch.allclose(value, other[key], atol=1e-4), key
    if name == "kto":
        assert metrics[-1]["train/kl"] > 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in ALGORITHMS), ("dpo", "bfloat16"), ("kto", "bfloat16")],
)
def test_it_learns_and_says_so(adapters, config, context, base, bf16_base, name, dtype):
    given = context(on=base if dtype == "float32" else bf16_base, sft=adapters["sft"])
    result = direct.run(config(name, steps=10, lr=5e-3, schedule="linear"), given)
    found = lines(given)
    assert [line["step"] for line in found] == list(range(1, 11))
    first, last = found[0], found[-1]
    assert first["rewards/margins"] == 0.0
    assert last["rewards/margins"] > 0.2
    assert last["train/loss"] < first["train/loss"] * (0.98 if name == "cdpo" else 0.9)
    if name != "kto":
        assert first["rewards/accuracies"] == 0.0  # a tie is no success to TRL
        assert last["rewards/accuracies"] > 0.9
    assert last["rewards/chosen"] - last["rewards/rejected"] == pytest.approx(
        last["rewards/margins"], abs=1e-5
    )
    assert [line["optim/lr"] for line in found[:2]] == pytest.approx([5e-3, 4.5e-3])
    assert all(line["train/grad_norm"] > 0 for line in found)
    assert ("train/kl" in last) == (name == "kto")
    assert result["data/pairs"] == 16
    assert result["train/loss"] == pytest.approx(sum(line["train/loss"] for line in found) / 10, abs=1e-3)
    assert (given.folder.path / "evaluation" / "margins.png").is_file()
    samples = list(read_lines(given.folder.path / "samples.jsonl"))
    assert len(samples) == 4
    assert set(samples[0]) == {"step", "prompt", "response"}


def test_the_same_seed_gives_the_same_adapter(adapters, config, context):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        given = context(f"run{number}", sft=adapters["sft"])
        direct.run(config(steps=2, lr=1e-3, rows=24, batch=8, seed=seed), given)
        found.append((given.folder.path / WEIGHTS).read_bytes())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_an_interrupted_run_goes_on_exactly(adapters, config, context, monkeypatch, name):
    """Stopped after the second of five steps; an epoch of 20 rows ends in between. Weights and numbers are equal."""
    run = config(name, steps=5, lr=1e-3, rows=20, batch=8, schedule="linear")
    whole, stopped = (context(folder, sft=adapters["sft"]) for folder in ("whole", "stopped"))
    expected = direct.run(run, whole)
    signals = iter([None, "SIGTERM"])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.signals, "asked", lambda: next(signals))
        with pytest.raises(Interrupted, match="stopped by SIGTERM at step 2"):
            direct.run(run, stopped)
    assert not (stopped.folder.path / "adapter").exists()
    found = direct.run(run, stopped)
    assert found == expected
    assert lines(stopped) == lines(whole)
    assert [line["step"] for line in lines(whole)] == [1, 2, 3, 4, 5]
    assert (stopped.folder.path / WEIGHTS).read_bytes() == (whole.folder.path / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("name", "sft"), [("dpo", "sft"), ("dpo", None), ("kto", "dropout")])
def test_the_base_is_as_before(base, adapters, config, context, fingerprint, unchanged, name, sft):
    before = fingerprint(base)
    given = context(**({"sft": adapters[sft]} if sft else {}))
    direct.run(config(name, steps=2, lr=1e-2, micro=4), given)
    unchanged(base, before)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_base_without_pad_is_as_before_too(adapters, config, context, fingerprint, unchanged, name):
    """TRL gives tokenizer, config and generation config a PAD."""
    own = load_base(tiny(), "cpu")
    own.tokenizer.pad_token = None
    own.model.config.pad_token_id = own.model.generation_config.pad_token_id = None
    before = fingerprint(own)
    direct.run(config(name, steps=1), context(on=own, sft=adapters["sft"]))
    unchanged(own, before)


def test_in_bfloat16_the_base_is_as_before(bf16_base, adapters, config, context, fingerprint, unchanged):
    before = fingerprint(bf16_base)
    given = context(on=bf16_base, sft=adapters["sft"])
    direct.run(config(steps=2, lr=1e-3), given)
    unchanged(bf16_base, before)
    assert {v.dtype for v in load_file(given.folder.path / WEIGHTS).values()} == {torch.float32}


def test_the_base_is_as_before_when_it_fails(
    base, adapters, config, context, fingerprint, unchanged, monkeypatch
):
    before = fingerprint(base)
    monkeypatch.setattr(direct, "implicit_rewards", lambda *_: 1 / 0)
    given = context(sft=adapters["sft"])
    with pytest.raises(ZeroDivisionError):
        direct.run(config(steps=1), given)
    unchanged(base, before)
    assert not (given.folder.path / "adapter").exists()


def test_without_validation_there_is_no_accuracy(adapters, config, context):
    run = config()
    run = replace(run, dataset=replace(run.dataset, validation_share=0.0))
    found = direct.run(run, context(sft=adapters["sft"]))
    assert not any(name.startswith("validation/") for name in found)


def test_one_comparison_is_too_few(adapters, config, context):
    with pytest.raises(InputError, match="dataset reviews has 1 comparisons to train on: two at least"):
        direct.run(config("kto", rows=1), context(sft=adapters["sft"]))


def test_lora_kinds_learn_too(config, context):
    for name, lora in (("dora", Lora(r=4, dora=True)), ("rslora", Lora(r=4, rslora=True))):
        given = context(name)
        direct.run(config(steps=3, lr=5e-3, lora=lora), given)
        assert lines(given)[0]["rewards/margins"] == 0.0
        assert lines(given)[-1]["rewards/margins"] > 0.01
