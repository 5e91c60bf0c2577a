"""The ways in which sd-scripts lets people write a value, made one."""

from __future__ import annotations

from typing import Any


def unify(flat: dict[str, Any]) -> None:
    """Change the values of a flat TOML to the one way that `settings.Settings` knows."""
    if isinstance(flat.get("resolution"), int):
        flat["resolution"] = str(flat["resolution"])
    if isinstance(rate := flat.get("text_encoder_lr"), list) and len(rate) == 1:
        flat["text_encoder_lr"] = rate[0]  # one for each text encoder
    if flat.get("min_snr_gamma") == 0:
        del flat["min_snr_gamma"]
    if isinstance(warmup := flat.get("lr_warmup_steps"), float) and warmup >= 1 and warmup.is_integer():
        flat["lr_warmup_steps"] = int(warmup)  # from the command line; sd-scripts takes a float for a fraction
    extension = flat.get("caption_extension")
    if isinstance(extension, str) and extension and not extension.startswith("."):
        flat["caption_extension"] = f".{extension}"


def as_list(items: Any) -> list[str]:
    """``network_args``: a list, as argparse has it, or one text, which people write, too."""
    return items.split() if isinstance(items, str) else list(map(str, items or []))
