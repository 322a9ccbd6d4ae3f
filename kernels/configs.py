"""Tile sizes and arithmetic by architecture, width of the operands and width of the rows.

No Triton here: the ops' fake versions ask for the crossover.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from safr_fast.precision import matmul_precision

WIDEST_ROW = 256  # features of a token that a program can keep, in 16 bits
WIDEST_UNALIGNED_ROW = 128
WORKSPACE_BYTES = 512 << 20  # on an H100, chunks that would stay in its L2 cache lose more to launches than they gain
PROGRAMS = 256  # fill a large GPU twice; a constant, so that the order of sums does not depend on the device
GRID_LIMIT = 65_535  # programs of a grid's second and third dimension
LONG = 192  # tokens beyond which larger tiles, read less often, gain more than a last one that is part empty costs
ALIGNED = 16  # elements: what widths, strides and starts must be multiples of for several elements to be read at once


@dataclass(frozen=True)
class Config:
    """A kernel's tiles, tokens by the tokens they meet by features summed over, and how a program runs."""

    rows: int
    columns: int
    features: int
    out: int = 0  # features of a gradient tile
    num_warps: int = 4
    num_stages: int = 2
    descriptors: bool = False  # products of the workspace's matrices read them by TMA, on sm_90 and later

    @property
    def execution(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# By kernel and by bits of the operands it multiplies. All compile without spilled registers for sm_80, sm_90 and gfx942
# (tests/test_triton_compile.py) and fit the 99 KiB of shared memory of the smallest GPU of each kind, or the 64 KiB of
# gfx942. float32 is split in two or three bfloat16 while it is multiplied, hence its small tiles; "interaction" and
# "gram" have 32 or 48 bits where it lies split, see ``interaction_launch.Arithmetic.in_planes``.
_CONFIGS = {
    ("token", 16): Config(64, 64, WIDEST_ROW, num_warps=8),
    ("token_backward", 16): Config(64, 32, WIDEST_ROW, num_warps=8),
    ("wide", 16): Config(64, 64, 64, num_warps=8),
    ("wide", 32): Config(64, 64, 32),
    ("wide_backward", 16): Config(64, 64, 64, out=128, num_warps=8),
    ("wide_backward", 32): Config(64, 32, 32, out=64),
    ("weight_product", 16): Config(64, 64, 0, out=128),
    ("weight_product", 32): Config(64, 32, 0, out=32),
    ("moment", 16): Config(64, 0, 64),
    ("moment", 32): Config(16, 0, 64),
    ("quadratic_form", 16): Config(64, 32, 32, num_warps=8),
    ("quadratic_form", 32): Config(64, 64, 32),
    ("moment_backward", 16): Config(64, 64, 64, out=128, num_warps=8),
    ("moment_backward", 32): Config(64, 32, 32, out=32, num_warps=8),
    ("softmax", 16): Config(64, 64, 64),
    ("softmax", 32): Config(64, 64, 32, num_warps=8),
    ("interaction", 16): Config(64, 64, 64),
    ("interaction", 32): Config(64, 64, 32, num_warps=8),
    ("interaction", 48): Config(64, 64, 32, num_warps=8),
    ("query_key_gradient", 16): Config(64, 64, 128),
    ("query_key_gradient", 32): Config(64, 32, 32),
    ("interaction_block", 16): Config(64, 64, 64),
    # No larger on sm_90: of 64 float32 rows made in registers Triton 3.6 gets products with fewer columns wrong.
    ("interaction_block", 32): Config(32, 32, 32),
    ("attention_block", 16): Config(64, 64, 64, num_warps=8),
    ("attention_block", 32): Config(32, 32, 32),
    ("packed", 16): Config(64, 64, 64),
    ("packed", 32): Config(32, 32, 32),
    ("moment_and_short", 16): Config(64, 32, 64, num_warps=8),
    ("moment_and_short", 32): Config(32, 64, 32, num_warps=8),
    ("moment_and_short_backward", 16): Config(64, 64, 64, out=128, num_warps=8),
    ("moment_and_short_backward", 32): Config(32, 32, 32, out=64, num_warps=8),
}
_HOPPER = {
    ("token", 16): Config(128, 64, WIDEST_ROW, num_warps=8, num_stages=3),
    ("token_backward", 16): Config(128, 64, WIDEST_ROW, num_warps=8),
    ("moment", 16): Config(64, 0, 128, num_stages=3),
    ("moment", 32): Config(32, 0, 64, num_warps=8),
    ("quadratic_form", 16): Config(128, 64, 64, num_warps=8),
    ("moment_backward", 16): Config(128, 64, 64, out=128, num_warps=8, num_stages=3),
    ("moment_backward", 32): Config(64, 32, 32, out=64, num_warps=8),
    ("interaction", 16): Config(64, 64, 64, num_stages=3),
    ("attention_block", 16): Config(64, 64, 64),
    ("attention_block", 32): Config(64, 64, 64, num_warps=8),
    ("packed", 32): Config(64, 64, 16),
    ("moment_and_short", 16): Config(64, 64, 64, num_stages=3),
    ("moment_and_short_backward", 16): Config(64, 64, 64, out=128, num_warps=8, num_stages=3),
    ("moment_and_short", 32): Config(64, 64, 16, num_warps=8),
    ("moment_and_short_backward", 32): Config(64, 32, 16, out=64, num_warps=8, num_stages=3),
}
# From more than LONG tokens on, where the plain name's entry has smaller tiles.
_LONG = {
    ("interaction_long", 16): Config(128, 128, 64, num_warps=8, num_stages=3),
    ("softmax_long", 16): Config(128, 64, 64, num_warps=8),
    ("query_key_gradient_long", 16): Config(128, 64, 128, num_warps=8),
}
_LONG_BY_TMA = {
    ("interaction_long", 16): Config(128, 128, 64, num_warps=8, num_stages=4, descriptors=True),
    ("softmax_long", 16): Config(128, 64, 64, num_stages=3),
    ("query_key_gradient_long", 16): Config(128, 128, 128, num_warps=8, num_stages=3),
    ("interaction_long", 32): Config(128, 128, 32, num_warps=8, num_stages=3, descriptors=True),
    ("interaction_long", 48): Config(128, 128, 32, num_warps=8, num_stages=3, descriptors=True),
    ("gram_long", 32): Config(64, 64, 64, num_stages=2, descriptors=True),
    ("gram_long", 48): Config(64, 64, 32, num_stages=3, descriptors=True),
    ("softmax_long", 32): Config(128, 64, 64, num_warps=8, num_stages=3),
    ("query_key_gradient_long", 32): Config(128, 64, 64, num_warps=8, num_stages=3),
}
_OVERRIDES = {
    "ampere": {
        ("softmax", 32): Config(64, 32, 32, num_warps=8),
        ("interaction", 16): Config(64, 64, 64, num_warps=8),
        ("wide_backward", 32): Config(64, 32, 32, out=64, num_warps=8),
        ("moment", 16): Config(64, 0, 64, num_warps=8),
        ("quadratic_form", 32): Config(64, 32, 32),
        ("moment_and_short_backward", 32): Config(32, 32, 32, out=32, num_warps=8),
    }
    | _LONG,
    "hopper": _HOPPER | _LONG_BY_TMA,
    "blackwell": _HOPPER
    | {
        ("packed", 32): Config(32, 32, 32),
        ("softmax", 32): Config(64, 64, 16, num_warps=8),
        ("interaction", 16): Config(64, 64, 64, num_warps=8),
        ("wide_backward", 16): Config(64, 64, 64, out=64, num_warps=8),
        ("quadratic_form", 16): Config(128, 64, 64, num_warps=8),
        ("quadratic_form", 32): Config(64, 32, 32),
        ("moment_backward", 16): Config(128, 64, 64, out=64, num_warps=8, num_stages=3),
        ("moment_backward", 32): Config(64, 32, 32, out=32, num_warps=8),
        ("moment", 16): Config(64, 0, 64, num_warps=8),
        ("moment_and_short", 16): Config(64, 64, 64),
        ("moment_and_short", 32): Config(32, 64, 32, num_warps=8),
        ("moment_and_short_backward", 16): Config(64, 64, 64, out=64, num_warps=8),
        ("moment_and_short_backward", 32): Config(32, 32, 16, out=64, num_warps=8),
    },
    "cdna": {
        ("token", 16): Config(64, 64, WIDEST_ROW),
        ("token_backward", 16): Config(64, 32, WIDEST_ROW),
    },
    "interpreter": {  # pays by the tile
        ("wide", 32): Config(64, 64, 128),
        ("wide_backward", 32): Config(64, 64, 128, out=128),
        ("weight_product", 32): Config(64, 64, 0, out=128),
        ("moment", 32): Config(64, 0, 128),
        ("quadratic_form", 32): Config(64, 64, 128),
        ("moment_backward", 32): Config(64, 64, 128, out=128),
        ("softmax", 32): Config(64, 64, 128),
        ("interaction", 32): Config(64, 64, 64),
        ("query_key_gradient", 32): Config(64, 64, 128),
        ("interaction_block", 32): Config(64, 64, 64),
        ("attention_block", 32): Config(64, 64, 64),
        ("packed", 32): Config(64, 64, 64),
        ("moment_and_short", 32): Config(64, 64, 128),
        ("moment_and_short_backward", 32): Config(64, 64, 128, out=128),
    },
}
# On any GPU, for rows whose width is no multiple of ALIGNED: an element read alone takes registers for its address, so
# that the tiles above would spill hundreds of bytes.
_UNALIGNED = {
    ("token", 16): Config(64, 64, WIDEST_ROW, num_warps=8),
    ("token_backward", 16): Config(32, 32, WIDEST_ROW),
    ("wide", 16): Config(64, 32, 32, num_warps=8),
    ("wide", 32): Config(64, 32, 16, num_warps=8),
    ("wide_backward", 16): Config(64, 32, 32, out=32),
    ("wide_backward", 32): Config(64, 16, 16, out=32),
    ("moment", 16): Config(64, 0, 32, num_warps=8),
    ("moment", 32): Config(16, 0, 32),
    ("quadratic_form", 16): Config(64, 32, 32),
    ("quadratic_form", 32): Config(64, 32, 16, num_warps=8),
    ("moment_backward", 16): Config(64, 32, 32, out=32, num_warps=8),
    ("moment_backward", 32): Config(64, 32, 16, out=32, num_warps=8),
    ("softmax", 16): Config(64, 64, 32, num_warps=8),
    ("softmax", 32): Config(64, 32, 16, num_warps=8),
    ("softmax_long", 16): Config(128, 32, 16, num_warps=8),
    ("query_key_gradient", 16): Config(64, 32, 32, num_warps=8),
    ("softmax_long", 32): Config(128, 32, 16, num_warps=8),
    ("query_key_gradient_long", 16): Config(128, 32, 32, num_warps=8),
    ("query_key_gradient_long", 32): Config(128, 32, 16, num_warps=8),
    ("query_key_gradient", 32): Config(64, 32, 16, num_warps=8),
    ("interaction_block", 16): Config(64, 64, 32, num_warps=8),
    ("interaction_block", 32): Config(32, 32, 16, num_warps=8),
    ("packed", 16): Config(64, 64, 32, num_warps=8),
    ("moment_and_short", 16): Config(64, 32, 32, num_warps=8),
    ("moment_and_short", 32): Config(32, 16, 16),
    ("moment_and_short_backward", 16): Config(64, 32, 32, out=32),
    ("moment_and_short_backward", 32): Config(32, 32, 16, out=32, num_warps=8),
}


# Kernels that take another's tiles where no table has their own.
_TILES_OF = {"gram": "interaction", "gram_long": "interaction_long"}

Chooser = Callable[[str, int, int, Config], Config]  # of kernel, bits, width and the table's entry
_chooser: ContextVar[Chooser | None] = ContextVar("chooser", default=None)


@contextlib.contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Within, in this thread, ``chooser`` has the last word on configurations, see ``tuning``."""
    token = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(token)


def table(kind: str) -> dict[tuple[str, int], Config]:
    """Of an architecture, for aligned rows."""
    return _CONFIGS | _OVERRIDES[kind]


def entry(kernel: str, bits: int, width: int, device: torch.device) -> Config:
    """What the table has for a kernel and rows of ``width`` features, whose operands have ``bits``."""
    kind = architecture(device)
    unaligned = _UNALIGNED if width % ALIGNED != 0 and kind != "interpreter" else {}
    for key in ((kernel, bits), (_TILES_OF.get(kernel, kernel), bits)):
        if found := unaligned.get(key) or _OVERRIDES[kind].get(key) or _CONFIGS.get(key):
            return found
    raise KeyError(f"no configuration of {kernel} for {bits} bits")


def config(kernel: str, bits: int, width: int, device: torch.device) -> Config:
    """The configuration to launch it with, no wider than the rows."""
    found = entry(kernel, bits, width, device)
    if (chooser := _chooser.get()) is not None:
        found = chooser(kernel, bits, width, found)
    return _narrowed(found, width)


@functools.cache
def _narrowed(found: Config, width: int) -> Config:
    """Kept, since a call asks for up to six of them, which took as long as a launch."""
    return replace(found, features=width_block(width, found.features), out=width_block(width, found.out))


@functools.cache
def architecture(device: torch.device) -> str:
    """Which configurations a device takes."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "cdna"
    return {9: "hopper", 10: "blackwell"}.get(torch.cuda.get_device_capability(device)[0], "ampere")


def config_for(kernel: str, bits: int, width: int, tokens: int, device: torch.device) -> Config:
    """:func:`config` of a kernel over T×T matrices: larger tiles for many ``tokens``, where the table has them."""
    longer = f"{kernel}_long"
    known = _OVERRIDES[architecture(device)]
    found = tokens > LONG and any((name, bits) in known for name in (longer, _TILES_OF.get(longer)))
    return config(longer if found else kernel, bits, width, device)


def keeps_rows(bits: int, width: int) -> bool:
    """Whether whole rows fit in a program; else they are cut in tiles of features."""
    return bits == 16 and width <= (WIDEST_ROW if width % ALIGNED == 0 else WIDEST_UNALIGNED_ROW)


def moment_threshold(E: int, dtype: torch.dtype, precision: str) -> int:
    """Tokens from which the feature moment takes fewer operations than the token Gram, and enough to launch it.

    It takes four launches or six to the Gram's two; of 16-bit products a GPU does 512² in less time than that.
    """
    return max(2 * E, 513 if dtype.itemsize == 2 else 256)


def moment_slots(shape: torch.Size, packed: bool, dtype: torch.dtype, precision: str) -> int:
    """Moments ``(E, E)`` to keep for the backward pass: one for each sample ``(B, T, E)`` or, packed ``(N, E)``, for as
    many sequences as can be long enough."""
    threshold = moment_threshold(int(shape[-1]), dtype, precision)
    if packed:
        return shape[0] // threshold
    return shape[0] if shape[1] >= threshold else 0


def moment_guard(dtype: torch.dtype, precision: str) -> float:
    """Share of n2² under which a row energy made from the moment is made again from the token Gram."""
    if dtype == torch.float32 and precision != "medium":
        return 0.1
    return 0.25


def heads_of_a_chunk(heads: int, head_bytes: int, workspace_bytes: int | None = None) -> int:
    """How many heads share the interaction's workspace: as many as fit it, in chunks as equal as can be."""
    room = (workspace_bytes or WORKSPACE_BYTES) // head_bytes
    chunks = cdiv(heads, min(max(room, 1), GRID_LIMIT))
    return cdiv(heads, chunks)


def product_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 operands are multiplied, see ``tiles.product``.

    float16 input meets them where it is multiplied by what is derived from it, whose range float16 lacks. The
    interpreter knows no splitting, and matrix cores of AMD multiply float32 as it is.
    """
    kind = architecture(device)
    if kind == "interpreter" or dtype == torch.bfloat16:
        return "ieee"
    if dtype == torch.float16:
        return "bf16x3"
    splitting = {"highest": "ieee" if kind == "cdna" else "bf16x6", "high": "bf16x3", "medium": "bf16"}
    return splitting[matmul_precision(device.type)]


def cdiv(x: int, y: int) -> int:
    """x / y rounded up; Triton's own takes as long as a tensor to make."""
    return -(-x // y)


def width_block(width: int, largest: int) -> int:
    """The power of two that holds ``width`` features, from the least a product can have up to ``largest``."""
    block = 16
    while block < min(width, largest):
        block *= 2
    return block
