"""Bad input: one clear line for each problem, exit code 2, before anything loads, and no run folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from torch import zeros

TINY = ("model=tiny", "model.dtype=float32", "threads=1", "output_dir=out")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SKIP = "dataset.on_bad_row=skip leaves bad rows out and counts them"

pytestmark = pytest.mark.usefixtures("nothing_loads")


@pytest.fixture
def refused(cli, tmp_path, monkeypatch):
    """Calls the command line; it must refuse with these lines and leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> list[str]:
        result = cli.call(*words)
        assert result.code == 2, result.err
        assert result.out == ""
        assert all(line.startswith("error: ") for line in result.errors), result.err
        assert not list(tmp_path.glob("out/*/*")), "a run folder was made"
        return [line.removeprefix("error: ") for line in result.errors]

    return call


# ---------------------------------------------------------------- data


@pytest.fixture
def rows() -> list[str]:
    return [
        json.dumps(
            {"domain": "film", "opening": f"Film {i} was", "upbeat": f"good {i}.", "downbeat": f"bad {i}."}
        )
        for i in range(40)
    ]


def without_name(message: str) -> str:
    return message.replace(str(Path.cwd()), "HERE")


def test_a_missing_dataset_file(refused):
    (line,) = refused("stage=sft", *TINY, "dataset.views.demonstrations=nowhere/rows.jsonl")
    assert without_name(line) == (
        "dataset.views.demonstrations=nowhere/rows.jsonl: not found at HERE/nowhere/rows.jsonl, nor at "
        "RLHF_EXP_DATA (not set). Set dataset.views.demonstrations to a file or folder, or RLHF_EXP_DATA to the "
        "folder that holds rows.jsonl"
    )


def test_an_empty_dataset(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    (line,) = refused("stage=reward", *TINY, "dataset.views.comparisons=rows.jsonl")
    assert without_name(line) == "dataset.views.comparisons: HERE/rows.jsonl has no rows"


def test_a_row_without_a_field_and_one_that_is_not_json(refused, tmp_path, rows):
    row = json.loads(rows[6])
    del row["upbeat"]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:2], "{broken", *rows[3:6], json.dumps(row)]))
    found = [
        without_name(line) for line in refused("stage=ppo", *TINY, "dataset.views.comparisons=rows.jsonl")
    ]
    assert found[0].startswith("HERE/rows.jsonl:3: not JSON")
    assert found[1:] == [
        "HERE/rows.jsonl:7: no field 'upbeat' (has: domain, opening, downbeat)",
        SKIP,
    ]


def test_a_split_without_rows(refused, tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:1]))
    shares = ("dataset.validation_share=0.4", "dataset.heldout_share=0.4")
    (line,) = refused("stage=reward", *TINY, "dataset.views.comparisons=rows.jsonl", *shares)
    assert re.match(
        r"dataset\.views\.comparisons=rows\.jsonl: none of the 1 records falls into the \w+ split", line
    )


def test_a_template_without_its_placeholder(refused):
    (line,) = refused("stage=sft", *TINY, "dataset.template.prompt=abc")
    assert line == "dataset.template.prompt must hold {prompt} exactly once, got 'abc'"


# ---------------------------------------------------------------- adapters


@pytest.fixture
def copied(smoke, tmp_path):
    """Copies of the smoke run's SFT adapter (PEFT folder, run folder) and reward adapter, to be broken."""
    peft, run, reward = (tmp_path / name for name in ("peft", "run", "reward"))
    shutil.copytree(smoke.folder("sft") / "adapter", peft)
    shutil.copytree(smoke.folder("sft"), run)
    shutil.copytree(smoke.folder("reward") / "adapter", reward)
    shutil.copy(smoke.folder("reward") / "head" / "head.safetensors", reward)
    return SimpleNamespace(peft=peft, run=run, reward=reward)


@pytest.fixture
def refused_sft(refused):
    return lambda folder: refused("stage=ppo", *TINY, "reward_source=length", f"adapters.sft={folder}")


