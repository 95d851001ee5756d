"""Checkpoints of other libraries: opened as our networks, and written for them.

A module here is one family of files and has `make() -> Family`: how it is recognised,
and one table of rules that is read in both directions. What begins with "_" is the
machinery. No code in a file is ever run, and nothing is guessed in silence: every
tensor is matched or dropped with a reason, every parameter is filled, and the report
says what was found and what was assumed.
"""

from clvsmim.formats._export import Exported, export, export_again
from clvsmim.formats._file import open_file
from clvsmim.formats._open import Opened, Origin, open_tensors
from clvsmim.formats._report import Report

__all__ = [
    "Exported",
    "Opened",
    "Origin",
    "Report",
    "export",
    "export_again",
    "open_file",
    "open_tensors",
]
