"""What an example of object detection or panoptic segmentation is, as every source gives it.

    image            bytes of an image file
    image_id         int, COCO's where there is one
    boxes_xyxy       float32 [n 4]: left, top, right, bottom in pixels; nothing is clipped yet
    labels           int32 [n]: class ids, COCO's own where the data is COCO's
    is_crowd         bool [n]: a group that nobody took apart
    area             float32 [n]: pixels of the object's outline
    object_ids       int64 [n]: of the annotation (of the segment); 0 in sources without such ids
    outlines         a list of n polygons or run lengths, as COCO's JSON has them; where there are
    segment_image    bytes of a PNG file whose colours are `object_ids`; panoptic data alone

`transforms.LoadObjects` makes arrays of the encoded ones, and checks all of them.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from faster_coco_eval.core import mask as run_lengths
from jaxtyping import Bool, Int

from vit_jax_zoo.data.base import CorruptExampleError, Example

VOID = -1
"""In a segment map: a pixel that belongs to no object."""


def objects_example(
  image: bytes, image_id: int, boxes_xyxy: Any, labels: Any, *, is_crowd: Any, area: Any, ids: Any
) -> Example:
  """Returns the example's arrays, of the types that the module's docstring promises.

  Args:
    image: the file.
    image_id: its number.
    boxes_xyxy: n boxes in pixels.
    labels: n class ids.
    is_crowd: n booleans.
    area: n numbers of pixels.
    ids: n numbers of annotations.
  """
  return {
    "image": image,
    "image_id": int(image_id),
    "boxes_xyxy": np.asarray(boxes_xyxy, np.float32).reshape(-1, 4),
    "labels": np.asarray(labels, np.int32).reshape(-1),
    "is_crowd": np.asarray(is_crowd, bool).reshape(-1),
    "area": np.asarray(area, np.float32).reshape(-1),
    "object_ids": np.asarray(ids, np.int64).reshape(-1),
  }


def decode_segments(png: bytes, object_ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, "h w"]:
  """Returns which of the objects each pixel belongs to: their position in `object_ids`, or `VOID`.

  Args:
    png: an image whose colour is the id, red + 256 green + 65536 blue, and 0 where there is none;
      or one of a single channel that holds the id.
    object_ids: different from each other.

  Raises:
    CorruptExampleError: it cannot be decoded.
  """
  pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) if png else None
  if pixels is None:
    raise CorruptExampleError(f"its segment image cannot be decoded ({len(png)} bytes)")
  ids = pixels.astype(np.int64)
  if ids.ndim == 3:
    ids = ids[..., 2] + 256 * ids[..., 1] + 65536 * ids[..., 0]
  if not len(object_ids):
    return np.full(ids.shape, VOID, np.int32)
  order = np.argsort(object_ids)
  place = np.searchsorted(object_ids, ids, sorter=order).clip(max=len(order) - 1)
  index = order[place]
  return np.where(object_ids[index] == ids, index, VOID).astype(np.int32)


def decode_outlines(
  outlines: Sequence[Any], height: int, width: int
) -> Bool[np.ndarray, "n {height} {width}"]:
  """Returns the pixels of each object.

  Args:
    outlines: for each a list of polygons, each a list x, y, x, y, ... in pixels; or COCO's run
      lengths, compressed or not, {"counts": ..., "size": [height, width]}.
    height: of the image.
    width: of the image.

  Raises:
    CorruptExampleError: an outline is neither, or of another size.
  """
  masks = np.zeros((len(outlines), height, width), bool)
  for mask, outline in zip(masks, outlines, strict=True):
    encoded = encode_outline(outline, height, width)
    if encoded is not None:
      mask[:] = run_lengths.decode(encoded)
  return masks


def encode_outline(outline: Any, height: int, width: int) -> dict[str, Any] | None:
  """Returns COCO's compressed run lengths of an outline; None for an empty one."""
  try:
    if isinstance(outline, dict):
      if tuple(outline["size"]) != (height, width):
        raise CorruptExampleError(
          f"an outline of {outline['size']} (height, width) is not the image's {height}x{width}"
        )
      counts = outline["counts"]
      if isinstance(counts, list):
        return _compress(outline, height, width)
      return {**outline, "counts": counts.encode() if isinstance(counts, str) else counts}
    polygons = [polygon for polygon in outline if len(polygon) >= 6]
    return run_lengths.merge(_compress(polygons, height, width)) if polygons else None
  except (KeyError, TypeError, RuntimeError) as error:
    raise CorruptExampleError(f"an outline cannot be read ({error})") from error


def _compress(outline: Any, height: int, width: int) -> Any:
  """Returns compressed run lengths: one for one, a list for a list of polygons."""
  return run_lengths.frPyObjects(outline, height, width)
