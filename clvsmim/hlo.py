"""What a compiled program says of itself: its collectives and its largest values.

Reads the text of optimised HLO (`compiled.as_text()`) line by line, because that of a
large program is a hundred megabytes.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clvsmim.hlo_places import TABLES, Places, add_row, general, origin_of

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
BITS = {"pred": 8, "token": 0}  # of types without a number in their name
# Operations that name bytes which others made; of two words ("copy-start",
# "custom-call") are the moves between memories.
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "custom-call")
VIEWS = ("parameter", "tuple", "bitcast", "constant", "while", "call")
HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
LINE = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*)")
# The type of a result, then the operation; a tuple's type has parentheses in layouts.
OPERATION = re.compile(r"(.*?[)\]}]) ([a-z][\w\-]*)\((.*)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
NEAR = re.compile(r"S\([1-9]")  # a layout in another memory than the main one
CALL = re.compile(r"(?:calls|body|to_apply)=%([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
NUMBER = re.compile(r"\s+(?:ROOT )?%(\S+) = [su]32\[\]\S* constant\((\d+)\)")
LESS = re.compile(r"\s+ROOT .* compare\(%\S+, %(\S+)\), direction=LT")


class Collective(NamedTuple):
    """One collective operation as one device sees it.

    Attributes:
      kind: one of `KINDS`, or "send", an exchange between slices of TPUs.
      parts: (bytes, origin) of each array in it: what is reduced, or what is there
        after a gather or before a scatter.
      group: how many devices take part.
      times: how often it runs in one step; more than once inside a loop.
    """

    kind: str
    parts: tuple[tuple[int, str], ...]
    group: int
    times: int = 1

    @property
    def bytes(self) -> int:
        """Of all its arrays."""
        return sum(size for size, _ in self.parts)

    @property
    def on_the_wire(self) -> float:
        """The bytes that a device receives at least, for an all-reduce in a ring."""
        share = (self.group - 1) / self.group
        if self.kind in ("collective-permute", "collective-broadcast", "send"):
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes


class Value(NamedTuple):
    """Arrays of one shape and origin that a program makes in main memory."""

    bytes: int
    count: int
    shape: str
    origin: str


class Summary(NamedTuple):
    """What `read` found.

    `loops` says how often each of its loops turns; `near` how many bytes its
    operations read from and write to a memory on the chip, loops counted once, which
    the compiler counts as bytes moved like all others.
    """

    collectives: tuple[Collective, ...]
    largest: tuple[Value, ...]
    loops: tuple[int, ...]
    near: int


def lines(text: str) -> Iterator[str]:
    """The lines of a text, one copy of one at a time."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end + 1


def read(text: str, *, devices: int, keep: int = 5) -> Summary:
    """The collectives of a program, in order, and its `keep` largest values.

    A collective that the compiler splits into pieces, to overlap it with products,
    stands in the text once a piece, under one channel: it counts once. A TPU's
    reduce-scatter stands there as an all-reduce in a computation of its own name.

    Args:
      devices: of the program; who takes part where no groups are named.
    """
    where = Places({}, {}, {}, {})
    found: dict[object, dict] = {}
    named: dict[str, dict] = {}  # in one computation
    calls: dict[str, tuple[str, int, str]] = {}  # from where, how often, what for
    near: dict[str, int] = {}  # bytes on the chip, by computation
    close: dict[str, int] = {}  # the same of each value of one computation
    numbers: dict[str, int] = {}  # constants of one computation
    limits: dict[str, int] = {}  # of the counters of loops, by their conditions
    values: dict[tuple[str, str], list[int]] = {}
    table, inside, main, bodies = "", "", "", set()
    for line in lines(text):
        if not inside and (line in TABLES or line[:1].isdigit()):
            table = add_row(where, table, line)
            continue
        head = HEAD.match(line)
        if head:
            inside, named, numbers, close = head[2], {}, {}, {}
            near[inside], main = 0, inside if head[1] else main
            continue
        if " constant(" in line and (number := NUMBER.match(line)):
            numbers[number[1]] = int(number[2])
        if "direction=LT" in line and (less := LESS.match(line)):
            limits[inside] = numbers.get(less[1], 1)
        for called in CALL.findall(line):
            metadata = re.search(r"metadata=\{[^}]*", line)
            what = metadata[0] if metadata else ""
            calls.setdefault(called, (inside, _trips(line, limits), what))
            if " while(" in line:
                bodies.add(called)
        match = LINE.match(line)
        parsed = match and OPERATION.match(match[2])
        if not parsed:
            continue
        shape, operation, rest = parsed.groups()
        close[match[1]] = _on_chip(shape)
        if operation not in FREE and not operation.endswith("-done"):
            operands = rest.split(")", 1)[0].split(", ")
            read_there = sum(close.get(x.rpartition("%")[2], 0) for x in operands)
            near[inside] += close[match[1]] + read_there
        if operation == "get-tuple-element":
            _name_part(named, rest, where)
            continue
        kind = operation.removesuffix("-start")
        sends = kind == "send" and "xla_megascale" in rest
        if kind in KINDS or sends:
            one = _collective(kind, operation, shape, rest, inside, devices, where)
            named[match[1]] = one
            channel = re.search(r"channel_id=(\d+)", rest)
            key = (one["kind"], channel[1]) if channel else (inside, match[1])
            found.setdefault(key, one)
        elif inside == main and operation not in VIEWS and "-" not in operation:
            _add_values(values, shape, rest)
    collectives = tuple(
        Collective(
            c["kind"],
            tuple((n, o or _of_caller(c, calls, where)) for n, o in c["parts"]),
            c["group"],
            _times(calls, c["inside"]),
        )
        for c in found.values()
    )
    largest = sorted(
        (Value(size, count, *key) for key, (size, count) in values.items()),
        reverse=True,
    )
    loops = tuple(trips for _, trips, _ in calls.values() if trips > 1)
    on_chip = sum(near.get(name, 0) for name in {main, *bodies})
    return Summary(collectives, tuple(largest[:keep]), loops, on_chip)


