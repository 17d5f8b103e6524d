"""`python -m vit_jax_zoo.export`: all formats, read again."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file

from tests.conftest import golden_folder, system_module
from tests.variables import trace_once  # noqa: F401, a fixture
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.inference.base import Options, create_predictor
from vit_jax_zoo.inference.load import load
from vit_jax_zoo.weights import Preprocess, Pretrained, WeightsError

vit = system_module("vit", "model")

NPZ = ["vit_a", "vit_rep_a", "vit_gap_a", "vit_hybrid_a", "vit_rstem_a", "vit_posemb_a"]


def assert_same_file(given, expected):
  assert given.keys() == expected.keys()
  for key in expected:
    np.testing.assert_array_equal(given[key], expected[key], strict=True)


@pytest.mark.parametrize("name", NPZ)
def test_npz_round_trip_bit_exact(name, tmp_path):
  source = golden_folder(name) / "weights.npz"
  config = json.loads((source.parent / "config.json").read_text())
  size = tuple(config.get("img_size", (32, 32)))
  loaded = load_pretrained(str(source), source_image_size=size, image_size=size)
  export.write(loaded, "npz", str(tmp_path / "again.npz"))
  assert_same_file(dict(np.load(tmp_path / "again.npz")), dict(np.load(source)))


@pytest.mark.parametrize(("name", "heads"), [("vit_timm_a", 4), ("vit_timm_gap_a", 2)])
def test_timm_round_trip_bit_exact(name, heads, tmp_path):
  source = golden_folder(name) / "weights.safetensors"
  loaded = load_pretrained(str(source), num_heads=heads)
  export.write(loaded, "safetensors-timm", str(tmp_path))
  assert_same_file(load_file(tmp_path / "model.safetensors"), load_file(source))
  again = load_pretrained(str(tmp_path))  # config.json has the number of heads
  assert again.model == loaded.model
  assert again.preprocess == loaded.preprocess


@pytest.mark.parametrize("name", ["vit_hf_a", "vit_hf_base_a"])
def test_hugging_face_round_trip_bit_exact(name, tmp_path):
  loaded = load_pretrained(str(golden_folder(name)))
  export.write(loaded, "hf", str(tmp_path))
  source = golden_folder(name) / "model.safetensors"
  assert_same_file(load_file(tmp_path / "model.safetensors"), load_file(source))


def tiny(size=(16, 24), **fields):
  sizes = {"num_classes": 3, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
  model = vit.VisionTransformer(**{**sizes, "mlp_dim": 32, **fields})
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, *size, 3))))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
  config = {**{k: getattr(model, k) for k in sizes}, "image_size": size}
  names = {"class_names": ("ant", "bee", "cat")}
  return Pretrained(model, variables, Preprocess(size), config, task_fields=names)


@pytest.mark.parametrize(
  ("kind", "form", "fields"),
  [
    ("sincos_2d", "npz", {}),
    ("learned_2d", "npz", {}),
    ("none", "npz", {}),
    ("none", "safetensors-timm", {"pool": "mean", "fc_norm": True, "activation": "gelu"}),
    ("sincos_2d", "safetensors-timm", {}),
    ("learned_2d", "hf", {"activation": "gelu"}),
    ("sincos_2d", "hf", {"cls_token_position": False}),
  ],
)
def test_computed_positions_exported_as_table(kind, form, fields, tmp_path):
  made = tiny(position_embedding=kind, **fields)
  export.write(made, form, str(tmp_path / "out"))
  loaded = load_pretrained(str(tmp_path / "out"), source_image_size=(16, 24))
  images = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
  assert loaded.model.position_embedding == "learned_1d"
  expected = jax.jit(made.model.apply)(made.variables, images)["logits"]
  given = jax.jit(loaded.model.apply)(loaded.variables, images)["logits"]
  np.testing.assert_allclose(given, expected, atol=1e-5)
  assert loaded.class_names == (() if form == "npz" else ("ant", "bee", "cat"))


@pytest.mark.parametrize(
  ("fields", "architecture", "description"),
  [
    ({"width": 192, "depth": 12, "num_heads": 3, "patch_size": 16, "mlp_dim": 768}, "tiny", None),
    ({"width": 192, "num_heads": 3, "patch_size": 16, "mlp_dim": 768}, "tiny", "depth 2"),
    ({}, "base", "width 32, depth 2, num_heads 2, mlp_dim 32, patch_size 8"),
  ],
)
def test_timm_config_states_other_sizes(fields, architecture, description, tmp_path):
  export.write(tiny((16, 16), **fields), "safetensors-timm", str(tmp_path))
  config = json.loads((tmp_path / "config.json").read_text())
  name = f"vit_{architecture}_patch16_224"
  assert config["architecture"] == name
  stated = config["pretrained_cfg"].get("description")
  assert stated == (description and f"{name} with {description}")


def test_unsupported_fields_raise(tmp_path):
  with pytest.raises(WeightsError, match=r"activation='gelu' .*layer_norm_epsilon"):
    export.write(tiny(activation="gelu", layer_norm_epsilon=1e-12), "npz", str(tmp_path / "x"))
  with pytest.raises(WeightsError, match="representation_size=5"):
    export.write(tiny(representation_size=5), "safetensors-timm", str(tmp_path))
  with pytest.raises(WeightsError, match="pool='mean'"):
    export.write(tiny(pool="mean"), "hf", str(tmp_path))
  with pytest.raises(WeightsError, match="cls_token"):
    export.write(tiny(pool="mean", cls_token=True), "npz", str(tmp_path / "x"))
  with pytest.raises(ValueError, match="--format of vit 'timm'; did you mean 'safetensors-timm'"):
    export.write(tiny(), "timm", str(tmp_path))
  with pytest.raises(ValueError, match="format of vit 'tflite'"):
    export.write(tiny(), "tflite", str(tmp_path))


RELOAD = """
import sys, jax, numpy as np
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
images = np.load(sys.argv[2])
whole = exported.call(images)
one = exported.call(images[:1])
np.testing.assert_allclose(one["logits"], whole["logits"][:1], atol=1e-5)
assert exported.platforms == ("cpu", "cuda", "tpu")
assert "vit_jax_zoo" not in sys.modules and "flax" not in sys.modules
np.save(sys.argv[3], whole["logits"])
"""


def test_stablehlo_without_package(tmp_path):
  made = tiny()
  export.write(made, "stablehlo", str(tmp_path))
  images = np.random.default_rng(1).uniform(0, 255, (3, 16, 24, 3)).astype(np.float32)
  np.save(tmp_path / "images.npy", images)
  files = [str(tmp_path / name) for name in ("model.stablehlo", "images.npy", "logits.npy")]
  command = [sys.executable, "-I", "-c", "import jax.export\n" + RELOAD, *files]
  subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
  expected = jax.jit(made.model.apply)(made.variables, images / 127.5 - 1)["logits"]
  np.testing.assert_allclose(np.load(files[2]), expected, atol=1e-5)
  notes = json.loads((tmp_path / "model.json").read_text())
  assert notes["outputs"]["logits"] == ["b", "3", "float32"]
  assert notes["class_names"] == ["ant", "bee", "cat"]


@pytest.fixture
def run_export(monkeypatch):
  """Returns a function that runs the command in this process."""

  def run(**values):
    found = flags.FlagValues()
    with monkeypatch.context() as patch:
      for name in ("DEFINE_string", "DEFINE_integer", "DEFINE_bool"):
        patch.setattr(flags, name, functools.partial(getattr(flags, name), flag_values=found))
      export.define_flags()
    found(["export", *(f"--{name}={value}" for name, value in values.items())])
    monkeypatch.setattr(export, "FLAGS", found)
    return export.main(["export"])

  return run


def test_command_replaces_only_exports(run_export, tmp_path):
  run, out, text = tmp_path / "run", tmp_path / "out", tmp_path / "names.txt"
  export.write(tiny(), "orbax", str(run))
  text.write_text("mine")
  before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
  for output in (run, run / "..", text, tmp_path):
    for form in ("safetensors-timm", "npz", "orbax"):
      with pytest.raises(ValueError, match=r"^--output="):
        run_export(model=run, format=form, output=output)
  assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
  assert text.read_text() == "mine"
  assert len(list(tmp_path.iterdir())) == 2
  for _ in range(2):  # an export may be replaced
    assert run_export(model=run, format="safetensors-timm", output=out) == 0
    assert run_export(model=run, format="npz", output=tmp_path / "a.npz") == 0
  with pytest.raises(ValueError, match=r"^--output="):
    run_export(model=out, format="safetensors-timm", output=out)


def test_folder_of_another_model_as_run_raises(tmp_path):
  run = tmp_path / "run"
  export.write(tiny(), "orbax", str(run))
  (run / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
  with pytest.raises(ValueError, match=r"config\.json: no field 'model'"):
    load(str(run))


def test_stablehlo_not_offered_for_ttsr():
  """TTSR's model takes four images; the program would take one."""
  assert export.formats_of("ttsr") == ("pt", "pth-vgg19", "orbax")
  ttsr = system_module("ttsr", "model")
  made = Pretrained(ttsr.TTSR(), {}, Preprocess((160, 160)), {}, "super_resolution")
  with pytest.raises(ValueError, match="format of ttsr 'stablehlo'"):
    export.write(made, "stablehlo", "unused")


