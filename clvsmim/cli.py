"""`clvsmim VERB ...`, which is `python -m clvsmim.VERB ...`.

Bad input ends in one line on stderr and exit status 2. Set CLVSMIM_DEBUG=1 to see the
traceback instead. Where other processes are gone or did not come, it is 75: the same
command may do better the next time.
"""

import contextlib
import glob
import importlib.resources
import os
import pathlib
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from clvsmim import plugin

VERBS = {
    "convert": "open a checkpoint of another library, or write one for it",
    "convert-data": "rewrite TFRecord files or a folder of images as ArrayRecord",
    "inspect-data": "show what a config will train on, and how fast it can be read",
    "doctor": "check machine, hosts, folder and data before a long run",
    "train": "train an encoder by a config",
    "analyze": "measure a trained encoder, write a report",
    "compare": "show two or more analyses side by side",
    "merge": "add analyses of one encoder on different images",
    "sweep": "train, probe and measure a hybrid for each weight of its two losses",
    "zoo": "list the small trained encoders that ship with this package",
    "aot": "compile a config for TPUs that are not here: memory, collectives, speed",
    "demo": "train three small encoders on photographs, measure them, show the report",
}


BAD_INPUT, TRY_AGAIN = 2, 75  # statuses; the latter is EX_TEMPFAIL


def main() -> None:
    """The console script."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help", "help"):
        verbs = "\n".join(f"  {verb:14}{what}" for verb, what in VERBS.items())
        usage = "usage: clvsmim VERB ...   (clvsmim VERB --help tells more)\n"
        print(usage, verbs, sep="\n", file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    tune_process()
    verb, *rest = argv
    if verb not in VERBS:
        fail("clvsmim", plugin.unknown("verb", verb, VERBS))
    run(importlib.import_module(f"clvsmim.{verb.replace('-', '_')}"), rest)


# On Linux, XLA's CPU buffers are hundreds of megabytes, new in every step; with 4 KiB
# pages the kernel spends a third of a small step mapping them.
PAGES = "glibc.malloc.hugetlb=1"
# XLA's products malloc inside too, in threads whose arenas give all of it back at once
# and then wait for zeroed pages. One arena that keeps what was freed makes a large
# forward faster, and steps of training slower. Buffers of 256 MiB still go: kept, they
# doubled the memory. See docs/performance.md.
ARENA = (
    "glibc.malloc.arena_max=1",
    "glibc.malloc.mmap_threshold=268435456",
    "glibc.malloc.trim_threshold=17179869184",
)
FORWARD = ("analyze",)  # verbs that take no training steps
# Seen to obey; before 2.35 malloc refuses that threshold, and is slower.
GLIBC = (2, 36)
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")


def tuned(verb: str) -> dict[str, str]:
    """What the environment of a verb should hold: how malloc and OpenBLAS work.

    `ARENA` only for `FORWARD`, with a new glibc and without an accelerator.
    """
    library, version = platform.libc_ver()
    new = library == "glibc" and tuple(map(int, version.split("."))) >= GLIBC
    arena = verb in FORWARD and new and not any(map(glob.glob, ACCELERATORS))
    return {
        "GLIBC_TUNABLES": ":".join((PAGES, *ARENA) if arena else (PAGES,)),
        # While XLA keeps all cores busy, the threads of OpenBLAS in numpy only wait for
        # each other: one is faster.
        "OPENBLAS_NUM_THREADS": "1",
    }


def tune_process() -> None:
    """On Linux, start again with what is `tuned`, which is read at start only."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        for name, value in tuned(sys.argv[1]).items():
            os.environ.setdefault(name, value)
        os.execv(
            sys.executable, [sys.executable, "-P", "-m", "clvsmim.cli", *sys.argv[1:]]
        )


