"""Model sizes inferred from a file: damaged files, grayscale models."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_folder
from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.weights import WeightsError, key_map
from vit_jax_zoo.weights.checkpoint import count, outputs_of, side

BLOCK = "Transformer/encoderblock_0"
FIRST = {  # the arrays that determine sizes, per file
  "vit_timm_a": (
    "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight", "head.bias",
    "blocks.0.attn.qkv.bias",
  ),
  "vit_hf_a": (
    "vit.embeddings.patch_embeddings.projection.weight", "classifier.bias",
    "vit.encoder.layer.0.intermediate.dense.weight", "vit.encoder.layer.2.layernorm_before.weight",
  ),
  "vit_a": (
    "embedding/kernel", f"{BLOCK}/MultiHeadDotProductAttention_1/query/kernel", "head/bias",
    f"{BLOCK}/MlpBlock_3/Dense_0/kernel", "Transformer/posembed_input/pos_embedding",
  ),
  "lambda_resnet26t_a": (
    "stem.conv1.conv.weight", "stem.conv3.conv.weight", "stages.2.0.conv1_1x1.conv.weight",
    "head.fc.bias", "stages.2.1.self_attn.conv_lambda.weight",
    "stages.2.1.self_attn.norm_q.weight",
  ),
}  # fmt: skip


def copy_of(name, folder):
  """Returns the path of a copy, the file with its arrays, and the arrays."""
  if name == "vit_a":
    file = folder / "x.npz"
    shutil.copy(golden_folder(name) / "weights.npz", file)
    return str(file), file, dict(np.load(file))
  is_folder = name == "vit_hf_a"
  if is_folder:
    shutil.copy(golden_folder(name) / "config.json", folder)
  file = folder / "model.safetensors"
  source = "model.safetensors" if is_folder else "weights.safetensors"
  shutil.copy(golden_folder(name) / source, file)
  return str(folder if is_folder else file), file, load_file(file)


def save(arrays, file):
  if file.suffix == ".npz":
    np.savez(file, allow_pickle=False, **arrays)
  else:
    save_file(arrays, file)


@pytest.mark.parametrize("name", FIRST)
def test_missing_size_arrays_named(name, tmp_path, monkeypatch):
  monkeypatch.setattr(key_map, "_MAX_NAMED", 999)
  path, file, arrays = copy_of(name, tmp_path)
  rest = {key: array for key, array in arrays.items() if key not in FIRST[name]}
  save({**rest, "unknown_key": np.zeros(2, np.float32)}, file)
  with pytest.raises(WeightsError) as info:
    load_pretrained(path)
  message = str(info.value)
  for key in FIRST[name]:
    assert f"({key}" in message, message
  assert message.count("missing: ") >= len(FIRST[name])
  assert "unused: unknown_key (2,)" in message


def test_misshapen_size_arrays_named(tmp_path, monkeypatch):
  monkeypatch.setattr(key_map, "_MAX_NAMED", 999)
  path, file, arrays = copy_of("vit_timm_a", tmp_path)
  save(arrays | {key: np.zeros((1, 2, 3, 4, 5), np.float32) for key in FIRST["vit_timm_a"]}, file)
  with pytest.raises(WeightsError) as info:
    load_pretrained(path)
  for key in FIRST["vit_timm_a"]:
    assert re.search(rf"{key} (is )?\(1, 2, 3, 4, 5\)", str(info.value))


def test_invalid_class_token_named(tmp_path):
  for name, token in {"vit_timm_a": "cls_token", "vit_hf_a": "vit.embeddings.cls_token"}.items():
    path, file, arrays = copy_of(name, tmp_path)
    del arrays[token]
    save(arrays, file)
    with pytest.raises(WeightsError, match=rf"17 tokens, .*{token} missing"):
      load_pretrained(path)
  arrays |= {token: np.zeros((1, 1, 48), np.float32)}
  arrays["vit.embeddings.position_embeddings"] = np.zeros((17, 48), np.float32)
  save(arrays, file)
  with pytest.raises(WeightsError, match=r"position_embeddings is \(17, 48\)"):
    load_pretrained(path)


@pytest.mark.parametrize(
  ("name", "kernel"),
  [
    ("lambda_resnet26t_a", "stem.conv1.conv.weight"),
    ("vit_timm_a", "patch_embed.proj.weight"),
    ("vit_hf_a", "vit.embeddings.patch_embeddings.projection.weight"),
  ],
)
def test_grayscale_models(name, kernel, tmp_path):
  path, file, arrays = copy_of(name, tmp_path)
  arrays[kernel] = np.ascontiguousarray(arrays[kernel][:, :1])
  save(arrays, file)
  loaded = load_pretrained(path, image_size=32)
  assert np.ndim(loaded.preprocess.mean) == 0
  inputs = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 1), np.uint8)
  images = loaded.preprocess(list(inputs))
  assert images.shape == (2, 32, 32, 1)
  for shape in ((9, 9, 3), (9, 9)):
    given = re.escape(str(list(shape)))
    with pytest.raises(ValueError, match=rf"{given}.*\[height, width, 1\]"):
      loaded.preprocess([np.zeros(shape, np.uint8)])
  prepare = load(path, image_size=32, needs_head=False).prepare
  for gray, rgb in ((76, (255, 0, 0)), (150, (0, 255, 0)), (29, (0, 0, 255)), (9, (9, 9, 9))):
    prepared = prepare(np.full((40, 50, 3), rgb, np.uint8))
    np.testing.assert_array_equal(prepared["image"], np.full((32, 32, 1), gray))
  form = "hf" if name == "vit_hf_a" else "safetensors-timm"
  export.write(loaded, form, str(tmp_path / "again"))
  config = json.loads((tmp_path / "again" / "config.json").read_text())
  assert 1 in (
    config.get("num_channels"),
    config.get("pretrained_cfg", {}).get("input_size", [0])[0],
  )
  again = load_pretrained(str(tmp_path / "again"))
  assert again.preprocess == loaded.preprocess
  np.testing.assert_array_equal(
    load_file(tmp_path / "again" / "model.safetensors")[kernel], arrays[kernel]
  )


def test_side_count_outputs_of():
  arrays = {"a.0.w": np.zeros(3), "a.1.w": np.zeros((5, 7)), "a.11.w": np.zeros((6, 7))}
  assert side(arrays, (r"a\.\d+\.w", 2, 0)) == 5
  assert side(arrays, (r"b", 2, 0), (r"a\.\d+\.w", 1, 0)) == 3
  assert side(arrays, (r"a", 2, 0)) is None
  assert count(arrays, r"a\.(\d+)\.") == 12
  assert count(arrays, r"b\.(\d+)\.") == 0
  assert outputs_of({"head.weight": np.zeros((4, 2))}, "head") == 4
