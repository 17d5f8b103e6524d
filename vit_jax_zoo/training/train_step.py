"""Train state, training step of tasks with one optimizer, and the compiled steps of a run.

Programs are built from shapes: the devices of the mesh need not exist.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jax.sharding import Mesh, PartitionSpec

from vit_jax_zoo.ops.sharding import BATCH_AXES
from vit_jax_zoo.tasks.base import Batch, LossContext, Mean, Predictions, Task, Variables
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.distributed import check_equal_arrays
from vit_jax_zoo.training.optim import Optimizer, create_optimizer
from vit_jax_zoo.training.sharding import Rules

Metrics: TypeAlias = dict[str, Mean]
PredictStep: TypeAlias = Callable[[Variables, Batch], Predictions]
# Random variables, which may be donated then, to initial ones of the same names and shapes.
Pretrain: TypeAlias = Callable[[Variables], Variables]


class TrainState(struct.PyTreeNode):
  """Input and output of a training step, or its shapes, shardings or specs; all is checkpointed."""

  step: Any  # int32 []: training steps completed, and so the position in the training data
  params: Any  # float32
  model_state: Any  # the other variable collections (`batch_stats`, ...)
  opt_state: Any  # a tuple: of each of `Task.optim_groups`
  ema: Any  # moving averages of params and model state, in the form of `variables`; or None
  rng: Any  # uint32 [2]: key data, from which the key of each step is derived; constant

  @property
  def variables(self) -> Variables:
    """The variables for predictions: the averages if there are any, else the latest."""
    return self.latest_variables if self.ema is None else self.ema

  @property
  def latest_variables(self) -> Variables:
    """`params` and the other collections after the last step."""
    return {"params": self.params, **self.model_state}


TrainStep: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def create_state(
  task: Task, optimizers: Sequence[Optimizer], variables: Variables, rng: Any, *, with_ema: bool
) -> TrainState:
  """Returns the state before the first step, with an optimizer for each of the task's groups."""
  params, step = variables["params"], jnp.zeros((), jnp.int32)
  model_state = {name: value for name, value in variables.items() if name != "params"}
  groups = zip(optimizers, task.optim_groups, strict=True)
  opt_state = tuple(optimizer.tx.init(group.select(params)) for optimizer, group in groups)
  ema = jax.tree.map(jnp.copy, dict(variables)) if with_ema else None
  return TrainState(step, params, model_state, opt_state, ema, rng=jax.random.key_data(rng))


def make_train_step(
  task: Task, optimizer: Optimizer, *, accumulation_steps: int = 1, ema_decay: float | None = None
) -> TrainStep:
  """Returns `train_step(state, batch) -> (state, metrics)`, not yet compiled."""

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    normalizers = task.normalizers(batch)

    def loss_fn(params: Any, model_state: Any, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
      variables = {"params": optimizer.stop_frozen(params), **model_state}
      output = task.loss(variables, batch, LossContext(rng, state.step, normalizers))
      return output.loss, output

    grad_fn = accumulate(jax.value_and_grad(loss_fn, has_aux=True), accumulation_steps)
    (_, output), grads = grad_fn(state.params, state.model_state, batch, update_rng(state))
    updates, opt_state = optimizer.tx.update(grads, state.opt_state[0], state.params)
    params = optax.apply_updates(state.params, updates)

    state = state.replace(
      step=state.step + 1, params=params, model_state=output.model_state, opt_state=(opt_state,)
    )
    metrics = {**output.metrics, "gradient_norm": Mean.of(optax.tree.norm(grads))}
    return update_ema(state, ema_decay), metrics

  return train_step


def update_rng(state: TrainState, group: int = 0, update: int = 0) -> jax.Array:
  """Returns the random key of one update of one of the task's `optim_groups` in this step."""
  rng = jax.random.wrap_key_data(state.rng)
  for number in (state.step, group, update):
    rng = jax.random.fold_in(rng, number)
  return rng


def accumulate(grad_fn: Callable[..., Any], num_micro_batches: int) -> Callable[..., Any]:
  """Sums gradients, losses and metrics over micro-batches, in a scan.

  Losses are divided by the normalizers of the whole batch, so that the sum is its gradient.
  `grad_fn` is `(params, model_state, batch, rng) -> ((loss, LossOutput), grads)`.
  """
  if num_micro_batches == 1:
    return grad_fn

  def accumulated(params: Any, model_state: Any, batch: Any, rng: jax.Array) -> Any:
    def add(carry: tuple[Any, Any], x: tuple[Any, Any]) -> tuple[tuple[Any, Any], Any]:
      (grads, model_state), (index, micro_batch) = carry, x
      (_, output), more = grad_fn(params, model_state, micro_batch, jax.random.fold_in(rng, index))
      grads = jax.tree.map(jnp.add, grads, more)
      return (grads, output.model_state), dataclasses.replace(output, model_state=None)

    indices, parts = jnp.arange(num_micro_batches), split_batch(batch, num_micro_batches)
    start = jax.tree.map(jnp.zeros_like, params), model_state
    (grads, model_state), outputs = jax.lax.scan(add, start, (indices, parts))
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), outputs)
    output = dataclasses.replace(total, model_state=model_state)
    return (output.loss, output), grads

  return accumulated


