"""A pickle as plain data: nothing in it is imported, called or built.

The standard library's `pickletools` splits a pickle into its opcodes; what follows
is the stack that they work on. Containers and scalars become themselves. What would
be a class or a function becomes a `Name`, and what would be a call a `Made` that
remembers the name and the arguments, so that no file can run code here whatever it
holds. (A `pickle.Unpickler` with a guarded `find_class` was the alternative: it still
calls, grows its memo to any index that a file names, and hashes keys of any depth.)
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from clvsmim.formats._text import short


@dataclass(frozen=True, slots=True)
class Name:
    """A class or a function, by its full name."""

    full: str


@dataclass(slots=True)
class Made:
    """What a call would have given: its name, its arguments, the state set after it."""

    name: str
    args: tuple
    state: Any = None


PERSISTENT = "a persistent id"  # the `name` of objects that a pickle keeps elsewhere
Plain = None | bool | int | float | str | bytes

# Calls that give a dictionary; all other calls are left as they are.
DICTS = {"collections.OrderedDict", "collections.defaultdict"}
DICTS |= {"builtins.dict", "__builtin__.dict"}

# The opcodes of text, protocol 0, are left out: torch.save never wrote it.
_ITSELF = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"}
_ITSELF |= {"BINSTRING", "SHORT_BINSTRING"}
_ITSELF |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_ITSELF |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(file: Any, allowed: frozenset[str]) -> tuple[Any, list[Made]]:
    """The next pickle of a file: (its value, every persistent id that it names).

    Args:
      file: has `read`, `readline` and `tell`; it is left behind the pickle.
      allowed: full names of the classes and functions that it may mention.

    Raises:
      ValueError: a broken pickle, another name, or an opcode that tensors and plain
        data never need.
    """
    try:
        return _run(file, allowed)
    except (LookupError, TypeError, OverflowError) as error:
        raise ValueError(f"its pickle is damaged ({short(str(error))})") from error


def _run(file: Any, allowed: frozenset[str]) -> tuple[Any, list[Made]]:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark
    memo: dict[int, Any] = {}
    kept: list[Made] = []
    for name, arg in _opcodes(file):
        match name:
            case "PROTO" | "FRAME":
                pass
            case op if op in _ITSELF:
                stack.append(arg)
            case op if op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(Made("set", ()))
            case "MARK":
                below.append(stack)
                stack = []
            case "POP_MARK":
                stack = below.pop()
            case "POP":
                stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case op if op in _TUPLES:
                stack.append(tuple(_pop(stack, _TUPLES[op])))
            case "TUPLE" | "FROZENSET" as op:
                items, stack = stack, below.pop()
                stack.append(tuple(items) if op == "TUPLE" else Made("frozenset", ()))
            case "APPEND" | "SETITEM" as op:
                items = _pop(stack, 1 if op == "APPEND" else 2)
                _fill(stack[-1], items)
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                items, stack = stack, below.pop()
                _fill(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_name(arg.replace(" ", "."), allowed))
            case "STACK_GLOBAL":
                parts = _pop(stack, 2)
                if not all(isinstance(x, str) for x in parts):
                    raise ValueError("its pickle asks for what is no name: refused")
                stack.append(_name(".".join(parts), allowed))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
            case "BUILD":
                _set_state(stack[-2], stack.pop())
            case "BINPERSID":
                kept.append(Made(PERSISTENT, (stack.pop(),)))
                stack.append(kept[-1])
            case "STOP":
                return stack.pop(), kept
            case op:
                raise ValueError(
                    f"its pickle uses {op}, which no tensor needs: refused"
                )
    raise ValueError("its pickle has no end")


def _opcodes(file: Any) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, arg, _ in pickletools.genops(file):
            yield opcode.name, arg
    except ValueError as error:
        raise ValueError(f"its pickle is damaged ({short(str(error))})") from error


def _pop(stack: list[Any], n: int) -> list[Any]:
    return [stack.pop() for _ in range(n)][::-1]


def _name(full: str, allowed: frozenset[str]) -> Name:
    if full not in allowed:
        raise ValueError(
            f"it asks for {short(full)}: refused, for only tensors and plain settings "
            "are read and no code in a file is run; where you trust it, save it again "
            "as torch.save(model.state_dict(), ...)"
        )
    return Name(full)


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(args, tuple):
        raise ValueError("its pickle calls what is no function: refused")
    if function.full not in DICTS:
        return Made(function.full, args)
    made: dict = {}
    for pair in args[-1] if args and isinstance(args[-1], list) else ():
        _fill(made, pair)
    return made


def _fill(target: Any, items: list[Any]) -> None:
    """Append to a list, or set what alternates between keys and values."""
    if isinstance(target, list):
        target.extend(items)
    elif isinstance(target, dict):
        keys = items[::2]
        if wrong := [k for k in keys if not isinstance(k, Plain)]:
            raise ValueError(f"a {type(wrong[0]).__name__} as a key: refused")
        if len(keys) * 2 != len(items):
            raise ValueError("its pickle is damaged (a key without a value)")
        target.update(zip(keys, items[1::2], strict=True))
    elif not isinstance(target, Made):  # a list or dictionary of a class of its own
        raise ValueError(f"its pickle adds items to a {type(target).__name__}")


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, Made):
        target.state = state
    elif not isinstance(target, dict):  # ordered ones have attributes, not read
        raise ValueError(f"its pickle sets the state of a {type(target).__name__}")
