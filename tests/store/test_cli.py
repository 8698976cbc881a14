"""python -m rlhf_exp.store: ls, show, diff, gc."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rlhf_exp.store import gc, locks
from rlhf_exp.store.__main__ import main
from rlhf_exp.store.locks import build_lock
from rlhf_exp.store.runs import find


@pytest.fixture
def cli(outputs, capsys):
    """cli("ls") -> (exit code, what it printed, errors)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(["--dir", str(outputs), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def store(make_run):
    """sft a, reward b (of a), ppo c (of a and b), eval d (of c); a failed ppo e (of a); a killed sft f."""
    sft = make_run("sft", "aa", metrics={"loss": 1.25, "nested": {"x": 7}})
    reward = make_run("reward", "bb", {"policy": sft}, metrics={"accuracy": 0.9})
    ppo = make_run("ppo", "cc", {"sft": sft, "reward": reward}, metrics={"gold": 0.61234567, "kl": 5.5})
    evaluation = make_run("eval", "dd", {"ppo": ppo})
    failed = make_run("ppo", "ee", {"sft": sft}, end="FAILED")
    killed = make_run("sft", "ff", end="KILLED")
    return {"sft": sft, "reward": reward, "ppo": ppo, "eval": evaluation, "failed": failed, "killed": killed}


def names(outputs: Path) -> set[str]:
    return {path.name[:2] for path in outputs.glob("*/*") if not path.name.startswith(".")}


def row(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


# ---- ls


def test_a_store_that_cannot_be_read_is_no_empty_one(cli, store, outputs, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != outputs)
    assert cli("ls") == (2, "", f"error: {outputs} cannot be read: permission denied\n")


def test_ls_shows_each_run_on_a_line(cli, store):
    code, out, _ = cli("ls")
    assert code == 0 and "6 runs" in out
    assert [line.split()[0] for line in out.splitlines()[1:7]] == [
        "eval",
        "ppo",
        "ppo",
        "reward",
        "sft",
        "sft",
    ]
    line = row(out, "ppo     cccccccccccc")
    assert "FINISHED" in line and "tiny float32" in line and "sft aaaaaa, reward bbbbbb" in line
    assert "gold 0.6123, kl 5.5" in line
    assert re.search(r" 2\d{3}-\d\d-\d\d \d\d:\d\d ", line)
    assert "loss 1.25, nested.x 7" in row(out, "sft     aaaaaaaaaaaa")
    assert "FAILED" in row(out, "ppo     eeeeeeeeeeee") and "KILLED" in row(out, "sft     ffffffffffff")


def test_ls_tells_a_living_run_from_a_dead_one(cli, make_run, outputs):
    living, dead = make_run("sft", "aa", end=None), make_run("sft", "bb", end=None)
    (outputs / "sft" / ("c" * 12)).mkdir()
    (make_run("sft", "dd").path / "run.json").write_text("{")
    with build_lock(living.path):
        out = cli("ls")[1]
    assert "RUNNING" in row(out, "sft    aaaaaaaaaaaa") and "STOPPED" in row(out, "sft    bbbbbbbbbbbb")
    assert "EMPTY" in row(out, "sft    cccccccccccc") and "CORRUPT" in row(out, "sft    dddddddddddd")
    assert dead.status == "RUNNING"


def test_ls_leaves_other_folders_out(cli, make_run, outputs):
    """MLflow keeps its experiments (0, 1 ...) and runs (32 hex digits) beside ours."""
    make_run("sft", "aa")
    for path in ("mlruns/0", f"mlruns/{'ab' * 16}", f".hidden/{'a' * 12}", "sft/notes"):
        (outputs / path).mkdir(parents=True)
    assert "1 runs" in cli("ls")[1]


def test_no_store(tmp_path, capsys):
    assert main(["--dir", str(tmp_path / "none"), "ls"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: no such folder: {tmp_path / 'none'}; give the runs' folder with --dir\n"
    )
    assert main(["ls", "--dir", str(tmp_path)]) == 0  # the option may follow the command
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"


def test_as_a_program(outputs, make_run):
    make_run("sft", "aa")
    command = [sys.executable, "-m", "rlhf_exp.store"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def call(*arguments):
        return subprocess.run(
            [*command, *arguments],
            cwd=outputs.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    done = call("ls")  # outputs/ is the default
    assert done.returncode == 0 and "aaaaaaaaaaaa" in done.stdout
    done = call("show", "77")
    assert done.returncode == 2 and done.stderr.startswith("error: no run 77 in outputs")
    assert call("rm").returncode == 2


# ---- show


def test_show(cli, store):
    code, out, _ = cli("show", "cc")
    words = [line.split() for line in out.splitlines()]
    assert code == 0
    for expected in (
        ["key", "cc" * 32],
        ["status", "FINISHED"],
        ["base.hash", "ba" * 32],
        ["seed", "0"],
        ["gold", "0.6123"],
    ):
        assert expected in words
    assert ["files", "3", "files,", "verified"] in words
    tree = out[out.index("parents") :].splitlines()
    assert tree[1] == "ppo cccccccccccc"
    assert tree[2].startswith("├── sft = sft aaaaaaaaaaaa: FINISHED")
    assert tree[3].startswith("└── reward = reward bbbbbbbbbbbb: FINISHED")
    assert tree[4].startswith("    └── policy = sft aaaaaaaaaaaa: FINISHED")


def test_show_says_what_is_damaged_and_which_parent_is_gone(cli, store):
    os.truncate(store["ppo"].path / "adapter" / "adapter_model.safetensors", 3)
    store["reward"].path.rename(store["reward"].path.with_name("moved"))
    out = cli("show", "ppo/c")[1]
    assert "adapter_model.safetensors is truncated (3 bytes" in out.replace("\n", " ")
    assert "reward = reward bbbbbbbbbbbb: not in" in out
    assert "ValueError: no" in cli("show", "ee")[1]


def test_show_by_folder(cli, store):
    assert "aa" * 32 in cli("show", str(store["sft"].path))[1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("77", "no run 77 in {outputs}: python -m rlhf_exp.store --dir {outputs} ls shows what is there"),
        ("reward/aa", "no run reward/aa in"),
        ("", "no run  in"),
        ("aaaaaaaaaaaa-", "aaaaaaaaaaaa- can mean sft/aaaaaaaaaaaa-2, sft/aaaaaaaaaaaa-3: give more of it"),
        ("a", "a can mean sft/aaaaaaaaaaaa, sft/aaaaaaaaaaaa-2, sft/aaaaaaaaaaaa-3: give more of it"),
    ],
)
def test_unknown_and_ambiguous_names(cli, store, make_run, outputs, text, line):
    make_run("sft", "aa", resume="never")
    make_run("sft", "aa", resume="never")
    code, out, err = cli("show", text)
    assert code == 2 and out == ""
    assert err.startswith("error: " + line.format(outputs=outputs)) and err.count("\n") == 1


def test_a_whole_folder_name_is_never_ambiguous(cli, make_run):
    make_run("sft", "aa")
    make_run("sft", "aa", resume="never")
    for name in ("aaaaaaaaaaaa", "aaaaaaaaaaaa-2"):
        assert f"sft/{name}\n" in cli("show", f"sft/{name}")[1]


# ---- diff


def test_diff_lists_exactly_what_differs(cli, make_run, store):
    one = make_run("ppo", "11", {"sft": store["sft"], "reward": store["reward"]}, end=None)
    two = make_run(
        "ppo",
        "22",
        {"sft": store["killed"], "reward": store["reward"]},
        end=None,
        data={"prompts": "db" * 32},
    )
    config = "stage: ppo\nthreads: {}\nppo: {{kl_coef: {}, gamma: 1.0}}\nlora: {{targets: [q]}}\n{}"
    one.write_text("config.yaml", config.format(1, 0.05, "model: {licence: ''}\nupstream: {sft: {}}\n"))
    two.write_text(
        "config.yaml", config.format(2, 0.050001, "model: {licence: 'a '}\nupstream: {sft: {seed: 1}}\n")
    )
    git = {"commit": "c0ffee", "dirty": False}
    one.write_json(
        "versions.json", {"rlhf_exp": "0.1.0", "git": git, "packages": {"torch": "2.13.0", "trl": "1"}}
    )
    two.write_json(
        "versions.json", {"rlhf_exp": "0.1.0", "git": None, "packages": {"torch": "2.14.0", "trl": "1"}}
    )
    code, out, _ = cli("diff", "11", "22")
    table = out[: out.index("\n\n")].splitlines()
    assert code == 0
    assert [line.split() for line in table[1:]] == [
        ["config", "threads", "1", "2", "no"],
        ["config", "ppo.kl_coef", "0.05", "0.050001", "yes"],
        ["config", "model.licence", "''", "'a", "'", "no"],
        ["config", "upstream.sft.seed", "-", "1", "no"],
        ["data", "prompts", "da" * 32, "db" * 32, "yes"],
        ["parents", "sft", "sft/aaaaaaaaaaaa", "sft/ffffffffffff", "yes"],
        ["versions", "git.commit", "c0ffee", "-", "no"],
        ["versions", "git.dirty", "False", "-", "no"],
        ["versions", "packages.torch", "2.13.0", "2.14.0", "no"],
    ]
    assert "the sft parents differ: python -m rlhf_exp.store diff sft/aaaaaaaaaaaa sft/ffffffffffff" in out


@pytest.mark.parametrize(("full", "counts"), [(("true", "true"), "no"), (("false", "true"), "yes")])
def test_diff_of_runs_that_train_all_weights(cli, make_run, full, counts):
    """The adapter's shape is no input of theirs."""
    for name, rank, value in zip(("11", "22"), (4, 8), full, strict=True):
        run = make_run("sft", name, end=None)
        run.write_text("config.yaml", f"stage: sft\nlora: {{r: {rank}, full: {value}}}\nseed: {name}\n")
    rows = [line.split() for line in cli("diff", "11", "22")[1].splitlines()]
    assert ["config", "lora.r", "4", "8", counts] in rows
    assert ["config", "seed", "11", "22", "yes"] in rows


def test_diff_of_equals_and_of_stages(cli, make_run, store):
    make_run("sft", "99")
    code, out, _ = cli("diff", "99", "aa")
    assert code == 0 and out == (
        "sft/999999999999 and sft/aaaaaaaaaaaa: same stage, config, base, data, parents and versions\n"
    )
    out = cli("diff", "aa", "bb")[1].splitlines()
    assert out[1].split() == ["stage", "stage", "sft", "reward", "yes"]
    assert cli("diff", "aa", "77")[0] == 2


# ---- gc


def age(folder, days: float) -> None:
    """Let a run have ended that many days ago."""
    folder.update(ended=(datetime.now(UTC) - timedelta(days=days)).isoformat())


def test_gc_shows_and_deletes_nothing_by_default(cli, store, outputs):
    (store["ppo"].path / ".adapter.1-aa.tmp").mkdir()
    (store["ppo"].path / ".adapter.1-aa.tmp" / "w").write_bytes(b"x" * 2500)
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}
    for options in ([], ["--dry-run"]):
        code, out, _ = cli("gc", *options)
        assert code == 0 and "nothing is deleted yet: add --delete" in out
        lines = [line.split() for line in out.splitlines()[1:4]]
        assert [line[0] for line in lines] == [
            "ppo/cccccccccccc/.adapter.1-aa.tmp",
            "ppo/eeeeeeeeeeee",
            "sft/ffffffffffff",
        ]
        assert lines[0][1:] == ["2.5", "kB", "leftover", "of", "a", "crash"]
        assert [line[-1] for line in lines[1:]] == ["failed", "killed"]
        assert {path: path.stat().st_mtime_ns for path in outputs.rglob("*")} == before


def test_gc_deletes_what_it_showed(cli, store, outputs):
    (store["ppo"].path / ".adapter.1-aa.tmp").mkdir()
    (outputs / "sft" / f".{'0' * 12}.1-aa.tmp").mkdir()  # a deletion that was killed
    (outputs / ".rlhf_exp-0a.tmp").touch()
    (outputs / "sft" / ".mine.tmp").touch()
    code, out, _ = cli("gc", "--delete")
    assert code == 0 and "freed" in out and "stays" not in out
    assert names(outputs) == {"aa", "bb", "cc", "dd"}
    hidden = sorted(p.name for p in outputs.rglob(".*") if p.name != ".locks")
    assert hidden == [".mine.tmp"]
    for stage, pair in (("sft", "aa"), ("reward", "bb"), ("ppo", "cc"), ("eval", "dd")):
        assert find(outputs, stage, pair * 32)
    assert cli("gc", "--delete")[1] == "nothing can go\n"


def test_gc_spares_what_a_process_builds_and_its_parents(cli, make_run, outputs):
    sft, unused = make_run("sft", "aa"), make_run("sft", "bb")
    living = make_run("ppo", "cc", {"sft": sft}, end=None)
    stopped = make_run("ppo", "dd", {"sft": unused}, end=None)
    (living.path / ".adapter.1-aa.tmp").mkdir()
    for run in (sft, unused):
        age(run, 100)
    with build_lock(living.path):
        (living.path / ".adapter.1-aa.tmp").mkdir()
        assert [c.path.name[:2] for c in gc.plan(outputs, unused_days=30)] == ["dd", "bb"]
        assert cli("gc", "--delete", "--unused")[0] == 0
        assert (living.path / ".adapter.1-aa.tmp").is_dir()
    assert names(outputs) == {"aa", "cc"} and stopped.path.name.startswith("dd")


def test_gc_unused_takes_only_old_runs_that_are_no_parent(cli, make_run, outputs):
    sft, lonely, young = make_run("sft", "aa"), make_run("sft", "bb"), make_run("sft", "cc")
    ppo = make_run("ppo", "dd", {"sft": sft})
    for run in (sft, lonely):
        age(run, 31)
    age(young, 29)
    age(ppo, 29)
    assert cli("gc", "--delete")[1] == "nothing can go\n"
    code, out, _ = cli("gc", "--unused")
    assert code == 0 and "sft/bbbbbbbbbbbb" in out and "parent of nothing" in out
    cli("gc", "--unused", "--delete")
    assert names(outputs) == {"aa", "cc", "dd"}
    # one generation a call: sft aa is still a parent while this one removes ppo dd
    cli("gc", "--unused", "--days", "28", "--delete")
    assert names(outputs) == {"aa"}
    assert young.path.exists() is False
    cli("gc", "--unused", "--days", "28", "--delete")
    assert names(outputs) == set()


def test_gc_protects_every_run_with_a_parents_key(cli, make_run, outputs):
    first = make_run("sft", "aa")
    second = make_run("sft", "aa", resume="never")
    make_run("ppo", "bb", {"sft": second})
    for run in (first, second):
        age(run, 100)
    assert cli("gc", "--unused")[1] == "nothing can go\n"


@pytest.mark.parametrize(
    "options", [("--days", "3"), ("--unused", "--days", "-1"), ("--unused", "--days", "nan")]
)
def test_gc_options_that_make_no_sense(cli, make_run, options):
    make_run("sft", "aa")
    code, _, err = cli("gc", *options)
    assert code == 2 and err.startswith("error: gc --days")


def test_gc_keeps_a_corrupt_parent_of_a_run_that_stays(cli, store, outputs):
    (store["reward"].path / "run.json").write_text("{")
    assert cli("gc", "--delete")[0] == 0
    assert names(outputs) == {"aa", "bb", "cc", "dd"}


def test_gc_gives_old_content_back_instead_of_deleting_it(cli, make_run):
    """Killed between the two renames of a publish: the only copy has a temporary name."""
    run = make_run("sft", "aa")
    (run.path / "adapter").rename(run.path / ".adapter.old")
    (run.path / ".adapter.1-aa.tmp").mkdir()
    out = cli("gc", "--delete")[1]
    assert ".adapter.1-aa.tmp" in out and ".adapter.old" not in out
    run.verify()
    assert not (run.path / ".adapter.1-aa.tmp").exists()


def test_gc_looks_again_before_it_deletes(make_run, outputs):
    """Between the plan and the deletion a run was continued, another got a child, a third is being built."""
    resumed, parent, building = (
        make_run("sft", "aa", end="FAILED"),
        make_run("sft", "bb"),
        make_run("sft", "cc", end="KILLED"),
    )
    age(parent, 100)
    candidates = gc.plan(outputs, unused_days=30)
    assert [candidate.path.name[:2] for candidate in candidates] == ["bb", "aa", "cc"]
    resumed.start({})
    resumed.finish({})
    make_run("ppo", "dd", {"sft": parent})
    said = []
    with build_lock(building.path):
        assert [gc.delete(candidate, outputs, said.append) for candidate in candidates] == [0, 0, 0]
    assert names(outputs) == {"aa", "bb", "cc", "dd"} and len(said) == 3


def test_gc_keeps_what_another_machine_may_be_building(make_run, outputs):
    """Its lock may not be visible here; its signature and a fresh file are."""
    run, parent = make_run("ppo", "aa", {"sft": make_run("sft", "bb")}, end=None), "bb"
    signature = {"pid": 1, "host": "node17", "since": "2025-01-01T00:00:00"}
    locks._holder_path(run.path).parent.mkdir(exist_ok=True)
    locks._holder_path(run.path).write_text(json.dumps(signature))
    assert gc.plan(outputs, unused_days=0) == []
    long_ago = time.time() - 2 * 24 * 3600
    for path in (run.path, *run.path.rglob("*")):
        os.utime(path, (long_ago, long_ago))
    assert [c.path.name[:2] for c in gc.plan(outputs, unused_days=0)] == ["aa", parent]
    signature["host"] = locks.hostname()
    locks._holder_path(run.path).write_text(json.dumps(signature))
    (run.path / "fresh").touch()
    assert [c.path.name[:2] for c in gc.plan(outputs)] == ["aa"]


def test_gc_takes_corrupt_and_empty_runs_and_never_follows_links(cli, make_run, outputs, tmp_path):
    (make_run("sft", "aa").path / "run.json").write_text("{")
    (outputs / "sft" / ("b" * 12)).mkdir()
    (outputs / "sft" / ("d" * 12)).mkdir()
    (outputs / "sft" / ("d" * 12) / "mine").write_text("no run.json says that this is a run")
    far = tmp_path / "far"
    far.mkdir()
    (outputs / "sft" / ("c" * 12)).symlink_to(far)
    out = cli("gc", "--delete")[1]
    assert "corrupt" in out and "never started" in out
    assert names(outputs) == {"cc", "dd"} and far.is_dir()
