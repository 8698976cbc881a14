"""`hydra/sweeper=optuna`: trials chosen by optuna (4 or later), kept in an sqlite study that a kill does not harm.

    config      the keys, samplers and pruners
    sweeper     asks for a batch, launches it, tells how it went
    _space      Hydra's override grammar as optuna's distributions
    _samplers   sampler and pruner from their config, seeded trial by trial
    _study      the study: batches, resuming, telling
    _outcome    what a trial reports, as the values of the objectives
    _watch      prunes trials while they run
    _results    the best trials, printed and as optimization_results.yaml

Modules with an underscore import optuna; Hydra's scan for plugins leaves them alone, so that the command line of
those who have no optuna, or do not search, is as quick as before.
"""
