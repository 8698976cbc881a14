"""What eval.policies names: how it is read, what each is called, which folders it comes to, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.evaluation import figures, findings, outcome
from rlhf_exp.schema import EvalRun, Evaluation, Tracking
from rlhf_exp.stages import adapters as adapters_
from rlhf_exp.stages import compared_check, policies
from rlhf_exp.stages.candidates import listed, reference_of
from rlhf_exp.stages.evaluate import how
from rlhf_exp.stages.nodes import BaseFacts, Node, Plan
from rlhf_exp.stages.policies import entries, fingerprints, locate, names, problems, roles


def asked(*texts: str, **values) -> Evaluation:
    return Evaluation(policies=list(texts), **values)


@pytest.fixture
def runs(adapters, tmp_path) -> Path:
    """Run folders as stages leave them: a PPO run of 7 iterations (2 and 4 kept), one of DPO, one of reward."""
    for stage, key in (("ppo", "a" * 64), ("dpo", "d" * 64), ("reward", "e" * 64)):
        folder = tmp_path / stage / key[:12]
        shutil.copytree(adapters["reward" if stage == "reward" else "other"], folder / "adapter")
        (folder / "run.json").write_text(json.dumps({"stage": stage, "key": key}))
    ppo = tmp_path / "ppo" / ("a" * 12)
    for step, source in ((2, "sft"), (4, "dropout")):
        shutil.copytree(adapters[source], ppo / "checkpoints" / f"step_{step:05d}")
    (ppo / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)))
    return tmp_path


@pytest.fixture
def find(adapters):
    """find(evaluation, sft_base=False) -> the candidates, each entry's folder given under its role."""

    def call(evaluation: Evaluation, sft: bool = True, sft_base: bool = False, **stages: Path):
        parents = {"sft": adapters["sft"]} if sft else {}
        parents |= stages
        for entry in entries(evaluation):
            if entry.role and entry.role.startswith("compared_"):
                parents[entry.role] = Path(entry.who)
        return listed(evaluation, parents, sft_base)

    return call


def said(candidates) -> list[tuple[str, str | None, int | None]]:
    return [(c.name, c.adapter and c.adapter.name, c.step if c.on_path else None) for c in candidates]


def test_how_an_entry_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd@3").mkdir()
    found = entries(
        asked(
            "sft", "base", "ppo@16", "outputs/ppo/ab12@8", "mine=outputs/dpo/cd", "runs:/12/adapter", "odd@3"
        )
    )
    assert [(e.name, e.who, e.step, e.role) for e in found] == [
        (None, "sft", None, "sft"),
        (None, "base", None, None),
        (None, "ppo", 16, "ppo"),
        (None, "outputs/ppo/ab12", 8, "compared_3"),
        ("mine", "outputs/dpo/cd", None, "compared_4"),
        (None, "runs:/12/adapter", None, "compared_5"),
        (None, "odd@3", None, "compared_6"),  # a folder of that very name
    ]


def test_how_a_policy_decodes_is_read_from_its_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:best_of_3").mkdir()
    found = entries(
        asked(
            "sft:best_of_16",
            "ppo@8:best_of_4",
            "ilql:beta_4",
            "q=outputs/ilql/ab:beta_0.5:best_of_2",
            "odd:best_of_3",
        )
    )
    assert [(e.name, e.who, e.step, e.beta, e.best_of, e.how) for e in found] == [
        (None, "sft", None, None, 16, ":best_of_16"),
        (None, "ppo", 8, None, 4, ":best_of_4"),
        (None, "ilql", None, 4.0, None, ":beta_4"),
        ("q", "outputs/ilql/ab", None, 0.5, 2, ":beta_0.5:best_of_2"),
        (None, "odd:best_of_3", None, None, None, ""),  # a folder of that very name
    ]
    assert roles(asked("sft", "sft:best_of_4", "rloo", "ilql:beta_1", "ilql:beta_4")) == ("rloo", "ilql")


