"""Two steps of the fine-tuning recipes on tables, Hugging Face datasets and WebDataset shards."""

import functools

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tests.conftest import system_module
from vit_jax_zoo import trainer
from vit_jax_zoo.builder import build
from vit_jax_zoo.config import load

system_module("vit")


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
  monkeypatch.setattr(trainer, "build", functools.partial(build, devices=jax.devices()[:1]))


def photo(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
  return Image.fromarray(pixels)


def train_classifier(source, workdir, *fields, steps=2):
  """Trains a small ViT on a source; returns the scores."""
  text = ",".join(("model=vit_ti16", f"source={source}", "image_size=16", "dtype=float32", *fields))
  config = load(f"configs/finetune.py:{text}")
  config.update(num_steps=steps, num_epochs=None, batch_size=2, init_from=None)
  config.model.update(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=8)
  return trainer.run(config, epath.Path(workdir)).scores


def test_train_on_table_of_several_labels(tmp_path):
  rows = ["path,label"]
  for i in range(30):
    photo(i).save(tmp_path / f"{i}.png")
    rows.append(f"{i}.png,{('', 'cat', 'dog', 'cat|dog')[i % 4]}")
  (tmp_path / "labels.csv").write_text("\n".join(rows))
  scores = train_classifier(f"csv:{tmp_path}/labels.csv", tmp_path / "run", "multi_label=true")
  assert scores["test/loss"] > 0
  assert {"val/loss", "test/accuracy/dog"} <= scores.keys()
