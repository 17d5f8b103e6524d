"""Memory traffic and collectives of HLO programs: handwritten and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax_zoo.planning import hlo
from vit_jax_zoo.training.sharding import create_mesh

# Two loops of 12 and 3 steps; 8 devices in groups of 8, 4 and 2.
BY_HAND = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %p = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[1000]{0:T(1024)} get-tuple-element(%p), index=1
  %r = f32[1000]{0:T(1024)} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) tuple(%i, %r)
}

%condition (p: (s32[], f32[1000])) -> pred[] {
  %n = s32[]{:T(128)} constant(12)
  %p = (s32[]{:T(128)}, f32[1000]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%inner (p: (bf16[100])) -> (bf16[100]) {
  %p = (bf16[100]) parameter(0)
  %x = bf16[100] get-tuple-element(%p), index=0
  %g = bf16[200] all-gather(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %s = bf16[100] reduce-scatter(%g), replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, to_apply=%add
  ROOT %t = (bf16[100]) tuple(%s)
}

%unknown (p: (bf16[100])) -> pred[] {
  ROOT %more = pred[] parameter(1)
}

%cut (whole: f32[50,1000], i: s32[]) -> f32[1,1000] {
  %whole = f32[50,1000] parameter(0)
  %i = s32[] parameter(1)
  ROOT %row = f32[1,1000] dynamic-slice(%whole, %i, %i), dynamic_slice_sizes={1,1000}
}

%put (whole: f32[50,1000], row: f32[1,1000], i: s32[]) -> f32[50,1000] {
  %whole = f32[50,1000] parameter(0)
  %row = f32[1,1000] parameter(1)
  %i = s32[] parameter(2)
  ROOT %done = f32[50,1000] dynamic-update-slice(%whole, %row, %i, %i)
}

%prefetch (whole: f32[50,1000]) -> f32[10,1000] {
  %whole = f32[50,1000] parameter(0)
  ROOT %rows = f32[10,1000]{1,0:S(1)} slice(%whole), slice={[0:10], [0:1000]}
}

ENTRY %main (a: f32[1000], b: bf16[100], c: f32[50,1000], d: f32[100]) -> f32[1000] {
  %a = f32[1000]{0:T(1024)} parameter(0)
  %b = bf16[100] parameter(1)
  %c = f32[50,1000] parameter(2)
  %d = f32[100]{0} parameter(3)
  %zero = s32[] constant(0)
  %first = (s32[], f32[1000]) tuple(%zero, %a)
  %loop = (s32[], f32[1000]) while(%first), condition=%condition, body=%body
  %second = (bf16[100]) tuple(%b)
  %noted = (bf16[100]) while(%second), condition=%unknown, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  %endless = (bf16[100]) while(%second), condition=%unknown, body=%inner
  %row = f32[1,1000] fusion(%c, %zero), kind=kLoop, calls=%cut
  %back = f32[50,1000] fusion(%c, %row, %zero), kind=kLoop, calls=%put
  %near = f32[1000]{0:T(1024)S(1)} copy(%a)
  %fetch = ((f32[50,1000]), f32[10,1000]{1,0:S(1)}, s32[]{:S(2)}) async-start(%c), calls=%prefetch
  %fetched = f32[10,1000]{1,0:S(1)} async-done(%fetch)
  %again = f32[1,1000]{1,0:S(1)} slice(%fetched), slice={[0:1], [0:1000]}
  %stored = f32[50,1000] dynamic-update-slice(%c, %again, %zero, %zero)
  %start = (f32[100]{0}, f32[800]{0}) all-gather-start(%d), replica_groups={}, dimensions={0}
  %end = f32[800]{0} all-gather-done(%start)
  ROOT %out = f32[1000]{0:T(1024)} get-tuple-element(%loop), index=1
}
"""


