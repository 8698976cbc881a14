"""Roles: adapters that take turns on one frozen base.

    roles = Roles(base)
    roles.load("policy", sft_folder, trainable=True)     a LoRA adapter from a PEFT folder
    roles.load("ref", sft_folder)                        the same weights, frozen
    with roles.use("ref"): ...                           the base now computes as `ref`
    roles.close()                                        the base is plain again

Switching sets which adapter the LoRA layers apply and touches nothing else. PEFT's own `set_adapter` also flips
`requires_grad`: called between a forward and its backward, it zeroes gradients without a word.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_exp.errors import InputError
from rlhf_exp.model import lora_linear, sharing
from rlhf_exp.schema import Lora, Model

if TYPE_CHECKING:
    from peft import LoraConfig

    from rlhf_exp.model.base import Base

WEIGHTS = "adapter_model.safetensors"
BIN = "adapter_model.bin"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's file format names tensors as seen from its PeftModel
# an adapter's tensors, and how their names end in a file
PARTS = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}
BASE = None  # the role without an adapter
OURS = (
    "_recomputes_in_roles"  # mark of a model whose layers `Roles.checkpoint_activations` has made recompute
)


def lora_config(lora: Lora, model: Model) -> LoraConfig:
    """PEFT's config for our `lora` group on this model. InputError when no module is named."""
    from peft import LoraConfig

    targets = model.lora_targets if lora.targets == ["auto"] else lora.targets
    if not targets:
        raise InputError(
            f"lora.targets=[auto], but model {model.name} names no lora_targets: set one of the two"
        )
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


