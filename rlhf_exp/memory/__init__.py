"""How much memory a stage needs, counted before anything is loaded: no torch, no weights.

architecture.py  a model's sizes, from its files or from its preset     counted.py      items: role, kind, phases
activations.py   what a forward keeps                                   weights.py      weights, gradients, moments
logits.py        what is held of them                                   training.py     sft, reward, dpo, kto, ilql
sampling.py      ppo, rft, eval, prefer; the KV cache                   parts.py        all that a stage holds
strategies.py    how ranks divide it                                    levers.py       what would make it smaller
free.py          what there is; the micro-batch                         table.py        the table of dry_run=true
kernels.py       what oneDNN compiles on a CPU          travel.py       what ranks send
"""
