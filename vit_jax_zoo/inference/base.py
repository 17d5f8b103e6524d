"""The predictor protocol: from one image to the outputs of `vit_jax_zoo.predict`."""

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.errors import check_names
from vit_jax_zoo.registry import CORE, Option, systems
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


def list_options() -> list[Option]:
  """Returns the options of all predictors."""
  return [option for system in (CORE, *systems().values()) for option in system.options]


class Options(types.SimpleNamespace):
  """Values of `list_options` by name, those not given at their defaults; ValueError for others."""

  def __init__(self, **given: Any) -> None:
    defaults = {option.name: option.default for option in list_options()}
    check_names("option", given, defaults)
    super().__init__(**{**defaults, **given}, given=frozenset(given))


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

  reads: ClassVar[frozenset[str]]  # names of its options; `predict` raises an error for others

  def __init__(self, trained: Trained, options: Options) -> None:
    """Compiles nothing; the first image is slow."""

  def __call__(self, image: Image) -> Prediction:
    """Returns the prediction for an image."""
    ...
