"""What others have published: name -> where it lies, how it scores, and who says so.

Scores are ImageNet-1k top-1 unless the text says otherwise, as their publishers state them; none of
them was measured here. TTSR's weights are on file-sharing sites only, without an address that one
could rely on; the official code of FPT came with none.
"""

import dataclasses

GOOGLE = "https://storage.googleapis.com/vit_models"
TIMM_RELEASE = (
  "https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-attn-weights"
)
FACEBOOK = "https://dl.fbaipublicfiles.com/detr"
OPENAI = "https://openaipublic.blob.core.windows.net/image-gpt"


@dataclasses.dataclass(frozen=True)
class Entry:
  """A published checkpoint.

  Attributes:
    model: the registry's name of its architecture.
    urls: of its files; the first is the one to read. Those of one entry lie together.
    hub: "owner/name" on Hugging Face's hub, in place of `urls`.
    sha256: of the first file, or how it begins, where the publisher states it.
    score: what it reaches, with the side of the images.
    source: who says so.
  """

  model: str
  urls: tuple[str, ...] = ()
  hub: str = ""
  sha256: str = ""
  score: str = "–"
  source: str = "–"


_ISSUE_62 = "google-research/vision_transformer#62"
_PAPER = "2010.11929, table 5"
_TIMM = "timm, results-imagenet.csv"
_CARD = "timm's model card"

# file -> upstream precision@1 on held-out ImageNet-21k images.
_IMAGENET21K = {
  "b16": ("ViT-B_16", "47.88 % (ImageNet-21k)"),
  "b32": ("ViT-B_32", "44.04 % (ImageNet-21k)"),
  "l16": ("ViT-L_16", "49.90 % (ImageNet-21k)"),
  "l32": ("ViT-L_32", "45.42 % (ImageNet-21k)"),
  "h14": ("ViT-H_14", "49.06 % (ImageNet-21k)"),
  "r50_b16": ("R50+ViT-B_16", "–"),
}
_FINETUNED = {"b16": "83.97", "b32": "81.28", "l16": "85.15", "l32": "80.99"}
_FINETUNED_224 = {"b16": "81.2", "l16": "82.7"}

