"""Models that code of this package makes: which there are, and building each once into the cache."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.errors import InputError
from rlhf_exp.model.quiet import no_progress_bars, spare_deepspeed
from rlhf_exp.paths import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# name in conf/model -> the function that gives its folder
BUILDERS = {
    "tiny": "rlhf_exp.model.tiny:build_tiny",
    "randomwalks": "rlhf_exp.model.letters:build_letters",
}


def build(name: str) -> Path:
    """The folder of a model of this package, built on the first call. InputError for an unknown name."""
    if name not in BUILDERS:
        raise InputError(
            f"model {name} has source=builtin, but the package makes {', '.join(BUILDERS)}: set model.path"
        )
    module, _, function = BUILDERS[name].partition(":")
    return getattr(import_module(module), function)()


def once(name: str, recipe: bytes, save: Callable[[Path], None]) -> Path:
    """models/<name>-<hash of the recipe> in the cache; `save` fills it where it is not there yet.

    Another recipe is another folder. Several processes may ask at once, the ranks of a run too: a machine's first one
    builds. InputError when the cache cannot be written.
    """
    folder = cache_dir() / "models" / f"{name}-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if folder.is_dir():  # it got its name when it was complete
        return folder
    from rlhf_exp.store import atomic
    from rlhf_exp.store.locks import build_lock

    try:
        with build_lock(folder, every_rank=True):
            if not folder.is_dir():
                with atomic.new_folder(folder) as temporary:
                    save(temporary)
    except OSError as error:
        raise InputError(
            f"cannot build the {name} model in {folder}: {error}; set RLHF_EXP_CACHE to another folder"
        ) from error
    return folder


def write(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model folder as any other."""
    tokenizer.save_pretrained(folder)
    spare_deepspeed()
    # in a run of several ranks transformers lets rank 0 alone write; here it may be any that builds
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    with no_progress_bars():
        model.save_pretrained(folder)
    # safetensors writes for its owner only; a shared cache is for everyone
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
