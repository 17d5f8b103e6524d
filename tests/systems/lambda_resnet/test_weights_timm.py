import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import golden_folder
from tests.systems.lambda_resnet.timm_file import read_variables, write_variables
from vit_jax_zoo.systems.lambda_resnet import weights_timm as lambda_resnet_timm
from vit_jax_zoo.systems.lambda_resnet.model import LambdaResNet
from vit_jax_zoo.weights import key_map
from vit_jax_zoo.weights.key_map import WeightsError
from vit_jax_zoo.weights.load import read_checkpoint

FIXTURES = ("lambda_resnet26t_a", "lambda_resnet50ts_a", "lambda_resnet26rpt_a")


def state_dict(name):
  return load_file(golden_folder(name) / "weights.safetensors")


def model_and_shapes(published, side=128):
  model = LambdaResNet(**lambda_resnet_timm.infer_fields(published, "file"))
  images = jnp.zeros((1, side, side, 3))
  return model, jax.eval_shape(lambda: model.init(jax.random.key(0), images))


@pytest.mark.parametrize("name", FIXTURES)
def test_timm_fields_are_inferred_and_round_trip_is_exact(name, load_golden):
  published, (config, _, _) = state_dict(name), load_golden(name)
  model, shapes = model_and_shapes(published, config["img"])
  assert model.activation == config["act"]
  assert model.num_classes == config["kwargs"]["num_classes"]
  assert model.stem_width == config["stem_channels"][-1]
  variables = read_variables(published, shapes, name)
  assert jax.tree.map(lambda x: x.shape, variables) == jax.tree.map(lambda x: x.shape, shapes)
  exported = write_variables(variables)
  assert exported.keys() == published.keys()
  for key, array in published.items():
    if not key.endswith("num_batches_tracked"):
      np.testing.assert_array_equal(exported[key], array, strict=True)


def test_invalid_file_reports_all_errors(monkeypatch):
  monkeypatch.setattr(key_map, "_MAX_NAMED", 9)
  published = state_dict("lambda_resnet26t_a")
  _, shapes = model_and_shapes(published)
  published["head.fc.weight"] = published["head.fc.weight"][:, :5]
  published["stages.2.1.self_attn.qkv.weight"] = np.zeros(3, np.float32)
  published["stem.conv9.conv.weight"] = np.zeros(1, np.float32)
  published["stages.0.0.conv1_1x1.bn.bias"] = np.zeros(16, np.int32)
  del published["stages.3.1.post_attn.running_var"]
  with pytest.raises(WeightsError) as error:
    read_variables(published, shapes, "x.safetensors")
  for problem in (
    "x.safetensors: does not fit",
    "wrong shape: head.fc.weight is (5, 10)",
    "wrong shape: stages.2.1.self_attn.qkv.weight is (3,)",
    "no floating-point numbers: stages.0.0.conv1_1x1.bn.bias is int32",
    "unused: stem.conv9.conv.weight",
    "missing: batch_stats/c5_block1/lambda_norm/var (128,) (stages.3.1.post_attn.running_var)",
  ):
    assert problem.replace("(5, 10)", str(published["head.fc.weight"].shape)) in str(error.value)


def test_file_of_other_model_raises():
  with pytest.raises(WeightsError, match=r"vit\.bin: .* blocks"):
    lambda_resnet_timm.infer_fields({"blocks.0.norm1.weight": np.zeros(3)}, "vit.bin")


def read_with(arguments, folder):
  weights = golden_folder("lambda_resnet26t_a") / "weights.safetensors"
  shutil.copy(weights, folder / "model.safetensors")
  config = {"architecture": "lambda_resnet26t", "model_args": arguments}
  (folder / "config.json").write_text(json.dumps(config))
  return read_checkpoint(str(folder))


def test_stated_activation(tmp_path):
  stated = {"act_layer": "silu", "global_pool": "avg", "width_factor": 0.25, "aa_layer": None}
  assert read_with(stated, tmp_path).fields["activation"] == "silu"
  assert read_with({}, tmp_path).fields["activation"] == "relu"


@pytest.mark.parametrize(
  "arguments",
  [
    {"act_layer": "gelu"},
    {"global_pool": "max"},
    {"output_stride": 16},
    {"aa_layer": "blurpc"},
    {"stem_pool": ""},
  ],
)
def test_unsupported_argument_raises(arguments, tmp_path):
  with pytest.raises(WeightsError, match=rf"config\.json: {next(iter(arguments))} is "):
    read_with(arguments, tmp_path)
