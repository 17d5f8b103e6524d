"""Published ViT checkpoints by name, and the scores that the papers report."""

from vit_jax_zoo.weights.hub import Entry

_PAPER = "2010.11929, table 5"
_ISSUE_62 = "google-research/vision_transformer#62"
_README = "google-research/vision_transformer, README"
_TIMM = "timm, results-imagenet.csv"

# File; precision@1 on held-out ImageNet-21k images; ImageNet's after fine-tuning at 384, at 224.
_IMAGENET21K = {
  "b16": ("ViT-B_16", "47.88", "83.97", "81.2"),
  "b32": ("ViT-B_32", "44.04", "81.28", ""),
  "l16": ("ViT-L_16", "49.90", "85.15", "82.7"),
  "l32": ("ViT-L_32", "45.42", "80.99", ""),
  "h14": ("ViT-H_14", "49.06", "", ""),
  "r50_b16": ("R50+ViT-B_16", "", "", ""),
}
# Those of "How to train your ViT" (arXiv:2106.10270) that timm hosts, too: file; learning rate of
# the fine-tuning; ImageNet's precision@1 at 384.
_AUGREG = {
  "ti16": ("Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", "78.44"),
  "s32": ("S_32", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", ""),
  "s16": ("S_16", "aug_light1-wd_0.03-do_0.0-sd_0.0", "0.03", "83.81"),
  "b16": ("B_16", "aug_medium1-wd_0.1-do_0.0-sd_0.0", "0.01", "86.01"),
  "l16": ("L_16", "aug_medium1-wd_0.1-do_0.1-sd_0.1", "0.01", "87.10"),
  "r_ti16": ("R_Ti_16", "aug_none-wd_0.03-do_0.0-sd_0.0", "0.03", "75.96"),
  "r26_s32": ("R26_S_32", "aug_medium2-wd_0.03-do_0.0-sd_0.0", "0.03", "84.07"),
  "r50_l32": ("R50_L_32", "aug_medium2-wd_0.1-do_0.0-sd_0.0", "0.01", "86.19"),
}


def _entry(model: str, path: str, score: str = "", at: str = "", source: str = "") -> Entry:
  scored = {"score": f"{score} % {at}", "source": source} if score else {}
  return Entry(model, (f"https://storage.googleapis.com/{path}.npz",), **scored)


def _paper(size: str) -> dict[str, Entry]:
  file, upstream, at_384, at_224 = _IMAGENET21K[size]
  model, tuned = f"vit_{size}", f"vit_models/imagenet21k+imagenet2012/{file}"
  first = _entry(model, f"vit_models/imagenet21k/{file}", upstream, "(ImageNet-21k)", _ISSUE_62)
  entries = {f"{model}_imagenet21k": first}
  if at_384:
    entries[f"{model}_imagenet"] = _entry(model, tuned, at_384, "at 384", _PAPER)
  if at_224:
    entries[f"{model}_imagenet_224"] = _entry(model, f"{tuned}-224", at_224, "at 224", _README)
  return entries


def _augreg(size: str) -> dict[str, Entry]:
  name, recipe, rate, score = _AUGREG[size]
  upstream = f"vit_models/augreg/{name}-i21k-300ep-lr_0.001-{recipe}"
  tuned = f"{upstream}--imagenet2012-steps_20k-lr_{rate}-res_384"
  return {
    f"vit_{size}_augreg_imagenet21k": _entry(f"vit_{size}", upstream),
    f"vit_{size}_augreg_imagenet": _entry(f"vit_{size}", tuned, score, "at 384", _TIMM),
  }


PUBLISHED: dict[str, Entry] = {
  **{name: entry for size in _IMAGENET21K for name, entry in _paper(size).items()},
  **{name: entry for size in _AUGREG for name, entry in _augreg(size).items()},
  "vit_b16_sam_imagenet": _entry("vit_b16", "vit_models/sam/ViT-B_16"),
  "vit_b32_sam_imagenet": _entry("vit_b32", "vit_models/sam/ViT-B_32"),
  "vit_s16_imagenet_90ep": _entry(
    "vit_s16", "big_vision/vit_s16_i1k_90ep", "76.5", "at 224", "2205.01580"
  ),
}

PAPER_SCORES: dict[str, tuple[str, str]] = {
  "vit_b16": ("84.15 % at 384 (JFT), 83.97 % (ImageNet-21k)", _PAPER),
  "vit_b32": ("80.73 % at 384 (JFT), 81.28 % (ImageNet-21k)", _PAPER),
  "vit_l16": ("87.12 % at 384 (JFT), 85.15 % (ImageNet-21k)", _PAPER),
  "vit_l32": ("84.37 % at 384 (JFT), 80.99 % (ImageNet-21k)", _PAPER),
  "vit_h14": ("88.04 % at 384 (JFT), 85.13 % (ImageNet-21k)", _PAPER),
  "vit_r50_b32": ("84.90 % at 384 (JFT)", "2010.11929"),
  "vit_r50_b16": ("85.58 % at 384 (JFT)", "2010.11929"),
  "vit_r50_l32": ("85.68 % at 384 (JFT)", "2010.11929"),
  "vit_r50_l16": ("87.12 % at 384 (JFT)", "2010.11929"),
  "vit_s16": ("76.5 % at 224 after 90 epochs", "2205.01580"),
  "vit_ti16": ("78.44 % at 384 (ImageNet-21k)", _TIMM),
}
