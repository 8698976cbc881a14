"""Training a reward model by rlhf_exp against TRL's RewardTrainer: pairs a second, side by side.

    python benchmarks/reward.py                          the 41M Llama, both dtypes
    python benchmarks/reward.py --shape smollm2 --dtype bfloat16 --pairs 4 --turns 3

Pairs as of TL;DR: prompts of 190 to 510 tokens (350 on average), answers of 29 to 51 (40); --fixed makes all alike.
Each system is a process of its own, and they take turns, an optimiser step each, so that whatever else the machine
does meets all of them. Seconds and ratios are of CPU time, which on one thread other jobs stretch least; the wall
clock is beside them. Ratios are medians of the ratios within a turn; the first turn is for warming up.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from shapes import LORA_ALPHA, LORA_RANK, LR, SHAPES, TARGETS, Shape  # noqa: E402
from side import Child, Side  # noqa: E402

SYSTEMS = ("rlhf_exp", "separate", "trl", "trl_default")
TITLES = {
    "rlhf_exp": "rlhf_exp",
    "separate": "rlhf_exp, reward.share_prompts=false",
    "trl": "TRL {trl}, activations kept as ours",
    "trl_default": "TRL {trl} as it comes (recomputes activations)",
}
PROMPT, ANSWER = (190, 510), (29, 51)  # tokens, uniform
STEPS = 200  # there is data for

Pairs = list[tuple[list[int], list[int], list[int]]]


def pairs_of(shape: Shape, number: int, fixed: bool) -> Pairs:
    """Prompt, chosen and rejected of random tokens; ids from 1000: no special token is among them."""
    import torch

    draw = torch.Generator().manual_seed(2)

    def length(bounds: tuple[int, int]) -> int:
        low, high = bounds
        return (low + high) // 2 if fixed else int(torch.randint(low, high + 1, (), generator=draw))

    def text(bounds: tuple[int, int]) -> list[int]:
        return torch.randint(1000, shape.vocabulary, (length(bounds),), generator=draw).tolist()

    return [(text(PROMPT), text(ANSWER), text(ANSWER)) for _ in range(number)]


def flops(shape: Shape, texts: list[tuple[int, int]]) -> float:
    """Multiplications and additions of matrix products of a step over `texts`: (new tokens, tokens before them).

    As in shapes.py: 2 operations a weight and token, the backward as many again (the base is frozen) and LoRA's own
    gradients; attention the causal half. No output layer.
    """
    d, k, m, r = shape.hidden, shape.kv_size, shape.intermediate, LORA_RANK
    matrices = ((d, d), (d, k), (d, k), (d, d), (d, m), (d, m), (m, d))  # in, out of the seven
    base, lora = (
        shape.layers * sum(cost)
        for cost in ((a * b for a, b in matrices), (r * (a + b) for a, b in matrices))
    )
    total = 0.0
    for new, before in texts:
        attention = 2 * shape.layers * 2 * d * new * (before + new / 2)
        forward = 2 * new * (base + lora) + attention
        total += 2 * forward + 2 * new * lora + attention
    return total


def needed(shape: Shape, pairs: Pairs) -> dict[str, float]:
    """Operations of a step: with each prompt once; with it twice; and twice with padding to the longest."""
    shared = [(len(p) + len(c), 0) for p, c, _ in pairs] + [(len(r), len(p)) for p, _, r in pairs]
    twice = [(len(p) + len(answer), 0) for p, *both in pairs for answer in both]
    longest = max(new for new, _ in twice)
    return {
        name: flops(shape, texts)
        for name, texts in (("once", shared), ("twice", twice), ("padded", [(longest, 0)] * len(twice)))
    }


# ---------------------------------------------------------------- the systems


def clock(side: Side, pairs: int) -> Any:
    """A callback that ends each step with a report and waits for the next turn."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        start, cpu = 0.0, 0.0

        def ask(self) -> None:
            if not side.wait():
                raise SystemExit(0)
            self.start, self.cpu = time.perf_counter(), time.process_time()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ask()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wall, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu
            side.report({"wall": wall, "seconds": cpu, "pairs": pairs})
            self.ask()

    return Clock()


