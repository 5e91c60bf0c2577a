"""Fonts for texts in any script. Needs matplotlib, imported when it is used."""

from __future__ import annotations

# Of Linux, Windows and macOS.
_CJK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Yu Gothic",
    "MS Gothic",
    "SimHei",
    "Malgun Gothic",
    "Hiragino Sans",
    "PingFang SC",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
)


def fonts() -> list[str]:
    """Matplotlib's own font, and those for Chinese, Japanese and Korean that are installed."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)]


def is_drawable(text: str) -> bool:
    """Whether `fonts` have all of its characters."""
    from matplotlib import font_manager

    found = [font_manager.get_font(font_manager.findfont(name)) for name in fonts()]
    return all(letter.isspace() or any(font.get_char_index(ord(letter)) for font in found) for letter in text)
