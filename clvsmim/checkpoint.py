"""Checkpoints of a run: saved in the background, restored onto any mesh.

On disk a state is a nested dict by the names of its leaves (`params/encoder/...`), so
it can be read without the classes that wrote it. A step appears under its final name
only when it is complete; in a bucket, its last file says so. Paths are local or gs://.
"""

import contextlib
import logging as std_logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from clvsmim import packed, tree


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for one question.

    It would ask JAX itself whether a SIGTERM came, by the number of the step; whoever
    trains asks by numbers of its own (`stopping.Stop`), and JAX wants them to rise.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The checkpoints of one workdir: saved in the background, the newest ones kept.

    Args:
      workdir: local or gs://; checkpoints lie in `workdir/checkpoints/<step>`.
      keep: how many of the newest steps stay.
      keep_every: steps that are a multiple of it stay for ever; None is none.
    """

    def __init__(self, workdir: str, *, keep: int, keep_every: int | None = None):
        self._manager = _manager(workdir, keep=keep, keep_every=keep_every)

    def latest(self) -> int | None:
        """The newest complete step on disk."""
        return self._manager.latest_step()

    def save(self, step: int, state: tree.Tree) -> None:
        """Copy `state` to the host and write it in the background.

        The arrays may be donated as soon as this returns. An error of the write before
        is raised here. A step that is there already was not readable when this run
        was restored, or it would have been restored, and is replaced.
        """
        with jax.transfer_guard("allow"):
            if step in self._manager.all_steps():
                self._manager.delete(step)
            args = ocp.args.PyTreeSave(tree.nest(tree.named(state)))
            with self._written(f"checkpoint {step}"):
                self._manager.save(step, args=args, force=True)

    def restore(self, abstract: tree.Tree) -> tuple[tree.Tree, int]:
        """(state, step) of the newest readable step, placed as `abstract` says.

        Args:
          abstract: ShapeDtypeStructs; those without a sharding go to one device.

        Raises:
          ValueError: names or shapes differ from the saved ones (both are printed), or
            no step can be read.
        """
        target = tree.named(abstract)
        leaves, step = _newest(self._manager, lambda _: target, whole=True)
        return tree.map_named(lambda name, _: leaves[name], abstract), step

    def wait(self) -> None:
        """Return when everything saved so far is on disk."""
        with self._written("the last checkpoint"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self, what: str) -> Iterator[None]:
        """One clear line for what a full disk, or anything else, does to a write."""
        try:
            yield
        except Exception as error:  # gs:// backends raise their own classes
            reason = str(error).strip().splitlines()[0][:200]
            raise ValueError(
                f"cannot write {what} or the one before it to "
                f"{self._manager.directory} ({type(error).__name__}: {reason}); is "
                "there space left, and the right to write there?"
            ) from error

    def close(self) -> None:
        """Wait and release the threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def saved_steps(workdir: str) -> list[int]:
    """The complete checkpoints in a workdir, oldest first; nothing is created."""
    there = epath.Path(workdir) / "checkpoints"
    found = there.iterdir() if there.exists() else ()
    steps = [path for path in found if path.name.isdigit()]
    if "://" in str(workdir):  # a bucket cannot rename: Orbax writes this file last
        steps = [path for path in steps if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in steps)