def _collective(
    kind: str,
    operation: str,
    shape: str,
    rest: str,
    inside: str,
    devices: int,
    where: Places,
) -> dict:
    group = group_size(rest, devices)
    sizes = [nbytes(*array[:2]) for array in ARRAY.findall(shape)]
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        sizes = [size * group for size in sizes]
    elif operation == "all-gather-start":  # (what went in, what comes out)
        sizes = sizes[len(sizes) // 2 :]
    elif kind in ("collective-permute", "send"):
        sizes = sizes[:1]
    origin = origin_of(kind, rest, where)
    parts = [(size, origin) for size in sizes]
    return {"kind": kind, "parts": parts, "group": group, "inside": inside}


def _name_part(named: dict[str, dict], rest: str, where: Places) -> None:
    """Where one array of a collective of many comes from, if this line is about it."""
    match = re.match(r"%(\S+)\), index=(\d+)", rest)
    one = named.get(match[1]) if match else None
    if one and "op_name=" in rest and int(match[2]) < len(one["parts"]):
        size, _ = one["parts"][int(match[2])]
        one["parts"][int(match[2])] = size, origin_of(one["kind"], rest, where)


def _on_chip(shape: str) -> int:
    """Bytes of those arrays of a type that lie in another memory than the main one."""
    if "S(" not in shape:
        return 0
    return sum(nbytes(*x) for x in ARRAY.findall(shape) if NEAR.search(x[2]))


def _add_values(values: dict, shape: str, rest: str) -> None:
    name = re.search(r'op_name="([^"]*)"', rest)
    origin = general(name[1]) if name else ""
    for kind, sizes, layout in ARRAY.findall(shape):
        if NEAR.search(layout):
            continue
        place = values.setdefault((f"{kind}[{sizes}]", origin), [0, 0])
        place[0] += nbytes(kind, sizes, layout)
        place[1] += 1


def _trips(line: str, limits: dict[str, int]) -> int:
    """How often a line runs what it calls: as written, or by the loop's condition."""
    if " while(" not in line:
        return 1
    written = TRIPS.search(line)
    condition = re.search(r"condition=%([\w.\-]+)", line)
    return int(written[1]) if written else limits.get(condition[1], 1)


def _times(calls: dict[str, tuple[str, int, str]], name: str) -> int:
    """How often a computation runs when the program runs once."""
    times = 1
    while name in calls:
        name, trips, _ = calls[name]
        times *= trips
    return times


def _of_caller(one: dict, calls: dict, where: Places) -> str:
    """Where a collective without a name comes from: what its computation is for."""
    line = calls.get(one["inside"], ("", 1, ""))[2]
    return origin_of(one["kind"], line, where) or "unnamed"


@functools.lru_cache(maxsize=4096)
def nbytes(kind: str, sizes: str, layout: str = "") -> int:
    """Bytes of an array, `bf16` and `8,197,768`.

    With a layout, `{2,1,0:T(8,128)}`, as it lies in memory: its dimensions from the
    fastest to the slowest, of which the first are padded to whole tiles.
    """
    digits = re.search(r"\d+", kind)
    bits = BITS.get(kind, int(digits[0]) if digits else 0)
    lengths = [int(n) for n in sizes.split(",") if n]
    tiled = re.match(r"\{([\d,]*):T\(([\d,]+)\)", layout)
    if tiled and lengths:
        tile = [int(n) for n in tiled[2].split(",")][::-1]
        order = [int(n) for n in tiled[1].split(",")]
        for axis, step in zip(order, tile, strict=False):
            lengths[axis] = -(-lengths[axis] // step) * step
    return -(-bits * math.prod(lengths) // 8)


@functools.lru_cache(maxsize=256)
def _groups(text: str) -> int | None:
    """The size of a group by one of the three ways in which HLO writes groups."""
    listed = re.match(r"\{\{([\d,]*)\}", text)
    if listed:
        return len(listed[1].split(","))
    iota = re.match(r"\[(\d+),(\d+)\]<=", text)
    if iota:
        return int(iota[2])
    mesh = re.match(r"mesh\[(.*?)\] ?\{(.*?)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        used = re.findall(r"'([^']*)'", mesh[2])
        return int(np.prod([int(sizes[name]) for name in used]))
    return None


def group_size(rest: str, devices: int) -> int:
    """How many devices take part in a collective, by the attributes of its line."""
    text = re.search(r"replica_groups=(.{1,2000})", rest)
    return (text and _groups(text[1])) or devices
