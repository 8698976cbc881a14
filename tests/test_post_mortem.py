"""benchmarks/post_mortem.py: what it runs, what it reads of the runs, the table and the figure that it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_exp import compose
from rlhf_exp.fields import leaves
from rlhf_exp.store.keys import canonical

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import mistakes  # noqa: E402
import post_mortem  # noqa: E402
import post_mortem_page as page  # noqa: E402
from mistakes import SOUND, VARIANTS, Trial  # noqa: E402

LENGTH, KL, PROXY, GOLD = (metric.key for metric in mistakes.METRICS_SHOWN)
LOG = """reward 24/24  loss 0.000  accuracy 1.00  lr 4.2e-05  1:26  done
gate: reward 0a1b2c scores too many of these above the real answer: short 0.31 (limit 0.2), truncated 0.9 (limit 0.5)
ok    KL to the reference is 0 (4 prompts, 45 tokens, largest difference 0)
ok    EOS can be drawn ('<|im_end|>' = 2, from token 2 of 32 on, probability up to 5e-07)
(off) adapters belong to this base (not sft): adapters.sft was trained on another base: set model to that one
FAIL  the reward model sees the tokens it was trained on (a prompt of 7 tokens): the ends differ
note  log-probs are not of the distribution that answers are sampled from (top_k=50): KL and ratios are biased
note: rlhf was tuned with the template chat; (it is no line of the self-check)
ppo  1/16  score -4.40  gold 0.24  (ok)
"""
CHECKS = {
    "KL to the reference is 0": "ok",
    "EOS can be drawn": "ok",
    "adapters belong to this base": "(off)",
    "the reward model sees the tokens it was trained on": "FAIL",
    "log-probs are not of the distribution that answers are sampled from": "note",
}


def trial(variant=SOUND, seed=0, values=(1.0,) * 8, **other) -> Trial:
    """A run whose four metrics are `values`, times 1, 2, 3 and 4."""
    factors = {LENGTH: 1, KL: 2, PROXY: 3, GOLD: 4}
    rows = [
        {"step": step, **{key: factor * value for key, factor in factors.items()}}
        for step, value in enumerate(values, 1)
    ]
    parts = {"guards": [], "samples": [], "checks": {"a": "ok"}, "probes": [], "seconds": 10.0}
    return Trial(variant, seed, rows, **{**parts, **other})


def fired(*rows: tuple[str, int]) -> list[dict]:
    return [{"guard": guard, "step": step} for guard, step in rows]


# ---------------------------------------------------------------- what is run


@cache
def composed(variant: str) -> dict[str, dict]:
    """stage -> its keyed leaves."""
    run, choices = compose.compose(["experiment=post_mortem", "stage=ppo", *VARIANTS[variant].overrides])
    stages = {name: compose.upstream(name, run, choices)[0] for name in ("sft", "reward")}
    return {name: canonical(config) for name, config in ({"ppo": run} | stages).items()}


@pytest.mark.parametrize(
    ("variant", "changed"),
    [
        ("wrong_reference", {("ppo", "ppo.faults"): ["wrong_reference"]}),
        ("whiten_per_answer", {("ppo", "ppo.faults"): ["whiten_per_minibatch"]}),
        ("no_eos_in_data", {("reward", "reward.faults"): ["answers_without_eos"]}),
        ("sigmoid", {("ppo", "ppo.faults"): ["sigmoid_scores"]}),
        ("not_replayed", {("ppo", "generation.logprob_mode"): "raw"}),
        (
            "no_eos_at_all",
            {
                ("ppo", "ppo.faults"): ["score_without_eos"],
                ("reward", "reward.faults"): ["answers_without_eos"],
            },
        ),
    ],
)
def test_a_variant_differs_from_the_sound_run_in_its_mistake_alone(variant, changed):
    sound, wrong = composed(SOUND), composed(variant)
    found = {
        (stage, key): wrong[stage][key]
        for stage in sound
        for key in sound[stage]
        if wrong[stage][key] != sound[stage][key]
    }
    assert found == changed


def test_the_issues_five_and_the_sound_run_are_what_runs_by_default():
    five = ("wrong_reference", "whiten_per_answer", "no_eos_in_data", "sigmoid", "not_replayed")
    assert (SOUND, *five) == mistakes.DEFAULT


def test_it_is_the_recipe_in_small():
    small, _ = compose.compose(["experiment=post_mortem"])
    recipe, _ = compose.compose(["experiment=lora_rlhf_zh"])
    for section, names in {
        "ppo": "epochs minibatches kl_coef kl_control target_kl vf_coef critic missing_eos_penalty reward_clip",
        "generation": "repetition_penalty top_k begin_suppress_tokens min_new_tokens temperature logprob_mode",
        "lora": "r alpha dropout",
    }.items():
        for name in names.split():
            assert getattr(getattr(small, section), name) == getattr(getattr(recipe, section), name), name
    assert small.upstream.reward["reward"] == recipe.upstream.reward["reward"]
    assert small.reward_source.gold == "sentiment"
    actions = {key: value for key, _, value in leaves(small.ppo.guards) if key.endswith("_action")}
    assert len(actions) == 9
    assert set(actions.values()) == {"warn"}
    assert small.selfcheck == "warn"


# ---------------------------------------------------------------- what is read


def test_a_run_is_read_from_its_files_and_its_log(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": step, LENGTH: float(step), GOLD: "NaN"} for step in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guards = fired(("kl", 3), ("length", 5), ("kl", 7))
    (folder / "guards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in guards))
    (folder / "run.json").write_text(json.dumps({"status": "FINISHED", "seconds": 12.5}))
    (tmp_path / "log").write_text(LOG)
    found = mistakes.read("sigmoid", 3, folder, tmp_path / "log")
    assert (found.variant, found.seed, found.seconds) == ("sigmoid", 3, 12.5)
    assert found.end(LENGTH) == pytest.approx((3 + 4 + 5 + 6 + 7 + 8) / 6)
    assert np.isnan(found.end(GOLD))
    assert np.isnan(found.values(KL)).all()  # not measured
    assert found.fired() == {"kl": 3, "length": 5}
    assert found.checks == CHECKS
    assert found.probes == ["short", "truncated"]
    assert found.samples == []


def test_a_run_without_guards_and_log_is_read_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run.json").write_text("{}")
    found = mistakes.read(SOUND, 0, tmp_path, tmp_path / "no log")
    assert (found.guards, found.checks, found.probes) == ([], {}, None)


def test_the_gates_last_line_counts():
    assert mistakes.probes(LOG + "gate: reward 0a1b2c: all probes are within their limits\n") == []
    assert mistakes.probes("gate: reward 0a1b2c was not probed: stage=probe would\n") is None


# ---------------------------------------------------------------- bands and tables


def test_a_band_is_over_the_iterations_that_all_seeds_have():
    trials = [
        trial(seed=0, values=[1.0] * 8),
        trial(seed=1, values=[2.0] * 7),
        trial(seed=2, values=[6.0] * 9),
    ]
    found = mistakes.band(trials, KL)
    assert found.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert found.mean.tolist() == pytest.approx([6.0] * 7)
    assert found.low.tolist() == pytest.approx([2.0] * 7)
    assert found.high.tolist() == pytest.approx([12.0] * 7)


def test_a_bands_curves_are_smoothed_over_five():
    found = mistakes.band([trial(values=[0, 0, 0, 5, 0, 0, 0, 0])], LENGTH)
    assert found.mean.tolist() == pytest.approx([0, 1.25, 1, 1, 1, 1, 0, 0])


def test_the_table_by_hand():
    trials = [
        trial(seed=1, values=[0, 0, *[2.0] * 6], guards=fired(("kl", 4))),
        trial(seed=0, values=[9, 9, *[1.0] * 6], guards=fired(("length", 2), ("length", 9), ("kl", 7))),
        trial("sigmoid", checks=CHECKS, probes=["short"]),
        trial("sigmoid", seed=1, checks=CHECKS, probes=["truncated", "short"]),
        trial("not_replayed", checks={}, probes=None),
    ]
    head, rule, sound, sigmoid, raw = mistakes.table(trials)
    assert head.count("|") == rule.count("|") == sound.count("|") == raw.count("|") == 10
    assert sound == (
        "| Sound | 0, 1 | 1.5 (1.0 to 2.0) | 3.0 (2.0 to 4.0) | 4.50 (3.00 to 6.00) | 6.00 (4.00 to 8.00) | passes "
        "| none | `length` 2, –; `kl` 7, 4 |"
    )
    assert sigmoid.endswith(
        "| (off) adapters belong to this base; FAIL the reward model sees the tokens it was trained on; note "
        "log-probs are not of the distribution that answers are sampled from "
        "| `short` 2 of 2, `truncated` 1 of 2 | none |"
    )
    assert raw == "| Sampler not replayed | 0 | 1.0 | 2.0 | 3.00 | 4.00 | not known | not known | none |"


def answered(variant: str, *prompts: str, seed: int = 0, ended: bool = True) -> Trial:
    samples = [
        {"step": step, "prompt": prompt, "response": f" {variant}|{prompt}\nat {step}", "ended": ended}
        for step in (1, 2)
        for prompt in prompts
    ]
    return trial(variant, seed, values=[1.0, 1.0], samples=samples)


def test_answers_of_all_variants_to_one_prompt():
    trials = [
        answered(SOUND, "p0", seed=0),
        answered(SOUND, "p1", "p2", seed=1),
        answered("sigmoid", "p3", "p2", seed=1, ended=False),
    ]
    assert mistakes.answers(trials) == [
        "Seed 1, last iteration: *p2* ...",
        "",
        "| run | answer |",
        "|---|---|",
        r"| Sound | sound\|p2 at 2 |",
        r"| Sigmoid on the score | sigmoid\|p2 at 2 ... (did not end) |",
    ]
    assert mistakes.answers([answered(SOUND, "p0"), answered("sigmoid", "p1")]) == []
    assert mistakes.answers([answered(SOUND, "p0"), answered("sigmoid", "p0", seed=1)]) == []
    assert mistakes.answers([trial()]) == []


# ---------------------------------------------------------------- the page and the figure


def test_what_is_between_the_markers_is_replaced():
    text = f"before\n{page.BEGIN}\nold\n{page.STOP}\nafter\n"
    assert page.put(text, "new") == f"before\n{page.BEGIN}\n\nnew\n\n{page.STOP}\nafter\n"
    assert page.put(page.put(text, "new"), "newer") == page.put(text, "newer")


@pytest.mark.parametrize(
    "text", ["nothing", page.BEGIN, page.STOP + page.BEGIN, (page.BEGIN + page.STOP) * 2]
)
def test_a_page_without_a_pair_of_markers_is_refused(text):
    with pytest.raises(SystemExit, match="no pair of lines"):
        page.put(text, "new")


def test_the_documents_page_has_its_markers():
    text = post_mortem.DOCS_PAGE.read_text(encoding="utf-8")
    assert "\n## " in page.put(text, "new")


def drawn(panel) -> SimpleNamespace:
    """What the panel draws."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    panel.draw(axes)
    return axes