@pytest.fixture
def refused_reward(refused):
    return lambda folder: refused("stage=ppo", *TINY, "adapters.sft=base", f"adapters.reward={folder}")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_adapter_of_another_base(refused_sft, copied):
    edit(copied.peft / "base.json", hash="ab" * 32, name="llama7b")
    (line,) = refused_sft(copied.peft)
    assert re.fullmatch(
        rf"adapters\.sft={copied.peft}: it belongs to another base model \(llama7b, abababababab\), this one is "
        r"tiny-\w+ \([0-9a-f]{12}\); set model= to the adapter's base",
        line,
    )


def test_a_sound_adapter_is_taken(copied, cli, tmp_path, monkeypatch):
    """The other tests would pass if every adapter were refused."""
    monkeypatch.chdir(tmp_path)
    (copied.peft / "base.json").unlink()  # as of PEFT itself
    words = [f"adapters.sft={copied.peft}", f"adapters.reward={copied.reward}", "dry_run=true"]
    result = cli.call("stage=ppo", *TINY, *words)
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_an_unreadable_note_of_the_base(refused_sft, copied, text):
    (copied.peft / "base.json").write_text(text)
    (line,) = refused_sft(copied.peft)
    assert line.startswith(f"adapters.sft={copied.peft}: base.json cannot be read: ")


