"""What reaches a real SQLite store, read back through a client of its own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from rlhf_exp.schema import Tracking
from rlhf_exp.tracking import mlflow_store, mlflow_tracker, open_tracker


def test_metrics_arrive_with_step_and_a_deterministic_timestamp(tracker, store) -> None:
    tracker.metrics({"loss": 0.5, "objective/kl": 2}, step=3)
    tracker.metrics({"loss": 0.25}, step=4)
    tracker.flush()
    assert store.history(tracker.run_id, "loss") == [(3, 0.5), (4, 0.25)]
    assert store.history(tracker.run_id, "objective/kl") == [(3, 2.0)]
    start = store.run(tracker.run_id).info.start_time
    stamps = {m.step: m.timestamp for m in store.client.get_metric_history(tracker.run_id, "loss")}
    assert stamps == {3: start + 3, 4: start + 4}


def test_nan_inf_tensors_and_bad_names_do_not_stop_anything(tracker, store, capsys) -> None:
    torch = pytest.importorskip("torch")
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf, "t": torch.tensor(1.5), "acc %": 3}
    tracker.metrics({**values, "text": "hello", "none": None}, step=0)
    tracker.flush()
    read = store.run(tracker.run_id).data.metrics
    assert math.isnan(read.pop("nan"))
    # MLflow's own stand-in for infinity is the largest double
    assert read == {"up": 1.7976931348623157e308, "down": -1.7976931348623157e308, "t": 1.5, "acc _": 3.0}
    assert capsys.readouterr().err == "tracking: metric text left out: not a number: 'hello'\n"


def test_buffer_is_sent_by_age_by_count_and_at_the_end(tracker, store, clock, monkeypatch) -> None:
    tracker.metrics({"a": 1}, 1)
    clock.now += 9.9
    tracker.metrics({"a": 2}, 2)
    assert store.history(tracker.run_id, "a") == []
    clock.now += 0.2
    tracker.metrics({"a": 3}, 3)
    assert [step for step, _ in store.history(tracker.run_id, "a")] == [1, 2, 3]

    tracker.metrics({f"m{i}": i for i in range(999)}, 4)
    assert store.history(tracker.run_id, "m998") == []
    tracker.metrics({"a": 4}, 4)
    assert store.history(tracker.run_id, "m998") == [(4, 998.0)]

    tracker.metrics({"a": 5}, 5)
    tracker.finish("FINISHED")
    assert [step for step, _ in store.history(tracker.run_id, "a")] == [1, 2, 3, 4, 5]
    assert store.run(tracker.run_id).info.status == "FINISHED"


def test_more_than_a_batch_at_once(tracker, store) -> None:
    tracker.metrics({f"m{i}": i for i in range(2500)}, 0)
    tracker.flush()
    assert len(store.run(tracker.run_id).data.metrics) == 2500


def test_logging_steps_again_after_a_resume_adds_nothing(tracker, store, output_dir) -> None:
    for step in range(5):
        tracker.metrics({"loss": step / 7, "nan": math.nan}, step)
    tracker.finish("KILLED")
    again = open_tracker(Tracking(), output_dir, "ignored", run_id=tracker.run_id)
    assert again.run_id == tracker.run_id
    assert store.run(again.run_id).info.status == "RUNNING"
    for step in range(3, 8):
        again.metrics({"loss": step / 7, "nan": math.nan}, step)
    again.finish("FINISHED")
    assert store.history(again.run_id, "loss") == [(step, step / 7) for step in range(8)]
    assert len(store.history(again.run_id, "nan")) == 8
    assert len(store.runs()) == 1


def test_params_are_flat_texts_within_the_limits(tracker, store) -> None:
    config = {"lora": {"r": 8, "targets": ["q", "v"]}, "uri": None, "text": "é" * 7000, "empty": {}}
    tracker.params({**config, "many": {f"k{i}": i for i in range(250)}})
    read = store.run(tracker.run_id).data.params
    assert read["lora.r"] == "8"
    assert read["lora.targets"] == '["q", "v"]'
    assert read["uri"] == "null"
    assert read["empty"] == "{}"
    assert len(read["text"]) == 6000 and read["text"].endswith("[cut, 7000 characters]")
    assert [read[f"many.k{i}"] for i in range(250)] == [str(i) for i in range(250)]


def test_a_param_that_changed_at_the_resume_becomes_a_tag(tracker, store, output_dir) -> None:
    tracker.params({"threads": 2, "seed": 0})
    tracker.finish("KILLED")
    again = open_tracker(Tracking(), output_dir, "x", run_id=tracker.run_id)
    again.params({"threads": 4, "seed": 0, "new": 1})
    data = store.run(tracker.run_id).data
    assert data.params == {"threads": "2", "seed": "0", "new": "1"}
    assert data.tags["resumed.threads"] == "4"
    assert "resumed.seed" not in data.tags


def test_children_carry_their_parent(tracker, store, output_dir) -> None:
    child = tracker.child("reward", {"stage": "reward", "key": None})
    other = open_tracker(Tracking(), output_dir, "ppo", {"stage": "ppo"}, parent_id=tracker.run_id)
    run = store.run(child.run_id)
    assert run.info.run_name == "reward"
    assert run.info.experiment_id == store.run(tracker.run_id).info.experiment_id
    assert run.data.tags["mlflow.parentRunId"] == tracker.run_id
    assert (run.data.tags["stage"], run.data.tags["key"]) == ("reward", "null")
    assert store.run(other.run_id).data.tags["mlflow.parentRunId"] == tracker.run_id
    child.metrics({"a": 1}, 0)
    child.finish("FAILED")
    assert store.run(child.run_id).info.status == "FAILED"
    assert store.run(tracker.run_id).info.status == "RUNNING"
    assert store.run(tracker.run_id).data.metrics == {}


def test_a_run_whose_id_nobody_noted_is_taken_up(tracker, store, output_dir) -> None:
    """Its process was killed between making the run and writing its id. Others' runs are left alone."""
    tags = {"stage": "sft", "key": "ab12", "folder": "/o/sft/ab12"}
    left = open_tracker(Tracking(), output_dir, "sft", tags).run_id  # and killed here
    other = open_tracker(Tracking(), output_dir, "sft", {**tags, "folder": "/elsewhere/sft/ab12"}).run_id
    key = tracker.child("sft", {**tags, "key": "cd34"}).run_id
    nowhere = open_tracker(Tracking(), output_dir, "sft", {"stage": "sft", "key": "ab12"}).run_id
    again = tracker.child("sft", tags)
    assert len({left, other, key, nowhere}) == 4
    assert again.run_id == left
    assert store.run(left).data.tags["mlflow.parentRunId"] == tracker.run_id
    again.params({"seed": 0})
    assert tracker.child("sft", tags).run_id != left  # something is in it: its id is in the run folder


