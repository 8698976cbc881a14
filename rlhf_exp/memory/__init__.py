"""How much memory a stage needs, counted before anything is loaded: no torch, no weights.

architecture.py  a model's sizes, from its files or from its preset     activations.py  what a forward keeps
parts.py         what a stage holds, by role, kind and phase            strategies.py   how ranks divide it
levers.py        what would make it smaller, and by how much            fit.py          what there is; the micro-batch
table.py         the table of dry_run=true
"""
