"""Runs every command of README.md in a fresh clone and virtual environment.

`-m slow`; needs a package index. Files that the README names (`ViT-B_16.npz`, `/path`, `a.jpg`)
are created here; trainings except the demo are shortened to two steps of two images, and `pytest`
to tests/test_house.py.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import data as pictures

from tests.conftest import system_module
from tests.test_readme import blocks, commands, module_of
from vit_jax_zoo import create_model
from vit_jax_zoo.weights import Preprocess
from vit_jax_zoo.weights.checkpoint import Pretrained
from vit_jax_zoo.weights.load import flatten_variables

vit_npz = system_module("vit", "weights_google")
vit_hf = system_module("vit", "weights_hf")

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SHORT = ["--config.num_steps=2", "--config.batch_size=2", "--config.eval_every=0"]
NOT_RUN = ("/data", "hf:", "wandb", "vit-jax-zoo app", "./launch_tpu.sh")
"""Parts of commands that need other data, an account, a server or a slice, tested elsewhere."""


def write_images(folder, count=4):
  """Writes class folders in `train` and `test` with crops of one photograph each."""
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    for name, picture in {"cat": pictures.chelsea(), "cup": pictures.coffee()}.items():
      (folder / split / name).mkdir(parents=True)
      for i in range(count if split == "test" else 5 * count):
        y, x = rng.integers(0, 80, 2)
        crop = picture[y : y + 200, x : x + 200, ::-1]
        cv2.imwrite(str(folder / split / name / f"{i}.jpg"), crop)


def write_weights(clone):
  """Writes a ViT-B/16 in Google's and Hugging Face's formats, with random weights."""
  model = create_model("vit_b16", num_classes=3, scan_layers=False)
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
  flat = {path: np.asarray(array) for path, array in flatten_variables(variables).items()}
  export = Pretrained(model, flat, Preprocess((224, 224)), {})
  vit_npz.write_checkpoint(str(clone / "ViT-B_16.npz"), export)
  folder = clone / "google" / "vit-base-patch16-224"
  folder.mkdir(parents=True)
  vit_hf.write_checkpoint(str(folder), export)


class FreshClone:
  """A fresh clone with a fresh virtual environment."""

  def __init__(self, folder):
    self.clone, self.venv, self.images = folder / "clone", folder / "venv", folder / "images"
    self.env = {
      key: value
      for key, value in os.environ.items()
      if key not in ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")
    }
    self.env["PATH"] = f"{self.venv / 'bin'}{os.pathsep}{self.env['PATH']}"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(self.clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(self.venv)], check=True)

  def run(self, words, timeout=1500):
    result = subprocess.run(
      words, cwd=self.clone, env=self.env, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr

  def make_files(self):
    write_images(self.images)
    write_weights(self.clone)
    shutil.copy(self.images / "test/cat/0.jpg", self.clone / "a.jpg")
    shutil.copytree(self.images / "test/cup", self.clone / "photos")


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory):
  return FreshClone(tmp_path_factory.mktemp("fresh_clone"))


def test_install_demo_and_tests(fresh_clone):
  install, demo, install_tests, test = commands()[:4]
  fresh_clone.run(install)
  output = fresh_clone.run(demo)
  accuracy = float(re.search(r"done after 1000 steps: test/accuracy ([\d.]+)", output)[1])
  assert accuracy >= 0.96
  fresh_clone.run(install_tests)
  assert test == ["pytest"]
  fresh_clone.run(["pytest", "-n", "0", "-q", "tests/test_house.py"])


def shortened(words, fresh_clone):
  """Returns the command with existing paths, and two steps of training."""
  words = [word.replace("/path", str(fresh_clone.images)) for word in words]
  short = module_of(words) == "vit_jax_zoo.main" and "--config=configs/vit.py" not in words
  return [*words, *(SHORT if short else [])]


def test_all_other_commands(fresh_clone):
  fresh_clone.make_files()
  done = []
  for words in commands()[4:]:
    text = " ".join(words)
    if any(part in text for part in NOT_RUN):
      continue
    if "--topology" in text:
      fresh_clone.run(["pip", "install", "--quiet", "-e", ".[plan]"])
    fresh_clone.run(shortened(words, fresh_clone))
    done.append(words)
  assert len(done) >= 6


def test_python_blocks(fresh_clone):
  for text in blocks("python"):
    fresh_clone.run(["python", "-c", text])
