"""Semantic segmentation: the task, and its scores from the confusion matrix of all pixels."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from matplotlib.figure import Figure

from vit_jax_zoo.constants import IMAGENET_MEAN, IMAGENET_STD
from vit_jax_zoo.errors import name_of
from vit_jax_zoo.metrics.base import Evaluator, check_labels, real_rows
from vit_jax_zoo.ops.checks import check_not_negative
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.fpt import figures as draw
from vit_jax_zoo.systems.fpt.figures import IGNORE
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import Batch, LossContext, LossOutput, Variables, pixel_mask


@dataclasses.dataclass(frozen=True)
class SemanticSegmentation(base.Task):
  """Classification of every pixel, with cross-entropy loss.

  Batches: `image` [b h w 3], uint8 or floats in [0, 255], padded at the right and bottom;
  `image_size` int [b 2], height and width without padding (optional); `label_map` int [b h w],
  class ids, 255 for ignored pixels and padding; `mask` bool [b], False for padding examples.
  """

  name: ClassVar[str] = "semantic_segmentation"
  hub_task: ClassVar[str | None] = "image-segmentation"
  keeps_aspect_ratio: ClassVar[bool] = True

  model: base.Model  # called as `model(images, train=...)`, see `transformer.PyramidSegmenter`
  num_classes: int
  auxiliary_weight: float = 0.4  # weight of the auxiliary classifier's loss
  class_weights: tuple[float, ...] = ()  # of each class's pixels in the mean loss; empty: equal
  image_mean: float | tuple[float, ...] = IMAGENET_MEAN  # see `normalize_images`
  image_std: float | tuple[float, ...] = IMAGENET_STD
  class_names: tuple[str, ...] = ()  # names by class id, for figures and per-class scores
  per_class: bool = False  # also evaluates each class
  # pretrained ImageNet classifier for the backbone, used without `init_from`: a workdir, or a file
  # with a ResNet, see `weights.backbones`
  backbone_file: str | None = None

  def __post_init__(self) -> None:
    if not 1 <= self.num_classes <= IGNORE:
      raise ValueError(f"num_classes: {self.num_classes}; expected 1 to {IGNORE}")
    check_not_negative(self, "auxiliary_weight")
    given, most = self.class_weights, self.num_classes
    if given and len(given) != most:
      raise ValueError(f"class_weights: {len(given)} numbers; expected num_classes={most}")
    if any(weight < 0 for weight in given) or not any(given or (1,)):
      raise ValueError(f"class_weights: {given}; expected no negative number, and not only zeros")
    if (names := len(self.class_names)) > most:
      raise ValueError(f"class_names: {names} names; expected at most num_classes={most}")

  @property
  def best_metric(self) -> str:
    return "miou"

  @property
  def weight_files(self) -> Mapping[str, str]:
    return {"*/backbone": self.backbone_file} if self.backbone_file else {}

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    return self.model.init(rng, self._images(batch), train=False)

  def normalizers(self, batch: Batch) -> dict[str, Array]:
    """Returns the number of examples and the sum of the pixel weights (1 if it is 0)."""
    pixels = jnp.sum(self._pixel_weights(batch))
    return {**super().normalizers(batch), "pixels": jnp.where(pixels > 0, pixels, 1.0)}

  def loss(self, variables: Variables, batch: Batch, context: LossContext) -> LossOutput:
    """Returns these images' part of the mean cross-entropy over the step's labelled pixels.

    The mean is weighted by `class_weights`. Metrics: "loss", "auxiliary_loss" (unweighted),
    "pixel_accuracy". An unknown label makes the loss NaN, which stops the run.
    """
    state = {name: tree for name, tree in variables.items() if name != "params"}
    outputs, changed = self.model.apply(
      variables, self._images(batch), train=True, rngs={"dropout": context.rng}, mutable=list(state)
    )
    labels, labelled = jnp.asarray(batch["label_map"]).astype(jnp.int32), self._is_labelled(batch)
    weights = self._pixel_weights(batch)

    def losses(logits: Float[Array, "b h w k"]) -> Float[Array, "b h w"]:
      known = jnp.clip(labels, 0, self.num_classes - 1)
      each = optax.softmax_cross_entropy_with_integer_labels(logits, known)
      return jnp.where(labelled, each, 0.0)

    logits = self._upsample(outputs["logits"], batch)
    total = losses(logits)
    correct = (jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels).astype(jnp.float32)
    metrics = {"pixel_accuracy": base.Mean.of(correct, labelled)}
    if "auxiliary_logits" in outputs:
      auxiliary = losses(self._upsample(outputs["auxiliary_logits"], batch))
      metrics["auxiliary_loss"] = base.Mean.of(auxiliary, weights)
      total = total + self.auxiliary_weight * auxiliary
    unknown = jnp.any(labelled & ((labels < 0) | (labels >= self.num_classes)))
    total = jnp.where(unknown, jnp.nan, total)
    metrics["loss"] = base.Mean.of(total, weights)
    loss = jnp.sum(total * weights) / context.normalizers["pixels"]
    return LossOutput(loss=loss, metrics=metrics, model_state={**state, **changed})

  def predict(self, variables: Variables, batch: Batch) -> base.Predictions:
    """Returns each pixel's class `label_map`, int32 [b h w], and `confidence`, float32 [b h w]."""
    outputs = self.model.apply(variables, self._images(batch), train=False)
    logits = self._upsample(outputs["logits"], batch)
    best = jnp.max(logits, axis=-1)
    confidence = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)
    return {"label_map": jnp.argmax(logits, axis=-1).astype(jnp.int32), "confidence": confidence}

  def explain(self, variables: Variables, batch: Batch) -> dict[str, Any]:
    if getattr(self.model, "neck", None) != "fpt":
      raise ValueError("a model without transformer has no attention maps")
    apply = functools.partial(self.model.apply, train=False, mutable=["intermediates"])

    def run(first: Batch) -> Mapping[str, Any]:
      return apply(variables, self._images(first))[1]["intermediates"]["transformer"]

    return draw.explain_attention(run, batch)

  def draw_explanation(self, explanation: Any) -> base.Explained:
    names = getattr(self.model, "level_names", ())
    return base.Explained({"levels": draw.draw_attention(explanation, names)}, {})

  def evaluator(self) -> "SegmentationEvaluator":
    return SegmentationEvaluator(self.num_classes, self.class_names, self.per_class)

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    return {"batch": draw.draw_label_maps(batch, self.class_names)}

  def figures(self, batch: Batch, predictions: base.Predictions) -> dict[str, Figure]:
    drawn = draw.draw_label_maps(batch, self.class_names, predictions["label_map"])
    return {"predictions": drawn}

  def _images(self, batch: Batch) -> Float[Array, "b h w c"]:
    images = normalize_images(jnp.asarray(batch["image"]), self.image_mean, self.image_std)
    return jnp.where(pixel_mask(batch)[..., None], images, 0.0)

  def _is_labelled(self, batch: Batch) -> Bool[Array, "b h w"]:
    labels = jnp.asarray(batch["label_map"])
    return (labels != IGNORE) & base.example_mask(batch)[:, None, None]

  def _pixel_weights(self, batch: Batch) -> Float[Array, "b h w"]:
    labelled = self._is_labelled(batch).astype(jnp.float32)
    weights = jnp.asarray(self.class_weights or (1.0,), jnp.float32)
    return labelled * jnp.take(weights, jnp.asarray(batch["label_map"]), mode="clip")

  def _upsample(self, logits: Float[Array, "b i j k"], batch: Batch) -> Array:
    # Resizing to the image's size would distort maps whose sides were rounded up.
    if logits.shape[-1] != self.num_classes:
      wrong = f"num_classes: {logits.shape[-1]} in the model, {self.num_classes} in the task"
      raise ValueError(f"{wrong}; expected the same in both")
    height, width = batch["image"].shape[1:3]
    rows, columns = logits.shape[1:3]
    stride = 1 << (max(-(-height // rows), -(-width // columns)) - 1).bit_length()
    shape = (len(logits), stride * rows, stride * columns, self.num_classes)
    large = jax.image.resize(logits.astype(jnp.float32), shape, "bilinear", antialias=False)
    return large[:, :height, :width]


@dataclasses.dataclass(eq=False)
class SegmentationEvaluator(Evaluator):
  """Scores from the confusion matrix of all pixels of a split.

  Scores, in [0, 1]: "miou", the mean over classes of TP / (TP + FP + FN) (Everingham et al., 2015;
  Cityscapes and ADE20K); "pixel_accuracy"; "mean_accuracy", over classes that occur; with
  `per_class` also "iou/<class>"; "images". Classes that neither occur nor are predicted do not
  count; predicted ones that do not occur have IoU 0.
  """

  scores = ("miou", "pixel_accuracy", "mean_accuracy", "images", "iou")

  num_classes: int
  class_names: Sequence[str] = ()  # by label; default: the labels
  per_class: bool = False
  images: int = dataclasses.field(default=0, init=False)

  def __post_init__(self) -> None:
    self.confusion = np.zeros((self.num_classes, self.num_classes), np.int64)

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    """Adds one batch; ValueError for maps of different sizes, or an unknown label."""
    truths, found = np.asarray(batch["label_map"]), np.asarray(predictions["label_map"])
    if truths.shape != found.shape:
      raise ValueError(f"label_map: {truths.shape} in the batch, {found.shape} predicted")
    sizes = np.asarray(batch.get("image_size", [truths.shape[1:]] * len(truths)))
    advice = f"0 to {self.num_classes - 1}, or {IGNORE} for ignored pixels. Check num_classes, "
    advice += "and offset and ignore of load_label_map"
    for row in real_rows(batch, len(truths)):
      height, width = sizes[row]
      counts = truths[row, :height, :width] != IGNORE
      true, predicted = (x[row, :height, :width][counts].astype(np.int64) for x in (truths, found))
      check_labels("label_map: true label", true, self.num_classes, advice)
      check_labels("label_map: predicted label", predicted, self.num_classes, advice)
      pairs = np.bincount(self.num_classes * true + predicted, minlength=self.confusion.size)
      self.confusion += pairs.reshape(self.confusion.shape)
      self.images += 1

  def merge(self, other: Any) -> None:
    self.confusion += other.confusion
    self.images += other.images

  def result(self) -> dict[str, float]:
    if not (total := self.confusion.sum()):
      problem = f"label_map: no labelled pixel in {self.images} images"
      raise ValueError(f"{problem}; all are {IGNORE}, the ignored label")
    right, true = np.diagonal(self.confusion), self.confusion.sum(axis=1)
    union = true + self.confusion.sum(axis=0) - right
    iou = right / np.maximum(union, 1)
    scores = {
      "miou": float(iou[union > 0].mean()),
      "pixel_accuracy": float(right.sum() / total),
      "mean_accuracy": float((right[true > 0] / true[true > 0]).mean()),
      "images": float(self.images),
    }
    if self.per_class:
      for label in np.flatnonzero(union > 0):
        scores[f"iou/{name_of(label, self.class_names)}"] = float(iou[label])
    return scores
