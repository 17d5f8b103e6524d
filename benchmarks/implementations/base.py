"""Protocol between `peers.py` and the implementations that it compares.

An implementation is a module with a function that takes a `Setting` and returns an
`Implementation`. This package's runs first and writes weights, in a published format, and inputs to
the setting's folder; the peer reads them. Equal `outputs` show that both compute the same.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

INPUTS, WEIGHTS = "inputs.npz", "weights"


@dataclasses.dataclass(frozen=True)
class Setting:
  """Settings of a comparison."""

  folder: str  # of the weights and inputs
  model: str  # model name in this package
  batch_size: int
  image_size: int  # side of the images in pixels; for `ttsr`, of the feature maps
  dtype: str = "float32"  # or "bfloat16" (the peer uses autocast)
  pixels: int = 32  # number of pixels to sample, for generative models
  modes: tuple[str, ...] = ("eager", "compiled")  # of the peer
  unroll: bool = False  # unroll this package's layers, as the peer does, instead of scanning them

  @property
  def weights(self) -> str:
    """Folder or file of the weights."""
    return str(pathlib.Path(self.folder) / WEIGHTS)

  def write_inputs(self, **arrays: np.ndarray) -> None:
    """Saves the inputs for the peer."""
    np.savez(pathlib.Path(self.folder) / INPUTS, **arrays)

  def inputs(self) -> dict[str, np.ndarray]:
    """Loads the inputs."""
    return dict(np.load(pathlib.Path(self.folder) / INPUTS))


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One side of a comparison.

  A peer has several modes of a job: its "train, eager" and "train, compiled" are compared with this
  package's "train".
  """

  runs: Mapping[str, Callable[[int], object]]  # by name; runs n steps and waits for the last
  outputs: Mapping[str, np.ndarray]  # must agree; computed before training
  device: str  # description
  skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)  # missing mode -> reason


def job_of(run: str) -> str:
  """Returns the job of a run, without its mode.

  >>> job_of("train, compiled")
  'train'
  """
  return run.partition(",")[0]
