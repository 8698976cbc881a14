"""The mathematics of RLHF as pure functions of tensors: no config, no I/O, no device or dtype of their own.

`mask` is True where a token counts, B is the batch, T the response length, V the vocabulary. What stands in
padding never matters, not even NaN. Losses and metrics come back as tensors.
"""
