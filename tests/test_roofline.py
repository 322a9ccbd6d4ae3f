"""The roofline note is the one that its arithmetic gives, and its model keeps to what the design derived."""

import pytest

pytest.importorskip("triton")
roofline = pytest.importorskip("safr_fast.kernels.roofline")


def test_the_note_is_current() -> None:
    assert roofline.PAGE.read_text() == roofline.page(), "run `python -m safr_fast.kernels.roofline`"


@pytest.mark.parametrize(
    ("heads", "head_bytes", "budget", "expected"),
    [
        (256, 6 * 256**2, None, 128),  # 48 MiB hold 128 heads
        (256, 6 * 512**2, None, 32),
        (256, 6 * 2048**2, None, 8),  # enough to fill the GPU
        (256, 6 * 8192**2, None, 1),  # 256 MiB hold none
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


@pytest.mark.parametrize("length", [256, 512])
def test_no_other_workspace_would_be_expected_to_serve_better(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that stay in L2: more launches take longer, and nothing else changes."""
    from safr_fast.kernels import configs

    def expected(mib: int) -> float:
        monkeypatch.setattr(configs, "CACHED_BYTES", mib << 20)
        return sum(
            sum(limits for name, limits in work.limits().items() if name == "launches")
            + max(limits for name, limits in work.limits().items() if name != "launches")
            for work in roofline.interaction(256, length, 64, "").kernels
        )

    default = configs.CACHED_BYTES >> 20
    assert expected(default) <= min(expected(mib) for mib in (16, 24, 32, 40))


def test_floors_are_those_of_the_algorithms() -> None:
    """At 798 TFLOP/s: 3 T³ a head, and 10.5 T E² a sample by the feature moment with 64-wide tiles of S."""
    by_moment, cubic = roofline.importance(32, 2048, 256, ""), roofline.interaction(256, 2048, 64, "")
    assert by_moment.floor / roofline.FLOPS == pytest.approx(56.5e-6, rel=0.01)
    assert cubic.floor / roofline.FLOPS == pytest.approx(8.27e-3, rel=0.01)
