"""From a config to a run: opens the data, makes model, task and program, and lets the loop go.

This is the one place that knows all the parts. What it adds of its own:

* a field of `config.model` or `config.task` that is None takes its value from the training data's
  `DatasetInfo` where that has a field of the same name (`num_classes`, `class_names`);
* where a run starts: at its own last checkpoint; else from `config.init_from`; else from scratch.
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax_zoo.data import pipeline
from vit_jax_zoo.data.base import DatasetInfo, Source
from vit_jax_zoo.data.sources import load_source
from vit_jax_zoo.data.transforms import build_transforms
from vit_jax_zoo.models.registry import create_model
from vit_jax_zoo.ops.flops import count_flops
from vit_jax_zoo.ops.names import unknown_name
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.tasks.base import Task
from vit_jax_zoo.train import sharding
from vit_jax_zoo.train.checkpoint import Checkpointer
from vit_jax_zoo.train.distributed import is_primary
from vit_jax_zoo.train.evaluate import PredictionScores
from vit_jax_zoo.train.loop import Loop, LoopSettings, Outcome, prefetch, run_evaluations
from vit_jax_zoo.train.metric_writer import MetricWriter
from vit_jax_zoo.train.program import Program, abstract_batch_of, build_program
from vit_jax_zoo.train.progress import Progress
from vit_jax_zoo.train.state import TrainState

DEFAULTS = ConfigDict(
  {
    "seed": 0,
    "num_steps": None,
    "num_epochs": None,
    "batch_size": None,
    "eval_batch_size": None,
    "accumulation_steps": 1,
    "model": {},
    "task": {},
    "data": {"train": {}, "eval": {}, "loader": {}},
    "optimizer": {},
    "ema_decay": None,
    "sharding": {"mesh": {"data": -1}, "rules": ()},
    "log_every": 50,
    "eval_every": 0,
    "checkpoint": {"every": 0, "keep": 1, "best": None},
    "init_from": None,
  }
)
"""Every field that a config may have, and what it is when the config does not set it.

batch sizes are global; `num_steps` or `num_epochs` gives the length; `data.loader` goes to both
batch makers of `data.pipeline`; `sharding.rules` come before the model's own; `checkpoint.best` is
"<evaluation>/<score>", by default the first evaluation and the task's best metric.
"""


def complete(config: ConfigDict) -> ConfigDict:
  """Returns the config with every default filled in.

  Raises:
    ValueError: a field is unknown, or a needed one is missing.
  """
  whole = ConfigDict(DEFAULTS.to_dict())
  for key, value in config.items():
    if key not in DEFAULTS:
      raise ValueError(unknown_name("config field", key, DEFAULTS))
    is_section = isinstance(DEFAULTS[key], ConfigDict) and len(DEFAULTS[key])
    if not is_section:
      with whole.ignore_type():
        whole[key] = value
      continue
    for name, entry in value.items():
      if name not in DEFAULTS[key]:
        raise ValueError(unknown_name(f"config field {key}.", name, DEFAULTS[key]))
      with whole.ignore_type():
        whole[key][name] = entry
  for key in ("batch_size", "model", "task", "optimizer"):
    if not whole[key]:
      raise ValueError(f"the config does not set {key!r}")
  if (whole.num_steps is None) == (whole.num_epochs is None):
    raise ValueError("the config must set one of num_steps and num_epochs")
  return whole


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config's live parts, before any of them runs.

  Attributes:
    config: complete.
    mesh: of all devices.
    train_source: the training examples.
    eval_sources: the examples of each evaluation, by its name.
    model: a Linen module.
    task: what it is to learn.
    num_steps: the length of the run.
  """

  config: ConfigDict
  mesh: Mesh
  train_source: Source
  eval_sources: Mapping[str, Source]
  model: Any
  task: Task
  num_steps: int

  @property
  def sharding_rules(self) -> sharding.Rules:
    """The config's rules, then those that stand beside the model."""
    beside_model = sys.modules[type(self.model).__module__].SHARDING_RULES
    return (*self.config.sharding.rules, *beside_model)

  def train_batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
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
      **self.config.data.loader,
    )

  def eval_batches(self, name: str) -> Any:
    """Returns this process's part of the batches of an evaluation, sized."""
    batch_size = self.config.eval_batch_size or self.config.batch_size
    sharding.check_batch_size(batch_size, self.mesh)
    index, count = sharding.input_shard(self.mesh, batch_size)
    return pipeline.eval_batches(
      self.eval_sources[name],
      build_transforms(self.config.data.eval[name].transforms),
      batch_size=batch_size,
      process_index=index,
      process_count=count,
      num_classes=getattr(self.task, "num_classes", None),
      **self.config.data.loader,
    )

  def program(self, batch: Mapping[str, np.ndarray]) -> Program:
    """Returns the run's program for batches like this process's part `batch`."""
    config = self.config
    return build_program(
      self.task,
      abstract_batch_of(batch, config.batch_size),
      mesh=self.mesh,
      rules=self.sharding_rules,
      optimizer=config.optimizer.to_dict(),
      num_steps=self.num_steps,
      accumulation_steps=config.accumulation_steps,
      ema_decay=config.ema_decay,
    )


