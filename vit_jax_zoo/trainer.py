"""From a config to a run: makes its parts and its program, and lets the loop go.

Where a run starts: at its own last checkpoint; else from `config.init_from`; else from scratch,
with what the task learns from the data beforehand.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from vit_jax_zoo.builder import Experiment as Experiment
from vit_jax_zoo.builder import create as create
from vit_jax_zoo.initialization import Start, check_files
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.run_metadata import (
  check_config_unchanged,
  main_evaluation,
  recall_data,
  remember_config,
  remember_data,
)
from vit_jax_zoo.run_summary import introduce
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.checkpoint import CHECKPOINTS, Checkpointer, restore_variables
from vit_jax_zoo.training.compiled_steps import EvaluationProgram, Program
from vit_jax_zoo.training.distributed import is_primary
from vit_jax_zoo.training.evaluate import Evaluation, Explanations, PredictionScores
from vit_jax_zoo.training.feature_evaluation import FeatureEvaluation
from vit_jax_zoo.training.loop import Loop, LoopSettings, Outcome, prefetch, run_evaluations
from vit_jax_zoo.training.metric_writer import MetricWriter, save_figures
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """What a command line may ask of a run beside its config.

  Attributes:
    evaluate_only: score the last checkpoint (or `init_from`) and train nothing; training data are
      read only if the config leaves fields, or `init_from` leaves variables, to them.
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
  recalled = recall_data(workdir) if options.evaluate_only else None
  experiment = create(config, recalled=recalled)
  checkpoints = functools.partial(
    Checkpointer,
    workdir,
    keep=experiment.config.checkpoint.keep,
    best_mode=experiment.config.checkpoint.best_mode,
    read_only=options.evaluate_only,
  )
  with jax.set_mesh(experiment.mesh), checkpoints() as checkpointer:
    if checkpointer.latest_step is None:
      if options.evaluate_only and not experiment.config.init_from:
        raise FileNotFoundError(
          f"nothing to evaluate: no checkpoint in {workdir}, and no init_from"
        )
    elif not options.allow_config_change:
      check_config_unchanged(experiment.config, workdir)
    if options.evaluate_only:
      program = experiment.evaluation_program()
      state = _state_to_judge(experiment, program, checkpointer)
      return _judge(state, _evaluations(experiment, program), workdir)
    return _train(experiment, options, checkpointer, workdir)


def _train(
  experiment: Experiment, options: RunOptions, checkpointer: Checkpointer, workdir: epath.Path
) -> Outcome:
  """Goes on from the last checkpoint, or begins; only scores a run that is complete."""
  if checkpointer.latest_step is None and not experiment.config.init_from:
    check_files(experiment.task)  # else only the variables tell what is needed besides
  with experiment.train_batches() as batches:
    first_batch = next(batches)
  program = experiment.program(first_batch)
  state = _starting_state(experiment, program, checkpointer)
  step, evaluations = int(state.step), _evaluations(experiment, program)
  if step >= experiment.num_steps:
    return _judge(state, evaluations, workdir)
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


def _judge(
  state: TrainState, evaluations: Mapping[str, Evaluation], workdir: epath.Path
) -> Outcome:
  """Scores a state that is not trained any further."""
  report = run_evaluations(evaluations, state.variables)
  if is_primary():
    save_figures(workdir, int(state.step), report.figures)
  return Outcome(state, finished=True, scores=report.scores, workdir=workdir)


def _state_to_judge(
  experiment: Experiment, program: EvaluationProgram, checkpointer: Checkpointer
) -> TrainState:
  """Returns a state of variables alone: those of the last checkpoint, else those of `init_from`."""
  step = checkpointer.latest_step
  if step is None:
    start = _start(experiment, program)
    variables = program.initial_variables(experiment.config.seed, pretrain=start)
  else:
    variables = restore_variables(
      checkpointer.workdir / CHECKPOINTS / str(step),
      program.abstract_variables,
      left_out=program.left_out,
    )
  params = variables["params"]
  others = {name: tree for name, tree in variables.items() if name != "params"}
  return TrainState(step or 0, params, others, opt_state=(), ema=None, rng=None)


def _starting_state(
  experiment: Experiment, program: Program, checkpointer: Checkpointer
) -> TrainState:
  """Restores the run's last checkpoint; else starts from `init_from`; else from scratch."""
  state = checkpointer.restore(program.abstract_state)
  if state is not None:
    logging.info("resumed at step %d from %s", int(state.step), checkpointer.workdir)
    return state
  return program.initial_state(experiment.config.seed, pretrain=_start(experiment, program))


def _start(experiment: Experiment, program: EvaluationProgram) -> Start:
  init_from, preview = experiment.config.init_from, _preview(experiment)
  return Start(experiment.task, init_from, preview, _token_grid(experiment, program))


def _token_grid(experiment: Experiment, program: EvaluationProgram) -> tuple[int, int] | None:
  """Returns the height and width of the images in tokens, for models with `token_grid`."""
  token_grid = getattr(experiment.model, "token_grid", None)
  if token_grid is None or "image" not in program.abstract_batch:
    return None
  return token_grid(program.abstract_batch["image"].shape[1:3])


def _preview(experiment: Experiment) -> Iterator[dict[str, np.ndarray]]:
  """Yields the run's training batches; reads nothing before the first is asked for."""
  with contextlib.closing(experiment.train_batches()) as batches:
    yield from batches


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
