"""Compiles a config's training step for a machine: memory, FLOPs, traffic, lower bound on time."""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from vit_jax_zoo import trainer
from vit_jax_zoo.data import fake_data as stand_in
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.planning import hlo
from vit_jax_zoo.planning.activations import activation_bytes
from vit_jax_zoo.planning.hardware import Chip, Machine
from vit_jax_zoo.planning.roofline import Roofline, roofline
from vit_jax_zoo.training.compiled_steps import Program

SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device.

  Attributes:
    params: parameters.
    optimizer: optimizer state.
    other_state: moving averages, batch statistics and the like.
    batch: this device's part.
    activations: residuals for the backward pass before XLA's fusion. Part of `temporary`.
    temporary: live within a step only, activations and gradients included; None if it does not fit.
    code: the program.
    peak: maximum in use; of a step that does not fit, what the compiler would need.
    limit: the device's memory, None if unknown.
  """

  params: float
  optimizer: float
  other_state: float
  batch: float
  activations: float
  temporary: float | None
  code: float | None
  peak: float | None
  limit: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
  """Cost of a config's training step on a machine. All figures are per device and step.

  Attributes:
    config: name of the config.
    overrides: further fields.
    machine: name of the machine.
    device_kind: JAX's name of the devices.
    num_devices: number of devices in the mesh.
    mesh: devices along each axis.
    remat: remat policy, for models that have one.
    batch_size: global batch size.
    accumulation_steps: number of micro-batches.
    num_steps: length of the run.
    num_examples: number of examples per epoch.
    batch_shapes: fraction of steps and image shape; the largest is compiled.
    fits: whether it compiles with a peak below the device's memory.
    memory: bytes.
    flops: floating-point operations.
    memory_bytes: main-memory traffic; None if it did not compile, like the following.
    network_bytes: traffic to other devices, by kind of collective.
    compile_seconds: wall time of the compilation.
    compile_cpu_seconds: CPU time of the compilation.
    optimization_level: XLA optimization level, such as O1; None: XLA's default.
    roofline: lower bounds in seconds; None if the chip is unknown.
    step_seconds: lower bound of the mean step time over all batch shapes.
    epochs_per_day: upper bound, from `step_seconds`.
    days: lower bound of the whole run, from `step_seconds`.
    notes: assumptions of this plan.
    jax_version: version of JAX that compiled it.
    date: date of compilation.
  """

  config: str
  overrides: list[str]
  machine: str
  device_kind: str
  num_devices: int
  mesh: dict[str, int]
  remat: str | None
  batch_size: int
  accumulation_steps: int
  num_steps: int
  num_examples: int
  batch_shapes: list[tuple[float, tuple[int, ...]]]
  fits: bool
  memory: Memory
  flops: float
  memory_bytes: float | None = None
  network_bytes: dict[str, float] | None = None
  compile_seconds: float | None = None
  compile_cpu_seconds: float | None = None
  optimization_level: str | None = None
  roofline: Roofline | None = None
  step_seconds: float | None = None
  epochs_per_day: float | None = None
  days: float | None = None
  notes: list[str] = dataclasses.field(default_factory=list)
  jax_version: str = jax.__version__
  date: str = ""

  def as_json(self) -> dict[str, Any]:
    """Returns nested dicts, lists and numbers."""
    found = dataclasses.asdict(self)
    if self.roofline is not None:
      found["roofline"] |= {"step": self.roofline.step, "bound": self.roofline.bound}
    return found


def make_plan(
  config: ConfigDict,
  machine: Machine,
  *,
  name: str,
  overrides: list[str] | None = None,
  compile_step: bool = True,
) -> Plan:
  """Compiles the training step of a config for a machine.

  Args:
    config: complete.
    machine: devices to compile for.
    name: name of the config.
    overrides: the user's overrides, stored in the plan.
    compile_step: False skips everything that needs the compiler.

  Raises:
    ValueError: one line, about an invalid config.
  """
  parts = trainer.build(config, machine.devices, stand_in.load)
  kinds = parts.batch_shapes()
  largest = max((batch for _, batch in kinds), key=_size)
  program = parts.program(largest)
  with jax.set_mesh(parts.mesh):
    arguments = (program.abstract_state, program.abstract_batch)
    flops = count_flops(program.train_step, *arguments) / len(machine.devices)
    memory = _memory(program, machine, parts.config.accumulation_steps)
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
    batch_shapes=[(share, _image_shape(batch)) for share, batch in kinds],
    fits=False,
    memory=memory,
    flops=flops,
    optimization_level=optimization_level(),
    notes=_notes(parts, kinds),
    date=time.strftime("%Y-%m-%d"),
  )
  if not compile_step:
    return plan
  mean_size = sum(share * _size(batch) for share, batch in kinds) / _size(largest)
  return _compiled(plan, program, machine, mean_size)


def _compiled(plan: Plan, program: Program, machine: Machine, mean_size: float) -> Plan:
  """Returns the plan with the compiler's figures."""
  start, cpu_start = time.perf_counter(), time.process_time()
  with jax.set_mesh(program.mesh):
    lowered = program.train_step.lower(program.abstract_state, program.abstract_batch)
  try:
    compiled, text = compile_text(lowered)
  except jax.errors.JaxRuntimeError as error:
    if error.error_code_string != "RESOURCE_EXHAUSTED":
      raise RuntimeError(f"{machine.name} cannot compile {plan.config}: {error}") from None
    memory = dataclasses.replace(plan.memory, peak=needed_memory(str(error), plan.memory))
    return dataclasses.replace(plan, memory=memory)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
  analysis, moved = compiled.memory_analysis(), hlo.traffic(text)
  peak = _peak(analysis)
  memory = dataclasses.replace(
    plan.memory,
    temporary=float(analysis.temp_size_in_bytes),
    code=float(analysis.generated_code_size_in_bytes),
    peak=peak,
  )
  plan = dataclasses.replace(
    plan,
    fits=machine.memory is None or peak <= machine.memory,
    memory=memory,
    memory_bytes=moved.memory_bytes,
    network_bytes=moved.collective_bytes,
    compile_seconds=seconds,
    compile_cpu_seconds=cpu,
    notes=plan.notes + _loop_notes(moved),
  )
  return plan if machine.chip is None else _timed(plan, machine.chip, moved, mean_size)


