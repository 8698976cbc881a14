"""RANK and the like out of SLURM's variables, as SLURM 22.05 set them for 2 nodes x 2 tasks and others."""

from __future__ import annotations

import pytest

from rlhf_exp.jobs import ranks

TASK = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


def test_the_last_of_four_tasks():
    assert ranks.environment(TASK, {"gpu07": "10.0.0.7"}.get) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": str(12_000 + 41_234 - 2 * 20_000),
    }


def test_a_single_task_is_alone():
    assert ranks.environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, str) == {}
    assert ranks.environment({}, str) == {}


def test_two_jobs_have_two_ports():
    ports = {ranks.environment(TASK | {"SLURM_JOB_ID": str(i)}, str)["MASTER_PORT"] for i in range(100, 200)}
    assert len(ports) == 100
    assert max(map(int, ports)) < 32_768


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,2(x2)", [1, 2, 2]), ("8(x1)", [8])],
)
def test_tasks_by_node(text, expected):
    assert ranks.tasks_by_node(text) == expected


def test_tasks_that_cannot_be_read():
    with pytest.raises(ValueError, match="SLURM_STEP_TASKS_PER_NODE=two cannot be read"):
        ranks.tasks_by_node("two")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[3-5]", "n3"), ("rack1-n[09,11]", "rack1-n09"), ("a1,b[2-3]", "a1")],
)
def test_the_first_node(nodes, first):
    assert ranks.first_node({"SLURM_JOB_NODELIST": nodes}) == first


def test_threads_are_those_of_the_task_unless_the_user_says_otherwise():
    assert ranks.threads({"SLURM_CPUS_PER_TASK": "4"}) == "4"
    assert ranks.threads({"SLURM_CPUS_PER_TASK": "4", "OMP_NUM_THREADS": "1"}) is None
    assert ranks.threads({}) is None
