"""Detector backbones from published files and from this package's classifiers."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_folder, system_module
from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo.nn.resnet import ResNet
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.weights import WeightsError, load_parts
from vit_jax_zoo.weights import readers as pickled_arrays
from vit_jax_zoo.weights.backbones import read_backbone
from vit_jax_zoo.weights.key_map import write
from vit_jax_zoo.weights.load import flatten_variables, load_pretrained

lambda_resnet_timm = system_module("lambda_resnet", "weights_timm")
LambdaResNet = system_module("lambda_resnet", "model").LambdaResNet
RCNN = system_module("rcnn", "model").RCNN

BODY = {"blocks": (1, 2, 1, 1), "widths": (4, 4, 8, 8), "stem_width": 8}


def shapes_of(module):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)


def filled(shapes, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def flat_shapes(variables):
  return {k: tuple(x.shape) for k, x in flatten_variables({"params": {}, **variables}).items()}


def test_backbone_file_fills_backbone_only():
  fields = {"num_classes": 3, "backbone_file": "a.pth"}
  task = create_task("instance_detection", RCNN(), **fields)
  assert task.weight_files == {"*/backbone": "a.pth"}


def official_backbone():
  """Returns all arrays of the official code's file, and those of its backbone."""
  arrays = load_file(golden_folder("fpt_det_a") / "weights.safetensors")
  own = {k.split("conv_body.")[1]: a for k, a in arrays.items() if "Conv_Body.conv_body." in k}
  return arrays, own


def as_blobs(own):
  """Renames Detectron.pytorch's keys to Caffe2's, by the rules of its converter."""
  blobs = {"conv1_b": np.zeros(8, np.float32), "fc1000_w": np.zeros((10, 64), np.float32)}
  branches = {"1": "branch2a", "2": "branch2b", "3": "branch2c"}
  for key, array in own.items():
    *place, kind = key.split(".")
    letter = {"weight": "w", "bias": "b"}[kind]
    if place[0] == "res1":
      blobs["conv1_w" if place[1] == "conv1" else f"res_conv1_bn_{_norm(kind)}"] = array
    elif place[2] == "downsample":
      name = f"{place[0]}_{place[1]}_branch1"
      blobs[f"{name}_{letter}" if place[3] == "0" else f"{name}_bn_{_norm(kind)}"] = array
    else:
      name = f"{place[0]}_{place[1]}_{branches[place[2][-1]]}"
      is_norm = place[2].startswith("bn")
      blobs[f"{name}_bn_{_norm(kind)}" if is_norm else f"{name}_{letter}"] = array
  return blobs


def _norm(kind):
  return "s" if kind == "weight" else "b"


