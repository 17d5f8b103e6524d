"""transformers' ImageGPT, with the weights that this package exports for it.

transformers has no fused attention for this model; "eager, fused" and "compiled, fused" use
torch's, so that the comparison is not one of attention kernels alone. `generate` caches keys and
values.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTAttention

from implementations import torch_utils
from implementations.base import Implementation, Setting

FUSED = ", fused"
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def create(setting: Setting) -> Implementation:
  """Train step on whole images, and sampling of the last pixels."""
  tokens = torch_utils.to_device(setting.inputs()["tokens"]).long()

  def make(mode: str) -> dict[str, Callable[[int], None]]:
    plain = load(setting.weights, fused=mode.endswith(FUSED))
    model = torch_utils.maybe_compiled(plain, mode)

    def loss() -> torch.Tensor:
      with torch_utils.precision(setting):
        return _loss(model, tokens)

    runs = {"train": torch_utils.train_step(plain, loss)}
    if mode == "eager":  # the growing cache would recompile `generate` at each length
      sampler = load(setting.weights).eval()
      if setting.dtype == "bfloat16":
        sampler = sampler.to(torch.bfloat16)  # faster than autocast, which casts at every step
      runs["sample"] = torch_utils.repeated(lambda: sample(sampler, tokens, setting.pixels))
    return runs

  with torch.no_grad():
    plain = load(setting.weights).eval()
    outputs = {"logits": logits(plain, tokens), "training loss": _loss(plain, tokens)}
  fused = tuple(mode + FUSED for mode in setting.modes)
  runs, skipped = torch_utils.prepare_modes(setting, make, setting.modes + fused)
  return Implementation(runs, torch_utils.numpy(outputs), torch_utils.device_name(), skipped)


def load(weights: str, *, fused: bool = False) -> torch.nn.Module:
  """Loads an exported folder, without dropout."""
  model_class = transformers.ImageGPTForCausalImageModeling
  model = model_class.from_pretrained(weights, **_NO_DROPOUT).to(torch_utils.device())
  for module in model.modules() if fused else ():
    if isinstance(module, ImageGPTAttention):
      module._attn = _fused_attention
  return model


def _fused_attention(
  query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None
) -> tuple[torch.Tensor, None]:
  del mask  # whole images, without padding
  return scaled_dot_product_attention(query, key, value, is_causal=True), None


def _shifted(tokens: torch.Tensor) -> torch.Tensor:
  """Returns the model's input: the start token and all pixels but the last."""
  start = torch.full_like(tokens[:, :1], transformers.ImageGPTConfig().vocab_size - 1)
  return torch.cat([start, tokens[:, :-1]], dim=1)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
  """Returns the logits of every pixel given the earlier ones."""
  return model(input_ids=_shifted(tokens), use_cache=False).logits


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
  return cross_entropy(logits(model, tokens).float().flatten(0, 1), tokens.flatten())


@torch.inference_mode()
def sample(model: Any, tokens: torch.Tensor, pixels: int) -> None:
  """Samples the last pixels given all others."""
  given = _shifted(tokens)[:, : tokens.shape[1] - pixels + 1]
  model.generate(
    given,
    attention_mask=torch.ones_like(given),
    max_new_tokens=pixels,
    min_new_tokens=pixels,
    do_sample=True,
    temperature=1.0,
    top_k=0,
    pad_token_id=0,
  )
