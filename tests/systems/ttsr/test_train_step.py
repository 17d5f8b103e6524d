"""The alternating train step on two scalars: update order, precomputed outputs, `begin_step`."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from tests.training import toy
from vit_jax_zoo.systems.ttsr.task import make_train_step
from vit_jax_zoo.tasks import base
from vit_jax_zoo.tasks.base import LossOutput, Mean, OptimGroup, Task
from vit_jax_zoo.training import sharding
from vit_jax_zoo.training.train_step import TrainingOptions, abstract_batch_of, build_program


@dataclasses.dataclass(frozen=True)
class TwoScalars(Task):
  """The critic moves towards 3, then the actor towards the critic."""

  critic_updates: int = 2
  actor_begins: int = 0

  @property
  def optim_groups(self):
    actor = OptimGroup("actor", begin_step=self.actor_begins)
    return (OptimGroup("critic", updates=self.critic_updates), actor)

  @property
  def best_metric(self):
    return "score"

  def init(self, rng, batch):
    zero = {"at": jnp.zeros(())}
    return {"params": {"critic": zero, "actor": zero}, "constants": {"goal": jnp.float32(3.0)}}

  def make_train_step(self, optimizers, **options):
    return make_train_step(self, optimizers, **options)

  def precompute(self, variables, batch, context):
    return None

  def loss(self, variables, batch, context):
    params = variables["params"]
    goals = {"critic": variables["constants"]["goal"], "actor": params["critic"]["at"]}
    distance = (params[context.optim_group]["at"] - goals[context.optim_group]) ** 2
    fraction = base.example_mask(batch).sum() / context.normalizers["examples"]
    metrics = {f"{context.optim_group}_loss": Mean.of(distance)}
    return LossOutput(distance * fraction, metrics, {"constants": variables["constants"]})

  def predict(self, variables, batch):
    return {}

  def evaluator(self):
    return toy.SquaredError()


def train(num_steps, kind=TwoScalars, **kwargs):
  task, batch = kind(**kwargs), toy.batches(1)[0]
  sgd = {"name": "sgd", "learning_rate": 0.25}
  program = build_program(
    task,
    abstract_batch_of(batch, len(batch["x"])),
    TrainingOptions({"critic": sgd, "actor": sgd}, num_steps=100, accumulation_steps=2),
    mesh=sharding.create_mesh({"data": 1}, jax.devices()[:1]),
    rules=toy.RULES,
  )
  with jax.set_mesh(program.mesh):
    state, history = program.initial_state(seed=0), []
    for _ in range(num_steps):
      state, metrics = program.train_step(state, sharding.to_global(batch, program.mesh))
      at = {name: float(params["at"]) for name, params in state.params.items()}
      history.append((at, {k: float(m.count) for k, m in metrics.items()}))
  return history


def test_optim_groups_are_updated_in_order():
  # The critic halves its distance to 3 twice in each step; then the actor moves half-way to it.
  (first, counts), (second, _) = train(2)
  assert first == {"critic": 2.25, "actor": 1.125}
  assert second == {"critic": pytest.approx(2.8125), "actor": pytest.approx(1.96875)}
  assert counts["critic_loss"] == 2  # one for each micro-batch of its last update
  assert {"critic_gradient_norm", "actor_gradient_norm"} <= counts.keys()


class Precomputing(TwoScalars):
  """Precomputes goals and examples, which equal those in the loss if there is one micro-batch."""

  traced: ClassVar[list[str]] = []

  def precompute(self, variables, batch, context):
    self.traced.append(context.optim_group)
    goals = {"critic": variables["constants"]["goal"], "actor": variables["params"]["critic"]["at"]}
    goal = jnp.full(len(batch["x"]), goals[context.optim_group])
    return {"goal": goal, "x": batch["x"] + 1}

  def loss(self, variables, batch, context):
    output = super().loss(variables, batch, context)
    shift = jnp.sum(context.precomputed["x"] - 1 - batch["x"])
    goal = context.precomputed["goal"][0] + shift
    distance = (variables["params"][context.optim_group]["at"] - goal) ** 2
    fraction = base.example_mask(batch).sum() / context.normalizers["examples"]
    return dataclasses.replace(output, loss=distance * fraction)


def test_precomputed_outputs_are_shared_by_updates():
  history = [at for at, _ in train(2, Precomputing)]
  for at, (expected, _) in zip(history, train(2), strict=True):
    assert at == pytest.approx(expected, abs=1e-5)
  traces = Precomputing.traced.count("actor")  # one update per step
  assert traces
  assert Precomputing.traced.count("critic") == traces


def test_optim_group_is_constant_before_begin_step():
  history = train(3, actor_begins=2)
  assert [at["actor"] for at, _ in history[:2]] == [0.0, 0.0]
  assert history[2][0]["actor"] > 0
  assert history[0][1]["actor_loss"] == 0  # count 0: the loop logs nothing
  assert history[2][1]["actor_loss"] == 2
