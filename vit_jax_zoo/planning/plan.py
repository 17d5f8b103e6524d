"""Compiles a config's training step for a machine: memory, FLOPs, traffic, lower bound on time.

The bound is a roofline; `ASSUMPTIONS` lists its assumptions. `search` compares meshes.
"""

import contextlib
import copy
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.ticker import EngFormatter
from ml_collections import ConfigDict

from vit_jax_zoo import trainer
from vit_jax_zoo.data import fake_data
from vit_jax_zoo.nn.transformer import REMAT_POLICIES
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.planning import hlo
from vit_jax_zoo.planning.hardware import Chip, Machine
from vit_jax_zoo.tasks.base import LossContext, OptimGroup
from vit_jax_zoo.training.sharding import ShardingRuleError, batch_ways
from vit_jax_zoo.training.train_step import Program

SECONDS_PER_DAY = 86_400
ASSUMPTIONS = (
  "a step takes the longest of compute, memory traffic and network traffic, each at the chip's "
  "stated peak and fully overlapped",
  "collectives are rings over all links of a chip; per device, they send (n-1)/n of an array, and "
  "twice that for an all-reduce",
  "FLOPs (matrix products and convolutions) are counted from the jaxpr, traffic from the compiled "
  "program, both with all loop iterations and recomputation (remat)",
  "evaluation, checkpoints and input are not included",
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device. Figures of the compiler are None before compilation."""

  params: float
  optimizer: float
  other_state: float  # moving averages, batch statistics and the like
  batch: float  # this device's part
  activations: float  # residuals for the backward pass before XLA's fusion; part of `temporary`
  temporary: float | None = None  # live within a step only, with activations and gradients
  code: float | None = None
  peak: float | None = None  # if the step does not fit, the memory that the compiler needs
  limit: float | None = None  # the device's memory, None if unknown


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bounds in seconds per step: FLOPs and traffic at the chip's peak rates."""

  compute: float
  memory: float
  network: float
  step: float  # the largest of the three
  bound: str  # its name


def roofline(chip: Chip, *, flops: float, memory_bytes: float, network_bytes: float) -> Roofline:
  """Returns the lower bounds of a step from its figures per device."""
  times = {
    "compute": flops / chip.peak_flops,
    "memory": memory_bytes / chip.memory_bandwidth,
    "network": network_bytes / chip.network_bandwidth,
  }
  bound = max(times, key=lambda part: times[part])
  return Roofline(**times, step=times[bound], bound=bound)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Cost of a config's training step on a machine. All figures are per device and step."""

  config: str
  overrides: list[str]
  machine: str
  device_kind: str  # JAX's name of the devices
  num_devices: int
  mesh: dict[str, int]  # devices along each axis
  remat: str | None  # remat policy, for models that have one
  batch_size: int  # global
  accumulation_steps: int
  num_steps: int
  num_examples: int  # per epoch
  batch_shapes: list[tuple[float, tuple[int, ...]]]  # fraction of steps, image; largest compiled
  fits: bool  # compiles with a peak below the device's memory
  memory: Memory
  flops: float
  memory_bytes: float | None = None  # main-memory traffic; None if not compiled, like the following
  network_bytes: dict[str, float] | None = None  # to other devices, by kind of collective
  compile_seconds: float | None = None
  compile_cpu_seconds: float | None = None
  optimization_level: str | None = None  # XLA's, such as O1; None: the default
  roofline: Roofline | None = None  # None if the chip is unknown, like the following
  step_seconds: float | None = None  # lower bound of the mean step time over all batch shapes
  epochs_per_day: float | None = None  # upper bound
  days: float | None = None  # lower bound of the whole run
  notes: list[str] = dataclasses.field(default_factory=list)  # assumptions of this plan
  jax_version: str = jax.__version__
  date: str = ""


def make_plan(
  config: ConfigDict,
  machine: Machine,
  *,
  name: str,
  overrides: list[str] | None = None,
  compile_step: bool = True,
) -> Plan:
  """Compiles a config's training step, unless `compile_step` is False; ValueError if invalid."""
  parts = trainer.build(config, machine.devices, fake_data.load)
  kinds = parts.batch_shapes()
  largest = max((batch for _, batch in kinds), key=_size)
  program = parts.program(largest)
  state, batch = program.abstract_state, program.abstract_batch
  level = getattr(jax.config, "jax_optimization_level", None)
  level = None if level == "UNKNOWN" else level
  with jax.set_mesh(parts.mesh):
    flops = count_flops(program.train_step, state, batch) / len(machine.devices)
    memory = Memory(
      params=device_bytes(state.params),
      optimizer=device_bytes(state.opt_state),
      other_state=device_bytes((state.ema, state.model_state, state.step, state.rng)),
      batch=device_bytes(batch),
      activations=activation_bytes(program, parts.config.accumulation_steps),
      limit=machine.memory,
    )
  plan = Plan(
    config=name,
    overrides=list(overrides or ()),
    machine=machine.name,
    device_kind=machine.kind,
    num_devices=len(machine.devices),
    mesh={axis: int(size) for axis, size in parts.mesh.shape.items()},
    remat=getattr(parts.model, "remat", None),
    batch_size=parts.config.batch_size,
    accumulation_steps=parts.config.accumulation_steps,
    num_steps=parts.num_steps,
    num_examples=len(parts.train_source),
    batch_shapes=[
      (fraction, batch.get("image", max(batch.values(), key=np.size)).shape[1:])
      for fraction, batch in kinds
    ],
    fits=False,
    memory=memory,
    flops=flops,
    optimization_level=level,
    notes=_notes(parts, level, len(kinds)),
    date=time.strftime("%Y-%m-%d"),
  )
  if not compile_step:
    return plan
  mean_size = sum(fraction * _size(batch) for fraction, batch in kinds) / _size(largest)
  return _compiled(plan, program, machine, mean_size)


def _compiled(plan: Plan, program: Program, machine: Machine, mean_size: float) -> Plan:
  devices = f"{plan.num_devices} devices of {machine.name}"
  logging.info("compiling %s for %s; minutes, or an hour for large models", plan.config, devices)
  start, cpu_start = time.perf_counter(), time.process_time()
  with jax.set_mesh(program.mesh):
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
  try:
    compiled, text = compile_text(lowered)
  except jax.errors.JaxRuntimeError as error:
    if error.error_code_string != "RESOURCE_EXHAUSTED":
      raise RuntimeError(f"{plan.config}: does not compile for {machine.name}: {error}") from None
    memory = dataclasses.replace(plan.memory, peak=needed_memory(str(error), plan.memory))
    return dataclasses.replace(plan, memory=memory)
  wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
  found, moved = compiled.memory_analysis(), hlo.traffic(text)
  # In use at once: arguments, results not aliased with them, temporaries.
  results = found.output_size_in_bytes - found.alias_size_in_bytes
  temporary, code = float(found.temp_size_in_bytes), float(found.generated_code_size_in_bytes)
  peak = found.argument_size_in_bytes + results + temporary + code
  loops = moved.loops_of_unknown_length
  note = f"{loops} loop(s) of unknown length count as one iteration"
  plan = dataclasses.replace(
    plan,
    fits=machine.memory is None or peak <= machine.memory,
    memory=dataclasses.replace(plan.memory, temporary=temporary, code=code, peak=peak),
    memory_bytes=moved.memory_bytes,
    network_bytes=moved.collective_bytes,
    compile_seconds=wall,
    compile_cpu_seconds=cpu,
    notes=plan.notes + [note] * bool(loops),
  )
  if machine.chip is None:
    return plan
  sent = sum(moved.collective_bytes.values())
  least = roofline(
    machine.chip, flops=plan.flops, memory_bytes=moved.memory_bytes, network_bytes=sent
  )
  step = least.step * mean_size
  return dataclasses.replace(
    plan,
    roofline=least,
    step_seconds=step,
    epochs_per_day=SECONDS_PER_DAY / step * plan.batch_size / plan.num_examples,
    days=plan.num_steps * step / SECONDS_PER_DAY,
  )


def compile_text(lowered: Any) -> tuple[Any, str]:
  """Returns a lowered program compiled, and its optimised HLO text.

  jaxlib cannot always print libtpu's programs: the largest file that XLA dumps is the program.
  """
  with _without_cache(), tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    files = pathlib.Path(folder).glob("*after_optimizations.txt")
    return compiled, max(files, key=lambda file: file.stat().st_size).read_text()


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """Disables JAX's cache: cached programs have no compile time, those for absent devices fail."""
  enabled = getattr(jax.config, "jax_enable_compilation_cache", True)
  try:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting only once
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def needed_memory(message: str, memory: Memory) -> float | None:
  """Returns the bytes that a step needs, from the total or temporaries in XLA's error, or None."""
  # XLA's error has a code and no attribute for the size.
  total = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
  found = total or re.search(r"required for HLO temporaries \(([\d.]+)([KMG])\)", message)
  if found is None:
    return None
  size = float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]]
  given = memory.params + memory.optimizer + memory.other_state + memory.batch
  return size if total else given + size


