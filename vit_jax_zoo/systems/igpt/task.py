"""Autoregressive and masked pixel modelling, with a classification loss for fine-tuning.

Chen et al., "Generative Pretraining from Pixels", ICML 2020, sections 2.1 to 2.3.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Bool, Float, Float32, Integer, UInt8
from matplotlib.figure import Figure

from vit_jax_zoo.figures.attention import draw_mosaic
from vit_jax_zoo.figures.canvas import MARGIN, add_axes, write_title
from vit_jax_zoo.figures.classification import draw_batch
from vit_jax_zoo.metrics.base import Evaluator, real_rows
from vit_jax_zoo.metrics.feature_probes import majority_vote
from vit_jax_zoo.ops.checks import check_not_negative, check_positive
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.igpt import palette as palettes
from vit_jax_zoo.systems.igpt.model import Tokens, Visible, complete
from vit_jax_zoo.systems.igpt.palette import cluster_colors
from vit_jax_zoo.tasks import base

MISSING = (236, 236, 240)  # colour of pixels after the prefix
MAX_COMPLETED = 12  # maximum number of images in a figure

PerImage = Float[Array, " b"]


@dataclasses.dataclass(frozen=True)
class PixelModelling(base.Task):
  """Models images as sequences of colours.

  The loss of a causal model is the mean over pixels (Eq. 2); with `causal=False`, the mean over an
  image's masked pixels, then over images (Eq. 3). `class_weight` adds the label's cross-entropy.

  Batches: `image` [b h w 3] in [0, 255]; `label` int [b], needed with `class_weight`; `mask` [b],
  True for real rows; `prefix_length` int [b], the number of pixels from which to complete images.
  """

  name: ClassVar[str] = "pixel_modelling"
  hub_task: ClassVar[str | None] = "unconditional-image-generation"

  model: Any  # an `ImageGPT`
  class_weight: float = 0.0  # of the label's loss; 0 for pre-training, 1 for fine-tuning (3.4)
  mask_probability: float = 0.15  # of a pixel, with `causal=False` (section 2.2: 0.15)
  maskings: int = 5  # with `causal=False`: masks per image, whose majority is the label (section 4)
  palette: str | None = None  # file, see `palette.read_palette`; None: fitted to training images
  palette_images: int = 2048  # number of training images for that, and for the bigram baseline
  temperature: float = 1.0  # of completions
  top_k: int | None = None  # number of most likely colours that completions sample from; None: all
  completions: int = 4  # number of completions per image
  seed: int = 0  # of masks in evaluations, of completions, and of the palette

  def __post_init__(self) -> None:
    if not 0 < self.mask_probability < 1:
      raise ValueError(f"mask_probability: {self.mask_probability}; expected a number in (0, 1)")
    check_not_negative(self, "class_weight", "temperature")
    check_positive(self, "maskings", "palette_images", "completions", "top_k")
    if self.class_weight and self.model.num_classes is None:
      raise ValueError(f"class_weight: {self.class_weight}, but the model's num_classes is None")

  @property
  def best_metric(self) -> str:
    return "accuracy" if self.class_weight else "log_likelihood"

  def init(self, rng: jax.Array, batch: base.Batch) -> base.Variables:
    variables, colors = self.model.init(rng, self._images(batch)), self.model.num_colors
    uniform = jnp.full((colors + 1, colors), -jnp.log(float(colors)), jnp.float32)
    return {**variables, "baseline": {"bigram": uniform}}

  def init_from_data(self, batches: Iterable[Mapping[str, np.ndarray]]) -> base.Variables:
    colors = self.model.num_colors
    examples = (image for batch in batches for image in batch["image"])
    images = list(itertools.islice(examples, self.palette_images))
    if not images:
      raise ValueError("data.train: no images; expected some to fit the palette to")
    images = np.clip(np.rint(np.stack(images)), 0, 255).astype(np.uint8)
    if self.palette is None:
      clusters = palettes.fit_palette(images, colors, seed=self.seed)
      logging.info("fitted a palette of %d colours to %d images", colors, len(images))
    else:
      clusters = palettes.read_palette(self.palette)
      if len(clusters) != colors:
        fix = f"expected the model's num_colors={colors}. Set num_colors={len(clusters)}"
        raise ValueError(f"{self.palette}: {len(clusters)} colours; {fix}")
    tokens = np.asarray(palettes.encode(images, clusters)).reshape(len(images), -1)
    return {"palette": {"clusters": clusters}, "baseline": {"bigram": fit_bigrams(tokens, colors)}}

  def loss(
    self, variables: base.Variables, batch: base.Batch, context: base.LossContext
  ) -> base.LossOutput:
    """Returns the sum of the examples' losses over the number of examples of the whole step.

    Metrics: "nats" per pixel, "loss", and with labels "class_loss" and "accuracy".
    """
    outputs, nats = self._model(variables, batch, context.rng, train=True)
    real = base.example_mask(batch)
    losses, metrics = nats, {"nats": base.Mean.of(nats, real)}
    if self.class_weight:
      class_losses, correct = self._classify(outputs, batch)
      losses = nats + self.class_weight * class_losses
      metrics["class_loss"] = base.Mean.of(class_losses, real)
      metrics["accuracy"] = base.Mean.of(correct.astype(jnp.float32), real)
    losses = jnp.where(real, losses, 0.0)
    return base.LossOutput(
      loss=jnp.sum(losses) / context.normalizers["examples"],
      metrics={"loss": base.Mean.of(losses, real), **metrics},
      model_state={name: tree for name, tree in variables.items() if name != "params"},
    )

  def predict(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns each image's likelihood, label and completions.

    `nats` [b], the mean over an image's pixels, or over masked ones, the same in every evaluation;
    of a causal model `bigram_nats` [b], of the baseline; of a model with a head `labels` int32 [b],
    and with labels in the batch `class_loss` [b] and `correct` [b]; with `prefix_length`,
    `completions` uint8 [b completions h w 3] and `quantized` uint8 [b h w 3]. Losses are means over
    `maskings`.
    """

    def predict_view(view: int | Array) -> dict[str, Array]:
      outputs, nats = self._model(variables, batch, self._view(view), train=False)
      predictions = {"nats": nats, "tokens": outputs["tokens"]}
      if self.model.num_classes is not None:
        predictions["labels"] = jnp.argmax(outputs["logits"], axis=-1).astype(jnp.int32)
        if "label" in batch:
          predictions["class_loss"] = self._classify(outputs, batch)[0]
      return predictions

    if self.model.causal or self.model.num_classes is None:
      predictions = predict_view(0)
      tokens = predictions.pop("tokens")
    else:
      views = jax.lax.map(predict_view, jnp.arange(self.maskings))
      tokens = views.pop("tokens")[0]
      labels = majority_vote(views.pop("labels"), jax.random.key(self.seed))
      losses = {name: jnp.mean(values, axis=0) for name, values in views.items()}
      predictions = {**losses, "labels": labels}
    if "class_loss" in predictions:
      predictions["correct"] = predictions["labels"] == jnp.asarray(batch["label"])
    if self.model.causal and "baseline" in variables:
      predictions["bigram_nats"] = score_bigrams(tokens, variables["baseline"]["bigram"])
    if "prefix_length" in batch:
      predictions |= self._complete(variables, batch, tokens)
    return predictions

  @property
  def feature_views(self) -> int:
    return 1 if self.model.causal else self.maskings

  def features(self, variables: base.Variables, batch: base.Batch) -> base.Predictions:
    """Returns `layers` [b depth+1 d], see `ImageGPT.from_tokens`, and `pixels` [b h*w*3].

    With `causal=False`, images are masked as in training; `view` is the number of the mask.
    """
    view = jnp.asarray(batch["view"])[0] if "view" in batch else 0
    outputs, _ = self._model(variables, batch, self._view(view), train=False)
    images = self._images(batch)
    return {"layers": outputs["layer_features"], "pixels": images.reshape(len(images), -1)}

  def evaluator(self) -> base.Evaluator:
    return PixelEvaluator()

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    return {"batch": draw_batch(batch["image"])}

  def figures(self, batch: base.Batch, predictions: base.Predictions) -> dict[str, Figure]:
    if "completions" not in predictions:
      return {}
    real = real_rows(batch, len(batch["image"]))
    arrays = (predictions["quantized"], batch["prefix_length"], predictions["completions"])
    return {"completions": draw_completions(*(np.asarray(array)[real] for array in arrays))}

  def _view(self, view: int | Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(self.seed), view)

  def _images(self, batch: base.Batch) -> Float[Array, "b h w c"]:
    return normalize_images(jnp.asarray(batch["image"]))

  def _model(
    self, variables: base.Variables, batch: base.Batch, rng: jax.Array, *, train: bool
  ) -> tuple[dict[str, Array], PerImage]:
    images, visible = self._images(batch), None
    if not self.model.causal:
      shape = (images.shape[0], images.shape[1] * images.shape[2])
      visible = jax.random.uniform(rng, shape) > self.mask_probability
    model_variables = {name: tree for name, tree in variables.items() if name != "baseline"}
    outputs = self.model.apply(model_variables, images, visible=visible, train=train)
    return outputs, pixel_nats(outputs["pixel_logits"], outputs["tokens"], visible)

  def _classify(
    self, outputs: Mapping[str, Array], batch: base.Batch
  ) -> tuple[PerImage, Bool[Array, " b"]]:
    labels, logits = jnp.asarray(batch["label"]), outputs["logits"]
    # An unknown label makes the loss NaN, which stops a run, except in padding rows.
    known = (labels >= 0) & (labels < logits.shape[-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, labels, 0))
    losses = jnp.where(known | ~base.example_mask(batch), losses, jnp.nan)
    return losses, jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels

  def _complete(
    self, variables: base.Variables, batch: base.Batch, tokens: Tokens
  ) -> dict[str, Array]:
    count, shape, rng = self.completions, batch["image"].shape[:3], jax.random.key(self.seed)
    repeated = jnp.repeat(tokens, count, axis=0)
    lengths = jnp.repeat(jnp.asarray(batch["prefix_length"], jnp.int32), count)
    options = {"temperature": self.temperature, "top_k": self.top_k}
    drawn = complete(self.model, variables, repeated, lengths, rng, **options)
    clusters = variables["palette"]["clusters"]
    return {
      "completions": cluster_colors(drawn, clusters).reshape(shape[0], count, *shape[1:], 3),
      "quantized": cluster_colors(tokens, clusters).reshape(*shape, 3),
    }


