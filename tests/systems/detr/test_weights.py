"""DETR's published weights: predictions against goldens, round trips, invalid files."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.systems.detr.files import (
  HUGGING_FACE,
  OFFICIAL,
  arrays_of,
  hugging_face_folder,
  official_file,
  overrides_of,
)
from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo import load_pretrained
from vit_jax_zoo.systems.detr import weights_hf as detr_hf
from vit_jax_zoo.systems.detr import weights_official as detr_official
from vit_jax_zoo.systems.detr.model import Detr
from vit_jax_zoo.tasks import create_task
from vit_jax_zoo.weights import WeightsError, fit_to_model, load_into, load_parts, relayout
from vit_jax_zoo.weights.key_map import unroll
from vit_jax_zoo.weights.load import flatten_variables

close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)


def assert_same_arrays(given, expected):
  assert given.keys() == expected.keys()
  for key, array in expected.items():
    np.testing.assert_array_equal(given[key], array, strict=True, err_msg=key)


def export_of(loaded):
  flat = unroll({k: np.asarray(v) for k, v in flatten_variables(loaded.variables).items()})
  return dataclasses.replace(loaded, variables=flat)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  """`load(name)`: the fixture's model and weights, cached."""

  @functools.cache
  def read(name):
    if name in OFFICIAL:
      return load_pretrained(official_file(name), **overrides_of(name))
    return load_pretrained(hugging_face_folder(name, tmp_path_factory.mktemp(name)))

  return read


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_weights_predict_golden_outputs(name, load, load_golden):
  config, inputs, outputs = load_golden(name)
  loaded = load(name)
  apply = jax.jit(loaded.model.apply)
  images, mask = np.moveaxis(inputs["pixel_values"], 1, -1), inputs["pixel_mask"].astype(bool)
  got = apply(loaded.variables, images, mask)
  close(got["logits"], outputs["logits"])
  close(got["boxes_cxcywh"], outputs["pred_boxes"], atol=2e-5)
  if "pred_masks" in outputs:
    close(got["mask_logits"], outputs["pred_masks"])
  # Without a mask, transformers treats the padding as part of the image.
  unmasked = apply(loaded.variables, images, np.ones_like(mask))
  close(unmasked["logits"], outputs["nomask/logits"])
  close(unmasked["boxes_cxcywh"], outputs["nomask/pred_boxes"], atol=2e-5)
  assert len(loaded.class_names) == config["num_labels"]


def test_model_fields_are_inferred_from_official_file(load):
  # test_model.py compares predictions with official weights.
  model = load("detr_panoptic_a").model
  assert (model.num_heads, model.mask_head) == (8, True)
  assert load("detr_panoptic_a").preprocess.max_side == 1333
  model = load("detr_a").model
  assert (model.encoder_depth, model.decoder_depth, model.num_queries) == (2, 3, 9)


def test_learned_positions_round_trip_is_exact(tmp_path):
  arrays = load_file(official_file("detr_a"))
  rng = np.random.default_rng(0)
  for side in ("row", "col"):
    arrays[f"backbone.1.{side}_embed.weight"] = rng.normal(size=(50, 32)).astype(np.float32)
  save_file(arrays, tmp_path / "learned.safetensors")
  loaded = load_pretrained(str(tmp_path / "learned.safetensors"))
  assert loaded.model.position_embedding == "learned"
  assert_same_arrays(detr_official.state_dict(export_of(loaded).variables), arrays)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_round_trip_is_exact(name, load, tmp_path):
  again = str(tmp_path / "again.safetensors")
  detr_official.write_checkpoint(again, export_of(load(name)))
  assert_same_arrays(load_file(again), load_file(official_file(name)))


def test_official_export_of_unrolled_layers_is_exact():
  loaded = load_pretrained(official_file("detr_a"), scan_layers=False)
  assert "decoder_2" in loaded.variables["params"]["transformer"]
  written = detr_official.state_dict(export_of(loaded).variables)
  assert_same_arrays(written, load_file(official_file("detr_a")))


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_round_trip_is_exact(name, load, tmp_path):
  timm = name != "detr_hf_a"
  written = detr_hf.state_dict(export_of(load(name)).variables, timm=timm)
  assert_same_arrays(written, arrays_of(hugging_face_folder(name, tmp_path)))


def test_hugging_face_folder_round_trip_keeps_config_preprocess_and_classes(load, tmp_path):
  loaded = load("detr_hf_panoptic_a")
  detr_hf.write_checkpoint(str(tmp_path), export_of(loaded))
  reread = load_pretrained(str(tmp_path))
  assert reread.config == loaded.config
  assert reread.preprocess == loaded.preprocess
  assert reread.class_names == loaded.class_names
  assert_same_arrays(flatten_variables(reread.variables), flatten_variables(loaded.variables))


