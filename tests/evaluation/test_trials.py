"""Run folders read as trials: which figures go where, what is unfinished, damaged or evaluated twice."""

from __future__ import annotations

import json

import pytest

from rlhf_exp.evaluation.trials import HELDOUT, TRAINING, read
from rlhf_exp.store.listing import entry, scan
from tests.evaluation.run_folders import CURVE, PROMPTS, key, write_eval, write_ppo, write_run, write_sweep


@pytest.fixture
def root(tmp_path):
    return tmp_path / "outputs"


def by_name(trials):
    return {trial.name: trial for trial in trials}


def test_a_sweep_is_read_as_its_ppo_runs(root):
    write_sweep(root)
    write_run(root, "sft")
    write_run(root, "reward")
    trials, notes = read(scan(root))
    assert [t.stage for t in trials] == ["ppo"] * 5, "sft, reward and the evaluations are no trials"
    assert notes == []
    first = next(t for t in trials if t.config["ppo.kl_coef"] == 0.02 and t.config["seed"] == 0)
    figures = [(r.metrics["kl"], r.metrics["reward"], r.metrics["gold"]) for r in first.rows[TRAINING]]
    assert figures == CURVE[0.02][0]
    assert [r.step for r in first.rows[TRAINING]] == [1, 2, 3, 4, 5]
    assert [(r.name, r.step) for r in first.rows[HELDOUT]][:2] == [("sft", 0), ("ppo@10", 10)]
    assert first.rows[HELDOUT][1].metrics["win_rate"] == 0.6
    assert first.task == ("tiny", "reviews")


def test_the_reward_models_of_training_and_evaluation_are_kept_apart(root):
    sft, one, two = ("0" * 64, "1" * 64, "2" * 64)
    ppo = write_ppo(root, [(0, 1, 1)], parents={"sft": sft, "reward": one, "reward_1": two})
    parents = {"ppo": key(ppo), "sft": sft, "reward": two, "gold": one}
    folder = write_run(root, "eval", parents=parents, started=30)
    policy = {"name": "ppo@1", "step": 1, "metrics": {"kl": 1.0}}
    (folder / "eval.json").write_text(json.dumps({"policies": [policy]}))
    (trial,), _ = read(scan(root))
    assert trial.scorers == {
        TRAINING: {"reward": one, "reward_1": two},
        HELDOUT: {"reward": two, "gold": one},
    }


def test_how_a_run_ended_and_why(root):
    write_sweep(root)
    trials, _ = read(scan(root))
    failed = next(t for t in trials if t.state == "FAILED")
    assert (failed.reason, failed.lost, failed.rows) == ("ValueError: <b>the loss is nan</b>", True, {})
    killed = next(t for t in trials if t.state == "KILLED")
    assert (killed.reason, killed.lost, len(killed.rows[TRAINING])) == ("stopped by a signal", False, 2)


def test_a_run_whose_process_is_gone_is_stopped(root):
    write_ppo(root, [(0, 1, 1)], state="RUNNING")
    assert read(scan(root))[0][0].state == "STOPPED"


