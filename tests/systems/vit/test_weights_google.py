"""Google's .npz files: predictions against goldens, and the reader."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from tests.conftest import GOLDENS, golden_folder
from vit_jax_zoo import load_pretrained
from vit_jax_zoo.systems.vit import weights_google as vit_npz
from vit_jax_zoo.systems.vit.model import VisionTransformer
from vit_jax_zoo.weights import WeightsError, load_into
from vit_jax_zoo.weights import key_map as table

PLAIN = ["vit_a", "vit_rep_a", "vit_gap_a", "vit_hybrid_a", "vit_rstem_a"]


def weights_of(name):
  return str(golden_folder(name) / "weights.npz")


def run(loaded, images, **kwargs):
  """Applies the model jitted: the small programs of an eager model take longer to compile."""
  return jax.jit(lambda v, x: loaded.model.apply(v, x, **kwargs))(loaded.variables, images)


def export(path, loaded):
  """Writes a loaded model in Google's format."""
  exported = dataclasses.replace(loaded, variables=flat(loaded.variables))
  vit_npz.write_checkpoint(str(path), exported)


def flat(variables):
  return traverse_util.flatten_dict(variables["params"], sep="/")


def image_size(config):
  return tuple(config["img_size"])


def close(given, expected):
  """1e-5; relative to the largest value where that exceeds 1, as in the ResNets' outputs."""
  np.testing.assert_allclose(given, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def block_outputs(intermediates, name):
  """The blocks' outputs in order, from scanned or unrolled layers."""
  encoder = intermediates["encoder"]
  if "blocks" in encoder:
    return list(encoder["blocks"][name][0])
  return [encoder[f"block_{i}"][name][0] for i in range(len(encoder))]


@pytest.mark.parametrize(
  ("name", "scan_layers"), [("vit_a", False), *((name, True) for name in PLAIN)]
)
def test_predictions_equal_golden(name, scan_layers, load_golden):
  config, inputs, outputs = load_golden(name)
  size = image_size(config)
  loaded = load_pretrained(
    weights_of(name), source_image_size=size, image_size=size, scan_layers=scan_layers
  )
  out, state = run(loaded, inputs["image"], mutable="intermediates")
  intermediates = state["intermediates"]
  close(intermediates["patches"][0], outputs["embedding"])
  close(intermediates["embedded"][0], outputs["posembed_out"])
  for i, output in enumerate(block_outputs(intermediates, "output")):
    close(output, outputs[f"block_{i}"])
  attention = block_outputs(intermediates, "attention_output")[0]
  close(attention, outputs["block_0.MultiHeadDotProductAttention_1"])
  close(block_outputs(intermediates, "mlp_output")[0], outputs["block_0.MlpBlock_3"])
  close(intermediates["encoded"][0], outputs["encoded"])
  close(intermediates["pooled"][0], outputs["pooled"])
  np.testing.assert_allclose(out["logits"], outputs["logits"], atol=1e-4)
  for key, array in outputs.items():
    if unit_name := re.fullmatch(r"block(\d)\.unit(\d)", key):
      stage, unit = (int(number) - 1 for number in unit_name.groups())
      output = intermediates["resnet"][f"stage_{stage}_unit_{unit}"]["output"][0]
      close(output, array)
  if config["resnet"]:
    assert loaded.config["resnet"]["stage_sizes"] == tuple(config["resnet"]["num_layers"])
  assert sum(x.size for x in jax.tree.leaves(loaded.variables)) == config["num_params"]


@pytest.mark.parametrize("name", ["vit_posemb_a", "vit_posemb_gap_a"])
def test_predictions_at_other_resolution_equal_golden(name, load_golden):
  config, inputs, outputs = load_golden(name)
  at_source = load_pretrained(weights_of(name))
  logits = run(at_source, inputs["image_src"])["logits"]
  np.testing.assert_allclose(logits, outputs["logits_at_source_grid"], atol=1e-4)

  size = config["dst_grid"] * config["patch_size"][0]
  loaded = load_pretrained(
    weights_of(name),
    image_size=size,
    num_classes=config["classes_dst"],
    representation_size=None,
  )
  params = loaded.variables["params"]
  np.testing.assert_allclose(
    params["position_embedding"]["table"], outputs["pos_embedding_resized"], atol=1e-6
  )
  if config["classes_src"] != config["classes_dst"]:
    assert not params["head"]["kernel"].any()
    assert "pre_logits" not in params
  params["head"] = {"kernel": inputs["head_kernel"], "bias": inputs["head_bias"]}
  out = run(loaded, inputs["image_dst"])
  np.testing.assert_allclose(out["tokens"], outputs["encoded_at_new_grid"], atol=1e-5)
  np.testing.assert_allclose(out["logits"], outputs["logits_at_new_grid"], atol=1e-4)


@pytest.mark.parametrize("name", [*PLAIN, "vit_posemb_a"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_round_trip_is_exact(name, scan_layers, load_golden, tmp_path):
  config, _, _ = load_golden(name)
  size = tuple(config.get("img_size", (32, 32)))
  loaded = load_pretrained(
    weights_of(name), image_size=size, source_image_size=size, scan_layers=scan_layers
  )
  path = tmp_path / "again.npz"
  export(path, loaded)
  original, again = (dict(np.load(p)) for p in (weights_of(name), path))
  assert original.keys() == again.keys()
  for key, array in original.items():
    assert array.dtype == again[key].dtype
    np.testing.assert_array_equal(array, again[key], strict=True)


def rename_keys(arrays, *, linen=False, prefix="", stacked=False, flat_norms=False):
  """Rewrites a published file with the key names of later versions."""
  names = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
  }
  renamed = {}
  for key, array in arrays.items():
    for old, new in names.items() if linen else ():
      key = key.replace(old, new)
    renamed[key] = array.reshape(-1) if flat_norms and array.ndim == 4 and "gn" in key else array
  if stacked:
    depth = len({k.split("/")[1] for k in renamed if "encoderblock_" in k})
    for key in [k for k in renamed if "encoderblock_0/" in k]:
      layers = [renamed.pop(key.replace("_0/", f"_{i}/", 1)) for i in range(depth)]
      renamed[key.replace("encoderblock_0/", "encoderblock/", 1)] = np.stack(layers)
  return {prefix + key: array for key, array in renamed.items()}


@pytest.mark.parametrize(
  ("name", "key_names"),
  [
    ("vit_a", {"linen": True}),
    ("vit_a", {"linen": True, "prefix": "params/", "stacked": True}),
    ("vit_a", {"prefix": "opt/target/"}),
    ("vit_hybrid_a", {"flat_norms": True}),
  ],
)
def test_all_key_names_give_equal_variables(name, key_names, tmp_path):
  arrays = rename_keys(dict(np.load(weights_of(name))), **key_names)
  path = tmp_path / "respelt.npz"
  np.savez(path, **arrays)
  expected, renamed = load_pretrained(weights_of(name)), load_pretrained(str(path))
  assert expected.model == renamed.model
  jax.tree.map(np.testing.assert_array_equal, expected.variables, renamed.variables)


def test_file_with_optimizer_state_and_bfloat16_is_read(tmp_path):
  arrays = dict(np.load(weights_of("vit_a")))
  file = {f"opt/target/{k}": np.asarray(v, jnp.bfloat16) for k, v in arrays.items()}
  file["opt/state/step"] = np.int32(7)
  path = tmp_path / "bf16.npz"
  np.savez(path, **file)
  params = flat(load_pretrained(str(path)).variables)
  assert {x.dtype for x in params.values()} == {np.dtype("float32")}
  np.testing.assert_allclose(params["embedding/kernel"], arrays["embedding/kernel"], rtol=4e-3)


def test_big_vision_file_has_no_class_token_position(tmp_path, load_golden):
  """As big_vision does with old files, adds the class token's position to the token."""
  _, inputs, outputs = load_golden("vit_a")
  arrays = dict(np.load(weights_of("vit_a")))
  table_ = arrays.pop("Transformer/posembed_input/pos_embedding")
  arrays["pos_embedding"] = table_[:, 1:]
  arrays["cls"] = arrays["cls"] + table_[:, :1]
  path = tmp_path / "big_vision.npz"
  np.savez(path, **arrays)
  loaded = load_pretrained(str(path))
  assert not loaded.model.cls_token_position
  logits = run(loaded, inputs["image"])["logits"]
  np.testing.assert_allclose(logits, outputs["logits"], atol=1e-4)

  again = tmp_path / "again.npz"
  export(again, loaded)
  for key, array in np.load(again).items():
    np.testing.assert_array_equal(array, arrays[key])

  # The published file read into such a model, and the reverse.
  published = load_pretrained(weights_of("vit_a"), cls_token_position=False)
  assert published.model == loaded.model
  jax.tree.map(np.testing.assert_array_equal, published.variables, loaded.variables)
  back = load_pretrained(str(path), cls_token_position=True)
  logits = run(back, inputs["image"])["logits"]
  np.testing.assert_allclose(logits, outputs["logits"], atol=1e-4)


def test_load_into_keeps_head_of_other_shape(load_golden):
  _, inputs, outputs = load_golden("vit_posemb_a")
  fields = load_pretrained(weights_of("vit_posemb_a")).config
  fields.update(num_classes=10, representation_size=None)
  del fields["image_size"]
  model = VisionTransformer(**fields)
  abstract = jax.eval_shape(model.init, jax.random.key(0), inputs["image_dst"])
  variables = jax.tree.map(lambda x: np.full(x.shape, -3, x.dtype), abstract)
  loaded = load_into(weights_of("vit_posemb_a"), variables)
  np.testing.assert_array_equal(loaded["params"]["head"]["bias"], -3.0)
  tokens = jax.jit(model.apply)(loaded, inputs["image_dst"])["tokens"]
  np.testing.assert_allclose(tokens, outputs["encoded_at_new_grid"], atol=1e-5)

  again = load_into(weights_of("vit_posemb_a"), abstract)
  assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables)
  assert not again["params"]["head"]["bias"].any()


def test_load_from_bucket(monkeypatch):
  real = epath.Path
  monkeypatch.setattr(epath, "Path", lambda path: real(str(path).replace("gs://b", str(GOLDENS))))
  loaded = load_pretrained("gs://b/vit_posemb_a/weights.npz")
  local = load_pretrained(weights_of("vit_posemb_a"))
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, local.variables)
  again = load_into("gs://b/vit_posemb_a/weights.npz", local.variables)
  jax.tree.map(np.testing.assert_array_equal, again, local.variables)
  with pytest.raises(ValueError, match=r"gs://b/none\.npz"):
    load_pretrained("gs://b/none.npz")


