"""experiment=smoke from the command line to the report, and what later commands make of its runs."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_exp.schema.names import ITERATION
from rlhf_exp.store.runs import RunFolder

STAGES = ("sft", "reward", "ppo", "eval")
# docs/PPO.md; score_minus_ref comes with the reference scores
PPO_METRICS = {
    *(f"objective/{name}" for name in ("kl", "scores", "rewards", "entropy")),
    *(f"policy/{name}" for name in ("approxkl", "clipfrac", "ratio_mean", "ratio_max", "grad_norm")),
    *(f"critic/{name}" for name in ("loss", "explained_variance", "clipfrac")),
    *(
        f"response/{name}"
        for name in (
            "length_mean",
            "length_min",
            "eos_rate",
            "empty_rate",
            "distinct_2",
            "repetition",
            "kept_mass",
        )
    ),
    *(f"time/{name}" for name in ("rollout", "score", "update")),
    "tokens_per_second",
}


# ---------------------------------------------------------------- run folders


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_folder_says_what_it_is(smoke, cli, stage):
    folder = smoke.folder(stage)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["error"] is None
    assert (record["stage"], record["key"][:12]) == (stage, folder.name)
    assert record["seconds"] > 0
    assert all(math.isfinite(value) for value in record["metrics"].values())
    assert record["inputs"]["base"]["dtype"] == "float32"
    assert len(record["inputs"]["base"]["hash"]) == 64
    # the reviews' prompts have no references: eval scores their demonstrations beside the policies
    views = {"sft": {"demonstrations"}, "reward": {"comparisons"}, "eval": {"prompts", "demonstrations"}}
    assert set(record["inputs"]["data"]) == views.get(stage, {"prompts"})
    parents = {"ppo": ("sft", "reward"), "eval": ("sft", "reward", "ppo")}.get(stage, ())
    assert set(record["inputs"]["parents"]) == set(parents)
    for parent in parents:
        given = record["inputs"]["parents"][parent]
        assert (folder / given["path"]).resolve() == smoke.folder(parent).resolve()
        assert given["key"] == json.loads((smoke.folder(parent) / "run.json").read_text())["key"]
    RunFolder(folder).verify()


@pytest.mark.parametrize("stage", STAGES)
def test_the_config_and_the_versions_are_frozen(smoke, stage):
    folder = smoke.folder(stage)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["stage"] == stage
    assert config["model"]["dtype"] == "float32"
    if stage in ("sft", "reward"):
        assert config["train"]["steps"] == 4  # from the experiment's upstream
    if stage == "ppo":
        assert config["ppo"]["save_every"] == 2
    versions = json.loads((folder / "versions.json").read_text())
    assert torch.__version__ in json.dumps(versions)


@pytest.mark.parametrize(("stage", "steps"), [("sft", 4), ("reward", 4), ("ppo", 3), ("eval", 3)])
def test_metrics_of_every_step(smoke, cli, stage, steps):
    found = cli.lines(smoke.folder(stage) / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    wanted = {
        "sft": {"train/loss", "train/token_accuracy", "train/grad_norm", "optim/lr"},
        "reward": {"train/loss", "train/accuracy", "train/grad_norm", "optim/lr"},
        "ppo": PPO_METRICS,
        "eval": {"reward", "gold", "kl", "length", "distinct_2", "empty_rate", "eos_rate"},
    }[stage]
    for line in found:
        assert wanted <= set(line), wanted - set(line)
        assert all(math.isfinite(line[name]) for name in wanted)
    assert cli.lines(smoke.folder(stage) / "samples.jsonl")


def test_what_ppo_best_metric_may_name_is_there(smoke, cli):
    for line in cli.lines(smoke.folder("ppo") / "metrics.jsonl"):
        assert set(ITERATION) - set(line) <= {"objective/kl_untruncated"}


def test_ppo_starts_where_sft_ended(smoke, cli):
    first = cli.lines(smoke.folder("ppo") / "metrics.jsonl")[0]
    assert first["objective/kl"] == 0
    assert first["objective/kl_max"] == 0
    assert first["first/ratio_max"] == 1
    assert first["first/approxkl"] == 0


def test_adapters_and_heads_are_there(smoke):
    for folder in (
        smoke.folder("sft") / "adapter",
        smoke.folder("reward") / "adapter",
        smoke.folder("ppo") / "adapter",
        smoke.folder("ppo") / "checkpoints" / "step_00002",
    ):
        assert {path.name for path in folder.iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
    for stage in ("reward", "ppo"):
        assert (smoke.folder(stage) / "head" / "head.safetensors").is_file()


def test_peft_alone_reads_every_adapter(smoke, tiny_path):
    """PeftModel.from_pretrained on the base gives the log-probs that Roles gives, and not those of the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rlhf_exp.model.base import load_base
    from rlhf_exp.model.roles import Roles
    from rlhf_exp.schema import Model

    ids = torch.randint(3, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    base = load_base(Model(name="tiny", source="builtin", dtype="float32"), "cpu")
    for stage in ("sft", "reward", "ppo"):
        plain = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32).eval()
        with torch.no_grad():
            without = plain(input_ids=ids).logits.log_softmax(-1)
            model = PeftModel.from_pretrained(plain, smoke.folder(stage) / "adapter").eval()
            expected = model(input_ids=ids).logits.log_softmax(-1)
            with Roles(base) as roles:
                roles.load("policy", smoke.folder(stage) / "adapter")
                with roles.use("policy"):
                    got = base.model(input_ids=ids).logits.log_softmax(-1)
        assert (got - expected).abs().max() < 1e-5, stage
        assert (got - without).abs().max() > 1e-3, stage


