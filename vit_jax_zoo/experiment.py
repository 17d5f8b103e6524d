"""From a config to a run: opens the data, makes model, task and program, and lets the loop go.

This is the one place that knows all the parts. What it adds of its own:

* a field of `config.model` or `config.task` that is None takes its value from the training data's
  `DatasetInfo` where that has a field of the same name (`num_classes`, `class_names`);
* where a run starts: at its own last checkpoint; else from `config.init_from`; else from scratch,
  with what the task learns from the data beforehand.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax_zoo import weights
from vit_jax_zoo.config import check_values, complete
from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.base import Source, check_same_classes, join_sources
from vit_jax_zoo.data.sources import SECTION, load_source
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.evaluation.feature_probes import FeatureProbe, create_probes
from vit_jax_zoo.introduction import introduce
from vit_jax_zoo.models.registry import create_model
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.run_config import (
  check_config_unchanged,
  fill_from_data,
  main_evaluation,
  remember_config,
  remember_data,
)
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import Task, Variables
from vit_jax_zoo.train import sharding
from vit_jax_zoo.train.checkpoint import Checkpointer, restore_variables
from vit_jax_zoo.train.checkpoint_folders import is_checkpoint
from vit_jax_zoo.train.distributed import all_gather_objects, is_primary
from vit_jax_zoo.train.evaluate import Evaluation, Explanations, PredictionScores
from vit_jax_zoo.train.loop import Loop, LoopSettings, Outcome, prefetch, run_evaluations
from vit_jax_zoo.train.metric_writer import MetricWriter, save_figures
from vit_jax_zoo.train.probe import FeatureEvaluation
from vit_jax_zoo.train.program import Program, Recipe, abstract_batch_of, build_program
from vit_jax_zoo.train.progress import Progress
from vit_jax_zoo.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config's live parts, before any of them runs.

  Attributes:
    config: complete.
    mesh: of all devices.
    train_source: the training examples.
    eval_sources: the examples of each evaluation, by its name.
    fit_sources: those that a probe learns from, by the evaluation's name.
    probes: how features are asked, by the evaluation's name.
    model: a Linen module.
    task: what it is to learn.
    num_steps: the length of the run.
  """

  config: ConfigDict
  mesh: Mesh
  train_source: Source
  eval_sources: Mapping[str, Source]
  fit_sources: Mapping[str, Source]
  probes: Mapping[str, FeatureProbe]
  model: Any
  task: Task
  num_steps: int

  @property
  def sharding_rules(self) -> sharding.Rules:
    """The config's rules, then those that stand beside the model."""
    beside_model = sys.modules[type(self.model).__module__].SHARDING_RULES
    return (*self.config.sharding.rules, *beside_model)

  @property
  def sources(self) -> dict[str, Source]:
    """All examples, by what they are for: "train", and the names of the evaluations."""
    return {"train": self.train_source, **self.eval_sources}

  def train_batches(self, start_step: int = 0) -> pipeline.BatchIterator:
    """Yields this process's part of the training batches from a step on, without end."""
    index, count = sharding.input_shard(self.mesh, self.config.batch_size)
    return pipeline.train_batches(
      self.train_source,
      build_transforms(self.config.data.train.transforms),
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      start_step=start_step,
      process_index=index,
      process_count=count,
      num_classes=getattr(self.task, "num_classes", None),
      repeats=self.config.data.train.get("repeats", 1),
      **self.config.data.loader.to_dict(),
    )

  def eval_batches(self, name: str, *, to_fit: bool = False) -> pipeline.EvalBatches:
    """Returns this process's part of the batches of an evaluation, or of its `fit_split`."""
    batch_size = self.config.eval_batch_size or self.config.batch_size
    sharding.check_batch_size(batch_size, self.mesh)
    index, count = sharding.input_shard(self.mesh, batch_size)
    classes = None if name in self.fit_sources else getattr(self.task, "num_classes", None)
    return pipeline.eval_batches(
      (self.fit_sources if to_fit else self.eval_sources)[name],
      build_transforms(self.config.data.eval[name].transforms),
      batch_size=batch_size,
      process_index=index,
      process_count=count,
      num_classes=classes,
      **self.config.data.loader.to_dict(),
    )

  def batch_shapes(self) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Returns the kinds of training batches; see `pipeline.training_shapes`."""
    return pipeline.training_shapes(
      self.train_source,
      build_transforms(self.config.data.train.transforms),
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      num_classes=getattr(self.task, "num_classes", None),
      buckets=self.config.data.loader.get("buckets"),
    )

  def program(self, batch: Mapping[str, np.ndarray]) -> Program:
    """Returns the run's program for batches like this process's part `batch`."""
    config = self.config
    return build_program(
      self.task,
      abstract_batch_of(batch, config.batch_size),
      Recipe(
        optimizer=config.optimizer.to_dict(),
        num_steps=self.num_steps,
        accumulation_steps=config.accumulation_steps,
        ema_decay=config.ema_decay,
      ),
      mesh=self.mesh,
      rules=self.sharding_rules,
    )


def create(
  config: ConfigDict, devices: Any = None, open_source: Callable[..., Source] = load_source
) -> Experiment:
  """Makes a config's live parts.

  Args:
    config: any.
    devices: those of the mesh; by default all there are.
    open_source: makes a source of its name, its split and the options of its kind: for those who
      plan a run where its data are not, `data.stand_in.load`.

  Raises:
    ValueError: one line, about whatever in the config cannot be.
    FileNotFoundError: one line, about data that is not there.
  """
  config = complete(config)
  check_values(config)
  mesh = sharding.create_mesh(config.sharding.mesh.to_dict(), devices)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
  opened = functools.partial(_open, open_source)
  train_source = opened(config.data.train)
  evaluations = config.data.eval.items()
  eval_sources = {name: opened(spec) for name, spec in evaluations}
  fit_sources = {
    name: opened(spec, "fit_split") for name, spec in evaluations if "fit_split" in spec
  }
  for name, source in eval_sources.items():
    trained_on = fit_sources.get(name, train_source)
    check_same_classes(trained_on.info, source.info, f"the evaluation {name!r}")
  model = create_model(**fill_from_data(config.model.to_dict(), train_source.info))
  task_fields = fill_from_data(config.task.to_dict(), train_source.info)
  num_steps = config.num_steps or round(config.num_epochs * len(train_source) / config.batch_size)
  return Experiment(
    config=config,
    mesh=mesh,
    train_source=train_source,
    eval_sources=eval_sources,
    fit_sources=fit_sources,
    probes=create_probes(config.data.eval.to_dict()),
    model=model,
    task=create_task(task_fields.pop("name"), model, **task_fields),
    num_steps=max(1, num_steps),
  )


def _open(
  open_source: Callable[..., Source], spec: Mapping[str, Any] | ConfigDict, split: str = "split"
) -> Source:
  options = {key: spec[key] for key in spec if key not in SECTION}
  others = (_open(open_source, other) for other in spec.get("mixed_with") or ())
  return join_sources([open_source(spec["source"], spec[split], **options), *others])


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """What a command line may ask of a run beside its config.

  Attributes:
    evaluate_only: score the last checkpoint (or `init_from`) and train nothing.
    overfit_one_batch: train on the first batch over and over: a model that cannot learn it is
      broken, not slow.
    profile: the half-open window of steps to trace, or None.
    allow_config_change: go on with a run whose config was another.
  """

  evaluate_only: bool = False
  overfit_one_batch: bool = False
  profile: tuple[int, int] | None = None
  allow_config_change: bool = False


def run(config: ConfigDict, workdir: epath.Path, options: RunOptions = RunOptions()) -> Outcome:
  """Trains and evaluates what the config says, from wherever the run in `workdir` had come.

  Raises:
    ValueError: one line, about a config, option or data that cannot be.
    FileNotFoundError: data is not there, or there is nothing to evaluate.
    FloatingPointError: training diverged.
  """
  if options.overfit_one_batch:  # a run of its own: nothing of it may pass for real training
    workdir = workdir / "overfit_one_batch"
  experiment = create(config)
  checkpoints = functools.partial(
    Checkpointer,
    workdir,
    keep=experiment.config.checkpoint.keep,
    best_mode=experiment.config.checkpoint.best_mode,
    read_only=options.evaluate_only,
  )
  with jax.set_mesh(experiment.mesh), checkpoints() as checkpointer:
    if checkpointer.latest_step is not None and not options.allow_config_change:
      check_config_unchanged(experiment.config, workdir)
    elif options.evaluate_only and not experiment.config.init_from:
      raise FileNotFoundError(f"nothing to evaluate: no checkpoint in {workdir}, and no init_from")
    with experiment.train_batches() as batches:
      first_batch = next(batches)
    program = experiment.program(first_batch)
    state = _starting_state(experiment, program, checkpointer)
    step, evaluations = int(state.step), _evaluations(experiment, program)
    if options.evaluate_only or step >= experiment.num_steps:
      report = run_evaluations(evaluations, state.variables)
      if is_primary():
        save_figures(workdir, step, report.figures)
      return Outcome(state, finished=True, scores=report.scores, workdir=workdir)
    settings = _loop_settings(experiment, options, step)
    if is_primary():
      remember_config(experiment.config, workdir)
      remember_data(experiment.train_source.info, first_batch, workdir)
    with (
      MetricWriter(workdir, resume_step=step or None) as writer,
      _progress(experiment, program, step) as progress,
      experiment.train_batches(step) as batches,
    ):
      if step == 0:
        introduce(experiment.config, program, experiment.sources, first_batch, writer)
      loop = Loop(
        train_step=program.train_step,
        evaluations=evaluations,
        schedules=program.schedules,
        settings=settings,
        checkpointer=checkpointer,
        writer=writer,
        progress=progress,
        workdir=workdir,
        counters=lambda: {"data/skipped_images": float(batches.num_skipped)},
      )
      endless = itertools.repeat(first_batch) if options.overfit_one_batch else batches
      put = functools.partial(sharding.to_global, mesh=experiment.mesh)
      outcome = loop.run(state, prefetch(endless, put))
      batches.log_skipped()
      return outcome


def _starting_state(
  experiment: Experiment, program: Program, checkpointer: Checkpointer
) -> TrainState:
  """Restores the run's last checkpoint; else starts from `init_from`; else from scratch."""
  state = checkpointer.restore(program.abstract_state)
  if state is not None:
    logging.info("resumed at step %d from %s", int(state.step), checkpointer.workdir)
    return state

  def pretrain(variables: Variables) -> Variables:
    learned = experiment.task.prepare(_preview(experiment))
    variables = {**variables, **all_gather_objects(learned)[0]}
    files = experiment.task.weight_files
    sources = {k: restore_variables(f) if is_checkpoint(f) else f for k, f in files.items()}
    variables = weights.load_parts(sources, variables)
    path = experiment.config.init_from
    grid = _token_grid(experiment, program)
    return _read_weights(path, variables, grid) if path else variables

  return program.initial_state(experiment.config.seed, pretrain=pretrain)


