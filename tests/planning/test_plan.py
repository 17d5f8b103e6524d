"""The planner on CPU devices; with -m tpu, for TPU slices without a TPU."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tests.command import TINY
from vit_jax_zoo import trainer
from vit_jax_zoo.config import complete, load
from vit_jax_zoo.nn.attention import attend
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.planning import hlo
from vit_jax_zoo.planning.hardware import find_machine, find_topology
from vit_jax_zoo.planning.plan import (
  Memory,
  activation_bytes,
  best,
  compile_text,
  device_bytes,
  make_plan,
  meshes,
  needed_memory,
  report,
  search,
  table,
)
from vit_jax_zoo.training.sharding import ShardingRuleError, create_mesh

ROOT = pathlib.Path(__file__).parents[2]


def tiny(*overrides):
  return load(TINY[0].removeprefix("--config="), [*TINY[1:], *overrides])


@pytest.fixture(scope="module")
def machine():
  return find_machine("cpu")


@pytest.fixture(scope="module")
def plan(machine):
  fsdp = ("--config.sharding.mesh.data=1", "--config.sharding.mesh.fsdp=8")
  return make_plan(tiny(*fsdp), machine, name="tiny")


@pytest.mark.multidevice
def test_plan_of_compiled_step(plan, machine):
  parts = trainer.build(tiny(), machine.devices)
  with parts.train_batches() as batches:
    batch = next(batches)
  program = parts.program(batch)
  params = program.abstract_state.params
  flops = count_flops(program.train_step, program.abstract_state, program.abstract_batch)
  assert plan.flops == flops / 8
  assert plan.mesh == {"data": 1, "fsdp": 8, "model": 1}
  assert (plan.num_steps, plan.num_examples, plan.batch_size) == (24, 1437, 16)
  assert plan.batch_shapes == [(1.0, (8, 8, 3))]
  whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
  assert whole / 8 < plan.memory.params < whole  # large parameters are sharded
  # Adam's two moments are sharded like the parameters; the step counters are small.
  assert 2 * plan.memory.params <= plan.memory.optimizer < 2 * plan.memory.params + 64
  assert plan.memory.batch == 2 * (8 * 8 * 3 + 4)
  assert plan.fits
  held = plan.memory.params + plan.memory.optimizer + plan.memory.temporary
  assert held < plan.memory.peak < plan.memory.limit


@pytest.mark.multidevice
def test_sharded_parameters_gathered(plan):
  sent = sum(plan.network_bytes.values())
  assert set(plan.network_bytes) <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
  assert sent > plan.memory.params * 7  # gathered at least once
  assert plan.memory_bytes > plan.memory.params


@pytest.mark.multidevice
def test_unknown_device_no_time_estimate(plan):
  assert (plan.roofline, plan.days) == (None, None)
  assert "unknown: no peak rates of this device" in report(plan)


@pytest.mark.multidevice
def test_report_and_json(plan):
  text = report(plan)
  for word in ("fits", "parameters", "optimizer state", "activations", "temporaries", "all-"):
    assert word in text
  read = json.loads(json.dumps(dataclasses.asdict(plan)))
  assert read["memory"]["peak"] == plan.memory.peak
  assert read["mesh"]["fsdp"] == 8


@pytest.mark.multidevice
def test_optimization_level_reported(plan, machine):
  assert plan.optimization_level is None
  assert "JAX_OPTIMIZATION_LEVEL" not in report(plan)
  before = jax.config.jax_optimization_level
  try:
    jax.config.update("jax_optimization_level", "O1")
    two = dataclasses.replace(machine, devices=machine.devices[:2])
    quick = make_plan(tiny("--config.model.depth=1"), two, name="tiny")
  finally:
    jax.config.update("jax_optimization_level", before)
  assert dataclasses.asdict(quick)["optimization_level"] == "O1"
  assert "JAX_OPTIMIZATION_LEVEL=O1" in report(quick)


def test_activations_scale_with_depth_and_remat(machine):
  def kept(**fields):
    config = tiny()
    config.model.update(scan_layers=True, **fields)
    parts = trainer.build(config, machine.devices[:1])
    return activation_bytes(parts.program(parts.batch_shapes()[0][1]))

  shallow, deep = kept(depth=2, remat="full"), kept(depth=6, remat="full")
  tokens, width = 17, 16  # 16 patches of a digit, with or without the class token
  block = 16 * (deep - shallow) / 16 / 4  # bytes kept per block
  assert 16 * (tokens - 1) * width * 4 <= block <= 2 * 16 * tokens * width * 4
  assert kept(depth=6, remat="none") > 3 * deep


def test_device_bytes_of_sharded_array():
  mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
  split = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))
  whole = jax.sharding.NamedSharding(mesh, jax.P())
  tree = [
    jax.ShapeDtypeStruct((3, 8), np.float32, sharding=split),
    jax.ShapeDtypeStruct((5,), jax.numpy.bfloat16, sharding=whole),
  ]
  assert device_bytes(tree) == 3 * 2 * 4 + 5 * 2


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.60G of 15.75G hbm. "
     "Exceeded hbm capacity by 1.85G.", 17.6 * 2**30),
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
     "required for HLO temporaries (66.45G) exceeds available HBM (15.75G).", 66.45 * 2**30 + 15),
    ("RESOURCE_EXHAUSTED: something else", None),
  ],
)  # fmt: skip
def test_needed_memory_from_error(message, needed):
  given = Memory(
    params=1.0, optimizer=2.0, other_state=4.0, batch=8.0, activations=16.0,
    temporary=None, code=None, peak=None, limit=None,
  )  # fmt: skip
  assert needed_memory(message, given) == needed


def test_plans_bypass_compilation_cache(request):
  least = "jax_persistent_cache_min_compile_time_secs"
  request.addfinalizer(functools.partial(jax.config.update, least, jax.config.values[least]))
  jax.config.update(least, 0)
  cache = pathlib.Path(jax.config.jax_compilation_cache_dir)
  lowered = jax.jit(lambda x: x * 3.25 + 7).lower(1.0)  # not compiled by another test
  before = set(cache.iterdir())
  compile_text(lowered)
  assert set(cache.iterdir()) == before
  lowered.compile()
  assert set(cache.iterdir()) > before, "the cache is in use again"


# --- search ------------------------------------------------------------------------------------


def test_meshes_config_first_and_divide_batch():
  config = complete(ConfigDict({"batch_size": 8, "sharding": {"mesh": {"data": 2, "fsdp": -1}}}))
  found = meshes(config, 16)
  # The config's own mesh would split the batch of 8 over 16 devices.
  assert found[0] == {"data": 8, "fsdp": 1, "model": 2}
  assert all(size["data"] * size["fsdp"] * size["model"] == 16 for size in found)
  assert all(8 % (size["data"] * size["fsdp"]) == 0 for size in found)
  assert len({tuple(size.values()) for size in found}) == len(found)
  assert meshes(config, 8)[0] == {"data": 2, "fsdp": 4, "model": 1}


@pytest.mark.multidevice
def test_best_fits_and_is_fastest(plan):
  def variant(fits, seconds, peak):
    memory = dataclasses.replace(plan.memory, peak=peak)
    return dataclasses.replace(plan, fits=fits, step_seconds=seconds, memory=memory)

  slow, fast, roomy, large = (
    variant(True, 2.0, 1.0), variant(True, 1.0, 3.0), variant(True, 1.0, 2.0),
    variant(False, 0.5, 9.0),
  )  # fmt: skip
  assert best([slow, fast, roomy, large]) is roomy
  assert best([large]) is None
  assert len(table([slow, large]).splitlines()) == 3


@pytest.mark.multidevice
def test_search_stops_at_first_policy_and_skips_invalid_meshes(plan, machine, monkeypatch):
  tried = []

  def fake(config, machine, *, name, overrides):
    if config.sharding.mesh.model == 2:
      raise ShardingRuleError("sharding rule ('a', 'b') cannot apply")
    tried.append((dict(config.sharding.mesh), config.model.remat))
    return dataclasses.replace(plan, fits=config.model.remat == "dots", overrides=overrides)

  monkeypatch.setattr("vit_jax_zoo.planning.plan.make_plan", fake)
  config = tiny("--config.model.remat=full")
  plans = list(search(config, machine, name="tiny"))
  assert [remat for _, remat in tried] == ["none", "dots"] * (len(tried) // 2)
  assert {mesh["model"] for mesh, _ in tried} == {1, 4}
  assert plans[1].overrides[-1] == "--config.model.remat=dots"
  assert config.model.remat == "full"  # the caller's config is not modified

  def broken(*args, **kwargs):
    raise ValueError("unknown field of vit_ti16 'widht'")

  monkeypatch.setattr("vit_jax_zoo.planning.plan.make_plan", broken)
  with pytest.raises(ValueError, match="widht"):
    list(search(config, machine, name="tiny"))


# --- the command -------------------------------------------------------------------------------


def command(*arguments, **environment):
  return subprocess.run(
    [sys.executable, "-m", "vit_jax_zoo.plan", *arguments],
    cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment,
  )  # fmt: skip


@pytest.mark.parametrize(
  ("platform", "topology", "message"),
  [
    ("tpu", "v5q:2x2", "TPU 'v5q'.*'v5p'"),
    ("tpu", None, "--topology: missing"),
    ("cpu", "v5e:2x2", "--topology=v5e:2x2"),
    ("gpu", None, "platform 'gpu'"),
  ],
)
def test_find_machine_errors(platform, topology, message):
  with pytest.raises(ValueError, match=message) as error:
    find_machine(platform, topology)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "topology"),
  [
    ("v5e:4x4", "v5e:4x4"),
    ("v5litepod-16", "v5e:4x4"),
    ("v5e-8", "v5e:2x4"),
    ("v6e-1", "v6e:1x1"),
    ("v5p-8", "v5p:2x2x1"),
    ("v5p-12288", "v5p:16x16x24"),
    ("v4-64", "v4:2x4x4"),
    ("v3-32", "v3:4x4"),
    ("v2-8", "v2:2x2"),
  ],
)
def test_accelerator_type_topology(name, topology):
  assert find_topology(name) == topology


@pytest.mark.parametrize(
  "name", ["v5litepod-17", "v5e-512", "v3-2", "v5p-4", "v9-8", "v5e-", "-v5e"]
)
def test_unknown_accelerator_type_raises(name):
  with pytest.raises(ValueError, match=r"--topology|unknown TPU"):
    find_topology(name)


@pytest.mark.long  # test_readme.py runs this command by launch_tpu.sh
def test_command_nocompile():
  run = command(*TINY, "--topology=v5litepod-8", "--nocompile")
  assert run.returncode == 0, run.stderr
  assert "v5e:2x4: 8 devices, mesh data=8, batch 16" in run.stdout


def test_missing_libtpu_names_extra(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"pip install -e '\.\[plan\]'"):
    find_machine("tpu", "v5e:2x2")


@pytest.mark.slow
def test_command_cpu(tmp_path):
  output = tmp_path / "new" / "plan.json"
  run = command(*TINY, "--platform=cpu", f"--output={output}")
  assert run.returncode == 0, run.stderr
  assert "fits               yes" in run.stdout
  assert json.loads(output.read_text())["num_devices"] == 1
  run = command(*TINY, "--platform=cpu", "--config.model.widht=3")
  assert (run.returncode, len(run.stderr.splitlines())) == (2, 1)
  assert "did you mean 'width'" in run.stderr


@pytest.mark.tpu
def test_tpu_plan_without_tpu():
  machine = find_machine("tpu", "v5e:2x2")
  fsdp = ("--config.sharding.mesh.data=1", "--config.sharding.mesh.fsdp=4")
  plan = make_plan(tiny(*fsdp), machine, name="tiny")
  assert (plan.device_kind, plan.num_devices) == ("TPU v5 lite", 4)
  assert plan.fits
  assert plan.memory.limit == 16 * 2**30
  assert plan.roofline.step > 0
  assert sum(plan.network_bytes.values()) > 0
  assert plan.days == pytest.approx(24 * plan.step_seconds / 86_400)
  assert "in total" in report(plan)


@pytest.mark.tpu
@pytest.mark.parametrize(
  ("name", "devices"), [("v5litepod-8", 8), ("v6e-256", 256), ("v5p-128", 64), ("v3-32", 32)]
)
def test_accelerator_type_device_count(name, devices):
  assert len(find_machine("tpu", name).devices) == devices


@pytest.mark.tpu
def test_unknown_topology_raises():
  with pytest.raises(ValueError, match=r"--topology=v5e:3x3: .*v5e:4x4"):
    find_machine("tpu", "v5e:3x3")


@pytest.mark.tpu
def test_plan_too_large_does_not_fit():
  machine = find_machine("tpu", "v5e:1x1")
  config = tiny("--config.batch_size=400000")
  plan = make_plan(config, machine, name="large")
  assert not plan.fits
  assert plan.memory.peak > 15.75 * 2**30
  assert isinstance(plan.memory, Memory)


@pytest.mark.tpu
def test_tpu_search_stops_at_first_policy():
  machine = find_machine("tpu", "v5e:2x2")
  config = tiny("--config.model.remat=dots")
  plans = list(search(config, machine, name="tiny"))
  assert all(plan.fits and plan.remat == "none" for plan in plans)
  assert len(plans) == len({tuple(plan.mesh.values()) for plan in plans}) > 2
  assert best(plans).step_seconds == min(plan.step_seconds for plan in plans)


@pytest.mark.tpu
def test_fused_attention_memory_bytes():
  machine = find_machine("tpu", "v5e:2x2")
  mesh = create_mesh({"data": 1}, machine.devices[:1])
  x = jax.ShapeDtypeStruct((4, 1024, 16, 128), jnp.bfloat16)
  whole = NamedSharding(mesh, PartitionSpec())
  attend_causally = functools.partial(attend, is_causal=True)
  with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
    jitted = jax.jit(attend_causally, in_shardings=whole, out_shardings=whole)
    _, text = compile_text(jitted.lower(x, x, x))
  assert text.count('custom_call_target="tpu_custom_call"') == 1
  operands_and_results = 4 * 2 * 4 * 1024 * 16 * 128
  moved = hlo.traffic(text).memory_bytes
  # Transposing each array to the kernel's layout reads and writes it once more.
  assert operands_and_results < moved < 3.1 * operands_and_results
