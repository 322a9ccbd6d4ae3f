"""The lines that a run says to its reader."""

from collections.abc import Mapping
from typing import Any


def epoch(record: Mapping[str, Any], seconds_left: float | None) -> str:
    """One epoch. ``seconds_left``: at most; None at the end."""
    trained, dev = record["train"], record["dev"]
    terms = [f"cross-entropy {trained['cross_entropy']:.3f}"]
    terms += [f"{name} {trained[name]:.3g}" for name in ("importance", "interaction") if name in trained]
    gate = [f"gate {dev['gate']:.3f}"] if "gate" in dev else []
    parts = [
        f"epoch {record['epoch']:3d}",
        f"{record['seconds']:.1f} s ({record['tokens_per_second']:,.0f} tokens/s)",
        "train " + ", ".join(terms),
        "dev " + ", ".join([f"accuracy {dev['accuracy']:.4f}{' (best)' if record['best'] else ''}", *gate]),
    ]
    if seconds_left is not None:
        parts.append(f"at most {duration(seconds_left)} left")
    return " | ".join(parts)


def progress(epoch: int, done: int, tokens: int, speed: float) -> str:
    """Within an epoch. ``speed``: tokens per second."""
    left = duration((tokens - done) / speed)
    return f"epoch {epoch:3d} | {done / tokens:4.0%} of {tokens:,} tokens | {speed:,.0f} tokens/s | {left} left of it"


def peak_memory(peaks: Mapping[str, int]) -> str:
    """Bytes of the process and of each device."""
    return "peak memory: " + ", ".join(f"{name} {peak / 2**30:.2f} GiB" for name, peak in peaks.items())


def result(
    best_epoch: int,
    epochs: int,
    last: bool,
    dev: Mapping[str, float],
    test: Mapping[str, float],
    agreement: Mapping[str, float],
) -> str:
    """The end of a run, with the agreement with the planted truth where there is one.

    ``last``: the protocol tests the last epoch, not the best.
    """
    tested = f"last epoch {epochs}, best was {best_epoch}" if last else f"best epoch {best_epoch} of {epochs}, restored"
    lines = [f"{tested}: dev accuracy {dev['accuracy']:.4f}, test accuracy {test['accuracy']:.4f}"]
    gates = [(name.removeprefix("gate_"), value) for name, value in agreement.items() if name.startswith("gate_")]
    roles = [f"{role} {value:.3f}" for role, value in gates if role != "auc"]
    if roles:
        lines.append("planted truth, test split: mean gate " + ", ".join(roles))
    if "gate_auc" in agreement:
        lines.append(f"  a planted word's gate is above a filler's with probability {agreement['gate_auc']:.3f}")
    if "pair_attention" in agreement:
        lines.append(
            f"  a sentiment word pays its negator {agreement['pair_attention']:.1f} times an even share of attention"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1.5:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 1.5 else f"{seconds:.0f} s"
