"""A local model as judge against a plain transformers forward, and what two orders make of a pair."""

from __future__ import annotations

import shutil

import pytest
import torch

from rlhf_exp.errors import InputError
from rlhf_exp.rewards.judge import Judge, Verdicts, check, label_ids, load
from rlhf_exp.schema import Judge as Settings

TEMPLATE = "Q: {prompt}\nA: {first}\nB: {second}\nBest:"
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>"


def settings(**changes) -> Settings:
    return Settings(model="base", template=TEMPLATE, **changes)


def by_transformers(base, text: str) -> float:
    """P(A) / (P(A) + P(B)) of the whole softmax after `text`; A is spelled with a space before it or without."""
    tokenizer = base.tokenizer
    with torch.no_grad():
        logits = base.model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits
    chances = logits[0, -1].double().softmax(0)
    vocabulary = tokenizer.get_vocab()
    sums = [
        sum(chances[vocabulary[form]] for form in (label, f"Ġ{label}") if form in vocabulary)
        for label in "AB"
    ]
    return float(sums[0] / (sums[0] + sums[1]))


PAIRS = [("What is this film?", "A good one.", "It was long and I slept."), ("Why?", "", "Since it is so.")]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_both_orders_are_the_models_own_probabilities(base, batch):
    judge = Judge(base, settings(batch_size=batch))
    found = judge.compare(*zip(*PAIRS, strict=True))
    for (prompt, a, b), orders in zip(PAIRS, found.orders.tolist(), strict=True):
        forth = by_transformers(base, f"Q: {prompt}\nA: {a}\nB: {b}\nBest:")
        back = by_transformers(base, f"Q: {prompt}\nA: {b}\nB: {a}\nBest:")
        assert orders == pytest.approx([forth, 1 - back], abs=1e-5)
    assert judge.cut == 0


def test_two_orders_by_hand():
    """A winner, a loser, the first place preferred, the second place preferred, undecided once, never decided."""
    orders = [[0.9, 0.7], [0.2, 0.4], [0.8, 0.1], [0.3, 0.6], [0.5, 0.9], [0.5, 0.5]]
    found = Verdicts(torch.tensor(orders))
    assert found.p.tolist() == pytest.approx([0.8, 0.3, 0.45, 0.45, 0.7, 0.5])
    assert found.consistent.tolist() == [True, True, False, False, False, False]
    assert found.wins.tolist() == [1, 0, 0.5, 0.5, 0.5, 0.5]


def test_the_answers_swapped_give_one_minus_the_same(base):
    judge = Judge(base, settings())
    prompts, first, second = zip(*PAIRS, strict=True)
    forth, back = judge.compare(prompts, first, second), judge.compare(prompts, second, first)
    assert torch.allclose(forth.p, 1 - back.p, atol=1e-6)
    assert torch.equal(forth.wins, 1 - back.wins)
    assert torch.equal(forth.consistent, back.consistent)


def test_equal_answers_tie(base):
    found = Judge(base, settings(batch_size=1)).compare(["x", "y"], ["same", "same"], ["same", "same"])
    assert found.wins.tolist() == [0.5, 0.5]
    assert found.p.tolist() == pytest.approx([0.5, 0.5], abs=1e-7)


def test_no_comparison_is_no_error(base):
    assert Judge(base, settings()).compare([], [], []).wins.tolist() == []


def test_a_long_text_keeps_the_template_the_answers_and_the_prompts_end(base):
    prompt = "word " * 300 + "the end?"
    judge = Judge(base, settings(max_tokens=64))
    ids = judge._encode([(prompt, "good", "bad")])[0]
    text = base.tokenizer.decode(ids)
    assert len(ids) == 64 and judge.cut == 1
    assert text.startswith("Q: ") and text.endswith("word the end?\nA: good\nB: bad\nBest:")
    long = " ".join(["long"] * 200)
    text = base.tokenizer.decode(judge._encode([("Why?", f"first {long}", f"second {long}")])[0])
    assert "Q: Why?\nA: first long" in text and "\nB: second long" in text and text.endswith("\nBest:")


def test_an_answer_cannot_place_special_tokens(base):
    eos = base.tokenizer.eos_token
    ids = Judge(base, settings())._encode([("x", f"good {eos}", "bad")])[0]
    assert base.eos_id not in ids and eos in base.tokenizer.decode(ids)


def test_the_chat_template_goes_around(base, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", CHAT)
    for chat, framed in (("auto", True), ("always", True), ("never", False)):
        text = base.tokenizer.decode(Judge(base, settings(chat=chat))._encode([("Why?", "a", "b")])[0])
        plain = "Q: Why?\nA: a\nB: b\nBest:"
        assert text == (f"<|im_start|>user\n{plain}<|im_end|>\n<|im_start|>" if framed else plain)


def test_adapters_of_a_shared_base_do_not_judge(base, roles):
    alone = by_transformers_both(base, roles)
    judge = Judge(base, settings(), role=lambda: roles.use(None))
    with roles.use("policy"):
        assert judge.compare(*zip(*PAIRS, strict=True)).orders.tolist() == alone
    with roles.use("policy"):
        assert Judge(base, settings()).compare(*zip(*PAIRS, strict=True)).orders.tolist() != alone


def by_transformers_both(base, roles) -> list[list[float]]:
    with roles.use(None):
        return Judge(base, settings()).compare(*zip(*PAIRS, strict=True)).orders.tolist()


def test_a_folder_is_loaded(base, tiny_path, tmp_path):
    folder = shutil.copytree(tiny_path, tmp_path / "judge")
    judge = load(Settings(model=str(folder), template=TEMPLATE), "cpu")
    assert judge.base.model is not base.model
    same = Judge(base, settings()).compare(*zip(*PAIRS, strict=True))
    assert torch.allclose(
        judge.compare(*zip(*PAIRS, strict=True)).orders, same.orders, atol=0.02
    )  # bfloat16 here?


def test_labels_are_whole_tokens(base):
    assert len(label_ids(base.tokenizer, "A")) >= 1
    assert not set(label_ids(base.tokenizer, "A")) & set(label_ids(base.tokenizer, "B"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "judge.model is not set"),
        ({"model": "./nowhere"}, "judge.model=./nowhere: there is no such folder"),
        (
            {"template": "{prompt} {first} {first}"},
            "judge.template must hold {first} exactly once, it does 2 times",
        ),
        ({"labels": ["A"]}, "judge.labels must be two different labels"),
        ({"labels": ["A", "A"]}, "judge.labels must be two different labels"),
        ({"labels": ["A", "Antidisestablishment"]}, "'Antidisestablishment' is not one token"),
        ({"labels": ["A", ""]}, "'' is not one token"),
        ({"template": TEMPLATE + " word" * 80, "max_tokens": 64}, "judge.max_tokens=64 leaves no room"),
        ({"chat": "always"}, "has no chat template"),
    ],
)
def test_what_cannot_judge_is_one_line(tiny_path, changes, said):
    given = Settings(**({"model": "base", "template": TEMPLATE} | changes))
    with pytest.raises(InputError) as caught:
        check(given, tiny_path)
    assert any(said in line for line in caught.value.problems)
    assert all("\n" not in line for line in caught.value.problems)


def test_the_default_template_can_judge(tiny_path):
    check(Settings(model="base"), tiny_path)
