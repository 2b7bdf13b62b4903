"""beartype with a random generator of its own.

It checks one random item of each container, and would draw it from Python's global generator, which our tests require
to be left alone.
"""

import random

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain

codemain.getrandbits = random.Random(0).getrandbits  # type: ignore[attr-defined]

# An int where a float is wanted is right (PEP 484).
typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))

__all__ = ["typechecked"]
