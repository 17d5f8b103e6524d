"""COCO's average precision of instance masks and boxes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from faster_coco_eval.core import mask as run_lengths
from jaxtyping import Bool

from vit_jax_zoo.metrics.detection import DetectionEvaluator, Image
from vit_jax_zoo.ops.mask_paste import paste_masks

_NAMES = ("mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small", "mask_ap_medium", "mask_ap_large")


@dataclasses.dataclass(eq=False)
class InstanceEvaluator(DetectionEvaluator):
  """Adds "mask_ap", "mask_ap50", "mask_ap75" and those by size to the box scores.

  True masks are `run_lengths` uint8 [b l] (see `load_objects`), `segment_map` [b h w] of the
  original image (target index of each pixel), or `masks` bool [b t h w] of the original size.
  Predictions: `box_masks` [b q m m], see `ops.mask_paste`, with `is_object` [b q], False for
  padding; or `mask_logits` [b q i j] of the padded image, one per query.
  """

  scores = (*_NAMES, *DetectionEvaluator.scores)

  paste_convention: str = "exact"  # of `box_masks`, see `ops.mask_paste`
  masks_below: int | None = None  # scores only masks of smaller class ids (things)

  def _image(self, batch: Mapping[str, Any], predictions: Mapping[str, Any], row: int) -> Image:
    image = super()._image(batch, predictions, row)
    truth = _true_masks(batch, row, image.size)
    if "mask_logits" in predictions:
      masks = original_masks(batch, predictions, row, image.size)
      found = [encode_masks(mask[None])[0] for mask in masks]
    else:
      found = self._pasted(predictions, row, image.size)
    return dataclasses.replace(image, true_masks=truth, found_masks=found)

  def _pasted(self, predictions: Mapping[str, Any], row: int, size: tuple[int, int]) -> list[Any]:
    real = np.asarray(predictions["is_object"][row], bool)
    masks, boxes = (
      np.asarray(predictions[key][row], np.float64)[real] for key in ("box_masks", "boxes_xyxy")
    )
    found = iter(encode_masks(paste_masks(masks, boxes, size, convention=self.paste_convention)))
    empty = encode_masks(np.zeros((1, *size), bool))[0]
    return [next(found) if is_object else empty for is_object in real]

  def result(self) -> dict[str, float]:
    scores = super().result()
    stop = self.num_classes if self.masks_below is None else self.masks_below
    masks = dict(zip(_NAMES, map(float, self._evaluate("segm", range(stop)).stats), strict=False))
    return {k: v for k, v in masks.items() if v >= 0} | scores


def original_masks(
  batch: Mapping[str, Any], predictions: Mapping[str, Any], row: int, size: tuple[int, int]
) -> Iterator[Bool[np.ndarray, "h w"]]:
  """Yields each query's mask in the original image's pixels, resized as in the official code.

  Bilinear to the padded image, thresholded at one half, cropped, then nearest neighbour with the
  index rounded down. `mask_logits` is [b q i j], `row` the example, `size` the original image's.
  """
  padded = batch["image"].shape[1:3]
  inner = batch["image_size"][row] if "image_size" in batch else padded
  rows, columns = (
    np.floor(np.arange(after, dtype=np.float32) * np.float32(int(before) / after)).astype(int)
    for before, after in zip(inner, size, strict=True)
  )
  for logits in np.asarray(predictions["mask_logits"][row], np.float32):
    large = cv2.resize(logits, (padded[1], padded[0]), interpolation=cv2.INTER_LINEAR)
    yield (large > 0)[np.minimum(rows, inner[0] - 1)][:, np.minimum(columns, inner[1] - 1)]


def _true_masks(batch: Mapping[str, Any], row: int, size: tuple[int, int]) -> list[dict[str, Any]]:
  real = np.asarray(batch["is_target"][row], bool)
  if "run_lengths" in batch:
    lines = np.asarray(batch["run_lengths"][row], np.uint8).tobytes().rstrip(b"\0").split(b"\n")
    counts = [line for line in lines if line]
    if len(counts) != real.sum():
      remedy = "drop no targets after load_objects in evaluation"
      raise ValueError(f"run_lengths: {len(counts)} masks for {real.sum()} objects; {remedy}")
    return [{"size": list(size), "counts": line.decode()} for line in counts]
  if "segment_map" in batch:
    segments = np.asarray(batch["segment_map"][row])[: size[0], : size[1]]
    return [encode_masks((segments == number)[None])[0] for number in np.flatnonzero(real)]
  if "masks" not in batch:
    raise ValueError("masks: missing in the batch; set run_lengths of load_objects")
  height, width = np.asarray(batch.get("image_size", [batch["image"].shape[1:3]] * (row + 1))[row])
  if (height, width) != size:
    problem = f"masks: {height}x{width} for an image of {size[0]}x{size[1]}"
    raise ValueError(f"{problem}; expected the same size. Set run_lengths of load_objects")
  return encode_masks(np.asarray(batch["masks"][row], bool)[real][:, :height, :width])


def encode_masks(masks: Bool[np.ndarray, "n h w"]) -> list[dict[str, Any]]:
  """Returns COCO's compressed run lengths of each mask: `size`, `counts` as text."""
  if not len(masks):
    return []
  encoded = run_lengths.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
  return [{"size": m["size"], "counts": m["counts"].decode()} for m in encoded]
