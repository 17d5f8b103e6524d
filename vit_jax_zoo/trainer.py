"""Trains and evaluates a config: initial state, summary of model and data, evaluations, loop."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from flax import traverse_util
from jaxtyping import Int, Integer
from ml_collections import ConfigDict

from vit_jax_zoo import run_metadata, weights
from vit_jax_zoo.builder import Experiment, best_score_of, build
from vit_jax_zoo.data.sources.base import Source
from vit_jax_zoo.errors import shorten
from vit_jax_zoo.figures.classification import draw_class_balance
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.tasks.base import Task, Variables
from vit_jax_zoo.training import checkpoint, distributed, evaluate, loop, sharding, train_step
from vit_jax_zoo.training.checkpoint import Checkpointer, is_checkpoint, restore_variables
from vit_jax_zoo.training.evaluate import Evaluation
from vit_jax_zoo.training.loop import Loop, LoopSettings, Outcome
from vit_jax_zoo.training.lr_scaling import advise
from vit_jax_zoo.training.metric_writer import MetricWriter, save_figures
from vit_jax_zoo.training.progress import Progress
from vit_jax_zoo.training.train_step import EvaluationProgram, Pretrain, Program, TrainState
from vit_jax_zoo.training.workdir_lock import workdir_lock
from vit_jax_zoo.weights.finetune_init import find_files, still_needed

Counts: TypeAlias = Mapping[str, Integer[np.ndarray, " k"]]  # examples of each class, by split
MAX_LISTED = 12  # of more classes, only the counts of the smallest and largest are logged
IMBALANCED = 10  # ratio of the sizes of the largest and smallest class from which to warn


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """Options of a run that are not part of its config."""

  eval_only: bool = False  # evaluate the last checkpoint, or `init_from`
  overfit_one_batch: bool = False  # train on the first batch only; a correct model can fit it
  profile: tuple[int, int] | None = None  # half-open window of steps to trace
  allow_config_change: bool = False  # resume although the config differs from the run's


def run(config: ConfigDict, workdir: epath.Path, options: RunOptions = RunOptions()) -> Outcome:
  """Trains and evaluates a config; resumes the run in `workdir` if there is one.

  Raises ValueError (invalid config, option or data), FileNotFoundError (no data, nothing to
  evaluate), FloatingPointError (diverged) or LockedError (another run uses `workdir`).
  """
  if options.overfit_one_batch:  # separate from real training
    workdir = workdir / "overfit_one_batch"
  # Before the lock, which differs for --eval_only.
  distributed.check_equal(lambda: _run_settings(workdir, options))
  run_data = run_metadata.load_data(workdir) if options.eval_only else None
  with contextlib.nullcontext() if options.eval_only else workdir_lock(workdir):
    experiment = build(config, run_data=run_data)
    distributed.check_equal(lambda: _experiment_settings(experiment, train=not options.eval_only))
    config = experiment.config
    policy = {"keep": config.checkpoint.keep, "best_mode": config.checkpoint.best_mode}
    with jax.set_mesh(experiment.mesh), Checkpointer(workdir, **policy) as checkpointer:
      if checkpointer.latest_step is not None and not options.allow_config_change:
        info = None if options.eval_only else experiment.train_source.info
        run_metadata.check_unchanged(config, info, workdir)
      if not options.eval_only:
        return _train(experiment, options, checkpointer)
      if checkpointer.latest_step is None and not config.init_from:
        raise FileNotFoundError(f"--eval_only: no checkpoint in {workdir}, and no config.init_from")
      return _evaluate_only(experiment, checkpointer)


def _run_settings(workdir: epath.Path, options: RunOptions) -> dict[str, Any]:
  """Returns the flags and checkpoints, which must be equal on all processes."""
  workdir = checkpoint.absolute(workdir)
  flags = {f"--{name}": value for name, value in dataclasses.asdict(options).items()}
  names = "enable_x64", "numpy_dtype_promotion", "default_matmul_precision", "default_prng_impl"
  flags |= {f"JAX_{name.upper()}": getattr(jax.config, f"jax_{name}") for name in names}
  saved = {
    f"newest step in {folder}, a shared directory": max(checkpoint.steps(folder), default=None)
    for folder in (workdir / checkpoint.CHECKPOINTS, workdir / checkpoint.BEST)
  }
  return flags | {"--workdir": str(workdir), "JAX version": jax.__version__} | saved


def _experiment_settings(experiment: Experiment, *, train: bool) -> dict[str, Any]:
  """Returns the config, datasets and code version, which must be equal on all processes."""
  flat = traverse_util.flatten_dict({"config": run_metadata.as_json(experiment.config)}, sep=".")
  sources = experiment.sources if train else experiment.eval_sources
  data = {f"data of {name!r}": run_metadata.fingerprint(source) for name, source in sources.items()}
  data["code version"] = run_metadata.code_version()
  return {k: json.dumps(v) for k, v in flat.items()} | data


def _train(experiment: Experiment, options: RunOptions, checkpointer: Checkpointer) -> Outcome:
  config, workdir, start = experiment.config, checkpointer.workdir, checkpointer.latest_step or 0
  names = experiment.eval_sources
  if start >= experiment.num_steps and names and loop.is_evaluated(workdir, names, start):
    return _evaluate_only(experiment, checkpointer)
  settings = _loop_settings(experiment, options, start)
  if not start:  # with init_from, the files that are needed depend on its variables
    files = {"init_from": config.init_from} if config.init_from else experiment.task.weight_files
    find_files({k: file for k, file in files.items() if not is_checkpoint(file)})
  with experiment.train_batches(0 if options.overfit_one_batch else start) as iterator:
    first = next(iterator)  # for shapes and figures; then it is trained on
    program = experiment.program(first)
    _check_evaluations(experiment, program)
    state, used = _initial_state(experiment, program, checkpointer, first, iterator)
    if distributed.is_primary():
      run_metadata.save_config(config, workdir)
      run_metadata.save_data(experiment.train_source.info, first, workdir)
    with (
      MetricWriter(workdir, resume_step=start or None, loggers=config.logging) as writer,
      contextlib.closing(_progress(experiment, program, start)) as progress,
    ):
      if not start:
        _summarize(experiment, program, first, writer)
      training = Loop(
        program=program,
        evaluations=_evaluations(experiment, program),
        settings=settings,
        checkpointer=checkpointer,
        writer=writer,
        progress=progress,
        counters=lambda: {"data/skipped_images": float(iterator.num_skipped)},
      )
      batches = itertools.chain(used, iterator)
      del used  # chain frees each batch after its use
      if options.overfit_one_batch:
        batches = itertools.repeat(first)
      put = functools.partial(sharding.to_global, mesh=experiment.mesh)
      outcome = training.run(state, loop.prefetch(batches, put))
      iterator.log_skipped()
      return outcome


def _check_evaluations(experiment: Experiment, program: EvaluationProgram) -> None:
  """Raises if files of an evaluation are missing, or its first example does not fit the model."""
  pairs = [(name, False) for name in experiment.eval_sources]
  for name, to_fit in [*pairs, *((name, True) for name in experiment.fit_sources)]:
    batches = experiment.eval_batches(name, to_fit=to_fit)
    batch = train_step.abstract_batch_of(batches.one_example(), experiment.eval_batch_size)
    split = sharding.batch_sharding(experiment.mesh)  # without it, the evaluation would trace again
    batch = train_step.abstract_like(batch, dict.fromkeys(batch, split))
    step = program.features_step if name in experiment.fit_sources else program.predict_step
    try:
      jax.eval_shape(step, program.abstract_variables, batch)  # kept for the evaluation
    except Exception as error:
      reason = shorten(f"{type(error).__name__}: {error}".splitlines()[0], 200)
      sizes = [b["image"].shape[1:3] for b in (batch, program.abstract_batch) if "image" in b]
      problem = ": batches do not fit the model; expected keys and shapes of training batches"
      if len(set(sizes)) == 2:
        problem = f".transforms: images of {sizes[0]}; expected {sizes[1]}"
      raise ValueError(f"data.eval.{name}{problem} ({reason})") from error


def _initial_state(
  experiment: Experiment, program: Program, checkpointer: Checkpointer, first: Any, rest: Iterator
) -> tuple[TrainState, list[Any]]:
  """Returns the restored or initial state, and the batches used for it, which are trained on."""
  state, used = checkpointer.restore(program.abstract_state), [first]
  if state is not None:
    distributed.check_equal_arrays(state.latest_variables)
    logging.info("resumed at step %d from %s", int(state.step), checkpointer.workdir)
    return state, used

  def preview() -> Iterator[Any]:
    yield first
    for batch in rest:
      used.append(batch)
      yield batch

  initializer = _initializer(experiment, program, preview())
  return program.initial_state(experiment.config.seed, pretrain=initializer), used


def _initializer(experiment: Experiment, program: EvaluationProgram, preview: Iterable) -> Pretrain:
  grid, token_grid = None, getattr(experiment.model, "token_grid", None)
  if token_grid is not None and "image" in program.abstract_batch:
    grid = token_grid(program.abstract_batch["image"].shape[1:3])
  init_from = experiment.config.init_from
  return lambda fresh: pretrained_variables(fresh, experiment.task, init_from, preview, grid)


def pretrained_variables(
  fresh: Variables,
  task: Task,
  init_from: str | None,
  preview: Iterable[Mapping[str, Any]],
  grid: tuple[int, int] | None = None,
) -> Variables:
  """Returns variables of `init_from`, else of pretrained files and data, else the `fresh` ones.

  `preview` are this process's training batches, read if needed; `grid` is the image size in tokens.
  """
  loaded = fresh
  if init_from:
    logging.info("initialising from %s", init_from)
  if init_from and is_checkpoint(init_from):
    run, optional = restore_variables(init_from), task.train_only_collections
    loaded = weights.fit_to_model(run, fresh, init_from, grid=grid, optional=optional)
  elif init_from:
    loaded = weights.load_into(init_from, fresh, position_grid=grid)
  before, after = (traverse_util.flatten_dict(dict(x), sep="/") for x in (fresh, loaded))
  if not (missing := [path for path, leaf in after.items() if leaf is before[path]]):
    return loaded
  from_data = distributed.all_gather_objects(task.init_from_data(preview))[0]
  files = still_needed(task.weight_files, missing)
  sources = {k: restore_variables(f) if is_checkpoint(f) else f for k, f in files.items()}
  others = weights.load_parts(sources, {**fresh, **from_data})
  return jax.tree.map(lambda a, b, other: other if a is b else a, loaded, fresh, others)


def _evaluate_only(experiment: Experiment, checkpointer: Checkpointer) -> Outcome:
  program = experiment.evaluation_program()
  if (step := checkpointer.latest_step) is None:
    initializer = _initializer(experiment, program, _preview(experiment))
    variables = program.initial_variables(experiment.config.seed, pretrain=initializer)
  else:
    logging.info("evaluating step %d of %s", step, checkpointer.workdir)
    path = checkpointer.workdir / checkpoint.CHECKPOINTS / str(step)
    unused = experiment.task.train_only_collections
    variables = restore_variables(path, program.abstract_variables, left_out=unused)
    distributed.check_equal_arrays(variables)
  others = {name: tree for name, tree in variables.items() if name != "params"}
  state = TrainState(step or 0, variables["params"], others, opt_state=(), ema=None, rng=None)
  report = loop.run_evaluations(_evaluations(experiment, program), state.variables)
  if distributed.is_primary():  # not written to the log
    save_figures(checkpointer.workdir, step or 0, report.figures)
  return Outcome(state, True, report.scores, checkpointer.workdir)


def _preview(experiment: Experiment) -> Iterator[Any]:
  with contextlib.closing(experiment.train_batches()) as batches:
    yield from batches


def _evaluations(experiment: Experiment, program: EvaluationProgram) -> dict[str, Evaluation]:
  evaluations: dict[str, Evaluation] = {}
  for name in experiment.eval_sources:
    batches = functools.partial(experiment.eval_batches, name)
    if name in experiment.fit_sources:
      run = functools.partial(evaluate.probe_features, probe=experiment.probes[name])
    else:
      metrics = experiment.config.data.eval[name].get("metrics", ())
      run = functools.partial(evaluate.score_predictions, metrics=metrics)
    evaluations[name] = functools.partial(run, program=program, batches=batches, name=name)
  if experiment.config.explain and evaluations:
    batch = experiment.eval_batches(next(iter(evaluations))).first_batch
    evaluations["explain"] = functools.partial(evaluate.explain, program=program, load_batch=batch)
  return evaluations


def _loop_settings(experiment: Experiment, options: RunOptions, step: int) -> LoopSettings:
  config, profile, last = experiment.config, options.profile, experiment.num_steps
  if profile is not None and not step < profile[0] <= last:
    expected = f"expected steps of this run, {step + 1} to {last}"
    raise ValueError(f"--profile={profile[0]}:{profile[1]}: outside of the run; {expected}")
  sizes = map(len, (*experiment.eval_sources.values(), *experiment.fit_sources.values()))
  return LoopSettings(
    num_steps=last,
    log_every=config.log_every,
    eval_every=config.eval_every,
    checkpoint_every=config.checkpoint.every,
    best=best_score_of(config, experiment.task),
    eval_best_at_end=config.checkpoint.eval_best_at_end,
    profile=profile,
    # So that evaluations, their figures and checkpoints cost less than training on few images.
    min_interval=max(16, 3 * sum(math.ceil(size / experiment.eval_batch_size) for size in sizes)),
  )


def _progress(experiment: Experiment, program: Program, step: int) -> Progress:
  return Progress(
    experiment.num_steps,
    experiment.config.batch_size,
    start_step=step,
    num_examples=experiment.train_source.info.num_examples,
    flops_per_step=count_flops(program.train_step, program.abstract_state, program.abstract_batch),
    devices=list(experiment.mesh.devices.flat),
  )


def _summarize(experiment: Experiment, program: Program, batch: Any, writer: MetricWriter) -> None:
  """Logs a new run's model and data; writes config and figures. `batch` is its first one."""
  config, sources = experiment.config, experiment.sources
  params = program.abstract_state.params
  table = parameter_overview.get_parameter_overview(params, include_stats=False)
  logging.info("parameters:\n%s", table)
  if not distributed.is_primary():
    return
  for level, text in advise(config.to_dict()):
    logging.log(level, text)
  writer.write_config(run_metadata.as_json(config))
  figures = {f"train_{k}": v for k, v in program.task.batch_figures(batch).items()}
  info, counts = sources["train"].info, count_classes(sources)
  for line in describe_balance(counts, info.class_names):
    logging.info(line)
  for line in [*program.task.check_data(info), *find_imbalance(counts, info.class_names)]:
    logging.warning(line)
  if counts:
    figures["class_balance"] = draw_class_balance(counts, info.class_names)
  writer.write_figures(0, figures)