def _token_grid(experiment: Experiment, program: Program) -> tuple[int, int] | None:
  """Returns height and width of the images in tokens, for models that cut them into patches."""
  side = getattr(experiment.model, "patch_side", None)
  if side is None or "image" not in program.abstract_batch:
    return None
  _, height, width, *_ = program.abstract_batch["image"].shape
  return height // side, width // side


def _read_weights(
  path: str, variables: Variables, grid: tuple[int, int] | None = None
) -> Variables:
  """Returns the variables with the weights of a run of ours, or of a published file."""
  logging.info("starting from the weights in %s", path)
  if is_checkpoint(path):
    return weights.adapt(restore_variables(path), variables, path, grid=grid)
  return weights.load_into(path, variables, position_grid=grid)


def _preview(experiment: Experiment) -> Iterator[dict[str, np.ndarray]]:
  """Yields the run's training batches; reads nothing before the first is asked for."""
  with contextlib.closing(experiment.train_batches()) as batches:
    yield from batches


def _evaluations(experiment: Experiment, program: Program) -> dict[str, Evaluation]:
  found = {name: _evaluation(experiment, program, name) for name in experiment.eval_sources}
  if experiment.config.explain and found:
    found["explain"] = Explanations(
      task=experiment.task,
      explain_step=program.explain_step,
      batches=functools.partial(experiment.eval_batches, next(iter(found))),
      mesh=experiment.mesh,
    )
  return found


