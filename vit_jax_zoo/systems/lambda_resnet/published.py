"""Published LambdaResNet checkpoints by name, and the scores that the paper reports.

Weights of the paper's own LambdaResNets were never released.
"""

from vit_jax_zoo.weights.model_index import Entry

TIMM_RELEASE = (
  "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-attn-weights"
)
_CARD = "timm's model card"
_PAPER = "2102.08602"


def _lambda(model: str, hub: str, file: str, sha256: str, score: str) -> dict[str, Entry]:
  said = f"{score} % at 256"
  return {
    f"{model}_imagenet": Entry(
      model, (f"{TIMM_RELEASE}/{file}-{sha256}.pth",), sha256=sha256, score=said, source=_CARD
    ),
    f"{model}_imagenet_hub": Entry(model, hub=f"timm/{hub}", score=said, source=_CARD),
  }


PUBLISHED: dict[str, Entry] = {
  **_lambda(
    "lambda_resnet26t", "lambda_resnet26t.c1_in1k", "lambda_resnet26t_c_256", "e5a5c857", "79.126"
  ),
  **_lambda(
    "lambda_resnet26rpt_256",
    "lambda_resnet26rpt_256.c1_in1k",
    "lambda_resnet26rpt_c_256",
    "ab00292d",
    "78.960",
  ),
  **_lambda(
    "lambda_resnet50ts",
    "lambda_resnet50ts.a1h_in1k",
    "lambda_resnet50ts_a1h_256",
    "b87370f7",
    "81.184",
  ),
}

PAPER_SCORES: dict[str, tuple[str, str]] = {
  **{
    f"lambda_resnet_{name}": (f"{score} % at {side}", _PAPER)
    for name, score, side in (
      ("50", "79.2", 160),
      ("101", "81.9", 192),
      ("152", "83.8", 256),
      ("270", "84.2", 256),
      ("350", "84.7", 320),
      ("420", "84.9", 320),
      ("101_c4", "82.6", 224),
      ("152_c4", "84.0", 320),
      ("200_c4", "84.3", 320),
      ("50_llll", "78.4", 224),
      ("50_clll", "78.3", 224),
      ("50_ccll", "78.3", 224),
      ("50_cccl", "77.3", 224),
      ("50_cccc", "76.9", 224),
    )
  },
  "lambda_resnet26t": ("79.126 % at 256", _CARD),
  "lambda_resnet26rpt_256": ("78.960 % at 256", _CARD),
  "lambda_resnet50ts": ("81.184 % at 256", _CARD),
  "mask_rcnn_lambda_resnet_101": ("49.4 box AP, 43.5 mask AP (COCO)", _PAPER),
  "mask_rcnn_lambda_resnet_152": ("50.0 box AP, 43.9 mask AP (COCO)", _PAPER),
}
