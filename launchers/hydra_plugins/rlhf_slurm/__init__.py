"""hydra/launcher=slurm: the trials of a sweep as SLURM jobs."""
