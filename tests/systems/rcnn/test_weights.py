"""Published R-CNNs: torchvision's files, and COCO's class ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo import export
from vit_jax_zoo.inference.load import load_pretrained
from vit_jax_zoo.systems.rcnn import weights as rcnn_classes
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.systems.rcnn.weights import PREPROCESS
from vit_jax_zoo.weights import Preprocess, Pretrained, WeightsError, load_into
from vit_jax_zoo.weights.load import flatten_variables, formats

SMALL = {
  "num_classes": 3,
  "backbone": {"blocks": (1, 2, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 8},
  "width": 32,
  "pool_size": 2,
  "box_head": {"width": 32},
}
OFFICIAL = {
  **SMALL,
  "backbone": {**SMALL["backbone"], "stride_in_1x1": True},
  "neck": "fpt",
  "neck_fields": {"variant": "official", "norm": "group_norm"},
  "adaptive": True,
  "convention": "detectron",
  "mask_pool_size": 2,
}
MODELS = {
  "torchvision": {**SMALL, "mask_head": {"num_convs": 2, "width": 8}},
  "official": {
    **OFFICIAL,
    "box_head": {"num_convs": 3, "num_dense": 1, "width": 32, "norm": "group_norm"},
    "mask_head": {"num_convs": 4, "width": 64, "norm": "group_norm", "fused": True},
  },
  "official_2mlp": {**OFFICIAL, "box_head": {"width": 32, "norm": "group_norm"}},
}
NAMES = {"torchvision": "pth-torchvision", "official": "pth", "official_2mlp": "pth"}
MODULES = {
  "torchvision": "weights",
  "official": "weights_rcnn",
  "official_2mlp": "weights_rcnn",
}


@functools.cache
def abstract_variables(kind, num_classes):
  model = RCNN(**{**MODELS[kind], "num_classes": num_classes})
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def random_variables(kind, seed=0, num_classes=3):
  abstract = abstract_variables(kind, num_classes)
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    values = rng.normal(size=shape.shape).astype(np.float32)
    return np.abs(values) + 0.5 if path[-1].key == "var" else values

  return jax.tree_util.tree_map_with_path(leaf, abstract)


def pretrained(model, variables, **task_fields):
  return Pretrained(
    model, variables, Preprocess((64, 64)), {}, task="instance_detection", task_fields=task_fields
  )


def assert_same(given, expected, rtol=0.0):
  given, expected = flatten_variables(given), flatten_variables(expected)
  assert given.keys() == expected.keys()
  for key, array in expected.items():
    np.testing.assert_allclose(given[key], array, rtol=rtol, err_msg=key)


def fold_norms(variables):
  """Folds the backbone's norms as Caffe files have them: mean 0, variance 1."""
  flat = jax.tree_util.tree_map_with_path(_fold, variables["batch_stats"])
  return {**variables, "batch_stats": flat}


def _fold(path, leaf):
  if path[0].key != "backbone" or path[-1].key not in ("mean", "var"):
    return leaf
  return np.full_like(leaf, 0 if path[-1].key == "mean" else np.float32(1 - 1e-5))


def test_round_trip_by_path_is_exact(tmp_path):
  check_round_trip("torchvision", tmp_path)


def check_round_trip(kind, tmp_path):
  model = RCNN(**MODELS[kind])
  variables = random_variables(kind)
  if kind != "torchvision":
    variables = fold_norms(variables)
  path = str(tmp_path / "detector.safetensors")
  export.write(pretrained(model, variables), NAMES[kind], path)
  arrays = load_file(path)
  assert {form.module for form, module in formats().items() if module.is_of(arrays)} == {
    MODULES[kind]
  }
  loaded = load_pretrained(path)
  assert_same(loaded.variables, variables)
  assert loaded.task == "instance_detection"
  assert loaded.task_fields.get("mask_paste") == ("torchvision" if kind == "torchvision" else None)
  for field in ("neck", "adaptive", "convention", "width", "pool_size", "num_classes"):
    assert getattr(loaded.model, field) == getattr(model, field), field
  assert loaded.model.box_head == MODELS[kind]["box_head"]
  assert loaded.model.mask_head == MODELS[kind].get("mask_head")
  start = jax.tree.map(np.zeros_like, variables)
  assert_same(load_into(path, start), variables)


def test_resized_sizes_equal_torchvision():
  """floor(side * min(800 / shorter, 1333 / longer)); 334 / 800 * 334 is below 800 in floats."""
  size = PREPROCESS.resized_size
  assert [size(480, 640), size(334, 500), size(400, 50)] == [(800, 1066), (799, 1197), (1333, 166)]


def test_head_of_other_num_classes_is_zero(tmp_path):
  path = str(tmp_path / "detector.safetensors")
  variables = random_variables("torchvision")
  export.write(pretrained(RCNN(**MODELS["torchvision"]), variables), "pth-torchvision", path)
  changed = load_pretrained(path, num_classes=5).variables["params"]
  assert changed["box_outputs"]["logits"]["bias"].shape == (6,)
  assert not changed["box_outputs"]["logits"]["kernel"].any()
  assert_same({"params": changed["box_head"]}, {"params": variables["params"]["box_head"]})


