"""Draws icon.png and banner.png: one signal, its low band and its high band, by the project's own transform.

python assets/draw_banner.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from freq_loss_plugin.analysis.figures import new_figure  # noqa: E402
from freq_loss_plugin.loss.bands import frequency_decomposition  # noqa: E402

PAPER, INK, LOW, HIGH = "#1b1d23", "#f4f4f4", "#E69F00", "#56B4E9"


def signal(length: int) -> torch.Tensor:
    """A slow wave that carries a fast one in its middle."""
    time = torch.linspace(0, 1, length)
    fast = torch.sin(2 * torch.pi * 56 * time) * torch.exp(-((time - 0.5) ** 2) / 0.02)
    return torch.sin(2 * torch.pi * 1.5 * time + 0.5) + 0.45 * fast


def draw(axis: Any, curves: list[tuple[torch.Tensor, str]], width: float) -> None:
    """Curves below each other, the first one on top."""
    for row, (curve, color) in enumerate(curves):
        axis.plot(curve.numpy() - 2.9 * row, color=color, linewidth=width, solid_capstyle="round")
    axis.set_axis_off()
    axis.margins(0.06, 0.08)


def main() -> None:
    """Write both images beside this file."""
    whole = signal(512)
    # The bands of an image whose rows are all the same signal are those of the signal.
    bands = frequency_decomposition(whole.expand(1, 1, 512, 512), J=4)
    # Without the ends, where the transform meets the zeros beyond the border.
    whole, low, high = whole[24:-24], *(band[0, 0, 256, 24:-24] for band in bands)
    icon = new_figure(400, 400, facecolor=PAPER)
    draw(icon.add_axes([0.06, 0.06, 0.88, 0.88]), [(whole, INK), (low, LOW), (high, HIGH)], 9)
    icon.savefig(HERE / "icon.png")
    banner = new_figure(1260, 540, facecolor=PAPER)
    draw(banner.add_axes([0.52, 0.08, 0.44, 0.84]), [(whole, INK), (low, LOW), (high, HIGH)], 5)
    for height, size, color, text in (
        (0.62, 46, INK, "FreqLoss"),
        (0.47, 19, LOW, "low band: structure"),
        (0.39, 19, HIGH, "high band: detail"),
        (0.24, 15, INK, "see them, train on them,\nload what was trained"),
    ):
        banner.text(0.06, height, text, fontsize=size, color=color, va="center", linespacing=1.5)
    banner.savefig(HERE / "banner.png")


if __name__ == "__main__":
    main()
