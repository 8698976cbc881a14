"""Data: rows of a public dataset -> records -> token ids -> padded batches.

`records` are what every stage reads, `sources` finds and reads files, one module a dataset family turns
rows into records, `load` joins these, `templates` makes text and token ids, `collate` pads (and is the only
place that does).
"""
