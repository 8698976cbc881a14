"""Family `sst2`: sentences of film reviews (Socher et al. 2013, GLUE's form) to be continued.

Row: {"sentence": .., "label": 0 | 1} and on the hub "idx". Read as family `imdb` reads its texts; many rows
are phrases too short for that.
"""

from __future__ import annotations

from functools import partial

from rlhf_exp.data import imdb

VIEWS = {view: partial(function, field="sentence") for view, function in imdb.VIEWS.items()}