def test_a_run_of_this_folder_on_another_machine_is_left_alone(output_dir, monkeypatch) -> None:
    tags = {"stage": "sft", "key": "ab12", "folder": "/o/sft/ab12"}
    left = open_tracker(Tracking(), output_dir, "sft", tags).run_id
    monkeypatch.setattr("platform.node", lambda: "another")
    assert open_tracker(Tracking(), output_dir, "sft", tags).run_id != left


def test_tables_are_mlflows_own_and_the_last_one_counts(tracker, store, monkeypatch) -> None:
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", tracker.uri
    )  # MLflow's load_table asks the global store as well
    tracker.table("samples", [{"step": 1, "prompt": "p", "score": math.nan}])
    tracker.table("samples", [{"step": 1, "prompt": "p"}, {"step": 2, "prompt": "naïve <b>"}])
    tracker.table("eval/held out", [{"a": 1}])
    experiment = store.run(tracker.run_id).info.experiment_id
    frame = store.client.load_table(experiment, artifact_file="samples.json", run_ids=[tracker.run_id])
    assert frame.to_dict("records") == [{"step": 1, "prompt": "p"}, {"step": 2, "prompt": "naïve <b>"}]
    listed = json.loads(store.run(tracker.run_id).data.tags["mlflow.loggedArtifacts"])
    assert [entry["path"] for entry in listed] == ["samples.json", "eval/held out.json"]
    assert {entry["type"] for entry in listed} == {"table"}


