"""`hydra/launcher=local_pool`: trials side by side on this machine, each in a process of its own.

config     the keys
launcher   what Hydra calls: freezes trials, runs them, returns how they ended in the order they came
_share     who gets which devices and how many threads
_pool      starts processes, waits for them, passes signals on
_child     the first lines of a trial's process: it ends when the launcher is gone
_lost      how a process ended that could not say so itself
_view      the running trials on a terminal, or as plain lines
"""