def test_the_report(smoke):
    folder = smoke.folder("eval") / "report"
    page = (folder / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert {path.suffix for path in folder.iterdir()} == {".html", ".png"}
    assert all(
        path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in folder.iterdir() if path.suffix == ".png"
    )
    evaluation = json.loads((smoke.folder("eval") / "eval.json").read_text())
    assert [policy["step"] for policy in evaluation["policies"]] == [0, 2, 3]
    best = json.loads((smoke.folder("ppo") / "best.json").read_text())
    kept = "ppo (best: step 2)" if best["step"] == 2 else "ppo@2"
    assert [policy["name"] for policy in evaluation["policies"]] == ["sft", kept, "ppo@3"]
    for policy in (*evaluation["policies"], evaluation["data"]):
        assert policy["name"] in page
    accuracy = json.loads((smoke.folder("reward") / "run.json").read_text())["metrics"]["validation/accuracy"]
    assert f"It prefers the chosen answer in {accuracy:.1%} of 32 validation pairs" in page
    assert "Scored above the real answer" in page  # the probes


def test_what_is_printed(smoke):
    out = smoke.result.out
    for stage in STAGES:
        assert f"stage    {stage} " in out
    assert out.count("will be trained") > 4
    assert named(smoke.folder("eval")) in out
    assert "report.html" in out
    assert f"sqlite:///{smoke.output}/mlflow.db" in out
    assert "ppo@3" in out
    assert smoke.result.err == ""


# ---------------------------------------------------------------- MLflow


def test_mlflow_has_one_parent_with_four_children(smoke, store):
    client = store()
    (experiment,) = client.search_experiments(filter_string="name = 'rlhf_exp'")
    everyone = client.search_runs([experiment.experiment_id])
    first = json.loads((smoke.folder("sft") / "run.json").read_text())["mlflow_run_id"]
    parent = client.get_run(first).data.tags["mlflow.parentRunId"]
    children = [run for run in everyone if run.data.tags.get("mlflow.parentRunId") == parent]
    assert client.get_run(parent).info.status == "FINISHED"
    assert client.get_run(parent).data.tags["stage"] == "pipeline"
    by_stage = {run.data.tags["stage"]: run for run in children}
    assert sorted(by_stage) == sorted(STAGES)
    assert len(children) == 4
    for stage, run in by_stage.items():
        folder = smoke.folder(stage)
        assert run.info.status == "FINISHED"
        assert run.info.run_id == json.loads((folder / "run.json").read_text())["mlflow_run_id"]
        assert run.data.tags["folder"] == str(folder)
        assert run.data.params["stage"] == stage
        assert run.data.params["lora.r"] == "16"
        files = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert {"config.yaml", "versions.json", "samples.json"} <= files
        assert ("report" if stage == "eval" else "adapter") in files
    ppo = by_stage["ppo"]
    assert ppo.data.params["ppo.kl_coef"] == "0.05"
    history = client.get_metric_history(ppo.info.run_id, "objective/scores")
    logged = [json.loads(line) for line in (smoke.folder("ppo") / "metrics.jsonl").read_text().splitlines()]
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (line["step"], line["objective/scores"]) for line in logged
    ]


