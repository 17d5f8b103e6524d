"""Image completion, as in the iGPT paper's figures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from vit_jax_zoo.inference.base import Options, Picture, Predictor, Result, Trained
from vit_jax_zoo.systems.igpt.task import draw_completions, keep_pixels


class CompletionPredictor(Predictor):
  """Keeps the top rows of an image as the prefix, and samples the rest several times."""

  reads: ClassVar = frozenset({"prefix_fraction", "samples", "temperature", "top_k", "seed"})

  def __init__(self, trained: Trained, options: Options) -> None:
    """Raises ValueError if the model is not causal or has no palette, and for wrong options."""
    model: Any = trained.model
    if not model.causal:
      raise ValueError(f"{trained.source}: causal=False; expected a causal model for completions")
    if "palette" not in trained.variables:
      wrong = f"{trained.source}: no palette"
      raise ValueError(f"{wrong}; expected OpenAI's kmeans_centers.npy in the weights' folder")
    if not 0 <= options.prefix_fraction <= 1 or options.samples < 1 or options.temperature < 0:
      given = f"{options.prefix_fraction}, {options.samples}, {options.temperature}"
      limits = "--prefix_fraction in [0, 1], --samples of at least 1, --temperature of at least 0"
      raise ValueError(f"completions: {given}; expected {limits}")
    if options.top_k is not None and options.top_k < 1:
      raise ValueError(f"--top_k: {options.top_k}; expected at least 1")
    super().__init__(trained, options)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "seed")}
    task = dataclasses.replace(self._task, completions=options.samples, **sampling)
    self._predict = jax.jit(task.predict)

  def predict(self, images: Sequence[np.ndarray], batch: Mapping[str, np.ndarray]) -> list[Result]:
    """Returns `given`, the number of pixels of the prefix, and `nats`, the mean loss of all pixels.

    Pictures: "" the figure, "samples" the prefix, the completions and the original side by side.
    """
    return [self._complete(image[None]) for image in batch["image"][: len(images)]]

  def _complete(self, image: np.ndarray) -> Result:
    """Completes an image [1 h w 3]; one at a time, as random numbers depend on the batch."""
    height, width = image.shape[1:3]
    given = np.array([round(self._options.prefix_fraction * height) * width])
    inputs = {"image": image, "prefix_length": given}
    found = jax.device_get(self._predict(self._trained.variables, inputs))
    quantized, completions = found["quantized"], found["completions"]
    pictures = [keep_pixels(quantized[0], int(given[0])), *completions[0], quantized[0]]
    gaps = ((0, 0), (0, 0), (0, 2), (0, 0))
    strip = np.hstack(list(np.pad(pictures, gaps, constant_values=255)))[:, :-2]
    scale = max(1, 96 // height)
    strip = strip.repeat(scale, axis=0).repeat(scale, axis=1)
    nats = float(found["nats"][0])
    record = {"given": int(given[0]), "pixels": height * width, "nats": nats}

    def draw() -> dict[str, Picture]:
      return {"": draw_completions(quantized, given, completions), "samples": strip}

    summary = f"{nats:.3f} nats per pixel, {len(completions[0])} completions of {given[0]} pixels"
    return Result(record, draw, summary, image=strip)