def test_only_what_is_named_has_to_be_there():
    assert roles(asked()) == ("ppo",)
    assert roles(asked("sft", "base")) == ()
    assert roles(asked("dpo", "sft", "ppo@2", "ppo@4", "outputs/x")) == ("dpo", "ppo", "compared_4")


def test_folders_are_called_by_stage_and_key_or_by_their_name(runs, find):
    ppo, dpo = runs / "ppo" / ("a" * 12), runs / "dpo" / ("d" * 12)
    shutil.copytree(dpo / "adapter", runs / "mine" / "adapter")
    found = find(
        asked("sft", f"{dpo}", f"{ppo}/checkpoints/step_00002", f"{runs}/mine", f"late={ppo}"),
    )
    assert said(found) == [
        ("sft", "sft", 0),
        ("dpo dddddd", "adapter", None),
        ("ppo aaaaaa@2", "step_00002", 2),
        ("mine", "adapter", None),
        ("late", "adapter", 7),
    ]


def test_checkpoints_of_one_run_in_the_order_that_is_asked_for(runs, find):
    ppo = runs / "ppo" / ("a" * 12)
    found = find(asked(f"{ppo}@7", "base", f"{ppo}@2", f"start={ppo}@4"))
    assert said(found) == [
        ("ppo aaaaaa@7", "adapter", 7),
        ("base", None, None),
        ("ppo aaaaaa@2", "step_00002", 2),
        ("start", "step_00004", 4),
    ]
    assert [c.run for c in found] == ["ppo aaaaaa", "", "ppo aaaaaa", "ppo aaaaaa"]
    found = find(asked("sft", "ppo@4", "ppo@7"), ppo=ppo)
    assert said(found)[1:] == [("ppo@4", "step_00004", 4), ("ppo@7", "adapter", 7)]


def shown(candidates) -> list[tuple]:
    return [(c.name, c.kind, c.run, c.best_of, c.beta, c.of_sft) for c in candidates]


def test_the_best_of_n_is_a_policy_beside_what_it_chooses_from(runs, find):
    ppo = runs / "ppo" / ("a" * 12)
    found = find(
        asked("sft", "sft:best_of_4", "sft:best_of_16", "ppo@2:best_of_4", "top=ppo:best_of_8"), ppo=ppo
    )
    assert shown(found) == [
        ("sft", "sft", "", 1, None, False),
        ("sft:best_of_4", "other", "sft:best_of", 4, None, True),
        ("sft:best_of_16", "other", "sft:best_of", 16, None, True),
        ("ppo@2:best_of_4", "other", "ppo@2:best_of", 4, None, False),
        ("top", "other", "top", 8, None, False),  # of the last adapter: one name, one policy
    ]
    assert [c.adapter.name for c in found] == ["sft", "sft", "sft", "step_00002", "adapter"]
    assert not any(c.on_path for c in found[1:])
    assert [c.role for c in found] == ["sft", "sft", "sft", "ppo", "ppo"]


@pytest.fixture
def ilql(runs, adapters) -> Path:
    """A run folder of ilql; what its heads are is not looked at here."""
    folder = runs / "ilql" / ("f" * 12)
    shutil.copytree(adapters["other"], folder / "adapter")
    (folder / "ilql").mkdir()
    (folder / "ilql" / "heads.safetensors").write_bytes(b"")
    (folder / "run.json").write_text(json.dumps({"stage": "ilql", "key": "f" * 64}))
    return folder