# ---------------------------------------------------------------- again


def summary(out: str, output: Path) -> str:
    """What is printed after the work; paths may be relative to where the command was called."""
    text = out.partition("done in ")[2].partition("\n")[2]
    return text.replace(os.path.relpath(output), str(output))


def named(folder: Path) -> str:
    """A run folder in the summary, whatever it is relative to."""
    return f"/{folder.parent.name}/{folder.name}\n"


def test_a_second_call_reuses_everything(smoke, cli, nothing_loads):
    before = cli.runs(smoke.output)
    again = cli.call(*smoke.words)
    assert again.code == 0, again.err
    assert cli.runs(smoke.output) == before
    assert again.out.count("(cached)") >= 4
    assert "will be trained" not in again.out
    assert summary(again.out, smoke.output) == summary(smoke.result.out, smoke.output)


def plan(out: str) -> dict[str, str]:
    """Stage -> "cached" or "will be trained" of a printed plan."""
    found = {}
    for line in out.splitlines():
        if line.startswith("stage "):
            _, stage, _, state = line.split(maxsplit=3)
            found[stage] = state.strip("()")
    return found


@pytest.mark.parametrize(
    ("word", "trained"),
    [
        ("threads=2", set()),
        ("tracking=none", set()),
        ("run_name=another", set()),
        ("ppo.micro_batch_size=2", set()),
        ("upstream.reward.train.micro_batch_size=4", set()),
        ("eval.prompts=7", {"eval"}),
        ("eval.gold=length", {"eval"}),
        ("ppo.kl_coef=0.2", {"ppo", "eval"}),
        ("optim.lr=2e-4", {"ppo", "eval"}),
        ("generation.temperature=0.9", {"ppo", "eval"}),
        ("upstream.reward.optim.lr=1e-3", {"reward", "ppo", "eval"}),
        ("upstream.sft.optim.lr=1e-3", {"sft", "ppo", "eval"}),
        ("seed=1", set(STAGES)),
        ("lora.r=4", set(STAGES)),
        ("model.dtype=bfloat16", set(STAGES)),
        ("resume=never", set(STAGES)),
    ],
)
def test_what_a_change_trains_again(smoke, cli, nothing_loads, word, trained):
    found = cli.call(*smoke.words, word, "dry_run=true")
    assert found.code == 0, found.err
    states = {stage: "will be trained" if stage in trained else "cached" for stage in STAGES}
    assert plan(found.out) == states


def test_another_kl_coefficient_trains_ppo_and_eval(smoke, cli):
    before = set(cli.runs(smoke.output))
    found = cli.call(*smoke.words, "ppo.kl_coef=0.2", "tracking=none")
    assert found.code == 0, found.err
    new = set(cli.runs(smoke.output)) - before
    assert sorted(folder.parent.name for folder in new) == ["eval", "ppo"]
    (ppo,) = (folder for folder in new if folder.parent.name == "ppo")
    old, changed = (cli.without_clock(f / "metrics.jsonl") for f in (smoke.folder("ppo"), ppo))
    assert old[0]["objective/scores"] == changed[0]["objective/scores"]  # the same first answers
    assert old[2] != changed[2]
    assert json.loads((ppo / "run.json").read_text())["mlflow_run_id"] is None


