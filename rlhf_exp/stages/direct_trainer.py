"""TRL's DPOTrainer and KTOTrainer on roles of our one base.

TRL computes the loss and transformers' Trainer takes the steps, as in sft: with what supervised.py adds, a run
continues exactly, from files that hold no pickle. Ours is what goes in: token ids instead of texts, so that TRL's
templates, EOS and truncation touch nothing; and the reference. Given a PeftModel, TRL copies its adapter and switches
with PEFT's `set_adapter`, which flips `requires_grad` in the middle of a step and knows nothing of roles; given a
plain model, it loads the base again. Here a view of the base in another role takes the place of its second model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from rlhf_exp import distributed
from rlhf_exp.data.pairs import Pair
from rlhf_exp.model.roles import Roles
from rlhf_exp.schema import DPORun, KTORun
from rlhf_exp.stages import divided, supervised


class Reference(nn.Module):
    """The base as it computes in `role`: what TRL takes for a reference model, without a weight of its own."""

    def __init__(self, roles: Roles, role: str | None):
        super().__init__()
        self._roles, self._role = roles, role

    @property
    def config(self) -> Any:
        return self._roles.base.model.config

    def base_model(self, *arguments: Any, **options: Any) -> Any:
        """Hidden states; TRL's fused head, which it puts on this module too, asks for them by this name."""
        with self._roles.use(self._role):
            return self._roles.base.trunk(*arguments, **options)

    def get_output_embeddings(self) -> nn.Module:
        return self._roles.base.model.get_output_embeddings()


class ByStep:
    """Before TRL's trainer in the order of classes: a step is a batch of pairs, computed `size` at a time.

    The Trainer hands over which pairs a step has, so that a mean over all of them can be taken: the mean of unequal
    micro-batches' means, which the Trainer takes, depends on how they were cut. No dropout, in the base or in the
    adapter (it would differ from the reference's): the model is in training by name only.
    """

    pairs: Sequence[Pair]
    size: int
    pad_id: int
    in_shards: bool = False  # of the base

    @staticmethod
    def collate(rows: list[dict[str, int]]) -> dict[str, Tensor]:
        return {"rows": torch.tensor([row["row"] for row in rows])}

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Nothing to tokenise: it holds places in `pairs`."""
        return dataset

    def batches(self, rows: list[int]) -> list[tuple[int, dict[str, Tensor]]]:
        """The step's pairs in parts: how many pairs, and TRL's batch of them; on several ranks this rank's.

        A part of 0 pairs is computed for the sake of the other ranks, and does not count (distributed.turns).
        """
        raise NotImplementedError

    def prepare(self, batches: list[dict[str, Tensor]], counts: list[int]) -> None:
        """What the whole step has to know before its parts are computed; counts: pairs of each batch."""

    def parts(self, rows: Sequence[int]) -> list[list[int]]:
        """Places in `rows` in groups of at most `size`, similar lengths together: less padding; of all ranks."""
        order = sorted(range(len(rows)), key=lambda i: (self.pairs[rows[i]].tokens, i))
        return distributed.shares(
            order, lambda hand: [hand[start : start + self.size] for start in range(0, len(hand), self.size)]
        )

    def own_parts(self, rows: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """This rank's parts, and how many pairs of each count."""
        for part, counts in distributed.turns(self.parts(rows), self.in_shards):
            yield part, len(part) if counts else 0

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            # TRL asks the model, and switches recomputation, by names that transformers has replaced
            for name in ("is_gradient_checkpointing", "gradient_checkpointing_(en|dis)able"):
                warnings.filterwarnings("ignore", message=f"`{name}`", category=FutureWarning)
            return super().compute_loss(*arguments, **options)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """The mean loss of a step's pairs; its gradient is added to the weights'."""
        model.training = True
        rows = inputs["rows"].tolist()
        device = self.accelerator.device
        found = self.batches(rows)
        counts = [count for count, _ in found]
        batches = [{name: x.to(device) for name, x in batch.items()} for _, batch in found]
        shares = [count / len(rows) for count in counts]
        total, tokens = torch.zeros((), device=device), getattr(self, "_total_train_tokens", 0)
        self.prepare(batches, counts)
        for share, batch in zip(shares, batches, strict=True):
            seen = getattr(self, "_total_train_tokens", 0)
            loss = self.compute_loss(model, batch) * share
            if not share:
                self._total_train_tokens = seen
            self.accelerator.backward(loss)
            total += loss.detach()
        divided.join_metrics(self, shares, tokens)
        return divided.finish(self, total)