def test_collectives_multiplied_by_loop_length():
  found = hlo.traffic(BY_HAND)
  # 12 x 2 x 3/4 of 4000 bytes; 3 + 1 times 1 x 200 bytes, and once 7 x 400; 4 x 1/2 of 400 bytes.
  assert found.collective_bytes == {
    "all-reduce": 12 * 2 * 3 / 4 * 4000,
    "all-gather": 4 * 200 + 7 * 400,
    "reduce-scatter": 4 * 1 / 2 * 400,
  }
  assert found.loops_of_unknown_length == 1


def test_memory_bytes_of_slices_and_on_chip_copies():
  found = hlo.traffic(BY_HAND)
  reduced = 12 * 2 * 4000
  gathered = 4 * (200 + 400)
  scattered = 4 * (400 + 200)
  row, back = 4000 + 4000 + 4, 4000 + 4000 + 4  # the row and the index
  near = 4000  # read from main memory, written to on-chip memory
  prefetched, stored = 10 * 4000, 4000  # read from main memory; written to it
  started = 400 + 3200
  slices = row + back + prefetched + stored
  assert found.memory_bytes == reduced + gathered + scattered + slices + near + started


NESTED = """HloModule nested, replica_count=1

%cut (stack: f32[24,100], index: s32[]) -> f32[100] {
  %stack = f32[24,100] parameter(0)
  %index = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100] dynamic-slice(%stack, %index, %zero), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100] bitcast(%row)
}

%put (stack: f32[24,100], row: f32[1,100], index: s32[]) -> f32[24,100] {
  %stack = f32[24,100] parameter(0)
  %row = f32[1,100] parameter(1)
  %index = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %updated = f32[24,100] dynamic-update-slice(%stack, %row, %index, %zero)
}

%whole (stack: f32[2400]) -> f32[2400] {
  %stack = f32[2400] parameter(0)
  ROOT %negated = f32[2400] negate(%stack)
}

%reads (stack: f32[2400], index: s32[]) -> f32[100] {
  %stack = f32[2400] parameter(0)
  %index = s32[] parameter(1)
  %rows = f32[24,100] bitcast(%stack)
  ROOT %row = f32[100] fusion(%rows, %index), kind=kLoop, calls=%cut
}

%writes (stack: f32[24,100], row: f32[1,100], index: s32[]) -> f32[24,100] {
  %stack = f32[24,100] parameter(0)
  %row = f32[1,100] parameter(1)
  %index = s32[] parameter(2)
  ROOT %updated = f32[24,100] fusion(%stack, %row, %index), kind=kLoop, calls=%put
}

%negates (stack: f32[2400]) -> f32[2400] {
  %stack = f32[2400] parameter(0)
  ROOT %negated = f32[2400] fusion(%stack), kind=kLoop, calls=%whole
}

ENTRY %main (a: f32[2400], b: f32[24,100], c: f32[1,100], index: s32[]) -> f32[2400] {
  %a = f32[2400] parameter(0)
  %b = f32[24,100] parameter(1)
  %c = f32[1,100] parameter(2)
  %index = s32[] parameter(3)
  %row = f32[100] fusion(%a, %index), kind=kOutput, calls=%reads
  %back = f32[24,100] fusion(%b, %c, %index), kind=kOutput, calls=%writes
  ROOT %negated = f32[2400] fusion(%a), kind=kOutput, calls=%negates
}
"""


def test_slices_in_nested_fusions_count_as_slices():
  row, index, whole = 400, 4, 9600
  reads, writes, negates = row + index + row, row + index + row, 2 * whole
  assert hlo.traffic(NESTED).memory_bytes == reads + writes + negates


