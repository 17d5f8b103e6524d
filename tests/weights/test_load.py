"""Published formats by path: LambdaResNet and iGPT, containers, invalid files."""

import functools
import io
import json
import os
import shutil
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_folder
from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.weights import WeightsError, load_into, readers
from vit_jax_zoo.weights.load import formats, read_checkpoint

LAMBDA = ("lambda_resnet26t_a", "lambda_resnet50ts_a", "lambda_resnet26rpt_a")
IGPT = ("igpt_tf_a", "igpt_tf_bert_a")


def lambda_file(name):
  return str(golden_folder(name) / "weights.safetensors")


def bundle(name):
  return str(golden_folder(name) / "tf1_ckpt")


@pytest.fixture
def imagegpt(tmp_path):
  """A folder in transformers' layout with the fixture's weights."""
  config = json.loads((golden_folder("imagegpt_a") / "config.json").read_text())
  inputs = np.load(golden_folder("imagegpt_a") / "inputs.npz")
  folder = tmp_path / "imagegpt"
  folder.mkdir()
  shutil.copy(golden_folder("imagegpt_a") / "weights.safetensors", folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({"n_head": config["n_head"]}))
  clusters = np.asarray(inputs["clusters"], np.float32)
  processor = {"clusters": clusters.tolist(), "size": {"height": 8, "width": 8}}
  (folder / "preprocessor_config.json").write_text(json.dumps(processor))
  return folder


def assert_same_arrays(given, expected, ignore=()):
  keys = {key for key in expected if not key.endswith(ignore)} if ignore else expected.keys()
  assert {key for key in given if key in keys or not key.endswith(ignore or ("\0",))} == set(keys)
  for key in keys:
    np.testing.assert_array_equal(given[key], expected[key], strict=True)


@pytest.mark.parametrize(
  "name", [LAMBDA[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LAMBDA[1:])]
)
def test_lambda_resnet_by_path(name, load_golden, tmp_path):
  config, inputs, outputs = load_golden(name)
  loaded = load_pretrained(lambda_file(name), image_size=config["img"])
  assert loaded.preprocess.mean == (0.485, 0.456, 0.406)
  assert loaded.preprocess.crop_pct == (0.95 if "50ts" in name else 0.94)
  images = inputs[next(k for k in inputs if inputs[k].ndim == 4)].transpose(0, 2, 3, 1)
  logits = jax.jit(loaded.model.apply)(loaded.variables, images)["logits"]
  expected = outputs["logits"]
  np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
  export.write(loaded, "safetensors-timm", str(tmp_path))
  written = load_file(tmp_path / "model.safetensors")
  assert_same_arrays(written, load_file(lambda_file(name)), ("num_batches_tracked",))
  again = load_pretrained(str(tmp_path))
  assert again.preprocess == loaded.preprocess
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)


def test_offset_tables_independent_of_image_size(tmp_path):
  source = lambda_file("lambda_resnet26rpt_a")
  loaded = load_pretrained(source, image_size=64)
  assert loaded.preprocess.image_size == (64, 64)
  export.write(loaded, "safetensors-timm", str(tmp_path / "timm"))
  written = load_file(tmp_path / "timm" / "model.safetensors")
  assert_same_arrays(written, load_file(source), ("num_batches_tracked",))
  timm_config = json.loads((tmp_path / "timm" / "config.json").read_text())
  assert timm_config["model_args"]["img_size"] == [128, 128]
  export.write(loaded, "orbax", str(tmp_path / "run"))
  again = load_pretrained(str(tmp_path / "run"), image_size=256)
  assert again.preprocess.image_size == (256, 256)
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
  headless = load_pretrained(str(tmp_path / "run"), image_size=256, num_classes=None)
  assert "head" not in headless.variables["params"]
  fresh = load_pretrained(str(tmp_path / "run"), num_classes=3).variables["params"]["head"]
  assert fresh["kernel"].shape[1:] == fresh["bias"].shape == (3,)
  assert not np.any(fresh["kernel"])


