"""Sweeps: many trials of one command, each frozen before it waits, none lost.

plan      what is checked before the first trial
folder    the sweep's folder: sweep.json, and the frozen code that its trials run on
ledger    what became of each trial, an append-only list
passwords what no file of it may have
trial     one trial, frozen in a file (trial_file), and what runs it in this process or another
figures   its objective, gold score and KL, out of what its run reports
current   the trial that this process is in the middle of
pruning   values of a running trial, and what ends it early
"""
