"""Numbers as people read them; one place, so that terminal and report say the same."""

from __future__ import annotations

_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def flops_text(flops: float) -> str:
    """Write FLOPs with three digits and a prefix: "8.55 TFLOPs", "312 MFLOPs"."""
    for index, (prefix, size) in enumerate(_PREFIXES):
        if flops >= size:
            value = f"{flops / size:.3g}"
            # 999.6 G is 1 T, not 1e+03 G.
            if "e" in value:
                prefix, value = (_PREFIXES[index - 1][0], "1") if index else (prefix, f"{flops / size:.0f}")
            return f"{value} {prefix}FLOPs"
    return f"{flops:.0f} FLOPs"


def bytes_text(size: float) -> str:
    """Write bytes with three digits and a decimal prefix: "13.4 GB", "215 kB"."""
    for prefix, unit in _PREFIXES:
        if round(size / unit, 2) >= 1:
            return f"{size / unit:.3g} {prefix}B" if size / unit < 999.5 else f"{size / unit:.0f} {prefix}B"
    return f"{size:.0f} B"


def share_text(share: float) -> str:
    """Write a share as a percentage with one decimal: "58.4%"."""
    return f"{100 * share:.1f}%"


def ms_text(ms: float) -> str:
    """Write milliseconds with about three digits: "7.42 ms", "81.3 ms", "1,204 ms"."""
    if ms >= 100:
        return f"{ms:,.0f} ms"
    return f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms"
