"""Makes the thumbnails of the example workflows from screenshots.

    python screenshots.py LORA [NUMBER ...]

LORA is a file of the engine (``./train_freq_aware.sh`` writes output/tiny_lora.safetensors), trained with
``--guidance_token true`` for the workflow with a guidance token. The workflows run unchanged but for size and prompt,
since the toy model takes the place of SD1.5.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from browser import open_page, start
from PIL import Image
from server import PACK, Server

sys.path.insert(0, str(PACK))
sys.path.insert(0, str(PACK / "tests"))

PROMPT = "a red circle in the centre on white with checks, weave style"


def main() -> None:
    import hosts

    from freq_loss_plugin.toy_model import model_folder

    lora, numbers = Path(sys.argv[1]), sys.argv[2:]
    comfyui = hosts.comfyui()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(comfyui, Path(folder), model_folder())
        for name in ("my_frequency_lora", "my_guided_lora"):
            shutil.copy(lora, server.folder / "models" / "loras" / f"{name}.safetensors")
        shutil.copy(comfyui / "input" / "example.png", server.folder / "input")
        server.start()
        try:
            with start() as browser, open_page(browser, server) as page:
                for file in sorted((PACK / "example_workflows").glob("*.json")):
                    if numbers and file.stem.split("_")[0] not in numbers:
                        continue
                    page.load(json.loads(file.read_text(encoding="utf-8")), file.stem)
                    page.set({"width": 128, "height": 128, "batch_size": 4})
                    if not file.stem.startswith("6"):  # which is about guidance, and says what it has
                        page.set({"cfg": 3.0})
                    page.set({"text": PROMPT}, title="Prompt")
                    page.set({"text": ""}, title="Negative prompt")
                    page.run()
                    image = Path(folder) / "image.png"
                    page.fit(image)
                    Image.open(image).convert("RGB").save(file.with_suffix(".jpg"), quality=88)
                    print(file.with_suffix(".jpg").name)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