def test_ppo_alone_finds_the_pipelines_runs(smoke, cli, nothing_loads):
    found = cli.call(*cli.SMOKE_PPO, f"output_dir={smoke.output}")
    assert found.code == 0, found.err
    assert plan(found.out) == dict.fromkeys(("sft", "reward", "ppo"), "cached")
    assert named(smoke.folder("ppo")) in found.out


# ---------------------------------------------------------------- adapters given


def given(cli, output: Path, *words: str):
    """A run of the smoke experiment's PPO with given adapters; its folder and what was printed."""
    words = [word for word in cli.SMOKE_PPO if not word.startswith("upstream.")] + list(words)
    result = cli.call(*words, "tracking.backend=none", f"output_dir={output}")
    assert result.code == 0, result.err
    return cli.runs(output, "ppo"), result.out


def test_given_run_folders_make_the_same_run(smoke, cli, tmp_path):
    words = [f"adapters.{stage}={smoke.folder(stage)}" for stage in ("sft", "reward")]
    (folder,), out = given(cli, tmp_path / "out", *words)
    assert cli.runs(tmp_path / "out", "sft") == cli.runs(tmp_path / "out", "reward") == []
    assert f"(given: {smoke.folder('sft')})" in out
    ours, theirs = (cli.without_clock(f / "metrics.jsonl") for f in (folder, smoke.folder("ppo")))
    assert ours == theirs
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (smoke.folder("ppo") / weights).read_bytes()
    record = json.loads((folder / "run.json").read_text())
    assert Path(folder, record["inputs"]["parents"]["sft"]["path"]).resolve() == smoke.folder("sft").resolve()


def test_a_peft_folder_and_a_run_of_mlflow_are_the_same_adapters(smoke, cli, tmp_path, monkeypatch):
    """Content decides, not the place: the second and third command reuse the run of the first."""
    peft = tmp_path / "peft"
    shutil.copytree(smoke.folder("sft") / "adapter", peft / "sft")
    shutil.copytree(smoke.folder("reward") / "adapter", peft / "reward")
    shutil.copy(smoke.folder("reward") / "head" / "head.safetensors", peft / "reward")
    ids = {
        stage: json.loads((smoke.folder(stage) / "run.json").read_text())["mlflow_run_id"]
        for stage in ("sft", "reward")
    }
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "cache"))
    uri = f"tracking.uri=sqlite:///{smoke.output / 'mlflow.db'}"
    short = ("ppo.steps=1", uri)
    out = tmp_path / "out"
    folders, _ = given(cli, out, *(f"adapters.{s}={smoke.folder(s)}" for s in ids), *short)
    again, printed = given(cli, out, *(f"adapters.{s}={peft / s}" for s in ids), *short)
    assert again == folders
    assert "(cached)" in printed
    for form in ("runs:/{}", "runs:/{}/adapter"):
        again, printed = given(cli, out, *(f"adapters.{s}={form.format(i)}" for s, i in ids.items()), *short)
        assert again == folders
        assert "(cached)" in printed


def test_without_sft_the_base_is_policy_and_reference(smoke, cli, tmp_path):
    reward = f"adapters.reward={smoke.folder('reward')}"
    (folder,), out = given(cli, tmp_path / "out", "adapters.sft=base", reward, "ppo.steps=1")
    assert cli.runs(tmp_path / "out", "sft") == []
    assert "policy = base tiny + no sft adapter, trained on" in out
    assert "ref    = base tiny\n" in out
    record = json.loads((folder / "run.json").read_text())
    assert record["inputs"]["parents"]["sft"] == {"stage": "sft", "key": "base", "path": None}
    assert cli.lines(folder / "metrics.jsonl")[0]["objective/kl_max"] == 0


