"""Exported files give the same logits in timm and transformers. `pytest -m parity`."""

import argparse
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import golden_folder, system_module
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.weights import Preprocess, Pretrained, WeightsError
from vit_jax_zoo.weights.readers import read_published

lambda_resnet = system_module("lambda_resnet", "model")
system_module("vit")
from tests.test_export import tiny  # noqa: E402, in a tree with ViT only

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # warnings of these libraries
]


def images_of(size, seed=0):
  return np.random.default_rng(seed).normal(size=(2, *size, 3)).astype(np.float32)


def ours(loaded, images):
  return np.asarray(jax.jit(loaded.model.apply)(loaded.variables, images)["logits"])


def assert_same(given, expected):
  scale = max(1.0, float(np.abs(expected).max()))
  np.testing.assert_allclose(given, expected, atol=1e-4 * scale)


RESNET = {"group_norm_epsilon": 1e-5, "std_epsilon": 0.0, "variance_epsilon": 1e-8}
"""timm's constants of a hybrid's ResNet."""


def timm_logits(folder, images):
  timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
  model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
  with torch.no_grad():
    return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


@pytest.mark.parametrize(
  "fields",
  [
    {"activation": "gelu"},
    {"activation": "gelu_tanh", "position_embedding": "sincos_2d", "pool": "mean"},
    {"activation": "gelu", "pool": "mean", "fc_norm": True, "qkv_bias": False},
    {"activation": "gelu", "cls_token_position": False},
    {"activation": "quick_gelu", "position_embedding": "learned_2d"},
    {"activation": "gelu", "patch_size": 8, "resnet": {"stage_sizes": (), **RESNET}},
  ],
  ids=["plain", "better", "fc_norm", "no_embed_class", "learned_2d", "hybrid"],
)
def test_timm_equals_exported_vit(fields, tmp_path):
  made = tiny(size=(32, 32), **fields)
  export.write(made, "safetensors-timm", str(tmp_path))
  images = images_of((32, 32))
  assert_same(timm_logits(tmp_path, images), ours(made, images))


def timm_folder(architecture, arguments, folder):
  """Writes a random model of timm with its `config.json`; returns the model."""
  timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
  torch.manual_seed(0)
  model = timm.create_model(architecture, num_classes=3, **arguments).eval()
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
  arrays = {key: value.numpy() for key, value in model.state_dict().items()}
  save_file(arrays, folder / "model.safetensors")
  config = {"architecture": architecture, "model_args": arguments}
  (folder / "config.json").write_text(json.dumps(config))
  return model


SMALL = {"img_size": 32, "embed_dim": 64, "depth": 2}


@pytest.mark.parametrize(
  ("architecture", "arguments", "message"),
  [
    ("deit3_small_patch16_224", {**SMALL, "num_heads": 4}, "LayerScale"),
    ("beit_base_patch16_224", {**SMALL, "num_heads": 4}, "LayerScale"),
    ("vit_medium_patch16_gap_240", SMALL, "LayerScale"),
    ("vit_base_resnet26d_224", {**SMALL, "num_heads": 4}, "ResNet-D"),
    ("eva_giant_patch14_224", {**SMALL, "img_size": 28, "num_heads": 4, "mlp_ratio": 2}, "q_bias"),
    ("vit_base_patch16_224", {**SMALL, "num_heads": 4, "global_pool": ""}, "global_pool"),
    ("lambda_resnet26t", {"stem_pool": ""}, "stem_pool"),
    ("lambda_resnet26t", {"act_layer": "gelu"}, "act_layer"),
  ],
)
def test_other_timm_architectures_raise(architecture, arguments, message, tmp_path):
  timm_folder(architecture, arguments, tmp_path)
  with pytest.raises(WeightsError, match=message):
    load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
  ("architecture", "arguments"),
  [
    ("test_vit", {}),
    ("vit_large_patch16_siglip_gap_512", SMALL),
    ("vit_base_patch16_gap_224", {**SMALL, "num_heads": 2}),
    ("eva_large_patch14_196", {**SMALL, "img_size": 28, "num_heads": 4}),
    ("vit_base_patch16_clip_quickgelu_224", {**SMALL, "num_heads": 4, "pre_norm": False}),
  ],
)
def test_timm_architecture_sets_heads_and_activation(architecture, arguments, tmp_path):
  model = timm_folder(architecture, arguments, tmp_path)
  torch = pytest.importorskip("torch")
  heads = {"num_heads": 16} if architecture.startswith("vit_large") else {}
  loaded = load_pretrained(str(tmp_path), **heads)
  side = model.patch_embed.img_size[0]
  images = images_of((side, side))
  with torch.no_grad():
    expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
  assert_same(ours(loaded, images), expected)