def test_artifacts_lie_beside_the_database(tracker, store, tmp_path, output_dir) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    picture = tmp_path / "frontier.png"
    picture.write_bytes(b"png")
    tracker.artifact(folder, "adapter")
    tracker.artifact(picture)
    assert store.artifact(tracker.run_id, "adapter/adapter_config.json", tmp_path / "read") == "{}"
    assert store.artifact(tracker.run_id, "frontier.png", tmp_path / "read") == "png"
    kept = output_dir / "mlartifacts" / tracker.run_id / "artifacts"
    assert sorted(path.name for path in kept.iterdir()) == ["adapter", "frontier.png"]


def test_an_artifact_that_is_not_there_is_reported(tracker, tmp_path, capsys) -> None:
    tracker.artifact(tmp_path / "nothing.png")
    tracker.finish("FINISHED")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"tracking: artifact {tmp_path}/nothing.png left out: it does not exist"
    assert lines[1].startswith("tracking: 1 parameters, tags or artifacts never reached sqlite:///")


def test_finish_counts_once_and_later_values_still_arrive(tracker, store) -> None:
    tracker.finish("FAILED", ValueError("first line\nsecond line"))
    tracker.finish("FINISHED")
    tracker.metrics({"late": 1}, 9)
    run = store.run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["rlhf_exp.error"] == "ValueError: first line"
    assert run.data.metrics == {"late": 1.0}


class Flaky:
    """The real client, except that calls fail while `error` is set."""

    def __init__(self, client):
        self.client, self.error, self.calls = client, None, 0

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls += 1
            if self.error is not None:
                raise self.error
            return getattr(self.client, name)(*arguments, **options)

        return call


@pytest.fixture
def flaky(tracker) -> Flaky:
    tracker._client = Flaky(tracker._client)
    return tracker._client


def locked() -> Exception:
    from mlflow.exceptions import MlflowException

    return MlflowException("(sqlite3.OperationalError) database is locked")


def test_nothing_is_lost_in_an_outage_and_it_is_told_once(tracker, store, flaky, clock, capsys) -> None:
    flaky.error = locked()
    for step in range(5):
        clock.now += 11
        tracker.metrics({"loss": step}, step)
        tracker.tags({"at": step})
    tracker.params({"late": "param"})
    tracker.table("samples", [{"a": 1}])
    flaky.error = None
    clock.now += 200
    tracker.metrics({"loss": 5}, 5)
    assert store.history(tracker.run_id, "loss") == [(step, float(step)) for step in range(6)]
    clock.now += 11
    tracker.metrics({"back to normal": 1}, 6)
    data = store.run(tracker.run_id).data
    assert data.metrics["back to normal"] == 1.0
    assert (data.tags["at"], data.params["late"]) == ("4", "param")
    assert "mlflow.loggedArtifacts" in data.tags
    tracker.finish("FINISHED")
    (line,) = capsys.readouterr().err.splitlines()
    assert "database is locked" in line and "training goes on" in line
    assert "rlhf_exp.lost_metrics" not in store.run(tracker.run_id).data.tags