def count_classes(sources: Mapping[str, Source]) -> dict[str, Int[np.ndarray, " k"]]:
  """Returns the number of examples of each class, for sources with labels in their index."""
  counts = {}
  for name, source in sources.items():
    labels, classes = source.labels(), source.info.num_classes
    if labels is not None and classes:
      counts[name] = np.bincount(labels, minlength=classes)
  return counts


def describe_balance(counts: Counts, class_names: Sequence[str]) -> list[str]:
  """Returns a line for each split with its number of examples by class.

  >>> describe_balance({"train": np.array([3, 4])}, ("ant", "bee"))
  ['train: 7 examples of 2 classes: ant 3, bee 4']
  """
  lines = []
  for split, values in counts.items():
    named = [f"{_name(i, class_names)} {count}" for i, count in enumerate(values)]
    if len(named) > MAX_LISTED:
      order = np.argsort(values, kind="stable")
      named = [*(named[i] for i in order[:3]), "...", *(named[i] for i in order[-3:])]
    total = int(np.sum(values))
    lines.append(f"{split}: {total} examples of {len(values)} classes: {', '.join(named)}")
  return lines


def find_imbalance(counts: Counts, class_names: Sequence[str]) -> list[str]:
  """Returns warnings about empty classes and class imbalance of the training data."""
  if (values := counts.get("train")) is None:
    return []
  if len(values) == 1:
    return [f"only one class found ({_name(0, class_names)}); put each class in its own folder"]
  if empty := [_name(i, class_names) for i, count in enumerate(values) if not count]:
    listed = ", ".join(empty[:MAX_LISTED]) + (", ..." if len(empty) > MAX_LISTED else "")
    return [f"classes without training images ({len(empty)}): {listed}"]
  smallest, largest = int(np.argmin(values)), int(np.argmax(values))
  if values[largest] < IMBALANCED * values[smallest]:
    return []
  return [
    f"class imbalance: {_name(largest, class_names)} has {values[largest]} training images, "
    f"{_name(smallest, class_names)} {values[smallest]}; report mean_class_accuracy"
  ]


def _name(index: int, class_names: Sequence[str]) -> str:
  return class_names[index] if class_names else f"class {index}"
