"""transformers' ImageGPT, from the folder that the package exports for it.

Its attention is written out, with no fused kernel to choose. "compiled, fused" puts torch's own in
its place, so that the comparison is not one of attention kernels alone. `generate` keeps keys and
values, as ours does.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTAttention

from implementations import torch_utils
from implementations.base import Setting, Side

FUSED = ", fused"
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def side(setting: Setting) -> Side:
  """Trains on whole images, and draws the last pixels of some."""
  tokens = torch_utils.placed(setting.inputs()["tokens"]).long()

  def make(form: str) -> dict[str, Callable[[int], None]]:
    plain = load(setting.weights, fused=form.endswith(FUSED))
    model = torch_utils.maybe_compiled(plain, form)

    def loss() -> torch.Tensor:
      with torch_utils.precision(setting):
        return _loss(model, tokens)

    runs = {"train": torch_utils.train_step(plain, loss)}
    if form == "eager":  # generate with a growing cache would be compiled anew at each length
      drawing = load(setting.weights).eval()
      if setting.dtype == "bfloat16":
        drawing = drawing.to(torch.bfloat16)  # faster than autocast, which casts at every step
      runs["draw"] = torch_utils.repeated(lambda: draw(drawing, tokens, setting.pixels))
    return runs

  with torch.no_grad():
    plain = load(setting.weights).eval()
    answers = {"logits": logits(plain, tokens), "training loss": _loss(plain, tokens)}
  fused = tuple(form + FUSED for form in setting.forms)
  runs, skipped = torch_utils.tried(setting, make, setting.forms + fused)
  return Side(runs, torch_utils.numpy(answers), torch_utils.described(), skipped)


def load(weights: str, *, fused: bool = False) -> torch.nn.Module:
  """Returns the model of an exported folder, without dropout."""
  kind = transformers.ImageGPTForCausalImageModeling
  model = kind.from_pretrained(weights, **_NO_DROPOUT).to(torch_utils.device())
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
  """Returns what the model reads: a start token, and all pixels but the last."""
  start = torch.full_like(tokens[:, :1], transformers.ImageGPTConfig().vocab_size - 1)
  return torch.cat([start, tokens[:, :-1]], dim=1)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
  """Returns the logits of every pixel, given those before."""
  return model(input_ids=_shifted(tokens), use_cache=False).logits


def _loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
  return cross_entropy(logits(model, tokens).float().flatten(0, 1), tokens.flatten())


@torch.inference_mode()
def draw(model: Any, tokens: torch.Tensor, pixels: int) -> None:
  """Draws the last pixels, given all others."""
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
