"""Runs of several processes: initialisation, gathering of objects, check of equal settings."""

import os
import pickle
import socket
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

T = TypeVar("T")

_HEARTBEAT_SECONDS = 30  # without one, a process counts as dead and the others exit; JAX: 100


def initialize(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
  """Connects the processes of a run. Call it before JAX initialises its devices.

  JAX detects Cloud TPU pods, SLURM, Open MPI and Kubernetes JobSets; elsewhere all arguments are
  needed (`coordinator` is "host:port" of process 0), or none for a single process. ValueError for
  other arguments, OSError if the port is taken, RuntimeError if processes cannot be connected.
  """
  given = (coordinator, num_processes, process_id)
  if any(value is None for value in given) and any(value is not None for value in given):
    raise ValueError(
      f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: "
      "expected all three, or none on TPU pods, SLURM, Open MPI and Kubernetes"
    )
  # JAX has no public function for this: outside of a cluster, jax.distributed.initialize() raises
  # the ValueError of incomplete settings, or RuntimeError if devices are initialised already.
  variable = "JAX_COORDINATOR_ADDRESS"
  kinds = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
  in_cluster = any(k.is_env_present() for k in kinds)
  if not (coordinator or os.environ.get(variable) or in_cluster):
    return
  name = "--coordinator" if coordinator else variable if variable in os.environ else "coordinator"
  settings = ClusterEnv.auto_detect_unset_distributed_params(
    coordinator or os.environ.get(variable), num_processes, process_id, None, None, 300
  )
  if settings[0] is not None:
    _check_port(name, settings[0], is_own=settings[2] == 0)
  try:
    jax.distributed.initialize(*settings[:3], heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
  except ValueError as error:
    raise RuntimeError(f"could not connect to the other processes: {error}") from error
  logging.info("process %d of %d", jax.process_index(), jax.process_count())


def _check_port(name: str, coordinator: str, *, is_own: bool) -> None:
  port = coordinator.rpartition(":")[2]
  if ":" not in coordinator or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(f"{name}={coordinator}: expected host:port, such as 10.0.0.2:8476")
  if not is_own:
    return
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:  # JAX's server listens on all addresses; on a taken port it crashes
    socket.create_server(("", int(port)), family=family, dualstack_ipv6=dual).close()
  except OSError as error:
    problem = f"port {port} cannot be opened ({error.strerror}); give all processes another"
    raise OSError(f"{name}={coordinator}: {problem}") from None


def is_primary() -> bool:
  """Returns whether this is process 0, which writes logs and figures."""
  return jax.process_index() == 0


def all_gather_objects(value: T) -> list[T]:
  """Returns every process's `value`, in process order, on every process. Pickles it."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.array([data.size], np.int32)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: data.size] = data
  gathered = multihost_utils.process_allgather(padded)
  return [
    pickle.loads(row[:size].tobytes())  # trusted: from processes of this run
    for row, size in zip(np.atleast_2d(gathered), sizes, strict=True)
  ]


def check_equal(settings: Callable[[], Mapping[str, Any]]) -> None:
  """Raises ValueError, on all processes, if `settings()`, by name, differ between them."""
  if jax.process_count() == 1:
    return
  first, *others = all_gather_objects(dict(settings()))
  for index, other in enumerate(others, start=1):
    for name in (*first, *other):
      if first.get(name) != other.get(name):
        raise ValueError(
          f"{name}: {first.get(name)} on process 0, {other.get(name)} on process {index}; "
          "start all processes with the same command, code, data and weight files"
        )


def check_equal_arrays(variables: Mapping[str, Any]) -> None:
  """Raises ValueError, on all processes, if arrays differ; those sharded over processes may."""
  flat = traverse_util.flatten_dict(dict(variables), sep="/")
  whole = [(k, x) for k, x in flat.items() if getattr(x, "is_fully_replicated", True)]
  check_equal(lambda: {f"checksum of {k}": zlib.crc32(np.asarray(x).tobytes()) for k, x in whole})
