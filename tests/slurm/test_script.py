"""What a job asks for, and the script that says it."""

from __future__ import annotations

import pytest

from rlhf_exp.jobs import graph as graphs
from rlhf_exp.jobs import script, submit
from rlhf_exp.jobs.graph import Graph, Upstream
from rlhf_exp.jobs.script import Job
from rlhf_exp.jobs.settings import Settings, problems, resources_of, seconds, settings_of


def options(text: str) -> dict[str, str]:
    """The #SBATCH lines."""
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def settings() -> Settings:
    found = Settings(
        partition="gpu", mem="8G", time="4:00:00", additional_parameters={"nice": 10, "qos": "low"}
    )
    found.by_stage.ppo.mem = "64G"
    found.by_stage.ppo.gpus_per_node = "a100:2"
    found.by_stage.ppo.additional_parameters = {"qos": "high"}
    return found


def test_what_is_set_for_a_stage_wins(settings):
    sft, ppo = resources_of(settings, "sft"), resources_of(settings, "ppo")
    assert (sft.partition, sft.mem, sft.gpus_per_node) == ("gpu", "8G", None)
    assert (ppo.partition, ppo.mem, ppo.gpus_per_node) == ("gpu", "64G", "a100:2")
    assert sft.additional_parameters == {"nice": 10, "qos": "low"}
    assert ppo.additional_parameters == {"nice": 10, "qos": "high"}


def test_settings_are_the_same_after_a_file(settings):
    from dataclasses import asdict

    assert settings_of(asdict(settings)) == settings


def test_what_is_out_of_range_is_said():
    bad = Settings(poll_s=0, max_requeues=-1, nodes=0)
    bad.by_stage.sft.cpus_per_task = 0
    assert problems(bad) == [
        "hydra.launcher.max_requeues must be at least 0, got -1",
        "hydra.launcher.poll_s must be at least 0.1, got 0",
        "hydra.launcher.nodes must be at least 1, got 0",
        "hydra.launcher.by_stage.sft.cpus_per_task must be at least 1, got 0",
    ]


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 90 * 60),
        ("1:30", 90),
        ("4:00:01", 4 * 3600 + 1),
        ("1-12", 36 * 3600),
        ("1-0:30", 24 * 3600 + 1800),
        ("2-01:02:03", 2 * 86400 + 3600 + 123),
        ("infinite", None),
        (None, None),
    ],
)
def test_limits_as_sbatch_reads_them(time, expected):
    assert seconds(time) == expected


def test_a_limit_that_leaves_no_time():
    short = Settings(time="4:00:00")
    short.by_stage.sft.time = "2"
    assert problems(short) == [
        "hydra.launcher.by_stage.sft.time=2 is over before the job is asked to save, "
        "hydra.launcher.signal_delay_s=120 seconds before its end"
    ]


def test_the_script_of_an_array(settings, tmp_path):
    settings.setup = ["module load cuda/12"]
    settings.tasks_per_node, settings.nodes, settings.cpus_per_task = 2, 3, 4
    text = script.text(Job("ppo", None, (0, 2, 5), ("11", "12")), tmp_path / "a b", settings)
    found = options(text)
    assert found.pop("chdir") and found.pop("output") == f"'{tmp_path}/a b/slurm/%A_%a.log'"
    assert found == {
        "array": "0,2,5%256",
        "dependency": "afterok:11:12",
        "kill-on-invalid-dep": "yes",
        "cpus-per-task": "4",
        "gpus-per-node": "a100:2",
        "job-name": "'rlhf_exp ppo'",
        "mem": "64G",
        "nice": "10",
        "nodes": "3",
        "ntasks-per-node": "2",
        "open-mode": "append",
        "partition": "gpu",
        "qos": "high",
        "requeue": "",
        "signal": "USR1@120",
        "time": "4:00:00",
    }
    lines = text.splitlines()
    assert lines.index("module load cuda/12") < next(i for i, x in enumerate(lines) if x.startswith("srun"))
    assert lines[-1].startswith(
        """srun --kill-on-bad-exit=1 --cpus-per-task=4 bash -c 'trap "" USR1; exec "$@"' """
    )
    assert lines[-1].endswith(f"--max-requeues=5 --signal-delay=120 '{tmp_path}/a b' $SLURM_ARRAY_TASK_ID")


