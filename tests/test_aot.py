"""Programs are compiled for TPUs that are not here, and what they say is read right."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import pytest
import runs

from clvsmim import aot, aot_report, aot_text, build, cli, hlo, optim, roofline, tree

# ml_collections 1.1 loads a config file with what Python 3.12 deprecated for good.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed (pip install libtpu)",
)
DEMO = f"--config={runs.ROOT}/configs/demo.py"

# What the TPU compiler and others write, shortened; the loop is made up.
TEXT = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/a/clvsmim/objectives/moco_v3.py"
2 "/b/jax/numpy.py"

FunctionNames
1 "unit"
2 "contrast.<locals>.inner"
3 "mean"

FileLocations
1 {file_name_id=1 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=2 end_line=2 column=1 end_column=2}
3 {file_name_id=2 function_name_id=3 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=0}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

%piece.1 (p: bf16[128,8]) -> bf16[512,8] {
  %p = bf16[128,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[512,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=4, \
replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, \
metadata={op_name="state.params[\\'encoder\\'][\\'q\\'][\\'kernel\\']"}
}

%piece.2 (p: bf16[128,8]) -> bf16[512,8] {
  %p.2 = bf16[128,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[512,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), \
channel_id=4, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, \
metadata={op_name="state.params[\\'encoder\\'][\\'q\\'][\\'kernel\\']"}
}

%all-reduce-scatter.1 (x: f32[64,32]) -> f32[64,8] {
  %x = f32[64,32]{1,0} parameter(0)
  %all-reduce.9 = f32[64,32]{1,0:T(8,128)} all-reduce(%x), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, to_apply=%add
  ROOT %slice = f32[64,8]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={64,8}
}

%body (s: (s32[], f32[10])) -> (s32[], f32[10]) {
  %s = (s32[], f32[10]) parameter(0)
  %all-reduce.5 = f32[10]{0} all-reduce(%s), channel_id=5, replica_groups=[4,2]<=[8], \
to_apply=%add, metadata={op_name="jit(step)/jvp(MLPHead)/bn_0/reduce_sum" \
stack_frame_id=3}
}

%less (s: (s32[], f32[10])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %s.2 = (s32[], f32[10]) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%s.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

%body.2 (s: (s32[], f32[10])) -> (s32[], f32[10]) {
  %s.3 = (s32[], f32[10]) parameter(0)
  %permute.1 = f32[10]{0} collective-permute(%s.3), channel_id=8, \
source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (state: f32[512,8]) -> f32[512,8] {
  %state = f32[512,8]{1,0:T(8,128)} parameter(0), metadata={op_name="state.params"}
  %fusion.1 = bf16[512,8]{1,0} fusion(%state), kind=kCustom, calls=%piece.1
  %fusion.2 = bf16[512,8]{1,0} fusion(%state), kind=kCustom, calls=%piece.2
  %fusion.3 = f32[64,8]{1,0:S(1)} fusion(%state), kind=kCustom, \
calls=%all-reduce-scatter.1, \
metadata={op_name="jit(step)/transpose(jvp(ViT))/block_1/fc1/dot" stack_frame_id=1}
  %attn.1 = f32[4,12,64,64]{3,2,1,0:T(8,128)} fusion(%state), kind=kLoop, \
calls=%fused, metadata={op_name="jit(step)/jvp(ViT)/block_0/attn/exp" stack_frame_id=1}
  %attn.2 = f32[4,12,64,64]{3,2,1,0:T(8,128)} fusion(%state, %fusion.3), kind=kLoop, \
calls=%fused, metadata={op_name="jit(step)/jvp(ViT)/block_7/attn/exp" stack_frame_id=1}
  %keys = (f32[4,64]{1,0}, f32[16,64]{1,0}) all-gather-start(%state), channel_id=6, \
replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(step)/jvp()/mul" \
stack_frame_id=3}
  %all-reduce.7 = (f32[100]{0}, /*index=1*/f32[]) all-reduce(%state, %state), \
channel_id=7, replica_groups={}, to_apply=%add, \
metadata={op_name="jit(step)/transpose(jvp(ViT))/dot" stack_frame_id=1}
  %get-tuple-element.1 = f32[] get-tuple-element(%all-reduce.7), index=1, \
metadata={op_name="jit(step)/jvp()/reduce_sum" stack_frame_id=1}
  %while.1 = (s32[], f32[10]) while(%state), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"12"}}
  %while.2 = (s32[], f32[10]) while(%state), condition=%less, body=%body.2
  %send.1 = (f32[5]{0}, u32[], token[]) send(%state), channel_id=4, \
is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send-done.1 = token[] send-done(%send.1), channel_id=4
}
"""


