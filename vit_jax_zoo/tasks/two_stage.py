"""What a detector of two stages is asked for, and what goes from one stage to the other."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from vit_jax_zoo.ops.detection_conventions import Convention
from vit_jax_zoo.tasks import base


@runtime_checkable
class TwoStageModel(base.Model, Protocol):
  """A model with the methods `propose`, `classify` and (with masks) `segment`: `models.rcnn`."""

  @property
  def has_masks(self) -> bool:
    """Whether it gives masks."""
    ...

  @property
  def small_print(self) -> Convention:
    """How its implementation does what implementations do differently."""
    ...


class Targets(NamedTuple):
  """What is to be found in each image, padded."""

  boxes_xyxy: Float[Array, "b t 4"]  # pixels
  labels: Int[Array, "b t"]
  is_target: Bool[Array, "b t"]  # without crowds
  is_crowd: Bool[Array, "b t"]


class Rois(NamedTuple):
  """Boxes from which the second stage learns, foreground first."""

  boxes_xyxy: Float[Array, "b r 4"]
  target: Int[Array, "b r"]
  exists: Bool[Array, "b r"]
  foreground: Bool[Array, "b r"]