def test_official_file_round_trips_through_hugging_face_folder(load, tmp_path):
  detr_hf.write_checkpoint(str(tmp_path), export_of(load("detr_panoptic_a")))
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["architectures"] == ["DetrForSegmentation"]
  assert config["backbone_config"]["out_features"] == ["stage1", "stage2", "stage3", "stage4"]
  back = detr_official.state_dict(export_of(load_pretrained(str(tmp_path))).variables)
  assert_same_arrays(back, load_file(official_file("detr_panoptic_a")))


def test_hugging_face_config_of_dc5_uses_timm_backbone():
  fields = {
    **{"width": 256, "num_queries": 100, "num_classes": 91, "num_heads": 8, "mlp_dim": 2048},
    **{"encoder_depth": 6, "decoder_depth": 6, "decoder": None, "dropout_rate": 0.1},
    **{"masked_backbone": False, "mask_head": False},
    **{"position_embedding": "sine", "backbone": {"blocks": (3, 4, 23, 3), "output_stride": 16}},
  }
  config = detr_hf.config_of(fields)
  assert (config["backbone"], config["dilation"]) == ("resnet101", True)
  with pytest.raises(WeightsError, match=r"backbone: .*dilated"):
    detr_hf.config_of({**fields, "backbone": {"blocks": (1, 1, 1, 1), "output_stride": 16}})
  with pytest.raises(WeightsError, match=r"backbone: .*stem='deep', norm='group_norm'"):
    detr_hf.config_of({**fields, "backbone": {"stem": "deep", "norm": "group_norm"}})


def test_file_named_dc5_has_dilated_backbone(tmp_path):
  path = tmp_path / "detr-r50-dc5-tiny.safetensors"
  shutil.copy(official_file("detr_dc5_a"), path)
  assert load_pretrained(str(path)).model.backbone["output_stride"] == 16


def test_class_head_of_other_num_classes_is_zero():
  path = official_file("detr_a")
  loaded = load_pretrained(path, num_classes=3)
  params = loaded.variables["params"]
  assert params["class_head"]["kernel"].shape == (64, 4)
  assert not params["class_head"]["kernel"].any()
  np.testing.assert_array_equal(params["query_embedding"], load_file(path)["query_embed.weight"])


def test_mask_head_is_added_or_dropped_on_load():
  detector = load_pretrained(official_file("detr_a"), mask_head=True)
  assert {"mask_head", "mask_attention"} <= set(detector.variables["params"])
  alone = load_pretrained(official_file("detr_panoptic_a"), mask_head=False)
  assert not {"mask_head", "mask_attention"} & set(alone.variables["params"])


def test_frozen_batch_norms_load_into_trainable_batch_norms(load):
  loaded = load("detr_a")
  model = loaded.model.clone(backbone={**loaded.model.backbone, "norm": "batch_norm"})
  images = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  params = load_into(official_file("detr_a"), variables)["params"]
  expected = load_file(official_file("detr_a"))["backbone.0.body.bn1.weight"]
  np.testing.assert_array_equal(params["backbone"]["stem"]["conv1"]["norm"]["scale"], expected)


@pytest.mark.parametrize(
  ("key", "array", "message"),
  [
    ("transformer.decoder.norm.bias", None,
     "missing: transformer/decoder_norm/bias (64,) (transformer.decoder.norm.bias)"),
    ("transformer.encoder.layers.0.norm3.weight", np.zeros(64, np.float32),
     "unused: transformer.encoder.layers.0.norm3.weight (64,)"),
    ("transformer.encoder.layers.1.linear2.weight", np.zeros((64, 5), np.float32),
     "wrong shape: transformer.encoder.layers.1.linear2.weight is (64, 5)"),
    ("transformer.decoder.layers.1.multihead_attn.in_proj_weight", np.zeros((3, 64), np.float32),
     "wrong shape: transformer.decoder.layers.1.multihead_attn.in_proj_weight["),
  ],
)  # fmt: skip
def test_invalid_file_reports_key_and_shape(tmp_path, key, array, message):
  arrays = {**load_file(official_file("detr_a")), key: array}
  save_file({k: v for k, v in arrays.items() if v is not None}, tmp_path / "broken.safetensors")
  with pytest.raises(WeightsError) as info:
    load_pretrained(str(tmp_path / "broken.safetensors"))
  assert message in str(info.value)
  assert "\n" not in str(info.value)