def test_a_foreign_adapter_of_other_shapes(refused_sft, copied):
    (copied.peft / "base.json").unlink()
    weights = load_file(copied.peft / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(weights | {name: zeros(16, 4096)}, copied.peft / WEIGHTS)
    (line,) = refused_sft(copied.peft)
    assert line == (
        f"adapters.sft={copied.peft}: it belongs to another base model: {name} is (16, 4096), the base's weight is "
        "(64, 64)"
    )
    save_file({k.replace("q_proj", "W_pack"): v for k, v in weights.items()}, copied.peft / WEIGHTS)
    (line,) = refused_sft(copied.peft)
    assert line == (
        f"adapters.sft={copied.peft}: it belongs to another base model: this one has no "
        "model.layers.0.self_attn.W_pack"
    )


def test_a_foreign_adapter_that_is_not_whole(refused_sft, copied):
    weights = load_file(copied.peft / WEIGHTS)
    save_file({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, copied.peft / WEIGHTS)
    (line,) = refused_sft(copied.peft)
    assert line == (
        f"adapters.sft={copied.peft}: {WEIGHTS} is not whole: it has no LoRA weights A and B of "
        "model.layers.1.mlp.down_proj"
    )
    edit(copied.peft / CONFIG, target_modules=["q_proj"], layers_to_transform=[0])
    one = {k: v for k, v in weights.items() if "layers.0.self_attn.q_proj" in k}
    save_file({k: v for k, v in one.items() if "lora_B" not in k}, copied.peft / WEIGHTS)
    (line,) = refused_sft(copied.peft)
    assert line.endswith("it has no LoRA weights A and B of model.layers.0.self_attn.q_proj")


def test_an_adapter_of_another_rank_than_it_says(refused_sft, copied):
    edit(copied.peft / CONFIG, r=8)
    (line,) = refused_sft(copied.peft)
    assert re.search(r"lora_A\.weight is \(16, \d+\), but r in adapter_config\.json is 8$", line)


def test_an_adapter_that_is_no_plain_lora(refused_sft, copied):
    weights = load_file(copied.peft / WEIGHTS)
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file(weights | {extra: zeros(64)}, copied.peft / WEIGHTS)
    assert refused_sft(copied.peft) == [
        f"adapters.sft={copied.peft}: it holds {extra}: only adapters of plain LoRA and of DoRA are supported"
    ]
    edit(copied.peft / CONFIG, peft_type="IA3")
    assert refused_sft(copied.peft) == [
        f"adapters.sft={copied.peft}: the adapter is of type IA3, only LORA is supported"
    ]


def test_a_truncated_adapter(refused_sft, copied):
    content = (copied.peft / WEIGHTS).read_bytes()
    (copied.peft / WEIGHTS).write_bytes(content[:-10])
    assert refused_sft(copied.peft) == [
        f"{copied.peft / WEIGHTS} is not a sound safetensors file: it has {len(content) - 10} bytes, its header "
        f"says {len(content)}"
    ]


def test_a_flipped_byte_in_a_run_folder(refused_sft, copied):
    path = copied.run / "adapter" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert refused_sft(copied.run) == [
        f"{path} has other content than when the run finished (sha256 differs): delete {copied.run} to build it "
        "again, or run with resume=never"
    ]


def test_a_flipped_byte_in_a_cached_run(smoke, cli, tmp_path):
    """Not only in what is given: what the plan finds by its key is verified too."""
    shutil.copytree(smoke.output, tmp_path / "copy", ignore=shutil.ignore_patterns("mlflow*", "mlartifacts"))
    path = tmp_path / "copy" / "reward" / smoke.folder("reward").name / "head" / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = cli.call(*cli.SMOKE, "tracking=none", f"output_dir={tmp_path / 'copy'}")
    assert (result.code, result.out) == (2, "")
    (line,) = result.errors
    assert line.startswith(f"error: {path} has other content than when the run finished")


def test_a_run_that_did_not_finish(refused_sft, copied):
    edit(copied.run / "run.json", status="FAILED")
    (line,) = refused_sft(copied.run)
    assert line.startswith(f"{copied.run} is not a finished run (status FAILED)")


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda folder: shutil.rmtree(folder), "adapters.sft=peft: there is no such folder"),
        (
            lambda folder: [path.unlink() for path in folder.iterdir()],
            f"adapters.sft=peft: no {CONFIG} in it: it is neither a run folder nor a PEFT folder",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), f"peft/{WEIGHTS} is missing"),
    ],
    ids=["folder", "config", "weights"],
)
def test_an_adapter_that_is_not_there(refused_sft, copied, break_it, problem):
    break_it(copied.peft)
    assert refused_sft("peft") == [problem]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("stage=probe",), "reward"),
        (("stage=export", "export.role=reward"), "reward"),
        (("stage=dpo",), "sft"),
        (("stage=prefer", "prefer.labellers=[learned]"), "labeller"),
        (("stage=prefer", "prefer.policies=[ppo]"), "ppo"),
        (("stage=reward", "dataset.comparisons_from=prefer"), "labeller"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_adapter_that_is_not_there_is_not_also_one_too_many(refused, words, key):
    """The stage does stand on it: no second line may say to leave it out."""
    assert refused(*words, *TINY, f"adapters.{key}=nowhere") == [
        f"adapters.{key}=nowhere: there is no such folder"
    ]


def test_an_mlflow_run_that_is_not_there(refused_sft, smoke, refused):
    (line,) = refused_sft("runs:/0123")
    assert without_name(line) == (
        "runs:/0123/adapter: there is no MLflow database HERE/out/mlflow.db; set tracking.uri to where the run is"
    )
    uri = f"sqlite:///{smoke.output}/mlflow.db"
    words = ("reward_source=length", "adapters.sft=runs:/0123", f"tracking.uri={uri}")
    assert refused("stage=ppo", *TINY, *words) == [
        f"runs:/0123/adapter: {uri} has no run 0123; set tracking.uri to where it is"
    ]


def test_a_reward_model_is_no_policy(refused_sft, smoke, copied):
    """By the record of its run, or by what PEFT saves of a classifier."""
    line = "it is a reward model, which gives scores; here goes a policy, such as one of stage=sft"
    reward = smoke.folder("reward")
    assert refused_sft(reward) == [f"adapters.sft={reward}: {line}"]
    edit(copied.peft / CONFIG, task_type="SEQ_CLS")
    assert refused_sft(copied.peft) == [f"adapters.sft={copied.peft}: {line}"]


def test_a_folder_that_cannot_be_read(refused_sft, copied, monkeypatch):
    asked = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != copied.peft and asked(path, mode))
    assert refused_sft(copied.peft) == [
        f"adapters.sft={copied.peft}: the folder cannot be read: permission denied"
    ]