def test_collectives_are_read_from_the_text_of_a_program():
    found = {c.kind + str(c.times): c for c in hlo.read(TEXT, devices=8).collectives}
    gather, keys = [
        c for c in hlo.read(TEXT, devices=8).collectives if c.kind == "all-gather"
    ]
    # Two pieces of one channel; the first is in the text twice.
    assert (gather.parts, gather.group) == (((512 * 8 * 2, "FSDP"),), 4)
    origin = "moco_v3.py: contrast > unit"
    assert (keys.parts, keys.group) == (((16 * 64 * 4, origin),), 4)
    scatter = found["reduce-scatter1"]
    assert (scatter.parts, scatter.group) == (((64 * 32 * 4, "gradient"),), 4)
    assert found["all-reduce12"].parts == ((40, "BatchNorm"),)
    assert found["all-reduce12"].group == 2
    both = found["all-reduce1"]
    assert both.parts == ((400, "gradient"), (4, "moco_v3.py: contrast"))
    assert (both.bytes, both.group) == (404, 8)
    assert found["collective-permute6"].parts == ((40, "unnamed"),)
    assert found["send1"].parts == ((20, "between slices"),)
    assert len(hlo.read(TEXT, devices=8).collectives) == 7


def test_the_largest_values_are_those_of_all_blocks_in_main_memory():
    first, second = hlo.read(TEXT, devices=8, keep=2).largest
    size = 2 * 4 * 12 * 64 * 128 * 4  # padded to tiles of 8 x 128
    assert first == (size, 2, "f32[4,12,64,64]", "jvp(ViT)/block_*/attn/exp")
    assert second.shape == "bf16[512,8]"


def test_bytes_that_stay_on_the_chip():
    """Of fusion.3, written and read once; inside a fusion nothing moves."""
    assert hlo.read(TEXT, devices=8).near == 2 * 64 * 8 * 4


def test_loops_are_seen_because_their_operations_count_once():
    assert hlo.read(TEXT, devices=8).loops == (12, 6)


@pytest.mark.parametrize(
    "kind, shape, bytes", [("bf16", "8,3", 48), ("f8e4m3", "7", 7), ("pred", "", 1)]
)
def test_bytes_of_an_array(kind, shape, bytes):
    assert hlo.nbytes(kind, shape) == bytes


def test_tiles_pad_the_fastest_dimensions():
    assert hlo.nbytes("bf16", "3,197,12,64", "{3,1,2,0:T(8,128)(2,1)}") == (
        2 * 3 * 200 * 12 * 128
    )
    assert hlo.nbytes("f32", "5", "{0:T(128)S(1)}") == 512
    assert hlo.nbytes("f32", "3,5", "{1,0}") == 60


def test_what_goes_over_the_wire():
    def wire(kind):
        return hlo.Collective(kind, ((800, ""),), group=8).on_the_wire

    assert wire("all-reduce") == 1400
    assert wire("all-gather") == wire("reduce-scatter") == 700
    assert wire("collective-permute") == 800


PLAIN = {"name": "simmim", "encoder__relative": "none"}


@pytest.fixture(scope="module")
def compiled():
    """(program, its summary) of SimMIM on eight CPU devices.

    Without the relative bias, whose gradient is summed before it is gathered into the
    table, so that more bytes are reduced than it has.
    """
    program = build.build(runs.config(**PLAIN), jax.devices())
    step = program.step.lower(program.state, program.batch).compile()
    return program, hlo.read(step.as_text(), devices=8)


