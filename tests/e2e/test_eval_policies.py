"""stage=eval with eval.policies and a judge on the smoke experiment's runs: what comes out, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def words(smoke):
    """An evaluation on the experiment's own SFT and reward runs."""
    return (
        "stage=eval",
        "model=tiny",
        "model.dtype=float32",
        "threads=1",
        "eval.prompts=6",
        "generation.max_new_tokens=8",
        f"adapters.sft={smoke.folder('sft')}",
        f"adapters.reward={smoke.folder('reward')}",
    )


@pytest.fixture
def evaluated(cli, smoke, words, tmp_path):
    """evaluated(*words) -> (eval.json, run.json) of a run in an output folder of its own."""

    def call(*more: str, output=tmp_path / "out") -> tuple[dict, dict]:
        result = cli.call(*words, f"output_dir={output}", *more)
        assert result.code == 0, result.out + result.err
        folder = max(cli.runs(output, "eval"), key=lambda path: (path / "run.json").stat().st_mtime)
        return json.loads((folder / "eval.json").read_text()), json.loads((folder / "run.json").read_text())

    return call


def test_checkpoints_of_a_run_beside_sft_and_base(evaluated, smoke, cli, tmp_path):
    """Nothing is trained; names are of stage and key; each has a win rate; MLflow has tables and metrics."""
    ppo = smoke.folder("ppo")
    name = f"ppo {ppo.name[:6]}"
    found, record = evaluated(f"eval.policies=[sft,base,{ppo}@2,{ppo}@3]", "eval.judge=learned")
    assert [p["name"] for p in found["policies"]] == ["sft", "base", f"{name}@2", f"{name}@3"]
    assert [p["step"] for p in found["policies"]] == [0, None, 2, 3]
    assert cli.runs(tmp_path / "out", "ppo") == [] and cli.runs(tmp_path / "out", "sft") == []
    assert all(0 <= p["metrics"]["win_rate"] <= 1 for p in found["policies"][1:])
    assert {"base/win_rate", "base/kl", f"ppo_{ppo.name[:6]}_3/reward", "last/reward"} <= set(
        record["metrics"]
    )
    assert record["inputs"]["parents"]["compared_2"]["path"]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    listed = {artifact.path for artifact in client.list_artifacts(record["mlflow_run_id"])}
    assert {"policies.json", "samples.json", "eval.json", "report"} <= listed
    table = json.loads(Path(client.download_artifacts(record["mlflow_run_id"], "policies.json")).read_text())
    assert {"policy", "win_rate", "gold"} <= set(table["columns"])


def test_the_same_command_is_found_and_another_name_is_not(cli, words, smoke, tmp_path):
    ppo, output = smoke.folder("ppo"), f"output_dir={tmp_path / 'out'}"
    first = (*words, output, "tracking=none", f"eval.policies=[sft,{ppo}@2]")
    assert cli.call(*first).code == 0
    (folder,) = cli.runs(tmp_path / "out", "eval")
    assert cli.call(*first).code == 0
    moved = shutil.copytree(ppo, tmp_path / "elsewhere")
    assert cli.call(*first[:-1], f"eval.policies=[sft,{moved}@2]").code == 0
    assert cli.runs(tmp_path / "out", "eval") == [folder]
    assert cli.call(*first[:-1], f'eval.policies=[sft,"two={ppo}@2"]').code == 0
    assert len(cli.runs(tmp_path / "out", "eval")) == 2


def test_a_local_model_judges(evaluated, tiny_path, tmp_path):
    judge = shutil.copytree(tiny_path, tmp_path / "critic")
    given = ("tracking=none", "eval.policies=[sft,base]", "eval.judge=model", f"judge.model={judge}")
    found, _ = evaluated(*given)
    metrics = found["policies"][1]["metrics"]
    assert found["judge"] == {
        "by": "the model critic, which reads each pair in both orders",
        "against": "sft",
    }
    assert metrics["win_rate_ties"] == pytest.approx(1 - metrics["judge_consistent"])


# ---------------------------------------------------------------- refusals


@pytest.fixture
def refused(cli, words, tmp_path, nothing_loads):
    def call(*more: str, without: tuple[str, ...] = ()) -> str:
        kept = [word for word in words if not word.startswith(without or ("-",))]
        result = cli.call(*kept, f"output_dir={tmp_path / 'out'}", *more)
        assert result.code == 2, result.out + result.err
        assert len(result.errors) == 1, result.err
        assert not list(tmp_path.glob("out/*/*"))
        return result.errors[0].removeprefix("error: ")

    return call


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            ("eval.policies=[sfft]",),
            r"eval.policies\[0\]=sfft: there is no such policy or folder; did you mean sft\?",
        ),
        (("eval.policies=[sft,sft]",), "eval.policies has the same policy twice: sft, sft"),
        (("eval.judge=model",), "eval.judge=model needs judge.model: a folder or hub id .*"),
        (("eval.judge=model", "judge.model=./nowhere"), "judge.model=./nowhere: there is no such folder"),
        (("judge.model=base",), "judge.model=base is for eval.judge=model, which is none: .*"),
        (("eval.judge=lerned",), "eval.judge=lerned: there is no function lerned; did you mean learned.*"),
        (("eval.judge=modl",), "eval.judge=modl: there is no function modl; did you mean model.*"),
        (("eval.judge=gold", "eval.gold=none"), "eval.judge=gold compares by eval.gold, which is none: .*"),
        (("eval.against=sft",), "eval.against=sft is for win rates, which eval.judge makes: .*"),
        (
            ("eval.policies=[base]", "eval.judge=length", "eval.against=sft"),
            "eval.against=sft: no policy of this evaluation is called that; there are base",
        ),
        (
            ("eval.policies=[sft,ppo@7]",),
            r"eval.policies\[1\]=ppo@7: step 7 will not be kept: ppo.save_every=.*",
        ),
        (("eval.encoder=./nowhere",), "eval.encoder=./nowhere: .*is no model folder.*"),
    ],
)
def test_what_cannot_be_is_one_line(refused, given, line):
    assert re.fullmatch(line, refused(*given))


def test_an_adapter_of_another_base(refused, smoke, tmp_path):
    foreign = shutil.copytree(smoke.folder("ppo") / "adapter", tmp_path / "foreign")
    (foreign / "base.json").write_text(json.dumps({"hash": "0" * 64, "name": "other"}))
    line = refused(f"eval.policies=[sft,{foreign}]")
    assert line.startswith(
        f"eval.policies[1]={foreign}: it belongs to another base model (other, 000000000000)"
    )


def test_a_folder_that_is_sft_again_and_a_reward_model(refused, smoke):
    assert "names a policy twice, as sft and as sft " in refused(f"eval.policies=[sft,{smoke.folder('sft')}]")
    assert "is a reward model" in refused(f"eval.policies=[sft,{smoke.folder('reward')}]")


def test_sft_is_not_trained_for_others_unless_it_is_named(refused, smoke):
    line = refused(f"eval.policies=[base,{smoke.folder('ppo')}@2]", without=("adapters.sft",))
    assert line.startswith(
        "eval.policies does not name sft, which KL is measured from and which is not trained yet"
    )