class DPOSteps(ByStep, DPOTrainer):
    """DPO's, IPO's and cDPO's losses."""

    def batches(self, rows: list[int]) -> list[tuple[int, dict[str, Tensor]]]:
        collate, found = DataCollatorForPreference(self.pad_id), []
        for part, count in self.own_parts(rows):
            pairs = [self.pairs[rows[i]] for i in part]
            examples = [
                {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
                for pair in pairs
            ]
            found.append((count, collate(examples)))
        return found


class KTOSteps(ByStep, KTOTrainer):
    """KTO's loss; the KL of its reference point is that of the whole step, however the step is cut."""

    _kl: dict[bool, Tensor]  # of the reference? -> log-probs [2b] of prompts with answers to other prompts

    def batches(self, rows: list[int]) -> list[tuple[int, dict[str, Tensor]]]:
        """Of each pair two rows: the chosen answer is desirable, the rejected one is not.

        Each answer of the step also stands once after another prompt: moved on by one, as in TRL, first all chosen
        ones, then all rejected ones. A pair that is alone in its batch (an epoch's last) borrows the next pair's.
        """
        pairs = [self.pairs[row] for row in rows]
        answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        moved = [answers[-1], *answers[:-1]]
        if len(pairs) == 1:
            neighbour = self.pairs[(rows[0] + 1) % len(self.pairs)]
            moved = [neighbour.chosen, neighbour.rejected]
        examples = [
            {"prompt_ids": pair.prompt, "completion_ids": answer, "KL_completion_ids": other, "label": good}
            for pair, answer, other, good in zip(
                pairs * 2, answers, moved, [True] * len(pairs) + [False] * len(pairs), strict=True
            )
        ]
        collate, found = DataCollatorForUnpairedPreference(self.pad_id), []
        for part, count in self.own_parts(rows):
            both = [*part, *(len(pairs) + i for i in part)]
            found.append((count, collate([examples[i] for i in both])))
        return found

    def prepare(self, batches: list[dict[str, Tensor]], counts: list[int]) -> None:
        self._kl = {
            model is self.ref_model: self._whole(
                [KTOTrainer._compute_kl_logps(self, model, batch) for batch in batches], counts
            )
            for model in (self.model, self.ref_model)
        }

    def _whole(self, parts: list[Tensor], counts: list[int]) -> Tensor:
        """Those of all parts, of all ranks."""
        if distributed.world_size() == 1:
            return torch.cat(parts)
        own = [part.cpu() for part, count in zip(parts, counts, strict=True) if count]
        return torch.cat([part for each in distributed.gather(own) for part in each]).to(
            self.accelerator.device
        )

    def _compute_kl_logps(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Those of the whole step, whichever part of it `batch` is."""
        return self._kl[model is self.ref_model]


# dropout is off without TRL, which would set it to 0 in the shared base; the templates cut
OURS = {"disable_dropout": False, "max_length": None, "pad_to_multiple_of": None}


def settings_of(config: DPORun | KTORun, arguments: dict[str, Any]) -> DPOConfig | KTOConfig:
    """TRL's settings. Its sigmoid loss takes no label smoothing (1.16 ignores it), its `robust` is another estimator.

    With l and l' the losses of a pair and of the swapped pair, robust is ((1 - e) l - e l') / (1 - 2 e), so that
    cDPO, (1 - e) l + e l' (Mitchell 2023, eq. 3), is 2 (1 - e) sigmoid - (1 - 2 e) robust.
    """
    given = arguments | OURS
    if isinstance(config, KTORun):
        return KTOConfig(**given, **asdict(config.kto))
    e, losses, weights = config.dpo.label_smoothing, [config.dpo.loss], [1.0]
    if e:
        losses, weights = ["sigmoid", "robust"], [2 * (1 - e), -(1 - 2 * e)]
    return DPOConfig(**given, loss_type=losses, loss_weights=weights, beta=config.dpo.beta, label_smoothing=e)


def build(
    config: DPORun | KTORun,
    arguments: dict[str, Any],
    roles: Roles,
    reference: str | None,
    pairs: Sequence[Pair],
    **options: Any,
) -> Any:
    """A trainer of the active role against the role `reference`. arguments: of TrainingArguments."""
    base = roles.base
    # TRL rounds a quantised base's adapters to bfloat16
    kept = [(p, p.data) for p in base.model.parameters() if p.requires_grad]
    kind = DPOSteps if isinstance(config, DPORun) else KTOSteps
    trainer = kind(
        model=base.model,
        ref_model=Reference(roles, reference),
        args=supervised.on_one_device(settings_of(config, arguments)),
        train_dataset=supervised.dataset_of(row=list(range(len(pairs)))),
        data_collator=kind.collate,
        processing_class=base.tokenizer,
        **options,
    )
    for parameter, value in kept:
        parameter.data = value
    # TRL's KTO wants a fixed order, which its datasets' KL answers are made for: ours are made for each step
    trainer.args.train_sampling_strategy = "random"
    # TRL switches checkpointing off for the reference and on again, with these settings
    trainer.args.gradient_checkpointing_kwargs = roles.recomputation
    trainer.pairs, trainer.size, trainer.pad_id = pairs, config.train.micro_batch_size, base.pad_id
    trainer.in_shards = base.in_shards
    supervised.without_printing(trainer)
    return trainer
