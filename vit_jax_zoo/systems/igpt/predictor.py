"""Image completion, as in the iGPT paper's figures."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from vit_jax_zoo.inference.base import Image, Options, Prediction, Trained
from vit_jax_zoo.ops.images import normalize_images
from vit_jax_zoo.systems.igpt.figures import draw_completions, keep_pixels
from vit_jax_zoo.systems.igpt.palette import cluster_colors
from vit_jax_zoo.systems.igpt.sampling import complete


class CompletionPredictor:
  """Keeps the top rows of an image as the prefix, and samples the rest several times."""

  reads: ClassVar[frozenset[str]] = frozenset(
    {"prefix_fraction", "samples", "temperature", "top_k", "seed"}
  )

  def __init__(self, trained: Trained, options: Options) -> None:
    """Compiles nothing yet.

    Raises:
      ValueError: the model is not causal, has no palette, or an option is out of its range.
    """
    model: Any = trained.model
    if not model.causal:
      raise ValueError(f"{trained.source}: causal=False; expected a causal model for completions")
    if "palette" not in trained.variables:
      raise ValueError(
        f"{trained.source}: no palette; expected OpenAI's kmeans_centers.npy beside the weights"
      )
    if not 0 <= options.prefix_fraction <= 1 or options.samples < 1 or options.temperature < 0:
      raise ValueError(
        "--prefix_fraction lies in [0, 1], --samples is positive, --temperature not negative; got "
        f"{options.prefix_fraction}, {options.samples}, {options.temperature}"
      )
    self._trained, self._options = trained, options
    if options.top_k is not None and options.top_k < 1:
      raise ValueError(f"--top_k is positive; got {options.top_k}")
    self._complete = jax.jit(functools.partial(_complete, model, options))

  def __call__(self, image: Image) -> Prediction:
    """Returns `given`, the number of kept pixels, and `nats`, the mean loss of the pixels."""
    prepared = np.asarray(self._trained.prepare(image)["image"])
    height, width = prepared.shape[:2]
    given = round(self._options.prefix_fraction * height) * width
    rng = jax.random.key(self._options.seed)
    variables = {k: self._trained.variables[k] for k in ("params", "palette")}
    drawn, truth, nats = self._complete(variables, prepared[None], given, rng)
    shape = (self._options.samples, height, width, 3)
    completions, quantized = np.asarray(drawn).reshape(shape), np.asarray(truth).reshape(shape[1:])
    figure = draw_completions(
      quantized[None], np.array([given]), completions[None], title="Completions"
    )
    record = {"given": given, "pixels": height * width, "nats": float(nats)}
    return Prediction(record, {"": figure, "samples": _strip(quantized, given, completions)})


def _complete(
  model: Any, options: Options, variables: Any, image: Any, given: Any, rng: Any
) -> tuple[Any, Any, Any]:
  outputs = model.apply(variables, normalize_images(jnp.asarray(image)))
  tokens = outputs["tokens"]
  log_likelihoods = jax.nn.log_softmax(outputs["pixel_logits"])
  nats = -jnp.mean(jnp.take_along_axis(log_likelihoods, tokens[..., None], axis=-1))
  lengths = jnp.full(options.samples, given, jnp.int32)
  repeated = jnp.repeat(tokens, options.samples, axis=0)
  settings = {"temperature": options.temperature, "top_k": options.top_k}
  drawn = complete(model, variables, repeated, lengths, rng, **settings)
  clusters = variables["palette"]["clusters"]
  return cluster_colors(drawn, clusters), cluster_colors(tokens, clusters), nats


def _strip(
  original: UInt8[np.ndarray, "h w 3"], given: int, completions: UInt8[np.ndarray, "s h w 3"]
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns the prefix, the completions and the original side by side."""
  pictures = [keep_pixels(original, given), *completions, original]
  gap = np.full((original.shape[0], 2, 3), 255, np.uint8)
  parts = [part for picture in pictures for part in (picture, gap)][:-1]
  strip = np.concatenate(parts, axis=1)
  scale = max(1, 96 // original.shape[0])
  return strip.repeat(scale, axis=0).repeat(scale, axis=1)
