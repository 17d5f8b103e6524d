"""ViT's recipes: values of the papers' tables, and fields of their variants."""

import numpy as np
import pytest
from PIL import Image

from configs.vit import get_config
from vit_jax_zoo import trainer
from vit_jax_zoo.config import load
from vit_jax_zoo.metrics.feature_probes import create_probe


def test_image_size_sets_training_and_evaluation_transforms():
  config = get_config("b16_imagenet21k,image_size=384")
  assert config.data.train.transforms[0]["size"] == 384
  assert [t["size"] for t in config.data.eval.val.transforms] == [438, 384]


def test_imagenet21k_recipe_equals_table_3():
  config = get_config("b16_imagenet21k")
  assert config.task.objective == "sigmoid"
  assert (config.model.head_bias_init, config.model.dropout_rate) == (-10.0, 0.1)
  assert (config.batch_size, config.num_epochs) == (4096, 90)
  assert config.optimizer.weight_decay == 0.03


def test_better_baseline_recipe_augments():
  config = get_config("s16_imagenet")
  expected = {"name": "rand_augment", "num_layers": 2, "magnitude": 10}
  assert config.data.train.transforms[-1] == expected
  assert config.task.mixup_alpha == 0.2
  assert "mixup_alpha" not in get_config("b16_imagenet").task


@pytest.mark.parametrize(
  ("size", "rate", "epochs"),
  [("b16", 8e-4, 7), ("l32", 6e-4, 7), ("l16", 4e-4, 14), ("h14", 3e-4, 14), ("r50_l32", 2e-4, 7)],
)
def test_jft_recipe_equals_table_3(size, rate, epochs):
  config = get_config(f"{size}_jft,source=tfds:/mine/1.0.0,num_classes=100")
  assert (config.optimizer.learning_rate, config.num_epochs) == (rate, epochs)
  assert (config.optimizer.weight_decay, config.optimizer.schedule.name) == (0.1, "linear")
  assert config.model.get("dropout_rate", 0.0) == 0.0
  assert config.task.objective == "sigmoid"
  expected = {"name": "multi_hot", "num_classes": 100}
  assert config.data.train.transforms[-1] == config.data.eval.val.transforms[-1] == expected
  few = get_config(f"{size}_jft,multi_label=false")
  assert expected["name"] not in [t["name"] for t in few.data.train.transforms]


@pytest.mark.parametrize(
  ("variant", "magnitude", "mixup_alpha"),
  [
    ("ti16_augreg", 0, None),
    ("b16_augreg", 15, 0.5),
    ("b16_augreg,augmentation=strong2", 20, 0.8),
    ("ti16_augreg21k", None, None),
    ("b32_augreg21k", 10, 0.2),
    ("s32_augreg", 15, 0.2),
    ("s32_augreg21k", None, None),
  ],
)
def test_augreg_recipe_equals_table(variant, magnitude, mixup_alpha):
  config = get_config(variant)
  magnitudes = [t["magnitude"] for t in config.data.train.transforms if t["name"] == "rand_augment"]
  assert magnitudes == ([] if magnitude is None else [magnitude])
  assert config.task.get("mixup_alpha") == mixup_alpha
  assert config.task.objective == "sigmoid"
  assert config.model.head_bias_init == (-10.0 if "21k" in variant else -6.9)
  assert config.optimizer.weight_decay_mode == "fully_decoupled"


def test_unknown_augmentation_raises():
  with pytest.raises(ValueError, match=r"'mediun1'.*'medium1'"):
    get_config("b16_augreg,augmentation=mediun1")


def test_multi_label_dataset_has_multi_hot_targets():
  config = get_config("l16_imagenet21k,source=tfds:/jft,num_classes=18291,multi_label=true")
  expected = {"name": "multi_hot", "num_classes": 18291}
  assert config.data.train.transforms[-1] == config.data.eval.val.transforms[-1] == expected
  assert config.model.num_classes == config.task.num_classes == 18291
  assert config.data.eval.val.source == "tfds:/jft"


def test_finetune_recipe_starts_from_published_weights():
  config = get_config("l32_finetune,dataset=oxford_flowers102,learning_rate=0.003")
  assert config.init_from == "ViT-L_32.npz"
  assert config.num_steps == 500
  assert config.optimizer.schedule.warmup_steps == 100
  assert config.data.train.split == "train+validation[:80%]"
  assert get_config("b16_finetune,init_from=runs/mine").init_from == "runs/mine"
  assert get_config("r50_b16_finetune").init_from == "R50+ViT-B_16.npz"


def test_finetune_image_size_is_multiple_of_patch_size():
  assert get_config("h14_finetune").data.train.transforms[0]["size"] % 14 == 0
  assert get_config("b16_finetune").data.train.transforms[0]["size"] == 384


def test_unknown_dataset_raises():
  with pytest.raises(ValueError, match=r"'cifar_10'.*'cifar10'"):
    get_config("b16_finetune,dataset=cifar_10")


@pytest.fixture(scope="module", params=["val", "validation", "test"])
def class_folders(request, tmp_path_factory):
  """Writes two classes: 100 training images, 2 held out."""
  root = tmp_path_factory.mktemp("images")
  for split, count in (("train", 50), (request.param, 1)):
    for name in ("ant", "bee"):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / split / name / f"{i}.png")
  return root


@pytest.mark.parametrize(
  ("variant", "held_out"),
  [("s16_imagenet", "val"), ("b16_imagenet", "val"), ("b16_finetune", "test")],
)
def test_class_folders_of_usual_layouts_are_split(variant, held_out, class_folders):
  config = load(f"configs/vit.py:{variant},source=folder:{class_folders},batch_size=8")
  experiment = trainer.build(config)
  assert experiment.train_source.info.class_names == ("ant", "bee")
  sizes = {name: len(source) for name, source in experiment.eval_sources.items()}
  part = sizes.pop(next(name for name in sizes if name != held_out))
  assert sizes == {held_out: 2}
  assert len(experiment.train_source) + part == 100


@pytest.mark.parametrize("variant", ["b16_imagenet21k", "l16_jft", "s16_augreg21k"])
def test_pretraining_recipe_accepts_few_shot_evaluation(variant):
  assert set(get_config(variant).data.eval) == {"val"}
  config = get_config(f"{variant},few_shot=tfds:imagenet2012,data_dir=/data")
  few_shot = config.data.eval.few_shot
  assert (few_shot.fit_split, few_shot.split) == ("train[:65000]", "validation")
  assert few_shot.data_dir == "/data"
  assert create_probe(**few_shot.probe.to_dict()).shots == (1, 5, 10)
  assert "multi_hot" not in {spec["name"] for spec in few_shot.transforms}