def create(config: ConfigDict, devices: Any = None) -> Experiment:
  """Makes a config's live parts.

  Raises:
    ValueError: one line, about whatever in the config cannot be.
    FileNotFoundError: one line, about data that is not there.
  """
  config = complete(config)
  mesh = sharding.create_mesh(config.sharding.mesh, devices)
  sharding.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
  train_source = _open(config.data.train)
  eval_sources = {name: _open(spec) for name, spec in config.data.eval.items()}
  model = create_model(**_filled(config.model, train_source.info))
  task_fields = _filled(config.task, train_source.info)
  num_steps = config.num_steps or round(config.num_epochs * len(train_source) / config.batch_size)
  return Experiment(
    config=config,
    mesh=mesh,
    train_source=train_source,
    eval_sources=eval_sources,
    model=model,
    task=create_task(task_fields.pop("name"), model, **task_fields),
    num_steps=max(1, num_steps),
  )


def _open(spec: ConfigDict) -> Source:
  options = {key: spec[key] for key in spec if key not in ("source", "split", "transforms")}
  return load_source(spec.source, spec.split, **options)


def _filled(fields: ConfigDict, info: DatasetInfo) -> dict[str, Any]:
  """Returns the fields, with those that are None and that the data knows taken from the data."""
  return {
    key: getattr(info, key) if value is None and hasattr(info, key) else value
    for key, value in fields.to_dict().items()
  }


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


