"""From results to one page: `write(folder, title=..., runs=[Run(...), ...])`.

`report.html` holds every picture and loads nothing. Beside it stand `figures/*.png`
and `data/*.csv` and `data/*.json` with every number. The report draws any Series and
knows no metric: a quantity is a figure, and all runs that measured it share it.

The same input gives the same bytes; what varies, such as the date, is for the caller
to write into the notes.
"""

from clvsmim.report.images import (
    Gallery,
    attention_gallery,
    attention_map,
    reconstruction_gallery,
    scatter,
)
from clvsmim.report.page import write
from clvsmim.report.parts import Run, Section, Table

__all__ = [
    "Gallery",
    "Run",
    "Section",
    "Table",
    "attention_gallery",
    "attention_map",
    "reconstruction_gallery",
    "scatter",
    "write",
]
