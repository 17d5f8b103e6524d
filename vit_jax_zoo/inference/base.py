"""The predictor protocol: from one image to the outputs of `vit_jax_zoo.predict`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.tasks.base import Task, Variables

Image: TypeAlias = UInt8[np.ndarray, "h w 3"]  # A user's picture, decoded: RGB, upright, any size

Picture: TypeAlias = Figure | np.ndarray  # written as PNG; pixels are uint8 [h w 3], or [h w]


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained model, from a run or a published file."""

  source: str  # its path or name, for error messages
  task: Task  # with the model; `task.predict(variables, batch)` normalises images
  variables: Variables  # numpy arrays of the best checkpoint, averaged where the run has averages
  # To a preprocessed, unbatched example: `image` [h w 3] in [0, 255], and what transforms add.
  prepare: Callable[[Image], Mapping[str, Any]]
  image_size: tuple[int, int] | None  # height and width of the model's images; None: any
  model_name: str  # as the registry or the file names the model
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # a run's, as JSON

  @property
  def model(self) -> Any:
    """The Linen module."""
    return getattr(self.task, "model")  # noqa: B009  (a field of every task, not of the protocol)


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of prediction; each predictor declares which of them it uses."""

  top_k: int | None = None  # classes to list, None: 5; or colours to sample from, None: all
  threshold: float = 0.5  # minimum score
  explain: bool = False  # also draw attention maps
  reference: Image | None = None  # reference image for super-resolution
  tile: int | None = None  # in pixels of the low-resolution image; None: what usually fits
  prefix_fraction: float = 0.5  # of an image's rows, given as the prompt of a completion
  samples: int = 6  # completions per image
  temperature: float = 1.0  # of completions
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Prediction for one image."""

  record: dict[str, Any]  # JSON values by name; `predict` adds the image's path
  pictures: Mapping[str, Picture]  # by suffix: "" is `<image>.png`, "x" is `<image>_x.png`
  objects: Sequence[Mapping[str, Any]] | None = None  # COCO annotations without ids, with `name`
  segments: Sequence[Mapping[str, Any]] | None = None  # the same, of the picture "panoptic"
  # Independent of the image: "filters" is `model_filters.png`, written once.
  model_pictures: Mapping[str, Picture] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Predictor(Protocol):
  """Maps an image to a prediction; its creation raises ValueError for invalid options."""

  reads: ClassVar[frozenset[str]]  # supported options; `predict` raises an error for others

  def __init__(self, trained: Trained, options: Options) -> None:
    """Compiles nothing; the first image is slow."""

  def __call__(self, image: Image) -> Prediction:
    """Returns the prediction for an image."""
    ...
