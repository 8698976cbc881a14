"""Imports what a run would import: once, in the process that all ranks of the tests are forked from."""

import os
from importlib import import_module

from tests.strategies import travels

os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for a device, and says so
travels.count()
for name in ("transformers", "peft", "trl", "deepspeed", "rlhf_exp.cli", "rlhf_exp.strategies.parameters"):
    import_module(name)
for name in ("sft_steps", "reward", "direct_trainer", "direct", "ilql", "rft", "ppo", "evaluate", "pipeline"):
    import_module(f"rlhf_exp.stages.{name}")
