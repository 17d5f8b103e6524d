"""The train state: everything a run needs to go on from where it is."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from vit_jax_zoo.tasks.base import Player, Task, Variables
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.optim import Optimizer


@struct.dataclass
class TrainState:
  """What a training step takes and returns; all of it, and nothing else, is checkpointed.

  The position in the training data is not here: it is a function of `step`. The fields are not
  typed as arrays: trees of shapes, shardings and specs take the same form.

  Attributes:
    step: training steps completed, int32 [].
    params: the parameters, float32.
    model_state: the other variable collections (`batch_stats`, ...).
    opt_state: a tuple with one optimizer state for each of the task's players.
    ema: exponential moving averages of `params` and `model_state` together, as `variables` has
      them, or None.
    rng: data, uint32 [2], of the key from which the key of each step is derived; it never changes.
  """

  step: Any
  params: Any
  model_state: Any
  opt_state: Any
  ema: Any
  rng: Any

  @property
  def variables(self) -> Variables:
    """What to predict with: the averages where there are any, else the latest."""
    return self.latest_variables if self.ema is None else self.ema

  @property
  def latest_variables(self) -> Variables:
    """What the last step left: `params` and the other collections."""
    return {"params": self.params, **self.model_state}


def player_params(params: Any, player: Player) -> Any:
  """Returns the parameters that the player owns."""
  return params if player.name is None else params[player.name]


def with_player_params(params: Any, player: Player, new: Any) -> Any:
  """Returns `params` with the player's own replaced."""
  return new if player.name is None else {**params, player.name: new}


def create_state(
  task: Task,
  optimizers: Sequence[Optimizer],
  variables: Variables,
  rng: jax.Array,
  *,
  with_ema: bool,
) -> TrainState:
  """Returns the state before the first step. Traceable.

  Args:
    task: for its players.
    optimizers: one for each player.
    variables: fresh or pre-trained.
    rng: the key of the run's randomness.
    with_ema: keep an average of the variables, which starts as a copy of them.
  """
  params = variables["params"]
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state={name: value for name, value in variables.items() if name != "params"},
    opt_state=tuple(
      optimizer.init(player_params(params, player))
      for optimizer, player in zip(optimizers, task.players, strict=True)
    ),
    ema=jax.tree.map(jnp.copy, dict(variables)) if with_ema else None,
    rng=jax.random.key_data(rng),
  )


def state_shardings(abstract_state: TrainState, rules: sharding.Rules, mesh: Mesh) -> TrainState:
  """Returns a tree like the state with the sharding of every array."""
  params = abstract_state.params
  specs = sharding.parameter_specs(params, rules, mesh)
  whole = PartitionSpec()
  model_state = jax.tree.map(lambda _: whole, abstract_state.model_state)
  tree = TrainState(
    step=whole,
    params=specs,
    model_state=model_state,
    opt_state=sharding.specs_like_parameters(abstract_state.opt_state, params, specs),
    ema=None if abstract_state.ema is None else {"params": specs, **model_state},
    rng=whole,
  )
  return sharding.named_shardings(tree, mesh)


def variable_shardings(abstract: Variables, rules: sharding.Rules, mesh: Mesh) -> Variables:
  """Returns a tree like the variables with the sharding of every array, as the state has them."""
  others = {name: tree for name, tree in abstract.items() if name != "params"}
  whole = jax.tree.map(lambda _: PartitionSpec(), others)
  specs = sharding.parameter_specs(abstract["params"], rules, mesh)
  return sharding.named_shardings({"params": specs, **whole}, mesh)


def abstract_like(tree: Any, shardings: Any) -> Any:
  """Returns shapes and dtypes of `tree` with their shardings: what a checkpoint restores into."""
  return jax.tree.map(
    lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings
  )
