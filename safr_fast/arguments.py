"""Checks of what users pass: the one place where a wrong argument becomes a sentence.

``isinstance`` takes tuples here and in ``loss``: PyTorch 2.8 compiles no union.
"""

import itertools
import math
import reprlib

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
_OUT_OF_A_ROW = {"(N, E)": "h[0]", "(N, H, D)": "q[0].transpose(0, 1)", "(N)": "ids[0]"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    if isinstance(value, (str, int, float, type(None))):
        return f"{type(value).__name__} {reprlib.repr(value)}"
    return kinds(value)


def kinds(value: object) -> str:
    """Its type and, of a list or tuple, those of the first that it holds."""
    kind = type(value).__name__
    if not isinstance(value, (list, tuple)):
        return kind
    more = ", ..." if len(value) > 3 else ""
    return f"{kind} of ({', '.join(map(kinds, value[:3]))}{more})"


def _item(name: str, value: object) -> str:
    """The remedy where a scalar of a library came for a number."""
    return f": pass {name}.item()" if hasattr(value, "item") else ""


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        several = isinstance(tensor, (list, tuple)) and all(isinstance(x, Tensor) for x in tensor)
        remedy = f": pass torch.stack({name})" if several else ""
        raise TypeError(f"{name} must be a tensor, got {describe(tensor)}{remedy}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested or sparse one: of a jagged one pass values(), of "
            "(B, H, T, D) values().transpose(0, 1), and cu_seqlens=offsets().int()"
        )
    if hasattr(tensor, "to_local"):  # of torch.distributed.tensor, which is not imported for this
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor(), or {name}.to_local() where each "
            "rank has whole samples"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {describe(tensor)}")


def check_mask(mask: Tensor | None, shape: torch.Size, like: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor of shape {tuple(shape)}, got {describe(mask)}")
    if mask.dtype != torch.bool:
        remedy = "mask == 0 if it is added to scores, mask != 0 if it is 1 for real tokens"
        remedy = remedy if mask.is_floating_point() else "mask.bool()"
        raise TypeError(f"mask must be bool (true where a token is real), got {describe(mask)}: pass {remedy}")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"mask must be on {like.device} like its input, got {mask.device}")


def check_cu_seqlens(cu_seqlens: Tensor | None, mask: Tensor | None, packed: Tensor, packed_dims: str) -> None:
    """``packed_dims``: the packed input's form as documented, for example ``"(N, E)"``."""
    if cu_seqlens is None:
        return
    if mask is not None:
        raise ValueError("mask and cu_seqlens exclude each other: packed input has no padding; pass one of them")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        remedy = ": pass cu_seqlens.int()" if isinstance(cu_seqlens, Tensor) else ""
        raise TypeError(f"cu_seqlens must be an int32 tensor of shape (S + 1,), got {describe(cu_seqlens)}{remedy}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), starting at 0, got {tuple(cu_seqlens.shape)}")
    if packed.dim() != packed_dims.count(",") + 1:
        one = packed.dim() == packed_dims.count(",") + 2 and packed.shape[0] == 1
        remedy = (": take the batch of one off, " + _OUT_OF_A_ROW[packed_dims]) if one else ""
        raise ValueError(f"with cu_seqlens the input must be packed {packed_dims}, got {tuple(packed.shape)}{remedy}")
    if cu_seqlens.device != packed.device:
        raise ValueError(f"cu_seqlens must be on {packed.device} like its input, got {cu_seqlens.device}")


def check_group(group: object, cu_seqlens: Tensor | None) -> None:
    if group is None:
        return
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {describe(group)}")
    if cu_seqlens is not None:
        raise ValueError("group and cu_seqlens exclude each other: spread padded sequences (..., T, E) over the ranks")


def check_offsets(
    cu_seqlens: Tensor | None, tokens: int, *, to_the_end: bool = False, max_seqlen: int | None = None
) -> None:
    """Of values that are at hand: on a GPU they would have to be waited for, and a compiler has none."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] > tokens or any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(f"cu_seqlens must start at 0, never fall, and end at or before {tokens}, got {offsets}")
    if to_the_end and offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at {tokens}, the number of tokens, got {offsets}")
    longest = max((b - a for a, b in itertools.pairwise(offsets)), default=0)
    if max_seqlen is not None and longest > max_seqlen:
        raise ValueError(f"max_seqlen must be at least {longest}, the tokens of the longest sequence, got {max_seqlen}")


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor | None) -> None:
    if max_seqlen is None:
        return
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        remedy = _item("max_seqlen", max_seqlen)
        raise TypeError(f"max_seqlen must be None or a whole number of tokens, got {describe(max_seqlen)}{remedy}")
    if cu_seqlens is None:
        raise ValueError("max_seqlen goes with cu_seqlens: the length of padded input is that of its shape")
    if not torch.compiler.is_compiling() and max_seqlen < 0:  # a compiler may not know what the device counted
        raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}")


def check_hidden(h: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check_floating("h", h)
    if h.dim() < 2:
        raise ValueError(f"h must have shape (..., T, E), got {tuple(h.shape)}")
    check_cu_seqlens(cu_seqlens, mask, h, "(N, E)")
    check_mask(mask, h.shape[:-1], h)


def check_attention(attention: Tensor, mask: Tensor | None) -> None:
    check_floating("attention", attention)
    if attention.dim() != 4 or attention.shape[-1] != attention.shape[-2]:
        averaged = attention.dim() == 3 and attention.shape[-1] == attention.shape[-2]
        remedy = ": of nn.MultiheadAttention ask for each head's, average_attn_weights=False" if averaged else ""
        raise ValueError(f"attention must have shape (B, H, T, T), got {tuple(attention.shape)}{remedy}")
    check_mask(mask, attention.shape[:1] + attention.shape[-1:], attention)


def check_query_key(q: Tensor, k: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q and k must have one dtype and device, got {describe(q)} and {describe(k)}")
    check_cu_seqlens(cu_seqlens, mask, q, "(N, H, D)")
    form = "(B, H, T, D)" if cu_seqlens is None else "(N, H, D)"
    if q.dim() != form.count(",") + 1 or k.dim() != q.dim():
        raise ValueError(f"q and k must have shape {form}, got {tuple(q.shape)} and {tuple(k.shape)}")
    heads, key_heads = q.shape[1], k.shape[1]
    if q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise ValueError(f"q and k may differ in heads alone, got {tuple(q.shape)} and {tuple(k.shape)} for {form}")
    if heads != key_heads and (key_heads == 0 or heads % key_heads != 0):
        raise ValueError(f"k's heads must divide q's (grouped keys), got {key_heads} for {heads}")
    if cu_seqlens is None:
        check_mask(mask, q.shape[:1] + q.shape[2:3], q)


def check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


def check_number(name: str, value: float, least: float | None = None) -> None:
    bound = "" if least is None else f", at least {least}"
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a finite number{bound}, got {describe(value)}{_item(name, value)}")
    # Compared rather than asked of math, which a compiler cannot trace; NaN compares with nothing.
    if not (-math.inf < value < math.inf) or (least is not None and value < least):
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")


def check_bytes(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"{name} must be None or a whole number of bytes, at least 1, got {describe(value)}")
    if value is not None and value < 1:
        raise ValueError(f"{name} must be None or a whole number of bytes, at least 1, got {value}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def check_form(squared: bool, exclude_diagonal: bool, reduction: str) -> None:
    """Of the interaction loss."""
    check_flag("squared", squared)
    check_flag("exclude_diagonal", exclude_diagonal)
    check_reduction(reduction)
