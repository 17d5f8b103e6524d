"""The task protocol: the one thing the training loop knows about what is learned.

A task turns a model's outputs and a batch into losses, predictions and scores. It is handed a model
as a pair of pure functions (`init`, `apply`) and never imports one; the loop is handed a task and
never looks inside. A new problem is a new file beside this one.

Where things run:

* `init`, `normalizers`, `loss`, `predict`, `explain` are traced by `jax.jit`; they see
  global arrays and write no communication of their own;
* `init_from_data`, `evaluator`, `draw_explanation` and all figures run on the host, on numpy
  arrays.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from vit_jax_zoo.metrics.base import Evaluator as Evaluator

Batch: TypeAlias = Mapping[str, Any]
"""Arrays whose first axis is the example; a padded batch has `mask [b]`, True = real."""

Variables: TypeAlias = Mapping[str, Any]
"""A Linen variable tree: `params`, and whatever else the model keeps (`batch_stats`, ...)."""

Predictions: TypeAlias = Mapping[str, Any]
"""Arrays whose first axis is the example, in the order of the batch."""


@struct.dataclass
class Mean(clu.metrics.Average):
  """A metric as a sum and a count, merged over batches, steps and hosts before any division.

  Attributes:
    total: float32 [], the sum.
    count: float32 [], how many were summed.
  """

  total: Any  # not typed as arrays: `jax.eval_shape` puts shapes here
  count: Any

  @classmethod
  def of(cls, values: Float[Array, "*shape"], where: Array | None = None) -> "Mean":
    """Sums `values`, and counts them; with `where`, only those at which it is True."""
    weights = jnp.ones_like(values) if where is None else jnp.broadcast_to(where, values.shape)
    weights = weights.astype(jnp.float32)
    return cls(total=jnp.sum(values.astype(jnp.float32) * weights), count=jnp.sum(weights))


@runtime_checkable
class Model(Protocol):
  """What a task may ask of a model: Linen's two pure functions."""

  def init(self, *args: Any, **kwargs: Any) -> Any:
    """Returns fresh variables."""
    ...

  def apply(self, *args: Any, **kwargs: Any) -> Any:
    """Returns outputs, and the changed variable collections when `mutable` names some."""
    ...


@dataclasses.dataclass(frozen=True)
class OptimGroup:
  """Parameters with an optimizer and a loss of their own.

  Most tasks have a single group, `OptimGroup()`, of all parameters. A GAN has one for each network;
  they are updated in the listed order in each training step.

  Attributes:
    name: top-level key in `params`; None: all parameters.
    updates: optimizer updates in each training step.
    begin_step: the first training step with an update; before, the parameters and the optimizer
      state are constant.
  """

  name: str | None = None
  updates: int = 1
  begin_step: int = 0

  def select(self, params: Any) -> Any:
    """Returns the group's own of all parameters."""
    return params if self.name is None else params[self.name]

  def insert(self, params: Any, own: Any) -> Any:
    """Returns all parameters with the group's own replaced."""
    return own if self.name is None else {**params, self.name: own}


@struct.dataclass
class LossContext:
  """What a loss may depend on besides variables and batch.

  Attributes:
    rng: a PRNG key, different for each step, optimizer group, update and micro-batch.
    step: int32 [], the number of training steps completed before this one.
    normalizers: `Task.normalizers` of the whole batch of this step, on all devices and over all
      micro-batches.
    optim_group: the name of the `OptimGroup` whose loss to return.
    precomputed: outputs of the other groups' networks on the same examples, computed once per step
      and constant in the loss; None if the training step precomputes nothing.
  """

  rng: Any
  step: Any
  normalizers: Mapping[str, Array]
  optim_group: str | None = struct.field(pytree_node=False, default=None)
  precomputed: Any = None


@struct.dataclass
class LossOutput:
  """What a loss returns.

  Attributes:
    loss: float32 [], the scalar to differentiate: the sum over these examples, divided by the
      normalizers of the whole step, so that summing over micro-batches gives the loss of the whole
      batch.
    metrics: what is logged, by name.
    model_state: the variable collections other than `params`, as this forward pass leaves them.
  """

  loss: Any
  metrics: Mapping[str, Mean]
  model_state: Any


