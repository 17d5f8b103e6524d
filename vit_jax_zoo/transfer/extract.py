"""Features and class rankings of a model on whole datasets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.sources.base import Example, Source
from vit_jax_zoo.data.transforms import Transform, pixels
from vit_jax_zoo.data.transforms.image import MultiHot
from vit_jax_zoo.inference.base import Trained
from vit_jax_zoo.metrics.feature_probes import Labelled
from vit_jax_zoo.tasks.base import Task
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.evaluate import collect_features, predict_batches
from vit_jax_zoo.training.train_step import compile_predict_step


@dataclasses.dataclass(frozen=True)
class Prepare(Transform):
  """`image`: encoded bytes or pixels -> preprocessed by `Trained.prepare`; keeps a `label`."""

  name = "prepare"

  prepare: Callable[[np.ndarray], Mapping[str, Any]]

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    """Returns the preprocessed example."""
    del rng
    image = self.prepare(pixels(example["image"]))["image"]
    return {"image": image} | ({"label": example["label"]} if "label" in example else {})


class Extractor:
  """Applies a model to datasets, on all local devices."""

  def __init__(
    self,
    trained: Trained,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    on_corrupt: str = "error",
  ) -> None:
    """Puts the model on the devices; `batch_size` is rounded up to a multiple of their number."""
    if batch_size < 1:
      raise ValueError(f"batch_size: {batch_size}; expected an integer, at least 1")
    self._trained = trained
    self._mesh = sharding.create_mesh({"data": -1, "fsdp": 1, "model": 1})
    ways = sharding.batch_ways(self._mesh)
    self._reading: dict[str, Any] = {"num_workers": num_workers, "on_corrupt": on_corrupt}
    self._reading["batch_size"] = -(-batch_size // ways) * ways
    self._whole = sharding.replicated(self._mesh)
    self._variables = jax.device_put(trained.variables, self._whole)
    self._features_step = compile_predict_step(trained.task.features, self._whole, self._mesh)

  def features(self, source: Source, *, to_score: bool = False) -> Labelled:
    """Returns the features of a source by kind, and labels; `to_score`: of all views [b v d].

    ValueError if the model's task has no features, or images have no label or several.
    """
    task, source_name = self._trained.task, self._trained.source
    if type(task).features is Task.features:
      raise ValueError(f"{source_name}: no features; its task is {type(task).__name__}")
    batches, name = self._batches(source), source.info.name
    views = task.feature_views if to_score else 1
    return collect_features(self._features_step, self._variables, batches, self._mesh, name, views)

  def rankings(
    self, source: Source, keep: int | None = None
  ) -> tuple[Int[np.ndarray, "n r"], Bool[np.ndarray, "n k"]]:
    """Returns the model's classes from most to least probable, and the correct ones."""
    task: Any = self._trained.task
    count, expected = getattr(task, "num_classes", None), source.info.num_classes
    if count is None:
      raise ValueError(f"{self._trained.source}: not a classifier; this suite scores its classes")
    if expected not in (None, count):
      problem = f"{self._trained.source}: {count} classes; expected the {expected} of"
      raise ValueError(f"{problem} {source.info.name}, in order")
    task = dataclasses.replace(task, top_k=min(keep or count, count))
    step = compile_predict_step(task.predict, self._whole, self._mesh)
    batches, ranked, labels = self._batches(source, MultiHot(count)), [], []
    progress = (source.info.name, len(batches))
    for batch, found in predict_batches(step, self._variables, batches, self._mesh, *progress):
      real = np.asarray(batch["mask"], bool)
      ranked.append(np.asarray(found["labels"], np.int32)[real])
      labels.append(np.asarray(batch["label"])[real] > 0)
    return np.concatenate(ranked), np.concatenate(labels)

  def _batches(self, source: Source, *transforms: Transform) -> pipeline.EvalBatches:
    steps = (Prepare(self._trained.prepare), *transforms)
    return pipeline.eval_batches(source, steps, **self._reading)
