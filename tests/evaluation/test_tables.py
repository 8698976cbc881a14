"""Tables in a terminal and in a log."""

from __future__ import annotations

import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from rlhf_exp.evaluation.tables import line_of, samples_table, summary_table


def shown(table, width: int = 80, **options) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(table)
    return stream.getvalue().splitlines()


def row(lines: list[str], name: str) -> list[str]:
    return next(line.split() for line in lines if line.startswith(f" {name} "))


@pytest.mark.parametrize("width", [80, 120])
def test_summary_fits_and_says_all(evaluation, width):
    lines = shown(summary_table(evaluation), width)
    assert all(cell_len(line) <= 80 for line in lines)
    assert row(lines, "sft") == ["sft", "0.10", "±0.06", "-0.50", "±0.20", "0.0", "14.2", "0.75", "0%", "97%"]
    assert row(lines, "ppo@24")[-5:] == ["7.0", "12.0", "0.75", "0%", "97%"]
    assert not any("…" in line for line in lines)


def test_greedy_scores_have_columns_and_the_line_still_fits(evaluation):
    for policy in evaluation["policies"]:
        policy["metrics"] |= {"greedy_gold": 0.875, "greedy_reward": -2.25}
    lines = shown(summary_table(evaluation))
    assert all(cell_len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    expected = ["sft", "0.10", "±0.06", "-0.50", "±0.20", "0.88", "-2.25", "0.0", "14.2", "97%"]
    assert row(lines, "sft") == expected
    for policy in evaluation["policies"]:
        del policy["metrics"]["greedy_gold"], policy["metrics"]["gold"], policy["metrics"]["gold_se"]
    lines = shown(summary_table(evaluation))
    assert row(lines, "sft") == ["sft", "-0.50", "±0.20", "-2.25", "0.0", "14.2", "0.75", "0%", "97%"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_data_are_a_row_that_is_no_policy(with_data, width):
    lines = shown(summary_table(with_data), width)
    assert all(cell_len(line) <= 80 for line in lines)
    # no star, though nobody scores better; no KL; the name `ppo (ema)` has the room of a column
    assert row(lines, "data") == ["data", "0.94", "±0.05", "9.25", "±0.25", "–", "21.5", "0%", "100%"]
    assert row(lines, "ppo@24")[4] == "±0.10*"
    text = " ".join(" ".join(lines).split())
    assert "data: 128 demonstrations of 64 prompts, scored as they are." in text
    assert [name for name in ("data ", "sft ") if name in text] == ["data ", "sft "]
    assert text.index("data 0.94") < text.index("sft 0.10")
    del with_data["data"]
    assert "data" not in "\n".join(shown(summary_table(with_data), width))


def test_long_names_wrap_and_no_figure_is_cut(with_data):
    with_data["policies"][2]["name"] = "ppo (best: step 16)"
    for policy in with_data["policies"]:
        policy["metrics"] |= {"greedy_gold": 0.875, "greedy_reward": -2.25}
    lines = shown(summary_table(with_data))
    assert all(cell_len(line) <= 80 for line in lines) and not any("…" in line for line in lines)
    assert "ppo (best: step 16)" in " ".join(" ".join(line[:17] for line in lines).split())
    for policy in with_data["policies"]:
        del policy["metrics"]["greedy_gold"], policy["metrics"]["greedy_reward"]
    lines = shown(summary_table(with_data))
    assert all(cell_len(line) <= 80 for line in lines) and not any("…" in line for line in lines)
    assert any("ppo (best: step 16)  " in line for line in lines)  # whole


def test_stars_mark_the_best_of_a_column(evaluation):
    lines = shown(summary_table(evaluation))
    assert row(lines, "ppo@16")[2] == "±0.04*"
    assert row(lines, "ppo@24")[4] == "±0.10*"
    assert sum(line.count("*") for line in lines) == 3  # two figures and the note


def test_summary_without_gold_with_nan_and_of_one_policy(evaluation):
    for policy in evaluation["policies"]:
        policy["metrics"]["gold"] = None
    evaluation["policies"][1]["metrics"] |= {"reward": math.nan, "length": None}
    lines = shown(summary_table(evaluation))
    assert not any("gold" in line for line in lines)
    assert row(lines, "ppo@8") == ["ppo@8", "nan", "±0.20", "1.2", "–", "0.75", "0%", "97%"]
    evaluation["policies"] = evaluation["policies"][:1]
    lines = shown(summary_table(evaluation))
    assert row(lines, "sft") and not any("*" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_samples_show_prompt_once_and_each_policy(evaluation, width):
    lines = shown(samples_table(evaluation, 2), width)
    assert all(cell_len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert text.count("The soup in place 0") == 1 and text.count("The soup in place 1") == 1
    assert "The soup in place 2" not in text
    line = next(line for line in lines if "answer 1 of ppo@16" in line)
    assert line.split() == ["ppo@16", "answer", "1", "of", "ppo@16", "+0.50", "+3.00"]


def test_samples_of_chosen_policies(evaluation):
    text = "\n".join(shown(samples_table(evaluation, 1, ["ppo@24", "sft"])))
    assert text.index("of ppo@24") < text.index("of sft")
    assert "ppo@8" not in text


def test_samples_without_gold_or_answers_or_samples(evaluation):
    for sample in evaluation["samples"]:
        for answer in sample["responses"].values():
            answer["gold"] = None
    evaluation["samples"][0]["responses"].pop("sft")
    lines = shown(samples_table(evaluation, 1))
    assert not any("gold" in line or "of sft" in line for line in lines)
    assert any(
        "no samples were kept" in line for line in shown(samples_table({**evaluation, "samples": []}, 3))
    )


def test_long_texts_are_cut_and_the_prompts_end_is_kept(evaluation):
    sample = evaluation["samples"][0]
    sample["prompt"] = "begin " + "x" * 2000 + " TL;DR:"
    sample["responses"]["sft"]["text"] = "y" * 2000
    lines = shown(samples_table(evaluation, 1, ["sft"]))
    assert len(lines) < 20
    text = "".join(lines)
    assert "begin" in text and "TL;DR:" in text and text.count("…") == 2


def test_empty_and_unfinished_answers_are_said_to_be(evaluation):
    responses = evaluation["samples"][0]["responses"]
    responses["sft"]["text"] = " \u200b"
    responses["ppo@8"]["ended"] = False
    lines = shown(samples_table(evaluation, 1))
    assert any("(empty)" in line for line in lines)
    assert any("answer 0 of ppo@8 (cut off)" in line for line in lines)


def test_model_text_can_neither_style_nor_steer(evaluation):
    text = "[bold red]x[/] \x1b[31mred\x1b[0m \x07\rback\n\nnext"
    evaluation["samples"][0]["responses"]["sft"]["text"] = text
    lines = shown(samples_table(evaluation, 1, ["sft"]), force_terminal=True, color_system=None)
    assert any("[bold red]x[/] [31mred[0m back next" in line for line in lines)
    assert line_of("a\u202eb\ud800") == "ab"


def test_plain_without_a_terminal(evaluation):
    for table in (summary_table(evaluation), samples_table(evaluation)):
        assert "\x1b" not in "".join(shown(table))
        assert "\x1b" in "".join(shown(table, force_terminal=True, color_system="standard"))


def test_wide_characters_keep_the_columns(evaluation):
    evaluation["samples"][0]["prompt"] = "请写一段关于这家餐馆的评论" * 6
    evaluation["samples"][0]["responses"]["sft"]["text"] = "汤端上来的时候已经凉了" * 8
    lines = shown(samples_table(evaluation, 1))
    assert all(cell_len(line) <= 80 for line in lines)
    assert sum("汤" in line for line in lines) >= 2


def test_a_kl_that_is_a_bound_says_so(evaluation):
    evaluation["policies"][-1] |= {"bounds": ["kl"], "best_of": 4, "step": None}
    lines = shown(summary_table(evaluation))
    assert row(lines, "ppo@24")[-5:] == ["≤7.0", "12.0", "0.75", "0%", "97%"]
    assert row(lines, "sft")[5] == "0.0"
    assert all(cell_len(line) <= 80 for line in lines)
    del evaluation["policies"][-1]["metrics"]["kl"]
    assert "≤" not in "\n".join(shown(summary_table(evaluation)))
