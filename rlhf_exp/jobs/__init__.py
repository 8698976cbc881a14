"""A sweep as SLURM jobs: what is submitted, what runs on a node, and what became of it (`python -m rlhf_exp.jobs`).

Where it is submitted:
    settings   what a job asks for, by stage
    graph      which jobs a sweep takes, and which waits for which
    script     the sbatch script, through submitit
    submit     brings them to SLURM
On the nodes:
    worker     what each task of a job runs, and who puts the job back into the queue
    ranks      who the task is among the others
    child      the process that the worker starts and watches
    upstream   one stage that trials stand on
Anywhere:
    units      the jobs as the ledger has them
    states     what SLURM says about jobs
    watch      both together: how each stands, and how those ended that could not say so
    table      that for people
"""