def test_a_reward_adapter_without_a_sound_head(refused_reward, copied):
    assert refused_reward(copied.run) == [
        f"adapters.reward={copied.run}: no head.safetensors with the adapter: it is not a reward model"
    ]
    head = copied.reward / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-2])
    (line,) = refused_reward(copied.reward)
    assert line.startswith(f"{head} is not a sound safetensors file")
    save_file({"weight": zeros(32), "bias": zeros(())}, head)
    (line,) = refused_reward(copied.reward)
    assert "is not a head for hidden states of size 64" in line
    head.unlink()
    assert refused_reward(copied.reward) == [
        f"adapters.reward={copied.reward}: no head.safetensors with the adapter: it is not a reward model"
    ]


# ---------------------------------------------------------------- the machine


def test_an_output_folder_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for tracking in ("none", "mlflow"):
        (line,) = refused("stage=sft", *TINY, "output_dir=file/out", f"tracking={tracking}")
        assert without_name(line) == (
            "cannot write to HERE/file/out: HERE/file is a file, not a folder; set output_dir to another"
        )


def test_no_disk_space(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1e9, used=1e9, free=5e6))
    (line,) = refused("stage=ppo", *TINY)
    assert re.match(
        r"not enough disk space for \S+/out: 0\.1\d GB needed, 0\.01 GB free; free some \(.* gc .*\)", line
    )


def test_a_tracking_server_that_does_not_answer(refused):
    for stage in ("sft", "ppo"):
        lines = refused_after_plan(refused, f"stage={stage}", *TINY, "tracking.uri=http://127.0.0.1:9")
        assert lines == [
            "tracking: cannot use http://127.0.0.1:9 (Connection refused); choose another tracking.uri, or run with "
            "tracking=none"
        ]


def refused_after_plan(refused, *words: str) -> list[str]:
    """As `refused`, for what is only tried after the plan is printed."""
    from rlhf_exp.stages import pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "say", lambda line: None)
        return refused(*words)


def test_a_tracking_uri_that_is_a_folder(refused):
    (line,) = refused_after_plan(refused, "stage=sft", *TINY, "tracking.uri=./mlruns")
    assert line.startswith(
        "tracking.uri=./mlruns is a folder, and MLflow keeps runs in a database or a server"
    )


# ---------------------------------------------------------------- models


def test_a_model_that_is_not_fetched(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "cache"))
    assert refused("stage=sft", "model=smollm2_135m", "output_dir=out") == [
        "model smollm2_135m is not fetched: run `python -m rlhf_exp.fetch smollm2_135m` once"
    ]


def test_a_model_path_of_nowhere(refused, tmp_path):
    assert refused("stage=sft", *TINY, "model.path=/no/where") == [
        "model.path=/no/where: there is no such folder"
    ]
    (tmp_path / "folder").mkdir()
    assert refused("stage=sft", *TINY, "model.path=./folder") == [
        "model.path=./folder is no model folder: it has no config.json"
    ]


def test_a_hub_model_offline(refused):
    (line,) = refused("stage=ppo", "model=baichuan7b", "output_dir=out")
    assert line.startswith(
        "model baichuan-inc/Baichuan-7B is not on this machine and could not be downloaded ("
    )
    assert line.endswith("set model.path to a local folder, or HF_HOME to a cache that has it")


def test_an_adapter_whose_initialisation_changes_the_base(refused_sft, copied):
    """PiSSA takes the adapter's start out of the base's weights, which here belong to all roles."""
    edit(copied.peft / CONFIG, init_lora_weights="pissa")
    (line,) = refused_sft(copied.peft)
    assert line.startswith(
        f"adapters.sft={copied.peft}: it was initialised by pissa, which changes the base's weights"
    )


