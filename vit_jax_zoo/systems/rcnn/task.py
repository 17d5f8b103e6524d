"""Instance detection in two stages: boxes are proposed, then named, corrected, and filled in.

Ren et al., arXiv:1506.01497; He et al., arXiv:1703.06870. The first stage learns from a sample of
its anchors, the second from a sample of what the first proposes, in the same step; no gradient goes
through the choice.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.figures import detection as draw
from vit_jax_zoo.metrics.detection import DetectionEvaluator
from vit_jax_zoo.metrics.mask_ap import InstanceEvaluator
from vit_jax_zoo.ops.boxes import cxcywh_to_xyxy, pairwise_iou
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.ops.sharding import on_own_examples
from vit_jax_zoo.systems.detr.task import image_size
from vit_jax_zoo.systems.fpt.attention_figures import (
  draw_looks,
  explain_looks,
  first_targets,
  padded,
)
from vit_jax_zoo.systems.rcnn import losses
from vit_jax_zoo.systems.rcnn.anchors import Weights, encode_boxes, inside_images
from vit_jax_zoo.systems.rcnn.assign_and_sample import (
  assign_anchors,
  assign_proposals,
  sample_boxes,
)
from vit_jax_zoo.systems.rcnn.conventions import Convention
from vit_jax_zoo.systems.rcnn.figures import draw_masks
from vit_jax_zoo.systems.rcnn.proposals import DetectionLimits, choose_detections
from vit_jax_zoo.systems.rcnn.roi_align import crop_masks
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


@dataclasses.dataclass(frozen=True)
class InstanceDetection(base.Task):
  """Learns to find objects, and their masks where the model has a head for them.

  Batches are those of `tasks.detection.Detection`: `image`, `image_size`, `boxes_cxcywh`, `labels`,
  `is_target`, optionally `is_crowd`, and `masks` for a model with a mask head; and what
  evaluation reads. Nothing is learned in crowds, and proposals inside them are no background.

  The defaults are those of the official code of FPT (Detectron's, but for `box_beta`).

  Attributes:
    model: see `models.rcnn.RCNN`.
    num_classes: highest class id + 1.
    anchor_samples: anchors of each image from which the first stage learns.
    anchor_foreground: the largest share of them on objects.
    anchor_high: least IoU of anchors on objects.
    anchor_low: IoU below which anchors are background.
    inside_only: anchors that cross the image's border do not take part.
    anchor_beta: where the loss of the first stage's boxes turns linear.
    roi_samples: proposals of each image from which the second stage learns.
    roi_foreground: the largest share of them on objects.
    roi_threshold: least IoU of proposals on objects.
    box_weights: see `ops.box_coding`; of the second stage.
    box_beta: as `anchor_beta`, for the second stage.
    least_score, nms_threshold, max_detections, max_candidates: `ops.proposals.DetectionLimits`.
    image_mean, image_std: see `normalize_images`.
    class_names: by class id; for pictures and scores of single classes.
    score_threshold: pictures show what is at least as sure.
    per_class: evaluations score each class, too.
    backbone_file: what the model's backbone starts from, where the run has no `init_from`: a ResNet
      of torchvision's, timm's, Hugging Face's or Caffe's, a LambdaResNet of timm's, or the workdir
      of a classifier of ours; see `weights.backbones`.
    neck_file: what its neck starts from: a state dict of the official FPT's, or a workdir.
  """

  name: ClassVar[str] = "instance_detection"
  keeps_aspect_ratio: ClassVar[bool] = True

  model: TwoStageModel
  num_classes: int
  anchor_samples: int = 256
  anchor_foreground: float = 0.5
  anchor_high: float = 0.7
  anchor_low: float = 0.3
  inside_only: bool = True
  anchor_beta: float = 1 / 9
  roi_samples: int = 512
  roi_foreground: float = 0.25
  roi_threshold: float = 0.5
  box_weights: Weights = (10.0, 10.0, 5.0, 5.0)
  box_beta: float = 1 / 3
  least_score: float = 0.05
  nms_threshold: float = 0.5
  max_detections: int = 100
  max_candidates: int = 2000
  image_mean: float | tuple[float, ...] = IMAGENET_MEAN
  image_std: float | tuple[float, ...] = IMAGENET_STD
  class_names: tuple[str, ...] = ()
  score_threshold: float = 0.7
  per_class: bool = False
  backbone_file: str | None = None
  neck_file: str | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name in _SHARES and not 0 <= value <= 1:
        raise ValueError(f"{field.name} must lie in [0, 1], but is {value}")
      if field.name in _COUNTS and value < 1:
        raise ValueError(f"{field.name} must be positive, not {value}")
      if field.name.endswith("_beta") and value < 0:
        raise ValueError(f"{field.name} must not be negative, but is {value}")

  @property
  def best_metric(self) -> str:
    """COCO's average precision of boxes."""
    return "box_ap"

  @property
  def weight_files(self) -> Mapping[str, str]:
    """Those of backbone and neck, if they are to start from files."""
    files = {"*/backbone": self.backbone_file, "*/neck": self.neck_file}
    return {part: file for part, file in files.items() if file}

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    """Returns the model's fresh variables for images of this batch's shape."""
    return self.model.init(rng, self._images(batch), image_size(batch), train=False)

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the losses of both stages.

    Those of the first are divided by `anchor_samples` and the step's number of images, as the
    official code has it. Those of the second are means over the sampled proposals (of masks: over
    those on objects), whose number only the first stage knows: over those of all devices, but of
    micro-batches each by itself, weighted by their numbers of images.

    Metrics: "loss" and its parts "objectness_loss", "anchor_box_loss", "class_loss", "box_loss",
    "mask_loss"; "class_accuracy" of the sampled proposals; "proposal_recall", the share of objects
    that some proposal overlaps by half. A label that is no class makes the loss NaN.
    """
    state = {name: tree for name, tree in variables.items() if name != "params"}
    dropout, anchor_rng, roi_rng = jax.random.split(context.rng, 3)

    def run(method: str, *args: Any) -> Any:
      nonlocal state
      outputs, changed = self.model.apply(
        {"params": variables["params"], **state},
        *args,
        train=True,
        rngs={"dropout": jax.random.fold_in(dropout, len(method))},
        mutable=list(state),
        method=method,
      )
      state = {**state, **changed}
      return outputs

    found = run("propose", self._images(batch), image_size(batch))
    targets, mask = self._targets(batch), base.example_mask(batch)
    rois = self._sampled_proposals(found, targets, mask, roi_rng)
    logits, deltas = run("classify", found.pyramid, rois.boxes_xyxy)
    share = jnp.sum(mask.astype(jnp.float32)) / context.normalizers["examples"]
    terms = self._anchor_losses(found, targets, batch, anchor_rng, context.normalizers)
    terms |= self._box_losses(logits, deltas, rois, targets, share)
    if self.model.has_masks:
      most = max(round(self.roi_samples * self.roi_foreground), 1)
      first = Rois(*(x[:, :most] for x in rois))
      mask_logits = run("segment", found.pyramid, first.boxes_xyxy)
      terms["mask_loss"] = share * self._mask_loss(mask_logits, first, targets, batch)
    loss = sum(terms.values())
    unknown = targets.is_target & ((targets.labels < 0) | (targets.labels >= self.num_classes))
    loss = jnp.where(jnp.any(unknown), jnp.nan, loss)
    examples = jnp.sum(mask.astype(jnp.float32))
    metrics = {
      name: base.Mean(total=value * context.normalizers["examples"], count=examples)
      for name, value in ({"loss": loss} | terms).items()
    }
    labels = self._roi_labels(rois, targets)
    right = (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
    metrics["class_accuracy"] = base.Mean.of(right, rois.exists)
    metrics["proposal_recall"] = _recall(found, targets)
    return base.LossOutput(loss=loss, metrics=metrics, model_state=state)

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns what is found, the surest first, padded.

    Returns:
      `scores` float32 [b q], 0 in the padding; `labels` int32 [b q]; `is_object` bool [b q], False
      in the padding; `boxes_xyxy` float32 [b q 4], in pixels of the original image where the batch
      has its `original_size`, else of the image as it is given; with a mask head `box_masks`
      float32 [b q m m], probabilities inside each box, see `ops.mask_paste`.
    """
    size = image_size(batch)
    found = self.model.apply(variables, self._images(batch), size, method="propose")
    logits, deltas = self.model.apply(variables, found.pyramid, found.boxes_xyxy, method="classify")
    detect = functools.partial(
      choose_detections,
      limits=DetectionLimits(
        self.least_score,
        self.nms_threshold,
        self.max_detections,
        self.max_candidates,
        self.box_weights,
      ),
      convention=self.model.small_print,
    )
    boxes, scores, labels, exists = on_own_examples(
      jax.vmap(detect), logits, deltas, found.boxes_xyxy, found.exists, size
    )
    scale = jnp.asarray(batch.get("original_size", size), jnp.float32) / size
    predictions = {
      "scores": scores,
      "labels": labels,
      "is_object": exists,
      "boxes_xyxy": boxes * jnp.tile(scale[:, None, ::-1], (1, 1, 2)),
    }
    if self.model.has_masks:
      masks = self.model.apply(variables, found.pyramid, boxes, method="segment")
      predictions["box_masks"] = jax.nn.sigmoid(losses.mask_of_class(masks, labels))
    return predictions

  def explain(self, variables: base.Variables, batch: base.Batch) -> dict[str, Any]:
    """Returns where a feature pyramid transformer's levels look from the images' first targets.

    Raises:
      ValueError: see `pyramid_looks.explain_looks`.
    """
    propose = functools.partial(self.model.apply, method="propose", mutable=["intermediates"])

    def run(first: base.Batch) -> Mapping[str, Any]:
      _, seen = propose(variables, self._images(first), image_size(first))
      return seen["intermediates"]["neck"]

    batch = padded(batch, getattr(self.model, "size_multiple", 1))
    return explain_looks(self.model, run, batch, first_targets(batch))

  def draw_explanation(self, explanation: Any) -> base.Explained:
    """Draws where the levels look."""
    return base.Explained({"levels": draw_looks(explanation, self.model)}, {})

  def evaluator(self) -> DetectionEvaluator:
    """Returns an empty evaluator: COCO's scores of boxes, and of masks where there are any."""
    fields = {"class_names": self.class_names, "per_class": self.per_class}
    if not self.model.has_masks:
      return DetectionEvaluator(self.num_classes, **fields)
    convention = self.model.small_print.mask_paste
    return InstanceEvaluator(self.num_classes, paste_convention=convention, **fields)

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws training images with their boxes."""
    return {"batch": draw.draw_targets(batch, self.class_names)}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws what was found beside the truth."""
    if not np.asarray(batch.get("mask", True)).any():
      return {}
    fields = {"class_names": self.class_names, "threshold": self.score_threshold}
    figures = {"predictions": draw.draw_predictions(batch, predictions, **fields)}
    if "box_masks" in predictions and "masks" in batch:
      figures["masks"] = draw_masks(batch, predictions, **fields)
    return figures

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)

  def _targets(self, batch: base.Batch) -> Targets:
    """Returns the targets in pixels, harmless boxes in the padding, whatever it holds."""
    real = jnp.asarray(batch["is_target"]).astype(bool) & base.example_mask(batch)[:, None]
    crowd = real & jnp.asarray(batch.get("is_crowd", jnp.zeros_like(real))).astype(bool)
    size = image_size(batch).astype(jnp.float32)
    scale = jnp.tile(size[:, None, ::-1], (1, 1, 2))
    boxes = cxcywh_to_xyxy(jnp.asarray(batch["boxes_cxcywh"], jnp.float32)) * scale
    boxes = jnp.where(real[..., None], boxes, 0.0)
    return Targets(boxes, jnp.asarray(batch["labels"]), real & ~crowd, crowd)

  def _anchor_losses(
    self,
    found: Any,
    targets: Targets,
    batch: base.Batch,
    rng: jax.Array,
    normalizers: Mapping[str, Array],
  ) -> dict[str, Array]:
    def one_image(
      rng: Array, logits: Array, deltas: Array, target: Array, real: Array, valid: Array
    ) -> tuple[Array, Array]:
      assigned = assign_anchors(
        found.anchors_xyxy, target, real, valid=valid, high=self.anchor_high, low=self.anchor_low
      )
      sample = sample_boxes(rng, assigned, self.anchor_samples, self.anchor_foreground)
      anchors = found.anchors_xyxy[sample.index]
      labels = sample.foreground.astype(jnp.float32)
      objectness = optax.sigmoid_binary_cross_entropy(logits[sample.index], labels)
      wanted = encode_boxes(losses.rows(target, assigned.target[sample.index]), anchors)
      distance = losses.smooth_l1(deltas[sample.index] - wanted, self.anchor_beta)
      return (
        jnp.sum(jnp.where(sample.exists, objectness, 0)),
        jnp.sum(jnp.where(sample.foreground, distance, 0)),
      )

    mask, size = base.example_mask(batch), image_size(batch)
    valid = jnp.broadcast_to(mask[:, None], (len(mask), len(found.anchors_xyxy)))
    if self.inside_only:
      valid &= inside_images(found.anchors_xyxy, size)
    keys = jax.random.split(rng, len(mask))
    objectness, distance = jax.vmap(one_image)(
      keys, found.objectness, found.deltas, targets.boxes_xyxy, targets.is_target, valid
    )
    count = self.anchor_samples * normalizers["examples"]
    return {
      "objectness_loss": jnp.sum(objectness) / count,
      "anchor_box_loss": jnp.sum(distance) / count,
    }

  def _sampled_proposals(
    self, found: Any, targets: Targets, mask: Bool[Array, " b"], rng: jax.Array
  ) -> Rois:
    """Draws from the proposals and the targets themselves, which are among them from the start."""

    def one_image(rng: Array, boxes: Array, exists: Array, targets: Targets) -> tuple[Array, ...]:
      assigned = assign_proposals(
        boxes,
        targets.boxes_xyxy,
        targets.is_target,
        valid=exists,
        threshold=self.roi_threshold,
        is_crowd=targets.is_crowd,
      )
      sample = sample_boxes(rng, assigned, self.roi_samples, self.roi_foreground)
      chosen = jnp.where(sample.exists[:, None], boxes[sample.index], 0)
      return chosen, assigned.target[sample.index], sample.exists, sample.foreground

    boxes = jnp.concatenate([found.boxes_xyxy, targets.boxes_xyxy], axis=1)
    exists = jnp.concatenate([found.exists & mask[:, None], targets.is_target], axis=1)
    keys = jax.random.split(rng, len(mask))
    return Rois(*jax.vmap(one_image)(keys, boxes, exists, targets))

  def _roi_labels(self, rois: Rois, targets: Targets) -> Int[Array, "b r"]:
    labels = jax.vmap(losses.rows)(targets.labels, rois.target)
    return jnp.where(rois.foreground, labels, self.num_classes)

  def _box_losses(
    self,
    logits: Float[Array, "b r k"],
    deltas: Float[Array, "b r k 4"],
    rois: Rois,
    targets: Targets,
    share: Float[Array, ""],
  ) -> dict[str, Array]:
    if logits.shape[-1] != self.num_classes + 1:
      raise ValueError(
        f"the model has {logits.shape[-1] - 1} classes beside the background, but the task has "
        f"{self.num_classes}; give both the same num_classes (highest class id + 1)"
      )
    labels = self._roi_labels(rois, targets)
    of_class = losses.class_loss(logits, labels)
    boxes = jax.vmap(losses.rows)(targets.boxes_xyxy, rois.target)
    wanted = encode_boxes(boxes, rois.boxes_xyxy, self.box_weights)
    distance = losses.smooth_l1(losses.of_class(deltas, labels) - wanted, self.box_beta)
    count = jnp.maximum(jnp.sum(rois.exists.astype(jnp.float32)), 1) / share
    return {
      "class_loss": jnp.sum(jnp.where(rois.exists, of_class, 0)) / count,
      "box_loss": jnp.sum(jnp.where(rois.foreground, distance, 0)) / count,
    }

  def _mask_loss(
    self,
    logits: Float[Array, "b r m m k"],
    rois: Rois,
    targets: Targets,
    batch: base.Batch,
  ) -> Float[Array, ""]:
    """Returns the mean over the boxes on objects."""
    if "masks" not in batch:
      raise ValueError(
        "the model has a mask head, but the batch has no 'masks'; load them with the data, or use "
        "a model without a mask head"
      )
    masks = jnp.asarray(batch["masks"]).astype(bool)
    if not masks.shape[1]:
      return jnp.zeros(())
    crop = functools.partial(crop_masks, size=logits.shape[2])
    wanted = jax.vmap(crop)(masks, rois.target, rois.boxes_xyxy)
    loss = losses.mask_loss(losses.mask_of_class(logits, self._roi_labels(rois, targets)), wanted)
    count = jnp.maximum(jnp.sum(rois.foreground.astype(jnp.float32)), 1)
    return jnp.sum(jnp.where(rois.foreground, loss, 0)) / count


_SHARES = (
  "anchor_foreground", "anchor_high", "anchor_low", "roi_foreground", "roi_threshold",
  "least_score", "nms_threshold", "score_threshold",
)  # fmt: skip
_COUNTS = ("num_classes", "anchor_samples", "roi_samples", "max_detections", "max_candidates")


def _recall(found: Any, targets: Targets) -> base.Mean:
  overlap = pairwise_iou(targets.boxes_xyxy, found.boxes_xyxy)
  covered = jnp.any((overlap >= 0.5) & found.exists[:, None], axis=2)
  return base.Mean.of(covered.astype(jnp.float32), targets.is_target)
