"""A real ComfyUI server on the CPU, in a folder of its own, and the few calls that tests make to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACK = HERE.parents[1]
PACK_NAME = "freq_loss_plugin"
CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"


class PromptError(Exception):
    """A prompt was rejected, or one of its nodes failed; the message is the one that the user sees."""


class Server:
    """ComfyUI with the pack linked into its custom nodes, and with support for the toy model.

    Args:
        comfyui: a checkout.
        folder: becomes the base directory (models, input, output, custom_nodes).
        model: the toy model's folder, in diffusers layout; converted to a checkpoint at once.
        pack: the folder of the pack.
    """

    def __init__(self, comfyui: Path, folder: Path, model: Path, pack: Path = PACK) -> None:
        self.folder, self._comfyui = folder, comfyui
        for name in ("models/checkpoints", "models/loras", "input", "output", "custom_nodes", "user"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        make = [sys.executable, str(HERE / "checkpoint.py"), str(comfyui), str(model)]
        subprocess.run([*make, str(folder / "models" / "checkpoints" / CHECKPOINT)], check=True, capture_output=True)
        links = {"tiny_sd_support": HERE / "tiny_sd_support", PACK_NAME: pack}
        for name, target in links.items():
            (folder / "custom_nodes" / name).symlink_to(target, target_is_directory=True)
        self.port = _free_port()
        self.log = folder / "server.log"
        self._environment = {**os.environ, "FREQ_LOSS_TINY_SD": str(model), "CUDA_VISIBLE_DEVICES": ""}
        self._process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, *options: str, timeout: float = 180) -> Server:
        """Start it and wait until it answers."""
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += [
            "--disable-auto-launch",
            "--base-directory",
            str(self.folder),
            "--database-url",
            "sqlite:///:memory:",
        ]
        if frontend := os.environ.get("COMFYUI_FRONTEND"):  # another one than the environment has installed
            command += ["--front-end-root", frontend]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *options], cwd=self._comfyui, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
            else:
                return self
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return json.load(answer)

    def read(self, path: str) -> bytes:
        """The bytes at a path."""
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, content: Any) -> Any:
        """Send JSON; raises PromptError with the server's message where it rejects it."""
        request = urllib.request.Request(
            self.address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise PromptError(error.read().decode()) from None

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt in API format and return its id."""
        return self.post("/prompt", {"prompt": prompt})["prompt_id"]

    def run(self, prompt: dict[str, Any], timeout: float = 300) -> dict[str, Any]:
        """Queue a prompt, wait for it, and return what its nodes show, by node id.

        Raises:
            PromptError: it was rejected, or a node failed.
        """
        return self.wait(self.queue(prompt), timeout)

    def wait(self, prompt_id: str, timeout: float = 300) -> dict[str, Any]:
        """Wait for a queued prompt; as `run`."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return _outputs(history[prompt_id])
            time.sleep(0.05)
        raise TimeoutError(f"the prompt did not finish in {timeout} s:\n{self.log.read_text()[-4000:]}")

    def images(self, shown: dict[str, Any]) -> list[Path]:
        """The files of the images that a node shows."""
        folders = {"temp": self.folder / "temp", "output": self.folder / "output"}
        return [folders[image["type"]] / image["subfolder"] / image["filename"] for image in shown["images"]]


def _outputs(entry: dict[str, Any]) -> dict[str, Any]:
    status = entry["status"]
    for kind, message in status["messages"]:
        if kind == "execution_error":
            raise PromptError(f"{message['node_type']}: {message['exception_message']}")
        if kind == "execution_interrupted":
            raise PromptError("interrupted")
    assert status["status_str"] == "success", status
    return entry["outputs"]


def api_prompt(workflow: dict[str, Any], nodes: dict[str, Any]) -> dict[str, Any]:
    """A workflow as the browser stores it, in the format that the server runs.

    Args:
        workflow: ``nodes`` and ``links``; links are (id, source, output, target, input, type).
        nodes: the server's ``/object_info``.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        values = iter(node.get("widgets_values", []))
        inputs: dict[str, Any] = {}
        described = nodes[node["type"]]["input"]
        for name, (kind, *options) in {**described.get("required", {}), **described.get("optional", {})}.items():
            has_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            if has_widget and not (options and options[0].get("forceInput")):
                # Widgets of newer versions have their defaults in a workflow that is older.
                inputs[name] = next(values, options[0].get("default") if options else None)
                if options and options[0].get("control_after_generate"):
                    next(values)
                if options and options[0].get("image_upload"):
                    next(values, None)
        for socket_ in node.get("inputs", []):
            if socket_.get("link") is not None:
                inputs[socket_["name"]] = sources[socket_["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
