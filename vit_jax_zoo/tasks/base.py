"""The task protocol: loss, predictions and scores of one kind of problem.

`init`, `normalizers`, `loss`, `predict`, `features` and `explain` are traced by `jax.jit` on global
arrays; the rest runs on the host, on numpy arrays.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import clu.metrics
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from vit_jax_zoo.metrics.base import Evaluator as Evaluator

Batch: TypeAlias = Mapping[str, Any]  # arrays [b ...]; a padded batch has `mask` [b], True: real
Variables: TypeAlias = Mapping[str, Any]  # a Linen tree: `params`, `batch_stats`, ...
Predictions: TypeAlias = Mapping[str, Any]  # arrays [b ...], in the order of the batch
Model: TypeAlias = Any  # a Linen module: `init(rng, ...)`, `apply(variables, ...)`


@struct.dataclass
class Mean(clu.metrics.Average):
  """A metric as a sum and a count, float32 [], which are merged before they are divided."""

  total: Any  # not typed as arrays: `jax.eval_shape` puts shapes here
  count: Any

  @classmethod
  def of(cls, values: Float[Array, "*shape"], where: Array | None = None) -> "Mean":
    """Sums and counts `values`, where `where` is True."""
    weights = jnp.ones_like(values) if where is None else jnp.broadcast_to(where, values.shape)
    weights = weights.astype(jnp.float32)
    return cls(total=jnp.sum(values.astype(jnp.float32) * weights), count=jnp.sum(weights))


@dataclasses.dataclass(frozen=True)
class OptimGroup:
  """Parameters with an optimizer and a loss of their own, updated in the listed order in each step.

  Most tasks have a single group, `OptimGroup()`, of all parameters; a GAN one for each network.
  """

  name: str | None = None  # top-level key in `params`; None: all parameters
  updates: int = 1  # in each training step
  begin_step: int = 0  # the first training step with an update

  def select(self, params: Any) -> Any:
    """Returns the group's parameters."""
    return params if self.name is None else params[self.name]

  def insert(self, params: Any, own: Any) -> Any:
    """Returns all parameters, those of the group replaced by `own`."""
    return own if self.name is None else {**params, self.name: own}


@struct.dataclass
class LossContext:
  """Arguments of a loss besides variables and batch."""

  rng: Any  # different for each step, optimizer group, update and micro-batch
  step: Any  # int32 []: training steps completed
  normalizers: Mapping[str, Array]  # of this step's whole batch, on all devices
  optim_group: str | None = struct.field(pytree_node=False, default=None)
  precomputed: Any = None  # the other groups' outputs on these examples, constant in the loss


@struct.dataclass
class LossOutput:
  """Result of a loss; those of micro-batches add up to that of the whole batch."""

  loss: Any  # float32 []: the sum over these examples / the normalizers of the whole step
  metrics: Mapping[str, Mean]
  model_state: Any  # the variable collections other than `params`, after this forward pass