class Task(abc.ABC):
  """What is learned, from a batch to a score. Subclasses are frozen dataclasses of plain fields."""

  name: ClassVar[str] = ""
  """The name under which the task is registered."""

  keeps_aspect_ratio: ClassVar[bool] = False
  """Whether images keep their shape: resized by their shorter side and padded, not squashed."""

  predicts_boxes: ClassVar[bool] = False
  """Whether `predict` reads `image_size` and returns boxes: exported programs then do so too."""

  @property
  def optim_groups(self) -> tuple[OptimGroup, ...]:
    """The groups of parameters with an optimizer each, in the order of their updates."""
    return (OptimGroup(),)

  @property
  @abc.abstractmethod
  def best_metric(self) -> str:
    """The score by which the best checkpoint is chosen; higher is better."""

  @abc.abstractmethod
  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Returns fresh variables for batches shaped like this one."""

  @property
  def weight_files(self) -> Mapping[str, str]:
    """Files or runs of ours that parts of the variables start from, by the part's path; or none.

    "vgg" is a collection, "params/generator/extractor" a part of the parameters, "*/backbone" a
    part of every collection. Where a run starts from something as a whole (`init_from`), a file is
    read only for what that leaves open.
    """
    return {}

  @property
  def train_only_collections(self) -> tuple[str, ...]:
    """Parts of the variables that nothing but losses reads, by path as above; none by default.

    Such as a critic. Whoever only evaluates neither makes nor loads them.
    """
    return ()

  def init_from_data(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Variables:
    """Returns variables that come from the training data, such as a palette; none by default.

    Called on the host before the first step of a run, unless `init_from` has given every variable;
    what it returns takes the place of its namesakes among those of `init`. Of several processes the
    first one's result counts.

    Args:
      batches: this process's part of the run's training batches, without end.
    """
    del batches
    return {}

  def normalizers(self, batch: Batch) -> dict[str, Array]:
    """Returns what the loss of a step is divided by: functions of the whole global batch alone."""
    return {"examples": jnp.sum(example_mask(batch).astype(jnp.float32))}

  @abc.abstractmethod
  def loss(self, variables: Variables, batch: Batch, context: LossContext) -> LossOutput:
    """Returns the training loss of `context.optim_group` on a batch or micro-batch."""

  def make_train_step(
    self, optimizers: Sequence[Any], *, accumulation_steps: int, ema_decay: float | None
  ) -> Any:
    """Returns a training step of the task's own; None: `training.train_step.make_train_step`.

    Args:
      optimizers: one `training.optim.Optimizer` for each of `optim_groups`.
      accumulation_steps: number of micro-batches of a batch.
      ema_decay: decay of the moving average of the variables, or None.
    """
    del optimizers, accumulation_steps, ema_decay

  @abc.abstractmethod
  def predict(self, variables: Variables, batch: Batch) -> Predictions:
    """Returns what the evaluator and the figures need, one row for each example."""

  @property
  def feature_views(self) -> int:
    """How many views of an image `features` can give; probes learn from one, and vote over all."""
    return 1

  def features(self, variables: Variables, batch: Batch) -> Predictions:
    """Returns what probes are fitted to: `layers` [b l d] to choose from, others [b d]. Optional.

    With several `feature_views`, `view` int32 [b] in the batch says which one, the same for all its
    rows; the first, where it is missing.

    Raises:
      ValueError: this task has none.
    """
    del variables, batch
    raise ValueError(f"the task {type(self).__name__} has no features to probe")

  def padding_invariant(self) -> "Task":
    """Returns a task whose predictions do not depend on the padding of images; itself by default.

    Programs exported for a fixed image size use it.
    """
    return self

  @abc.abstractmethod
  def evaluator(self) -> Evaluator:
    """Returns an empty evaluator."""

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of the scores of an evaluation, of which `data.eval.<name>.metrics` may choose."""
    return self.evaluator().scores

  def check_data(self, info: Any) -> list[str]:
    """Returns warnings about the training data, given its `DatasetInfo`. Optional."""
    del info
    return []

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws a training batch as the model will see it, by figure name. Optional."""
    del batch
    return {}

  def figures(
    self, batch: Mapping[str, np.ndarray], predictions: Mapping[str, np.ndarray]
  ) -> dict[str, Figure]:
    """Draws predictions beside the truth, by figure name. Optional."""
    del batch, predictions
    return {}

  def score_figures(self, evaluator: Evaluator) -> dict[str, Figure]:
    """Draws what an evaluator has counted over a whole split, by figure name. Optional."""
    del evaluator
    return {}

  def explain(self, variables: Variables, batch: Batch) -> Any:
    """Returns what the model shows of its inside for the batch's first images. Optional.

    Traced; a tree of small arrays, which need not have an example axis.

    Raises:
      ValueError: this task, or this model, has nothing to show.
    """
    del variables, batch
    raise ValueError(f"the task {type(self).__name__} cannot explain what its model does")

  def draw_explanation(self, explanation: Any) -> "Explained":
    """Draws what `explain` returned, as numpy arrays."""
    del explanation
    return Explained({}, {})


@dataclasses.dataclass(frozen=True)
class Explained:
  """Pictures of a model's inside, by figure name.

  Attributes:
    images: those that depend on the images that it was shown.
    model: those that do not.
  """

  images: Mapping[str, Figure]
  model: Mapping[str, Figure]


def example_mask(batch: Batch) -> Array:
  """Returns `[b]`, True for real examples: the batch's own mask, or all of them."""
  if "mask" in batch:
    return jnp.asarray(batch["mask"], dtype=bool)
  first = next(iter(batch.values()))
  return jnp.ones(first.shape[0], dtype=bool)