def restore_params(
    workdir: str,
    *,
    fields: Sequence[str] = ("params", "extra"),
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[dict[str, Any], int]:
    """({"params": ..., "extra": ...}, step) of the newest readable step.

    Nothing else is read, and nothing about the optimizer need be known. Lists and
    tuples inside come back as dicts with keys "0", "1", ...; a field without leaves
    is an empty dict.

    Args:
      sharding: of every array, e.g. replicated over a mesh; None is one device.

    Raises:
      ValueError: `workdir` has no checkpoint, or none that can be read.
    """

    def wanted(saved: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for name, x in saved.items()
            if name.split("/")[0] in fields
        }

    if packed.is_packed(workdir):
        return packed.read(workdir, fields=fields, sharding=sharding)
    _check_exists(workdir)
    manager = _manager(workdir, read_only=True)
    try:
        leaves, step = _newest(manager, wanted, whole=False)
    finally:
        manager.close()
    return {field: {} for field in fields} | tree.nest(leaves), step


def folder(workdir: str) -> epath.Path:
    """Where the checkpoints of a workdir lie; absolute, as Orbax wants it."""
    path = epath.Path(workdir)
    remote = "://" in str(workdir)  # .absolute() would take it for a local name
    return (path if remote else path.absolute()) / "checkpoints"


def _newest(
    manager: ocp.CheckpointManager, wanted: Callable, *, whole: bool
) -> tuple[dict[str, Any], int]:
    """(leaves by name, step) of the newest step that can be read to the end."""
    failures = []
    for step in sorted(manager.all_steps(), reverse=True):
        saved, error = _attempt(_contents, manager, step)
        if error is None:
            target = wanted(saved)
            if whole:
                tree.strict(
                    target, saved, f"checkpoint {manager.directory / str(step)}"
                )
            leaves, error = _attempt(_read, manager, step, target)
            if error is None:
                return leaves, step
        failures.append(f"step {step}: {error}")
        logging.warning("skipping an unreadable checkpoint: %s", failures[-1])
    why = "; ".join(failures) or "it is empty"
    raise ValueError(f"no readable checkpoint in {manager.directory} ({why})")


def _attempt(function: Callable, *args: Any) -> tuple[Any, str | None]:
    """(result, None) or (None, reason); the same on every process.

    A half-written file makes its parsers raise anything, so every Exception counts.
    """
    result, reason = None, None
    try:
        result = function(*args)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(reason is None).all()
        reason = None if fine else reason or "another process could not read it"
    return result, reason


def _contents(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What a step holds: shapes and dtypes by name."""
    found = manager.item_metadata(step)
    if found is None:
        raise FileNotFoundError(f"step {step} has no list of its contents")
    return tree.named(found.tree)


def _read(
    manager: ocp.CheckpointManager, step: int, target: dict[str, Any]
) -> dict[str, jax.Array]:
    """The arrays of a step. No process waits for another one here.

    The manager would, and one that cannot read its part never comes: `_attempt` must
    be the first place where all meet.
    """
    _drop_abandoned_reads()
    item = tree.nest({name: _placed(x) for name, x in target.items()})
    args = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    path = manager.directory / str(step) / "default"  # Orbax's name of the only item
    with jax.transfer_guard("allow"):
        found = ocp.PyTreeCheckpointHandler().restore(path, args=args)
        return jax.block_until_ready(tree.named(found))


def _drop_abandoned_reads() -> None:
    """Print no traceback for the reads that Orbax gives up when one of them fails.

    Each would report, later and on top of the message that matters, that it found its
    event loop closed or was itself thrown away.
    """
    previous = sys.unraisablehook
    if getattr(previous, "drops_abandoned_reads", False):
        return

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        thrown_away = isinstance(getattr(error, "__context__", None), GeneratorExit)
        if str(error) != "Event loop is closed" and not thrown_away:
            previous(unraisable)

    hook.drops_abandoned_reads = True
    sys.unraisablehook = hook


def _placed(x: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(x, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _manager(
    workdir: str,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
    read_only: bool = False,
) -> ocp.CheckpointManager:
    _quiet()
    _drop_abandoned_reads()
    policies = [ocp.checkpoint_managers.LatestN(keep)]
    if keep_every:
        policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=not read_only,
        create=not read_only,
        read_only=read_only,
    )
    return _Manager(
        folder(workdir),
        options=options,
        item_handlers=ocp.PyTreeCheckpointHandler(),
    )


def _quiet() -> None:
    """Keep Orbax's progress notes (dozens per save) out of the run's output."""
    logging.get_absl_logger().addFilter(_not_chatter)


def _not_chatter(record: std_logging.LogRecord) -> bool:
    return record.levelno >= std_logging.ERROR or "/orbax/" not in record.pathname


def _check_exists(workdir: str) -> None:
    if not folder(workdir).exists():
        raise ValueError(
            f"no checkpoint in {workdir}; expected a --workdir of `clvsmim train`"
        )
