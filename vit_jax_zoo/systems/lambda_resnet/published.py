"""Published LambdaResNet checkpoints by name, and the scores that the paper reports.

Weights of the paper's own LambdaResNets were never released.
"""

from vit_jax_zoo.weights.hub import Entry

RELEASES = "https://github.com/huggingface/pytorch-image-models/releases/download"
_CARD, _PAPER = "timm's model card", "2102.08602"

# timm's tag; file of its releases; start of the file's SHA-256; accuracy at 256.
_TIMM = {
  "lambda_resnet26t": ("c1_in1k", "lambda_resnet26t_c_256", "e5a5c857", "79.126"),
  "lambda_resnet26rpt_256": ("c1_in1k", "lambda_resnet26rpt_c_256", "ab00292d", "78.960"),
  "lambda_resnet50ts": ("a1h_in1k", "lambda_resnet50ts_a1h_256", "b87370f7", "81.184"),
}

PUBLISHED: dict[str, Entry] = {}
for _model, (_tag, _file, _sha256, _accuracy) in _TIMM.items():
  _scored = {"score": f"{_accuracy} % at 256", "source": _CARD}
  _url = f"{RELEASES}/v0.1-attn-weights/{_file}-{_sha256}.pth"
  PUBLISHED[f"{_model}_imagenet"] = Entry(_model, (_url,), sha256=_sha256, **_scored)
  PUBLISHED[f"{_model}_imagenet_hub"] = Entry(_model, hub=f"timm/{_model}.{_tag}", **_scored)

_SCORES = {
  160: {"50": "79.2"},
  192: {"101": "81.9"},
  224: {"101_c4": "82.6", "50_llll": "78.4", "50_clll": "78.3", "50_ccll": "78.3",
        "50_cccl": "77.3", "50_cccc": "76.9"},
  256: {"152": "83.8", "270": "84.2"},
  320: {"350": "84.7", "420": "84.9", "152_c4": "84.0", "200_c4": "84.3"},
}  # fmt: skip
"""Accuracies by image size and model."""

PAPER_SCORES: dict[str, tuple[str, str]] = {
  **{
    f"lambda_resnet_{name}": (f"{score} % at {side}", _PAPER)
    for side, scores in _SCORES.items()
    for name, score in scores.items()
  },
  **{model: (f"{row[-1]} % at 256", _CARD) for model, row in _TIMM.items()},
  "mask_rcnn_lambda_resnet_101": ("49.4 box AP, 43.5 mask AP (COCO)", _PAPER),
  "mask_rcnn_lambda_resnet_152": ("50.0 box AP, 43.9 mask AP (COCO)", _PAPER),
}
