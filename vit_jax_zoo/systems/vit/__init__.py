"""Vision Transformer, arXiv:2010.11929: classification, hybrids with a ResNet."""

from vit_jax_zoo.registry import Format, System

SYSTEM = System(
  models={"vit": "model:VisionTransformer"},
  other_names=((r"(?:vi|dei)t_(ti|s|b|l|h)(ny|mall|ase|arge|uge)?_(patch)?(\d+)$", r"vit_\1\4"),),
  formats=(
    Format("npz", "vit", "weights_google", "Google's .npz of ViT"),
    Format("hf", "vit", "weights_hf", "Hugging Face's ViT"),
    Format("safetensors-timm", "vit", "weights_timm", "timm's ViT"),
  ),
  published="weights_google:PUBLISHED",
  paper_scores="weights_google:PAPER_SCORES",
  heads=("pre_logits/",),
  below_heads=("pre_logits/",),
  extra_tokens=("cls_token",),
  renamed_fields=(("model.norm_after_pool", "fc_norm"),),
)
