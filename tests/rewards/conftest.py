"""The tiny model with random adapters, as the tests of rollout use it."""

from tests.rollout.conftest import base, roles  # noqa: F401
