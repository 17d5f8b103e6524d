"""Published DETR checkpoints by name, and the scores that the official code reports."""

from vit_jax_zoo.weights.model_index import Entry

FACEBOOK = "https://dl.fbaipublicfiles.com/detr"
_README = "facebookresearch/detr, README"

_DETR = {
  "detr_r50": ("e632da11", "42.0 box AP"),
  "detr_r50_dc5": ("f0fb7ef5", "43.3 box AP"),
  "detr_r101": ("2c7b67e5", "43.5 box AP"),
  "detr_r101_dc5": ("a2e86def", "44.9 box AP"),
  "detr_r50_panoptic": ("00ce5173", "43.4 PQ"),
  "detr_r50_dc5_panoptic": ("da08f1b1", "44.6 PQ"),
  "detr_r101_panoptic": ("40021d53", "45.1 PQ"),
}
"""Start of the SHA-256 of the official file, score on COCO val2017."""

PAPER_SCORES = {model: (f"{score} (COCO)", _README) for model, (_, score) in _DETR.items()}

PUBLISHED: dict[str, Entry] = {}
for _model, (_sha256, _) in _DETR.items():
  _name, _score = _model.replace("_", "-"), PAPER_SCORES[_model]
  _url, _hub = f"{FACEBOOK}/{_name}-{_sha256}.pth", f"facebook/{_name.replace('-r', '-resnet-')}"
  PUBLISHED[f"{_model}_coco"] = Entry(_model, (_url,), "", _sha256, *_score)
  PUBLISHED[f"{_model}_coco_hub"] = Entry(_model, (), _hub, "", *_score)
