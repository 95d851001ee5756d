"""Where the parts of a compiled program come from: the tables of its functions."""

import re
from typing import NamedTuple

TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class Places(NamedTuple):
    """The tables at the head of optimised HLO: which function a frame is in."""

    files: dict[int, str]
    functions: dict[int, str]
    locations: dict[int, tuple[int, int]]
    frames: dict[int, tuple[int, int]]

    def functions_of(self, frame: int) -> list[str]:
        """`file.py: function`, the innermost first; ours alone if there are any."""
        found, ours = [], []
        while frame in self.frames:
            location, above = self.frames[frame]
            file, function = self.locations.get(location, (0, 0))
            path = self.files.get(file, "")
            name = self.functions.get(function, "").split(".<locals>")[0]
            found.append(f"{path.rsplit('/', 1)[-1]}: {name}")
            package, _, rest = path.rpartition("/clvsmim/")
            if package and "site-packages" not in rest:  # of a clone's environment
                ours.append(found[-1])
            above -= 1  # the tables count parents from one, with zero for none
            frame = above if above < frame else 0
        return ours or found


def add_row(where: Places, table: str, line: str) -> str:
    """Add a line of the head to its table; returns the table that follows."""
    if line in TABLES:
        return line
    number, rest = line.split(" ", 1)
    facts = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", rest)}
    if table == "FileNames":
        where.files[int(number)] = rest.strip('"')
    elif table == "FunctionNames":
        where.functions[int(number)] = rest.strip('"')
    elif table == "FileLocations":
        at = facts.get("file_name_id", 0), facts.get("function_name_id", 0)
        where.locations[int(number)] = at
    elif table == "StackFrames":
        at = facts.get("file_location_id", 0), facts.get("parent_frame_id", 0)
        where.frames[int(number)] = at
    return table


def origin_of(kind: str, rest: str, where: Places) -> str:
    """Where a collective comes from, as far as the names in its line tell; else ""."""
    name = re.search(r'op_name="([^"]*)"', rest)
    frame = re.search(r"stack_frame_id=(\d+)", rest)
    name = name[1] if name else ""
    functions = where.functions_of(int(frame[1])) if frame else []
    if "xla_megascale" in rest:
        return "between slices"
    if "/bn_" in name or any("BatchNorm" in x for x in functions):
        return "BatchNorm"
    # A parameter, or one that is being cast to the type of the products.
    given = re.match(r"\w+\.(params|extra|opt)\b", name)
    if kind == "all-gather" and (given or "cast_kernels" in " ".join(functions[:1])):
        return "FSDP"
    if "transpose(" in name:
        summed = kind in ("all-reduce", "reduce-scatter")
        return "gradient" if summed else "backward pass"
    return _together(functions[:2]) or general(name)


def _together(functions: list[str]) -> str:
    """`file.py: outer > inner` of two functions, the innermost first."""
    if len(functions) == 2 and functions[0] != functions[1]:
        (file, inner), (above, outer) = (x.split(": ") for x in functions)
        if file == above:
            return f"{file}: {outer} > {inner}"
    return functions[0] if functions else ""


def general(name: str) -> str:
    """The name of an operation without the step's, and of a block without number."""
    return re.sub(r"(block_)\d+", r"\1*", re.sub(r"^jit\(\w+\)/", "", name))
