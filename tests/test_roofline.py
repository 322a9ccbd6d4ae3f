"""The roofline note is the one that its arithmetic gives, and its model keeps to what the design derived."""

import pytest

pytest.importorskip("triton")
roofline = pytest.importorskip("safr_fast.kernels.roofline")


def test_the_note_is_current() -> None:
    assert roofline.PAGE.read_text() == roofline.page(), "run `python -m safr_fast.kernels.roofline`"


def test_floors_are_those_of_the_algorithms() -> None:
    """At 798 TFLOP/s: 3 T³ a head, and 10.5 T E² a sample by the feature moment with 64-wide tiles of S."""
    by_moment, cubic = roofline.importance(32, 2048, 256, ""), roofline.interaction(256, 2048, 64, "")
    assert by_moment.floor / roofline.FLOPS == pytest.approx(56.5e-6, rel=0.01)
    assert cubic.floor / roofline.FLOPS == pytest.approx(8.27e-3, rel=0.01)