def test_load_into_non_square_grid():
  source = weights_of("vit_rep_a")
  loaded = load_pretrained(source, image_size=(32, 48))
  again = load_into(source, loaded.variables)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, again)
  wider = load_pretrained(source, source_image_size=(32, 48), image_size=(48, 64))
  again = load_into(source, loaded.variables, position_grid=(2, 3))
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, again)
  assert wider.variables["params"]["position_embedding"]["table"].shape == (1, 13, 48)
  with pytest.raises(ValueError, match="positions for 13 tokens"):
    load_into(source, wider.variables)


def test_head_without_representation_layer_is_zero():
  loaded = load_pretrained(weights_of("vit_posemb_a"), representation_size=None)
  assert not loaded.variables["params"]["head"]["kernel"].any()


def test_load_without_head_returns_features():
  loaded = load_pretrained(weights_of("vit_a"), num_classes=None)
  images = loaded.preprocess([np.zeros((40, 50, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)])
  assert images.shape == (2, 32, 32, 3)
  assert (images.min(), images.max()) == (-1, 1)
  out = run(loaded, images)
  assert "logits" not in out
  assert out["features"].shape == (2, 64)


def test_invalid_file_reports_all_errors(tmp_path):
  arrays = dict(np.load(weights_of("vit_a")))
  del arrays["Transformer/encoder_norm/scale"]
  arrays["extra/kernel"] = np.zeros(3)
  arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias"] = np.zeros(65)
  path = tmp_path / "broken.npz"
  np.savez(path, **arrays)
  with pytest.raises(WeightsError) as info:
    load_pretrained(str(path))
  message = str(info.value)
  assert "missing: norm/scale (64,) (Transformer/encoder_norm/scale)" in message
  assert "unused: extra/kernel (3,)" in message
  assert "wrong shape: Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias is (65,)" in message
  assert "\n" not in message


def test_file_of_other_model_raises_short_error():
  published = {f"Transformer/layer_{i}/kernel": np.zeros((2, 2), np.float32) for i in range(99)}
  shapes = {f"stage{i}/conv/kernel": (3, 3, 8, 8) for i in range(99)}
  with pytest.raises(WeightsError, match="its keys") as info:
    table.read(published, (), shapes, source="x.npz")
  assert len(str(info.value)) < 400


def test_non_finite_weights_raise(tmp_path):
  arrays = dict(np.load(weights_of("vit_a")))
  arrays["head/bias"] = np.full_like(arrays["head/bias"], 3e38)  # finite; only the sum overflows
  path = str(tmp_path / "broken.npz")
  np.savez(path, **arrays)
  variables = load_pretrained(path).variables
  arrays["Transformer/encoder_norm/scale"][3] = np.nan
  arrays["embedding/kernel"][0, 0, 0, 0] = -np.inf
  np.savez(path, **arrays)
  for load in (load_pretrained, lambda p: load_into(p, variables)):
    with pytest.raises(WeightsError, match=r"broken\.npz\b.*NaN") as info:
      load(path)
    named = str(info.value).partition(" in ")[2].partition(":")[0].split(", ")
    assert sorted(named) == ["Transformer/encoder_norm/scale", "embedding/kernel"]
    assert "\n" not in str(info.value)


def test_invalid_files_and_options_raise(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere"):
    load_pretrained("nowhere.npz")
  other = tmp_path / "weights.bin"
  other.write_bytes(b"")
  with pytest.raises(ValueError, match=r"weights\.bin"):
    load_pretrained(str(other))
  path = tmp_path / "other.npz"
  np.savez(path, a=np.zeros(3))
  with pytest.raises(WeightsError, match=r"other\.npz\b.* begin with a$"):
    load_pretrained(str(path))
  with pytest.raises(WeightsError, match="positions for 6 tokens"):
    load_pretrained(weights_of("vit_rep_a"))
  with pytest.raises(WeightsError, match="6 tokens, not for 2 x 2"):
    load_pretrained(weights_of("vit_rep_a"), source_image_size=32)
  with pytest.raises(ValueError, match=r"'widht'.*'width'"):
    load_pretrained(weights_of("vit_a"), widht=3)
  with pytest.raises(ValueError, match=r"image height: 33 .*8"):
    load_pretrained(weights_of("vit_a"), image_size=33)


def test_stack_inverts_unroll():
  rng = np.random.default_rng(0)
  tree = {"encoder/blocks/norm/scale": rng.normal(size=(3, 4)), "head/bias": rng.normal(size=2)}
  layers = table.unroll(tree)
  assert sorted(layers) == [*(f"encoder/block_{i}/norm/scale" for i in range(3)), "head/bias"]
  again = table.stack(layers, tree)
  jax.tree.map(np.testing.assert_array_equal, tree, again)
  assert table.unroll_shapes({k: v.shape for k, v in tree.items()}) == {
    k: v.shape for k, v in layers.items()
  }


def test_export_of_unknown_key_raises():
  with pytest.raises(WeightsError, match="decoder/kernel: no name"):
    table.write({"decoder/kernel": np.zeros(1)}, vit_npz.TABLE)