def test_lambda_resnet_new_head_missing_statistics_raise(tmp_path):
  source = lambda_file("lambda_resnet26t_a")
  loaded = load_pretrained(source, num_classes=3, image_size=64)
  assert loaded.variables["params"]["head"]["kernel"].shape[-1] == 3
  assert not loaded.variables["params"]["head"]["kernel"].any()
  arrays = load_file(source)
  del arrays["stem.conv1.bn.running_mean"]
  save_file(arrays, tmp_path / "cut.safetensors")
  with pytest.raises(WeightsError, match=r"batch_stats/\S+/norm/mean"):
    load_pretrained(str(tmp_path / "cut.safetensors"))
  again = load_into(source, loaded.variables)
  jax.tree.map(np.testing.assert_array_equal, again, loaded.variables)


@pytest.mark.parametrize("name", IGPT)
def test_tensorflow_checkpoint_without_tensorflow(name, load_golden, tmp_path):
  _, inputs, outputs = load_golden(name)
  arrays = readers.read_bundle(readers.find_prefix(bundle(name)))
  expected = load_file(golden_folder(name) / "weights.safetensors")
  for key, array in expected.items():
    if key in arrays:
      np.testing.assert_array_equal(arrays[key], array, strict=True)
  assert {key for key in expected if key not in arrays} == {"model/clf/wclf"}

  shutil.copytree(bundle(name), tmp_path / "run")
  clusters = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
  np.save(tmp_path / "kmeans_centers.npy", clusters)
  loaded = load_pretrained(str(tmp_path / "run" / "model.ckpt-7.index"))
  assert loaded.model.causal == (name == "igpt_tf_a")
  np.testing.assert_array_equal(loaded.variables["palette"]["clusters"], clusters)
  visible = jnp.asarray(inputs["keep_mask"] > 0) if "keep_mask" in inputs else None
  apply = jax.jit(functools.partial(loaded.model.apply, method="from_tokens"))
  out = apply(loaded.variables, jnp.asarray(inputs["tokens"]), visible=visible)
  np.testing.assert_allclose(out["pixel_logits"], outputs["gen_logits"], atol=1e-4)


def test_missing_palette_raises_when_used():
  loaded = load_pretrained(bundle("igpt_tf_a"))
  assert "palette" not in loaded.variables
  with pytest.raises(ValueError, match="no palette"):
    loaded.model.apply(loaded.variables, jnp.zeros((1, 8, 8, 3)))


def test_incomplete_tensorflow_checkpoint_raises(tmp_path):
  shutil.copytree(bundle("igpt_tf_a"), tmp_path / "a")
  shards = sorted((tmp_path / "a").glob("*.data-*"))
  sizes = {file: file.stat().st_size for file in shards}
  largest = max(sizes, key=sizes.get)
  largest.chmod(0o644)
  largest.write_bytes(largest.read_bytes()[:100])
  with pytest.raises(WeightsError, match=rf"{largest.name} .* model/"):
    load_pretrained(str(tmp_path / "a"))
  largest.unlink()
  with pytest.raises(WeightsError, match=rf"{largest.name} is missing"):
    load_pretrained(str(tmp_path / "a"))
  (tmp_path / "b.index").write_bytes(b"x" * 100)
  with pytest.raises(WeightsError, match=r"b\.index"):
    load_pretrained(str(tmp_path / "b"))


def test_imagegpt_zero_biases_load(imagegpt):
  arrays = load_file(imagegpt / "model.safetensors")
  arrays = {key: x * 0 if key.endswith("bias") else x for key, x in arrays.items()}
  save_file(arrays, imagegpt / "model.safetensors")
  assert not load_pretrained(str(imagegpt)).model.use_bias
  block = load_pretrained(str(imagegpt), use_bias=True).variables["params"]["decoder"]["blocks"]
  assert not block["mlp"]["hidden"]["bias"].any()