def test_orbax_resized_like_npz(tmp_path):
  made = tiny(position_embedding="learned_1d", pool="cls")
  export.write(made, "npz", str(tmp_path / "x.npz"))
  export.write(made, "orbax", str(tmp_path / "run"))
  of_file, of_run = (
    load_pretrained(str(tmp_path / name), image_size=(32, 40), num_classes=7, **known)
    for name, known in (("x.npz", {"source_image_size": (16, 24), "num_heads": 2}), ("run", {}))
  )
  assert of_run.config["image_size"] == of_run.preprocess.image_size == (32, 40)
  assert of_run.variables["params"]["position_embedding"]["table"].shape[1] == 4 * 5 + 1
  close = functools.partial(np.testing.assert_allclose, atol=1e-6)
  jax.tree.map(close, of_run.variables, of_file.variables)


def test_orbax_export_loads_like_run(tmp_path):
  made = tiny(pool="mean", position_embedding="sincos_2d")
  export.write(made, "orbax", str(tmp_path / "run"))
  again = load_pretrained(str(tmp_path / "run"))
  assert again.model == made.model
  jax.tree.map(np.testing.assert_array_equal, again.variables, made.variables)
  image = np.random.default_rng(1).integers(0, 255, (40, 50, 3), np.uint8)
  top = create_predictor(load(str(tmp_path / "run")), Options())(image).record["top"]
  logits = jax.jit(made.model.apply)(made.variables, made.preprocess([image]))["logits"][0]
  assert top[0]["name"] == ("ant", "bee", "cat")[int(np.argmax(logits))]
  assert abs(top[0]["probability"] - float(jax.nn.softmax(logits).max())) < 1e-5


def test_nonfinite_run_raises(tmp_path):
  made = tiny(pool="mean", position_embedding="sincos_2d")
  made.variables["params"]["head"]["bias"] = np.full(3, np.inf, np.float32)
  export.write(made, "orbax", str(tmp_path / "run"))
  for use in (load, load_pretrained):
    with pytest.raises(ValueError, match=r"params/head/bias"):
      use(str(tmp_path / "run"))