def test_a_row_a_mistake_a_column_a_metric():
    trials = [trial(seed=seed) for seed in (0, 1)]
    trials += [trial("wrong_reference", values=[5.0] * 8, guards=fired(("length", 3), ("nan", 4)))]
    trials += [trial("sigmoid", values=[0.0] * 8)]
    found = page.panels(trials)
    assert [panel.title for panel in found] == [
        f"{VARIANTS[name].title}: {label}"
        for name in ("wrong_reference", "sigmoid")
        for label in ("length", "KL", "proxy", "gold")
    ]
    lines = [len(drawn(panel).lines) for panel in found]
    assert lines == [2, 2, 2, 2, 2, 2, 1, 2]  # the sound run is beside each, but for the squashed proxy
    triangles = [len(drawn(panel).collections) - count for panel, count in zip(found, lines, strict=True)]
    assert triangles == [1, 0, 0, 0, 0, 0, 0, 0]  # length fired; nan is of no metric here
    grey, coloured = drawn(found[0]).lines
    assert set(grey.get_ydata()) == {1.0}
    assert set(coloured.get_ydata()) == {5.0}


def test_length_and_gold_have_one_scale_the_others_their_own():
    trials = [trial(), trial("wrong_reference", values=[5.0] * 8), trial("sigmoid", values=[-3.0] * 8)]
    wide = [drawn(panel).get_ylim() for panel in page.panels(trials)]
    room = 0.06 * 8
    assert wide[0] == wide[4] == pytest.approx((-3 - room, 5 + room))
    assert wide[3] == wide[7] == pytest.approx((4 * (-3 - room), 4 * (5 + room)))
    assert wide[1] == pytest.approx((2 * (1 - 0.06 * 4), 2 * (5 + 0.06 * 4)))
    assert wide[6] == pytest.approx((-9.5, -8.5))  # a constant


