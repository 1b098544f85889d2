"""The reader of compiled programs, on texts with known contents and on real ones."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo, scopes

# Forms that the TPU compiler writes: asynchronous pairs, iota groups, a loop that says
# how often it runs, a reduce-scatter as a fusion.
TEXT = (
    r"""HloModule jit_f, num_partitions=8

%all-reduce-scatter.1 (x: f32[16,8]) -> f32[4,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %all-reduce.7 = f32[16,8]{1,0} all-reduce(%x), replica_groups={{0,2,4,6},{1,3,5,7}}
  ROOT %slice = f32[4,8]{1,0} dynamic-slice(%all-reduce.7, %i)
}

%cond (q: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%until (q: (s32[], f32[4], pred[])) -> pred[] {
  %n = s32[] constant(9)
  %lt = pred[] compare(%i, %n), direction=LT
  ROOT %and = pred[] and(%lt, %done)
}

%work (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %rs = f32[2,5,3]{2,1,0} all-to-all(%v), PAIRS
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ar = f32[5]{0} all-reduce(%v), PAIRS
}

%rare (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %cb = f32[6]{0} collective-broadcast(%v), PAIRS
}

%often (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %in = (s32[]) while(%t), condition=%until, body=%inner, x={op_name="NAME/body/while"}
  %if = f32[6] conditional(%i), branch_computations={%rare}, x={op_name="NAME/ONCE/cond"}
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %ar = f32[4]{0} all-reduce(%v), PAIRS, x={op_name="jit(f)/optimizer/psum"}
}

%sends (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g1 = f32[4]{0} all-gather(%v), channel_id=7, PAIRS, x={chain_id="9"}
  %g2 = f32[4]{0} all-gather(%v), channel_id=7, PAIRS, x={chain_id="9"}
}

ENTRY %main.1 (x: f32[16,8]) -> f32[4,8] {
  %ag-start = (bf16[2,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%y), PAIRS
  %ag = bf16[4,8]{1,0} all-gather-done(%ag-start)
  %pair = (f32[3]{0}, s32[2,2]{1,0}) all-reduce(%u, %w), replica_groups=[2,4]<=[4,2]T(1,0)
  %perm = f32[10]{0} collective-permute(%z), source_target_pairs={{0,1},{2,3},{4,5},{6,7}}
  %few = f32[4,2]{1,0} copy(%y)
  %ragged = f32[16,2]{1,0} ragged-all-to-all(%few, %u, %i, %s, %o, %r), PAIRS
  %fewer = f32[2,2]{1,0} ragged-all-to-all(%few, %u, %i, %s, %o, %r), PAIRS
  %alone = f32[10]{0} all-reduce(%z), replica_groups={{0},{1}}
  %loop = (s32[], f32[4]{0}) while(%t), body=%body, x={"known_trip_count":{"n":"12"}}
  %tpu = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%sends
  %data = (s32[], f32[4]{0}) while(%t), condition=%until, body=%work
  %usual = (s32[], f32[4]{0}) while(%t), condition=%until, body=%often, x={op_name="NAME"}
  ROOT %f = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
""".replace("PAIRS", "replica_groups=[4,2]<=[8]")
    .replace("NAME", f"jit(f)/{scopes.usual_trips(2)}/while")
    .replace("ONCE", scopes.ONCE)
)


def test_forms_of_the_text():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    found = {(c.kind, c.count): c for c in hlo.collectives(TEXT, mesh)}
    assert found["all-gather", 3].wire_bytes == 8  # Once, three times.
    # A loop that data end counts once, whatever else bounds it.
    data = found["all-to-all", 1]
    assert (data.elements, data.matrix) == (30, 15)
    # Unless the program says what is usual, of this loop and of none inside.
    assert found["all-reduce", 2].elements == 5
    assert found["collective-broadcast", 1].elements == 6
    ragged = [c for c in hlo.collectives(TEXT, mesh) if "ragged" in c.kind]
    assert [c.wire_bytes for c in ragged] == [16, 8]  # Of the smaller buffer.
    assert len(found) == 10  # Not the reduction of each device with itself.
    gather = found["all-gather", 1]
    assert (gather.axes, gather.group, gather.result_bytes) == (("model",), 2, 64)
    assert gather.wire_bytes == 32
    pair = found["all-reduce", 1]
    assert (pair.axes, pair.group, pair.result_bytes) == (("data",), 4, 28)
    assert pair.wire_bytes == 2 * 3 / 4 * 28 and pair.elements == 4
    loop = found["all-reduce", 12]
    assert loop.axes == ("model",) and "/optimizer/" in loop.op_name
    scatter = found["reduce-scatter", 1]
    assert scatter.axes == ("data",) and scatter.wire_bytes == 3 / 4 * 16 * 8 * 4
    permute = found["collective-permute", 1]
    assert permute.axes == ("model",) and permute.wire_bytes == 40
    total = hlo.wire_bytes(list(found.values()))
    assert total["all-reduce", ("model",)] == 12 * 16 + 2 * 20


FORMS = {
    "{{0,1},{2,3},{4,5},{6,7}}": ("model",),
    "[2,4]<=[4,2]T(1,0)": ("data",),
    "{}": ("data", "model"),
    "mesh['a'=4,'b'=2] {'b'}": ("model",),
    "mesh['a'=1,'b'=4,'c'=2] {'b'}": ("data",),
    "mesh['a'=8] {'a'}": ("data", "model"),
    "mesh['a'=8] {'a':(1)4}": ("data",),
    "mesh['a'=8] {'a':(4)2}": ("model",),
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": ("data",),
    "mesh['a'=2,'b'=2,'c'=2] {'a','b'}": ("data",),
}


@pytest.mark.parametrize("form", FORMS)
def test_replica_groups(form):
    text = TEXT.splitlines()[0] + (
        "\n\nENTRY %main (x: f32[4]) -> f32[4] {\n  ROOT %r = f32[4]{0} all-reduce(%x), "
        f"replica_groups={form}, to_apply=%sum\n}}\n"
    )
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    (found,) = hlo.collectives(text, mesh)
    assert found.axes == FORMS[form]


def test_unknown_replica_groups_are_not_passed_over():
    text = TEXT.replace("replica_groups=[4,2]<=[8]", "replica_groups=new[4,2]")
    with pytest.raises(ValueError, match="cannot read the replica groups of: %a"):
        hlo.collectives(text)


def test_a_ragged_exchange_of_unknown_size_is_not_passed_over():
    with pytest.raises(ValueError, match="cannot find the operand of: %ragged"):
        hlo.collectives(TEXT.replace("%few = ", "%else = "))


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="not an HLO module"):
        hlo.collectives("")


def test_loops_and_axes_of_a_compiled_program():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def f(x):
        def body(carry, _):
            return jnp.sin(carry + jax.lax.psum(x * carry.sum(), "data")), None

        total, _ = jax.lax.scan(body, jnp.ones((2, 2)), length=5)
        return jax.lax.all_gather(total, "model", axis=1, tiled=True).sum(1)

    where = NamedSharding(mesh, P("data", "model"))
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=where)
    f = jax.jit(jax.shard_map(
        f, mesh=mesh, in_specs=P("data", "model"), out_specs=P("data"),
        check_vma=False,
    ))  # fmt: skip
    total = hlo.wire_bytes(hlo.collectives(f.lower(x).compile().as_text(), mesh))
    assert total["all-reduce", ("data",)] == 5 * hlo.ring_bytes("all-reduce", 16, 2)
    assert total["all-gather", ("model",)] == hlo.ring_bytes("all-gather", 64, 4)


# What the compiler writes of two chips in each of four slices, shortened: sums and
# gathers say who takes part, a permutation does not.
SENT = """HloModule jit_f, num_partitions=2

%more (a: f32[8]) -> bool[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%fused (a.1: f32[4,8]) -> f32[4,8] {
  %a.1 = f32[4,8]{1,0} parameter(0)
  ROOT %copy = f32[4,8]{1,0} all-gather(%a.1), replica_groups={{0,1}}
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %sin = f32[4,8]{1,0} sine(%v), metadata={op_name="jit(f)/optimizer/while/body/sin"}
  %flat = f32[4,8]{1,0} bitcast(%sin)
  %s = (f32[4,8]{1,0}, u32[], token[]) send(%flat, %t), WHO, TYPE="ALL_REDUCE"
  %r = (f32[4,8]{1,0}, u32[], token[]) recv(%t), WHO, TYPE="ALL_REDUCE"
  %done = (f32[4,8]{1,0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %loop = (s32[], f32[4,8]) while(%p), condition=%more, body=%body
  %r.1 = (bf16[4,2,8]{2,1,0}, u32[], token[]) recv(%t), WHO, TYPE="ALL_GATHER"
  %r.2 = (f32[8]{0}, u32[], token[]) recv(%t), WHO, TYPE="REDUCE_SCATTER"
  %r.3 = (f32[8]{0}, u32[], token[]) recv(%t), handler="host"
  %r.4 = (f32[8]{0}, u32[], token[]) recv(%t), TYPE="ONE_TO_ONE"
  ROOT %f = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%fused
}
""".replace("TYPE", "_xla_megascale_transfer_type").replace(
    "handler", "_xla_host_transfer_handler_name"
)
EVERYONE = (
    '_xla_host_transfer_rendezvous="psum.7_0",_xla_megascale_target="{1,2,3,4}x{0:1}"'
)
SLICES = jax.sharding.AbstractMesh((4, 1, 2), ("slice", "data", "model"))


def test_what_crosses_slices():
    found = hlo.collectives(SENT.replace("WHO", EVERYONE), SLICES)
    inside = [c for c in found if not c.between_slices]
    assert [(c.kind, c.axes) for c in inside] == [("all-gather", ("model",))]
    slow = {c.kind: c for c in found if c.between_slices}
    assert len(slow) == 4 == len(found) - 1  # Of each pair one, and none of the host.
    assert {c.axes for c in slow.values()} == {("slice",)}
    total = slow["all-reduce"]
    assert (total.count, total.group, total.elements, total.matrix) == (5, 4, 32, 32)
    assert total.wire_bytes == 2 * 3 / 4 * 32 * 4
    gather = slow["all-gather"]
    assert (gather.result_bytes, gather.wire_bytes) == (128, 3 / 4 * 128)
    assert (gather.elements, gather.matrix) == (64, 16)
    assert slow["reduce-scatter"].wire_bytes == 3 / 4 * 4 * 8 * 4
    assert slow["collective-permute"].wire_bytes == 32


def test_origins_that_the_compiler_left_out():
    found = hlo.collectives(SENT.replace("WHO", EVERYONE), SLICES)
    names = {c.kind: c.op_name for c in found}
    # Of what the send beside it reads, and of the argument of a fusion.
    assert names["all-reduce"] == "jit(f)/optimizer/while/body/sin"
    assert names["all-gather"] in ("x", "")
    assert {c.op_name for c in found if not c.between_slices} == {"x"}


@pytest.mark.parametrize(
    "who",
    [
        'channel_id=1,_xla_megascale_other=""',
        EVERYONE.replace("3,4", "3"),
        EVERYONE.replace("0:1", "0:3"),
        EVERYONE.replace("0:1", "1:2"),
    ],
)
def test_transfers_between_unknown_slices_are_not_passed_over(who):
    with pytest.raises(
        ValueError, match="cannot say between which slices.* of 4 slices"
    ):
        hlo.collectives(SENT.replace("WHO", who), SLICES)


def test_a_program_of_another_mesh():
    text = SENT.replace("WHO", EVERYONE)
    with pytest.raises(ValueError, match="cannot say between which slices"):
        hlo.collectives(text)
    for sizes in ((4, 2, 2), (4, 4, 1)):
        mesh = jax.sharding.AbstractMesh(sizes, ("slice", "data", "model"))
        with pytest.raises(ValueError, match="the program has 2 partitions: expected"):
            hlo.collectives(text, mesh)