def pixel_nats(logits: Float[Array, "b n k"], tokens: Tokens, visible: Visible) -> PerImage:
  """Returns each image's mean cross-entropy over its pixels, or over its masked pixels.

  An image without a masked pixel has the loss 0; OpenAI's code divides 0 by 0.
  """
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  if visible is None:
    return jnp.mean(nats, axis=-1)
  masked = jnp.sum(~visible, axis=-1)
  return jnp.sum(jnp.where(visible, 0.0, nats), axis=-1) / jnp.maximum(masked, 1)


class PixelEvaluator(Evaluator):
  """Means over images: nats and bits per pixel, log-likelihood (minus nats), other predictions."""

  scores = ("nats", "bits", "log_likelihood", "images", "bigram_nats", "class_loss", "accuracy")

  def __init__(self) -> None:
    self.sums: collections.Counter[str] = collections.Counter()

  def add(self, batch: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
    real = real_rows(batch, len(predictions["nats"]))
    names = [n for n in ("nats", "bigram_nats", "class_loss", "correct") if n in predictions]
    self.sums["images"] += len(real)
    self.sums.update({n: float(np.asarray(predictions[n], np.float64)[real].sum()) for n in names})

  def merge(self, other: Any) -> None:
    self.sums.update(other.sums)

  def result(self) -> dict[str, float]:
    images = self.sums["images"]
    if not images:
      raise ValueError("no image was evaluated; is the evaluation split empty?")
    means = {name: total / images for name, total in self.sums.items()}
    if "correct" in means:
      means["accuracy"] = means.pop("correct")
    nats = means["nats"]
    scores = {"bits": nats / math.log(2), "log_likelihood": -nats, "images": float(images)}
    return {**means, **scores}


def fit_bigrams(tokens: Integer[np.ndarray, "b n"], num_tokens: int) -> Float32[np.ndarray, "m k"]:
  """Returns the log-probability of token j (column) after i (row); the last row is for the first.

  Smoothed by one observation a row, distributed as all tokens.
  """
  previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=num_tokens)
  counts = np.zeros((num_tokens + 1, num_tokens), np.int64)
  np.add.at(counts, (previous, tokens), 1)
  overall = counts.sum(axis=0) + 1.0
  smoothed = counts + overall / overall.sum()
  return np.log(smoothed / smoothed.sum(axis=1, keepdims=True)).astype(np.float32)