def test_the_figure_is_written_of_the_sound_run_alone_too(tmp_path):
    from matplotlib.image import imread

    path = page.write_figure(tmp_path / "images/a.png", [trial()])
    height, width, _ = imread(path).shape
    assert width == pytest.approx(4 * page.SIZE[0] * 160, abs=2)
    assert height == pytest.approx(page.SIZE[1] * 160, abs=2)


def test_the_block_names_command_figure_and_cost():
    trials = [trial(seed=seed, seconds=seconds) for seed, seconds in enumerate((10.0, 30.0, 200.0))]
    found = page.block(trials, "python a.py", "images/a.png")
    assert found.startswith("`python a.py`: 3 runs of 8 iterations, 30 s of PPO each")
    assert "](images/a.png)" in found
    assert "\n".join(mistakes.table(trials)) in found


# ---------------------------------------------------------------- running


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Jobs whose processes are a line of Python each."""
    started = []

    def start(job):
        started.append(job.name)
        job.log.write_text(f"{job.name} began\n")
        with job.log.open("a") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-c", job.words[0]], stdout=log, stderr=subprocess.STDOUT
            )

    monkeypatch.setattr(post_mortem, "start", start)

    def make(*codes: str, finished: tuple[int, ...] = ()):
        found = [
            post_mortem.Job(SOUND, i, [code], tmp_path / str(i), tmp_path / f"{i}.log", 10, i in finished)
            for i, code in enumerate(codes)
        ]
        return found, started

    return make


def test_what_is_finished_is_not_run_again(jobs):
    found, started = jobs("", "", "", finished=(1,))
    assert post_mortem.run(found, 2, post_mortem.Progress(found)) == []
    assert started == ["sound seed 0", "sound seed 2"]
    assert all(job.finished for job in found)


def test_one_that_fails_is_shown_and_the_others_go_on(jobs, capsys):
    found, started = jobs("raise SystemExit('no such luck')", "")
    failed = post_mortem.run(found, 1, post_mortem.Progress(found))
    assert failed == [found[0]]
    assert [job.finished for job in found] == [False, True]
    assert started == ["sound seed 0", "sound seed 1"]
    said = capsys.readouterr().out
    assert "sound seed 0 ended with 1" in said
    assert "no such luck" in said
    assert "[ 1/2]" in said


def test_no_more_at_once_than_asked_for(jobs, tmp_path):
    code = "import os, time; open(f'{t}/{os.getpid()}', 'w'); time.sleep(.3); os.remove(f'{t}/{os.getpid()}')"
    (tmp_path / "now").mkdir()
    found, _ = jobs(*[code.replace("{t}", str(tmp_path / "now"))] * 4)
    most = []

    class Counting(post_mortem.Progress):
        def now_and_then(self, running):
            most.append(len(list((tmp_path / "now").iterdir())))

    post_mortem.run(found, 2, Counting(found))
    assert max(most) == 2


def test_a_signal_ends_what_runs(jobs):
    found, started = jobs("import time; time.sleep(60)", "")

    class Interrupted(post_mortem.Progress):
        def now_and_then(self, running):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        post_mortem.run(found, 1, Interrupted(found))
    assert found[0].process.returncode == -15
    assert started == ["sound seed 0"]


def test_how_far_it_is_and_the_eta(jobs, capsys, monkeypatch):
    found, _ = jobs("", "", finished=(0,))
    now = [100.0]
    monkeypatch.setattr(post_mortem.time, "monotonic", lambda: now[0])
    clock = post_mortem.Progress(found)
    found[1].folder.mkdir()
    (found[1].folder / "metrics.jsonl").write_text("{}\n" * 4)  # 4 of 10 in 120 s: 6 to come, 180 s
    now[0] += 120
    clock.say("x")
    assert capsys.readouterr().out == "[ 1/2]  2:00  x  eta 3:00\n"
    clock.now_and_then(found[1:])
    assert capsys.readouterr().out == ""
    now[0] += post_mortem.EVERY
    clock.now_and_then(found[1:])
    assert "sound seed 1 4/10" in capsys.readouterr().out


def test_a_typo_is_said_before_anything_runs(tmp_path, capsys):
    arguments = ["--outputs", str(tmp_path / "out"), "--variants", "sound", "--seeds", "0"]
    arguments += ["--overrides", "ppo.step=3"]
    assert post_mortem.main(arguments) == 2
    assert "ppo.step" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_command_from_end_to_end_on_the_tiny_model(tmp_path):
    few = ["upstream.sft.train.steps=2", "upstream.reward.train.steps=2", "generation.max_new_tokens=8"]
    command = [sys.executable, str(ROOT / "benchmarks/post_mortem.py"), "--variants", SOUND, "no_eos_in_data"]
    command += ["--seeds", "0", "--steps", "2", "--outputs", "out"]
    command += ["--overrides", "model=tiny", *few]

    def run(*more: str) -> str:
        return subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout

    first = run()
    assert "2 to run" in first
    assert "[ 2/2]" in first
    found = (tmp_path / "out/post_mortem.md").read_text()
    sound, wrong = (
        line for line in found.splitlines() if line.startswith(("| Sound | 0", "| No EOS in reward data | 0"))
    )
    assert "| passes |" in sound
    assert "FAIL the reward model sees the tokens it was trained on" in wrong
    assert (tmp_path / "out/post_mortem.png").is_file()
    made = [len(list((tmp_path / "out" / name).glob("*/run.json"))) for name in ("sft", "reward", "ppo")]
    assert made == [1, 2, 2]
    assert "0 to run" in run()
    assert (tmp_path / "out/post_mortem.md").read_text() == found