def split_batch(batch: Any, count: int) -> Any:
  """Splits `[b ...]` into `[count b/count ...]`, each micro-batch spread over all devices.

  Micro-batch i takes examples i, i + count, ...: no example moves to another device.
  """

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    if set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
      x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, BATCH_AXES))
    return x

  return jax.tree.map(split, batch)


def update_ema(state: TrainState, decay: float | None) -> TrainState:
  """Updates the averages of all variables, BatchNorm's statistics too; None: no averages."""
  if decay is None:
    return state

  def average(past: jax.Array, latest: jax.Array) -> jax.Array:
    if not jnp.issubdtype(latest.dtype, jnp.floating):
      return latest
    # Constant arrays keep their bits over any number of steps.
    return jnp.where(latest == past, latest, past + (1.0 - decay) * (latest - past))

  return state.replace(ema=jax.tree.map(average, state.ema, state.latest_variables))


@dataclasses.dataclass(frozen=True)
class EvaluationProgram:
  """The jitted steps of evaluations, with shapes, dtypes and shardings of their arguments."""

  task: Task
  mesh: Mesh
  init: Callable[[jax.Array], Variables]  # jitted, so that it is traced once
  abstract_batch: Batch  # the global batch for which variables are initialised
  abstract_variables: Variables
  predict_step: PredictStep
  features_step: PredictStep
  explain_step: PredictStep  # with replicated results

  def initial_variables(self, seed: int, pretrain: Pretrain | None = None) -> Variables:
    """Returns the variables before the first step, each device with its own shards."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_variables)
    # Unoptimized on CPUs, where small models need more time to compile than to draw their weights.
    on_cpu = self.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    init = jax.jit(self.init, out_shardings=shardings, compiler_options=options)
    variables = init(jax.random.split(jax.random.key(seed))[0])
    if pretrain is None:
      return variables
    loaded = pretrain(variables)
    check_equal_arrays(loaded)  # before sharding, after which processes may have different parts
    return jax.tree.map(_place, self.abstract_variables, variables, loaded)


@dataclasses.dataclass(frozen=True)
class Program(EvaluationProgram):
  """The steps of a training run; `train_step` donates its state."""

  optimizers: tuple[Optimizer, ...]  # one for each of the task's `optim_groups`
  abstract_state: TrainState
  train_step: Any

  @property
  def schedules(self) -> dict[str, Callable[[int], Any]]:
    """The learning rates as functions of the step, by the name of their metric."""
    return {
      f"{group.name}_learning_rate" if group.name else "learning_rate": optimizer.schedule
      for group, optimizer in zip(self.task.optim_groups, self.optimizers, strict=True)
    }

  def initial_state(self, seed: int, pretrain: Pretrain | None = None) -> TrainState:
    """Returns the state before the first step; see `initial_variables`."""
    variables = self.initial_variables(seed, pretrain)
    train_rng = jax.random.split(jax.random.key(seed))[1]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
    with_ema = self.abstract_state.ema is not None
    create = functools.partial(create_state, self.task, self.optimizers, with_ema=with_ema)
    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(variables, train_rng)


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
  """Optimizer, schedule, accumulation and EMA of a training run; see `make_train_step`."""

  optimizer: Mapping[str, Any]  # see `create_optimizer`; or by name of the optimizer group
  num_steps: int  # the length that the schedules span
  accumulation_steps: int = 1
  ema_decay: float | None = None


def build_program(
  task: Task, abstract_batch: Batch, options: TrainingOptions, *, mesh: Mesh, rules: Rules
) -> Program:
  """Returns the steps of a training run, for a global batch of this shape, or raises ValueError."""
  batch_size = jax.tree.leaves(abstract_batch)[0].shape[0]
  sharding.check_batch_size(batch_size, mesh, options.accumulation_steps)
  evaluation = build_evaluation(task, abstract_batch, mesh=mesh, rules=rules)
  abstract = evaluation.abstract_variables
  optimizers: tuple[Optimizer, ...] = ()
  for group in task.optim_groups:
    config = options.optimizer if group.name is None else options.optimizer[group.name]
    params, steps = group.select(abstract["params"]), options.num_steps
    optimizers += (
      create_optimizer(config, params, steps, begin_step=group.begin_step, updates=group.updates),
    )
  create = functools.partial(create_state, task, optimizers, with_ema=options.ema_decay is not None)
  abstract_state = jax.eval_shape(create, abstract, jax.random.key(0))
  shardings = state_shardings(abstract_state, rules, mesh)
  inputs = shardings, sharding.batch_sharding(mesh)
  outputs = shardings, sharding.replicated(mesh)
  arguments = {"accumulation_steps": options.accumulation_steps, "ema_decay": options.ema_decay}
  if (train_step := task.make_train_step(optimizers, **arguments)) is None:
    train_step = make_train_step(task, optimizers[0], **arguments)
  return Program(
    **vars(evaluation),
    optimizers=optimizers,
    abstract_state=abstract_like(abstract_state, shardings),
    train_step=jax.jit(train_step, in_shardings=inputs, out_shardings=outputs, donate_argnums=0),
  )


def build_evaluation(
  task: Task, abstract_batch: Batch, *, mesh: Mesh, rules: Rules, left_out: tuple[str, ...] = ()
) -> EvaluationProgram:
  """Returns the steps of evaluations, for a global batch of training or of an evaluation."""

  @jax.jit
  def init(rng: jax.Array) -> Variables:
    zeros = {key: jnp.zeros(leaf.shape, leaf.dtype) for key, leaf in abstract_batch.items()}
    variables = task.init(rng, zeros)
    if not left_out:
      return variables
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    left = tuple(f"{part}/" for part in left_out)
    kept = {path: leaf for path, leaf in flat.items() if not path.startswith(left)}
    return traverse_util.unflatten_dict(kept, sep="/")

  key = jax.random.key(0)  # not on the mesh, whose devices may be simulated
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(init, key)
  specs = jax.tree.map(lambda _: PartitionSpec(), dict(abstract))
  specs["params"] = sharding.parameter_specs(abstract["params"], rules, mesh)
  variables = sharding.named_shardings(specs, mesh)
  split, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  return EvaluationProgram(
    task=task,
    mesh=mesh,
    init=init,
    abstract_batch=abstract_like(dict(abstract_batch), dict.fromkeys(abstract_batch, split)),
    abstract_variables=abstract_like(abstract, variables),
    predict_step=compile_predict_step(task.predict, variables, mesh),
    features_step=compile_predict_step(task.features, variables, mesh),
    explain_step=jax.jit(task.explain, in_shardings=(variables, split), out_shardings=replicated),
  )


def compile_predict_step(predict_step: PredictStep, shardings: Any, mesh: Mesh) -> PredictStep:
  """Compiles a predict step: variables with `shardings`, batches and predictions by example."""
  split = sharding.batch_sharding(mesh)
  return jax.jit(predict_step, in_shardings=(shardings, split), out_shardings=split)


def state_shardings(abstract_state: TrainState, rules: Rules, mesh: Mesh) -> TrainState:
  """Returns the sharding of every array of a state."""
  params, replicated = abstract_state.params, PartitionSpec()
  specs = sharding.parameter_specs(params, rules, mesh)
  model_state = jax.tree.map(lambda _: replicated, abstract_state.model_state)
  opt_state = sharding.specs_like_parameters(abstract_state.opt_state, params, specs)
  ema = None if abstract_state.ema is None else {"params": specs, **model_state}
  tree = TrainState(replicated, specs, model_state, opt_state, ema, rng=replicated)
  return sharding.named_shardings(tree, mesh)


def abstract_like(tree: Any, shardings: Any) -> Any:
  """Returns shapes and dtypes of `tree` with their shardings: the target of a restore."""
  return jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings
  )


def abstract_batch_of(batch: Mapping[str, Any], batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a global batch, from a process's part of it."""
  return {k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype) for k, v in batch.items()}


def _place(target: jax.ShapeDtypeStruct, fresh: jax.Array, value: Any) -> jax.Array:
  if value is fresh:
    return fresh
  if np.shape(value) != target.shape:
    raise ValueError(f"initial variable: shape {np.shape(value)}; expected {target.shape}")
  if isinstance(value, jax.Array):  # a copy: the state is donated
    return jax.device_put(value.astype(target.dtype), target.sharding, may_alias=False)
  array = np.asarray(value, target.dtype)
  return jax.make_array_from_callback(array.shape, target.sharding, lambda index: array[index])
