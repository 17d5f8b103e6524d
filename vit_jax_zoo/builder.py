"""Builds datasets, mesh, model, task and compiled steps from a config."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax_zoo.config import check_values
from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.sources import SECTION, load_source
from vit_jax_zoo.data.sources.base import DatasetInfo, Source, check_same_classes, join_sources
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.errors import check_names
from vit_jax_zoo.metrics.feature_probes import FeatureProbe, create_probes
from vit_jax_zoo.registry import create_model, sharding_rules
from vit_jax_zoo.run_metadata import RunData, fill_from_data, main_evaluation, needs_data
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import Task
from vit_jax_zoo.training import sharding, train_step
from vit_jax_zoo.training.train_step import TrainingOptions


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The objects that a config describes."""

  config: ConfigDict  # complete
  mesh: jax.sharding.Mesh
  open_train_source: Callable[[], Source]
  eval_sources: Mapping[str, Source]  # by name of the evaluation, as are the next two
  fit_sources: Mapping[str, Source]  # training data of feature probes
  probes: Mapping[str, FeatureProbe]
  model: Any  # a Linen module
  task: Task
  num_steps: int  # of the whole run

  @property
  def train_source(self) -> Source:
    """The training data, opened at the first use."""
    return self.open_train_source()

  @property
  def sharding_rules(self) -> sharding.Rules:
    """The config's rules, then the model's."""
    return (*self.config.sharding.rules, *sharding_rules(self.config.model.name))

  @property
  def sources(self) -> dict[str, Source]:
    """All data: "train", and the evaluations by name."""
    return {"train": self.train_source, **self.eval_sources}

  @property
  def eval_batch_size(self) -> int:
    """Number of examples in a global batch of evaluations."""
    return self.config.eval_batch_size or self.config.batch_size

  def _loader_options(self, batch_size: int) -> dict[str, Any]:
    index, count = sharding.input_shard(self.mesh, batch_size)
    part = {"batch_size": batch_size, "process_index": index, "process_count": count}
    return {**part, **self.config.data.loader.to_dict()}

  @property
  def _num_classes(self) -> int | None:
    return getattr(self.task, "num_classes", None)

  def train_batches(self, start_step: int = 0) -> pipeline.BatchIterator:
    """Returns an endless iterator over this process's part of the training batches."""
    return pipeline.train_batches(
      self.train_source,
      build_transforms(self.config.data.train.transforms),
      seed=self.config.seed,
      start_step=start_step,
      num_classes=self._num_classes,
      repeats=self.config.data.train.get("aug_repeats", 1),
      **self._loader_options(self.config.batch_size),
    )

  def eval_batches(self, name: str, *, to_fit: bool = False) -> pipeline.EvalBatches:
    """Returns this process's part of the batches of an evaluation, or of its `fit_split`."""
    sharding.check_batch_size(self.eval_batch_size, self.mesh)
    return pipeline.eval_batches(
      (self.fit_sources if to_fit else self.eval_sources)[name],
      build_transforms(self.config.data.eval[name].transforms),
      num_classes=None if name in self.fit_sources else self._num_classes,
      **self._loader_options(self.eval_batch_size),
    )

  def batch_shapes(self) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Returns the kinds of training batches; see `pipeline.training_shapes`."""
    return pipeline.training_shapes(
      self.train_source,
      build_transforms(self.config.data.train.transforms),
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      num_classes=self._num_classes,
      buckets=self.config.data.loader.get("buckets"),
    )

  def program(self, batch: Mapping[str, np.ndarray]) -> train_step.Program:
    """Returns the compiled steps for batches with the shapes of this process's part `batch`."""
    config, rules = self.config, self.sharding_rules
    shapes = train_step.abstract_batch_of(batch, config.batch_size)
    options = TrainingOptions(
      config.optimizer.to_dict(), self.num_steps, config.accumulation_steps, config.ema_decay
    )
    return train_step.build_program(self.task, shapes, options, mesh=self.mesh, rules=rules)

  def evaluation_program(self) -> train_step.EvaluationProgram:
    """Returns the compiled steps of an evaluation, for the shapes of the default one's batches."""
    if (name := main_evaluation(self.config.data.eval.to_dict())) is None:
      raise ValueError("data.eval: empty; expected an evaluation")
    return train_step.build_evaluation(
      self.task,
      train_step.abstract_batch_of(self.eval_batches(name).one_example(), self.eval_batch_size),
      mesh=self.mesh,
      rules=self.sharding_rules,
      left_out=self.task.train_only_collections,
    )