def test_evaluation_of_given_adapters(smoke, cli, tmp_path):
    words = [f"adapters.{stage}={smoke.folder(stage)}" for stage in ("sft", "reward", "ppo")]
    result = cli.call(
        "stage=eval",
        "model=tiny",
        "model.dtype=float32",
        "threads=1",
        "tracking=none",
        "eval.prompts=8",
        "eval.samples=2",
        "generation.max_new_tokens=12",
        f"output_dir={tmp_path / 'out'}",
        *words,
    )
    assert result.code == 0, result.err
    (folder,) = cli.runs(tmp_path / "out")
    ours, theirs = (
        json.loads((f / "eval.json").read_text())["policies"] for f in (folder, smoke.folder("eval"))
    )
    assert ours == theirs


def test_upstream_overrides_reach_the_stage(smoke, cli, tmp_path):
    result = cli.call(
        *cli.SHORT_PPO,
        f"adapters.sft={smoke.folder('sft')}",
        "upstream.reward={train: {steps: 2, batch_size: 4}, optim: {lr: 1e-3}, dataset: {limit: 20}}",
        f"output_dir={tmp_path / 'out'}",
    )
    assert result.code == 0, result.err
    (reward,) = cli.runs(tmp_path / "out", "reward")
    config = yaml.safe_load((reward / "config.yaml").read_text())
    assert (config["train"]["steps"], config["optim"]["lr"], config["dataset"]["limit"]) == (2, 1e-3, 20)
    assert json.loads((reward / "run.json").read_text())["metrics"]["data/pairs"] == 20


# ---------------------------------------------------------------- reproducible


UPSTREAM = (
    "upstream.sft={train: {steps: 2, batch_size: 4}}",
    "upstream.reward={train: {steps: 2, batch_size: 4}}",
)


def test_the_same_seed_gives_the_same_numbers_and_bytes(cli, tmp_path):
    """Also with dropout, whose noise must come from the seed."""
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        torch.manual_seed(len(str(output)))  # what ran before in the process does not count
        words = (*cli.SHORT_PPO, *UPSTREAM, "ppo.steps=2", "lora.dropout=0.1", f"output_dir={output}")
        assert cli.call(*words).code == 0
    for stage in ("sft", "reward", "ppo"):
        (one,), (two,) = (cli.runs(output, stage) for output in outputs)
        assert one.name == two.name
        assert cli.without_clock(one / "metrics.jsonl") == cli.without_clock(two / "metrics.jsonl")
        assert (one / "samples.jsonl").read_text() == (two / "samples.jsonl").read_text()
        files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
        assert files
        for file in files:
            assert (one / file).read_bytes() == (two / file).read_bytes()


def test_resume_never_starts_another_run(smoke, cli, tmp_path):
    words = [
        *cli.SHORT_PPO,
        f"output_dir={tmp_path / 'out'}",
        *(f"adapters.{stage}={smoke.folder(stage)}" for stage in ("sft", "reward")),
    ]
    for more in ((), (), ("resume=never",)):
        assert cli.call(*words, *more).code == 0
    first, second = cli.runs(tmp_path / "out", "ppo")
    assert second.name == f"{first.name}-2"
    assert cli.without_clock(first / "metrics.jsonl") == cli.without_clock(second / "metrics.jsonl")
    again = cli.call(*words)  # the newest is what later commands use
    assert named(second) in again.out


def test_without_tracking_there_is_no_store(smoke, cli, tmp_path):
    words = [f"adapters.{stage}={smoke.folder(stage)}" for stage in ("sft", "reward")]
    result = cli.call(*cli.SHORT_PPO, *words, f"output_dir={tmp_path / 'out'}")
    assert result.code == 0
    assert "MLflow" not in result.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ppo"]


