"""What every test stands on: no network, one thread, nothing of the user's, the models, the real data.

Environment variables are set here, before anything imports torch or transformers; children inherit them.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings

from rlhf_exp.fetch import model_folder
from rlhf_exp.paths import cache_dir

ROOT = Path(__file__).resolve().parent.parent
# what tests build (the tiny model) is kept from run to run and shared by workers, away from the user's cache
TEST_CACHE = ROOT / ".pytest_cache" / "rlhf_exp"
FETCHED = "smollm2_135m"

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MPLBACKEND": "agg",
    # one thread each: workers share the cores, and sums come out the same everywhere
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
# the user's settings would change what is tested
for name in (
    "RLHF_EXP_DATA",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_EXPERIMENT_ID",
):
    os.environ.pop(name, None)

# derandomised: a failure comes again; no deadline: a shared machine is slow at times
settings.register_profile("rlhf_exp", deadline=None, derandomize=True, database=None)
settings.load_profile("rlhf_exp")


def _share_fetched_model() -> None:
    """A link to the user's fetched model in the tests' cache: it is too large to make again."""
    fetched = model_folder(FETCHED)
    models = TEST_CACHE / "models"
    models.mkdir(parents=True, exist_ok=True)
    link = models / FETCHED
    if fetched and not link.exists():
        with suppress(FileExistsError):  # another pytest was first
            link.unlink(missing_ok=True)
            link.symlink_to(fetched, target_is_directory=True)


if cache_dir() != TEST_CACHE:  # else: a worker, which inherits it
    _share_fetched_model()
    os.environ["RLHF_EXP_CACHE"] = str(TEST_CACHE)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths (outputs/, mlflow.db) land in the test's own folder; thread counts do not leak."""
    monkeypatch.chdir(tmp_path)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """Folder of the tiny model."""
    from rlhf_exp.model.tiny import build_tiny

    return build_tiny()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the fetched SmolLM2; skips where it is not, unless RLHF_EXP_REQUIRE_MODEL=1 (CI)."""
    folder = model_folder(FETCHED)
    if folder is None:
        reason = f"{FETCHED} is not fetched: python -m rlhf_exp.fetch {FETCHED}"
        if os.environ.get("RLHF_EXP_REQUIRE_MODEL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Samples of real data sets: RLHF_EXP_TEST_DATA, else ../shared/data; skips where neither is there."""
    chosen = os.environ.get("RLHF_EXP_TEST_DATA")
    folder = Path(chosen) if chosen else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if chosen:
            pytest.fail(f"RLHF_EXP_TEST_DATA={chosen} is not a folder")
        pytest.skip("no samples of real data sets: set RLHF_EXP_TEST_DATA to their folder")
    return folder