@pytest.mark.parametrize("norm", ["frozen_batch_norm", "batch_norm"])
def test_caffe_weights_both_key_styles(norm, load_golden, tmp_path):
  config, inputs, outputs = load_golden("fpt_det_a")
  width, arrays, own = config["caffe_resnet_width"], *official_backbone()
  body = ResNet(
    blocks=tuple(config["res_blocks"]), widths=tuple(width * 2**i for i in range(4)),
    stem_width=own["res1.conv1.weight"].shape[0], norm=norm, stride_in_1x1=True,
  )  # fmt: skip
  shapes = flat_shapes(shapes_of(body))
  save_file(arrays, tmp_path / "detector.safetensors")
  (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": as_blobs(own)}, protocol=2))
  found = [read_backbone(str(tmp_path / n), shapes) for n in ("detector.safetensors", "R-50.pkl")]
  for path in shapes:
    np.testing.assert_array_equal(*(arrays[path] for arrays in found), err_msg=path)
  if norm == "batch_norm":
    return
  variables = _tree(found[1])
  image = jnp.moveaxis(jnp.asarray(inputs["image"]), 1, -1)[..., ::-1]  # the fixture's is BGR
  maps = jax.jit(body.apply)(variables, image)
  expected = np.moveaxis(outputs["body_res5"], 1, -1)
  np.testing.assert_allclose(maps["c5"], expected, atol=2e-5 * np.abs(expected).max())


def _tree(flat):
  tree = {"params": {}, "batch_stats": {}}
  for path, array in flat.items():
    is_other = path.startswith("batch_stats/")
    node = tree["batch_stats" if is_other else "params"]
    *parts, leaf = path.removeprefix("batch_stats/").split("/")
    for part in parts:
      node = node.setdefault(part, {})
    node[leaf] = array
  return tree


def test_caffe_file_swaps_bgr_to_rgb(tmp_path):
  shapes = flat_shapes(shapes_of(ResNet(**BODY)))
  arrays = {}
  for path, shape in shapes.items():
    bare = path.removeprefix("batch_stats/")
    for stage in range(4):
      for block in range(2):
        bare = bare.replace(f"c{stage + 2}_block{block}/", f"layer{stage + 1}.{block}.")
    bare = bare.replace("stem/", "").replace("shortcut/conv", "downsample.0")
    bare = bare.replace("shortcut/norm", "downsample.1")
    for i in (1, 2, 3):
      bare = bare.replace(f"conv{i}/conv", f"conv{i}").replace(f"conv{i}/norm", f"bn{i}")
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    head, _, leaf = bare.rpartition("/")
    value = np.random.default_rng(len(arrays)).normal(size=shape).astype(np.float32)
    arrays[f"{head}.{names.get(leaf, leaf)}"] = (
      value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
    )
  for name in ("resnet50.safetensors", "resnet50_caffe.safetensors"):
    save_file({k: np.ascontiguousarray(a) for k, a in arrays.items()}, tmp_path / name)
  plain, caffe = (
    read_backbone(str(tmp_path / n), shapes)
    for n in ("resnet50.safetensors", "resnet50_caffe.safetensors")
  )
  first = "stem/conv1/conv/kernel"
  np.testing.assert_array_equal(caffe[first], plain[first][:, :, ::-1])
  assert not np.array_equal(caffe[first], plain[first])
  for path in shapes.keys() - {first}:
    np.testing.assert_array_equal(caffe[path], plain[path])


LAMBDA = {
  "blocks": (2, 2, 2, 2), "widths": (4, 4, 8, 8), "stem": "tiered", "stem_width": 8,
  "shortcut": "conv", "se_ratio": 0.0, "lambda_blocks": ("none", "none", (1,), "all"),
  "lambda_layer": {
    "dim_k": 4, "receptive_field": 3, "position_bias": True, "pool_size": 2,
  },
}  # fmt: skip


def detector(norm):
  return RCNN(
    num_classes=2, backbone_kind="lambda_resnet", backbone={**LAMBDA, "norm": norm}, width=8,
    box_head={"width": 8}, neck="bfp",
  )  # fmt: skip


@pytest.mark.parametrize("norm", ["frozen_batch_norm", "batch_norm"])
def test_lambda_resnet_backbone_from_timm_or_run(norm, tmp_path):
  classifier = filled(shapes_of(LambdaResNet(num_classes=5, **LAMBDA)), 1)
  theirs = flatten_variables(classifier)
  save_file(
    {k: np.ascontiguousarray(a) for k, a in write(theirs, lambda_resnet_timm.TABLE).items()},
    tmp_path / "timm.safetensors",
  )
  own = filled(shapes_of(detector(norm)), 2)
  for source in (str(tmp_path / "timm.safetensors"), classifier, {**own, **_inside(classifier)}):
    loaded = flatten_variables(load_parts({"*/backbone": source}, own))
    for path, array in flatten_variables(own).items():
      bare = path.removeprefix("batch_stats/")
      if not bare.startswith("backbone/"):
        np.testing.assert_array_equal(loaded[path], array)
        continue
      name = bare.removeprefix("backbone/")
      expected = theirs.get(name, theirs.get(f"batch_stats/{name}"))
      np.testing.assert_array_equal(loaded[path], expected, err_msg=path)


def _inside(classifier):
  return {
    "params": {"backbone": {k: v for k, v in classifier["params"].items() if k != "head"}},
    "batch_stats": {"backbone": classifier["batch_stats"]},
  }


def test_timm_lambda_resnet_backbone():
  """Keys as written by timm itself."""
  path = str(golden_folder("lambda_resnet26t_a") / "weights.safetensors")
  fields = load_pretrained(path).config
  fields = {k: v for k, v in fields.items() if k not in ("num_classes", "image_size")}
  body = LambdaResNet(num_classes=None, **fields)
  found = read_backbone(path, flat_shapes(shapes_of(body)))
  stem = load_file(path)["stem.conv1.conv.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(found["stem/conv1/conv/kernel"], stem)


def test_incompatible_backbone_raises(tmp_path):
  own = filled(shapes_of(detector("batch_norm")))
  other = filled(shapes_of(LambdaResNet(num_classes=5, **{**LAMBDA, "widths": (4, 4, 8, 4)})))
  with pytest.raises(WeightsError, match="backbone_file") as info:
    load_parts({"*/backbone": other}, own)
  assert "\n" not in str(info.value)
  save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors")
  with pytest.raises(WeightsError, match=r"x\.safetensors"):
    load_parts({"*/backbone": str(tmp_path / "x.safetensors")}, own)


def test_pickle_read_without_code_execution(tmp_path):
  class Trap:
    def __reduce__(self):
      return (tmp_path.joinpath("ran").touch, ())

  for protocol in (2, 4):
    file = tmp_path / f"{protocol}.pkl"
    file.write_bytes(pickle.dumps({"a": np.arange(3.0), "note": "text"}, protocol))
    assert {k: v.tolist() for k, v in pickled_arrays.read_pickle(str(file)).items()} == {
      "a": [0, 1, 2]
    }
  (tmp_path / "trap.pkl").write_bytes(pickle.dumps({"a": Trap()}))
  with pytest.raises(WeightsError, match=r"trap\.pkl: a pickle with code"):
    pickled_arrays.read_pickle(str(tmp_path / "trap.pkl"))
  assert not (tmp_path / "ran").exists()
  (tmp_path / "cut.pkl").write_bytes(pickle.dumps({"a": np.arange(99.0)})[:90])
  with pytest.raises(WeightsError, match="truncated"):
    pickled_arrays.read_pickle(str(tmp_path / "cut.pkl"))
  (tmp_path / "none.pkl").write_bytes(pickle.dumps([1, 2]))
  with pytest.raises(WeightsError, match="without arrays"):
    pickled_arrays.read_pickle(str(tmp_path / "none.pkl"))
