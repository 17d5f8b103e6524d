"""Published detectors with FPT, and FPTs alone, from the official code."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_folder
from tests.systems.rcnn.test_weights import (
  MODELS,
  SMALL,
  assert_same,
  check_class_ids,
  check_round_trip,
  check_unsupported,
  pretrained,
  random_variables,
)
from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo import export
from vit_jax_zoo.inference.load import load, load_pretrained
from vit_jax_zoo.systems.rcnn.model import RCNN
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.weights import WeightsError, load_parts


@pytest.mark.parametrize(
  "kind", ["official", pytest.param("official_2mlp", marks=pytest.mark.slow)]
)
def test_detector_round_trip_by_path_is_exact(kind, tmp_path):
  check_round_trip(kind, tmp_path)


@pytest.mark.slow
def test_contiguous_classes_become_coco_ids(tmp_path):
  check_class_ids("official", 81, tmp_path)


@pytest.mark.parametrize(
  ("fields", "form", "message"),
  [
    (SMALL, "pth", "neck='fpn'"),
    ({**SMALL, "neck": "fpt"}, "pth-fpt", "variant='official'"),
  ],
)
def test_export_of_unsupported_model_raises(fields, form, message, tmp_path):
  check_unsupported(fields, form, message, tmp_path)


def test_norm_statistics_are_folded_for_caffe_export(tmp_path):
  variables = random_variables("official")
  path = str(tmp_path / "detector.safetensors")
  export.write(pretrained(RCNN(**MODELS["official"]), variables), "pth", path)
  loaded = load_file(path)
  x = np.linspace(-2, 2, 8)
  for theirs, ours in (("res1.bn1", "stem/conv1"), ("res3.1.bn1", "c3_block1/conv1")):
    norm = variables["batch_stats"]["backbone"]
    for part in (*ours.split("/"), "norm"):
      norm = norm[part]
    channels = len(norm["mean"])
    expected = (x[:channels] - norm["mean"]) / np.sqrt(norm["var"] + 1e-5)
    expected = expected * norm["scale"] + norm["bias"]
    weight, bias = (loaded[f"Conv_Body.conv_body.{theirs}.{n}"] for n in ("weight", "bias"))
    np.testing.assert_allclose(x[:channels] * weight + bias, expected, rtol=1e-5)
  assert not any(key.endswith("running_var") and "conv_body" in key for key in loaded)


@pytest.mark.parametrize("name", [pytest.param("fpt_a", marks=pytest.mark.slow), "fpt_gn_a"])
def test_fpt_round_trip_is_exact(name, tmp_path, monkeypatch):
  path = str(golden_folder(name) / "weights.safetensors")
  published, loaded = load_file(path), load_pretrained(path)
  export.write(loaded, "pth", str(tmp_path / "again.safetensors"))
  written = load_file(tmp_path / "again.safetensors")
  assert written.keys() == published.keys()
  for key, array in published.items():
    np.testing.assert_array_equal(written[key], array, err_msg=key, strict=True)
  monkeypatch.setattr("vit_jax_zoo.weights.load_pretrained", lambda path: loaded)
  with pytest.raises(ValueError, match=r"--config\.task\.<part>_file"):
    load(path)


def test_fpt_file_initializes_neck_and_is_exported(tmp_path):
  source, target = (RCNN(**MODELS["official"]) for _ in range(2))
  theirs, ours = (random_variables("official", seed) for seed in (1, 2))
  whole, alone = (str(tmp_path / f"{n}.safetensors") for n in ("whole", "alone"))
  export.write(pretrained(source, theirs), "pth", whole)
  export.write(pretrained(source, theirs), "pth-fpt", alone)
  assert "st_p5.conv_qs.weight" in load_file(alone)
  for file in (whole, alone, theirs):
    task = create_task("instance_detection", target, num_classes=3)
    assert not task.weight_files
    files = {"*/neck": file} if file is theirs else _task_with(target, file).weight_files
    loaded = load_parts(files, ours)
    for kind in ("params", "batch_stats"):
      assert_same({"params": loaded[kind]["neck"]}, {"params": theirs[kind]["neck"]})
    rest = {k: v for k, v in loaded["params"].items() if k != "neck"}
    assert_same({"params": rest}, {"params": {k: ours["params"][k] for k in rest}})


def _task_with(model, file):
  return create_task("instance_detection", model, num_classes=3, neck_file=file)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda a: a | {"st_p4.conv_ks.bias": a["st_p4.conv_ks.bias"] + 1}, "differs from conv_qs"),
    (lambda a: {k: v for k, v in a.items() if k != "fpt_p3.weight"}, "missing: join_1/kernel"),
    (lambda a: a | {"gt_p2_p4.g.bias": a["gt_p2_p4.g.bias"][1:]}, "wrong shape: gt_p2_p4.g.bias"),
  ],
)
def test_invalid_fpt_file_raises(change, message, tmp_path):
  published = load_file(golden_folder("fpt_a") / "weights.safetensors")
  save_file(change(dict(published)), tmp_path / "fpt.safetensors")
  with pytest.raises(WeightsError, match=message) as caught:
    load_pretrained(str(tmp_path / "fpt.safetensors"))
  assert "\n" not in str(caught.value)
