"""Drill: each size of the demos' models as 0 and -1; a one-line error before compilation."""

import copy

import jax
import pytest

from vit_jax_zoo import config as config_lib
from vit_jax_zoo import trainer
from vit_jax_zoo.errors import field_names

pytestmark = pytest.mark.slow

DEMOS = (
  ("vit", "demo"),
  ("igpt", "demo"),
  ("lambda_resnet", "demo"),
  ("detr", "demo"),
  ("ttsr", "demo"),
  ("fpt", "demo_mask"),
  ("fpt", "demo_segmentation"),
)
MAY_BE_ZERO = ("extra_levels", "num_convs", "dropout_rate", "lambda_blocks")


def demo(system, variant):
  config = config_lib.load(f"configs/{system}.py:{variant}")
  config.update(batch_size=8, eval_batch_size=8, accumulation_steps=1)  # for eight devices
  config.data.loader.num_workers = 0
  return config


def sizes(tree, path=()):
  """Yields the path of every number, including those in tuples."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree)
  for key, value in items:
    if isinstance(value, dict | tuple | list):
      yield from sizes(value, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
      yield (*path, key)


def with_size(tree, path, size):
  """Returns a copy of dicts and tuples with one number changed."""
  if not path:
    return size
  if isinstance(tree, dict):
    return {**tree, path[0]: with_size(tree.get(path[0]), path[1:], size)}
  return tuple(with_size(x, path[1:], size) if i == path[0] else x for i, x in enumerate(tree))


def trace(config, batch):
  """Traces the training step, as a run does before compilation."""
  made = trainer.build(config)
  program = made.program(batch)
  with jax.set_mesh(made.mesh):
    jax.eval_shape(program.train_step, program.abstract_state, program.abstract_batch)


@pytest.mark.parametrize(("system", "variant"), DEMOS)
def test_invalid_size_raises(system, variant):
  whole = demo(system, variant)
  made = trainer.build(whole)
  batch = next(made.train_batches())
  given = whole.model.to_dict()
  fields = {name: getattr(made.model, name) for name in field_names(made.model)}
  own = {name: x for name, x in fields.items() if isinstance(x, int) and name not in given}
  tried = 0
  for path in sizes({**own, **given}):
    if any(name in MAY_BE_ZERO for name in path):
      continue
    for size in (0, -1):
      config = copy.deepcopy(whole)
      with config.unlocked(), config.ignore_type():
        config.model = with_size(given, path, size)
      with pytest.raises(ValueError, match=r"\S") as error:
        trace(config, batch)
      assert "\n" not in str(error.value), path
      names = [name for name in path if isinstance(name, str)]
      assert any(name in str(error.value) for name in names), (path, str(error.value))
      tried += 1
  assert tried >= 6
