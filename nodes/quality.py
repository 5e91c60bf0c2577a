"""Inspect image quality: what training with ``freq_loss_image_quality`` would find in images."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..freq_loss_plugin.analysis.figures import law_plot, new_figure
from ..freq_loss_plugin.image_quality.measurement import Measurement, measure_image
from ..freq_loss_plugin.image_quality.pixels import as_pixels
from ..freq_loss_plugin.image_quality.published import DEFAULT_MODEL, MODELS, lookup
from ..freq_loss_plugin.image_quality.spectrum import LEAST_SIDE, fit_power_law
from .inputs import CancelableProgress, check_finite, image_tensor, node_output
from .schema import schema, widget


class ImageQuality(io.ComfyNode):
    """Effective resolution, JPEG quality and noise of images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See `freq_loss_plugin.image_quality.measurement`."""
        return schema(
            node_id="FreqLoss_ImageQuality",
            display_name="Inspect Image Quality",
            description="Finds what is missing or wrong in images: their effective resolution (of enlarged or blurred "
            "ones), JPEG quality and noise, and what training with freq_loss_image_quality does about it.",
            search_aliases=["blur", "sharpness", "jpeg", "noise", "upscaled", "resolution", "dataset"],
            inputs=[
                io.Image.Input("images", tooltip="Images at the size at which they are trained."),
                widget(io.Combo, "model", options=list(MODELS), default=DEFAULT_MODEL,
                       tooltip="The model that is trained. Decides how far latents of bad images can be restored, and "
                       "the least timestep (t, of 1000) at which each image then trains; both from a table that was "
                       "made with photographs."),
            ],
            outputs=[
                io.String.Output("report", display_name="report",
                                 tooltip="One line for each image: what is wrong, how much of the error in its latents "
                                 "is restored, and its least timestep. And a summary."),
                io.Float.Output("resolution", display_name="effective resolution",
                                tooltip="The lowest of the batch: the fraction of the pixels along each side that the "
                                "image's detail needs. 0.25 after enlarging fourfold; 1 where nothing is missing."),
                io.Image.Output("spectrum", display_name="spectrum",
                                tooltip="For each image its radial power spectrum, and the power law that it should "
                                "follow."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(cls, images: Any, model: str) -> io.NodeOutput:
        """Measure one image after the other."""
        new_figure(1, 1)  # fails now where matplotlib is missing, and not after the work
        tensor = image_tensor(images, "images")
        check_finite(tensor, "images")
        progress = CancelableProgress(len(tensor))
        measured, lines, plots = [], [], []
        for number, item in enumerate(tensor, 1):
            image = _as_image(item)
            measured.append(measure_image(image))
            lines.append(_line(number, measured[-1], model))
            plots.append(_plot(image, measured[-1], lines[-1]))
            progress.step()
        report = "\n".join([*lines, _summary(measured)])
        spectra = torch.stack(plots)
        lowest = min(one.resolution for one in measured)
        return node_output(cls, report, lowest, spectra, images=spectra, text=report)


def _as_image(item: Tensor) -> Image.Image:
    """An image (3, H, W), 0..1, with eight bits per channel."""
    pixels = (item.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _line(number: int, one: Measurement, model: str) -> str:
    """``2: 512 × 512, 25% of the resolution (edges: ...): 46% restored, trains at t >= 545 (SDXL)``."""
    defect = f"{one.defect} ({one.witness})" if one.witness else str(one.defect)
    parts = [defect, *one.notes] if one.defect else [*one.notes] or ["full quality"]
    line = f"{number}: {one.size[0]} × {one.size[1]}, {', '.join(parts)}"
    if not one.defect:
        return line
    restored, least = lookup(model, one.defect)
    when = f"t >= {least}" if least else "every t"
    return f"{line}: {restored:.0%} restored, trains at {when} ({MODELS[model].title})"


def _summary(measured: list[Measurement]) -> str:
    unknown = sum(not one.is_known for one in measured)
    good = f"{sum(one.is_good for one in measured)} of {len(measured)} of full quality"
    return f"{good}, {unknown} not known" if unknown else good


def _plot(image: Image.Image, one: Measurement, title: str) -> Tensor:
    if min(image.size) < LEAST_SIDE:
        return law_plot(None, None, title)
    fit = fit_power_law(as_pixels(image), one.blur)
    return law_plot(fit.spectrum, fit.expected, title)