def training(dtype: str, pairs: int) -> dict[str, Any]:
    """TrainingArguments that both trainers are given."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": pairs,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def ours(shape: Shape, dtype: str, pairs: int, data: Pairs, side: Side, share: bool) -> None:
    from rlhf_exp.data.pairs import Pair
    from rlhf_exp.data.records import Comparison
    from rlhf_exp.model.base import load_base
    from rlhf_exp.model.heads import ScalarHead
    from rlhf_exp.model.roles import Roles, lora_config
    from rlhf_exp.schema import Lora, Model, Optim, Reward, RewardRun, Train
    from rlhf_exp.stages.optim import adamw, schedule
    from rlhf_exp.stages.pair_trainer import RewardModel
    from rlhf_exp.stages.reward import shares, trainer_of

    model = Model(name=shape.name, path=str(shape.folder()), dtype=dtype, lora_targets=TARGETS)
    config = RewardRun(
        model=model,
        lora=Lora(r=LORA_RANK, alpha=LORA_ALPHA),
        train=Train(steps=STEPS, batch_size=pairs, micro_batch_size=pairs),
        optim=Optim(lr=LR, schedule="constant"),
        reward=Reward(share_prompts=share),
    )
    base = load_base(model, "cpu")
    with Roles(base) as roles:
        roles.new("reward", lora_config(config.lora, model), 0)
        head = ScalarHead(base.hidden_size).reset(0)
        found = [Pair(*each) for each in data]
        rows = [Comparison(i, "", "", "") for i in range(len(found))]
        if share and not shares(config, base):
            raise SystemExit("prompts are not shared")
        trainer = trainer_of(
            config, RewardModel(roles, head, share), found, rows, training(dtype, pairs) | {"bf16": False}
        )
        trainer.optimizer = adamw([*roles.parameters("reward"), *head.parameters()], config.optim)
        trainer.lr_scheduler = schedule(trainer.optimizer, config.optim, STEPS)
        trainer.log = lambda *_, **__: None
        trainer.add_callback(clock(side, pairs))
        trainer.train()


def trl(shape: Shape, dtype: str, pairs: int, data: Pairs, side: Side, recompute: bool) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    folder = shape.folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # TRL tells padding by the token: one that is not in the texts
    tokenizer.pad_token = "<pad>" if shape.name != "smollm2" else "<reponame>"
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=getattr(torch, dtype), pad_token_id=tokenizer.pad_token_id
    )
    arguments = RewardConfig(
        **training(dtype, pairs), bf16=dtype == "bfloat16", gradient_checkpointing=recompute
    )
    columns = {
        "chosen_ids": [p + c for p, c, _ in data],
        "rejected_ids": [p + r for p, _, r in data],
    }
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(columns),
        peft_config=LoraConfig(
            task_type="SEQ_CLS",
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            target_modules=TARGETS,
            modules_to_save=["score"],
        ),
        callbacks=[clock(side, pairs)],
    )
    trainer.log = lambda *_, **__: None
    trainer.train()


def play(name: str, shape: Shape, options: argparse.Namespace) -> None:
    """Be one of the systems (in a child process)."""
    import torch

    torch.set_num_threads(options.threads)
    data, side = pairs_of(shape, STEPS * options.pairs, options.fixed), Side()
    arguments = shape, options.dtype[0], options.pairs, data, side
    if name.startswith("trl"):
        trl(*arguments, recompute=name == "trl_default")
    else:
        ours(*arguments, share=name == "rlhf_exp")


# ---------------------------------------------------------------- the comparison


def rate(dtype: str, shape: Shape, pairs: int, seconds: float = 0.3) -> float:
    """Matrix products, operations a second of CPU time, best of several: about a step's tokens.

    By the fastest library that torch has here for them, whichever a system takes.
    """
    import torch

    from rlhf_exp.algorithms.product import linear

    kind = getattr(torch, dtype)
    x = torch.randn(430 * pairs, shape.hidden).to(kind)
    weight = torch.randn(shape.intermediate, shape.hidden).to(kind)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.process_time()
        linear(x, weight)
        best = min(best, time.process_time() - start)
    return 2 * x.shape[0] * weight.numel() / best


def compare(shape: Shape, dtype: str, options: argparse.Namespace) -> None:
    """Take turns and print a table."""
    import torch
    import trl as installed

    torch.set_num_threads(options.threads)
    arguments = ["--shape", shape.name, "--dtype", dtype, "--threads", str(options.threads)]
    arguments += ["--pairs", str(options.pairs)] + ["--fixed"] * options.fixed
    shape.folder()
    root = str(HERE.parent)
    children = [Child(name, arguments, root, options.threads, "reward.py") for name in options.systems]
    turns: dict[str, list[dict[str, float]]] = {child.name: [] for child in children}
    rates = []
    for turn in range(options.turns + 1):
        for child in children:
            found = child.turn()
            if turn:
                turns[child.name].append(found)
        rates.append(rate(dtype, shape, options.pairs))
    for child in children:
        child.close()
    # the data of a thousand pairs: a step has other lengths than the next
    costs = [
        needed(shape, pairs_of(shape, STEPS * options.pairs, options.fixed)[i : i + options.pairs])
        for i in range(0, STEPS * options.pairs, options.pairs)
    ]
    once, twice, padded = (statistics.mean(cost[name] for cost in costs) for name in costs[0])
    limit = once / max(rates)
    print(
        f"\n{shape.name} {dtype}: {options.pairs} pairs of {'350 + 40' if options.fixed else 'about 350 + 40'} "
        f"tokens, {options.threads} thread(s), {options.turns} turns, load {os.getloadavg()[0]:.1f}; "
        f"{once / 1e12:.3f} TFLOP a step at {max(rates) / 1e9:.0f} GFLOP/s: {limit:.2f} s. Prompts twice: "
        f"{twice / once:.2f} times that, padded: {padded / once:.2f} times\n"
    )
    print("| system | s a step | pairs/s | times ours | by the wall clock | peak GB | of the limit |")
    print("|---|---|---|---|---|---|---|")
    own = turns.get("rlhf_exp", next(iter(turns.values())))
    for name, found in turns.items():
        seconds = statistics.median(turn["seconds"] for turn in found)
        ratio, wall = (
            statistics.median(a[clock] / b[clock] for a, b in zip(found, own, strict=True))
            for clock in ("seconds", "wall")
        )
        cells = (
            TITLES[name].format(trl=installed.__version__),
            f"{seconds:.2f}",
            f"{options.pairs / seconds:.2f}",
            f"{ratio:.2f}",
            f"{wall:.2f}",
            f"{found[-1]['peak'] / 1e9:.2f}",
            f"{limit / seconds:.1%}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama"])
    parser.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--pairs", type=int, default=8, help="of a step, all in one forward")
    parser.add_argument("--fixed", action="store_true", help="all prompts of 350 tokens, all answers of 40")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--system", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.system:
        play(options.system, SHAPES[options.shape[0]], options)
        return
    for name in options.shape:
        for dtype in options.dtype:
            compare(SHAPES[name], dtype, options)


if __name__ == "__main__":
    main()
