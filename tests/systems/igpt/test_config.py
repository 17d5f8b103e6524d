"""iGPT's demo and recipes: palette, completions, probes, fine-tuning, evaluation in nats."""

import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import igpt
from vit_jax_zoo import export, trainer
from vit_jax_zoo.builder import build
from vit_jax_zoo.config import load
from vit_jax_zoo.systems.igpt.model import ImageGPT
from vit_jax_zoo.training.checkpoint import restore_variables
from vit_jax_zoo.weights import Preprocess, Pretrained, load_pretrained


@pytest.fixture(autouse=True, scope="module")
def _one_device():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "build", functools.partial(build, devices=jax.devices()[:1]))
    yield


def shrink(config, num_steps=2):
  config.num_steps, config.batch_size, config.eval_batch_size = num_steps, 16, 16
  config.model.update(num_colors=4, width=8, depth=1, num_heads=2)
  config.task.update(palette_images=40, completions=2)
  for spec in config.data.eval.values():
    spec.split = "test[:1]+test[100:101]+test[200:220]"
  return config


def run(config, workdir, **options):
  return trainer.run(config, epath.Path(workdir), trainer.RunOptions(**options))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("demo")
  config = shrink(load("configs/igpt.py"))
  del config.data.eval["probe"], config.data.eval["completions"]
  return config, run(config, workdir), workdir


@pytest.mark.long
def test_demo_writes_scores_completions_and_probes(tmp_path):
  config = shrink(load("configs/igpt.py"))
  config.data.eval.probe.fit_split = "train[:12]+train[700:712]"
  outcome = run(config, tmp_path)
  assert outcome.finished
  scores = outcome.scores
  assert scores["test/images"] == 22
  assert scores["test/nats"] < 2 * np.log(4)
  assert 0 < scores["test/bigram_nats"] < np.log(4)
  assert {"probe/layer_0", "probe/layer_1", "probe/pixels", "probe/best_layer"} <= scores.keys()
  figures = {path.name.rsplit("_", 1)[0] for path in (tmp_path / "figures").iterdir()}
  assert figures == {"train_batch", "completions_completions", "probe_depth"}


def test_palette_is_fitted_and_saved(demo):
  config, outcome, workdir = demo
  restored = restore_variables(str(workdir))["palette"]["clusters"]
  trained = outcome.state.model_state["palette"]["clusters"]
  np.testing.assert_array_equal(restored, trained)
  experiment = trainer.build(config)
  fitted = experiment.task.init_from_data(experiment.train_batches())["palette"]["clusters"]
  np.testing.assert_array_equal(restored, fitted)


def test_finetune_restores_weights_and_palette(demo, tmp_path):
  _, outcome, workdir = demo
  config = shrink(load("configs/igpt.py"), num_steps=1)
  config.model.num_classes = 10
  config.task.class_weight = 1.0
  config.task.palette_images = 16  # refitting would change the palette
  config.data.train.split = "train[:90]"
  del config.data.eval["probe"], config.data.eval["completions"]
  config.optimizer.learning_rate = 0.0
  config.init_from = str(workdir)
  tuned = run(config, tmp_path)
  for collection in ("palette", "baseline"):
    jax.tree.map(
      np.testing.assert_array_equal,
      tuned.state.model_state[collection],
      outcome.state.model_state[collection],
    )
  head = tuned.state.params.pop("head")
  assert head["kernel"].shape == (8, 10)
  jax.tree.map(np.testing.assert_array_equal, tuned.state.params, outcome.state.params)
  assert tuned.scores["test/nats"] == pytest.approx(outcome.scores["test/nats"], rel=1e-5)
  assert tuned.scores["test/accuracy"] <= 1


@pytest.mark.parametrize(
  ("variant", "message"),
  [("s_finetune,dataset=cifar11", "did you mean 'cifar10'"), ("l_probe,dataset=stl", "'stl10'")],
)
def test_unknown_dataset_raises(variant, message):
  with pytest.raises(ValueError, match=message):
    igpt.get_config(variant)


@pytest.mark.parametrize(
  ("fields", "source", "rate", "epochs", "train"),
  [
    ("dataset=cifar100", "tfds:cifar100", 1e-4, 20, "train[:90%]"),
    ("dataset=imagenet2012,image_size=48", "tfds:imagenet2012", 1e-3, 18, "train[:96%]"),
    ("source=folder:/mine", "folder:/mine", 1e-4, 20, "train[:90%]"),
  ],
)
def test_finetune_recipe_has_lower_rate_and_held_out_validation(
  fields, source, rate, epochs, train
):
  config = load(f"configs/igpt.py:l_finetune,{fields}")
  assert config.optimizer.learning_rate == pytest.approx(rate)
  assert (config.num_epochs, config.data.train.split) == (epochs, train)
  assert {spec.source for spec in (config.data.train, *config.data.eval.values())} == {source}
  assert config.checkpoint.best == "val/accuracy"
  assert config.data.eval.val.split == train.replace("[:", "[").replace("%]", "%:]")
  crops = [t["name"] for t in config.data.train.transforms]
  small = ["random_translate", "random_flip"]
  large = ["random_resize_small", "random_crop", "resize"]
  assert crops == (small if "cifar" in fields else large)


SMALL = {"num_colors": 16, "num_positions": 1024, "width": 8, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """Writes a folder in Hugging Face's layout with a small model and its palette."""
  model = ImageGPT(**SMALL)
  fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), fresh)
  pretrained = Pretrained(
    model, variables, Preprocess((32, 32)), {"image_size": (32, 32)}, task="pixel_modelling"
  )
  folder = tmp_path_factory.mktemp("published") / "igpt"
  export.write(pretrained, "hf", str(folder))
  return folder


def nats_config(folder):
  """Returns the config of `configs/igpt.py:s_eval_nll` for the small model."""
  flags = [f"--config.model.{k}={v}" for k, v in SMALL.items()]
  flags += ["--config.batch_size=2", "--config.data.loader.num_workers=0"]
  choice = f"s_eval_nll,source=demo:digits,split=test[:2],init_from={folder}"
  return load(f"configs/igpt.py:{choice}", flags)


def test_eval_nll_of_published_checkpoint_equals_logits(published, tmp_path):
  config = nats_config(published)
  outcome = run(config, tmp_path / "run", eval_only=True)
  loaded = load_pretrained(str(published))
  batch = next(iter(trainer.build(config).eval_batches("test")))
  images = jnp.asarray(batch["image"][:2], jnp.float32) / 127.5 - 1
  assert images.shape == (2, 32, 32, 3)
  out = jax.jit(loaded.model.apply)(loaded.variables, images)
  nats = -jax.nn.log_softmax(out["pixel_logits"])[
    np.arange(2)[:, None], np.arange(1024)[None], out["tokens"]
  ]
  assert outcome.scores["test/images"] == 2
  assert outcome.scores["test/nats"] == pytest.approx(float(nats.mean()), rel=1e-5)


def test_published_checkpoint_without_palette_warns(published, tmp_path, caplog):
  folder = shutil.copytree(published, tmp_path / "copy")
  (folder / "preprocessor_config.json").unlink()
  with caplog.at_level(logging.WARNING, logger="absl"):
    run(nats_config(folder), tmp_path / "run", eval_only=True)
  assert f"{folder}: no palette" in caplog.text


def test_missing_dataset_error_names_prepare_command(tmp_path):
  config = load(f"configs/igpt.py:s_eval_nll,data_dir={tmp_path}")
  with pytest.raises(FileNotFoundError, match=r"vit_jax_zoo\.data\.prepare") as error:
    trainer.build(config)
  assert "\n" not in str(error.value)