def score_bigrams(tokens: Tokens, log_probabilities: Float[Array, "m k"]) -> PerImage:
  """Returns the mean negative log-likelihood of each sequence's tokens, in nats."""
  first = jnp.full_like(tokens[:, :1], log_probabilities.shape[1])
  previous = jnp.concatenate([first, tokens[:, :-1]], axis=1)
  return -jnp.mean(log_probabilities[previous, tokens], axis=1)


def draw_completions(
  images: UInt8[np.ndarray, "b h w 3"],
  given: Integer[np.ndarray, " b"],
  completions: UInt8[np.ndarray, "b s h w 3"],
) -> Figure:
  """Draws a row for each image: the prefix of `given` pixels, the completions and the original."""
  shown, count = min(len(images), MAX_COMPLETED), completions.shape[1]
  prefixes = [keep_pixels(images[i], int(given[i])) for i in range(shown)]
  tiles = np.stack([[prefixes[i], *completions[i], images[i]] for i in range(shown)])
  sides = np.array(images.shape[1:3])
  height, width = sides / sides.max() * np.clip(sides.max() / 32, 0.7, 1.3) * tiles.shape[:2]
  figure = Figure(figsize=(max(width + 2 * MARGIN, 4.6), height + 0.95 + MARGIN), dpi=110)
  write_title(figure, "Completions", f"images: {shown}; draws of each: {count}")
  ax = add_axes(figure, MARGIN, MARGIN, width, height)
  draw_mosaic(ax, tiles / 255)
  ax.xaxis.tick_top()
  ax.tick_params(length=0)
  ax.set_xticklabels(["given", *(f"draw {i + 1}" for i in range(count)), "original"], fontsize=8.5)
  return figure


def keep_pixels(image: UInt8[np.ndarray, "h w 3"], count: int) -> UInt8[np.ndarray, "h w 3"]:
  """Returns the image with all but its first `count` pixels blanked."""
  pixels = image.reshape(-1, 3).copy()
  pixels[count:] = MISSING
  return pixels.reshape(image.shape)
