"""stage=report from the command line, on run folders written by hand: what it finds, refuses, writes and repeats."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from rlhf_exp.cli import main
from tests.evaluation.run_folders import held_out, key, write_eval, write_ppo, write_run, write_sweep


@pytest.fixture
def sweep(tmp_path) -> Path:
    write_sweep(tmp_path / "outputs")
    return tmp_path / "outputs"


@pytest.fixture
def report(tmp_path, capsys):
    """Calls the command; returns exit code, lines of stdout, lines of stderr."""

    def call(*words: str, out: str = "out"):
        code = main(["stage=report", f"output_dir={tmp_path / out}", "tracking=none", *words])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return call


def made(tmp_path, out="out") -> list[Path]:
    return sorted(path for path in (tmp_path / out / "report").glob("[0-9a-f]*"))


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "report" / "tables" / f"{name}.csv").open(encoding="utf-8")))


def test_a_sweep_becomes_a_page_pictures_and_tables(sweep, report, tmp_path):
    code, out, err = report(f"inputs={sweep}")
    assert (code, err) == (0, [])
    (folder,) = made(tmp_path)
    assert out == [
        "report of 5 runs: 3 finished, 1 killed, 1 failed",
        "highest gold 0.8 at KL 4",
        "",
        f"run folder   {folder}",
        f"report       {folder}/report/report.html",
    ]
    files = {
        str(path.relative_to(folder / "report")) for path in (folder / "report").rglob("*") if path.is_file()
    }
    names = ("trials", "config", "points", "bands", "pareto", "best", "fits")
    assert files == {
        *("report.html", "frontier_heldout.png", "frontier_training.png"),
        *(f"tables/{name}.csv" for name in names),
    }
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    failed = next(row["run"] for row in rows(folder, "trials") if row["state"] == "FAILED")
    assert f"{failed} is failed: ValueError: &lt;b&gt;the loss is nan&lt;/b&gt; (not shown)." in page
    assert "stopped by a signal (shown as far as it came)." in page


def test_it_reads_and_changes_nothing(sweep, report):
    def state():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sweep.rglob("*") if p.is_file()}

    before = state()
    assert report(f"inputs={sweep}")[0] == 0
    assert state() == before


def test_no_model_is_needed(sweep, report, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was looked for")

    for name in ("load_base", "resolve", "content_hash"):
        monkeypatch.setattr(f"rlhf_exp.model.base.{name}", load)
    assert report(f"inputs={sweep}")[0] == 0


def test_the_same_runs_make_one_report_and_a_change_another(sweep, report, tmp_path):
    report(f"inputs={sweep}")
    (first,) = made(tmp_path)
    before = (first / "report" / "report.html").stat().st_mtime_ns
    assert report(f"inputs={sweep}")[0] == 0
    assert made(tmp_path) == [first]
    assert (first / "report" / "report.html").stat().st_mtime_ns == before
    report(f"inputs={sweep}", "report.fit=bon")
    assert len(made(tmp_path)) == 2
    write_ppo(sweep, [(0, 1, 1)], ppo__kl_coef=0.9)
    report(f"inputs={sweep}")
    assert len(made(tmp_path)) == 3


def test_its_record_names_what_it_read(sweep, report, tmp_path):
    report(f"inputs={sweep}", "run_name=mine")
    record = json.loads((made(tmp_path)[0] / "run.json").read_text())
    assert (record["stage"], record["status"], record["metrics"]["best"]) == (
        "report",
        "FINISHED",
        pytest.approx(0.8),
    )
    parents = record["inputs"]["parents"]
    assert {p["stage"] for p in parents.values()} == {"ppo"}
    assert len(parents) == 3, "what failed or was killed is kept from gc by nobody"


def test_its_own_output_folder_can_be_the_input_again(sweep, report, tmp_path):
    for _ in range(2):
        code, out, _ = report(f"inputs={sweep}", out="outputs")
        assert (code, out[0]) == (0, "report of 5 runs: 3 finished, 1 killed, 1 failed")


def test_a_dry_run_lists_and_writes_nothing(sweep, report, tmp_path):
    code, out, _ = report(f"inputs={sweep}", "dry_run=true")
    assert code == 0
    assert [line.split()[0] for line in out[1:]].count("FINISHED") == 3
    assert made(tmp_path) == []


# ---------------------------------------------------------------- inputs


def test_run_folders_as_a_list_and_once_each(sweep, report):
    runs = sorted(path for path in sweep.glob("ppo/*"))[:2]
    code, out, _ = report(f"inputs=[{runs[0]},{runs[1]},{runs[0]}]")
    assert code == 0
    assert out[0].startswith("report of 2 runs: ")
    assert report(f"inputs={runs[0]}")[1][0].startswith("report of 1 run: ")


def test_runs_are_found_at_any_depth_but_not_in_copies(tmp_path, report):
    write_ppo(tmp_path / "all" / "a", [(0, 1, 1)])
    write_ppo(tmp_path / "all" / "b" / "c", [(0, 1, 1)], seed=1)
    write_ppo(tmp_path / "all" / "mlartifacts", [(0, 1, 1)], seed=2)
    write_ppo(tmp_path / "all" / ".hidden", [(0, 1, 1)], seed=3)
    assert report(f"inputs={tmp_path / 'all'}")[1][0] == "report of 2 runs: 2 finished"


def test_a_sweeps_folder_stands_for_the_runs_of_its_trials(sweep, report, tmp_path):
    folder = tmp_path / "multirun" / "results" / "now"
    runs = sorted(sweep.glob("ppo/*"))
    for i, run in enumerate(runs[:2]):
        (folder / str(i)).mkdir(parents=True)
        (folder / str(i) / "runs.txt").write_text(f"{run}\n")
    (folder / "1" / "runs.txt").write_text(f"{runs[1]}\n{tmp_path / 'gone'}\n")
    code, out, _ = report(f"inputs={folder}")
    assert code == 0
    assert out[0].startswith("report of 2 runs: ")
    (made_,) = made(tmp_path)
    page = (made_ / "report" / "report.html").read_text()
    assert f"1/runs.txt names {tmp_path / 'gone'}, which is not there." in page


REFUSED = [
    ("inputs=nowhere", r"inputs=nowhere: there is no folder nowhere, and no MLflow experiment nowhere in \S+db; set "
     "inputs to a folder with run folders, or tracking.uri to where the experiment is"),
    ("inputs=mlflow:nothing", r"inputs=mlflow:nothing: no MLflow experiment nothing in sqlite:///\S+; set inputs .*"),
    ("inputs=empty", "inputs=empty: there are no run folders in it"),
    ("inputs=swept", "inputs=swept: there are no run folders in it; the runs of this sweep are in its output_dir"),
    ("inputs=[]", r"inputs must be a folder, a list of run folders, or an MLflow experiment, got \[\]"),
    ("inputs={a: b}", r"inputs must be a folder, a list of run folders, or an MLflow experiment, got \{'a': 'b'\}"),
    ("inputs=only", "inputs=only: 1 runs, but none that trained or evaluated a policy"),
    ("report.fit=cubic", "report.fit must be one of rl, bon, none, got cubic"),
    ("report.kl_limits=[5,1]", r"report.kl_limits must rise from 0 or more, got \[5.0, 1.0\]"),
    ("report.objectives=[]", r"report.objectives must name a metric, and none twice, got \[\]"),
    ("report.objectives=[kl]", r"report.objectives has kl, which is the x-axis \(report.kl\)"),
    ("model=tiny", "stage report has no group model; .*"),
    ("seed=1", "stage report has no key seed; .*"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[words for words, _ in REFUSED])
def test_bad_input_is_one_line(report, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "swept").mkdir()
    (tmp_path / "swept" / "multirun.yaml").write_text("hydra: {}\n")
    write_run(tmp_path / "only", "sft")
    given = [words] if words.startswith("inputs") else ["inputs=empty", words]
    code, out, (line,) = report(*given)
    assert (code, out) == (2, [])
    assert re.fullmatch(f"error: {said}", line), line
    assert made(tmp_path) == []


# no standard errors; what evaluations have comes first
THERE = ("gold", "length", "reward", "win_rate")
LOGGED = ("objective/gold", "objective/kl", "objective/scores", "time/update")


@pytest.mark.parametrize(
    ("words", "key", "more"),
    [
        (["report.objectives=[rougeL]"], "report.objectives=[rougeL]", []),
        (["report.objectives=[rougeL,foo]", "dry_run=true"], "report.objectives=[rougeL,foo]", []),
        (["report.kl=kl_full"], "report.kl=kl_full", ["kl"]),
    ],
    ids=["objective", "objectives", "x-axis"],
)
def test_an_axis_that_nobody_measured(sweep, report, tmp_path, words, key, more):
    there = ", ".join([*sorted([*THERE, *more]), *LOGGED])
    line = f"error: {key}: no run has such a metric; there are {there}"
    assert report(f"inputs={sweep}", *words) == (2, [], [line])
    assert made(tmp_path) == []


def test_one_objective_that_was_measured_is_enough(sweep, report, tmp_path):
    code, out, _ = report(f"inputs={sweep}", "report.objectives=[rougeL,length]")
    assert code == 0 and out[1] == "highest length 5 at KL 0"
    assert {row["objective"] for row in rows(made(tmp_path)[0], "points")} == {"length"}


def test_runs_without_any_figure_still_make_a_page(report, tmp_path):
    write_run(tmp_path / "all", "dpo", state="FAILED", error="ValueError: no")
    assert report(f"inputs={tmp_path / 'all'}", "report.objectives=[foo]")[0] == 0


def test_every_input_that_names_nothing_is_a_line(report, tmp_path, sweep):
    code, _, err = report(f"inputs=[nowhere,{sweep},elsewhere]")
    assert code == 2
    assert [line.split(":")[1].strip() for line in err] == ["inputs=nowhere", "inputs=elsewhere"]


def test_inputs_that_cannot_be_read(report, sweep, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("{}")
    code, _, (line,) = report(f"inputs={tmp_path / 'rows.jsonl'}")
    assert (code, line) == (
        2,
        f"error: inputs={tmp_path / 'rows.jsonl'} is a file: set inputs to a folder with run folders",
    )
    asked = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != sweep and asked(path, mode))
    code, _, (line,) = report(f"inputs={sweep}")
    assert (code, line) == (2, f"error: inputs={sweep}: the folder cannot be read: permission denied")


def test_nothing_but_damaged_runs_makes_no_report(report, sweep, tmp_path):
    broken = sorted((sweep / "ppo").iterdir())[0]
    (broken / "run.json").write_text('{"stage": "ppo"')
    code, out, (line,) = report(f"inputs={broken}")
    assert code == 2 and line.startswith(f"error: {broken}: ") and "run.json cannot be read" in line
    assert not made(tmp_path)
    code, out, _ = report(f"inputs={sweep}", "dry_run=true")
    assert code == 0
    (shown,) = [row for row in out if row.startswith("CORRUPT")]
    assert "run.json cannot be read" in shown


def test_inputs_are_required(report):
    code, _, (line,) = report()
    assert code == 2
    assert line.startswith("error: inputs has no value: What is compared: a folder with run folders")


def test_help_knows_its_keys_and_no_model(capsys):
    assert main(["stage=report", "--help"]) == 0
    said = capsys.readouterr().out
    assert "inputs=" in said and "report.kl_limits=" in said
    assert "model.name" not in said and "optim.lr" not in said


# ---------------------------------------------------------------- MLflow


def logged(tmp_path, folder: Path, name="exp", parent: str | None = None) -> None:
    """What a run leaves in MLflow."""
    from rlhf_exp.schema import Tracking
    from rlhf_exp.store.listing import entry
    from rlhf_exp.store.show import read_config
    from rlhf_exp.tracking import open_tracker, read_metrics

    e = entry(folder)
    tags = {"stage": e.stage, "key": e.key, "folder": str(folder)}
    tracker = open_tracker(
        Tracking(experiment=name), tmp_path / "out", f"{e.stage} {e.key[:6]}", tags, parent
    )
    tracker.params(read_config(e))
    for line in read_metrics(folder / "metrics.jsonl"):
        tracker.metrics({k: v for k, v in line.items() if k != "step"}, step=line["step"])
    if (folder / "eval.json").is_file():
        tracker.artifact(folder / "eval.json")
    tracker.finish("FINISHED")


def test_an_mlflow_experiment_names_run_folders_and_holds_what_is_elsewhere(report, tmp_path):
    here = write_ppo(tmp_path / "outputs", [(0, 1, 0.25), (2, 2, 0.5)])
    gone = write_ppo(tmp_path / "outputs", [(0, 1, 0.25), (3, 2, 0.75)], ppo__kl_coef=0.5)
    write_eval(tmp_path / "outputs", here, held_out([(0, 1, 0.5)]))
    for folder in (here, gone):
        logged(tmp_path, folder)
    key_of_gone = key(gone)
    shutil.rmtree(gone)
    code, out, err = report("inputs=exp")
    assert (code, err) == (0, [])
    assert out[0] == "report of 2 runs: 2 finished"
    (folder,) = made(tmp_path)
    points = {
        (row["run"], float(row["kl"]), float(row["score"]))
        for row in rows(folder, "points")
        if (row["source"], row["objective"]) == ("training", "gold")
    }
    assert points == {
        *((f"ppo/{here.name}", kl, score) for kl, score in ((0, 0.25), (2, 0.5))),
        *((f"ppo/{key_of_gone[:12]}", kl, score) for kl, score in ((0, 0.25), (3, 0.75))),
    }
    assert (
        "1 runs of the experiment exp have no folder on this machine"
        in (folder / "report" / "report.html").read_text()
    )
    kl_coefs = {row["run"]: row["ppo.kl_coef"] for row in rows(folder, "config")}
    assert kl_coefs[f"ppo/{key_of_gone[:12]}"] == "0.5"


def several(root: Path) -> list[Path]:
    """ppo, rloo and dpo from one sft, and the evaluation of them and of best-of-2."""
    runs = [
        write_ppo(root, [(0, 1, 0.25), (2, 2, 0.5)]),
        write_ppo(root, [(0, 1, 0.25), (3, 2, 0.5)], ppo__estimator="rloo"),
        write_run(root, "dpo"),
    ]
    parents = dict(zip(("ppo", "rloo", "dpo"), map(key, runs), strict=True))
    folder = write_run(root, "eval", parents=parents, started=30)
    policies = [
        {"name": "sft", "step": 0, "role": "sft", "metrics": {"kl": 0.0, "gold": 0.25}},
        {"name": "ppo@20", "step": 20, "role": "ppo", "metrics": {"kl": 2.0, "gold": 0.5}},
        {"name": "rloo@20", "step": 20, "role": "rloo", "metrics": {"kl": 3.0, "gold": 0.75}},
        {"name": "dpo", "step": None, "role": "dpo", "metrics": {"kl": 4.0, "gold": 0.375}},
        {"name": "sft:best_of_2", "step": None, "role": "sft", "best_of": 2, "bounds": ["kl"]}
        | {"run": "sft:best_of", "metrics": {"kl": 0.25, "gold": 0.625}},
    ]
    (folder / "eval.json").write_text(json.dumps({"policies": policies}))
    lines = [{"step": i} | p["metrics"] for i, p in enumerate(policies, 1)]
    for line, p in zip(lines, policies, strict=True):
        line |= {} if p["step"] is None else {"policy_step": p["step"]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [*runs, folder]


def test_policies_of_mlflow_alone_keep_their_names_and_bounds(report, tmp_path, monkeypatch):
    from rlhf_exp.schema import Tracking
    from rlhf_exp.tracking import open_tracker
    from rlhf_exp.tracking.experiments import Experiment

    def dots() -> list[dict[str, str]]:
        """The newest report's points on held-out prompts that are not the start."""
        assert report("inputs=exp")[::2] == (0, [])
        newest = max(made(tmp_path), key=lambda folder: folder.stat().st_mtime_ns)
        asked = ("heldout", "gold")
        points = [row for row in rows(newest, "points") if (row["source"], row["objective"]) == asked]
        return [row for row in points if float(row["kl"])]

    parent = open_tracker(Tracking(experiment="exp"), tmp_path / "out", "all", {"stage": "pipeline"})
    for folder in several(tmp_path / "outputs"):
        logged(tmp_path, folder, parent=parent.run_id)
    parent.finish("FINISHED")
    shutil.rmtree(tmp_path / "outputs")
    found = dots()
    assert {
        (row["run"].partition("/")[0], row["policy"], float(row["kl"]), row["kl_is"]) for row in found
    } == {
        ("ppo", "ppo@20", 2, "measured"),
        ("ppo", "rloo@20", 3, "measured"),
        ("dpo", "dpo", 4, "measured"),
        ("eval", "sft:best_of_2", 0.25, "bound"),
    }
    assert len({row["run"] for row in found}) == 4
    monkeypatch.setattr(
        Experiment, "text", lambda *_: None
    )  # artifacts that are gone: nobody is taken for sft
    assert sorted((row["policy"], float(row["kl"])) for row in dots()) == [
        ("policy", 0.25), ("policy", 4), ("step 20", 2), ("step 20", 3),
    ]  # fmt: skip


def test_an_experiment_without_policies_is_refused(report, tmp_path):
    folder = write_run(tmp_path / "outputs", "sft")
    logged(tmp_path, folder)
    code, _, (line,) = report("inputs=mlflow:exp")
    assert (code, line) == (
        2,
        "error: inputs=exp: the MLflow experiment has no run that trained or evaluated a policy",
    )


def test_the_report_is_an_artifact(sweep, tmp_path, capsys):
    from mlflow import MlflowClient

    assert main(["stage=report", f"output_dir={tmp_path / 'out'}", f"inputs={sweep}"]) == 0
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf_exp").experiment_id])
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "report")
    assert run.data.metrics["final/best"] == pytest.approx(0.8)
    names = {file.path for file in client.list_artifacts(run.info.run_id, "report")}
    assert {"report/report.html", "report/frontier_heldout.png", "report/tables"} <= names
    tables = {file.path for file in client.list_artifacts(run.info.run_id, "report/tables")}
    assert "report/tables/pareto.csv" in tables
