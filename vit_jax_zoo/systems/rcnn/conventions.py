"""What implementations of R-CNN do differently: weights want what they were trained with."""

import dataclasses

from vit_jax_zoo.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class Convention:
  """The small print of a family of implementations.

  Attributes:
    anchors: see `ops.anchors.cell_anchors`.
    aligned: of RoIAlign, see `ops.roi_align`.
    inclusive_boxes: RoIAlign is handed boxes that end on their last pixel.
    inclusive_threshold: an overlap that equals NMS's threshold suppresses.
    least_side: pixels that clipping leaves of a box beside the image.
    least_proposal: smaller boxes are not proposed; in pixels.
    least_find: smaller boxes are not found; in pixels.
  """

  anchors: str
  aligned: bool
  inclusive_boxes: bool = False
  inclusive_threshold: bool = False
  least_side: int = 0
  least_proposal: float = 0.0
  least_find: float = 0.0

  @property
  def mask_paste(self) -> str:
    """How masks inside boxes are put back into images; see `ops.mask_paste`."""
    return "detectron" if self.inclusive_boxes else "exact"


CONVENTIONS = {
  # Girshick et al., 2018, and its heirs, the official code of FPT among them.
  "detectron": Convention(
    "detectron", aligned=False, inclusive_boxes=True, inclusive_threshold=True, least_side=1
  ),
  "torchvision": Convention("torchvision", aligned=False, least_proposal=1e-3, least_find=1e-2),
  "detectron2": Convention("detectron2", aligned=True),
}
"""By name."""


def find_convention(name: str) -> Convention:
  """Returns the convention of this name.

  Raises:
    ValueError: it is not known.
  """
  if name not in CONVENTIONS:
    raise ValueError(unknown_name("convention", name, CONVENTIONS))
  return CONVENTIONS[name]