def test_a_line_that_is_half_written_and_lines_without_a_kl_do_not_count(root):
    folder = write_ppo(root, [(0, 1, 1), (2, 2, 2)])
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "objective/scores": 1}\n{"step": 4, "objective/kl": "NaN"}\n{"step": 5, "obj')
    (trial,), _ = read(scan(root))
    rows = trial.rows[TRAINING]
    assert [row.step for row in rows] == [1, 2, 4], (
        "the nan of step 4 is a number; it is left out where points are made"
    )


def test_what_cannot_be_read_is_corrupt_and_said(root):
    one, two = write_ppo(root, [(0, 1, 1)]), write_ppo(root, [(0, 1, 1)], seed=5)
    (one / "run.json").write_text("{")
    (two / "metrics.jsonl").write_text("what?\n")
    trials = by_name(read(scan(root))[0])
    first, second = (trials[f"ppo/{folder.name}"] for folder in (one, two))
    assert (first.state, second.state) == ("CORRUPT", "CORRUPT")
    assert "run.json cannot be read" in first.reason
    assert "metrics.jsonl cannot be read" in second.reason


def test_a_folder_without_a_record_is_empty(root):
    (root / "ppo" / "0123456789ab").mkdir(parents=True)
    (trial,), _ = read(scan(root))
    assert (trial.state, trial.reason, trial.lost) == ("EMPTY", "no run.json", True)


@pytest.mark.parametrize("content", ["{", "[]", '{"policies": [{"step": 0}]}', '{"policies": 3}'])
def test_an_evaluation_that_cannot_be_read_is_said(root, content):
    ppo = write_ppo(root, [(0, 1, 1)])
    folder = write_eval(root, ppo, [(0, 0, {"gold": 1.0})])
    (folder / "eval.json").write_text(content)
    (trial,), (note,) = read(scan(root))
    assert HELDOUT not in trial.rows
    assert note.startswith(
        f"eval/{folder.name} (finished), the evaluation of {trial.name}: eval.json cannot be read"
    )


def test_an_evaluation_that_failed_is_said(root):
    ppo = write_ppo(root, [(0, 1, 1)])
    folder = write_eval(root, ppo, [(0, 0, {"gold": 1.0})], state="FAILED", error="out of memory")
    (trial,), (note,) = read(scan(root))
    assert note == f"eval/{folder.name} (failed), the evaluation of {trial.name}: it has no figures."


def test_the_newest_of_two_evaluations_is_shown(root):
    ppo = write_ppo(root, [(0, 1, 1)])
    new = write_eval(root, ppo, [(0, 0, {"gold": 0.75})], seed=1, started=40)
    old = write_eval(root, ppo, [(0, 0, {"gold": 0.25})], seed=2, started=30)
    (trial,), (note,) = read(scan(root))
    assert trial.rows[HELDOUT][0].metrics["gold"] == 0.75
    assert (
        note == f"{trial.name} was evaluated more than once: eval/{new.name} is shown, not eval/{old.name}."
    )


def test_an_evaluation_whose_policy_is_elsewhere_stands_alone(root, tmp_path):
    ppo = write_ppo(tmp_path / "elsewhere", [(0, 1, 1)])
    folder = write_eval(root, ppo, [(0, 0, {"gold": 0.25}), (8, 2, {"gold": 0.5})])
    (trial,), _ = read([entry(folder)])
    assert (trial.stage, [r.name for r in trial.rows[HELDOUT]]) == ("eval", ["sft", "ppo@8"])
    assert len(trial.samples[HELDOUT]) == len(PROMPTS)


def test_an_adapter_that_was_given_is_known_by_its_folder(root):
    ppo = write_ppo(root, [(0, 1, 1)])
    folder = write_eval(root, ppo, [(0, 0, {"gold": 0.25})])
    record = json.loads((folder / "run.json").read_text())
    record["inputs"]["parents"]["ppo"] = {"stage": "ppo", "key": "0" * 64, "path": f"../../ppo/{ppo.name}"}
    (folder / "run.json").write_text(json.dumps(record))
    (trial,), _ = read(scan(root))
    assert (trial.stage, len(trial.rows[HELDOUT])) == ("ppo", 1)


def test_an_evaluation_of_several_policies_is_shared_out(root):
    """ppo is a run here; dpo is not, and stands alone; the start belongs to both."""
    ppo = write_ppo(root, [(0, 1, 1)])
    folder = write_run(root, "eval", parents={"ppo": key(ppo), "dpo": "f" * 64})
    rows = [("sft", 0, 0), ("ppo@4", 4, 1), ("ppo@8", 8, 2), ("ppo (ema)", None, 1.5), ("dpo", None, 3)]
    policies = [{"name": n, "step": s, "metrics": {"kl": float(k), "gold": 0.5}} for n, s, k in rows]
    responses = {n: {"text": n, "ended": True} for n, _, _ in rows}
    content = {"policies": policies, "samples": [{"prompt": "p", "responses": responses}]}
    (folder / "eval.json").write_text(json.dumps(content))
    (first, second), _ = read(scan(root))
    assert [r.name for r in first.rows[HELDOUT]] == ["sft", "ppo@4", "ppo@8", "ppo (ema)"]
    assert (first.stage, second.name) == ("ppo", f"eval/{folder.name}:dpo")
    assert [r.name for r in second.rows[HELDOUT]] == ["sft", "dpo"]
    assert list(second.samples[HELDOUT][0].answers) == ["sft", "dpo"]
    assert (second.run_name, second.config["policy"]) == ("dpo", "dpo")


def test_samples_are_those_of_the_last_step_and_no_more_than_asked_for(root):
    ppo = write_ppo(root, [(0, 1, 1), (1, 1, 1)])
    write_eval(root, ppo, [(0, 0, {"gold": 1.0})])
    (trial,), _ = read(scan(root), samples=2)
    assert [list(s.answers) for s in trial.samples[TRAINING]] == [["ppo@2"]]
    assert [s.prompt for s in trial.samples[HELDOUT]] == list(PROMPTS[:2])
    assert read(scan(root), samples=0)[0][0].samples == {HELDOUT: [], TRAINING: []}


def test_the_digest_follows_what_is_read_and_nothing_else(root):
    ppo = write_ppo(root, [(0, 1, 1)])
    evaluation = write_eval(root, ppo, [(0, 0, {"gold": 1.0})])

    def digest():
        return read(scan(root))[0][0].digest

    before = digest()
    (ppo / "notes.txt").write_text("mine")
    assert digest() == before
    for path in (ppo / "metrics.jsonl", evaluation / "eval.json", ppo / "config.yaml"):
        path.write_text(path.read_text() + "\n")
        assert digest() != before, path.name
        before = digest()


# ---------------------------------------------------------------- best of n, betas, several stages


def write_policies(folder, *policies: dict) -> None:
    """eval.json of policies; kl and gold are metrics."""
    rows = [
        {"step": None, **policy, "metrics": {"kl": float(policy.pop("kl")), "gold": policy.pop("gold", 0.5)}}
        for policy in policies
    ]
    (folder / "eval.json").write_text(json.dumps({"policies": rows, "samples": []}))


SFT = {"name": "sft", "step": 0, "kl": 0, "role": "sft"}


def best_of(n: int, of: str = "sft", kl: float = 1.0) -> dict:
    run = f"{of}:best_of"
    return {"name": f"{run}_{n}", "kl": kl, "run": run, "role": of, "best_of": n, "bounds": ["kl"]}


def test_best_of_n_is_a_line_of_its_own_even_beside_one_run(root):
    """Its places are the n; the run that it chooses from has its own rows alone."""
    dpo = write_run(root, "dpo")
    folder = write_run(root, "eval", parents={"dpo": key(dpo)})
    write_policies(
        folder,
        dict(SFT),
        best_of(4, "dpo", 2.5),
        best_of(2, "dpo", 1.5),
        {"name": "dpo", "kl": 1, "role": "dpo"},
    )
    (first, second), notes = read(scan(root))
    assert notes == []
    assert [(r.name, r.step, r.bound) for r in first.rows[HELDOUT]] == [("sft", 0, False), ("dpo", 1, False)]
    assert (first.stage, second.name) == ("dpo", f"eval/{folder.name}:dpo:best_of")
    assert [(r.name, r.step, r.bound) for r in second.rows[HELDOUT]] == [
        ("sft", 0, False),
        ("dpo:best_of_2", 2, True),
        ("dpo:best_of_4", 4, True),
    ]
    assert second.run_name == "dpo:best_of"


def test_best_of_n_of_sft_alone(root):
    folder = write_run(root, "eval")
    write_policies(folder, dict(SFT), best_of(2), best_of(8))
    (trial,), _ = read(scan(root))
    assert [r.step for r in trial.rows[HELDOUT]] == [0, 2, 8]
    assert trial.run_name == "sft:best_of"


def test_several_stages_in_one_evaluation_each_have_their_own_rows(root):
    """rloo is of stage ppo and is called by its role; the best of a run and a folder's belong to them."""
    ppo, rloo = write_ppo(root, [(0, 1, 1)]), write_ppo(root, [(0, 1, 1)], ppo__estimator="rloo")
    ilql = write_run(root, "ilql")
    other = write_run(root, "dpo", seed=3)
    parents = {"ppo": key(ppo), "rloo": key(rloo), "ilql": key(ilql), "compared_9": key(other)}
    folder = write_run(root, "eval", parents=parents)
    write_policies(
        folder,
        {"name": "ilql:beta_16", "kl": 9, "run": "ilql", "role": "ilql", "beta": 16.0},
        {"name": "ilql:beta_0", "kl": 1, "run": "ilql", "role": "ilql", "beta": 0.0},
        dict(SFT),
        {"name": "ppo (best: step 2)", "step": 2, "kl": 1, "role": "ppo"},
        {"name": "ppo@4", "step": 4, "kl": 2, "role": "ppo"},
        {"name": "rloo@4", "step": 4, "kl": 2, "role": "rloo"},
        {"name": f"dpo {key(other)[:6]}", "kl": 3, "run": f"dpo {key(other)[:6]}", "role": "compared_9"},
    )
    trials, notes = read(scan(root))
    assert notes == [] and len(trials) == 4
    rows = {t.key: [r.name for r in t.rows[HELDOUT]] for t in trials}
    assert (
        rows
        == {
            key(ppo): ["sft", "ppo (best: step 2)", "ppo@4"],
            key(rloo): ["sft", "rloo@4"],
            key(ilql): ["sft", "ilql:beta_0", "ilql:beta_16"],  # by beta, behind the start
            key(other): ["sft", f"dpo {key(other)[:6]}"],
        }
    )
    assert {t.key: t.run_name for t in trials}[key(rloo)] == "rloo"
    assert {t.run_name for t in trials} == {None, "rloo"}


def test_the_last_policy_is_no_average_and_not_the_start(root):
    ppo = write_ppo(root, [(0, 1, 1)])
    write_eval(root, ppo, [(0, 0, {"gold": 0.1}), (4, 2, {"gold": 0.3}), (None, 1, {"gold": 0.2})])
    (trial,), _ = read(scan(root))
    assert trial.last(HELDOUT).metrics["gold"] == 0.3
    trial.rows[HELDOUT] = [r for r in trial.rows[HELDOUT] if r.step != 4]
    assert trial.last(HELDOUT).metrics["gold"] == 0.2
    trial.rows[HELDOUT] = trial.rows[HELDOUT][:1]
    assert trial.last(HELDOUT).name == "sft" and trial.last("nothing") is None