class Task(abc.ABC):
  """A learning problem, from batch to score. Subclasses are frozen dataclasses of plain fields."""

  name: ClassVar[str] = ""  # the name under which the task is registered
  hub_task: ClassVar[str | None] = None  # `pipeline_tag` of model cards on the Hugging Face hub
  keeps_aspect_ratio: ClassVar[bool] = False  # images are resized by their shorter side, and padded
  predicts_boxes: ClassVar[bool] = False  # `predict` reads `image_size` and returns boxes

  @property
  def optim_groups(self) -> tuple[OptimGroup, ...]:
    """The groups of parameters with an optimizer each, in the order of their updates."""
    return (OptimGroup(),)

  @property
  @abc.abstractmethod
  def best_metric(self) -> str:
    """The score that selects the best checkpoint; higher is better."""

  @abc.abstractmethod
  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Returns initial variables for batches of this shape."""

  @property
  def weight_files(self) -> Mapping[str, str]:
    """Pretrained files or runs, by sub-tree, for variables that `init_from` does not have.

    "params/encoder" is a sub-tree of the parameters, "*/backbone" one of every collection.
    """
    return {}

  @property
  def train_only_collections(self) -> tuple[str, ...]:
    """Sub-trees used only by the loss, by path as above; not created for evaluation."""
    return ()

  def init_from_data(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Variables:
    """Returns variables computed from the training data, such as a palette, to replace `init`'s.

    `batches` are this process's, endless; the results of process 0 are used.
    """
    return {}

  def normalizers(self, batch: Batch) -> dict[str, Array]:
    """Returns the divisors of a step's loss: functions of the whole global batch."""
    return {"examples": jnp.sum(example_mask(batch).astype(jnp.float32))}

  @abc.abstractmethod
  def loss(self, variables: Variables, batch: Batch, context: LossContext) -> LossOutput:
    """Returns the training loss of `context.optim_group` on a batch or micro-batch."""

  def make_train_step(
    self, optimizers: Sequence[Any], *, accumulation_steps: int, ema_decay: float | None
  ) -> Any:
    """Returns the task's own training step; None for `training.train_step.make_train_step`."""
    return None

  @abc.abstractmethod
  def predict(self, variables: Variables, batch: Batch) -> Predictions:
    """Returns the input of evaluator and figures, one row for each example."""

  @property
  def feature_views(self) -> int:
    """Number of views of an image; probes are fitted to one, and take a majority vote over all."""
    return 1

  def features(self, variables: Variables, batch: Batch) -> Predictions:
    """Returns features for probes: `layers` [b l d] to choose from, others [b d]. Optional.

    With several `feature_views`, `view` int32 [b] in the batch is the number of the view.
    """
    raise ValueError(f"task {self.name}: no features; probes need a task with `features`")

  def padding_invariant(self) -> "Task":
    """Returns a task whose predictions do not depend on padding, for exported programs."""
    return self

  @property
  def padding_dependent(self) -> str:
    """Predictions that still depend on the amount of padding, and why; "" if none does."""
    return ""

  @abc.abstractmethod
  def evaluator(self) -> Evaluator:
    """Returns an empty evaluator."""

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of the scores of an evaluation, from which `data.eval.<name>.metrics` selects."""
    return self.evaluator().scores

  def check_data(self, info: Any) -> list[str]:
    """Returns warnings about the training data, given its `DatasetInfo`. Optional."""
    return []

  def batch_figures(self, batch: Mapping[str, np.ndarray]) -> dict[str, Figure]:
    """Draws a training batch, by figure name. Optional."""
    return {}

  def figures(self, batch: Batch, predictions: Predictions) -> dict[str, Figure]:
    """Draws predictions of at least one real row beside the truth, by figure name. Optional."""
    return {}

  def score_figures(self, evaluator: Evaluator) -> dict[str, Figure]:
    """Draws the counts of an evaluator over a whole split, by figure name. Optional."""
    return {}

  def explain(self, variables: Variables, batch: Batch) -> Any:
    """Returns small intermediates of the batch's first images; raises ValueError without."""
    raise ValueError(f"task {self.name}: no attention maps or other intermediates to draw")

  def draw_explanation(self, explanation: Any) -> "Explained":
    """Draws what `explain` returned, as numpy arrays."""
    return Explained({}, {})


class Explained(NamedTuple):
  """Figures of a model's intermediates, by name: by image, and of the model alone."""

  images: Mapping[str, Figure]
  model: Mapping[str, Figure]


def example_mask(batch: Batch) -> Array:
  """Returns `[b]`, True for real examples: the batch's own mask, or all of them."""
  if "mask" in batch:
    return jnp.asarray(batch["mask"], dtype=bool)
  return jnp.ones(next(iter(batch.values())).shape[0], dtype=bool)


def image_size(batch: Batch) -> Int[Array, "b 2"]:
  """Returns height and width of every image without its padding."""
  if "image_size" in batch:
    return jnp.asarray(batch["image_size"])
  shape = jnp.asarray(batch["image"].shape[1:3], jnp.int32)
  return jnp.broadcast_to(shape, (batch["image"].shape[0], 2))


def pixel_mask(batch: Batch) -> Bool[Array, "b h w"]:
  """Returns True at the pixels of an image, False in its padding."""
  height, width = batch["image"].shape[1:3]
  size = image_size(batch)[:, :, None]
  rows = jnp.arange(height, dtype=size.dtype)[None] < size[:, 0]
  columns = jnp.arange(width, dtype=size.dtype)[None] < size[:, 1]
  return rows[:, :, None] & columns[:, None, :]


def is_target(batch: Batch) -> Bool[Array, "b t"]:
  """Returns True for targets, False for padding, also in padding rows."""
  return jnp.asarray(batch["is_target"]).astype(bool) & example_mask(batch)[:, None]
