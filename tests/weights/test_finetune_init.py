"""Initial variables from another model: position embeddings on other grids, layer layouts."""

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


def resize_between(old, new, cls_token=True, **grids):
  """Returns the source's table, and its resized version for a model with `new` rows."""
  source = variables(old, cls_token)
  return table(source), table(
    fit_to_model(source, variables(new, cls_token, seed=1), "a run", **grids)
  )


def test_equal_grids_copied():
  for grids in ({}, {"grid": (4, 9)}, {"source_grid": (4, 9), "grid": (4, 9)}):
    before, after = resize_between(37, 37, **grids)
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(
  ("old", "new"), [((4, 9), (9, 4)), ((4, 9), (6, 6)), ((6, 6), (4, 9)), ((4, 9), (8, 18))]
)
def test_known_grids_resized(old, new, cls_token):
  rows = [height * width + cls_token for height, width in (old, new)]
  before, after = resize_between(*rows, cls_token, source_grid=old, grid=new)
  np.testing.assert_array_equal(after[:, :cls_token], before[:, :cls_token])
  expected = resize_position_grid(before[0, int(cls_token) :], old, new)
  np.testing.assert_array_equal(after[0, int(cls_token) :], expected)
  # 36 rows need not be 6 x 6.
  if {old, new} == {(4, 9), (9, 4)}:
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("grids", [{}, {"grid": (4, 9)}, {"source_grid": (3, 3)}])
def test_unknown_grid_assumed_square(grids):
  before, after = resize_between(10, 37, **grids)
  new = grids.get("grid", (6, 6))
  np.testing.assert_array_equal(after[0, 1:], resize_position_grid(before[0, 1:], (3, 3), new))


@pytest.mark.parametrize(
  ("old", "new", "grids", "message"),
  [
    (13, 37, {}, "the source has 13"),
    (37, 13, {}, "the model has 13"),
    (13, 37, {"grid": (6, 6)}, "the source has 13"),
    (13, 37, {"source_grid": (4, 4), "grid": (6, 6)}, "4 x 4 tokens"),
    (10, 37, {"source_grid": (3, 3), "grid": (5, 9)}, "5 x 9 tokens"),
    (9, 37, {}, "0 rows"),
  ],
)
def test_invalid_resize_raises(old, new, grids, message):
  with pytest.raises(ValueError, match="position embeddings: ") as error:
    resize_between(old, new, **grids)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_mismatches_listed():
  source, model = variables(10), variables(37)
  source["params"]["position_embedding"]["table"] = np.zeros((1, 10, 5), np.float32)
  source["params"]["more"] = np.zeros(2, np.float32)
  with pytest.raises(ValueError, match="a run: ") as error:
    fit_to_model(source, model, "a run")
  for part in ("table has shape (1, 10, 5); expected (1, 37, 3)", "more has no place"):
    assert part in str(error.value)


def test_scanned_unrolled_conversion():
  rng = np.random.default_rng(0)
  layers = rng.normal(size=(3, 2, 2)).astype(np.float32)
  scanned = {"params": {"encoder": {"blocks": {"kernel": layers}}, "head": {"bias": np.ones(2)}}}
  blocks = {f"block_{i}": {"kernel": np.zeros((2, 2), np.float32)} for i in range(3)}
  unrolled = {"params": {"encoder": blocks, "head": {"bias": np.zeros(2)}}}
  loaded = fit_to_model(scanned, unrolled, "a run")
  for i in range(3):
    np.testing.assert_array_equal(loaded["params"]["encoder"][f"block_{i}"]["kernel"], layers[i])
  np.testing.assert_array_equal(loaded["params"]["head"]["bias"], np.ones(2))
  again = relayout(loaded, scan_layers=True)
  np.testing.assert_array_equal(again["params"]["encoder"]["blocks"]["kernel"], layers)
  empty = {"params": {"encoder": {"blocks": {"kernel": np.zeros((3, 2, 2))}}, "head": {}}}
  back = fit_to_model(
    loaded, {"params": {**empty["params"], "head": {"bias": np.zeros(2)}}}, "a run"
  )
  np.testing.assert_array_equal(back["params"]["encoder"]["blocks"]["kernel"], layers)
  deeper = {f"block_{i}": {"kernel": np.zeros((2, 2))} for i in range(4)}
  model = {"params": {"encoder": deeper, "head": {"bias": np.zeros(2)}}}
  with pytest.raises(ValueError, match=r"encoder/block_0/kernel .* 2 more"):
    fit_to_model(scanned, model, "a run")


def test_pixel_positions_resized_as_grid():
  source = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
  model = {"params": {"position_embedding": np.zeros((36, WIDTH), np.float32)}}
  loaded = fit_to_model({"params": {"position_embedding": source}}, model, "a run")
  expected = resize_position_grid(source, (4, 4), (6, 6))
  np.testing.assert_array_equal(loaded["params"]["position_embedding"], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_source_raises(value):
  source = variables(10)
  source["params"]["cls_token"][0, 0, 1] = value
  with pytest.raises(ValueError, match=r"params/cls_token"):
    fit_to_model(source, variables(10, seed=1), "a run")


def test_nonfinite_arrays_counted():
  arrays = {f"layer_{i}": np.full(2, np.nan, np.float16) for i in range(8)}
  with pytest.raises(ValueError, match="layer_2 and 5 more"):
    check_finite(arrays | {"names": np.array(["a"]), "steps": np.arange(3)}, "a file")