def _evaluation(experiment: Experiment, program: Program, name: str) -> Evaluation:
  batches = functools.partial(experiment.eval_batches, name)
  if name in experiment.fit_sources:
    return FeatureEvaluation(
      features_step=program.features_step,
      fit_batches=functools.partial(batches, to_fit=True),
      test_batches=batches,
      mesh=experiment.mesh,
      name=name,
      probe=experiment.probes[name],
      views=experiment.task.feature_views,
    )
  return PredictionScores(
    task=experiment.task,
    predict_step=program.predict_step,
    batches=batches,
    mesh=experiment.mesh,
    name=name,
  )


def _loop_settings(experiment: Experiment, options: RunOptions, step: int) -> LoopSettings:
  config = experiment.config
  first = main_evaluation(config.data.eval.to_dict())
  settings = LoopSettings(
    num_steps=experiment.num_steps,
    log_every=config.log_every,
    eval_every=config.eval_every,
    checkpoint_every=config.checkpoint.every,
    score_best=config.checkpoint.score_best,
    best=config.checkpoint.best or (first and f"{first}/{experiment.task.best_metric}"),
    profile=options.profile,
  )
  settings.check_profile(step)
  return settings


def _progress(
  experiment: Experiment, program: Program, step: int
) -> contextlib.AbstractContextManager[Progress]:
  return contextlib.closing(
    Progress(
      experiment.num_steps,
      experiment.config.batch_size,
      start_step=step,
      flops_per_step=count_flops(
        program.train_step, program.abstract_state, program.abstract_batch
      ),
      devices=list(experiment.mesh.devices.flat),
    )
  )