def test_a_run_of_ilql_is_a_policy_for_each_beta(find, ilql, runs):
    found = find(asked("sft", "ilql:beta_0", "ilql:beta_4", "ilql:beta_4:best_of_2"), ilql=ilql)
    assert shown(found)[1:] == [
        ("ilql:beta_0", "other", "ilql", 1, 0.0, False),
        ("ilql:beta_4", "other", "ilql", 1, 4.0, False),
        ("ilql:beta_4:best_of_2", "other", "ilql:beta_4:best_of", 2, 4.0, False),
    ]
    assert {c.heads for c in found[1:]} == {ilql}
    (by_folder,) = shown(find(asked(f"{ilql}:beta_4")))
    assert by_folder == ("ilql ffffff:beta_4", "other", "ilql ffffff", 1, 4.0, False)
    with pytest.raises(InputError, match=r"ilql:beta_1: .* holds no Q and V: it is no run of ilql"):
        find(asked("ilql:beta_1"), ilql=runs / "dpo" / ("d" * 12))


def test_a_run_is_all_that_it_kept(runs, find):
    ppo = runs / "ppo" / ("a" * 12)
    assert [c.name for c in find(asked(str(ppo)))] == ["ppo aaaaaa@2", "ppo aaaaaa@4", "ppo aaaaaa@7"]
    assert [c.name for c in find(asked("ppo"), ppo=ppo)] == ["ppo@2", "ppo@4", "ppo@7"]
    assert [c.name for c in find(asked("ppo", checkpoints=False), ppo=ppo)] == ["ppo@7"]


def test_equal_names_of_different_folders_are_told_apart(runs, find):
    for place in ("one", "two"):
        shutil.copytree(runs / "dpo" / ("d" * 12) / "adapter", runs / place / "best" / "adapter")
    found = find(asked(f"{runs}/one/best", f"{runs}/two/best"))
    assert [c.name for c in found] == [f"best ({runs}/one/best)", f"best ({runs}/two/best)"]


@pytest.mark.parametrize("sft_base", [False, True])
def test_sft_without_an_adapter(find, sft_base):
    assert said(find(asked("sft"), sft=False, sft_base=sft_base)) == [("sft", None, 0)]
    if sft_base:
        with pytest.raises(InputError, match="the plain base is not here"):
            find(asked("base"), sft=False, sft_base=True)


def test_the_same_policy_twice_whatever_it_is_called(runs, find, adapters):
    ppo = runs / "ppo" / ("a" * 12)
    for texts in (
        ("sft", str(adapters["sft"])),
        (str(ppo), f"{ppo}@2"),
        ("sft:best_of_4", f"{adapters['sft']}:best_of_4"),
        (f"{ppo}@7", f"late={ppo}/adapter"),
    ):
        with pytest.raises(InputError, match="names a policy twice, as "):
            find(asked(*texts))
    with pytest.raises(InputError, match="names a policy twice, as base and as sft"):
        find(asked("base", "sft"), sft=False)
    with pytest.raises(InputError, match="calls two policies base"):
        find(asked("base", f"base={ppo}"))


def test_a_step_that_was_not_kept(runs, find):
    ppo, dpo = runs / "ppo" / ("a" * 12), runs / "dpo" / ("d" * 12)
    with pytest.raises(InputError, match=r"@3: step 3 was not kept \(ppo.save_every\); kept steps: 2, 4, 7"):
        find(asked(f"{ppo}@3"))
    with pytest.raises(InputError, match="kept steps: none, it is no PPO run"):
        find(asked(f"{dpo}@1"))


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (("sft", "sft"), "eval.policies has the same policy twice: sft, sft"),
        (("ppo@2", "x=ppo@2"), "eval.policies has the same policy twice: ppo@2, x=ppo@2"),
        (("x=base", "x=sft"), "eval.policies has the same name twice: x=base, x=sft"),
        (("dpo@3",), "eval.policies[0]=dpo@3: only PPO keeps adapters of its steps: leave @3 out"),
        (
            ("data=base",),
            "eval.policies[0]=data=base: data is the row of the data's own answers: choose another name",
        ),
        (("sft", " "), "eval.policies[1]='' names no policy: leave it out"),
        (
            ("sft:best_of_4", "x=sft:best_of_4"),
            "eval.policies has the same policy twice: sft:best_of_4, x=sft:best_of_4",
        ),
        (
            ("sft:best_of_1",),
            "eval.policies[0]=sft:best_of_1: the best of 1 is of two answers at least: leave :best_of_1 out",
        ),
        (("ilql",), "eval.policies[0]=ilql: ilql decodes by beta (Q - V): say by which beta, ilql:beta_4"),
        (("dpo:beta_4",), "eval.policies[0]=dpo:beta_4: beta is of ilql: leave :beta_4 out"),
    ],
)
def test_words_that_cannot_be(texts, line):
    assert problems(asked(*texts)) == [line]
    assert (
        problems(
            asked("sft", "base", "ppo@2", "ppo@4", "rloo@2", "sft:best_of_2", "sft:best_of_4", "ilql:beta_1")
        )
        == []
    )


