"""Self-attention that hands out its queries and keys, and never makes the weights."""

from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Multi-head attention over a sample's real tokens, by ``scaled_dot_product_attention``.

    Queries and keys are returned beside the output, so that the interaction loss can be taken from them; attention
    weights of shape (B, H, T, T) exist nowhere.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} heads for dim {dim}")
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, T, E), queries and keys (B, H, T, D); ``keys``: bool (B, T), true where attention may look."""
        B, T, E = x.shape
        q, k, v = self.query_key_value(x).view(B, T, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v, None if keys is None else keys[:, None, None, :])
        return self.out(context.transpose(1, 2).reshape(B, T, E)), q, k
