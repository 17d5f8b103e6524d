"""A small regression task and its model, for tests of the loop."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax_zoo.metrics.base import Evaluator
from vit_jax_zoo.ops.sharding import shard_batch
from vit_jax_zoo.tasks.base import LossOutput, Mean, Task


class ToyNet(nn.Module):
  """A dense layer, BatchNorm, and a dense layer."""

  dropout_rate: float = 0.0
  batch_norm: bool = True

  @nn.compact
  def __call__(self, x, *, train=False):
    # No bias before BatchNorm: its gradient is rounding noise, which Adam would scale up.
    x = nn.Dense(32, use_bias=not self.batch_norm, name="wide")(shard_batch(x))
    if self.batch_norm:
      x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
    x = nn.Dropout(self.dropout_rate)(nn.relu(x), deterministic=not train)
    return nn.Dense(1, name="head")(x)[:, 0]


RULES = ((r"wide/kernel", ("fsdp", "model")), (r"head/kernel", ("model", None)), (r".*", "fsdp"))


class SquaredError(Evaluator):
  def __init__(self):
    self.total, self.count = 0.0, 0

  def add(self, batch, predictions):
    mask = np.asarray(batch.get("mask", np.ones(len(batch["x"]), bool)))
    self.total += float(np.sum(((predictions["y"] - batch["y"]) ** 2)[mask]))
    self.count += int(mask.sum())

  def merge(self, other):
    self.total += other.total
    self.count += other.count

  def result(self):
    return {"error": self.total / self.count, "score": -self.total / self.count}


@dataclasses.dataclass(frozen=True)
class Regression(Task):
  """Least squares on `x [b 8]`, `y [b]`."""

  model: Any = dataclasses.field(default_factory=ToyNet)

  @property
  def best_metric(self):
    return "score"

  def init(self, rng, batch):
    return self.model.init(rng, batch["x"])

  def loss(self, variables, batch, context):
    state = {k: v for k, v in variables.items() if k != "params"}
    y, changed = self.model.apply(
      variables, batch["x"], train=True, mutable=list(state), rngs={"dropout": context.rng}
    )
    errors = (y - batch["y"]) ** 2
    loss = jnp.sum(errors) / context.normalizers["examples"]
    return LossOutput(loss, {"loss": Mean.of(errors)}, {**state, **changed})

  def predict(self, variables, batch):
    return {"y": self.model.apply(variables, batch["x"])}

  def evaluator(self):
    return SquaredError()


def batches(num, batch_size=16, seed=0):
  """Returns `num` regression batches that a small network can learn."""
  rng = np.random.default_rng(seed)
  weights = rng.normal(size=8).astype(np.float32)
  found = []
  for _ in range(num):
    x = rng.normal(size=(batch_size, 8)).astype(np.float32)
    found.append({"x": x, "y": np.tanh(x @ weights)})
  return found


def host(tree):
  return jax.tree.map(np.asarray, tree)
