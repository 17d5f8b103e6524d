"""predict and export as subprocesses: arguments, unusual and unreadable images, errors."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests.command import ROOT
from tests.conftest import golden_folder, system_module
from vit_jax_zoo import export, load_pretrained
from vit_jax_zoo.weights import Preprocess, Pretrained

WEIGHTS = golden_folder("vit_a") / "weights.npz"


def command(module, *arguments, timeout=300):
  return subprocess.run(
    [sys.executable, "-m", f"vit_jax_zoo.{module}", *map(str, arguments)],
    cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
  )  # fmt: skip


def write_unusual_images(folder):
  """Writes images of many modes and broken files; returns the names of both."""
  folder.mkdir()
  pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
  image = Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)
  turned = Image.Exif()
  turned[0x0112] = 6
  image.save(folder / "plain.png")
  image.rotate(90, expand=True).save(folder / "exif.png", exif=turned)
  image.convert("L").save(folder / "gray.png")
  image.convert("LA").save(folder / "gray_alpha.png")
  image.convert("RGBA").save(folder / "rgba.png")
  image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
  image.convert("1").save(folder / "bits.png")
  image.save(folder / "two words, ünïcode.WEBP", format="webp")
  image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(180)])
  image.resize((1, 1)).save(folder / "dot.png")
  image.resize((600, 1)).save(folder / "line.png")
  good = sorted(path.name for path in folder.iterdir())
  jpeg = (folder / "cmyk.jpg").read_bytes()
  (folder / "broken.jpg").write_bytes(jpeg[: len(jpeg) // 2])
  (folder / "empty.png").write_bytes(b"")
  (folder / "text.tif").write_text("no image")
  (folder / "un\x1b[31mread.png").write_text("nor this")
  return good, ["broken.jpg", "empty.png", "text.tif", "un\x1b[31mread.png"]


def test_predict_unusual_images(tmp_path):
  good, bad = write_unusual_images(tmp_path / "images")
  done = command(
    "predict", f"--model={WEIGHTS}", "--images", tmp_path / "images",
    f"--output={tmp_path / 'out'}", "--top_k=2",
  )  # fmt: skip
  assert done.returncode == 1, done.stderr  # some files cannot be read
  records = json.loads((tmp_path / "out" / "predictions.json").read_text())
  found = {record["image"].rpartition("/")[2]: record for record in records}
  assert sorted(found) == sorted([*good, *bad])
  assert [name for name in sorted(found) if "error" in found[name]] == bad
  top = {name: [entry["label"] for entry in found[name]["top"]] for name in good}
  assert all(len(labels) == 2 for labels in top.values())
  assert top["exif.png"] == top["rgba.png"] == top["plain.png"]
  written = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
  assert len(written) == len(good)
  for name in written:
    with Image.open(tmp_path / "out" / name) as image:
      assert image.size[0] > 100
  for name in bad:
    escaped = name.replace("\x1b", r"\x1b")
    assert f"{escaped} cannot be read" in done.stderr
  assert "\x1b" not in done.stderr
  assert f"{len(good)} of {len(records)} images done" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_predict_super_resolution_with_reference(tmp_path):
  """From a file like TTSR.pt, of a model of minimal size."""
  ttsr = system_module("ttsr", "model")
  model = ttsr.TTSR(width=4, depths=(1, 1, 1, 1), texture_widths=(4, 4, 4), scan_layers=False)
  images = [jax.ShapeDtypeStruct((1, s, s, 3), np.float32) for s in (2, 8, 8, 8)]
  shapes = jax.eval_shape(model.init, jax.random.key(0), *images)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.2, x.shape)), shapes)
  weights = Pretrained(model, variables, Preprocess((8, 8)), {}, task="super_resolution")
  export.write(weights, "pt", str(tmp_path / "TTSR.safetensors"))
  (tmp_path / "images").mkdir()
  for name, (height, width) in {"images/a": (5, 7), "reference": (9, 14)}.items():
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{name}.png")
  (tmp_path / "images" / "b.png").write_bytes(b"no image")
  done = command(
    "predict", f"--model={tmp_path / 'TTSR.safetensors'}", f"--images={tmp_path / 'images'}",
    f"--reference={tmp_path / 'reference.png'}", f"--output={tmp_path / 'out'}", "--tile=100",
  )  # fmt: skip
  assert done.returncode == 1, done.stderr  # one file is not an image
  assert "Traceback" not in done.stderr
  a, b = json.loads((tmp_path / "out" / "predictions.json").read_text())
  assert (a["size"], a["reference_size"]) == ([20, 28], [8, 12])
  assert "b.png cannot be read" in b["error"]
  with Image.open(tmp_path / "out" / "a.png") as image:
    assert image.size == (28, 20)
  assert (tmp_path / "out" / "a_search.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("module", "arguments", "message"),
  [
    ("predict", [], "--model is missing"),
    ("predict", ["--workdir=x"], "--workdir is now --model"),
    ("predict", ["--model=nowhere", "--images=x.jpg"], "--images=x.jpg"),
    ("predict", [f"--model={WEIGHTS}"], "--images: missing"),
    ("predict", [f"--model={WEIGHTS}", "--imagse=x.jpg"], "imagse"),
    ("export", [f"--model={WEIGHTS}", "--format=hf"], "--output: missing"),
    ("export", [f"--model={WEIGHTS}", "--format=tflite", "--output=o"], "unknown --format of vit"),
    ("export", [f"--model={WEIGHTS}", "--format=npz", "--output=o", "extra"], "'extra'"),
    ("export", ["--model=nowhere.npz", "--format=hf", "--output=o"], "nowhere.npz"),
  ],
)
def test_invalid_arguments_one_line_error(module, arguments, message):
  done = command(module, *arguments)
  assert done.returncode not in (0, None)
  assert "Traceback" not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert message in last
  assert done.stdout.strip() == ""


RELOAD = """
import sys, jax, jax.export, numpy as np
exported = jax.export.deserialize(open(sys.argv[1], "rb").read())
outputs = exported.call(np.load(sys.argv[2]))
assert "vit_jax_zoo" not in sys.modules and "flax" not in sys.modules
np.save(sys.argv[3], outputs["logits"])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("source", "size", "forms"),
  [
    ("vit_a", None, ("npz", "orbax", "stablehlo")),
    ("vit_timm_a", None, ("safetensors-timm", "orbax", "stablehlo")),
    ("vit_hf_a", None, ("hf", "stablehlo")),
    ("lambda_resnet26t_a", 64, ("safetensors-timm", "orbax", "stablehlo")),
  ],
)
def test_export_formats_equal_logits(source, size, forms, tmp_path):
  folder = golden_folder(source)
  files = [folder / name for name in ("weights.npz", "weights.safetensors")]
  path = next((file for file in files if file.exists()), folder)
  options = {} if size is None else {"image_size": size}
  loaded = load_pretrained(str(path), **options)
  height, width = loaded.config["image_size"]
  images = np.random.default_rng(0).uniform(0, 255, (3, height, width, 3)).astype(np.float32)
  mean, std = (np.asarray(x, np.float32) for x in (loaded.preprocess.mean, loaded.preprocess.std))
  normal = (images / 255 - mean) / std
  expected = np.asarray(jax.jit(loaded.model.apply)(loaded.variables, normal)["logits"])
  scale = max(1.0, float(np.abs(expected).max()))
  for form in forms:
    out = tmp_path / form
    sized = [] if size is None else [f"--image_size={size}"]
    done = command("export", f"--model={path}", f"--format={form}", f"--output={out}", *sized)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if form == "stablehlo":
      np.save(tmp_path / "images.npy", images)
      files = [out / "model.stablehlo", tmp_path / "images.npy", tmp_path / "logits.npy"]
      run = [sys.executable, "-I", "-c", RELOAD, *map(str, files)]
      subprocess.run(run, check=True, cwd=tmp_path, timeout=300)
      given = np.load(files[2])
    else:
      again = load_pretrained(str(out), **options)
      given = np.asarray(jax.jit(again.model.apply)(again.variables, normal)["logits"])
    np.testing.assert_allclose(given, expected, atol=1e-4 * scale, err_msg=form)