def _timed(plan: Plan, chip: Chip, moved: hlo.Traffic, mean_size: float) -> Plan:
  """Returns the plan with the lower bounds on time."""
  least = roofline(
    chip,
    flops=plan.flops,
    memory_bytes=moved.memory_bytes,
    network_bytes=sum(moved.collective_bytes.values()),
  )
  step = least.step * mean_size
  return dataclasses.replace(
    plan,
    roofline=least,
    step_seconds=step,
    epochs_per_day=SECONDS_PER_DAY / step * plan.batch_size / plan.num_examples,
    days=plan.num_steps * step / SECONDS_PER_DAY,
  )


def optimization_level() -> str | None:
  """Returns the XLA optimization level set in JAX, such as O1; None: XLA's default."""
  level = getattr(jax.config, "jax_optimization_level", "UNKNOWN")
  return None if level == "UNKNOWN" else level


def compile_text(lowered: Any) -> tuple[Any, str]:
  """Compiles a lowered program; returns it, and its optimised HLO text.

  jaxlib cannot always print libtpu's programs, so XLA dumps them to files, of which the largest is
  the program.

  Raises:
    jax.errors.JaxRuntimeError: it does not compile.
  """
  with _without_cache(), tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
    files = pathlib.Path(folder).glob("*after_optimizations.txt")
    return compiled, max(files, key=lambda file: file.stat().st_size).read_text()


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """Disables JAX's compilation cache.

  Cached programs have no compile time, and those for absent devices cannot be loaded.
  """
  enabled = getattr(jax.config, "jax_enable_compilation_cache", True)
  try:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting only once
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def needed_memory(message: str, memory: Memory) -> float | None:
  """Returns the bytes that a step would need; None if XLA's message lacks them.

  Args:
    message: XLA's error for a program that does not fit, with the total or the temporaries.
    memory: sizes of the step's arguments.
  """
  total = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", message)
  if total:
    return _in_bytes(*total.groups())
  temporary = re.search(r"required for HLO temporaries \(([\d.]+)([KMG])\)", message)
  if temporary is None:
    return None
  given = memory.params + memory.optimizer + memory.other_state + memory.batch
  return given + _in_bytes(*temporary.groups())


def _in_bytes(number: str, unit: str) -> float:
  return float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]


def _memory(program: Program, machine: Machine, accumulation_steps: int) -> Memory:
  state = program.abstract_state
  known = {
    "params": state.params, "optimizer": state.opt_state,
    "other_state": (state.ema, state.model_state, state.step, state.rng),
    "batch": program.abstract_batch,
  }  # fmt: skip
  sizes = {name: device_bytes(tree) for name, tree in known.items()}
  kept = activation_bytes(program, accumulation_steps)
  return Memory(
    **sizes, activations=kept, temporary=None, code=None, peak=None, limit=machine.memory
  )


def device_bytes(tree: Any) -> float:
  """Returns the bytes per device of a tree of shapes with shardings."""
  return float(
    sum(
      np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=float) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
    )
  )


def _peak(analysis: Any) -> float:
  """Returns the bytes in use at once: arguments, results not aliased with them, temporaries."""
  results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  held = analysis.argument_size_in_bytes + results + analysis.temp_size_in_bytes
  return float(held + analysis.generated_code_size_in_bytes)


def _notes(parts: trainer.Experiment, kinds: list[tuple[float, Any]]) -> list[str]:
  notes = [parts.train_source.assumption] if parts.train_source.assumption else []
  if level := optimization_level():
    notes.append(
      f"the run also sets JAX_OPTIMIZATION_LEVEL={level}; at XLA's default level, compilation is "
      "slower, the program moves fewer bytes, and its memory may be larger or smaller"
    )
  if len(kinds) > 1:
    notes.append(
      f"the largest of {len(kinds)} batch shapes is compiled; the time of the others is in "
      "proportion to their pixels"
    )
  return notes


def _loop_notes(moved: hlo.Traffic) -> list[str]:
  if not moved.loops_of_unknown_length:
    return []
  return [
    f"{moved.loops_of_unknown_length} loop(s) with a data-dependent length count as one iteration"
  ]


def _size(batch: Mapping[str, np.ndarray]) -> int:
  return max(value.size for value in batch.values())


def _image_shape(batch: Mapping[str, np.ndarray]) -> tuple[int, ...]:
  """Returns the shape of the largest array of an example."""
  largest = batch["image"] if "image" in batch else max(batch.values(), key=lambda v: v.size)
  return tuple(int(side) for side in largest.shape[1:])
