"""The metadata of LoRA files, read from the header alone: nothing in it is executed, and no weight is loaded.

A safetensors file begins with 8 bytes, the length n of its header (little endian), and n bytes of JSON with every
tensor's dtype, shape and offsets; the values follow. Source: the safetensors format description.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors

from ..guidance_token import features as guidance

# safetensors itself refuses longer headers.
_LONGEST_HEADER = 100_000_000
_FLOATING = re.compile(r"F(64|32|16|8\w*)|BF16")

# The trainers' own names of base models (ss_base_model_version, modelspec.architecture without its "/lora"). Any other
# name is unknown, however similar: FLUX.2 is not FLUX.1.
_BASE_MODELS = {
    "SD1.x": r"sd[_-]?v?1.*|stable-diffusion-v1.*",
    "SD2.x": r"sd[_-]?v?2.*|stable-diffusion-v2.*",
    "SDXL": r"sdxl.*|stable-diffusion-xl.*",
    "SD3": r"sd3.*|stable-diffusion-3.*",
    "FLUX.1": r"flux([._-]?1([^0-9].*)?|[_-](dev|schnell|kontext|fill|krea)(?!.*2).*)?",
    "FLUX.2": r"flux[._-]?2([^0-9].*)?",
    "Chroma": r"chroma1?([_-](?!radiance).*)?",
    "Lumina 2": r"lumina([_-]?(image[_-]?)?2.*)?",
    "Z-Image": r"z[_-]?image.*",
    "HunyuanImage 2.1": r"hunyuan[_-]?image([_-]?2.*)?",
    "Anima": r"anima([_-].*)?",
}
# The width of the text states in a U-Net's cross-attention identifies the version of Stable Diffusion.
_TEXT_WIDTHS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}

# Suffixes of tensor names; what precedes them is the name of the adapted module.
_SUFFIX = re.compile(
    r"\.(lora_(down|up|mid|A|B|linear_layer\.(down|up))(\.default)?(\.weight)?|lora\.(down|up)\.weight|alpha|dora_scale"
    r"|lora_magnitude_vector(\.default)?(\.weight)?"
    r"|hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|oft_(blocks|diag)|rescale|[ab][12]\.weight|diff(_b)?|set_weight"
    r"|[wb]_norm|reshape_weight|scalar|on_input)$|_lora\.(down|up)\.weight$"
)
_TEXT_ENCODER = re.compile(r"^(lora_te|text_encoder|clip_|te\d?[._])|\btext_model\b")


class LoraFileError(ValueError):
    """A file that cannot be loaded as a LoRA; the message says what it is instead, and what to do."""


@dataclass(frozen=True)
class LoraFile:
    """The header of a LoRA file."""

    name: str
    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    """Tensor name to shape."""

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The adapted modules, by the file's own names."""
        return tuple(dict.fromkeys(name for key in self.shapes if (name := module_of(key))))

    @cached_property
    def text_encoder_modules(self) -> tuple[str, ...]:
        """The modules that belong to a text encoder."""
        return tuple(name for name in self.modules if _TEXT_ENCODER.search(name))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks of its plain LoRA modules, smallest first."""
        downs = (shape for key, shape in self.shapes.items() if re.search(r"lora_down|lora_A|lora\.down", key))
        return tuple(sorted({shape[0] for shape in downs if shape}))

    @cached_property
    def base_model(self) -> str | None:
        """The family of models that it was trained on, ``"SD1.x"``, ``"SDXL"``, …; None where that is unknown."""
        for key in ("ss_base_model_version", "modelspec.architecture"):
            name = self.metadata.get(key, "").lower().partition("/")[0].strip()
            for family, pattern in _BASE_MODELS.items():
                if re.fullmatch(pattern, name):
                    return family
        return self._base_model_from_tensors()

    @property
    def has_frequency_loss(self) -> bool:
        """Whether it was trained with the loss of this project."""
        return any(key.startswith("ss_freq_loss_") for key in self.metadata)

    @property
    def has_guidance_token(self) -> bool:
        """Whether it was trained with an image's CLIP features in place of the last text token."""
        return self.metadata.get(guidance.KEY, "").strip().lower() not in ("", "0", "0.0", "false", "none")

    def trained_words(self, limit: int = 8) -> list[tuple[str, int]]:
        """The most frequent tags of the training captions, with their counts.

        Args:
            limit: the maximum number of tags.
        """
        try:
            counts: Counter[str] = Counter()
            for tags in json.loads(self.metadata.get("ss_tag_frequency") or "{}").values():
                counts.update({tag.strip(): int(count) for tag, count in tags.items()})
        except (ValueError, TypeError, AttributeError):
            return []  # any program may have written the metadata
        return counts.most_common(limit)

    def describe(self) -> str:
        """Base model, network and training settings as lines of plain text."""
        text = len(self.text_encoder_modules)
        parts = f"{len(self.modules) - text} of the diffusion model, {text} of the text encoder"
        rows = [
            ("base model", self._base_model_row()),
            ("frequency loss", self._frequency_loss_row()),
            *([("guidance token", f"yes, {self._guidance_clip()}")] if self.has_guidance_token else []),
            ("network", _joined(self.metadata.get("ss_network_module"), self._rank(), self._alpha(), parts)),
            ("training", self._training_row()),
            ("trained words", ", ".join(f"{_shortened(word)} ({count})" for word, count in self.trained_words())),
            ("file", self.name),
        ]
        return "\n".join(f"{name}: {value or 'not in the metadata'}" for name, value in rows)

    def _base_model_from_tensors(self) -> str | None:
        if any("joint_blocks" in name for name in self.modules):
            return "SD3"
        if any(re.match(r"lora_unet_(input|output)_blocks", name) for name in self.modules):
            return "SDXL"
        for key, shape in self.shapes.items():
            if re.search(r"attn2[._](to_k|processor).*(lora_down|lora_A|lora\.down)", key) and len(shape) > 1:
                return _TEXT_WIDTHS.get(shape[1])
        return None

    def _base_model_row(self) -> str:
        model = Path(self.metadata.get("ss_sd_model_name", "").replace("\\", "/")).name
        version = self.metadata.get("ss_base_model_version")
        return _joined(self.base_model, version and f"ss_base_model_version {version}", model and f"trained on {model}")

    def _rank(self) -> str:
        ranks = self.ranks
        if not ranks:
            return _labeled("rank", self.metadata.get("ss_network_dim"))
        return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"

    def _alpha(self) -> str:
        return _labeled("alpha", self.metadata.get("ss_network_alpha"))

    def _training_row(self) -> str:
        counts = {"steps": "ss_steps", "epochs": "ss_epoch", "images": "ss_num_train_images"}
        settings = {
            "resolution": "ss_resolution",
            "learning rate": "ss_learning_rate",
            "optimizer": "ss_optimizer",
            "seed": "ss_seed",
        }
        value = self.metadata.get
        return _joined(
            *(f"{value(key)} {unit}" for unit, key in counts.items() if value(key)),
            *(_labeled(label, value(key)) for label, key in settings.items()),
        )

    def _guidance_clip(self) -> str:
        clip = self.metadata.get(guidance.CLIP_KEY)
        return f"features by {clip}" if clip else "by an unnamed CLIP"

    def _frequency_loss_row(self) -> str:
        if not self.has_frequency_loss:
            return "no: trained without it"
        prefix = "ss_freq_loss_"
        options = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        first = [key for key in ("dist_match", "resolved_method", "low_weight", "high_weight") if key in options]
        in_other_rows = ("guidance_token", "guidance_clip", "guidance_mean", "network_module", "method")
        rest = [key for key in sorted(options) if key not in (*first, *in_other_rows)]
        return ", ".join(f"{key} {options[key]}" for key in (*first, *rest) if options[key] != "None")


