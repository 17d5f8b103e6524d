"""What is said of checkpoints that cannot be read, written or used: one line, and what to do.

Orbax and TensorStore say what happened to a byte range of some file; people want to know which
checkpoint it is, and how to go on.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from vit_jax_zoo.train import full_disk

_MAX_LISTED = 8
_LONGEST_REASON = 160

_DAMAGE = re.compile("NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT")
"""How TensorStore begins where a file is missing, cut or full of noise; others may pass."""

_DETAILS = re.compile(r" \[\w+='|\. See full TensorStore details")
"""What follows is of use to those who know TensorStore's code."""


@contextlib.contextmanager
def reading(checkpoint: epath.Path, advice: Callable[[], str]) -> Iterator[None]:
  """Says of damage that it is there, and what to do.

  Args:
    checkpoint: the directory that is read; named by its step, where it is one of a run.
    advice: ends the message: how to go on without this checkpoint.

  Raises:
    ValueError: in place of whatever is raised where a file is missing, cut or full of noise.
  """
  try:
    yield
  except Exception as error:
    # Orbax wraps what happened to one array in an Exception of no class, with pages of details.
    cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
    if not _is_damage(cause):
      raise
    step = f" of step {checkpoint.name}" if checkpoint.name.isdigit() else ""
    raise ValueError(
      f"the checkpoint{step} in {checkpoint} is damaged ({_end_of(cause, checkpoint)}); {advice()}"
    ) from None


def _is_damage(error: BaseException) -> bool:
  known = FileNotFoundError | KeyError | EOFError | UnicodeDecodeError
  if isinstance(error, known) or type(error) is Exception:
    return True
  return isinstance(error, ValueError) and (
    type(error).__name__ == "JSONDecodeError" or bool(_DAMAGE.match(str(error)))
  )


def _end_of(error: BaseException, checkpoint: epath.Path) -> str:
  """Returns the end of a message whose parts lead from the whole to the cause, each after ": "."""
  text = " ".join(str(error).replace(f"{checkpoint}/", "").split())
  text = _DETAILS.split(text)[0]
  parts = text.split(": ")
  while len(parts) > 1 and len(": ".join(parts)) > _LONGEST_REASON:
    del parts[0]
  return ": ".join(parts)[:_LONGEST_REASON].rstrip(".")


@contextlib.contextmanager
def writing(workdir: epath.Path, complete: Callable[[], int | None]) -> Iterator[None]:
  """Says of a full disk that it is full, and what to do.

  Args:
    workdir: the run's directory.
    complete: returns the step of the newest complete checkpoint, None if there is none.

  Raises:
    OSError: in place of whatever is raised where there is no place left.
  """

  def advice() -> str:
    step = complete()
    last = "none is complete yet" if step is None else f"that of step {step} is complete"
    return f"{last}: make room, and give the same command again"

  with full_disk.explained(f"a checkpoint cannot be written to {workdir}", advice):
    yield


def differences(
  wanted: Mapping[str, Any], saved: Mapping[str, Any], *, with_dtype: bool
) -> Iterator[str]:
  """Yields how arrays that a program wants differ from a checkpoint's, both by path."""
  for key, leaf in wanted.items():
    if key not in saved:
      yield f"{key} is not in the checkpoint"
    elif tuple(leaf.shape) != tuple(saved[key].shape):
      yield f"{key} has shape {tuple(leaf.shape)} here and {tuple(saved[key].shape)} there"
    elif with_dtype and leaf.dtype != saved[key].dtype:
      yield f"{key} is {leaf.dtype} here and {np.dtype(saved[key].dtype)} there"


def unused(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[str]:
  """Yields which arrays a checkpoint has that nobody wants."""
  return (f"{key} is only in the checkpoint" for key in saved if key not in wanted)


def raise_if_any(problems: Sequence[str], what: str) -> None:
  """Raises ValueError with the first of the problems, if there is one; logs all."""
  if problems:
    logging.error("%s:\n%s", what, "\n".join(problems))
    more = len(problems) - _MAX_LISTED
    listed = "; ".join(problems[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
    raise ValueError(f"{what}: {listed}")