def test_two_processes_build_a_stage_once(cli, tmp_path):
    words = ("stage=sft", "model=tiny", "threads=1", "tracking=none", "train.steps=20", "output_dir=out")
    command = [sys.executable, "-m", "rlhf_exp", *words]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    (folder,) = cli.runs(tmp_path / "out")
    assert len(cli.lines(folder / "metrics.jsonl")) == 20  # two writers would have interleaved
    RunFolder(folder).verify()
    assert sum("sft 20/20" in out for out in printed) == 1
    assert sum("reused" in out or "(cached)" in out for out in printed) == 1


# ---------------------------------------------------------------- failures


@pytest.fixture
def breaking(monkeypatch):
    """Make the second PPO iteration raise."""
    from rlhf_exp.stages import ppo

    iterate = ppo.iterate

    def make(error: BaseException) -> None:
        def broken(config, actors, optimizer, step, *arguments):
            if step == 2:
                raise error
            return iterate(config, actors, optimizer, step, *arguments)

        monkeypatch.setattr(ppo, "iterate", broken)

    return make


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [(RuntimeError("the sky fell"), 1, "FAILED"), (KeyboardInterrupt(), 130, "KILLED")],
    ids=["error", "Ctrl-C"],
)
def test_a_stage_that_stops(cli, tmp_path, breaking, monkeypatch, error, code, status):
    from mlflow import MlflowClient

    words = (*cli.SHORT_PPO, *UPSTREAM, "ppo.steps=3", "tracking.backend=mlflow", "output_dir=out")
    breaking(error)
    result = cli.call(*words)
    assert result.code == code
    assert ("the sky fell" in result.err) == (status == "FAILED")
    assert ("stopped by Ctrl-C" in result.err) == (status == "KILLED")
    records = cli.records(tmp_path / "out")
    (ppo,) = records["ppo"]
    assert ppo["status"] == status
    if status == "FAILED":
        assert ppo["error"].startswith("Traceback")
        assert "the sky fell" in ppo["error"]
    assert [record["status"] for stage in ("sft", "reward") for record in records[stage]] == ["FINISHED"] * 2
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/out/mlflow.db")
    run = client.get_run(ppo["mlflow_run_id"])
    assert run.info.status == status
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == status
    assert client.get_run(records["sft"][0]["mlflow_run_id"]).info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "objective/kl")) == 1
    artifacts = [item.path for item in client.list_artifacts(run.info.run_id)]
    assert ("traceback.txt" in artifacts) == (status == "FAILED")
    if status == "FAILED":
        text = Path(client.download_artifacts(run.info.run_id, "traceback.txt", str(tmp_path))).read_text()
        assert "the sky fell" in text
        # the same command goes on: what is finished is not trained again
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        again = cli.call(*words)
        assert again.code == 0, again.err
        assert plan(again.out) == {"sft": "cached", "reward": "cached", "ppo": "will be trained"}
        assert [record["status"] for record in cli.records(tmp_path / "out")["ppo"]] == ["FINISHED"]
        assert [r["step"] for r in cli.lines(cli.runs(tmp_path / "out", "ppo")[0] / "metrics.jsonl")] == [
            1,
            2,
            3,
        ]


def test_a_start_that_is_not_sft_fails_the_run(smoke, cli, tmp_path, monkeypatch):
    """The first iteration asserts it too, whatever the self-check looked at: here the reference is the plain base."""
    from rlhf_exp.stages import ppo

    build = ppo.build_actors

    def wrong(*arguments):
        actors = build(*arguments)
        actors.ref = None
        return actors

    monkeypatch.setattr(ppo, "build_actors", wrong)
    words = [f"adapters.{stage}={smoke.folder(stage)}" for stage in ("sft", "reward")]
    result = cli.call(*cli.SHORT_PPO, *words, "selfcheck=off", "output_dir=out")
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: PPO does not start where SFT ended")
    assert "Traceback" not in result.err
    assert [record["status"] for record in cli.records(tmp_path / "out")["ppo"]] == ["FAILED"]