def test_more_tokens_than_the_model_has_positions_for(refused):
    assert refused("stage=sft", *TINY, "dataset.max_prompt_tokens=2030") == [
        "dataset.max_prompt_tokens=2030 + dataset.max_response_tokens=32 = 2062 tokens, but model tiny has positions "
        "for 2048: lower one of the two"
    ]


def test_targets_that_the_model_does_not_have(refused):
    (line,) = refused("stage=sft", *TINY, "lora.targets=[q_proj,W_pack]")
    assert line == (
        "lora.targets: model tiny has no module W_pack (it has: down_proj, embed_tokens, gate_proj, k_proj, o_proj, "
        "q_proj, up_proj, v_proj)"
    )


# ---------------------------------------------------------------- several at once


def test_all_that_cannot_be_found_is_said_at_once(refused):
    found = refused(
        "stage=ppo",
        *TINY,
        "model.path=/no/where",
        "adapters.sft=nowhere",
        "dataset.views.prompts=x/prompts.jsonl",
        "dataset.views.comparisons=x/pairs.jsonl",
    )
    assert [line.partition(":")[0] for line in found] == [
        "adapters.sft=nowhere",
        "model.path=/no/where",
        "dataset.views.comparisons=x/pairs.jsonl",
        "dataset.views.prompts=x/prompts.jsonl",
    ]


def test_all_that_does_not_fit_is_said_at_once(refused, tmp_path, rows, copied, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:2], "[1, 2]"]))
    edit(copied.peft / "base.json", hash="ab" * 32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    found = refused(
        "stage=ppo",
        *TINY,
        "dataset.views.comparisons=rows.jsonl",
        "upstream.reward={lora: {targets: [nope]}}",
        f"adapters.sft={copied.peft}",
    )
    assert len(found) == 5
    for line, part in zip(
        found,
        ("another base model", "rows.jsonl:3: must be an object", SKIP, "no module nope", "disk space"),
        strict=True,
    ):
        assert part in line


def test_an_upstream_typo_costs_nothing(refused):
    (line,) = refused("stage=ppo", *TINY, "upstream.reward={optim: {lrr: 1}}")
    assert line.startswith("upstream.reward: unknown key optim.lrr")
    assert "did you mean optim.lr" in line


# ---------------------------------------------------------------- dry_run


@pytest.mark.parametrize("model", ["tiny", "baichuan7b"])
@pytest.mark.parametrize("stage", ["ppo", "pipeline"])
def test_a_dry_run_prints_and_makes_nothing(cli, tmp_path, monkeypatch, model, stage):
    monkeypatch.chdir(tmp_path)
    result = cli.call(f"stage={stage}", f"model={model}", "model.dtype=bfloat16", "dry_run=true")
    assert (result.code, result.err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    out = result.out
    assert f"policy = base {model} + sft " in out
    assert f"ref    = base {model} + sft " in out
    assert f"reward = base {model} + reward " in out
    assert "critic = head on the policy's trunk" in out
    trained = ["sft", "reward", "ppo"] + (["eval"] if stage == "pipeline" else [])
    assert re.findall(r"^stage    (\w+) [0-9a-f]{6} \(will be trained\)$", out, re.M) == trained
    if model == "baichuan7b":
        # 7e9 parameters of two bytes; r=16 on W_pack of 4096 x 12288: 32 layers x 16 x (4096 + 12288) of 4 bytes
        assert re.search(r"^base +│ parameters +│ always +│ +14.00 GB *$", out, re.M)
        assert re.search(r"^policy +│ parameters +│ always +│ +34 MB *$", out, re.M)
        assert "four separate models: 56.00 GB for their weights, the one base here 14.00 GB" in out


def test_a_dry_run_finds_bad_input_too(refused):
    (line,) = refused("stage=ppo", *TINY, "dry_run=true", "dataset.views.prompts=x/prompts.jsonl")
    assert line.startswith("dataset.views.prompts=x/prompts.jsonl: not found")