def test_imagegpt_folder_round_trip(imagegpt, load_golden, tmp_path):
  _, inputs, outputs = load_golden("imagegpt_a")
  loaded = load_pretrained(str(imagegpt))
  assert loaded.task == "pixel_modelling"
  assert loaded.config["image_size"] == (8, 8)
  assert loaded.model.use_bias
  apply = jax.jit(functools.partial(loaded.model.apply, method="from_tokens"))
  out = apply(loaded.variables, jnp.asarray(inputs["tokens"]))
  np.testing.assert_allclose(out["pixel_logits"], outputs["logits"], atol=1e-4)
  images = jnp.asarray(inputs["image"], jnp.float32).reshape(-1, 8, 8, 3) / 127.5 - 1
  tokens = jax.jit(loaded.model.apply)(loaded.variables, images)["tokens"]
  np.testing.assert_array_equal(tokens.reshape(-1), outputs["quantised_same_size"].reshape(-1))
  resized = loaded.preprocess([inputs["image_big"]])
  tokens = jax.jit(loaded.model.apply)(loaded.variables, resized)["tokens"]
  np.testing.assert_array_equal(tokens.reshape(-1), outputs["quantised_resized_pil"].reshape(-1))
  export.write(loaded, "hf", str(tmp_path / "again"))
  original = load_file(imagegpt / "model.safetensors")
  assert_same_arrays(load_file(tmp_path / "again" / "model.safetensors"), original)
  again = load_pretrained(str(tmp_path / "again"))
  assert again.model == loaded.model
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)


def test_imagegpt_palette_shape_mismatch_raises(imagegpt):
  processor = json.loads((imagegpt / "preprocessor_config.json").read_text())
  processor["clusters"] = processor["clusters"][:-3]
  (imagegpt / "preprocessor_config.json").write_text(json.dumps(processor))
  with pytest.raises(WeightsError, match=r"clusters is \(\d+, 3\)") as error:
    load_pretrained(str(imagegpt))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("field", "value"), [("size", 7), ("image_mean", [0.4] * 3), ("do_normalize", False)]
)
def test_imagegpt_processor_mismatch_raises(field, value, imagegpt):
  processor = json.loads((imagegpt / "preprocessor_config.json").read_text())
  (imagegpt / "preprocessor_config.json").write_text(json.dumps(processor | {"resample": 3}))
  assert load_pretrained(str(imagegpt)).preprocess.interpolation == "bicubic"
  (imagegpt / "preprocessor_config.json").write_text(json.dumps(processor | {field: value}))
  name = field.replace("do_normalize", "image_mean")
  with pytest.raises(WeightsError, match=rf"preprocessor_config\.json: {name}"):
    load_pretrained(str(imagegpt))


def test_imagegpt_palette_from_npy(imagegpt):
  processor = imagegpt / "preprocessor_config.json"
  clusters = np.asarray(json.loads(processor.read_text())["clusters"], np.float32)
  processor.unlink()
  np.save(imagegpt / "kmeans_centers.npy", clusters)
  loaded = load_pretrained(str(imagegpt))
  np.testing.assert_array_equal(loaded.variables["palette"]["clusters"], clusters)


def test_igpt_exported_to_hugging_face(tmp_path):
  loaded = load_pretrained(bundle("igpt_tf_a"))
  export.write(loaded, "hf", str(tmp_path))
  written = load_file(tmp_path / "model.safetensors")
  assert written["transformer.wte.weight"].shape == (65, 48)
  assert not written["transformer.h.0.mlp.c_fc.bias"].any()
  again = load_pretrained(str(tmp_path))
  assert not again.model.use_bias
  jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)