_AUGREG = {
  "ti16": ("Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", "78.44"),
  "s32": ("S_32", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", "–"),
  "s16": ("S_16", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", "83.81"),
  "b16": ("B_16", "aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.01", "86.01"),
  "l16": ("L_16", "aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01", "87.10"),
  "r_ti16": ("R_Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", "75.96"),
  "r26_s32": ("R26_S_32", "aug_medium2-wd_0.03-do_0.0-sd_0.0", "0.03", "84.07"),
  "r50_l32": ("R50_L_32", "aug_medium2-wd_0.1-do_0.0-sd_0.0", "0.01", "86.19"),
}
"""Those of "How to train your ViT" (arXiv:2106.10270) that timm hosts, too."""


def _augreg(size: str) -> dict[str, Entry]:
  name, recipe, rate, score = _AUGREG[size]
  upstream = f"{GOOGLE}/augreg/{name}-i21k-300ep-lr_0.001-{recipe}"
  tuned = f"{upstream}--imagenet2012-steps_20k-lr_{rate}-res_384.npz"
  source = _TIMM if score != "–" else "–"
  said = score if score == "–" else f"{score} % at 384"
  return {
    f"vit_{size}_augreg_imagenet21k": Entry(f"vit_{size}", (f"{upstream}.npz",)),
    f"vit_{size}_augreg_imagenet": Entry(f"vit_{size}", (tuned,), score=said, source=source),
  }


def _paper(size: str) -> dict[str, Entry]:
  file, score = _IMAGENET21K[size]
  model, tuned = f"vit_{size}", f"{GOOGLE}/imagenet21k+imagenet2012/{file}"
  source = "–" if score == "–" else _ISSUE_62
  entries = {
    f"{model}_imagenet21k": Entry(
      model, (f"{GOOGLE}/imagenet21k/{file}.npz",), score=score, source=source
    )
  }
  if size in _FINETUNED:
    said = f"{_FINETUNED[size]} % at 384"
    entries[f"{model}_imagenet"] = Entry(model, (f"{tuned}.npz",), score=said, source=_PAPER)
  if size in _FINETUNED_224:
    said = f"{_FINETUNED_224[size]} % at 224"
    source = "google-research/vision_transformer, README"
    entries[f"{model}_imagenet_224"] = Entry(
      model, (f"{tuned}-224.npz",), score=said, source=source
    )
  return entries


def _lambda(model: str, hub: str, file: str, sha256: str, score: str) -> dict[str, Entry]:
  said = f"{score} % at 256"
  return {
    f"{model}_imagenet": Entry(
      model, (f"{TIMM_RELEASE}/{file}-{sha256}.pth",), sha256=sha256, score=said, source=_CARD
    ),
    f"{model}_imagenet_hub": Entry(model, hub=f"timm/{hub}", score=said, source=_CARD),
  }


def _igpt(size: str, shards: int, nats: str) -> dict[str, Entry]:
  prefix = f"{OPENAI}/checkpoints/igpt-{size}/1000000/model.ckpt-1000000"
  data = tuple(f"{prefix}.data-{i:05d}-of-{shards:05d}" for i in range(shards))
  palette = f"{OPENAI}/color-clusters/kmeans_centers.npy"
  long = {"s": "small", "m": "medium", "l": "large"}[size]
  said, source = f"{nats} nats a pixel (ImageNet, 32x32)", "openai/image-gpt, README"
  return {
    f"igpt_{size}_imagenet": Entry(
      f"igpt_{size}", (f"{prefix}.index", *data, palette), score=said, source=source
    ),
    f"igpt_{size}_imagenet_hub": Entry(
      f"igpt_{size}", hub=f"openai/imagegpt-{long}", score=said, source=source
    ),
  }


_DETR_README = "facebookresearch/detr, README"

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


def _detr(model: str) -> dict[str, Entry]:
  file, sha256, hub, score = _DETR[model]
  said = f"{score} (COCO)"
  return {
    f"{model}_coco": Entry(
      model, (f"{FACEBOOK}/detr-{file}-{sha256}.pth",), "", sha256, said, _DETR_README
    ),
    f"{model}_coco_hub": Entry(model, hub=f"facebook/detr-{hub}", score=said, source=_DETR_README),
  }


ENTRIES: dict[str, Entry] = {
  **{name: entry for size in _IMAGENET21K for name, entry in _paper(size).items()},
  **{name: entry for size in _AUGREG for name, entry in _augreg(size).items()},
  "vit_b16_sam_imagenet": Entry("vit_b16", (f"{GOOGLE}/sam/ViT-B_16.npz",)),
  "vit_b32_sam_imagenet": Entry("vit_b32", (f"{GOOGLE}/sam/ViT-B_32.npz",)),
  "vit_s16_imagenet_90ep": Entry(
    "vit_s16",
    ("https://storage.googleapis.com/big_vision/vit_s16_i1k_90ep.npz",),
    score="76.5 % at 224",
    source="2205.01580",
  ),
  **_lambda(
    "lambda_resnet26t", "lambda_resnet26t.c1_in1k", "lambda_resnet26t_c_256", "e5a5c857", "79.126"
  ),
  **_lambda(
    "lambda_resnet26rpt_256", "lambda_resnet26rpt_256.c1_in1k", "lambda_resnet26rpt_c_256",
    "ab00292d", "78.960",
  ),
  **_lambda(
    "lambda_resnet50ts", "lambda_resnet50ts.a1h_in1k", "lambda_resnet50ts_a1h_256", "b87370f7",
    "81.184",
  ),
  **_igpt("s", 32, "2.0895"),
  **_igpt("m", 32, "2.0614"),
  **_igpt("l", 64, "2.0466"),
  **{name: entry for model in _DETR for name, entry in _detr(model).items()},
}  # fmt: skip
"""By the name that `load_pretrained` takes."""

_LAMBDA_PAPER, _VIT_PAPER = "2102.08602", "2010.11929"
_IGPT_PAPER, _TTSR_PAPER = "Chen et al., ICML 2020", "2006.04139"

PAPER_SCORES: dict[str, tuple[str, str]] = {
  **{
    f"lambda_resnet_{name}": (f"{score} % at {side}", _LAMBDA_PAPER)
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
  "vit_b16": ("84.15 % at 384 (JFT), 83.97 % (ImageNet-21k)", f"{_VIT_PAPER}, table 5"),
  "vit_b32": ("80.73 % at 384 (JFT), 81.28 % (ImageNet-21k)", f"{_VIT_PAPER}, table 5"),
  "vit_l16": ("87.12 % at 384 (JFT), 85.15 % (ImageNet-21k)", f"{_VIT_PAPER}, table 5"),
  "vit_l32": ("84.37 % at 384 (JFT), 80.99 % (ImageNet-21k)", f"{_VIT_PAPER}, table 5"),
  "vit_h14": ("88.04 % at 384 (JFT), 85.13 % (ImageNet-21k)", f"{_VIT_PAPER}, table 5"),
  "vit_r50_b32": ("84.90 % at 384 (JFT)", _VIT_PAPER),
  "vit_r50_b16": ("85.58 % at 384 (JFT)", _VIT_PAPER),
  "vit_r50_l32": ("85.68 % at 384 (JFT)", _VIT_PAPER),
  "vit_r50_l16": ("87.12 % at 384 (JFT)", _VIT_PAPER),
  "vit_s16": ("76.5 % at 224 after 90 epochs", "2205.01580"),
  "vit_ti16": ("78.44 % at 384 (ImageNet-21k)", _TIMM),
  "igpt_s": ("41.9 %, linear probe at 32", _IGPT_PAPER),
  "igpt_m": ("54.5 %, linear probe at 32", _IGPT_PAPER),
  "igpt_l": ("65.2 %, linear probe at 48", _IGPT_PAPER),
  "igpt_xl": ("72.0 %, linear probe of five layers at 64", _IGPT_PAPER),
  **{model: (f"{score} (COCO)", _DETR_README) for model, (*_, score) in _DETR.items()},
  "mask_rcnn_lambda_resnet_101": ("49.4 box AP, 43.5 mask AP (COCO)", _LAMBDA_PAPER),
  "mask_rcnn_lambda_resnet_152": ("50.0 box AP, 43.9 mask AP (COCO)", _LAMBDA_PAPER),
  "ttsr": ("27.09 dB with l1 alone (CUFED5, five references)", _TTSR_PAPER),
}
"""Best score of an architecture as its paper has it, ImageNet-1k top-1 unless it says otherwise.

Weights behind scores with JFT, and all LambdaResNets of the paper, were never released.
"""
