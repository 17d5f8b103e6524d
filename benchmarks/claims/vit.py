"""ViT's claims (arXiv:2010.11929, sections 3.2 and 4.3, appendix D.4) on scenes of shapes.

    python -m benchmarks.claims.vit

The class of a scene is that of its largest shape. Scenes are shrunk to 32x32 pixels, of which ViT
has 16 patches. ViT and ResNet have about the same FLOPs per image and number of steps.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.claims import common
from benchmarks.claims.common import Part, Setting, table_of

COUNTS = (500, 4_000, 32_000)
STEPS = 2_000
BASE = f"ViT {COUNTS[-1]}"  # of the other parts
SCENES = common.labelled_shapes(COUNTS[-1])
ACCURACY = "test/accuracy"


def _data(count: int = COUNTS[-1], side: int = 32) -> dict[str, Any]:
  resize = {"name": "resize", "size": side, "method": "area"}
  move = {"name": "random_translate", "pixels": 4}
  common_fields = {"source": "demo:shapes", "label_key": "label"}
  train = {"split": f"train[:{count}]", "transforms": [{"name": "decode"}, move, resize]}
  test = {"split": "test", "transforms": [{"name": "decode"}, resize]}
  return {
    "num_steps": STEPS, "batch_size": 32, "eval_batch_size": 100, "eval_every": 0,
    "checkpoint.every": 0,
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
  fields = {**(data or _data()), **VIT, **(fields or {})}
  return Setting("vit:demo", fields, (ACCURACY,), prepare=SCENES, **more)


SETTINGS = (
  {f"ViT {count}": _vit(data=_data(count), measure=common.flops) for count in COUNTS}
  | {
    f"ResNet {count}": Setting(
      "lambda_resnet:demo",
      {**_data(count), **RESNET},
      (ACCURACY,),
      prepare=SCENES,
      measure=common.flops,
    )
    for count in COUNTS
  }
  | {kind: _vit({"model.position_embedding": kind}) for kind in ("none", "learned_2d")}
  | {
    f"fine-tuned at {side} px": _vit(
      {"num_steps": 300, "optimizer.learning_rate": 3e-4}, _data(side=side), init_from=BASE
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
      {
        "at 32 px": BASE,
        **{name: name for name in ("fine-tuned at 32 px", "fine-tuned at 64 px")},
      },
      {"accuracy": ACCURACY},
    ),
    rows="setting",
    axis="accuracy",
    ordered=False,
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
      {"none": "none", "learned_1d": BASE, "learned_2d": "learned_2d"},
      {"accuracy": ACCURACY},
    ),
    rows="position embedding",
    axis="accuracy",
    ordered=False,
    compared={
      "learned_1d above none": ((BASE, ACCURACY), ("none", ACCURACY)),
      "learned_2d above none": (("learned_2d", ACCURACY), ("none", ACCURACY)),
    },
  ),
)

if __name__ == "__main__":
  common.main("vit")
