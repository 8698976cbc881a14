"""Records what TRL 1.9.2's PPO computes on fixed inputs: the constant RECORDED of test_trl_oracle.py.

    pip download --no-deps trl==1.9.2 --dest DIR        # the last release with `trl.experimental.ppo`
    python -m tests.algorithms.record_trl DIR/trl-1.9.2-py3-none-any.whl

`masked_mean`, `masked_var`, `masked_whiten` and `selective_log_softmax` are cut out of the wheel and run. The rest
stands inside `PPOTrainer.train`, which is one function of 300 lines: those from "4. compute rewards" to the whitening
of the advantages, and those from `vpredclipped` to the losses, are cut out by their text and run in a namespace in
which the inputs have TRL's names. Prints the constant; needs torch only, no installed trl.
"""

from __future__ import annotations

import json
import sys
import textwrap
import zipfile
from types import SimpleNamespace

import torch

PPO, UTILS = "trl/experimental/ppo/ppo_trainer.py", "trl/trainer/utils.py"
LENGTHS = (4, 2, 3)  # tokens of the three answers, EOS included, in 4 places
INPUTS = {
    "scores": [1.5, -0.75, 0.25],
    "logprobs": [[-1.25, -0.5, -2.0, -0.125], [-0.25, -1.5, 0, 0], [-3.0, -0.75, -0.375, 0]],
    "ref_logprobs": [[-1.0, -0.875, -2.5, -0.25], [-0.5, -1.25, 0, 0], [-2.0, -1.0, -0.5, 0]],
    # one value more than tokens where there is room: TRL reads the head after the last token too
    "values": [[0.5, 0.25, -0.125, 1.0], [-0.5, 0.125, 0.625, 0], [0.75, 0.0, 0.375, -0.25]],
    "new_logprobs": [[-1.0, -0.75, -1.75, -0.25], [-0.75, -1.375, 0, 0], [-2.5, -1.125, -0.25, 0]],
    "new_values": [[0.25, 0.5, -0.5, 1.5], [-0.375, 0.625, 0.5, 0], [0.25, -0.25, 0.5, -0.75]],
    "logits": [[0.5, -1.25, 2.0, 0.0], [-0.75, 1.5, 0.25, 3.0]],
    "tokens": [2, 0],
}
ARGS = {"kl_coef": 0.05, "gamma": 0.97, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2}
TEMPERATURE = 0.7
INVALID_LOGPROB = 1.0  # TRL fills the padding of log-probs with it


def between(source: str, first: str, last: str) -> str:
    """The lines from the one that contains `first` to the one that contains `last`, without their indentation."""
    lines = source.splitlines()
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = next(i for i, line in enumerate(lines) if i >= begin and last in line)
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def record(ppo: str, utils: str) -> dict:
    out = {}
    for estimator, whitened in (("k1", False), ("k3", True)):
        scope = rollout(ppo, estimator, whitened)
        out[estimator] = {name: scope[name] for name in ("rewards", "advantages", "returns")}
        out[estimator]["entropy"] = (-scope["logprobs"]).sum(1).mean()  # the line of `mean_entropy`
    out["losses"] = losses(ppo, rollout(ppo, "k1", False))
    scope = {"torch": torch, "F": torch.nn.functional}
    exec(between(utils, "def selective_log_softmax(", "    return per_token_logps"), scope)
    logits, tokens = tensor("logits") / (TEMPERATURE + 1e-7), torch.tensor(INPUTS["tokens"])
    exec(
        between(ppo, "prob_dist = torch", "entropy = torch"),
        scope | (here := {"logits": logits, "torch": torch}),
        here,
    )
    out["logits"] = {"logprobs": scope["selective_log_softmax"](logits, tokens), "entropy": here["entropy"]}
    return out


def rollout(ppo: str, estimator: str, whiten_rewards: bool) -> dict:
    """TRL's names after its lines on rewards, advantages and returns; masks as `train` makes them."""
    last = torch.tensor(LENGTHS) - 1  # `sequence_lengths`: the index of the last token, in spite of its name
    places = torch.arange(4).repeat(len(LENGTHS), 1)
    args = SimpleNamespace(**ARGS, kl_estimator=estimator, whiten_rewards=whiten_rewards)
    scope = {"torch": torch, "args": args, "self": SimpleNamespace(args=args), "empty_cache": lambda: None}
    scope |= {"sequence_lengths": last, "sequence_lengths_p1": last + 1, "responses": places}
    scope |= {"padding_mask": places > last.unsqueeze(1), "padding_mask_p1": places > (last + 1).unsqueeze(1)}
    scope |= {"scores": tensor("scores"), "values": tensor("values").masked_fill(scope["padding_mask_p1"], 0)}
    for name in ("logprobs", "ref_logprobs"):
        scope[name] = tensor(name).masked_fill(scope["padding_mask"], INVALID_LOGPROB)
    exec(between(ppo, "def masked_mean(", "    return whitened"), scope)
    end = "advantages = torch.masked_fill(advantages, padding_mask, 0)"
    exec(between(ppo, "# 4. compute rewards", end), scope)
    return scope


def losses(ppo: str, scope: dict) -> dict:
    scope |= {"micro_batch_inds": torch.arange(len(LENGTHS)), "mb_logprobs": scope["logprobs"]}
    scope |= {
        "mb_advantage": scope["advantages"],
        "mb_return": scope["returns"],
        "mb_values": scope["values"],
    }
    scope["new_logprobs"] = tensor("new_logprobs").masked_fill(scope["padding_mask"], INVALID_LOGPROB)
    scope["vpred"] = tensor("new_values").masked_fill(scope["padding_mask_p1"], 0)
    exec(between(ppo, "vpredclipped = torch.clamp(", "pg_loss = masked_mean("), scope)
    exec(between(ppo, "pg_clipfrac = masked_mean(", "                                )"), scope)
    exec(between(ppo, "approxkl = 0.5", "approxkl = 0.5"), scope)
    return {name: scope[name] for name in ("pg_loss", "pg_clipfrac", "vf_loss", "vf_clipfrac", "approxkl")}


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(INPUTS[name], dtype=torch.float64)


def _plain(x):
    """Tensors as lists of numbers with 10 digits."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    x = x.tolist() if isinstance(x, torch.Tensor) else x
    return [_plain(value) for value in x] if isinstance(x, list) else float(f"{x:.10g}")


if __name__ == "__main__":
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        found = record(*(wheel.read(name).decode() for name in (PPO, UTILS)))
    print("RECORDED =", json.dumps(_plain(found)))