def test_imagegpt_classifier(imagegpt, tmp_path):
  arrays = load_file(imagegpt / "model.safetensors")
  del arrays["lm_head.weight"]
  arrays |= load_file(golden_folder("imagegpt_a") / "weights_score.safetensors")
  save_file(arrays, imagegpt / "model.safetensors")
  loaded = load_pretrained(str(imagegpt))
  assert loaded.model.num_classes == 10
  assert not loaded.model.sos_token
  apply = jax.jit(functools.partial(loaded.model.apply, method="from_tokens"))
  tokens = np.load(golden_folder("imagegpt_a") / "inputs.npz")["tokens"]
  out = apply(loaded.variables, jnp.asarray(tokens))
  outputs = np.load(golden_folder("imagegpt_a") / "outputs.npz")
  np.testing.assert_allclose(out["logits"], outputs["clf_logits_hf_no_sos"], atol=1e-4)
  (imagegpt / "config.json").write_text('{"n_head": 4, "scale_attn_weights": false}')
  with pytest.raises(WeightsError, match="scale_attn_weights"):
    load_pretrained(str(imagegpt))
  (imagegpt / "config.json").write_text('{"n_head": 4, "activation_function": "relu"}')
  with pytest.raises(WeightsError, match="activation_function"):
    load_pretrained(str(imagegpt))
  (imagegpt / "config.json").unlink()
  with pytest.raises(WeightsError, match=r"no config\.json"):
    load_pretrained(str(imagegpt))


def test_sharded_safetensors_folder(imagegpt):
  arrays = load_file(imagegpt / "model.safetensors")
  keys = sorted(arrays)
  parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
  for name, part in parts.items():
    save_file({key: arrays[key] for key in part}, imagegpt / name)
  expected = load_pretrained(str(imagegpt))
  (imagegpt / "model.safetensors").unlink()
  index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
  (imagegpt / "model.safetensors.index.json").write_text(json.dumps(index))
  given = load_pretrained(str(imagegpt))
  jax.tree.map(np.testing.assert_array_equal, given.variables, expected.variables)
  (imagegpt / "b.safetensors").unlink()
  with pytest.raises(WeightsError, match=r"b\.safetensors"):
    load_pretrained(str(imagegpt))


@pytest.mark.parametrize("weight_map", [None, [1], {"a": 5}])
def test_invalid_weight_map_raises(weight_map, tmp_path):
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(WeightsError, match=r"index\.json: weight_map"):
    load_pretrained(str(tmp_path))


def test_float8_raises(tmp_path):
  header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(WeightsError, match=r"model\.safetensors.*float8"):
    load_pretrained(str(path))


def test_container_detected_by_content(tmp_path):
  original = golden_folder("vit_timm_a") / "weights.safetensors"
  shutil.copy(original, tmp_path / "renamed.pth")
  loaded = load_pretrained(str(tmp_path / "renamed.pth"), num_heads=4)
  expected = load_pretrained(str(original), num_heads=4)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected.variables)
  page = tmp_path / "model.safetensors"
  page.write_bytes(b"\n<!doctype html><html></html>")
  with pytest.raises(WeightsError, match="safetensors"):
    load_pretrained(str(page))
  page.rename(tmp_path / "model.npz")
  with pytest.raises(WeightsError, match="web page"):
    load_pretrained(str(tmp_path / "model.npz"))


def test_npz_objects_not_unpickled(tmp_path):
  class Trap:
    def __reduce__(self):
      return (tmp_path.joinpath("ran").touch, ())

  np.savez(tmp_path / "trap.npz", **{"embedding/kernel": np.array([Trap()], dtype=object)})
  with pytest.raises(WeightsError, match="was not executed"):
    load_pretrained(str(tmp_path / "trap.npz"))
  assert not (tmp_path / "ran").exists()


def write_member(path, header, data=b"", compression=zipfile.ZIP_STORED, member_size=None):
  """Writes a .npz whose array header has the given shape and dtype, followed by `data`."""
  stream = io.BytesIO()
  np.lib.format.write_array_header_1_0(stream, {"fortran_order": False, **header})
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("embedding/kernel.npy", stream.getvalue() + data)
    if member_size is not None:
      archive.infolist()[0].file_size = member_size


