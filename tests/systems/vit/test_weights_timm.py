"""timm's ViTs: predictions against goldens, round trips, invalid files."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_folder
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.systems.vit import weights_timm as vit_timm
from vit_jax_zoo.systems.vit.model import VisionTransformer
from vit_jax_zoo.weights import WeightsError, load_into
from vit_jax_zoo.weights import key_map as table
from vit_jax_zoo.weights.readers import read_safetensors, write_safetensors

TIMM = {"vit_timm_a": {"num_heads": 4}, "vit_timm_gap_a": {"num_heads": 2}}


def timm_file(name):
  return str(golden_folder(name) / "weights.safetensors")


def close(given, expected, atol=1e-5):
  np.testing.assert_allclose(given, expected, atol=atol)


def flat(variables):
  return traverse_util.flatten_dict(variables["params"], sep="/")


def write_timm(path, params, **options):
  write_safetensors(path, vit_timm.state_dict(params, **options))


def run(loaded, images, **kwargs):
  images = images.transpose(0, 2, 3, 1)
  return jax.jit(lambda v, x: loaded.model.apply(v, x, **kwargs))(loaded.variables, images)


def assert_same_arrays(given, expected):
  assert given.keys() == expected.keys()
  for key, array in expected.items():
    np.testing.assert_array_equal(given[key], array, strict=True)


@pytest.mark.parametrize("name", TIMM)
def test_timm_predictions_equal_golden(name, load_golden):
  config, inputs, outputs = load_golden(name)
  loaded = load_pretrained(timm_file(name), **TIMM[name])
  assert loaded.preprocess.image_size == tuple(config["img_size"])
  assert loaded.model.pool == ("mean" if config.get("global_pool") == "avg" else "cls")
  out, state = run(loaded, inputs["image"], mutable="intermediates")
  intermediates = state["intermediates"]
  close(intermediates["embedded"][0], outputs["embed"])
  blocks = intermediates["encoder"]["blocks"]
  for i, output in enumerate(blocks["output"][0]):
    close(output, outputs[f"block_{i}"])
  if "block_0.attn" in outputs:
    close(blocks["attention_output"][0][0], outputs["block_0.attn"])
    close(blocks["mlp_output"][0][0], outputs["block_0.mlp"])
  close(out["tokens"], outputs["norm"])
  close(out["features"], outputs["pre_logits"])
  close(out["logits"], outputs["logits"], 1e-4)


@pytest.mark.parametrize("name", TIMM)
def test_timm_predictions_at_other_resolution_equal_golden(name, load_golden):
  config, inputs, outputs = load_golden(name)
  loaded = load_pretrained(timm_file(name), image_size=tuple(config["new_img"]), **TIMM[name])
  if "pos_embed_resized_bicubic_antialias" in outputs:
    positions = loaded.variables["params"]["position_embedding"]["table"]
    close(positions, outputs["pos_embed_resized_bicubic_antialias"], 1e-6)
  logits = run(loaded, inputs["image_new_resolution"])["logits"]
  close(logits, outputs["logits_new_resolution"], 1e-4)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_round_trip_is_exact(scan_layers, tmp_path):
  for name, fields in TIMM.items():
    loaded = load_pretrained(timm_file(name), scan_layers=scan_layers, **fields)
    write_timm(str(tmp_path / "again.safetensors"), flat(loaded.variables))
    assert_same_arrays(load_file(tmp_path / "again.safetensors"), load_file(timm_file(name)))


def tiny_variables(size=32, **fields):
  """Returns a tiny model and random variables."""
  sizes = {"num_classes": 3, "patch_size": 8, "width": 64, "depth": 2, "num_heads": 1}
  model = VisionTransformer(**{**sizes, "mlp_dim": 32, "activation": "gelu", **fields})
  height, width = (size, size) if isinstance(size, int) else size
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, height, width, 3))))
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


RESNET = {"width": 32, "group_norm_epsilon": 1e-5, "std_epsilon": 0.0, "variance_epsilon": 1e-8}


@pytest.mark.parametrize(
  "fields",
  [
    {"qkv_bias": False, "pool": "mean", "fc_norm": True},
    {"pool": "mean", "fc_norm": True, "cls_token": True, "num_classes": None},
    {"cls_token_position": False, "scan_layers": False},
    {"representation_size": 5},
    {"patch_size": 1, "resnet": {"stage_sizes": (1, 4), **RESNET}},
    {"resnet": {"stage_sizes": (), **RESNET}},
  ],
  ids=["fc_norm", "fc_norm_cls", "no_embed_class", "pre_logits", "hybrid", "stem_only"],
)
def test_timm_fields_are_inferred(fields, tmp_path):
  path = str(tmp_path / "model.safetensors")
  model, variables = tiny_variables(**fields)
  after_pool = fields.get("fc_norm", False)
  write_timm(path, flat(variables), fc_norm=after_pool)
  loaded = load_pretrained(path, scan_layers=model.scan_layers)
  inferred = {key: getattr(loaded.model, key) for key in fields}
  assert inferred == fields
  assert_same_arrays(flat(loaded.variables), flat(variables))
  again = load_into(path, variables)
  assert_same_arrays(flat(again), flat(variables))


@pytest.mark.parametrize("cls_row", [True, False])
@pytest.mark.parametrize("size", [(32, 48), (24, 56)])
def test_position_rows_of_non_square_grid(cls_row, size, tmp_path):
  """25 rows are 4x6 patches and a class token, or 5x5 patches; the stated size decides."""
  path = str(tmp_path / "model.safetensors")
  model, variables = tiny_variables(size, depth=1, cls_token_position=cls_row)
  write_timm(path, flat(variables))
  images = np.random.default_rng(1).normal(size=(1, *size, 3)).astype(np.float32)
  expected = jax.jit(model.apply)(variables, images)["logits"]
  config = {"pretrained_cfg": {"input_size": [3, *size]}}
  models = []
  for stated in ({}, config, {**config, "model_args": {"no_embed_class": not cls_row}}):
    if stated:
      (tmp_path / "config.json").write_text(json.dumps(stated))
    fields = {} if stated else {"source_image_size": size}
    loaded = load_pretrained(path, **fields)
    models.append(loaded.model)
    assert_same_arrays(flat(loaded.variables), flat(variables))
  assert models == [loaded.model] * 3
  close(jax.jit(loaded.model.apply)(loaded.variables, images)["logits"], expected, 1e-4)
  assert loaded.model.cls_token_position == cls_row


def test_pool_is_read_from_timm_arguments(tmp_path):
  path = str(tmp_path / "model.safetensors")
  _, variables = tiny_variables(depth=1, cls_token=True, fc_norm=True)
  write_timm(path, flat(variables), fc_norm=True)
  for arguments, pool in (({}, "mean"), ({"global_pool": "token"}, "cls")):
    (tmp_path / "config.json").write_text(json.dumps({"model_args": arguments}))
    assert load_pretrained(path).model.pool == pool
  for arguments in ({"global_pool": "max"}, {"global_pool": "avg", "pool_include_prefix": True}):
    (tmp_path / "config.json").write_text(json.dumps({"model_args": arguments}))
    with pytest.raises(WeightsError, match="class token"):
      load_pretrained(path)


@pytest.mark.parametrize(
  ("added", "architecture", "message"),
  [
    ({}, "vit_base_patch16_rpn_224", "vit_base_patch16_rpn_224"),
    ({"dist_token": np.zeros((1, 1, 64), np.float32)}, "", "dist_token"),
    ({"reg_token": np.zeros((1, 4, 64), np.float32)}, "", "reg_token"),
    ({"blocks.0.ls1.gamma": np.ones(64, np.float32)}, "deit3_small_patch16_224", "LayerScale"),
    ({"blocks.0.gamma_1": np.ones(64, np.float32)}, "beit_base_patch16_224", "LayerScale"),
    ({"patch_embed.backbone.layer1.0.bn1.bias": np.ones(64, np.float32)}, "", "ResNet-D"),
  ],
)
def test_other_architecture_with_vit_keys_raises(added, architecture, message, tmp_path):
  _, variables = tiny_variables(depth=1)
  arrays = {**vit_timm.state_dict(flat(variables)), **added}
  write_safetensors(str(tmp_path / "model.safetensors"), arrays)
  (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
  with pytest.raises(WeightsError, match=message):
    load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"model_args": {"num_heads": 3}}, "num_heads"),
    ({"model_args": {"num_heads": "4"}}, "num_heads"),
    ({"model_args": {"global_pool": ""}}, "global_pool"),
    ({"model_args": {"block_fn": "ParallelScalingBlock"}}, "block_fn"),
    ({"model_args": [1]}, "model_args"),
    ({"pretrained_cfg": [1]}, "pretrained_cfg"),
    ({"architecture": ["test_vit"]}, "architecture"),
    ({"pretrained_cfg": {"mean": ["a"]}}, "mean"),
    ({"pretrained_cfg": {"std": [0.5, 0.5]}}, "std"),
    ({"pretrained_cfg": {"input_size": [160]}}, "input_size"),
    ({"input_size": "160"}, "input_size"),
    ({"pretrained_cfg": {"crop_pct": -1}}, "crop_pct"),
  ],
)
def test_invalid_timm_config_raises(config, message, tmp_path):
  _, variables = tiny_variables(depth=1)
  write_timm(str(tmp_path / "model.safetensors"), flat(variables))
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(WeightsError, match=message):
    load_pretrained(str(tmp_path))


def test_fields_are_completed_by_architecture(tmp_path, caplog):
  _, variables = tiny_variables(depth=1)
  write_timm(str(tmp_path / "model.safetensors"), flat(variables))
  with caplog.at_level("INFO", logger="absl"):
    assert load_pretrained(str(tmp_path)).model.num_heads == 1
  assert "assumes 1 heads, activation gelu, pool cls" in caplog.text
  for name in ("test_vit", "timm/test_vit.r160_in1k"):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    assert load_pretrained(str(tmp_path)).model.num_heads == 2
  architecture = "vit_so400m_patch16_siglip_gap_256"
  (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}))
  assert load_pretrained(str(tmp_path)).model.activation == "gelu_tanh"


def test_architecture_that_is_no_plain_vit_warns(tmp_path, caplog):
  _, variables = tiny_variables(depth=1)
  write_timm(str(tmp_path / "model.safetensors"), flat(variables))
  for name in ("vit_base_patch16_224.augreg_in21k", "beit_base_patch16_224"):
    caplog.clear()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    load_pretrained(str(tmp_path))
    assert (
      "'beit_base_patch16_224' in config.json, no plain ViT" in caplog.text
    ) == name.startswith("beit")


def test_wrapper_prefixes_are_removed(tmp_path):
  _, variables = tiny_variables(depth=1)
  arrays = vit_timm.state_dict(flat(variables))
  for prefix in ("_orig_mod.", "module.", "model.", "_orig_mod.module."):
    prefixed = {prefix + key: x for key, x in arrays.items()}
    write_safetensors(str(tmp_path / "x.safetensors"), prefixed)
    loaded = load_pretrained(str(tmp_path / "x.safetensors"))
    assert_same_arrays(flat(loaded.variables), flat(variables))


def test_image_size_resolves_ambiguous_position_table(tmp_path):
  """16 rows are 4x4 patches, or 3x5 patches and a class token."""
  path = str(tmp_path / "model.safetensors")
  _, variables = tiny_variables((24, 40), depth=1)
  write_timm(path, flat(variables))
  for fields in ({"image_size": (24, 40)}, {"source_image_size": (24, 40)}):
    loaded = load_pretrained(path, **fields)
    assert loaded.model.cls_token_position
    assert_same_arrays(flat(loaded.variables), flat(variables))
  export.write(loaded, "safetensors-timm", str(tmp_path / "again"))
  again = load_pretrained(str(tmp_path / "again"))
  assert again.model.cls_token_position
  assert_same_arrays(flat(again.variables), flat(variables))
  assert not load_pretrained(path).model.cls_token_position


def test_load_into_resolves_ambiguous_position_table(tmp_path):
  _, variables = tiny_variables(size=(24, 40), depth=1)  # 16 rows: 3 x 5 and the class token's
  path = str(tmp_path / "x.safetensors")
  write_timm(path, flat(variables))
  loaded = load_into(path, variables, position_grid=(3, 5))
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_incomplete_class_names_are_completed(tmp_path, caplog):
  _, variables = tiny_variables(depth=1)
  write_timm(str(tmp_path / "model.safetensors"), flat(variables))
  (tmp_path / "config.json").write_text(json.dumps({"label_names": ["ant", "bee"]}))
  with caplog.at_level("WARNING"):
    assert load_pretrained(str(tmp_path)).class_names == ("ant", "bee", "2")
  assert "2 class names, expected 3" in caplog.text
  assert load_pretrained(str(tmp_path), num_classes=2).class_names == ()


def test_bfloat16_file_is_read_as_float32(tmp_path):
  arrays = {
    key: array.astype(jnp.bfloat16) for key, array in load_file(timm_file("vit_timm_a")).items()
  }
  save_file(arrays, tmp_path / "half.safetensors")
  loaded = load_pretrained(str(tmp_path / "half.safetensors"), num_heads=4)
  assert {leaf.dtype for leaf in jax.tree.leaves(loaded.variables)} == {np.dtype("float32")}
  np.testing.assert_array_equal(
    loaded.variables["params"]["cls_token"], arrays["cls_token"].astype(np.float32)
  )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_read_safetensors_from_bucket(dtype, tmp_path, monkeypatch):
  real = epath.Path
  arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype)}
  save_file(arrays, tmp_path / "x.safetensors")
  (tmp_path / "y.safetensors").write_bytes(b"else")
  monkeypatch.setattr(epath, "Path", lambda path: real(str(path).replace("gs://b", str(tmp_path))))
  loaded = read_safetensors("gs://b/x.safetensors")
  assert loaded["a"].dtype == np.float32
  np.testing.assert_array_equal(loaded["a"], arrays["a"].astype(np.float32))
  for missing in ("y", "z"):
    with pytest.raises(WeightsError, match=f"gs://b/{missing}.safetensors"):
      read_safetensors(f"gs://b/{missing}.safetensors")


def test_head_of_other_num_classes_is_zero():
  loaded = load_pretrained(timm_file("vit_timm_a"), num_heads=4, num_classes=7)
  assert loaded.variables["params"]["head"]["kernel"].shape == (48, 7)
  assert not loaded.variables["params"]["head"]["kernel"].any()


def test_preprocessing_is_read_from_config(tmp_path):
  shutil.copytree(golden_folder("vit_timm_a"), tmp_path / "timm")
  settings = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "input_size": [3, 32, 32]}
  config = {"architecture": "vit_small", "pretrained_cfg": settings}
  (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
  path = str(tmp_path / "timm" / "weights.safetensors")
  preprocess = load_pretrained(path, num_heads=4).preprocess
  assert preprocess.mean == (0.1, 0.2, 0.3)
  assert preprocess.image_size == (32, 32)
  flat_config = {"architecture": "vit_small", **settings, "crop_pct": None, "labels": ["a"] * 10}
  content = b"\xef\xbb\xbf" + json.dumps(flat_config).encode()  # a byte order mark
  (tmp_path / "timm" / "config.json").write_bytes(content)
  loaded = load_pretrained(path, num_heads=4)
  assert (loaded.preprocess, loaded.class_names) == (preprocess, ("a",) * 10)


def test_invalid_file_reports_all_errors(tmp_path, monkeypatch):
  monkeypatch.setattr(table, "_MAX_NAMED", 9)
  arrays = load_file(timm_file("vit_timm_a"))
  del arrays["norm.weight"]
  arrays["blocks.0.extra.weight"] = np.zeros(48, np.float32)
  arrays["blocks.1.mlp.fc2.weight"] = np.zeros((48, 5), np.float32)
  arrays["blocks.2.attn.qkv.weight"] = np.zeros((3, 48), np.float32)
  save_file(arrays, tmp_path / "broken.safetensors")
  with pytest.raises(WeightsError) as info:
    load_pretrained(str(tmp_path / "broken.safetensors"), num_heads=4)
  message = str(info.value)
  assert "missing: norm/scale (48,) (norm.weight or fc_norm.weight)" in message
  assert "unused: blocks.0.extra.weight (48,)" in message
  assert "wrong shape: blocks.1.mlp.fc2.weight is (48, 5)" in message
  assert "wrong shape: blocks.2.attn.qkv.weight[value] is (1, 48)" in message
  assert "\n" not in message


def test_invalid_files_and_options_raise(tmp_path):
  with pytest.raises(ValueError, match=r"model\.safetensors"):
    load_pretrained(str(tmp_path))
  cut = tmp_path / "cut.safetensors"
  cut.write_bytes((golden_folder("vit_timm_a") / "weights.safetensors").read_bytes()[:9000])
  with pytest.raises(WeightsError, match=r"cut\.safetensors"):
    load_pretrained(str(cut))
  save_file({"conv.weight": np.zeros(1)}, tmp_path / "other.safetensors")
  with pytest.raises(WeightsError, match=r"conv\.weight"):
    load_pretrained(str(tmp_path / "other.safetensors"))