def test_the_gradient_of_every_parameter_is_reduced_once(compiled):
    program, summary = compiled
    keep = optim.keep(groups_of(program))
    trained, _ = tree.partition(program.state.params, keep)
    size = sum(4 * x.size for x in jax.tree.leaves(trained))
    rows = aot_report.tabled(summary.collectives)
    assert {row["kind"] for row in rows} == {"all-reduce"}
    assert {row["group"] for row in rows} == {8}
    (gradient,) = (row for row in rows if row["origin"] == "gradient")
    assert gradient["bytes"] == size
    # The rest are scalars of the loss.
    assert sum(row["bytes"] for row in rows) - size <= 16


def groups_of(program):
    """Which parameters are trained, as the config says."""
    config = build.plain(runs.config(**PLAIN))
    total, each = program.total, program.steps_per_epoch
    return build.make_optimizer(program.objective, config["optim"], total, each).groups


def test_one_of_several_origins_counts_where_most_of_it_comes_from():
    parts = ((400, "gradient"), (4, "loss"))
    table = aot_report.tabled(
        [
            hlo.Collective("all-reduce", parts, 8),
            hlo.Collective("all-reduce", ((8, "BatchNorm"),), 8, times=3),
        ]
    )
    assert [(r["origin"], r["count"], r["bytes"]) for r in table] == [
        ("gradient", 1, 400),
        ("BatchNorm", 3, 24),
        ("loss", 0, 4),
    ]