def device_bytes(tree: Any) -> float:
  """Returns the bytes per device of a tree of shapes with shardings."""
  leaves = jax.tree.leaves(tree)
  return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def activation_bytes(program: Program, accumulation_steps: int = 1) -> float:
  """Returns the bytes per device of the residuals of differentiation, before fusion by XLA.

  Of the optimizer group with the most, without parameters and inputs, split as the batch is.
  """
  batch = {
    key: jax.ShapeDtypeStruct((leaf.shape[0] // accumulation_steps, *leaf.shape[1:]), leaf.dtype)
    for key, leaf in program.abstract_batch.items()
  }
  largest = max(_residual_bytes(program, group, batch) for group in program.task.optim_groups)
  return largest / batch_ways(program.mesh)


def _residual_bytes(program: Program, group: OptimGroup, batch: Any) -> float:
  def forward(state: Any, batch: Any) -> list[jax.Array]:
    context = LossContext(
      rng=jax.random.wrap_key_data(state.rng),
      step=state.step,
      normalizers=program.task.normalizers(batch),
      optim_group=group.name,
    )

    def loss(own: Any) -> tuple[Any, Any]:
      params = group.insert(state.params, own)
      return program.task.loss({"params": params, **state.model_state}, batch, context).loss, None

    _, backward, _ = jax.vjp(loss, group.select(state.params), has_aux=True)
    given = {id(leaf) for leaf in jax.tree.leaves((state, batch))}
    return [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given]

  with jax.set_mesh(program.mesh):
    leaves = jax.eval_shape(forward, program.abstract_state, batch)
  return float(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))


def _notes(parts: trainer.Experiment, level: str | None, num_shapes: int) -> list[str]:
  notes = [parts.train_source.assumption] if parts.train_source.assumption else []
  if level:
    notes.append(
      f"the run also sets JAX_OPTIMIZATION_LEVEL={level}; at XLA's default level, compilation is "
      "slower, the program moves fewer bytes, and its memory may be larger or smaller"
    )
  if num_shapes > 1:
    notes.append(
      f"the largest of {num_shapes} batch shapes is compiled; the time of the others is in "
      "proportion to their pixels"
    )
  return notes


def _size(batch: Mapping[str, np.ndarray]) -> int:
  return max(value.size for value in batch.values())


def search(config: ConfigDict, machine: Machine, *, name: str) -> Iterator[Plan]:
  """Yields plans as they are made: for each mesh the first, fastest remat policy that fits.

  Meshes that cannot split the batch or the model's layers are skipped. Raises ValueError, one line,
  about a config that is invalid on every mesh.
  """
  policies = [None] if config.model.get("remat") is None else list(REMAT_POLICIES)
  for sizes in meshes(config, len(machine.devices)):
    for remat in policies:
      candidate = copy.deepcopy(config)
      overrides = [f"--config.sharding.mesh.{axis}={size}" for axis, size in sizes.items()]
      candidate.sharding.mesh = dict(sizes)
      if remat is not None:
        candidate.model.remat = remat
        overrides.append(f"--config.model.remat={remat}")
      try:
        plan = make_plan(candidate, machine, name=name, overrides=overrides)
      except ShardingRuleError:
        break  # heads or hidden units are no multiple of the axis
      yield plan
      if plan.fits:
        break


def meshes(config: ConfigDict, num_devices: int) -> list[dict[str, int]]:
  """Returns the meshes to try, the config's own first; none twice, none that splits no batch."""
  own = dict(config.sharding.mesh)
  rest = num_devices // math.prod(size for size in own.values() if size != -1)
  tried = [{axis: rest if size == -1 else size for axis, size in own.items()}]
  for model in (1, 2, 4):
    ways = num_devices // model
    tried += [{"data": d, "fsdp": ways // d, "model": model} for d in (ways, 1) if ways]
  parts = config.accumulation_steps
  found = []
  for sizes in tried:
    ways = sizes["data"] * sizes["fsdp"]
    fits = ways * sizes["model"] == num_devices and config.batch_size % (ways * parts) == 0
    if fits and sizes not in found:
      found.append(sizes)
  return found


def best(plans: list[Plan]) -> Plan | None:
  """Returns the fastest plan that fits; of equal ones, that with most free memory."""
  fitting = [plan for plan in plans if plan.fits]
  return min(fitting, key=lambda p: (p.step_seconds or 0.0, p.memory.peak), default=None)


def report(plan: Plan) -> str:
  """Returns all figures of a plan, one per line, and its assumptions."""
  memory = plan.memory
  shapes = ["x".join(map(str, shape)) for _, shape in plan.batch_shapes]
  if memory.peak is None:
    fits = "no: the compiler ran out of memory"
  elif memory.limit is None:
    fits = f"unknown: peak {gib(memory.peak)}; the device does not report its memory"
  else:
    fits = f"{'yes' if plan.fits else 'NO'}: {gib(memory.peak)} of {gib(memory.limit)}"
  several = " (the largest is compiled)" if len(shapes) > 1 else ""
  batch = f"{plan.batch_size} of {', '.join(shapes)}{several}"
  rows = [
    ("config", " ".join((plan.config, *plan.overrides))),
    ("machine", f"{plan.machine}: {plan.num_devices} x {plan.device_kind}, mesh {mesh(plan)}"),
    ("batch", f"{batch}, {plan.accumulation_steps} micro-batch(es)"),
    ("remat", plan.remat or "-"),
    ("fits", fits),
    ("  parameters", gib(memory.params)),
    ("  optimizer state", gib(memory.optimizer)),
    ("  other state", gib(memory.other_state)),
    ("  batch", gib(memory.batch)),
    ("  activations", f"{gib(memory.activations)} for the backward pass, before fusion by XLA"),
    ("  temporaries", f"{gib(memory.temporary)}, including activations and gradients"),
    ("  program", gib(memory.code)),
    ("FLOPs", EngFormatter("FLOP", places=2)(plan.flops)),
    *_traffic_rows(plan),
    *_time_rows(plan),
  ]
  width = max(len(name) for name, _ in rows)
  lines = [f"{name:<{width}}  {text}" for name, text in rows]
  if notes := [*plan.notes, *(ASSUMPTIONS if plan.roofline else ())]:
    lines += ["", "Per device and step, assuming:", *(f"  * {note}" for note in notes)]
  return "\n".join(lines)


def table(plans: Sequence[Plan]) -> str:
  """Returns one line for each plan, to compare meshes."""
  head = f"{'mesh':<28} {'remat':<10} {'fits':<4} {'peak':>10} {'min step time':>13}  bound by"
  rows = [
    f"{mesh(p):<28} {p.remat or '-':<10} {'yes' if p.fits else 'no':<4} "
    f"{gib(p.memory.peak):>10} {seconds(p.step_seconds):>13}  "
    f"{p.roofline.bound if p.roofline else '-'}"
    for p in plans
  ]
  return "\n".join([head, *rows])


def mesh(plan: Plan) -> str:
  """Returns the sizes of the mesh's axes with more than one device."""
  used = [f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
  return " x ".join(used) or "one device"


def gib(size: float | None) -> str:
  """Formats a number of bytes: 1.50 GiB, 3.0 MiB, or - for None."""
  if size is None:
    return "-"
  return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def seconds(value: float | None) -> str:
  """Formats a time in seconds: 12.3 ms, 2.50 s, or - for None."""
  if value is None:
    return "-"
  return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _thousands(value: float) -> str:
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _traffic_rows(plan: Plan) -> list[tuple[str, str]]:
  if plan.memory_bytes is None or plan.network_bytes is None:
    return []
  shown = EngFormatter("B", places=2)
  kinds = [f"{kind} {shown(sent)}" for kind, sent in sorted(plan.network_bytes.items())]
  total = shown(sum(plan.network_bytes.values()))
  return [
    ("memory traffic", shown(plan.memory_bytes)),
    ("network traffic", f"{total} ({', '.join(kinds)})" if kinds else "none"),
    ("compile time", f"{plan.compile_seconds:.0f} s ({plan.compile_cpu_seconds:.0f} CPU s)"),
  ]


def _time_rows(plan: Plan) -> list[tuple[str, str]]:
  if (least := plan.roofline) is None or plan.step_seconds is None:
    return [("min step time", "unknown: no peak rates of this device")] if plan.fits else []
  parts = ", ".join(f"{p} {seconds(getattr(least, p))}" for p in ("compute", "memory", "network"))
  rows = [("min step time", f"{seconds(least.step)} ({parts})")]
  if plan.step_seconds != least.step:
    rows.append(("mean step time", seconds(plan.step_seconds)))
  days = plan.days or 0.0
  total = f"{_thousands(days)} days" if days >= 2 else f"{24 * days:.3g} hours"
  return [
    *rows,
    ("max rate", f"{_thousands(plan.epochs_per_day or 0.0)} epochs a day"),
    ("min total time", f"{total} in total ({plan.num_steps:,} steps)"),
  ]
