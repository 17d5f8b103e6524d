"""The protocol between `peers.py` and the two sides of a comparison.

A side is a module with a function that takes a `Setting` and returns a `Side`. Ours comes first: it
leaves weights and inputs in the setting's folder, in a published form, and the peer reads them
there. So both compute the same; `answers` shows that they do.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

INPUTS, WEIGHTS = "inputs.npz", "weights"


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is compared.

  Attributes:
    folder: where weights and inputs lie.
    model: its name here.
    batch_size: images.
    image_size: side of the images; for `ttsr`, of the maps that are searched.
    dtype: "float32", or "bfloat16": the peer's is by autocast.
    pixels: how many of an image are drawn, where any are.
    forms: of the peer that are tried: "eager", "compiled".
    unroll: whether our layers are compiled one by one, as the peer's are; otherwise one of them is,
      and a loop runs it.
  """

  folder: str
  model: str
  batch_size: int
  image_size: int
  dtype: str = "float32"
  pixels: int = 32
  forms: tuple[str, ...] = ("eager", "compiled")
  unroll: bool = False

  @property
  def weights(self) -> str:
    """The folder or file that ours writes and the peer reads."""
    return str(pathlib.Path(self.folder) / WEIGHTS)

  def write_inputs(self, **arrays: np.ndarray) -> None:
    """Leaves arrays for the peer."""
    np.savez(pathlib.Path(self.folder) / INPUTS, **arrays)

  def inputs(self) -> dict[str, np.ndarray]:
    """Returns what ours has left."""
    return dict(np.load(pathlib.Path(self.folder) / INPUTS))


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the two.

  Attributes:
    runs: by name, each takes a number of steps and waits for the last. The peer's may come in
      several forms: "train, eager", "train, compiled" stand beside our "train".
    answers: what the two must agree on, computed before anything is trained.
    device: what it computes on, in words.
    skipped: why forms are missing, by name.
  """

  runs: Mapping[str, Callable[[int], object]]
  answers: Mapping[str, np.ndarray]
  device: str
  skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)


def job_of(run: str) -> str:
  """Returns what a run does, without the form in which it is done.

  >>> job_of("train, compiled")
  'train'
  """
  return run.partition(",")[0]
