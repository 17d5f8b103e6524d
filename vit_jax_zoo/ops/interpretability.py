"""What a model can show of its inside: the protocol between models, and whoever draws it.

A model that has something to show has a method

    explain(variables, intermediates, image_size) -> Explanation

which is traced: `intermediates` is what it has sown for a batch of images, of which whole attention
maps may be too large to be carried about; what it returns is small.
"""

from collections.abc import Mapping
from typing import Any

from flax import struct


@struct.dataclass
class Explanation:
  """What there is to be seen. A part that a model does not have is None, or empty.

  Attributes:
    looked_at: float32 [b gh gw], how much of what the head sees comes from each patch.
    heads: float32 [b l heads gh gw], where the head's token looks, layer by layer.
    distances: float32 [l heads], how far each head looks, in pixels, over the whole batch.
    lambdas: layer's name -> float32 [b h w], the norms of the lambdas of its positions.
    positions: float32 [gh*gw d], what the model adds to each patch to say where it is.
    filters: [kh kw c n], the kernel of the first layer.
    viewer: in words, what looks in `looked_at` and `heads`.
    principal: the filters are too many and too alike to be shown one by one: their principal
      components are what the ViT paper shows.
    grid: height and width in patches; of models that have none (0, 0).
  """

  looked_at: Any = None
  heads: Any = None
  distances: Any = None
  lambdas: Mapping[str, Any] = struct.field(default_factory=dict)
  positions: Any = None
  filters: Any = None
  viewer: str = struct.field(pytree_node=False, default="")
  principal: bool = struct.field(pytree_node=False, default=False)
  grid: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))
