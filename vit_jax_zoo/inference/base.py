"""What `python -m vit_jax_zoo.predict` needs of each task: the protocol of a predictor.

A predictor is made once, from a model that is ready, and called for each image of the user's. It
returns what is to be written and writes nothing itself. One file a task beside this one, one line
in `inference/__init__.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.tasks.base import Task, Variables

Image: TypeAlias = UInt8[np.ndarray, "h w 3"]
"""A user's picture, decoded: RGB, upright, any size."""

Picture: TypeAlias = Figure | np.ndarray
"""What is written as PNG: a figure, or pixels, uint8 [h w 3], or [h w]."""


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model that is ready, from a run of ours or from a published file.

  Attributes:
    source: what it was read from, for messages.
    task: with the model; `task.predict(variables, batch)` normalises images itself.
    variables: as numpy arrays: the best that the run has, averaged ones where there are any.
    prepare: a picture -> the example that an evaluation would have made of it: `image`, uint8 or
      float32 [h w 3] in [0, 255], unbatched, and what else the run's transforms add.
    image_size: height and width of the images that the model is for; None: any.
    model_name: as the registry or the file calls the model.
    config: a run's whole config, as JSON has it; empty for a published file.
  """

  source: str
  task: Task
  variables: Variables
  prepare: Callable[[Image], Mapping[str, Any]]
  image_size: tuple[int, int] | None
  model_name: str
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def model(self) -> Any:
    """The Linen module."""
    return getattr(self.task, "model")  # noqa: B009  (every task has one; the protocol does not say)


@dataclasses.dataclass(frozen=True)
class Options:
  """What a user may ask for beside the prediction; a predictor says which of them it reads.

  Attributes:
    top_k: how many classes are listed, None: 5; or among how many of the likeliest colours a
      completion draws each pixel, None: among all.
    threshold: the least score of what is shown.
    explain: also draw what the prediction rests on.
    reference: a picture to borrow textures from.
    tile: side of the largest part of a small picture that is enlarged at once, in its pixels; None:
      what usually fits.
    prefix_fraction: fraction of an image's rows that is given as the prompt of a completion.
    samples: completions of each image.
    temperature: of completions.
    seed: of whatever is drawn at random.
  """

  top_k: int | None = None
  threshold: float = 0.5
  explain: bool = False
  reference: Image | None = None
  tile: int | None = None
  prefix_fraction: float = 0.5
  samples: int = 6
  temperature: float = 1.0
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What came out of one image.

  Attributes:
    record: as JSON has it: str keys, lists, numbers, strings. `predict` adds the image's path.
    pictures: by a suffix of the file's name: "" is `<image>.png`, "attention" is
      `<image>_attention.png`.
    objects: where objects were looked for, each as COCO's files have annotations, but for the
      numbers of itself and its image, and with its class's `name`: `predict` writes `coco.json`.
    segments: the same of the segments in the picture "panoptic": `coco_panoptic.json`.
    model_pictures: what does not depend on the image, by name: "filters" is `model_filters.png`,
      written once.
  """

  record: dict[str, Any]
  pictures: Mapping[str, Picture]
  objects: Sequence[Mapping[str, Any]] | None = None
  segments: Sequence[Mapping[str, Any]] | None = None
  model_pictures: Mapping[str, Picture] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Predictor(Protocol):
  """Turns one picture into a prediction. `Predictor(trained, options)` makes it.

  Raises at once, from its constructor, ValueError of one line where the model cannot do what the
  options ask for.
  """

  reads: ClassVar[frozenset[str]]
  """The names of the options that it reads: `predict` refuses others, unless they are defaults."""

  def __init__(self, trained: Trained, options: Options) -> None:
    """Compiles nothing yet: the first image does."""
    ...

  def __call__(self, image: Image) -> Prediction:
    """Returns what the model makes of a picture."""
    ...
