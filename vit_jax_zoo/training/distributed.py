"""Several processes, one run: how they find each other, and how they pool what they hold."""

import pickle
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

T = TypeVar("T")

_HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is dead, and the others stop: JAX's own 100
seconds are a long time of a pod's. Heartbeats are sent by a thread that Python cannot hold up."""


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins this process to the others of its run. Call it before anything else asks for devices.

  Cloud TPU pods, SLURM, Open MPI and Kubernetes JobSets are recognised by JAX itself; elsewhere
  all three arguments are needed. Where there is nothing to join, it does nothing. When one process
  dies, all others stop with an error inside a minute.

  Args:
    coordinator: "host:port" at which process 0 can be reached.
    num_processes: how many processes there are.
    process_id: which of them this one is, from 0.

  Raises:
    ValueError: only some of the arguments are given.
    RuntimeError: a cluster was recognised, but joining it failed.
  """
  given = (coordinator, num_processes, process_id)
  if any(value is None for value in given) and any(value is not None for value in given):
    raise ValueError(
      f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: "
      "give all three, or none of them where TPU pods, SLURM, Open MPI or Kubernetes say it"
    )
  try:
    jax.distributed.initialize(
      coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
  except ValueError as error:
    if coordinator is not None or "coordinator_address should be defined" not in str(error):
      raise RuntimeError(f"could not join the other processes: {error}") from error
    return
  logging.info("process %d of %d", jax.process_index(), jax.process_count())


def is_primary() -> bool:
  """Returns whether this is the one process that writes logs and pictures."""
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
    pickle.loads(row[:size].tobytes())  # our own processes wrote it a moment ago
    for row, size in zip(np.atleast_2d(gathered), sizes, strict=True)
  ]
