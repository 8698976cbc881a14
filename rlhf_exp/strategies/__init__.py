"""strategy=single|ddp|zero1|zero2|zero3|zero3_offload: one run on several devices.

What is trained is a few megabytes of adapters and heads on a base of gigabytes that is frozen. So the plainest scheme
is exact and costs next to nothing: **every rank runs the same program on the same state**, and rows are divided at a
few places only, behind functions whose results are those of one process.

    rollout.generate        each rank answers its prompts; all have all answers afterwards
    scores, log-probs       each rank computes its rows; all have all numbers afterwards
    micro-batches           each rank takes its rows of every minibatch; losses are shares of the global mean (sums
                            over the *global* number of tokens), gradients are summed over the ranks, once a step
    files, MLflow, screen   rank 0

Everything between is computed by all ranks from equal numbers: the KL, whitening, running moments, advantages,
guards, clipping, the optimiser's step. It is the code of one process on the data of one process, so that metrics are
the same, nothing can drift apart, and there is no second formula to be wrong. Answers are the same on any number of
ranks because their noise is keyed by (seed, step, prompt, sample); data order by (seed, epoch).

- **ddp**: the base and the adapters on every rank. A sum of gradients is one flat all-reduce of the adapters, after
  the last micro-batch. torch's DistributedDataParallel would overlap megabytes with the backward, and would have to
  be told of roles that are switched between forward and backward.
- **zero1, zero2** (zero_adamw.py): besides, DeepSpeed's engine shards AdamW's moments (zero2: its reduced gradients)
  over the ranks and gathers the stepped weights.
- **zero3, zero3_offload** (parameters.py): besides, DeepSpeed shards the frozen base's weights; its hooks gather a
  layer for the time of its forward and its backward. Generation gathers all of them once. Embeddings and the output
  layer, which our log-probs read in pieces, stay whole. Adapters are replicated as ever.

Rank 0 alone reports; strategies/watch.py ends all ranks when one is gone. A checkpoint holds what one process would
write, moments in one shard a rank, so that any number of ranks continues it.
"""
