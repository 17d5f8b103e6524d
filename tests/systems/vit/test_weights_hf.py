"""Hugging Face's ViTs: predictions against goldens, round trips, invalid folders."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.systems.vit.test_weights_timm import (
  assert_same_arrays,
  close,
  flat,
  run,
  timm_file,
)
from vit_jax_zoo import load_pretrained
from vit_jax_zoo.systems.vit import weights_hf as vit_hf
from vit_jax_zoo.weights import WeightsError
from vit_jax_zoo.weights import key_map as table

HF = ("vit_hf_a", "vit_hf_base_a")


def hf_folder(name):
  return str(golden_folder(name))


@pytest.mark.parametrize("name", HF)
def test_hugging_face_predictions_equal_golden(name, load_golden):
  config, inputs, outputs = load_golden(name)
  loaded = load_pretrained(hf_folder(name))
  assert loaded.model.layer_norm_epsilon == config["layer_norm_eps"]
  assert loaded.model.activation == "gelu"
  out, state = run(loaded, inputs["pixel_values"], mutable="intermediates")
  for i, output in enumerate(state["intermediates"]["encoder"]["blocks"]["output"][0]):
    close(output, outputs[f"layer_{i}"])
  close(out["tokens"], outputs["layernorm"])
  is_base = name == "vit_hf_base_a"
  assert ("logits" in out) != is_base
  close(out["features"] if is_base else out["logits"], outputs[_result(is_base)], 1e-4)

  resized = load_pretrained(hf_folder(name), image_size=tuple(config["new_img"]))
  positions = resized.variables["params"]["position_embedding"]["table"]
  close(positions, outputs["interpolated_position_embeddings"], 1e-6)
  out = run(resized, inputs["pixel_values_new"])
  expected = outputs[f"interpolated_{_result(is_base)}"]
  close(out["features"] if is_base else out["logits"], expected, 1e-4)


def _result(is_base):
  return "pooler_output" if is_base else "logits"


@pytest.mark.parametrize("scan_layers", [True, False])
def test_round_trip_is_exact(scan_layers, tmp_path):
  for name in HF:
    loaded = load_pretrained(hf_folder(name), scan_layers=scan_layers)
    export = dataclasses.replace(loaded, variables=table.unroll(flat(loaded.variables)))
    vit_hf.write_checkpoint(str(tmp_path), export)
    expected = load_file(golden_folder(name) / "model.safetensors")
    assert_same_arrays(load_file(tmp_path / "model.safetensors"), expected)
    again = load_pretrained(str(tmp_path), scan_layers=scan_layers)
    assert again.model == loaded.model
    assert again.preprocess == loaded.preprocess


def test_sigmoid_objective_travels(tmp_path):
  loaded = load_pretrained(hf_folder("vit_hf_a"), scan_layers=False)
  assert "objective" not in loaded.task_fields
  fields = {**loaded.task_fields, "objective": "sigmoid"}
  export = dataclasses.replace(loaded, variables=flat(loaded.variables), task_fields=fields)
  vit_hf.write_checkpoint(str(tmp_path), export)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["problem_type"] == "multi_label_classification"
  assert load_pretrained(str(tmp_path)).task_fields["objective"] == "sigmoid"


def test_head_of_other_num_classes_without_pre_logits():
  base = load_pretrained(hf_folder("vit_hf_base_a"), num_classes=7, representation_size=None)
  assert base.variables["params"]["head"]["bias"].shape == (7,)
  assert "pre_logits" not in base.variables["params"]


def test_preprocessing_is_read_from_config(tmp_path):
  shutil.copytree(hf_folder("vit_hf_a"), tmp_path / "hf")
  settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
  (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(settings))
  preprocess = load_pretrained(str(tmp_path / "hf")).preprocess
  white = np.full((4, 4, 3), 255, np.uint8)
  close(preprocess([white])[0, 0, 0], [6.0, 2.5, 4 / 3])


@pytest.mark.parametrize(
  ("key", "value", "named"),
  [
    ("num_attention_heads", "4", "num_heads"),
    ("patch_size", 0, "patch_size"),
    ("image_size", "32", "image_size"),
    ("image_size", 10**6, "image_size"),
    ("layer_norm_eps", "1e-6", "layer_norm_epsilon"),
    ("layer_norm_eps", float("nan"), "'NaN'; expected"),
    ("hidden_act", ["gelu"], "hidden_act"),
  ],
)
def test_wrong_values_in_config_named(key, value, named, tmp_path):
  shutil.copy(golden_folder("vit_hf_a") / "model.safetensors", tmp_path)
  config = {"num_attention_heads": 4, "patch_size": 8, "image_size": 32, key: value}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=rf"^{tmp_path}.*{named} "):
    load_pretrained(str(tmp_path))


def test_invalid_folders_and_models_raise(tmp_path):
  shutil.copy(golden_folder("vit_hf_a") / "model.safetensors", tmp_path)
  with pytest.raises(WeightsError, match=r"no config\.json beside"):
    load_pretrained(str(tmp_path))
  config = {"num_attention_heads": 4, "patch_size": 8, "hidden_act": "mish"}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(WeightsError, match=r"hidden_act 'mish'"):
    load_pretrained(str(tmp_path))
  config = {"num_attention_heads": 4, "patch_size": [8, 8]}
  (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": 32}))
  assert load_pretrained(str(tmp_path)).model.patch_size == 8
  (tmp_path / "config.json").write_text(json.dumps({**config, "patch_size": [8, 4]}))
  with pytest.raises(WeightsError, match=r"patches of \[8, 4\]"):
    load_pretrained(str(tmp_path))
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(WeightsError, match="num_attention_heads, patch_size"):
    load_pretrained(str(tmp_path))
  mean = load_pretrained(timm_file("vit_timm_gap_a"), num_heads=2)
  with pytest.raises(WeightsError, match=r"pool='mean'"):
    vit_hf.write_checkpoint(str(tmp_path), dataclasses.replace(mean, variables={}))
  with pytest.raises(WeightsError, match="both pre_logits and head"):
    vit_hf.state_dict({"pre_logits/kernel": np.zeros((1, 1)), "head/kernel": np.zeros((1, 1))})
