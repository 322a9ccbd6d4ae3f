"""The roofline note is the one that its arithmetic gives, and its model keeps to what the design derived."""

import pytest

pytest.importorskip("triton")
roofline = pytest.importorskip("safr_fast.kernels.roofline")


def test_the_note_is_current() -> None:
    assert roofline.PAGE.read_text() == roofline.page(), "run `python -m safr_fast.kernels.roofline`"


@pytest.mark.parametrize(
    ("heads", "head_bytes", "budget", "expected"),
    [
        (256, 6 * 512**2, None, 256),
        (256, 6 * 2048**2, None, 20),  # 512 MiB hold 21: thirteen chunks
        (256, 6 * 8192**2, None, 1),
        (256, 6 * 16_384**2, None, 1),  # they hold none
        (10, 1 << 20, 4 << 20, 4),
        (9, 1 << 20, 4 << 20, 3),  # three equal chunks rather than 4, 4 and 1
        (3, 1 << 20, 1 << 30, 3),
        (3, 1 << 20, 1, 1),
        (65_536, 1 << 10, 1 << 30, 32_768),  # no more than a grid has programs
    ],
)
def test_a_chunk_has_as_many_heads_as_fit_in_equal_shares(
    heads: int, head_bytes: int, budget: int | None, expected: int
) -> None:
    from safr_fast.kernels import configs

    assert configs.heads_of_a_chunk(heads, head_bytes, budget) == expected


def test_floors_are_those_of_the_algorithms() -> None:
    """At 798 TFLOP/s: 3 T³ a head, and 10.5 T E² a sample by the feature moment with 64-wide tiles of S."""
    by_moment, cubic = roofline.importance(32, 2048, 256, ""), roofline.interaction(256, 2048, 64, "")
    assert by_moment.floor / roofline.FLOPS == pytest.approx(56.5e-6, rel=0.01)
    assert cubic.floor / roofline.FLOPS == pytest.approx(8.27e-3, rel=0.01)