@pytest.mark.parametrize("name", ["vit_timm_a", "vit_timm_gap_a"])
def test_timm_reloads_fixture(name, tmp_path, load_golden):
  config, inputs, outputs = load_golden(name)
  loaded = load_pretrained(
    str(golden_folder(name) / "weights.safetensors"), num_heads=config["num_heads"]
  )
  export.write(loaded, "safetensors-timm", str(tmp_path))
  theirs = timm_logits(tmp_path, inputs["image"].transpose(0, 2, 3, 1))
  assert_same(theirs, outputs["logits"])


@pytest.mark.parametrize(
  "name", ["lambda_resnet26t_a", "lambda_resnet50ts_a", "lambda_resnet26rpt_a"]
)
def test_timm_equals_exported_lambda_resnet(name, tmp_path, load_golden):
  config, inputs, _ = load_golden(name)  # its image: noise can give logits of 1e4
  weights = golden_folder(name) / "weights.safetensors"
  loaded = load_pretrained(str(weights), image_size=config["img"])
  export.write(loaded, "safetensors-timm", str(tmp_path))
  images = inputs["x"].transpose(0, 2, 3, 1)
  theirs = timm_logits(tmp_path, images)
  assert_same(theirs, ours(loaded, images))


@pytest.mark.parametrize(
  ("name", "size", "layer"),
  [
    ("lambda_resnet26t", (64, 96), {"dim_k": 8, "num_heads": 2, "receptive_field": 5}),
    ("lambda_resnet26rpt_256", (64, 96), {}),
  ],
  ids=["odd", "table"],
)
def test_timm_equals_exported_custom_lambda_resnet(name, size, layer, tmp_path):
  fields = {
    **lambda_resnet.VARIANTS[name],
    "lambda_layer": {**lambda_resnet.VARIANTS[name]["lambda_layer"], **layer},
  }
  widths = {"widths": (16, 32, 64, 128), "stem_width": 16, "num_classes": 5}
  model = lambda_resnet.LambdaResNet(**{**fields, **widths})
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *size, 1), np.float32))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(  # kernels are unchanged: lambdas square a wrong scale
    lambda x: np.asarray(x + 0.2 * rng.uniform(size=x.shape) if x.ndim == 1 else x), variables
  )
  made = Pretrained(model, variables, Preprocess(size, channels=1), {"image_size": size})
  export.write(made, "safetensors-timm", str(tmp_path))
  images = images_of(size)[..., :1]
  assert_same(timm_logits(tmp_path, images), ours(made, images))
  assert_same(ours(load_pretrained(str(tmp_path)), images), ours(made, images))


def test_preprocessing_equals_timm(tmp_path):
  data = pytest.importorskip("timm.data")
  from PIL import Image

  pixels = np.random.default_rng(0).integers(0, 255, (75, 120, 3), np.uint8)
  source = golden_folder("lambda_resnet26t_a") / "weights.safetensors"
  preprocess = load_pretrained(str(source), image_size=64).preprocess
  transform = data.create_transform(
    input_size=(3, 64, 64), interpolation="bicubic", crop_pct=0.94,
    mean=preprocess.mean, std=preprocess.std,
  )  # fmt: skip
  theirs = transform(Image.fromarray(pixels)).numpy().transpose(1, 2, 0)
  np.testing.assert_allclose(preprocess([pixels])[0], theirs, atol=1e-5)


@pytest.mark.parametrize(
  "fields",
  [
    {"activation": "gelu", "layer_norm_epsilon": 1e-12},
    {"activation": "gelu_tanh", "cls_token_position": False},
    {"activation": "gelu", "position_embedding": "sincos_2d"},
  ],
  ids=["plain", "tanh", "sincos"],
)
def test_transformers_equals_exported_vit(fields, tmp_path):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  made = tiny(size=(32, 32), **fields)
  export.write(made, "hf", str(tmp_path))
  model = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
  images = images_of((32, 32))
  with torch.no_grad():
    theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
  assert_same(theirs, ours(made, images))
  assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"}


