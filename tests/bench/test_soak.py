"""The soak's verdict: what grows is named, what only warms up or swings is not."""

from __future__ import annotations

from bench.soak import growth


def samples(rss: list[float], files: list[float]) -> list[dict[str, float]]:
    return [{"worker rss_mb": a, "worker files": b} for a, b in zip(rss, files, strict=True)]


def test_warming_up_is_no_growth() -> None:
    assert growth(samples([60, 80, 90, 90, 91, 90, 91, 90, 91], [20, 60, 60, 61, 60, 64, 60, 66, 60])) == []


def test_a_leak_is_named() -> None:
    assert growth(samples([float(60 + 5 * n) for n in range(9)], [60.0] * 9)) == ["worker rss_mb"]
    assert growth(samples([60.0] * 9, [float(20 + 10 * n) for n in range(9)])) == ["worker files"]