@pytest.mark.parametrize(
  ("field", "change"),
  [
    ("activation_function", {"activation_function": "gelu"}),
    ("backbone_config.downsample_in_bottleneck",
     {"backbone_config": {"hidden_act": "relu", "downsample_in_bottleneck": True}}),
    ("model_type is 'conditional_detr'", {"model_type": "conditional_detr"}),
    ("model_type is 'deformable_detr'", {"model_type": "deformable_detr"}),
    ("model_type is 'table-transformer'", {"model_type": "table-transformer"}),
  ],
)  # fmt: skip
def test_other_hugging_face_architecture_raises(field, change, tmp_path):
  folder = hugging_face_folder("detr_hf_a", tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
  with pytest.raises(WeightsError, match=rf"config\.json: {field}"):
    load_pretrained(folder)


@pytest.mark.parametrize(
  ("key", "name"),
  [
    ("transformer.decoder.layers.0.ca_qcontent_proj.weight", "Conditional DETR"),
    ("transformer.level_embed", "Deformable DETR"),
    ("transformer.encoder.norm.weight", "Table Transformer"),
  ],
)
def test_official_file_of_other_architecture_raises(key, name, tmp_path):
  arrays = load_file(official_file("detr_a")) | {key: np.zeros(64, np.float32)}
  save_file(arrays, tmp_path / "other.safetensors")
  with pytest.raises(WeightsError, match=name):
    load_pretrained(str(tmp_path / "other.safetensors"))


def test_incomplete_id2label_warns_and_keeps_names(tmp_path, caplog):
  folder = hugging_face_folder("detr_hf_a", tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  config["id2label"] = {"0": "N/A", "1": "cat", "3": "dog"}
  (tmp_path / "config.json").write_text(json.dumps(config))
  with caplog.at_level("WARNING"):
    names = load_pretrained(folder).class_names
  assert names == ("N/A", "cat", "2", "dog", *map(str, range(4, 11)))
  assert "8 of 11 classes" in caplog.text


def test_missing_config_or_key_raises(tmp_path):
  folder = hugging_face_folder("detr_hf_a", tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(WeightsError, match=r"no config\.json"):
    load_pretrained(folder)
  arrays = load_file(official_file("detr_a"))
  del arrays["query_embed.weight"]
  save_file(arrays, tmp_path / "cut.safetensors")
  with pytest.raises(WeightsError, match=r"query_embed\.weight"):
    load_pretrained(str(tmp_path / "cut.safetensors"))


def resnet_file(path, names=lambda key: key):
  """Writes the fixture's backbone as torchvision would save it, with a classifier."""
  prefix = "backbone.0.body."
  arrays = load_file(official_file("detr_a"))
  arrays = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
  arrays |= {"fc.weight": np.zeros((7, 256), np.float32), "fc.bias": np.zeros(7, np.float32)}
  arrays["bn1.num_batches_tracked"] = np.zeros((), np.int64)
  save_file({names(key): array for key, array in arrays.items()}, path)
  return str(path)


@pytest.mark.parametrize("norm", ["frozen_batch_norm", "batch_norm"])
def test_backbone_file_initializes_backbone(norm, load, tmp_path):
  path = resnet_file(tmp_path / "resnet.safetensors")
  model = fixture_model(norm)
  abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  variables = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), abstract)
  task = create_task("detection", model, num_classes=11, backbone_file=path)
  loaded = load_parts(task.weight_files, variables)
  expected = flatten_variables(load("detr_a").variables)
  for key, array in flatten_variables(loaded).items():
    bare = key.removeprefix("batch_stats/")
    if bare.startswith("backbone/"):
      expected_array = expected.get(bare, expected.get(f"batch_stats/{bare}"))
      np.testing.assert_array_equal(array, expected_array)
    else:
      assert (array == 0.5).all()


def fixture_model(norm):
  backbone = {"blocks": (2, 1, 2, 1), "widths": (8, 16, 32, 64), "stem_width": 8, "norm": norm}
  return Detr(11, 9, 64, 2, 3, mlp_dim=128, backbone=backbone)


def test_backbone_file_that_does_not_fit_raises(tmp_path):
  path = resnet_file(tmp_path / "resnet.safetensors", lambda key: key.replace("layer3", "layer9"))
  model = fixture_model("frozen_batch_norm")
  abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  with pytest.raises(WeightsError, match=r"missing: .*c4_block0/conv1/"):
    load_parts({"*/backbone": path}, abstract)
  save_file({"conv.weight": np.zeros(1)}, tmp_path / "other.safetensors")
  with pytest.raises(WeightsError, match=r"other\.safetensors.* conv\.weight"):
    load_parts({"*/backbone": str(tmp_path / "other.safetensors")}, abstract)
  own = {"params": {"x": np.ones(1)}}
  assert load_parts({"*/trunk": path}, own) == own


def test_relayout_round_trip_is_exact(load):
  loaded = load("detr_a")
  unrolled = relayout(loaded.variables, scan_layers=False)
  assert "decoder_2" in unrolled["params"]["transformer"]
  again = relayout(unrolled, scan_layers=True)
  assert_same_arrays(flatten_variables(again), flatten_variables(loaded.variables))


def test_fit_to_model_keeps_all_but_class_head(load):
  source, model = load("detr_a").variables, load("detr_a").model.clone(num_classes=4)
  abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  fresh = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), abstract)
  result = flatten_variables(fit_to_model(source, fresh, "the run"))
  for key, array in flatten_variables(source).items():
    if key.startswith("class_head/"):
      assert (result[key] == 0.5).all()
    else:
      np.testing.assert_array_equal(result[key], array)