def run(module: object, argv: Sequence[str] | None = None) -> None:
    """Run the `main(argv)` of a command's module and turn bad input into one line."""
    spec = module.__spec__  # knows the name of what `python -m` runs as __main__
    name = spec.name if spec else module.__name__
    name = "clvsmim " + name.rsplit(".", 1)[-1].replace("_", "-")
    try:
        module.main(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; start it again to go on", file=sys.stderr)
        leave("interrupted", 130)
        raise SystemExit(130) from None
    except Exception as error:
        hosts = sys.modules.get("clvsmim.hosts")
        if hosts:
            hosts.hold()
        gone = hosts.gone(error) if hosts else ""
        ours = isinstance(error, ValueError | OSError | ImportError)
        if not (gone or ours) or os.environ.get("CLVSMIM_DEBUG"):
            if hosts and hosts.several():
                traceback.print_exc()
                leave(repr(error), 1)
            raise
        fail(name, gone or str(error), TRY_AGAIN if gone else BAD_INPUT)


def leave(why: str, status: int) -> None:
    """End this process and those that work with it; returns where there are none."""
    hosts = sys.modules.get("clvsmim.hosts")  # slow to import, for JAX
    if hosts:
        hosts.leave(why, status)


def fail(name: str, message: str, status: int = BAD_INPUT) -> None:
    """One line on stderr, and the end."""
    line = " ".join(message.split())
    print(f"{name}: {line}", file=sys.stderr)
    leave(line, status)
    raise SystemExit(status)


def parse(
    doc: str, argv: Sequence[str], define: Callable, positional: str = ""
) -> tuple[flags.FlagValues, list[str]]:
    """Flags and positional arguments of one command.

    Args:
      doc: what --help prints above the flags.
      define: `(flag_values) -> None`, defines the flags with absl.
      positional: how the positional arguments are called, "" if there are none.

    Raises:
      ValueError: an unknown flag, a wrong value, or an argument too many.
    """
    values = flags.FlagValues()
    define(values)
    if {"-h", "--help"} & set(argv):
        print(doc.strip(), "\n\nFlags:\n" + values.get_help().strip())
        raise SystemExit(0)
    argv = [_shipped(arg) for arg in argv]
    try:
        with _as_argv(argv):  # where ml_collections looks for the overrides
            _, *rest = values(sys.argv)
    except Exception as error:  # a config file is a program and may raise anything
        raise ValueError(_why(error)) from error
    if rest and not positional:
        raise ValueError(f"unexpected argument {rest[0]!r}; options begin with --")
    return values, rest


def _shipped(arg: str) -> str:
    """--config=configs/X.py outside a clone is the X.py inside the package."""
    found = re.fullmatch(r"(--config=)configs/(\w+\.py)(:.*)?", arg)
    if not found or pathlib.Path("configs").exists():
        return arg
    file = importlib.resources.files("clvsmim.configs") / found[2]
    return f"{found[1]}{file}{found[3] or ''}" if file.is_file() else arg


@contextlib.contextmanager
def _as_argv(argv: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, ["clvsmim", *argv]
    try:
        yield
    finally:
        sys.argv = before


def define_config(values: flags.FlagValues) -> None:
    """The flag --config=FILE.py and its overrides --config.key=value."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "a file of configs/; --config.a.b=value overrides a key",
        flag_values=values,
    )


def config_of(values: flags.FlagValues) -> ConfigDict:
    """The config that --config names.

    Raises:
      ValueError: it is missing, or there is no such file.
    """
    config = values.config
    try:
        _ = config and config.keys()  # a file that failed to load speaks up when used
    except OSError as error:
        raise ValueError(f"cannot load --config: {_last_line(error)}") from error
    except AttributeError as error:
        raise ValueError(
            f"get_config() of --config returned {config!r}, expected a ConfigDict"
        ) from error
    if config is None:
        raise ValueError(
            "--config is missing; for example --config=configs/demo.py:simmim"
        )
    return config


def _why(error: Exception) -> str:
    """What absl, ml_collections or the config file has against the arguments."""
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    of_file = frames & {"get_config", "<module>"}
    if isinstance(error, flags.Error):
        text = str(error)
        return _last_line(text) if "Traceback" in text else text  # of a config file
    if isinstance(error, AttributeError | KeyError) and not of_file:
        return f"unknown config key {_inner(error)}"
    if isinstance(error, TypeError) and not of_file:
        return f"bad --config override: {error}"
    return f"cannot load --config: {type(error).__name__}: {error}"


def _last_line(text: object) -> str:
    return str(text).strip().splitlines()[-1].strip()


def _inner(error: object) -> object:
    """What an exception that wraps exceptions says."""
    while isinstance(error, Exception):
        error = error.args[0]
    return error


if __name__ == "__main__":
    main()