@pytest.mark.parametrize(
  ("attributes", "size"),
  [
    ("channel_id=1, replica_groups=[2,4]<=[8], use_global_device_ids=true", 4),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
    ("replica_groups={{0,1,2},{3,4,5}}, to_apply=%add", 3),
    ("replica_groups={}, to_apply=%add", 8),
    ("replica_groups=mesh['axis_0'=64] {'axis_0'}, use_global_device_ids=true", 64),
    ("replica_groups=mesh['data'=4,'fsdp'=16] {'data','fsdp'}", 64),
    ("replica_groups=mesh['data'=4,'fsdp'=16] {'fsdp':(2)8}", 8),
  ],
)
def test_replica_group_formats(attributes, size):
  assert hlo.group_size(attributes, 8) == size


@pytest.mark.parametrize(
  ("shape", "size"),
  [
    ("f32[2,3]{1,0:T(8,128)}", 24),
    ("bf16[]", 2),
    ("(s32[], pred[5], /*index=2*/f8e4m3fn[7]{0})", 4 + 5 + 7),
    ("u4[10]{0:T(128)}", 5),
    ("()", 0),
  ],
)
def test_shape_bytes(shape, size):
  assert hlo.shape_bytes(shape) == size


def test_conditional_counts_busiest_branch():
  branch = "%{0} (p: f32[{1}]) -> f32[{1}] {{\n  ROOT %{0}.c = f32[{1}] all-to-all(%p)\n}}\n"
  text = (
    "HloModule m, num_partitions=4\n"
    + branch.format("small", 10).replace("all-to-all(%p)", "negate(%p)")
    + "%large (p: f32[100]) -> f32[100] {\n  %p = f32[100] parameter(0)\n"
    "  ROOT %c = f32[100] all-to-all(%p), replica_groups={}\n}\n"
    "ENTRY %main (i: s32[], x: f32[100]) -> f32[100] {\n  %i = s32[] parameter(0)\n"
    "  %x = f32[100] parameter(1)\n  ROOT %r = f32[100] conditional(%i, %x, %x), "
    "branch_computations={%small, %large}\n}\n"
  )
  assert hlo.traffic(text).collective_bytes == {"all-to-all": 3 / 4 * 400}


def test_multiline_kernel_metadata():
  """A splash attention kernel as printed by libtpu, in a loop of five steps."""
  text = """HloModule m

%body (p: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %p = (s32[], f32[1000]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[1000] get-tuple-element(%p), index=1
  %kernel = f32[1000] custom-call(%x), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128",
  "a = b":{
}
,"unclosed":"{"
}}, metadata={op_name="jit(f)/attention"}, backend_config={"flags":[]}
  %after = f32[1000] negate(%kernel)
  ROOT %t = (s32[], f32[1000]) tuple(%i, %after)
}

%condition (p: (s32[], f32[1000])) -> pred[] {
  %n = s32[] constant(5)
  %p = (s32[], f32[1000]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000] parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], f32[1000]) tuple(%zero, %x)
  %loop = (s32[], f32[1000]) while(%first), condition=%condition, body=%body
  ROOT %out = f32[1000] get-tuple-element(%loop), index=1
}, execution_thread="main"
"""
  in_kernel = in_negation = 2 * 4000
  assert hlo.traffic(text).memory_bytes == 5 * (in_kernel + in_negation)


def test_invalid_text_raises():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    hlo.traffic("nothing")


@pytest.mark.multidevice
def test_compiled_scan_gathers_each_layer():
  """Seven layers sharded over eight devices: each is gathered once, which makes seven gathers."""
  mesh = create_mesh({"fsdp": 8})
  weights = jax.ShapeDtypeStruct(
    (7, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  )
  x = jax.ShapeDtypeStruct(
    (16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp"))
  )

  def forward(weights, x):
    def layer(x, weight):
      whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))
      return jnp.tanh(x @ whole), None

    return jax.lax.scan(layer, x, weights)[0]

  found = hlo.traffic(jax.jit(forward).lower(weights, x).compile().as_text())
  assert found.loops_of_unknown_length == 0
  assert set(found.collective_bytes) == {"all-gather"}
  np.testing.assert_allclose(found.collective_bytes["all-gather"], 7 * 7 / 8 * 64 * 64 * 4)