def test_transformers_equals_exported_igpt(tmp_path, load_golden):
  transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
  folder = golden_folder("igpt_tf_a") / "tf1_ckpt"
  _, inputs, outputs = load_golden("igpt_tf_a")
  export.write(load_pretrained(str(folder)), "hf", str(tmp_path))
  model = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
  tokens = torch.from_numpy(inputs["tokens"].astype(np.int64))
  shifted = torch.cat([torch.full_like(tokens[:, :1], 64), tokens[:, :-1]], dim=1)
  with torch.no_grad():
    theirs = model(input_ids=shifted).logits.numpy()
  assert_same(theirs, outputs["gen_logits"])


def test_imagegpt_pytorch_bin(tmp_path):
  """`pytorch_model.bin` with the causal masks, as openai/imagegpt-small was published."""
  torch = pytest.importorskip("torch")
  fixture = golden_folder("imagegpt_a")
  arrays = load_file(fixture / "weights.safetensors")
  config = json.loads((fixture / "config.json").read_text())
  clusters = np.load(fixture / "inputs.npz")["clusters"]
  for name in ("safe", "pickle"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"n_head": config["n_head"]}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": clusters.tolist()}))
  save_file(arrays, tmp_path / "safe" / "model.safetensors")
  state = {key: torch.from_numpy(array) for key, array in arrays.items()}
  positions = arrays["transformer.wpe.weight"].shape[0]
  mask = torch.ones(positions, positions, dtype=torch.bool).tril()[None, None]
  state |= {
    "transformer.h.0.attn.bias": mask,
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
  }
  torch.save(state, tmp_path / "pickle" / "pytorch_model.bin")
  expected, given = (load_pretrained(str(tmp_path / name)) for name in ("safe", "pickle"))
  assert given.model == expected.model
  jax.tree.map(np.testing.assert_array_equal, given.variables, expected.variables)


def test_pytorch_state_dicts(tmp_path):
  torch = pytest.importorskip("torch")
  state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
  for name, content in {
    "bare": state,
    "wrapped": {"model": state, "args": argparse.Namespace(lr=1), "epoch": 3},
    "parallel": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    "compiled": {f"_orig_mod.module.{key}": value for key, value in state.items()},
    "averaged": {"model": {key: value + 1 for key, value in state.items()}, "model_ema": state},
  }.items():
    for legacy in (False, True):
      path = str(tmp_path / f"{name}.pth")
      torch.save(content, path, _use_new_zipfile_serialization=not legacy)
      read = read_published(path).arrays
      assert read.keys() == state.keys()
      np.testing.assert_array_equal(
        read["a.weight"], np.arange(6.0, dtype=np.float32).reshape(2, 3)
      )
      assert read["b"].dtype == np.float32


def test_lambda_resnet_pth(tmp_path):
  torch = pytest.importorskip("torch")
  from safetensors.numpy import load_file

  source = golden_folder("lambda_resnet26t_a") / "weights.safetensors"
  state = {key: torch.from_numpy(np.array(array)) for key, array in load_file(source).items()}
  torch.save(state, tmp_path / "lambda.pth")
  loaded = load_pretrained(str(tmp_path / "lambda.pth"), image_size=64)
  expected = load_pretrained(str(source), image_size=64)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected.variables)


def test_pickled_code_raises_and_is_not_executed(tmp_path):
  torch = pytest.importorskip("torch")

  class Trap:
    def __reduce__(self):
      return (eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

  for legacy in (False, True):
    torch.save({"a": Trap()}, tmp_path / "t.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"t\.pth .*eval") as error:
      load_pretrained(str(tmp_path / "t.pth"))
    assert "\n" not in str(error.value)
  assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("layout", ["sparse", "meta"])
def test_non_dense_tensors_raise(layout, tmp_path):
  torch = pytest.importorskip("torch")
  tensor = torch.eye(3).to_sparse() if layout == "sparse" else torch.ones(3, device="meta")
  torch.save({"some.weight": tensor}, tmp_path / "x.pth")
  with pytest.raises(WeightsError, match=r"x\.pth: some\.weight"):
    load_pretrained(str(tmp_path / "x.pth"))


def test_incomplete_torch_file_raises(tmp_path):
  torch = pytest.importorskip("torch")
  torch.save({"a": torch.ones(1000)}, tmp_path / "x.pth")
  content = (tmp_path / "x.pth").read_bytes()
  (tmp_path / "x.pth").write_bytes(content[: len(content) // 2])
  with pytest.raises(WeightsError, match="truncated") as error:
    load_pretrained(str(tmp_path / "x.pth"))
  assert "\n" not in str(error.value)
  torch.save({"epoch": 3}, tmp_path / "y.pth")
  with pytest.raises(WeightsError, match=r"epoch.*; expected a state dict"):
    load_pretrained(str(tmp_path / "y.pth"))
