"""What devices tell each other in a step: gradients, batch statistics, keys."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from models import small

from clvsmim import build, tree
from clvsmim.heads import BatchNorm

# A collective; one that runs beside computation may stand in several computations.
OPERATION = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\("
)


def collectives(compiled):
    """[(kind, numbers sent, the line)] of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := OPERATION.search(line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
            found.append((match[2], sum(sizes), line))
    return found


def test_batch_norm_reduces_twice_forward_and_once_backward():
    """Mean; variance; and together the two sums of its gradient."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    split = NamedSharding(mesh, P("data"))
    norm = BatchNorm(affine=False)
    stats = norm.init(jax.random.key(0), jnp.ones((2, 16)), True)

    def loss(x):
        y, _ = norm.apply(stats, x, True, mutable=["stats"])
        return jnp.sum(y**3)

    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=split)
    step = jax.jit(jax.grad(loss), out_shardings=split).lower(x).compile()
    found = collectives(step)
    assert {kind for kind, _, _ in found} == {"all-reduce"}
    assert sorted(size for _, size, _ in found) == [16, 16, 32]


def test_each_kernel_is_cast_once_for_all_its_passes():
    """Two views share one copy, so that one gradient of it is exchanged."""
    changes = {"encoder.dtype": "bfloat16", "encoder.remat": False}
    program = build.build(small("moco_v3", **changes), jax.devices()[:1])
    text = str(jax.make_jaxpr(program.step)(program.state, program.batch))
    cast = re.findall(r":bf16\[([\d,]+)\] = convert_element_type", text)
    params = tree.named(program.state.params)
    for name in ("encoder/block_0/mlp/fc1/kernel", "heads/projector/fc_1/kernel"):
        shape = ",".join(map(str, params[name].shape))
        same = [x for n, x in params.items() if x.shape == params[name].shape]
        assert cast.count(shape) == 3 * len(same), name  # the teacher, for each view
