"""Self-attention that hands out its queries and keys, and never makes the weights."""

from torch import Tensor, nn
from torch.nn import functional as F

from safr_fast.nn.packed_attention import longest, packed_attention


class SelfAttention(nn.Module):
    """Multi-head attention over a sample's real tokens, by ``scaled_dot_product_attention``.

    Queries and keys are returned beside the output, so that the interaction loss can be taken from them; attention
    weights of shape (B, H, T, T) exist nowhere.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} heads for dim {dim}")
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        keys: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, T, E), queries and keys (B, H, T, D); ``keys``: bool (B, T), true where attention may look.

        Packed: ``x`` and output (N, E), queries and keys (N, H, D); ``cu_seqlens`` int32 (S + 1,) are the offsets of
        the sequences, ``max_seqlen`` the length of the longest, found out if None.

        Raises:
            ValueError: ``keys`` beside ``cu_seqlens``.
        """
        if keys is not None and cu_seqlens is not None:
            raise ValueError("keys and cu_seqlens exclude each other: packed input has no padding; pass one of them")
        qkv = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # (..., 3, H, D)
        if cu_seqlens is not None:
            q, k, v = qkv.unbind(1)  # (N, H, D)
            if max_seqlen is None:
                max_seqlen = longest(cu_seqlens)
            return self.out(packed_attention(q, k, v, cu_seqlens, max_seqlen).flatten(1)), q, k
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        context = F.scaled_dot_product_attention(q, k, v, None if keys is None else keys[:, None, None, :])
        return self.out(context.transpose(1, 2).flatten(2)), q, k
