"""Initial variables from another model's: position embeddings on other grids."""

import numpy as np
import pytest

from vit_jax_zoo.ops.resize import resize_position_grid
from vit_jax_zoo.weights import check_finite, fit_to_model, relayout

WIDTH = 3


def variables(rows, cls_token=True, seed=0):
  rng = np.random.default_rng(seed)
  params = {"position_embedding": {"table": rng.normal(size=(1, rows, WIDTH)).astype(np.float32)}}
  if cls_token:
    params["cls_token"] = rng.normal(size=(1, 1, WIDTH)).astype(np.float32)
  return {"params": params}


def table(tree):
  return tree["params"]["position_embedding"]["table"]


def adapted(old, new, cls_token=True, **grids):
  """The source's table, and what a model with `new` rows makes of it."""
  source = variables(old, cls_token)
  return table(source), table(
    fit_to_model(source, variables(new, cls_token, seed=1), "a run", **grids)
  )


def test_equal_grids_are_copied():
  for grids in ({}, {"grid": (4, 9)}, {"source_grid": (4, 9), "grid": (4, 9)}):
    before, after = adapted(37, 37, **grids)
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(
  ("old", "new"), [((4, 9), (9, 4)), ((4, 9), (6, 6)), ((6, 6), (4, 9)), ((4, 9), (8, 18))]
)
def test_known_grids_are_resized(old, new, cls_token):
  rows = [height * width + cls_token for height, width in (old, new)]
  before, after = adapted(*rows, cls_token, source_grid=old, grid=new)
  np.testing.assert_array_equal(after[:, :cls_token], before[:, :cls_token])
  expected = resize_position_grid(before[0, int(cls_token) :], old, new)
  np.testing.assert_array_equal(after[0, int(cls_token) :], expected)
  # 36 rows need not be 6 x 6.
  if {old, new} == {(4, 9), (9, 4)}:
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("grids", [{}, {"grid": (4, 9)}, {"source_grid": (3, 3)}])
def test_an_unknown_grid_is_square(grids):
  before, after = adapted(10, 37, **grids)
  new = grids.get("grid", (6, 6))
  np.testing.assert_array_equal(after[0, 1:], resize_position_grid(before[0, 1:], (3, 3), new))


@pytest.mark.parametrize(
  ("old", "new", "grids", "message"),
  [
    (13, 37, {}, "the source has 13"),
    (37, 13, {}, "the model has 13"),
    (13, 37, {"grid": (6, 6)}, "the source has 13"),
    (13, 37, {"source_grid": (4, 4), "grid": (6, 6)}, "expected a grid of 4 x 4 tokens"),
    (10, 37, {"source_grid": (3, 3), "grid": (5, 9)}, "expected a grid of 5 x 9 tokens"),
    (9, 37, {}, "0 rows"),
  ],
)
def test_invalid_resize(old, new, grids, message):
  with pytest.raises(ValueError, match="position embeddings: ") as error:
    adapted(old, new, **grids)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_another_width_is_listed_with_all_that_does_not_fit():
  source, model = variables(10), variables(37)
  source["params"]["position_embedding"]["table"] = np.zeros((1, 10, 5), np.float32)
  source["params"]["more"] = np.zeros(2, np.float32)
  with pytest.raises(ValueError, match="the weights of a run do not fit") as error:
    fit_to_model(source, model, "a run")
  for part in ("table has shape (1, 10, 5); expected (1, 37, 3)", "more has no place"):
    assert part in str(error.value)


def test_scanned_layers_become_unrolled_ones_and_the_reverse():
  rng = np.random.default_rng(0)
  layers = rng.normal(size=(3, 2, 2)).astype(np.float32)
  scanned = {"params": {"encoder": {"blocks": {"kernel": layers}}, "head": {"bias": np.ones(2)}}}
  blocks = {f"block_{i}": {"kernel": np.zeros((2, 2), np.float32)} for i in range(3)}
  unrolled = {"params": {"encoder": blocks, "head": {"bias": np.zeros(2)}}}
  taken = fit_to_model(scanned, unrolled, "a run")
  for i in range(3):
    np.testing.assert_array_equal(taken["params"]["encoder"][f"block_{i}"]["kernel"], layers[i])
  np.testing.assert_array_equal(taken["params"]["head"]["bias"], np.ones(2))
  again = relayout(taken, scan_layers=True)
  np.testing.assert_array_equal(again["params"]["encoder"]["blocks"]["kernel"], layers)
  empty = {"params": {"encoder": {"blocks": {"kernel": np.zeros((3, 2, 2))}}, "head": {}}}
  back = fit_to_model(
    taken, {"params": {**empty["params"], "head": {"bias": np.zeros(2)}}}, "a run"
  )
  np.testing.assert_array_equal(back["params"]["encoder"]["blocks"]["kernel"], layers)
  deeper = {f"block_{i}": {"kernel": np.zeros((2, 2))} for i in range(4)}
  model = {"params": {"encoder": deeper, "head": {"bias": np.zeros(2)}}}
  with pytest.raises(ValueError, match=r"encoder/block_0/kernel is missing.* and 2 more"):
    fit_to_model(scanned, model, "a run")


def test_pixel_positions_are_resized_as_a_grid():
  source = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
  model = {"params": {"position_embedding": np.zeros((36, WIDTH), np.float32)}}
  taken = fit_to_model({"params": {"position_embedding": source}}, model, "a run")
  expected = resize_position_grid(source, (4, 4), (6, 6))
  np.testing.assert_array_equal(taken["params"]["position_embedding"], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_run_that_diverged_is_no_start(value):
  source = variables(10)
  source["params"]["cls_token"][0, 0, 1] = value
  with pytest.raises(ValueError, match=r"params/cls_token"):
    fit_to_model(source, variables(10, seed=1), "a run")


def test_many_arrays_that_are_not_finite_are_counted():
  arrays = {f"layer_{i}": np.full(2, np.nan, np.float16) for i in range(8)}
  with pytest.raises(ValueError, match="layer_0, layer_1, layer_2 and 5 more"):
    check_finite(arrays | {"names": np.array(["a"]), "steps": np.arange(3)}, "a file")