def test_a_job_without_wishes_asks_for_nothing(tmp_path):
    found = options(script.text(Job("sft", "sft-ab"), tmp_path, Settings(max_requeues=0)))
    assert sorted(found) == ["chdir", "job-name", "no-requeue", "nodes", "open-mode", "output", "signal"]


def test_an_option_of_ours_can_be_taken_out(tmp_path):
    given = Settings(additional_parameters={"chdir": None, "requeue": False, "comment": "x y"})
    found = options(script.text(Job("sft", "sft-ab"), tmp_path, given))
    assert "chdir" not in found and "requeue" not in found
    assert found["comment"] == "'x y'"


def test_trials_beyond_an_arrays_size_are_in_another(tmp_path):
    graph = Graph(stages=dict.fromkeys(range(999, 1002), "sft"), after={n: [] for n in range(999, 1002)})
    jobs = submit.arrays(graph, Settings(), [999, 1000, 1001], {})
    assert [job.numbers for job in jobs] == [(999,), (1000, 1001)]
    text = script.text(jobs[1], tmp_path, Settings())
    assert options(text)["array"] == "0,1%256"
    assert text.splitlines()[-1].endswith(" $(($SLURM_ARRAY_TASK_ID + 1000))")


def test_trials_that_ask_for_other_things_are_in_other_arrays(settings):
    graph = Graph(
        upstream={"sft-a": Upstream("sft", "sft", 0), "sft-b": Upstream("sft", "sft", 2)},
        stages={0: "ppo", 1: "ppo", 2: "ppo", 3: "sft"},
        after={0: ["sft-a"], 1: ["sft-a"], 2: ["sft-b"], 3: []},
    )
    jobs = submit.arrays(graph, settings, range(4), {"sft-a": "7", "sft-b": "8"})
    assert [(job.stage, job.numbers, job.after) for job in jobs] == [
        ("ppo", (0, 1), ("7",)),
        ("ppo", (2,), ("8",)),
        ("sft", (3,), ()),
    ]
    made = submit.arrays(graph, settings, range(4), {"sft-a": None, "sft-b": "8"})  # sft-a is there already
    assert [job.after for job in made] == [(), ("8",), ()]


def test_what_trials_share_is_one_job_and_waits_for_its_own():
    """Two KL values, and one trial with another seed: sft twice, reward twice."""
    from rlhf_exp import compose

    words = ["stage=ppo", "model=tiny", "dataset=reviews", "reward_source=learned", "tracking=none"]
    words += ["upstream.reward={reward: {center: true, center_on: samples}}", "output_dir=none"]
    graph = Graph()
    for number in range(3):
        more = [f"ppo.kl_coef=0.{number + 1}"] if number < 2 else ["seed=3"]
        graphs.add(graph, number, *compose.compose([*words, *more]))
    roles = [(job.role, job.trial) for job in graph.upstream.values()]
    assert sorted(roles) == [("reward", 0), ("reward", 2), ("sft", 0), ("sft", 2)]
    sft, reward = graph.after[0]
    assert sft.startswith("sft-") and reward.startswith("reward-")
    assert graph.upstream[reward].after == [sft]
    assert all(graph.after[number] == graph.after[0] for number in range(2))
    assert not set(graph.after[2]) & set(graph.after[0])
    assert graphs.needed(graph, [1]) == [sft, reward]
    assert set(graph.stages.values()) == {"ppo"}


def test_the_graph_is_the_same_after_a_file(tmp_path, settings):
    graph = Graph({"sft-a": Upstream("sft", "sft", 0, ["x"])}, {0: "ppo"}, {0: ["sft-a"]})
    graphs.write(tmp_path, graph, settings)
    assert graphs.read(tmp_path) == (graph, settings)
    assert graphs.read(tmp_path / "other") is None