def located(*texts: str) -> list[str]:
    config = EvalRun(stage="eval", eval=asked(*texts))
    return [locate(e.role, config, Tracking(), "outputs")[1] for e in entries(config.eval)]


def test_folders_that_cannot_be(runs, adapters):
    assert located(str(runs / "dpo" / ("d" * 12))) == ["eval.policies[0]"]
    for text, line in (
        ("sfft", "eval.policies[0]=sfft: there is no such policy or folder; did you mean sft?"),
        ("outputs/nowhere", "eval.policies[0]=outputs/nowhere: there is no such folder"),
        (str(runs), "it is neither a run folder nor a PEFT folder"),
        (str(runs / "reward" / ("e" * 12)), "is a reward model, which answers nothing: name a policy"),
        (str(adapters["reward"]), "is a reward model"),
    ):
        with pytest.raises(InputError) as caught:
            located(text)
        assert line in caught.value.problems[0] and len(caught.value.problems) == 1


def test_a_folder_decodes_by_beta_if_it_has_q_and_only_then(runs, ilql):
    assert located(f"{ilql}:beta_4") == ["eval.policies[0]"]
    for text, line in (
        (str(ilql), "is a run of ilql, which decodes by beta (Q - V): say by which beta, "),
        (
            f"{runs / 'dpo' / ('d' * 12)}:beta_2",
            ": beta is of a run of ilql, this has no Q: leave :beta_2 out",
        ),
    ):
        with pytest.raises(InputError) as caught:
            located(text)
        assert line in caught.value.problems[0] and len(caught.value.problems) == 1


def test_whom_the_others_are_compared_with(runs, find):
    ppo = runs / "ppo" / ("a" * 12)
    found = find(asked("base", "sft", f"late={ppo}"))
    assert reference_of(asked(), found) == 1
    assert reference_of(asked(against="late"), found) == 2
    assert reference_of(asked(), found[::2]) == 0  # no sft: the first
    with pytest.raises(InputError, match=r"against=ppo: no policy .* there are base, sft, late"):
        reference_of(asked(against="ppo"), found)


def test_the_key_knows_who_which_step_and_which_name(runs):
    """What the folders hold is the parents' keys; where they are does not count."""
    dpo = runs / "dpo" / ("d" * 12)
    moved = shutil.copytree(dpo, runs / "moved")

    def key(text: str, folder: Path) -> dict[str, str]:
        return fingerprints(asked("sft", text), {"compared_1": folder})

    assert key(str(dpo), dpo) == key(str(moved), moved)
    texts = (
        str(dpo),
        f"x={dpo}",
        f"{dpo}@2",
        "ppo",
        f"{dpo}:best_of_2",
        f"{dpo}:best_of_4",
        f"x={dpo}:best_of_4",
    )
    assert len({str(key(text, dpo)) for text in texts}) == 7
    assert fingerprints(asked("sft", "base"), {}) != fingerprints(asked("base", "sft"), {})


def test_an_mlflow_run_is_called_by_its_id(tmp_path):
    assert names(asked("runs:/0123456789abcdef/adapter"), {"compared_0": tmp_path}) == {0: "run 01234567"}
    assert policies.step_of(Path("x/step_00016")) == 16 and policies.step_of(Path("x/adapter")) is None


