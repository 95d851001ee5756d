"""Is this machine fit to train? Versions, accelerators, the TPU's lock, products.

Every check returns a `Finding`: ok, or a warning, or what to do.
"""

import fcntl
import functools
import os
import pathlib
import platform
import re
import struct
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

OK, WARNING, FIX = "ok", "warning", "fix"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
TPU_ENV = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE")
GOOGLE = "0x1ae0"  # its vendor number on the PCI bus; others hand devices to vfio too
LOCK = pathlib.Path("/tmp/libtpu_lockfile")
# Relative errors of float32 products: bfloat16 passes give 3e-3, TF32 4e-4.
COARSE, EXACT = 2e-2, 1e-5


class Finding(NamedTuple):
    """What a check found; the text is one line, with the fix if there is one."""

    state: str
    text: str


def accelerators(
    root: pathlib.Path = pathlib.Path("/"), env: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """{"cuda" or "tpu": the evidence}, from device files and the environment alone."""
    found = {}
    if paths := sorted(root.glob("dev/nvidia[0-9]*")):
        found["cuda"] = f"/dev/{paths[0].name}"
    paths = sorted(root.glob("dev/accel[0-9]*"))
    vendors = root.glob("sys/bus/pci/devices/*/vendor")
    if any(path.read_text().strip() == GOOGLE for path in vendors):
        paths += sorted(root.glob("dev/vfio/[0-9]*"))
    names = [name for name in TPU_ENV if env.get(name)]
    if paths or names:
        found["tpu"] = f"/{paths[0].relative_to(root)}" if paths else names[0]
    return found


def installed() -> dict[str, str]:
    """Version by name of what matters and is installed."""
    found = {}
    for name in (*PACKAGES, *PLUGINS, "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_versions(expected: Mapping[str, str], found: Mapping[str, str]) -> Finding:
    """Whether what is installed fits together, and the accelerators `expected`."""
    wrong = [
        f"{name} is missing: pip install ." for name in PACKAGES if name not in found
    ]
    lib = found.get("jaxlib")
    if "jax" in found and lib not in (None, found["jax"]):
        wrong.append(
            f"jax is {found['jax']} but jaxlib {lib}: pip install -U "
            f"jax=={found['jax']} jaxlib=={found['jax']}"
        )
    plugins = [name for name in PLUGINS if name in found]
    wrong += [
        f"{name} is {found[name]} but jaxlib {lib}: pip install -U {name}=={lib} "
        f"{name.replace('plugin', 'pjrt')}=={lib}"
        for name in plugins
        if found[name] != lib
    ]
    if "tpu" in expected and "libtpu" not in found:
        wrong.append(
            f"libtpu is missing, and {expected['tpu']} says that there is a TPU: "
            "pip install '.[tpu]'"
        )
    if "cuda" in expected and not plugins:
        wrong.append(
            f"no CUDA plugin of jax, and {expected['cuda']} says that there is a GPU: "
            "pip install '.[cuda]', or '.[cuda12]' for a driver before 580"
        )
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    text = f"Python {platform.python_version()}, {listed}"
    return Finding(FIX, "; ".join(wrong)) if wrong else Finding(OK, text)


def check_lock(
    expected: Mapping[str, str],
    lock: pathlib.Path = LOCK,
    root: pathlib.Path = pathlib.Path("/"),
) -> Finding:
    """Whether libtpu can have the TPU: nobody holds it, or the file that guards it."""
    if "tpu" not in expected:
        return Finding(OK, "no TPU on this machine")
    holders = {pid: command(pid, root) for pid in users(root) if pid != os.getpid()}
    if lock.exists() and (pid := lock_holder(lock)):
        holders[pid] = command(pid, root)
    if holders:
        who = ", ".join(f"{pid} ({name})" for pid, name in sorted(holders.items()))
        first = min(holders)
        return Finding(
            FIX, f"process {who} holds the TPU; wait until it ends, or: kill {first}"
        )
    if lock.exists() and not os.access(lock, os.R_OK | os.W_OK):
        return Finding(FIX, f"{lock} is left over from another user: sudo rm -f {lock}")
    return Finding(OK, f"nobody holds the TPU ({expected['tpu']})")


def users(root: pathlib.Path) -> set[int]:
    """Processes that have a TPU open, of those that we may look into."""
    found = set()
    for link in root.glob("proc/[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:  # closed since
            continue
        if re.fullmatch(r"/dev/(accel|vfio/)\d+", target):
            found.add(int(link.parts[-3]))
    return found


def lock_holder(path: pathlib.Path) -> int | None:
    """The process that has locked a file, as libtpu does; Linux only."""
    if platform.system() != "Linux":
        return None
    # struct flock: type, whence, start, length, process.
    form = "@hhqqi4x"
    asked = struct.pack(form, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with path.open("rb") as file:
            told = fcntl.fcntl(file, fcntl.F_GETLK, asked)
    except OSError:
        return None
    kind, *_, pid = struct.unpack(form, told)
    return None if kind == fcntl.F_UNLCK else pid


def command(pid: int, root: pathlib.Path) -> str:
    """The start of the command line of a process."""
    try:
        text = (root / "proc" / str(pid) / "cmdline").read_bytes()
    except OSError:
        return "unknown"
    return text.replace(b"\0", b" ").decode(errors="replace").strip()[:60] or "unknown"


def check_devices(
    expected: Mapping[str, str], processes: int, chosen: str | None
) -> Finding:
    """Which devices JAX has; a CPU in place of an accelerator is named.

    Args:
      processes: how many take part.
      chosen: the platforms that the user asked JAX for, e.g. by JAX_PLATFORMS.
    """
    device, here = jax.local_devices()[0], jax.local_device_count()
    memory = limit(device)
    of = f" of {gigabytes(memory)} each" if memory else ""
    text = f"{jax.device_count()} x {device.device_kind}{of}"
    if jax.process_count() != processes:
        return Finding(
            FIX,
            f"JAX knows {jax.process_count()} processes, expected {processes}: each "
            "host sees its own devices alone",
        )
    if processes > 1:
        text += f", {here} on each host"
    if device.platform == "cpu" and expected:
        kind, evidence = next(iter(expected.items()))
        if chosen:
            why = f"because JAX_PLATFORMS is {chosen!r}; unset it to use the {kind}"
            return Finding(WARNING, f"{text}, beside {evidence}, {why}")
        return Finding(
            FIX,
            f"JAX fell back to the CPU, but {evidence} says that there is a "
            f"{kind.upper()}: pip install '.[{kind}]'; if it is installed, see the "
            "messages above and `versions`",
        )
    return Finding(OK, text)


def limit(device: jax.Device) -> int | None:
    """Bytes of memory of a device that programs may use; None if it does not tell."""
    return (device.memory_stats() or {}).get("bytes_limit")


def gigabytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def check_products(precision: str | None) -> Finding:
    """How exact products of float32 matrices are, by default and at the best.

    Args:
      precision: of products that do not ask for one.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s, np.float32) for s in ((256, 768), (768, 256)))
    want = a.astype(np.float64) @ b.astype(np.float64)

    def error(precision: str | None) -> float:
        got = jax.jit(functools.partial(jnp.matmul, precision=precision))(a, b)
        wrong = np.asarray(got, np.float64) - want
        return float(np.linalg.norm(wrong) / np.linalg.norm(want))

    plain, best = error(precision), error("highest")
    text = (
        f"float32 products are {plain:.1e} off by default "
        f"(jax_default_matmul_precision is {precision or 'not set'}), {best:.1e} at "
        "the highest, which metrics ask for by themselves"
    )
    if not (plain < COARSE and best < EXACT):
        return Finding(
            FIX,
            f"{text}; expected below {COARSE:g} and {EXACT:g}: the device or its "
            "driver computes wrongly, try another one",
        )
    if plain > EXACT:
        text += "; training in bfloat16 or TF32 passes, as expected of this device"
    return Finding(OK, text)