@pytest.mark.parametrize(
  "claim",
  [
    {"header": {"descr": "<f4", "shape": (10**7, 10**7)}},  # 400 TB
    {"header": {"descr": "<f4", "shape": (10**7, 10**7)}, "member_size": 4 * 10**14},
    {"header": {"descr": "|V1000000000", "shape": (1000,)}},
    {"header": {"descr": "<f4", "shape": (3,)}, "data": b"12345678"},
    {"header": {"descr": "|u1", "shape": (10**6,)}, "data": bytes(10**6),
     "compression": zipfile.ZIP_DEFLATED},
  ],
  ids=["header", "member", "dtype", "short", "bomb"],
)  # fmt: skip
def test_false_array_headers_raise(tmp_path, monkeypatch, claim):
  monkeypatch.setattr(readers, "_MAX_SMALL", 10**5)
  path = tmp_path / "claim.npz"
  write_member(path, **claim)
  tracemalloc.start()
  try:
    with pytest.raises(WeightsError, match=r"claim\.npz\b") as error:
      load_pretrained(str(path))
    assert tracemalloc.get_traced_memory()[1] < 20e6
  finally:
    tracemalloc.stop()
  assert "\n" not in str(error.value)


def test_archive_without_arrays_raises(tmp_path):
  np.savez(tmp_path / "empty.npz")
  with pytest.raises(WeightsError, match=r"empty\.npz\b"):
    load_pretrained(str(tmp_path / "empty.npz"))


def test_compressed_zeros_read(tmp_path):
  np.savez_compressed(tmp_path / "zeros.npz", zeros=np.zeros(10**6), ones=np.ones((), np.int64))
  arrays = readers.read_published(str(tmp_path / "zeros.npz")).arrays
  assert arrays["zeros"].shape == (10**6,)
  assert arrays["ones"] == 1


def test_uninferable_size_raises(imagegpt):
  arrays = load_file(imagegpt / "model.safetensors")
  del arrays["transformer.wpe.weight"]
  save_file(arrays, imagegpt / "model.safetensors")
  with pytest.raises(WeightsError, match=r"ImageGPT.* no 'trans"):
    load_pretrained(str(imagegpt))


def test_formats_detect_own_files_only():
  files = {
    ("vit", "npz"): golden_folder("vit_a") / "weights.npz",
    ("vit", "safetensors-timm"): golden_folder("vit_timm_a") / "weights.safetensors",
    ("vit", "hf"): golden_folder("vit_hf_a") / "model.safetensors",
    ("igpt", "hf"): golden_folder("imagegpt_a") / "weights.safetensors",
    ("igpt", "tf"): golden_folder("igpt_tf_a") / "weights.safetensors",
  }
  for name, path in files.items():
    arrays = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    found = [(form.family, form.name) for form, module in formats().items() if module.is_of(arrays)]
    assert found == [name]
  assert read_checkpoint(str(files[("vit", "npz")])).family == "vit"


def test_run_from_igpt_keeps_baseline(imagegpt):
  """The run's bigram baseline is not in the file and stays unchanged."""
  loaded = load_pretrained(str(imagegpt))
  shapes = jax.tree.map(np.zeros_like, loaded.variables)
  fresh = {**shapes, "baseline": {"bigram": np.ones((65, 64), np.float32)}}
  filled = load_into(str(imagegpt), fresh)
  assert (filled["baseline"]["bigram"] == 1).all()
  del filled["baseline"]
  jax.tree.map(np.testing.assert_array_equal, filled, loaded.variables)


def test_damaged_npz_raises(tmp_path):
  path = tmp_path / "a.npz"
  np.savez_compressed(path, a=np.arange(999))
  data = bytearray(path.read_bytes())
  start = data.index(b"a.npy") + 40
  data[start : start + 200] = b"\xff" * 200  # of the compressed stream: zlib.error
  path.write_bytes(data)
  with pytest.raises(WeightsError, match=r"a\.npz"):
    readers.read_published(str(path))


@pytest.mark.parametrize("name", ["a.pth", "a.npz", "a.index", "model.safetensors"])
def test_fifo_raises(tmp_path, name):
  """Opening a FIFO would block."""
  os.mkfifo(tmp_path / name)
  for path in (tmp_path / name, *([tmp_path] if "model" in name else [])):
    with pytest.raises(WeightsError, match=rf"{name}.*a named pipe"):
      readers.read_published(str(path))