def build(
  config: ConfigDict,
  devices: Any = None,
  open_source: Callable[..., Source] = load_source,
  *,
  run_data: RunData | None = None,
) -> Experiment:
  """Builds the objects that a complete config describes, on the devices (all by default).

  `open_source` is `data.fake_data.load` to plan a run without its data. With `run_data`, metadata
  saved with a run, the training data is opened only if fields of the config depend on more.
  """
  check_values(config)
  mesh = sharding.create_mesh(config.sharding.mesh.to_dict(), devices)
  if run_data is None:
    sharding.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
  opened = functools.partial(_open, open_source)
  open_train_source = functools.cache(functools.partial(opened, config.data.train))
  if run_data is None or (run_data.num_classes is None and needs_data(config.model, config.task)):
    info = open_train_source().info
    _check_objects("data.train", info)
  else:
    info = run_data.info("the training data of the run")
  eval_sources, fit_sources = _open_evaluations(opened, config.data.eval, info)
  model = create_model(**fill_from_data(config.model.to_dict(), info))
  if getattr(model, "dtype", None) == "float16" and mesh.devices.flat[0].platform == "cpu":
    raise ValueError("config.model.dtype: float16 does not run on CPUs; set float32 or bfloat16")
  if getattr(model, "dtype", None) == "float64" and not jax.config.read("jax_enable_x64"):
    raise ValueError("config.model.dtype: float64 needs JAX_ENABLE_X64=1; set it, or float32")
  task_fields = fill_from_data(config.task.to_dict(), info)
  num_steps = config.num_steps or round(config.num_epochs * info.num_examples / config.batch_size)
  task = create_task(task_fields.pop("name"), model, **task_fields)
  _check_metrics(config, task)
  return Experiment(
    config=config,
    mesh=mesh,
    open_train_source=open_train_source,
    eval_sources=eval_sources,
    fit_sources=fit_sources,
    probes=create_probes(config.data.eval.to_dict()),
    model=model,
    task=task,
    num_steps=max(1, num_steps),
  )


def best_score_of(config: ConfigDict, task: Task) -> str | None:
  """Returns "<evaluation>/<score>" of the score that selects the best checkpoint, or None."""
  name = main_evaluation(config.data.eval.to_dict())
  return config.checkpoint.best or (name and f"{name}/{task.best_metric}")


def _check_metrics(config: ConfigDict, task: Task) -> None:
  evaluation, _, best = (best_score_of(config, task) or "").partition("/")
  if config.checkpoint.best:
    check_names("evaluation of checkpoint.best", [evaluation], config.data.eval)
  best = best.partition("/")[0]  # without the class
  for name, spec in config.data.eval.items():
    metrics, field = spec.get("metrics") or (), f"data.eval.{name}.metrics"
    if "fit_split" in spec:
      if metrics:
        raise ValueError(f"{field}: not supported by feature probes; remove it")
      continue
    check_names(f"metric in {field}", metrics, task.metrics)
    if name == evaluation and task.metrics:
      check_names("score of checkpoint.best", [best], task.metrics)
    if name == evaluation and metrics and best not in metrics:
      raise ValueError(f"{field}: no {best!r}, which selects the best checkpoint; add it")


def _open_evaluations(
  opened: Callable[..., Source], sections: Mapping[str, Any] | ConfigDict, info: DatasetInfo
) -> tuple[dict[str, Source], dict[str, Source]]:
  """Opens the data of evaluations and probes; checks their classes against `info`."""
  eval_sources, fit_sources = {}, {}
  for name, spec in sections.items():
    eval_sources[name] = opened(spec)
    _check_objects(f"data.eval.{name}", eval_sources[name].info)
    if "fit_split" in spec:
      fit_sources[name] = opened(spec, "fit_split")
    trained_on = fit_sources[name].info if name in fit_sources else info
    check_same_classes(trained_on, eval_sources[name].info, f"the evaluation {name!r}")
  return eval_sources, fit_sources


def _check_objects(section: str, info: DatasetInfo) -> None:
  if info.num_objects == 0:
    raise ValueError(f"{section}: {info.name}: no annotated objects, or only crowds; set another")


def _open(open_source: Callable[..., Source], spec: Any, split: str = "split") -> Source:
  if not isinstance(spec, Mapping | ConfigDict) or not {"source", split} <= set(spec):
    raise ValueError(f"extra_sources: {spec!r}; expected sections with source and {split}")
  options = {key: spec[key] for key in spec if key not in SECTION}
  others = (_open(open_source, other) for other in spec.get("extra_sources") or ())
  return join_sources([open_source(spec["source"], spec[split], **options), *others])
