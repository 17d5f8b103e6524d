"""Detection as set prediction, with masks (DETR, arXiv:2005.12872, Eq. 2 and section A.2)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.metrics.detection import DetectionEvaluator
from vit_jax_zoo.ops.boxes import cxcywh_to_xyxy
from vit_jax_zoo.ops.checks import check_fractions, check_not_negative, check_positive
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.detr import losses, panoptic
from vit_jax_zoo.systems.detr.figures import draw_query_attention, draw_segments
from vit_jax_zoo.systems.detr.matching import Matching, match
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import image_size, is_target, pixel_mask


@dataclasses.dataclass(frozen=True)
class Detection(base.Task):
  """Set prediction of objects: every decoder layer's predictions are matched to the targets.

  Batches: `image` [b h w 3], uint8 or floats in [0, 255], padded at the right and bottom;
  `image_size` int [b 2], height and width without the padding (no padding without this key);
  `boxes_cxcywh` float [b t 4], relative to the image without its padding; `labels` int [b t], class
  ids; `is_target` bool [b t], False in padding; for a model with a mask head `masks` bool
  [b t h w]; `mask` bool [b], False for padding rows. Evaluation also reads `original_size` int
  [b 2], height and width before the image was resized, and the keys of `DetectionEvaluator.add`.
  """

  name: ClassVar[str] = "detection"
  hub_task: ClassVar[str | None] = "object-detection"
  predicts_boxes: ClassVar[bool] = True

  model: Any  # a `Detr`, or a module with its call, `num_queries` and `mask_head`
  num_classes: int  # highest class id + 1, without "no object"; COCO's ids are unchanged: 91
  class_weight: float = 1.0  # of the class loss, and of the probability in the matching cost
  box_weight: float = 5.0  # of the L1 distance in loss and matching cost (A.4)
  giou_weight: float = 2.0  # of the generalised IoU in loss and matching cost (A.4)
  mask_weight: float = 1.0  # of the masks' focal loss
  dice_weight: float = 1.0  # of the masks' dice loss
  no_object_weight: float = 0.1  # of queries without a target in the class loss (3.1)
  auxiliary_losses: bool = True  # trains every decoder layer, not only the last (3.2)
  # Of `losses.dense_auxiliary_loss`, which needs the model's `dense_predictions`. Not in the paper;
  # the demo needs it to train a small model from random weights.
  dense_weight: float = 0.0
  # Steps of its linear decay to 0: it leads to duplicate detections. None: constant.
  dense_steps: int | None = None
  image_mean: float | tuple[float, ...] = IMAGENET_MEAN  # see `normalize_images`
  image_std: float | tuple[float, ...] = IMAGENET_STD
  class_names: tuple[str, ...] = ()  # by class id, for figures and per-class metrics
  score_threshold: float = 0.7  # minimum score of the detections in figures
  draw_attention: bool = False  # also draws the attention maps of the most confident queries
  per_class: bool = False  # also evaluates each class
  # First class id of stuff (91 in COCO): evaluation adds panoptic quality, which needs a mask head
  # and `segment_map` in the batch. None: masks are evaluated as instances.
  stuff_from: int | None = None
  segment_threshold: float = panoptic.SCORE_THRESHOLD  # minimum score of segments' queries
  # Pretrained ImageNet classifier of the backbone (torchvision's, timm's or Hugging Face's ResNet),
  # read if the run has no `init_from`.
  backbone_file: str | None = None

  def __post_init__(self) -> None:
    weights = [f.name for f in dataclasses.fields(self) if f.name.endswith("_weight")]
    check_positive(self, "num_classes", "dense_steps")
    check_not_negative(self, *weights)
    check_fractions(self, "score_threshold", "segment_threshold")
    if (names := len(self.class_names)) > self.num_classes:
      most = f"expected at most num_classes={self.num_classes}"
      raise ValueError(f"class_names: {names} are given; {most}")

  def check_data(self, info: Any) -> list[str]:
    count, queries = info.max_objects or 0, self.model.num_queries
    wrong = f"{info.name}: an image has {count} objects, and the model has {queries} queries"
    return [f"{wrong}; raise --config.model.num_queries"] if count > queries else []

  @property
  def best_metric(self) -> str:
    if self.stuff_from is not None:
      return "pq"
    return "mask_ap" if self.model.mask_head else "box_ap"

  @property
  def weight_files(self) -> Mapping[str, str]:
    return {"*/backbone": self.backbone_file} if self.backbone_file else {}

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    return self.model.init(rng, self._images(batch), pixel_mask(batch), train=False)

  def normalizers(self, batch: base.Batch) -> dict[str, Array]:
    """Returns the counts of examples and of boxes (at least 1), and the class loss's weight."""
    mask, queries = base.example_mask(batch), self.model.num_queries
    count = jnp.sum(is_target(batch), axis=1)
    matched = jnp.minimum(count, queries).astype(jnp.float32)  # for any matching
    weight = matched + self.no_object_weight * (queries - matched)
    return {
      "examples": jnp.sum(mask.astype(jnp.float32)),
      "boxes": jnp.maximum(jnp.sum(count).astype(jnp.float32), 1.0),
      "class_weight": jnp.sum(jnp.where(mask, weight, 0.0)),
    }

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns these examples' part of the step's set loss.

    The class loss is a weighted mean over all queries of the step, the others are divided by its
    number of boxes, over all devices and micro-batches (the official code averages per-device class
    losses). A label out of range makes the loss NaN, which stops the run.

    Metrics: "loss" and its unweighted terms "class_loss", "box_loss", "giou_loss", "mask_loss",
    "dice_loss" of the last layer, "class_loss_0" ... of the others, "dense_loss"; "class_error",
    the fraction of matched queries with a wrong class; "cardinality_error", the difference of the
    numbers of predicted and of true objects.
    """
    state = {name: tree for name, tree in variables.items() if name != "params"}
    inputs, rngs = (self._images(batch), pixel_mask(batch)), {"dropout": context.rng}
    apply = functools.partial(self.model.apply, train=True, rngs=rngs, mutable=list(state))
    outputs, changed = apply(variables, *inputs)
    mask = base.example_mask(batch)
    terms, matching = self._set_losses(outputs, batch, context.normalizers)
    if "mask_logits" in outputs:
      terms |= self._mask_losses(outputs, batch, matching, context.normalizers["boxes"])
    count = context.normalizers["examples"]
    if self.dense_weight:
      weights = self._matching_weights
      sums = losses.dense_auxiliary_loss(outputs, batch, weights, self.no_object_weight)
      terms["dense_loss"] = jnp.sum(jnp.where(mask, sums, 0.0)) / count
    loss = sum(self._weight(name, context.step) * value for name, value in terms.items())
    labels = jnp.asarray(batch["labels"])
    unknown = jnp.any(is_target(batch) & ((labels < 0) | (labels >= self.num_classes)))
    loss = jnp.where(unknown, jnp.nan, loss)
    examples = jnp.sum(mask.astype(jnp.float32))
    # Scaled so that the means of micro-batches add up to the step's loss.
    means = {k: base.Mean(x * count, examples) for k, x in ({"loss": loss} | terms).items()}
    metrics = means | self._error_metrics(outputs, batch, matching)
    return base.LossOutput(loss=loss, metrics=metrics, model_state={**state, **changed})

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns the most probable class and the box of every query.

    `scores` float32 [b q], probability of the best class without "no object"; `labels` int32 [b q],
    its id; `is_object` bool [b q], whether it exceeds "no object"; `boxes_xyxy` float32 [b q 4], in
    pixels of the original image if the batch has `original_size`, else of the unpadded one; with a
    mask head `mask_logits` float32 [b q i j], of the padded image; with `draw_attention`
    `attention` float32 [b q i j], of the last decoder layer, mean over heads.
    """
    inputs = self._images(batch), pixel_mask(batch)
    mutable = ["intermediates"] if self.draw_attention else []
    outputs, sown = self.model.apply(variables, *inputs, train=False, mutable=mutable)
    probabilities = jax.nn.softmax(self._logits(outputs), axis=-1)
    scores = jnp.max(probabilities[..., :-1], axis=-1)
    size = jnp.asarray(batch.get("original_size", image_size(batch)), jnp.float32)
    scale = jnp.tile(size[:, None, ::-1], (1, 1, 2))
    predictions = {
      "scores": scores,
      "labels": jnp.argmax(probabilities[..., :-1], axis=-1).astype(jnp.int32),
      "is_object": scores > probabilities[..., -1],
      "boxes_xyxy": cxcywh_to_xyxy(outputs["boxes_cxcywh"]) * scale,
      **{key: x for key, x in outputs.items() if key == "mask_logits"},
    }
    if self.draw_attention:
      predictions["attention"] = last_attention(sown["intermediates"])
    return predictions

  def padding_invariant(self) -> "Detection":
    return dataclasses.replace(self, model=self.model.clone(masked_backbone=True))

  @property
  def padding_dependent(self) -> str:
    return "mask_logits (by the mask head's group norms)" if self.model.mask_head else ""

  def evaluator(self) -> DetectionEvaluator:
    if self.stuff_from is not None and not self.model.mask_head:
      raise ValueError("stuff_from: panoptic quality needs masks; set model.mask_head=True")
    fields: dict[str, Any] = {"class_names": self.class_names, "per_class": self.per_class}
    if self.stuff_from is None:
      kind = panoptic.QueryMaskEvaluator if self.model.mask_head else DetectionEvaluator
      return kind(self.num_classes, **fields)
    fields |= {"stuff_from": self.stuff_from, "score_threshold": self.segment_threshold}
    return panoptic.PanopticEvaluator(self.num_classes, **fields)

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    return {"batch": draw.draw_targets(batch, self.class_names)}

  def figures(self, batch: base.Batch, predictions: base.Predictions) -> dict[str, Figure]:
    drawn, threshold = (batch, predictions, self.class_names), self.score_threshold
    figures = {"predictions": draw.draw_predictions(*drawn, threshold=threshold)}
    if self.draw_attention:
      figures["attention"] = draw_query_attention(*drawn, threshold=threshold)
    if self.stuff_from is not None:
      rows, limits = draw.real_rows(batch)[:4], (self.stuff_from, self.segment_threshold)
      truths = [panoptic.true_segments(batch, row) for row in rows]
      found = [panoptic.found_segments(batch, predictions, row, *limits) for row in rows]
      images = [draw.image_of(batch, row) for row in rows]
      figures["segments"] = draw_segments(truths, found, images, self.class_names)
    return figures

  @property
  def _matching_weights(self) -> tuple[float, float, float]:
    return self.class_weight, self.box_weight, self.giou_weight

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)

  def _logits(self, outputs: Mapping[str, Any]) -> Float[Array, "b q k"]:
    logits = outputs["logits"]
    if logits.shape[-1] != self.num_classes + 1:
      wrong = f"num_classes: {logits.shape[-1] - 1} in the model, {self.num_classes} in the task"
      raise ValueError(f"{wrong}; expected the highest class id + 1 in both")
    return logits.astype(jnp.float32)

  def _set_losses(
    self, outputs: Mapping[str, Any], batch: base.Batch, normalizers: Mapping[str, Array]
  ) -> tuple[dict[str, Array], Matching]:
    """Returns the unweighted terms of every decoder layer, and the last layer's matching."""
    logits, boxes = self._logits(outputs)[:, None], outputs["boxes_cxcywh"][:, None]
    if self.auxiliary_losses:
      earlier = outputs["auxiliary_logits"], outputs["auxiliary_boxes_cxcywh"]
      logits = jnp.concatenate([jnp.moveaxis(earlier[0], 1, 0), logits], axis=1)
      boxes = jnp.concatenate([jnp.moveaxis(earlier[1], 1, 0), boxes], axis=1)
    labels, targets, real = (
      jnp.broadcast_to(x[:, None], (len(x), logits.shape[1], *x.shape[1:]))
      for x in (jnp.asarray(batch["labels"]), losses.target_boxes(batch), is_target(batch))
    )
    cost = losses.matching_cost(logits, boxes, labels, targets, self._matching_weights)
    matching = match(cost, real)
    of_query = matching.target_of_query
    class_loss, _ = losses.class_losses(logits, labels, of_query, self.no_object_weight)
    class_loss = jnp.where(base.example_mask(batch)[:, None, None], class_loss, 0.0)
    distance, overlap = losses.box_losses(boxes, targets, of_query)
    sums = {
      "class_loss": jnp.sum(class_loss, axis=(0, 2)) / normalizers["class_weight"],
      "box_loss": jnp.sum(distance, axis=(0, 2)) / normalizers["boxes"],
      "giou_loss": jnp.sum(overlap, axis=(0, 2)) / normalizers["boxes"],
    }
    terms = {name: values[-1] for name, values in sums.items()}
    for layer in range(logits.shape[1] - 1):
      terms |= {f"{name}_{layer}": values[layer] for name, values in sums.items()}
    return terms, Matching(of_query[:, -1], matching.query_of_target[:, -1])

  def _mask_losses(
    self, outputs: Mapping[str, Any], batch: base.Batch, matching: Matching, boxes: Array
  ) -> dict[str, Array]:
    if "masks" not in batch:
      fix = "Set masks=True in load_objects, or model.mask_head=False"
      raise ValueError(f"masks: missing in the batch; expected them for the mask head. {fix}")
    masks = jnp.asarray(batch["masks"]).astype(bool)
    focal, dice = losses.mask_losses(outputs["mask_logits"], masks, matching.query_of_target)
    return {"mask_loss": jnp.sum(focal) / boxes, "dice_loss": jnp.sum(dice) / boxes}

  def _weight(self, term: str, step: Int[Array, ""]) -> float | Float[Array, ""]:
    weight = getattr(self, term.split("_loss")[0] + "_weight")
    if term == "dense_loss" and self.dense_steps is not None:
      return weight * jnp.maximum(0.0, 1.0 - step / self.dense_steps)
    return weight

  def _error_metrics(
    self, outputs: Mapping[str, Any], batch: base.Batch, matching: Matching
  ) -> dict[str, base.Mean]:
    best = jnp.argmax(self._logits(outputs), axis=-1).astype(jnp.int32)
    matched = matching.target_of_query >= 0
    labels = losses.take_targets(jnp.asarray(batch["labels"]), matching.target_of_query)
    predicted = jnp.sum(best != self.num_classes, axis=1)
    difference = jnp.abs(predicted - jnp.sum(is_target(batch), axis=1))
    return {
      "class_error": base.Mean.of((best != labels).astype(jnp.float32), matched),
      "cardinality_error": base.Mean.of(difference.astype(jnp.float32), base.example_mask(batch)),
    }


def last_attention(intermediates: Mapping[str, Any]) -> Float[Array, "b q i j"]:
  """Returns the cross-attention of a `Detr`'s last decoder layer from its intermediates."""
  layers = intermediates["transformer"]
  if "decoder" in layers:
    weights = layers["decoder"]["cross_attention"]["weights"][0][-1]
  else:
    last = max(int(name.removeprefix("decoder_")) for name in layers if name.startswith("decoder_"))
    weights = layers[f"decoder_{last}"]["cross_attention"]["weights"][0]
  size = intermediates["memory"][0].shape[1:3]
  return jnp.mean(weights, axis=1).reshape(weights.shape[0], weights.shape[2], *size)