def run(config: ConfigDict, workdir: epath.Path, options: RunOptions = RunOptions()) -> Outcome:  # noqa: B008 frozen
  """Trains and evaluates what the config says, from wherever the run in `workdir` had come."""
  experiment = create(config)
  remember_config(experiment.config, workdir, allow_change=options.allow_config_change)
  with jax.set_mesh(experiment.mesh):
    first_batch = next(experiment.train_batches())
    program = experiment.program(first_batch)
    checkpointer = Checkpointer(workdir, keep=experiment.config.checkpoint.keep)
    state = _starting_state(experiment, program, checkpointer)
    writer = MetricWriter(workdir, resume_step=int(state.step) or None)
    loop = _make_loop(
      experiment, program, checkpointer, writer, options, workdir, start_step=int(state.step)
    )
    try:
      if options.evaluate_only or int(state.step) == experiment.num_steps:
        report = run_evaluations(loop.evaluations, state.variables)
        return Outcome(state, finished=True, scores=report.scores)
      if int(state.step) == 0:
        _introduce(experiment, program, writer, first_batch)
      return loop.run(state, _global_batches(experiment, int(state.step), first_batch, options))
    finally:
      loop.progress.close()
      checkpointer.close()
      writer.close()


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Returns the config as JSON has it: nested dicts, lists, numbers, strings."""
  return json.loads(config.to_json_best_effort())


def remember_config(config: ConfigDict, workdir: epath.Path, *, allow_change: bool) -> None:
  """Writes the config beside the run, or checks that it is still the one the run began with.

  Raises:
    ValueError: it is another.
  """
  path = workdir / "config.json"
  given = as_json(config)
  if path.exists():
    before = json.loads(path.read_text())
    changed = _differences(before, given)
    if changed and not allow_change:
      raise ValueError(
        f"{workdir} holds a run of another config ({'; '.join(changed[:5])}); name another "
        "--workdir, or add --allow_config_change to go on with the new values"
      )
  if is_primary():
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given, indent=1, sort_keys=True) + "\n")


def _differences(before: Any, after: Any, path: str = "") -> list[str]:
  if isinstance(before, dict) and isinstance(after, dict):
    keys = sorted(before.keys() | after.keys())
    found = (_differences(before.get(k), after.get(k), f"{path}.{k}".lstrip(".")) for k in keys)
    return list(itertools.chain.from_iterable(found))
  return [] if before == after else [f"{path}: {before} -> {after}"]


def _starting_state(
  experiment: Experiment, program: Program, checkpointer: Checkpointer
) -> TrainState:
  """Restores the run's last checkpoint; else starts from `init_from`; else from scratch."""
  state = checkpointer.restore(program.abstract_state)
  if state is not None:
    logging.info("resumed at step %d from %s", int(state.step), checkpointer.workdir)
    return state
  path = experiment.config.init_from
  if not path:
    return program.initial_state(experiment.config.seed)
  from vit_jax_zoo import weights  # noqa: PLC0415 only such runs need readers of other formats

  logging.info("starting from the weights in %s", path)
  return program.initial_state(
    experiment.config.seed, pretrain=functools.partial(weights.load_into, path)
  )


def _make_loop(
  experiment: Experiment,
  program: Program,
  checkpointer: Checkpointer,
  writer: MetricWriter,
  options: RunOptions,
  workdir: epath.Path,
  start_step: int,
) -> Loop:
  config = experiment.config
  names = list(experiment.eval_sources)
  default_best = f"{names[0]}/{experiment.task.best_metric}" if names else None
  flops = count_flops(program.train_step, program.abstract_state, program.abstract_batch)
  return Loop(
    train_step=program.train_step,
    evaluations={
      name: PredictionScores(
        task=experiment.task,
        predict_step=program.predict_step,
        batches=functools.partial(experiment.eval_batches, name),
        mesh=experiment.mesh,
        name=name,
      )
      for name in names
    },
    schedules=program.schedules,
    settings=LoopSettings(
      num_steps=experiment.num_steps,
      log_every=config.log_every,
      eval_every=config.eval_every,
      checkpoint_every=config.checkpoint.every,
      best=config.checkpoint.best or default_best,
      profile=options.profile,
    ),
    checkpointer=checkpointer,
    writer=writer,
    progress=Progress(
      experiment.num_steps,
      config.batch_size,
      start_step=start_step,
      flops_per_step=flops,
      devices=list(experiment.mesh.devices.flat),
    ),
    workdir=workdir,
  )


def _introduce(
  experiment: Experiment, program: Program, writer: MetricWriter, batch: Mapping[str, np.ndarray]
) -> None:
  """Logs what is about to be trained: the parameters, the config, and the first batch's picture."""
  table = parameter_overview.get_parameter_overview(
    program.abstract_state.params, include_stats=False
  )
  logging.info("parameters:\n%s", table)
  if is_primary():
    config = as_json(experiment.config)
    writer.write_text(0, {"config": f"```\n{json.dumps(config, indent=1)}\n```"})
    writer.write_hparams(config)
    writer.write_figures(
      0, {f"train_{k}": v for k, v in experiment.task.batch_figures(batch).items()}
    )


def _global_batches(
  experiment: Experiment, step: int, first_batch: Mapping[str, np.ndarray], options: RunOptions
) -> Iterator[dict[str, jax.Array]]:
  batches: Iterator[Any] = (
    itertools.repeat(first_batch) if options.overfit_one_batch else experiment.train_batches(step)
  )
  return prefetch(batches, functools.partial(sharding.to_global, mesh=experiment.mesh))