def test_bytes_of_a_state_are_those_of_one_device():
    config = runs.config("simmim", mesh__fsdp=8, encoder__width=512, encoder__heads=8)
    whole = build.build(runs.config("simmim", encoder__width=512, encoder__heads=8))
    split = build.build(config)
    leaves = tree.named(split.state.params)
    big = [n for n, x in leaves.items() if not x.sharding.is_fully_replicated]
    saved = sum(4 * leaves[n].size * 7 // 8 for n in big)
    assert big
    before, after = (aot_report.nbytes(p.state.params) for p in (whole, split))
    assert before - after == saved


MESSAGES = {
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
    "memory required for HLO temporaries (378.74G) exceeds available HBM (15.75G).": (
        378.74,
        15.75,
    ),
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
    "space hbm. Used 23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G.": (
        23.5,
        15.75,
    ),
    "RESOURCE_EXHAUSTED: scoped vmem limit exceeded": None,
    "INVALID_ARGUMENT: Used 23.50G of 15.75G hbm.": None,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_how_much_memory_is_missing(message):
    want = MESSAGES[message]
    got = aot_report.shortage(message, given=1000)
    more = (1000, 0) if "temporaries" in message else (0, 0)
    wanted = want and tuple(round(x * 2**30) for x in want)
    assert got == (want and tuple(map(sum, zip(wanted, more, strict=True))))


def place(devices=16, slices=1):
    return aot_report.Place("v5e:4x4", slices, (None,) * devices, (4, 4))


def test_remedies_are_what_the_config_does_not_have_already():
    def flags(devices=16, slices=1, **changes):
        config = runs.config("simmim", **{"batch": 64} | changes)
        found = aot.remedies(config, place(devices, slices))
        for _, other in found:
            assert config.batch in (other.batch, 2 * other.batch)
        return [name.replace("--config.", "") for name, _ in found]

    remat, fsdp, half = "encoder.remat=True", "mesh.fsdp=8", "batch=32"
    assert flags() == [remat, fsdp, f"{remat} {fsdp}", half]
    assert flags(encoder__remat=True) == [fsdp, half]
    assert flags(mesh__fsdp=8) == [remat, half]
    assert flags(devices=4)[1] == "mesh.fsdp=4"
    # A parameter is split within a slice; 64 images are one for each of 64 devices.
    assert flags(devices=64, slices=16) == [
        *(remat, "mesh.fsdp=4", f"{remat} mesh.fsdp=4"),
    ]


def test_a_remedy_changes_what_follows_from_the_batch_and_not_the_config_itself():
    config = runs.config("simmim", batch=64)
    remedies = dict(aot.remedies(config, place()))
    assert remedies["--config.encoder.remat=True"].encoder.remat
    assert not config.encoder.remat and config.batch == 64


@pytest.mark.parametrize("fits", [True, False])
def test_remedies_are_compiled_where_the_step_does_not_fit(monkeypatch, fits):
    def training(config, place, change):
        return {"change": change, "fits": fits or bool(change)}

    monkeypatch.setattr(aot, "training", training)
    monkeypatch.setattr(aot, "analysing", lambda config, place: {"change": "analysis"})
    config = runs.config("simmim", batch=64)

    def changes(**options):
        return [r["change"] for r in aot.reports(config, place(), **options)]

    tried = [] if fits else [name for name, _ in aot.remedies(config, place())]
    assert changes() == ["", *tried, "analysis"]
    assert changes(remedy=False, analyze=False) == [""]


def test_links_of_a_torus_and_of_an_open_grid():
    v5e, v4 = roofline.CHIPS["TPU v5 lite"], roofline.CHIPS["TPU v4"]
    assert roofline.links(v5e, (16, 16)) == 200e9
    assert roofline.links(v5e, (4, 4)) == 100e9
    assert roofline.links(v5e, (8, 16)) == 150e9
    assert roofline.links(v5e, (1, 1)) == 0
    assert roofline.links(v4, (4, 4, 8)) == 300e9
    assert roofline.links(v4, (2, 2, 1)) == 100e9


def test_the_roofline_by_hand():
    reduced = hlo.Collective("all-reduce", ((100_000_000, "gradient"),), 16)
    sent = hlo.Collective("send", ((25_000_000, "between slices"),), 2, times=2)
    times = roofline.seconds(
        "TPU v5 lite",
        flops_per_device=197e9,
        bytes_per_device=819e6,
        collectives=[reduced, sent],
        shape=(4, 4),
        slices=2,
        passes=6,
    )
    assert times == pytest.approx(
        {
            "compute": 6e-3,
            "memory": 1e-3,
            "interconnect": 2 * 15 / 16 * 1e8 / 100e9,
            "network": 50e6 / (25e9 / 8),
        }
    )
    assert roofline.bound(times) == ("network", times["network"])
    with pytest.raises(ValueError, match="no data sheet for 'cpu'"):
        roofline.seconds(
            "cpu", flops_per_device=1, bytes_per_device=1, collectives=[], shape=(1,)
        )


def test_hours_of_a_training_by_hand():
    times = {"compute": 0.1, "memory": 0.2, "interconnect": 0.0, "network": 0.0}
    found = aot_report.hours(times, 36_000, [3.0])
    assert found == {"roofline": pytest.approx(2.0), "usual": pytest.approx(2.5)}
    # What is computed a second time makes the step no more useful.
    found = aot_report.hours(times, 36_000, [2.7, 3.0])
    assert found["usual"] == pytest.approx(2.25)
    times["memory"] = 0.3  # more than what the products take at that utilisation
    found = aot_report.hours(times, 36_000, [3.0])
    assert found == {"roofline": pytest.approx(3.0), "usual": pytest.approx(3.0)}


REPORT = {
    "recipe": "mae.py:H",
    "topology": "v5e:4x4",
    "slices": 2,
    "device": "TPU v5 lite",
    "devices": 32,
    "chips": 32,
    "what": "training step",
    "change": "",
    "mesh": {"data": 32, "fsdp": 1},
    "batch": 4096,
    "parameters": {"encoder": 630_000_000, "all": 656_000_000},
    "compile_seconds": 70.0,
    "fits": False,
    "hbm": round(15.75 * 2**30),
    "needs": round(23.5 * 2**30),
    "held": {"parameters": 2 * 2**30},
    "flops": {"analytic": 2e12},
}


def test_what_does_not_fit_says_by_how_much():
    for text in (aot_text.block(REPORT), aot_text.row(REPORT)):
        assert "23.50 of 15.75" in text and "does not fit, 7.75 too much" in text
        assert "2 slices of v5e:4x4" in text
    assert aot_text.HEAD.splitlines()[0].count("|") == aot_text.row(REPORT).count("|")


@pytest.fixture
def refused(monkeypatch, capsys):
    """`refused(*argv)` -> the one line on stderr."""

    def call(*argv):
        monkeypatch.setattr(aot, "ENVIRONMENT", {})
        with pytest.raises(SystemExit) as error:
            cli.run(aot, list(argv))
        out, err = capsys.readouterr()
        assert (error.value.code, out, err.count("\n")) == (2, "", 1)
        sys.modules.pop("config_config", None)
        return err

    return call


def test_a_missing_compiler_is_one_line(refused, monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name, *args: None if name == "libtpu" else find(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    line = refused(f"{DEMO}:simmim", "--topology=v5e:2x2")
    assert "pip install libtpu" in line
    assert "--topology=v5e:16x16" in refused(f"{DEMO}:simmim")


def process(*argv):
    """The command in a process of its own: (status, stdout, stderr)."""
    command = [sys.executable, "-m", "clvsmim.aot", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    return done.returncode, done.stdout, done.stderr


@needs_libtpu
def test_an_unknown_topology_names_those_that_work(name="v5e:3x3"):
    status, out, err = process(f"{DEMO}:simmim", f"--topology={name}")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"clvsmim aot: --topology={name}: ")
    assert all(known in err for known in aot.TOPOLOGIES)


@needs_libtpu
def test_a_step_is_compiled_for_a_tpu(tmp_path):
    config = {"encoder__depth": 1, "encoder__dtype": "bfloat16"}
    file = tmp_path / "found.json"
    status, out, err = process(
        f"{DEMO}:simmim",
        *runs.overrides(**config),
        *("--topology=v5e:2x2", "--noanalysis", f"--json={file}"),
    )
    assert (status, err) == (0, "compiling the training step for v5e:2x2\n")
    (found,) = json.loads(file.read_text())
    assert "4 devices on 4 chips of TPU v5 lite" in out
    assert found["fits"] and 0 < found["needs"] < found["hbm"]
    assert found["mesh"] == {"data": 4, "fsdp": 1}
    assert found["parameters"]["all"] > found["parameters"]["encoder"] > 0
    gradient = [r for r in found["collectives"] if r["origin"] == "gradient"]
    # Summed as they are computed, most in bfloat16.
    size = sum(r["bytes"] for r in gradient) / found["parameters"]["all"]
    assert 2 <= size < 3
    times = found["roofline"]
    assert times["seconds"] == max(times[k] for k in ("compute", "memory"))
    assert math.isclose(times["images_per_second"] * times["seconds"], 16)


@needs_libtpu
def test_a_split_gradient_is_scattered_once_and_never_summed_whole(tmp_path):
    """A TPU's compiler does so if the dimension is right; see mesh.state_shardings."""
    config = {"encoder__depth": 1, "encoder__width": 256, "encoder__heads": 8}
    config |= {"encoder__dtype": "bfloat16", "mesh__fsdp": 2}
    file = tmp_path / "found.json"
    status, _, err = process(
        f"{DEMO}:simmim",
        *runs.overrides(**config),
        *("--topology=v5e:2x2", "--noanalysis", f"--json={file}"),
    )
    assert status == 0, err
    (found,) = json.loads(file.read_text())
    split = 2 * 12 * 256**2  # the kernels of the block, in bfloat16
    sent = {
        kind: sum(
            r["bytes"]
            for r in found["collectives"]
            if (r["kind"], r["origin"], r["group"]) == (kind, "gradient", 2)
        )
        for kind in ("reduce-scatter", "all-reduce")
    }
    # Then each half is summed over the other axis.
    assert sent == {"reduce-scatter": split, "all-reduce": split / 2}


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_comes_with_remedies(tmp_path):
    """Half of the batch is too much, too: everything is refused within seconds."""
    config = {"batch": 2**19, "encoder__image": (64, 64), "encoder__width": 256}
    config |= {"data__source__length": 2**20, "encoder__dtype": "bfloat16"}
    file = tmp_path / "found.json"
    status, out, err = process(
        f"{DEMO}:simmim",
        *runs.overrides(**config),
        *("--topology=v5e:2x2", "--noanalysis", f"--json={file}"),
    )
    assert status == 0, err
    found = json.loads(file.read_text())
    assert [r["change"] for r in found] == [
        "",
        "--config.encoder.remat=True",
        "--config.mesh.fsdp=4",
        "--config.encoder.remat=True --config.mesh.fsdp=4",
        "--config.batch=262144",
    ]
    assert not found[0]["fits"] and "does not fit" in out
    needs = [r["needs"] for r in found]
    assert needs[1] < needs[0] and needs[4] < needs[0]