def test_two_stages_that_keep_steps_are_told_apart_in_what_the_report_reads(runs, find):
    """ppo and rloo have no run of their own to name, and neither is drawn or spoken of as the other."""
    rloo = runs / "rloo"
    shutil.copytree(runs / "ppo" / ("a" * 12), rloo)
    shutil.copytree(rloo / "adapter", rloo / "checkpoints" / "step_00006")
    found = find(asked("sft", "ppo@4", "rloo@6"), ppo=runs / "ppo" / ("a" * 12), rloo=rloo)
    scores = {"sft": (0.0, 0.5), "ppo@4": (2.0, 0.25), "rloo@6": (1.0, 0.75)}
    policies_ = [
        {"name": c.name, "step": c.step, "metrics": dict(zip(("kl", "gold"), scores[c.name], strict=True))}
        | how(c)
        for c in found
    ]
    assert outcome.last(policies_)["name"] == "rloo@6"
    assert findings.verdict(policies_).startswith("With rloo@6 the gold score went from 0.50 to 0.75")
    (panel,) = figures.frontier_panels(policies_)
    assert panel.about == (
        "SFT: KL 0.0, gold score 0.50; ppo@4: KL 2.0, gold score 0.25; rloo@6: KL 1.0, gold score 0.75"
    )


def test_q_and_v_are_part_of_what_stands_for_a_given_run_of_ilql(tmp_path):
    """Equal adapters and other heads decode to other answers; nor may a run without heads pass for one with."""
    keys = []
    for name, heads in (("one", b"1"), ("two", b"2"), ("same", b"1"), ("none", None)):
        (tmp_path / name / "adapter").mkdir(parents=True)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / name / "adapter" / file).write_bytes(b"{}")
        if heads is not None:
            (tmp_path / name / "ilql").mkdir()
            (tmp_path / name / "ilql" / "heads.safetensors").write_bytes(heads)
        keys.append(adapters_.content_key("ilql", tmp_path / name))
    assert len(set(keys)) == 3 and keys[0] == keys[2]


@pytest.mark.parametrize("trained", [True, False])
def test_what_a_run_that_is_there_lacks_is_said_before_another_is_trained(
    runs, adapters, run_config, trained
):
    """RUN@3 is not kept, DPO has no Q, a policy comes twice: whether or not kto is still to be trained."""
    ppo, dpo = runs / "ppo" / ("a" * 12), runs / "dpo" / ("d" * 12)

    def problems_of(*texts: str) -> list[str]:
        config = run_config("eval", eval=asked("sft", "kto", *texts))
        parents = {"sft": Node("sft", None, given=adapters["sft"]), "ilql": Node("ilql", None, given=dpo)}
        parents["kto"] = Node("kto", run_config("kto"), given=adapters["dropout"] if trained else None)
        parents |= {f"compared_{place}": Node(f"compared_{place}", None, given=ppo) for place in (2, 3)}
        node = Node("eval", config, parents)
        plan = Plan(node, [*parents.values(), node], BaseFacts(Path("base"), "", "", "cpu"), config)
        try:
            compared_check.require(node, plan)
        except InputError as error:
            return error.problems
        return []

    assert problems_of(f"{ppo}@2") == []
    (line,) = problems_of(f"{ppo}@3")
    assert line == (f"eval.policies[2]={ppo}@3: step 3 was not kept (ppo.save_every); kept steps: 2, 4, 7")
    (line,) = problems_of(f"{ppo}@2", "ilql:beta_4")
    assert "ilql:beta_4: " in line and "holds no Q and V" in line
    (line,) = problems_of(f"{ppo}@4", f"x={ppo}@4")
    assert line.startswith("eval.policies names a policy twice, as ppo aaaaaa@4 and as x ")
