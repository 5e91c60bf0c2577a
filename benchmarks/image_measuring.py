"""How long it takes to measure the images of a run for freq_loss_image_quality, and how long when they are known.

python benchmarks/image_measuring.py [--images 1000] [--side 1024]

Draws mosaics of toy scenes, every fourth enlarged fourfold, and saves them as JPEG at quality 90.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from freq_loss_plugin.image_quality import measurement_cache
from freq_loss_plugin.image_quality.measuring import measure_all
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from freq_loss_plugin.toy_model.scenes import draw, random_scene

_TILE, _TILES, _TRAINED = 128, 40, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=_TRAINED, help="of the files; they are trained at 1024 pixels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[measurement_cache.FOLDER] = folder
        # In a process of its own, so that its memory is not counted.
        drawing = multiprocessing.Process(target=draw_images, args=(Path(folder), options.images, options.side))
        drawing.start()
        drawing.join()
        images = [TrainedImage(file, (_TRAINED, _TRAINED)) for file in sorted(Path(folder).glob("*.jpg"))]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for what in ("measured", "known from an earlier run"):
            wall, processor = time.perf_counter(), time.process_time()
            found = measure_all(images)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            bad = sum(bool(one.defect) for one in found.values() if not isinstance(one, str))
            print(f"{what}: {wall:.1f} s, {processor:.1f} CPU seconds, {len(found)} images, {bad} bad")
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"peak memory: {added:.0f} MiB more than before")


def draw_images(folder: Path, count: int, side: int) -> None:
    """Save the images; no two are alike."""
    generator = np.random.default_rng(0)
    scenes = [Image.fromarray((draw(random_scene(generator)) * 255).round().astype(np.uint8)) for _ in range(_TILES)]
    for number in range(count):
        image = Image.new("RGB", (side, side))
        for row in range(0, side, _TILE):
            for column in range(0, side, _TILE):
                image.paste(scenes[generator.integers(_TILES)], (column, row))
        if number % 4 == 0:
            image = image.resize((side // 4, side // 4), Image.Resampling.LANCZOS).resize(image.size)
        image.save(folder / f"{number}.jpg", quality=90)


if __name__ == "__main__":
    main()