def test_an_outage_between_two_batches(tracker, store, flaky) -> None:
    real, sent = flaky.client.log_batch, []

    def once(*arguments, **options):
        if sent:
            raise locked()
        sent.append(real(*arguments, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flaky.client, "log_batch", once)
        tracker.metrics({f"m{i}": i for i in range(1500)}, 0)
    assert len(store.run(tracker.run_id).data.metrics) == 1000
    tracker.finish("FINISHED")
    assert len(store.run(tracker.run_id).data.metrics) == 1500


def test_a_server_that_failed_is_waited_for_less(tracker, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    seen = []

    class Down:
        def log_batch(self, *arguments, **options):
            seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
            raise locked()

    tracker.uri, tracker._client = "http://127.0.0.1:5000", Down()
    tracker.metrics({"a": 1}, 0)
    tracker.flush()
    tracker.flush()
    assert seen == ["15", "5"]
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_a_store_in_trouble_is_asked_less_and_less_often(tracker, flaky, clock) -> None:
    flaky.error = locked()
    for step in range(600):  # ten minutes, a step a second
        clock.now += 1
        tracker.metrics({"loss": step}, step)
    # after 10 s, then pauses of 10, 20, 40, 80, 120, 120, 120 s
    assert flaky.calls == 8


def test_a_store_that_stays_away_neither_raises_nor_hides_what_is_lost(tracker, flaky, capsys) -> None:
    tracker.metrics({"a": 1, "b": 2}, 0)
    flaky.error = locked()
    assert tracker.child("reward").run_id is None
    tracker.finish("FINISHED")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tracking: no run for reward in sqlite")
    assert "training goes on" in lines[1]
    assert lines[2].startswith("tracking: 2 metric values never reached sqlite")
    assert lines[3].startswith(f"tracking: run {tracker.run_id} ended FINISHED, but")
    assert len(lines) == 4


def test_the_oldest_values_go_when_the_buffer_is_full(tracker, store, flaky, monkeypatch, capsys) -> None:
    monkeypatch.setattr(mlflow_tracker, "BUFFER_LIMIT", 3)
    flaky.error = locked()
    for step in range(5):
        tracker.metrics({"a": step}, step)
    flaky.error = None
    tracker.finish("FINISHED")
    assert store.history(tracker.run_id, "a") == [(2, 2.0), (3, 3.0), (4, 4.0)]
    assert store.run(tracker.run_id).data.tags["rlhf_exp.lost_metrics"] == "2"
    assert "2 metric values never reached" in capsys.readouterr().err


def test_what_a_server_refuses_does_not_block_the_rest(tracker, store, monkeypatch, capsys) -> None:
    monkeypatch.setattr(mlflow_tracker.values, "clean_name", lambda name: name)
    tracker.params({"good": 1, "b%d": 2, "fine": 3})
    tracker.metrics({"a": 1, "a%": 2, "b": 3}, 0)
    tracker.finish("FINISHED")
    run = store.run(tracker.run_id)
    assert run.data.params == {"good": "1", "fine": "3"}
    assert run.data.metrics == {"a": 1.0, "b": 3.0}
    assert run.data.tags["rlhf_exp.lost_metrics"] == "1"
    assert "b%d was refused" in capsys.readouterr().err


def test_ctrl_c_while_sending_loses_and_doubles_nothing(tracker, store, monkeypatch) -> None:
    tracker.metrics({"a": 1}, 1)
    real = tracker._client

    class Interrupting(Flaky):
        def __getattr__(self, name):
            def call(*arguments, **options):
                getattr(real, name)(*arguments, **options)
                raise KeyboardInterrupt

            return call

    tracker._client = Interrupting(real)
    with pytest.raises(KeyboardInterrupt):
        tracker.flush()
    tracker._client = real
    tracker.finish("KILLED")
    assert store.history(tracker.run_id, "a") == [(1, 1.0)]
    assert store.run(tracker.run_id).info.status == "KILLED"


def test_download_of_a_runs_uri(tracker, output_dir, tmp_path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    tracker.artifact(folder, "adapter")
    uri = f"runs:/{tracker.run_id}/adapter"
    got = mlflow_store.download(uri, Tracking(), output_dir, tmp_path / "into")
    assert (Path(got) / "adapter_config.json").read_text() == "{}"