def module_of(key: str) -> str | None:
    """The module that a tensor adapts: its name without the suffix; None where the tensor isn't part of a LoRA."""
    suffix = _SUFFIX.search(key)
    return key[: suffix.start()] if suffix else None


def read_lora(path: str | Path) -> LoraFile:
    """Read the header of a LoRA file.

    Args:
        path: a .safetensors file.

    Raises:
        LoraFileError: the file is missing, empty, a pickle, truncated or damaged, contains no LoRA, or one whose
            weights are not floating point numbers.
    """
    path = Path(path)
    _check_beginning(path)
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: part.get_dtype() for key, part in slices.items()}
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, UnicodeDecodeError) as error:
        raise LoraFileError(f"{path.name} is damaged or incomplete ({error}); copy or download it again") from None
    lora = LoraFile(path.name, metadata, shapes)
    _check_contents(lora, dtypes)
    return lora


def _check_beginning(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(9)
    except OSError as error:
        raise LoraFileError(f"{path.name} cannot be read: {error.strerror or error}") from None
    if size == 0:
        raise LoraFileError(f"{path.name} is empty (0 bytes); copy or download it again")
    if beginning[:2] == b"PK" or re.match(rb"\x80[\x02-\x05]", beginning):
        raise LoraFileError(
            f"{path.name} is a PyTorch pickle under another name. Pickles can run code when they are loaded, so this "
            "node never loads them; get the LoRA as .safetensors"
        )
    if len(beginning) < 9:
        raise LoraFileError(f"{path.name} has {size} bytes: expected a safetensors file, which has at least 9")
    header = int.from_bytes(beginning[:8], "little")
    if beginning[8:9] != b"{" or header > _LONGEST_HEADER:
        looks = "a web page" if beginning.lstrip().startswith(b"<") else "something else"
        raise LoraFileError(
            f"{path.name} is not a safetensors file: expected a header of at most {_LONGEST_HEADER:,} bytes that "
            f"begins with '{{', got one of {header:,} bytes that begins with {beginning[8:9]!r}; it looks like {looks}"
        )
    if header + 8 > size:
        raise LoraFileError(
            f"{path.name} is truncated: its header alone has {header:,} bytes, the file {size:,}; copy or download it "
            "again"
        )


def _check_contents(lora: LoraFile, dtypes: Mapping[str, str]) -> None:
    if not lora.modules:
        examples = ", ".join(list(lora.shapes)[:3]) or "none"
        raise LoraFileError(
            f"{lora.name} contains no LoRA: none of its {len(lora.shapes)} tensors ({examples}, …) has the name of a "
            "LoRA weight; load a whole model with its own loader"
        )
    for key, dtype in dtypes.items():
        if module_of(key) and not _FLOATING.fullmatch(dtype) and not key.endswith((".alpha", ".reshape_weight")):
            raise LoraFileError(
                f"{lora.name}: {key} has dtype {dtype}; expected floating point weights (F32, F16, BF16). The file was "
                "quantized or converted to a format that LoRA loaders do not support; get the original"
            )


def _shortened(word: str, limit: int = 60) -> str:
    """A tag of limited length: a caption without commas is a single tag."""
    return word if len(word) <= limit else f"{word[:limit]}…"


def _labeled(label: str, value: str | None) -> str:
    return f"{label} {value}" if value not in (None, "", "None") else ""


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def mismatch_reason(lora: LoraFile, family: str | None, wrong_size: Iterable[str]) -> str:
    """The likely reason why modules of a LoRA don't match the layers of a model.

    Args:
        lora: the file's header.
        family: the model's, as in `LoraFile.base_model`; None where unknown.
        wrong_size: the modules whose layer has another size.
    """
    if lora.base_model and family and lora.base_model != family:
        return f"it was trained on {lora.base_model}, and this model is {family}"
    if list(wrong_size):
        return "the layers have other sizes here, so it was trained on another model"
    return (
        "these layers are not part of this model, or the file uses names or a kind of adapter that ComfyUI does not "
        "support"
    )
