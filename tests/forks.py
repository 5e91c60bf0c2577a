"""Runs Python scripts and modules as forks of a process that has imported the packages which all of them import.

A short training run spends most of its time on importing PyTorch, diffusers and transformers. A fork has them, and is
otherwise what ``python SCRIPT ARGUMENT ...`` or ``python -m MODULE ARGUMENT ...`` is: that runs as ``__main__`` with
its own arguments, environment and path, and ends as Python ends. Neither the plug-in nor a host is imported before.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
_PACKAGES = (
    "accelerate",
    "cv2",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "tensorboard.compat.proto.event_pb2",
    "torch.utils.tensorboard",
    "torchvision.transforms",
    "transformers.models.clip.modeling_clip",
)


def run(
    command: list[str], path: list[Path], timeout: int, folder: Path | None = None, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run Python with a command in a folder, and ``path`` as PYTHONPATH; the output is what it wrote to both streams.

    What takes longer than ``timeout`` seconds is killed, and its return code is negative. On Windows it is run by a new
    Python. Several ``processes`` get the variables that ``torch.distributed.run`` gives those that it starts, which is
    what ``accelerate launch`` does; as there, all end where one fails.
    """
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, path))}
    if not hasattr(os, "fork"):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        with_python = [sys.executable, *launcher, *command]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(with_python, env=environment, text=True, timeout=timeout, cwd=folder, **both)
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
        request = {"command": command, "environment": environment, "output": output.name, "timeout": timeout}
        request |= {"folder": str(folder or Path.cwd()), "processes": processes}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, output.read())


def spawn(function: Any, arguments: tuple[Any, ...], processes: int, join: bool = True) -> Any:
    """As ``torch.multiprocessing.spawn``, and where there are forks, of a process that has imported PyTorch."""
    import torch.multiprocessing

    method = "forkserver" if hasattr(os, "fork") else "spawn"
    if method == "forkserver":
        torch.multiprocessing.set_forkserver_preload(["numpy", "pytest", "torch", "torch.distributed"])
    return torch.multiprocessing.start_processes(function, arguments, processes, join, start_method=method)


@functools.cache
def _server() -> subprocess.Popen[str]:
    """One for each process of pytest."""
    environment = {name: value for name, value in (os.environ | _ENVIRONMENT).items() if name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)
    atexit.register(server.__exit__, None, None, None)  # closes its input, at which it ends
    return server


def main() -> None:
    """Serve; in a fork, run what is asked for."""
    for package in _PACKAGES:
        with contextlib.suppress(ImportError):  # one that these hosts do not need
            importlib.import_module(package)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        running = set()
        for variables in _variables(request["processes"]):
            process = os.fork()
            if process == 0:
                request["environment"] |= variables
                _become(request)
                return
            running.add(process)
        print(_wait_for(running), flush=True)


def _variables(processes: int) -> list[dict[str, str]]:
    """The environment of each process, as far as it says which of several it is."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    all_of_them = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    all_of_them |= {"LOCAL_WORLD_SIZE": processes}
    return [
        {name: str(value) for name, value in (all_of_them | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(processes)
    ]


def _wait_for(running: set[int]) -> int:
    """The first exit status that is not 0, after which the other processes are ended."""
    result = 0
    while running:
        process, status = os.wait()
        running.remove(process)
        result = result or os.waitstatus_to_exitcode(status)
        for other in running if result else ():
            os.kill(other, signal.SIGTERM)
    return result


def _become(request: dict[str, Any]) -> None:
    """Run a script or a module in this process."""
    signal.alarm(request["timeout"])
    with Path(request["output"]).open("ab") as output, Path(os.devnull).open() as nothing:
        for stream, descriptor in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(stream.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    is_module = request["command"][0] == "-m"
    what, *_ = sys.argv = request["command"][is_module:]
    sys.orig_argv = [sys.executable, *request["command"]]
    added = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [str(Path.cwd() if is_module else Path(what).resolve().parent), *added]
    if is_module:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main()
