"""Published DETR checkpoints by name, and the scores that the official code reports."""

from vit_jax_zoo.weights.model_index import Entry

FACEBOOK = "https://dl.fbaipublicfiles.com/detr"
_README = "facebookresearch/detr, README"

# model -> name and sha256 of the official file, name on the hub, score on COCO val2017.
_DETR = {
  "detr_r50": ("r50", "e632da11", "resnet-50", "42.0 box AP"),
  "detr_r50_dc5": ("r50-dc5", "f0fb7ef5", "resnet-50-dc5", "43.3 box AP"),
  "detr_r101": ("r101", "2c7b67e5", "resnet-101", "43.5 box AP"),
  "detr_r101_dc5": ("r101-dc5", "a2e86def", "resnet-101-dc5", "44.9 box AP"),
  "detr_r50_panoptic": ("r50-panoptic", "00ce5173", "resnet-50-panoptic", "43.4 PQ"),
  "detr_r50_dc5_panoptic": (
    "r50-dc5-panoptic", "da08f1b1", "resnet-50-dc5-panoptic", "44.6 PQ"
  ),
  "detr_r101_panoptic": ("r101-panoptic", "40021d53", "resnet-101-panoptic", "45.1 PQ"),
}  # fmt: skip


PAPER_SCORES = {model: (f"{score} (COCO)", _README) for model, (*_, score) in _DETR.items()}

PUBLISHED: dict[str, Entry] = {}
for _model, (_file, _sha256, _hub, _) in _DETR.items():
  _url = f"{FACEBOOK}/detr-{_file}-{_sha256}.pth"
  PUBLISHED[f"{_model}_coco"] = Entry(_model, (_url,), "", _sha256, *PAPER_SCORES[_model])
  PUBLISHED[f"{_model}_coco_hub"] = Entry(
    _model, (), f"facebook/detr-{_hub}", "", *PAPER_SCORES[_model]
  )
