"""What a file holds, as part of one line of a message."""

from collections.abc import Iterable


def short(value: str, most: int = 80) -> str:
    """A string out of a file: without odd characters, and not too long."""
    text = value if value.isprintable() else ascii(value)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."


def shown(values: Iterable[str], most: int = 3) -> str:
    """The first of several names."""
    values = list(values)
    first = ", ".join(map(short, values[:most])) or "nothing"
    more = len(values) - most
    return f"{first} and {more} more" if more > 0 else first
