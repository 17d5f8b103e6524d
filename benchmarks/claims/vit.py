"""ViT's claims (arXiv:2010.11929, sections 3.2 and 4.3, appendix D.4) on scenes of shapes.

    python -m benchmarks.claims.vit

The class of a scene is that of its largest shape. ViT and ResNet have about the same FLOPs per
image; all runs of a table have the same number of steps.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks.claims import common
from benchmarks.claims.common import Part, Setting, table_of
from vit_jax_zoo.data.sources import demo
from vit_jax_zoo.data.sources import tfds as tfds_source

COUNTS = (1_000, 10_000, 64_000)
STEPS = 3_000
ACCURACY = "test/accuracy"


def large_set(folder: pathlib.Path, toy: bool) -> Mapping[str, Any]:  # noqa: FBT001
  """Draws 64,000 training scenes at the first use, in about two minutes."""
  place = folder / "shapes" / "1.0.0"
  if not place.is_dir():
    records = demo.shapes("train", 500 if toy else COUNTS[-1])
    features = demo.DEMOS["shapes"].features
    written = tfds_source.write_dataset(
      "shapes", features, {"train": records}, folder / "drawing", shuffle=True
    )
    place.parent.mkdir(parents=True, exist_ok=True)
    written.rename(place)
  return {"data.train.source": f"tfds:{place}"}


def _data(count: int = COUNTS[1], side: int = 64) -> dict[str, Any]:
  resize = {"name": "resize", "size": side, "method": "area"}
  move = {"name": "random_translate", "pixels": 4}
  common_fields = {"source": "demo:shapes", "label_key": "label"}
  train = {"split": f"train[:{count}]", "transforms": [{"name": "decode"}, move, resize]}
  test = {"split": "test", "transforms": [{"name": "decode"}, resize]}
  return {
    "num_steps": STEPS, "batch_size": 64, "eval_batch_size": 100, "eval_every": 0,
    "data.train": common_fields | train, "data.eval": {"test": common_fields | test},
  }  # fmt: skip


VIT = {
  "model.patch_size": 8, "model.width": 64, "model.depth": 6, "model.mlp_dim": 128,
  "model.position_embedding": "learned_1d", "optimizer.learning_rate": 1e-3,
  "optimizer.weight_decay": 0.1, "task.label_smoothing": 0.0,
}  # fmt: skip
RESNET = {
  "model.lambda_blocks": ("none", "none", "none", "none"), "model.stem": "conv7",
  "model.blocks": (2, 2, 2, 2), "model.widths": (16, 32, 64, 128), "optimizer.learning_rate": 0.05,
}  # fmt: skip


def _vit(
  fields: Mapping[str, Any] | None = None, data: Mapping[str, Any] | None = None, **more: Any
) -> Setting:
  return Setting("vit:demo", {**(data or _data()), **VIT, **(fields or {})}, (ACCURACY,), **more)


SETTINGS = (
  {
    f"ViT {count}": _vit(data=_data(count), prepare=large_set, measure=common.flops)
    for count in COUNTS
  }
  | {
    f"ResNet {count}": Setting(
      "lambda_resnet:demo",
      {**_data(count), **RESNET},
      (ACCURACY,),
      prepare=large_set,
      measure=common.flops,
    )
    for count in COUNTS
  }
  | {
    kind: _vit({"model.position_embedding": kind})
    for kind in ("none", "learned_1d", "learned_2d", "sincos_2d")
  }
  | {"at 32 px": _vit(data=_data(side=32))}
  | {
    f"fine-tuned at {side} px": _vit(
      {"num_steps": 500, "optimizer.learning_rate": 3e-4}, _data(side=side), init_from="at 32 px"
    )
    for side in (32, 64)
  }
)

PARTS = (
  Part(
    key="data",
    columns={
      **{
        model: {f"{count:,}": (f"{model} {count}", ACCURACY) for count in COUNTS}
        for model in ("ViT", "ResNet")
      },
      **{
        f"{model}: FLOPs": {f"{count:,}": (f"{model} {count}", "flops") for count in COUNTS}
        for model in ("ViT", "ResNet")
      },
    },
    rows="training images",
    axis="accuracy",
    plotted=("ViT", "ResNet"),
    compared={
      "ResNet above ViT with the fewest images": (
        (f"ResNet {COUNTS[0]}", ACCURACY),
        (f"ViT {COUNTS[0]}", ACCURACY),
      ),
      "ViT above ResNet with the most images": (
        (f"ViT {COUNTS[-1]}", ACCURACY),
        (f"ResNet {COUNTS[-1]}", ACCURACY),
      ),
    },
  ),
  Part(
    key="resolution",
    columns=table_of(
      {name: name for name in ("at 32 px", "fine-tuned at 32 px", "fine-tuned at 64 px")},
      {"accuracy": ACCURACY},
    ),
    rows="setting",
    axis="accuracy",
    compared={
      "Fine-tuning at 64 pixels above fine-tuning at 32": (
        ("fine-tuned at 64 px", ACCURACY),
        ("fine-tuned at 32 px", ACCURACY),
      )
    },
  ),
  Part(
    key="positions",
    columns=table_of(
      {kind: kind for kind in ("none", "learned_1d", "learned_2d", "sincos_2d")},
      {"accuracy": ACCURACY},
    ),
    rows="position embedding",
    axis="accuracy",
    compared={
      f"{kind} above none": ((kind, ACCURACY), ("none", ACCURACY))
      for kind in ("learned_1d", "learned_2d", "sincos_2d")
    },
  ),
)

if __name__ == "__main__":
  common.main("vit")