def test_contiguous_classes_become_coco_ids(tmp_path):
  check_class_ids("torchvision", 91, tmp_path)


def check_class_ids(kind, outputs, tmp_path):
  """The file's classes are contiguous, background first; ours are COCO's ids, background last."""
  fields = {**MODELS[kind], "num_classes": outputs - 1}
  model = RCNN(**fields)
  variables = fold_norms(random_variables(kind, num_classes=outputs - 1))
  path = str(tmp_path / "detector.safetensors")
  export.write(pretrained(model, variables), NAMES[kind], path)
  loaded = load_pretrained(path)
  assert loaded.class_names[:3] == ("N/A", "person", "bicycle")
  assert loaded.class_names[90] == "toothbrush"
  ids = rcnn_classes.IDS if outputs == 81 else range(1, 91)
  places = [*ids, 91]
  for layer in ("logits", "deltas"):
    ours, theirs = (
      v["params"]["box_outputs"][layer]["bias"] for v in (loaded.variables, variables)
    )
    ours, theirs = ours.reshape(92, -1), theirs.reshape(outputs, -1)
    np.testing.assert_array_equal(ours[places], theirs)
    rest = np.delete(ours, places, axis=0)
    assert (rest == (rcnn_classes.UNUSED if layer == "logits" else 0)).all()
  masks = loaded.variables["params"]["mask_head"]["logits"]["kernel"]
  np.testing.assert_array_equal(
    masks[..., places], variables["params"]["mask_head"]["logits"]["kernel"]
  )
  again = str(tmp_path / "again.safetensors")
  export.write(loaded, NAMES[kind], again)
  written, original = load_file(again), load_file(path)
  assert written.keys() == original.keys()
  for key, array in original.items():
    np.testing.assert_array_equal(written[key], array, err_msg=key)


def test_older_torchvision_names_are_read(tmp_path):
  model, variables = RCNN(**MODELS["torchvision"]), random_variables("torchvision")
  path = str(tmp_path / "new.safetensors")
  export.write(pretrained(model, variables), "pth-torchvision", path)
  renamed = {}
  for key, array in load_file(path).items():
    key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    for blocks in ("inner_blocks", "layer_blocks"):
      for level in range(4):
        key = key.replace(f"{blocks}.{level}.0.", f"{blocks}.{level}.")
    for i in range(2):
      key = key.replace(f"mask_head.{i}.0.", f"mask_head.mask_fcn{i + 1}.")
    renamed[key] = array
  assert "roi_heads.mask_head.mask_fcn1.weight" in renamed
  save_file(renamed, tmp_path / "old.safetensors")
  assert_same(load_pretrained(str(tmp_path / "old.safetensors")).variables, variables)


@pytest.mark.parametrize(
  ("fields", "form", "message"),
  [
    ({**SMALL, "neck": "bfp"}, "pth-torchvision", "no R-CNN with neck='bfp'"),
    ({**SMALL, "convention": "detectron2"}, "pth-torchvision", "convention='detectron2'"),
    (MODELS["official_2mlp"], "pth-torchvision", "stride_in_1x1=True"),
  ],
)
def test_export_of_unsupported_model_raises(fields, form, message, tmp_path):
  check_unsupported(fields, form, message, tmp_path)


def check_unsupported(fields, form, message, tmp_path):
  model, nothing = RCNN(**fields), {"params": {}}
  with pytest.raises(WeightsError, match=message) as caught:
    export.write(pretrained(model, nothing), form, str(tmp_path / "x.safetensors"))
  assert "\n" not in str(caught.value)


def test_detectron_classes_become_coco_ids_and_back(caplog):
  arrays = {"c.weight": np.arange(81.0)[:, None], "c.bias": np.arange(81.0)}
  wide, is_coco = rcnn_classes.with_ids(arrays, {"c": 1}, "a.pth")
  assert is_coco
  # Rows are 1 + id: person has id 1; stop sign, the twelfth class, has id 13.
  assert (wide["c.bias"][[0, 2, 14, 91]] == [0, 1, 12, 80]).all()
  assert (wide["c.bias"][[1, 13]] == rcnn_classes.UNUSED).all()
  again = rcnn_classes.without_ids(wide, {"c": 1}, rcnn_classes.NAMES, 81)
  np.testing.assert_array_equal(again["c.weight"], arrays["c.weight"])
  few = {"c.weight": np.zeros((4, 1)), "c.bias": np.zeros(4)}
  with caplog.at_level("INFO", logger="absl"):
    assert not rcnn_classes.with_ids(few, {"c": 1}, "b.pth")[1]
  assert "b.pth: 4 outputs" in caplog.text  # the numbering is logged
