"""Mesh search: data, FSDP and model parallelism with the first remat policy that fits."""

import copy
import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from vit_jax_zoo.config import complete
from vit_jax_zoo.nn.transformer import REMAT_POLICIES
from vit_jax_zoo.planning.hardware import Machine
from vit_jax_zoo.planning.plan import Plan, make_plan
from vit_jax_zoo.training.sharding import ShardingRuleError


def search(config: ConfigDict, machine: Machine, *, name: str) -> Iterator[Plan]:
  """Yields plans as they are made: for each mesh the first remat policy that fits.

  Later policies trade compute for memory and would be slower. Meshes that cannot split the batch or
  the model's layers are skipped.

  Raises:
    ValueError: one line, about a config that is invalid on every mesh.
  """
  for sizes in meshes(config, len(machine.devices)):
    for remat in remat_policies(config):
      candidate = copy.deepcopy(complete(config))
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
  """Returns the meshes to try, the config's own first; none twice, none that splits no batch.

  >>> meshes(ConfigDict({"batch_size": 4}), 8)
  [{'data': 4, 'fsdp': 1, 'model': 2}, {'data': 1, 'fsdp': 4, 'model': 2}, \
{'data': 2, 'fsdp': 1, 'model': 4}, {'data': 1, 'fsdp': 2, 'model': 4}]
  """
  own = dict(complete(config).sharding.mesh)
  rest = num_devices // math.prod(size for size in own.values() if size != -1)
  tried = [{axis: rest if size == -1 else size for axis, size in own.items()}]
  for model in (1, 2, 4):
    ways = num_devices // model
    tried += [{"data": d, "fsdp": ways // d, "model": model} for d in (ways, 1) if ways]
  parts = config.get("accumulation_steps") or 1
  found = []
  for sizes in tried:
    ways = sizes["data"] * sizes["fsdp"]
    fits = ways * sizes["model"] == num_devices and config.batch_size % (ways * parts) == 0
    if fits and sizes not in found:
      found.append(sizes)
  return found


def remat_policies(config: ConfigDict) -> list[str | None]:
  """Returns the remat policies to try; [None] for models without the field."""
  return list(REMAT_POLICIES) if config.model.get("remat") is not None else [None]


def best(plans: list[Plan]) -> Plan | None:
  """Returns the fastest plan that fits; of equal ones, that with most free memory."""
  fitting = [plan for plan in plans if plan.fits]
  return min(fitting, key=lambda p: (p.step_seconds or 0.0, p.memory.peak), default=None)
