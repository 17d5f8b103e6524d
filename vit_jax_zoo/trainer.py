"""Trains and evaluates a config: initial state, input pipeline, evaluations, and the loop.

A run resumes at its last checkpoint. A new one starts from `config.init_from`, or from random and
data-dependent variables.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vit_jax_zoo.builder import Experiment as Experiment
from vit_jax_zoo.builder import build as build
from vit_jax_zoo.initialization import Initializer, check_files
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.run_metadata import (
  as_json,
  check_unchanged,
  code_version,
  fingerprint,
  load_data,
  main_evaluation,
  save_config,
  save_data,
)
from vit_jax_zoo.run_summary import log_summary
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.checkpoint import CHECKPOINTS, Checkpointer, restore_variables
from vit_jax_zoo.training.compiled_steps import EvaluationProgram, Program
from vit_jax_zoo.training.distributed import check_equal, is_primary
from vit_jax_zoo.training.evaluate import Evaluation, Explanations, PredictionScores
from vit_jax_zoo.training.feature_evaluation import FeatureEvaluation
from vit_jax_zoo.training.loop import (
  Loop,
  LoopSettings,
  Outcome,
  is_evaluated,
  prefetch,
  run_evaluations,
)
from vit_jax_zoo.training.metric_writer import MetricWriter, save_figures
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import TrainState
from vit_jax_zoo.training.workdir_lock import workdir_lock


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """Options of a run that are not part of its config.

  Attributes:
    eval_only: evaluate the last checkpoint (or `init_from`) without training; training data are
      read only if fields of the config, or variables that `init_from` does not have, depend on
      them.
    overfit_one_batch: train on the first batch only; a correct model can fit it.
    profile: half-open window of steps to trace, or None.
    allow_config_change: resume although the config differs from the run's.
  """

  eval_only: bool = False
  overfit_one_batch: bool = False
  profile: tuple[int, int] | None = None
  allow_config_change: bool = False


def run(config: ConfigDict, workdir: epath.Path, options: RunOptions = RunOptions()) -> Outcome:
  """Trains and evaluates a config; resumes the run in `workdir` if there is one.

  Raises:
    ValueError: a config, option or data is invalid, or the processes differ in them.
    FileNotFoundError: data do not exist, or there is nothing to evaluate.
    FloatingPointError: training diverged.
    LockedError: another run uses `workdir`.
  """
  if options.overfit_one_batch:  # kept apart from real training
    workdir = workdir / "overfit_one_batch"
  run_data = load_data(workdir) if options.eval_only else None
  lock = contextlib.nullcontext() if options.eval_only else workdir_lock(workdir)
  with lock:
    experiment = build(config, run_data=run_data)
    check_equal(lambda: _facts(experiment, train=not options.eval_only))
    checkpoint = experiment.config.checkpoint
    with (
      jax.set_mesh(experiment.mesh),
      Checkpointer(
        workdir,
        keep=checkpoint.keep,
        best_mode=checkpoint.best_mode,
        read_only=options.eval_only,
      ) as checkpointer,
    ):
      if checkpointer.latest_step is None:
        if options.eval_only and not experiment.config.init_from:
          raise FileNotFoundError(
            f"nothing to evaluate: no checkpoint in {workdir}, and no init_from"
          )
      elif not options.allow_config_change:
        info = None if options.eval_only else experiment.train_source.info
        check_unchanged(experiment.config, info, workdir)
      if options.eval_only:
        return _evaluate_only(experiment, checkpointer)
      return _train(experiment, options, checkpointer)


def _facts(experiment: Experiment, *, train: bool) -> dict[str, Any]:
  """Returns what must be equal on all processes: config, datasets, code."""
  flat = _flatten(as_json(experiment.config), "config")
  sources = experiment.sources if train else experiment.eval_sources
  data = {f"data of {name!r}": fingerprint(source) for name, source in sources.items()}
  return {**flat, **data, "code version": code_version()}


def _flatten(tree: Any, path: str) -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {path: json.dumps(tree)}
  parts = (_flatten(value, f"{path}.{key}") for key, value in tree.items())
  return {key: value for part in parts for key, value in part.items()}


def _train(experiment: Experiment, options: RunOptions, checkpointer: Checkpointer) -> Outcome:
  """Trains from the last checkpoint, or from the start; only evaluates a finished run."""
  config, workdir, start = experiment.config, checkpointer.workdir, checkpointer.latest_step or 0
  evaluated = bool(experiment.eval_sources) and is_evaluated(
    workdir, experiment.eval_sources, start
  )
  if start >= experiment.num_steps and evaluated:
    return _evaluate_only(experiment, checkpointer)
  settings = _loop_settings(experiment, options, start)
  if not start:
    check_files(experiment.task, config.init_from)
  with experiment.train_batches(0 if options.overfit_one_batch else start) as iterator:
    first = next(iterator)  # for shapes and figures; then it is trained on
    program = experiment.program(first)
    state, taken = _initial_state(experiment, program, checkpointer, first, iterator)
    if is_primary():
      save_config(config, workdir)
      save_data(experiment.train_source.info, first, workdir)
    with (
      MetricWriter(workdir, resume_step=start or None) as writer,
      _progress(experiment, program, start) as progress,
    ):
      if not start:
        log_summary(config, program, experiment.sources, first, writer)
      loop = Loop(
        train_step=program.train_step,
        evaluations=_evaluations(experiment, program),
        schedules=program.schedules,
        settings=settings,
        checkpointer=checkpointer,
        writer=writer,
        progress=progress,
        workdir=workdir,
        counters=lambda: {"data/skipped_images": float(iterator.num_skipped)},
      )
      batches = itertools.chain(taken, iterator)
      del taken  # chain frees each batch after its use
      if options.overfit_one_batch:
        batches = itertools.repeat(first)
      put = functools.partial(sharding.to_global, mesh=experiment.mesh)
      outcome = loop.run(state, prefetch(batches, put))
      iterator.log_skipped()
      return outcome


def _initial_state(
  experiment: Experiment,
  program: Program,
  checkpointer: Checkpointer,
  first: Any,
  iterator: Iterator[Any],
) -> tuple[TrainState, list[Any]]:
  """Returns the restored or the initial state, and the batches that were read, for the training."""
  state, taken = checkpointer.restore(program.abstract_state), [first]
  if state is not None:
    logging.info("resumed at step %d from %s", int(state.step), checkpointer.workdir)
    return state, taken
  config, preview = experiment.config, itertools.chain([first], _recorded(iterator, taken))
  initializer = Initializer(experiment.task, config.init_from, preview, _grid(experiment, program))
  return program.initial_state(config.seed, pretrain=initializer), taken


def _recorded(batches: Iterator[Any], taken: list[Any]) -> Iterator[Any]:
  """Yields batches and appends each to `taken`."""
  for batch in batches:
    taken.append(batch)
    yield batch


def _evaluate_only(experiment: Experiment, checkpointer: Checkpointer) -> Outcome:
  """Evaluates the variables of the last checkpoint, else those of `init_from`."""
  program = experiment.evaluation_program()
  step = checkpointer.latest_step
  if step is None:
    init_from, grid = experiment.config.init_from, _grid(experiment, program)
    initializer = Initializer(experiment.task, init_from, _preview(experiment), grid)
    variables = program.initial_variables(experiment.config.seed, pretrain=initializer)
  else:
    logging.info("evaluating step %d of %s", step, checkpointer.workdir)
    variables = restore_variables(
      checkpointer.workdir / CHECKPOINTS / str(step),
      program.abstract_variables,
      left_out=program.left_out,
    )
  params = variables["params"]
  others = {name: tree for name, tree in variables.items() if name != "params"}
  state = TrainState(step or 0, params, others, opt_state=(), ema=None, rng=None)
  return _evaluate(state, _evaluations(experiment, program), checkpointer.workdir)


def _evaluate(
  state: TrainState, evaluations: Mapping[str, Evaluation], workdir: epath.Path
) -> Outcome:
  """Evaluates a state that is not trained any further; the log is unchanged."""
  report = run_evaluations(evaluations, state.variables)
  if is_primary():
    save_figures(workdir, int(state.step), report.figures)
  return Outcome(state, finished=True, scores=report.scores, workdir=workdir)


def _preview(experiment: Experiment) -> Iterator[dict[str, np.ndarray]]:
  """Yields training batches; opens the data when the first is needed."""
  with contextlib.closing(experiment.train_batches()) as batches:
    yield from batches


def _grid(experiment: Experiment, program: EvaluationProgram) -> tuple[int, int] | None:
  """Returns the height and width of the images in tokens, for models with `token_grid`."""
  token_grid = getattr(experiment.model, "token_grid", None)
  if token_grid is None or "image" not in program.abstract_batch:
    return None
  return token_grid(program.abstract_batch["image"].shape[1:3])


def _evaluations(experiment: Experiment, program: EvaluationProgram) -> dict[str, Evaluation]:
  found = {name: _evaluation(experiment, program, name) for name in experiment.eval_sources}
  if experiment.config.explain and found:
    found["explain"] = Explanations(
      task=experiment.task,
      explain_step=program.explain_step,
      batches=functools.partial(experiment.eval_batches, next(iter(found))),
      mesh=experiment.mesh,
    )
  return found


def _evaluation(experiment: Experiment, program: EvaluationProgram, name: str) -> Evaluation:
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
    metrics=experiment.config.data.eval[name].get("metrics", ()),
  )


def _loop_settings(experiment: Experiment, options: RunOptions, step: int) -> LoopSettings:
  config = experiment.config
  first = main_evaluation(config.data.eval.to_dict())
  settings = LoopSettings(
    num_steps=experiment.num_steps,
    log_every=config.log_every,
    eval_every=config.eval_every,
    checkpoint_every=config.checkpoint.every,
    eval_best_at_end=config.checkpoint.eval_best_at_end,
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