class Roles:
    """The adapters on one base, of which one (or none) is active at a time."""

    def __init__(self, base: Base, recompute: bool = False):
        """recompute: `checkpoint_activations` from the start."""
        self.base = base
        self.active: str | None = BASE
        self._configs: dict[str, LoraConfig] = {}
        self._layers: list[nn.Module] = []
        self._checkpointable = [m for m in base.model.modules() if hasattr(m, "gradient_checkpointing")]
        self._checkpointing = False
        self._autocasts = False
        if recompute:
            self.checkpoint_activations()

    # ---------------------------------------------------------------- adapters

    def new(self, role: str, config: LoraConfig, seed: int, trainable: bool = True) -> None:
        """A fresh adapter: A random, B zero (Hu et al. 2021), so that the role computes as the base.

        With DoRA (Liu et al. 2024, eq. 5) its magnitudes are the norms of the base's weights.
        """
        with torch.random.fork_rng(devices=_devices(self.base)):
            torch.manual_seed(seed)
            self._inject(role, config)
        if config.use_dora:
            self._measure(role)
        self._set_trainable(role, trainable)

    def load(self, role: str, folder: Path, trainable: bool = False) -> None:
        """An adapter from a PEFT folder, bit for bit.

        Raises InputError for a folder that is no LoRA adapter or does not fit this base.
        """
        from peft import LoraConfig

        try:
            config = LoraConfig.from_pretrained(folder)
            stored = read_weights(folder)
        except Exception as error:  # whatever a foreign file makes PEFT or safetensors say
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{folder} is not a LoRA adapter: {reason}") from error
        with torch.random.fork_rng(devices=_devices(self.base)):  # the initialisation that is overwritten
            self._inject(role, config)
        own = self._tensors(role)
        stored = {name.removeprefix(PREFIX): value for name, value in stored.items()}
        if wrong := _mismatch(own, stored):
            self.remove(role)
            raise InputError(f"the adapter in {folder} does not fit this base: {wrong}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])
        self._set_trainable(role, trainable)

    def save(self, role: str, folder: Path) -> None:
        """Write the role in PEFT's format: `PeftModel.from_pretrained(base, folder)` reads it."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            PREFIX + name: value.detach().cpu().contiguous() for name, value in self._tensors(role).items()
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = self._configs[role]
        config.base_model_name_or_path = str(self.base.path)
        config.inference_mode = True
        config.save_pretrained(folder)
        # which base it belongs to, by content: a path says little on another machine
        (folder / "base.json").write_text(
            json.dumps({"hash": self.base.hash, "name": self.base.path.name}) + "\n"
        )

    def remove(self, role: str) -> None:
        for layer in self._layers:
            layer.delete_adapter(role)
        self._set_casts()
        self._configs.pop(role, None)
        self._activate(BASE)

    def close(self) -> None:
        """Take every adapter off: the base's modules are what they were before."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self.base.model
        for name, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], module.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.__dict__.pop("_hf_peft_config_loaded", None)
        if self._checkpointing:
            model.activation_checkpointing_disable()
            model.__dict__.pop(OURS, None)
        self._layers, self._configs, self.active = [], {}, BASE

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The role's weights, LoRA's A and B and DoRA's magnitudes (float32 whatever the base runs in)."""
        return list(self._tensors(role).values())

    def __enter__(self) -> Roles:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---------------------------------------------------------------- forward

    @contextmanager
    def use(self, role: str | None) -> Iterator[None]:
        """Compute as `role` (None: the plain base) inside.

        Safe between a forward and its backward: no gradient is lost or lands elsewhere. Under activation
        checkpointing (`checkpoint_activations`) the recomputation takes the role of its forward.

        On a bfloat16 base the adapters' float32 weights are multiplied in bfloat16 (lora_linear.py, and autocast for
        the layers that it leaves to PEFT); the weights and their gradients stay float32. PEFT alone casts every
        layer's input to float32, which costs two thirds of a forward on a CPU when all linear layers are wrapped.
        """
        before = self.active
        self._activate(role)
        try:
            with self._autocast():
                yield
        finally:
            self._activate(before)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.base.dtype == torch.float32 or not self._autocasts:
            return nullcontext()
        # no cache: it would keep bfloat16 copies of the adapters while the role is in use, over optimiser steps
        return torch.autocast(self.base.device.type, self.base.dtype, cache_enabled=False)

    def trunk(self, role: str | None, ids: Tensor, **arguments: Any) -> Tensor:
        """Hidden states [B, T, d] after the final norm, computed as `role`.

        ids int64[B, T], right-padded: under causal attention padding on the right is never seen by a real
        token, so no mask is built. `arguments` go to the transformer (left-padded callers pass their mask).
        In the base's dtype: autocast leaves a last LayerNorm's output in float32 on some devices.
        """
        with self.use(role), self._recomputed():
            hidden = self.base.trunk(input_ids=ids, use_cache=False, **arguments).last_hidden_state
        return hidden.to(self.base.dtype)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward (less memory, a third more time), each in its own role.

        Raises InputError for an architecture that transformers cannot do it for.
        """
        if not self.base.model.supports_gradient_checkpointing:
            raise InputError(
                f"memory.gradient_checkpointing: {type(self.base.model).__name__} cannot recompute its layers: "
                "set it to false"
            )
        self.base.model.activation_checkpointing_enable(self.recomputation)
        self._checkpointing = True
        setattr(self.base.model, OURS, True)

    @property
    def recomputation(self) -> dict[str, Any]:
        """torch's settings for it, for a library that switches it off and on again."""
        return {"use_reentrant": False, "context_fn": lambda: (nullcontext(), self._later())}

    def _later(self) -> AbstractContextManager[None]:
        """What is so now (the role, and how rows are shared), for a layer that is computed again."""
        role, sharing_again = self.active, sharing.again()

        @contextmanager
        def both() -> Iterator[None]:
            with self.use(role), sharing_again:
                yield

        return both()

    @contextmanager
    def _recomputed(self) -> Iterator[None]:
        """transformers checkpoints layers in training mode only: inside, these are, where there will be a backward.

        The layers alone and not what is in them: no dropout is switched on.
        """
        if not self._checkpointing or not torch.is_grad_enabled():
            yield
            return
        waiting = [module for module in self._checkpointable if not module.training]
        for module in waiting:
            module.training = True
        try:
            yield
        finally:
            for module in waiting:
                module.training = False

    # ---------------------------------------------------------------- inside

    def _activate(self, role: str | None) -> None:
        if role is not BASE and role not in self._configs:
            raise KeyError(f"no role {role!r}; there are {', '.join(self._configs) or 'none'}")
        ours = hasattr(self.base.model, OURS)
        if not ours and any(module.gradient_checkpointing for module in self._checkpointable):
            raise RuntimeError(
                "gradient checkpointing was switched on by somebody else: it would recompute a forward in "
                "another role and put its gradient there; use Roles.checkpoint_activations()"
            )
        for layer in self._layers:
            # past nn.Module.__setattr__, which costs more than all the rest of a switch
            layer.__dict__["_active_adapter"] = [] if role is BASE else [role]
            layer.__dict__["_disable_adapters"] = role is BASE
        self.active = role

    def _inject(self, role: str, config: LoraConfig) -> None:
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        if role in self._configs:
            raise KeyError(f"role {role!r} is there already")
        trainable = [p for p in self.base.model.parameters() if p.requires_grad]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                # GPT-2's Conv1D: PEFT sees it by itself, and says so
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
                inject_adapter_in_model(config, self.base.model, role)
        except ValueError as error:
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"LoRA cannot be put on this model (lora.targets): {reason}") from error
        if getattr(self.base.model, "is_quantized", False):
            self.base.model._hf_peft_config_loaded = True  # else a Trainer refuses: nothing could be trained
        self._configs[role] = config
        self._layers = [m for m in self.base.model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._layers:
            lora_linear.install(layer)
        self._set_casts()
        # injecting flips requires_grad of the adapters that were there
        self.base.model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        for parameter in self._tensors(role).values():
            parameter.data = parameter.data.to(self.base.device, torch.float32)
        self.base.model.eval()
        self._activate(self.active)

    def _measure(self, role: str) -> None:
        """DoRA's magnitudes as its forward computes the norms, in float32.

        PEFT measures them in the base's dtype: with bfloat16 the role would start up to 0.4 % from the base.
        """
        from peft.utils.integrations import dequantize_module_weight

        for layer in self._layers:
            if role in layer.lora_magnitude_vector:
                dora, weight = (
                    layer.lora_magnitude_vector[role],
                    dequantize_module_weight(layer.get_base_layer()),
                )
                norms = dora.get_weight_norm(weight.float(), torch.zeros((), device=weight.device), 1.0)
                dora.weight.data = norms.detach()

    def _set_casts(self) -> None:
        """Whether layers cast their input to float32: not for LoRA alone, see `use`.

        DoRA computes the norms of the weights in the input's dtype, and compares them with float32 magnitudes.
        """
        for layer in self._layers:
            layer.cast_input_dtype_enabled = len(layer.lora_magnitude_vector) > 0
        self._autocasts = not all(map(lora_linear.casts, self._layers))

    def _set_trainable(self, role: str, trainable: bool) -> None:
        for parameter in self.parameters(role):
            parameter.requires_grad_(trainable)

    def _tensors(self, role: str) -> dict[str, nn.Parameter]:
        """The role's parameters under the names that PEFT's file format gives them, without its prefix."""
        if role not in self._configs:
            raise KeyError(f"no role {role!r}; there are {', '.join(self._configs) or 'none'}")
        ends = {f".{part}.{role}.weight": f".{part}{end}" for part, end in PARTS.items()}
        return {
            name.removesuffix(end) + ends[end]: parameter
            for name, parameter in self.base.model.named_parameters()
            for end in ends
            if name.endswith(end)
        }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder; older ones are in adapter_model.bin, which is read without running its code."""
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file() or not (folder / BIN).is_file():
        return load_file(folder / WEIGHTS)
    return torch.load(folder / BIN, map_location="cpu", weights_only=True)


def _devices(base: Base) -> list[torch.device]:
    return [base.device] if base.device.type == "cuda" else []


def _mismatch(own: dict[str, nn.Parameter], stored: dict[str, Tensor]) -> str | None:
    """What does not fit, in words; None if names and shapes agree."""
    if missing := sorted(set(own) - set(stored)):
        return f"it has no {missing[0]}" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
    if extra := sorted(set(stored) - set(own)):
        return f"this base has no place for {extra[0]}" + (
            f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        )
    for name, parameter in own.items():
        if parameter.shape != stored[name].shape:
            return f"{name} is {tuple(stored[name].shape)}, needed is {tuple(parameter.shape)}"
    return None
