"""Content-addressed run folders: keys, atomic writes, verification, build locks. Loads no torch.

`python -m rlhf_exp.store` lists, shows, compares and cleans them.
"""

from rlhf_exp.store.frozen import freeze
from rlhf_exp.store.keys import canonical, fingerprint_file, fingerprint_folder, run_key
from rlhf_exp.store.locks import build_lock, is_held
from rlhf_exp.store.manifest import CorruptArtifact
from rlhf_exp.store.preflight import require_space, require_writable
from rlhf_exp.store.runs import RunFolder, find, run_folder

__all__ = [
    "CorruptArtifact",
    "RunFolder",
    "build_lock",
    "canonical",
    "find",
    "fingerprint_file",
    "fingerprint_folder",
    "freeze",
    "is_held",
    "require_space",
    "require_writable",
    "run_folder",
    "run_key",
]
