"""Runs all tests with the newest checkout of each host, and those of a host once more with each of its others.

    python tests/matrix.py [pytest arguments]

One process cannot import two versions of a host, so each version has a pytest process of its own. ComfyUI has the
frontend that it pins, and the tests in the browser are run again with the newest one (`tests/run.sh` installs both).
The last lines say what ran, and which versions of README's compatibility table did not.

`.ci/run` chooses less by HOST_TESTS:

    hosts      no tests that need no host, unless they are marked `versions`; those marked `long` with the newest
               checkouts alone, and those in the browser once for each ComfyUI: with the newest frontend for the newest,
               and with the pinned one for the others
    packages   those of the newest trainers that are marked `versions`, with whatever packages this Python has
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import hosts
from hosts import COMFYUI, MUSUBI_TUNER, SD_SCRIPTS

# Versions of comfyui-frontend-package, each in a folder of its own; those that a ComfyUI pins with its templates.
FRONTENDS = Path(sys.prefix) / "frontends"
NOTHING_SELECTED = 5  # pytest's exit status where its arguments leave none of the tests of a run
# The tests that need a host, in parts that run beside each other, and those of its trainers that depend on packages.
PARTS = ("sd_scripts and not comfyui", "comfyui", "(musubi_tuner or versions) and not sd_scripts and not comfyui")
PACKAGES = "(sd_scripts or musubi_tuner) and versions"


@dataclass(frozen=True)
class Run:
    """One call of pytest.

    Attributes:
        sd_scripts: the checkout to test with.
        comfyui: the checkout to test with.
        musubi_tuner: the checkout to test with.
        packages: the folder of the frontend and the templates that it pins; None for those that are installed.
        frontend: the folder of another frontend.
        marker: the tests to run; all where it is empty.
    """

    sd_scripts: Path | None = None
    comfyui: Path | None = None
    musubi_tuner: Path | None = None
    packages: Path | None = None
    frontend: Path | None = None
    marker: str = ""

    @property
    def title(self) -> str:
        """What is tested, human-readable."""
        parts = [SD_SCRIPTS.title(self.sd_scripts)] if self.sd_scripts else []
        if self.comfyui:
            parts.append(COMFYUI.title(self.comfyui))
        frontend = self.frontend or self.packages
        if frontend:
            parts[-1] += f" with frontend {_version(frontend)}"
        if self.musubi_tuner:
            parts.append(MUSUBI_TUNER.title(self.musubi_tuner))
        return f"{self.marker or 'all'} tests: {', '.join(parts) or 'no host'}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that `hosts` and the test server of ComfyUI read."""
        paths = {
            SD_SCRIPTS.variable: self.sd_scripts,
            COMFYUI.variable: self.comfyui,
            MUSUBI_TUNER.variable: self.musubi_tuner,
            "PYTHONPATH": self.packages,
            "COMFYUI_FRONTEND": self.frontend and self.frontend / "comfyui_frontend_package" / "static",
        }
        return {name: str(path or "") for name, path in paths.items()}

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line, with the user's own arguments for pytest."""
        # Runs with a marker go beside each other; the one with all tests often waits for programs.
        how = ["--numprocesses=2", "--dist=loadfile", "--no-loadscope-reorder"]  # conftest.py has an order of its own
        if self.marker:
            how = ["-m", self.marker, "-p", "no:cacheprovider"]
        return [sys.executable, "-m", "pytest", *how, *arguments]


def plan() -> list[Run]:
    """All runs; the first ones have the newest checkouts."""
    sd_scripts, comfyui, musubi_tuner = (host.checkouts() for host in (SD_SCRIPTS, COMFYUI, MUSUBI_TUNER))
    chosen = os.environ.get("HOST_TESTS")
    trainers = Run(sd_scripts=_first(sd_scripts), musubi_tuner=_first(musubi_tuner))
    if chosen == "packages":
        return [dataclasses.replace(trainers, marker=PACKAGES)]
    pinned = {path: _frontend(hosts.pinned_frontend(path)) for path in comfyui}
    everything = dataclasses.replace(trainers, comfyui=_first(comfyui), packages=pinned.get(_first(comfyui)))
    newest = _frontend("newest")
    if chosen == "hosts":
        newest_ones = [dataclasses.replace(everything, frontend=newest, marker=part) for part in PARTS]
        but_long, in_the_browser = " and not long", []
    else:
        newest_ones, but_long = [everything], ""
        pages = [Run(comfyui=path, packages=pinned[path], frontend=newest, marker="browser") for path in comfyui]
        in_the_browser = pages if newest else []
    return [
        *newest_ones,
        *(Run(comfyui=path, packages=pinned[path], marker=f"comfyui{but_long}") for path in comfyui[1:]),
        *(Run(sd_scripts=path, marker=f"sd_scripts{but_long}") for path in sd_scripts[1:]),
        *(Run(musubi_tuner=path, marker=f"musubi_tuner{but_long}") for path in musubi_tuner[1:]),
        *in_the_browser,
    ]


def main() -> int:
    """Run the plan; the exit status is that of a failed run, or 0."""
    runs = plan()
    with ThreadPoolExecutor(max_workers=2) as two_at_a_time:
        results = list(two_at_a_time.map(lambda run: _run(run, sys.argv[1:]), runs))
    print("\nwhat ran:")
    for run, (status, summary) in zip(runs, results, strict=True):
        print(f"  {'FAILED: ' if status else ''}{run.title}: {summary}")
    for version in (*SD_SCRIPTS.not_found(), *COMFYUI.not_found(), *MUSUBI_TUNER.not_found()):
        print(f"  not run: {version}, of which there is no checkout")
    return next((status for status, _ in results if status), 0)


def _run(run: Run, arguments: Sequence[str]) -> tuple[int, str]:
    """pytest's exit status and last line. Its output is shown as it comes, or, with a marker, at the end."""
    begin = time.monotonic()
    environment = {**os.environ, **run.environment}
    at_once = not run.marker
    if at_once:
        print(f"\n=== {run.title}", flush=True)
    lines = []
    with subprocess.Popen(
        run.command(arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if at_once:
                print(line, end="", flush=True)
    if not at_once:
        print(f"\n=== {run.title}\n{''.join(lines)}", end="", flush=True)
    status = 0 if process.returncode == NOTHING_SELECTED else process.returncode
    # Some hosts' packages have a last word of their own.
    summary = next((line for line in reversed(lines) if re.search(r" in [\d.]+s", line)), lines[-1]).strip("= \n")
    return status, f"{summary} ({time.monotonic() - begin:.0f} s in all)"


def _first(paths: Sequence[Path]) -> Path | None:
    return next(iter(paths), None)


def _frontend(name: str) -> Path | None:
    return FRONTENDS / name if (FRONTENDS / name).is_dir() else None


def _version(frontend: Path) -> str:
    """The version of the package in this folder, as pip wrote it down."""
    found = importlib.metadata.distributions(name="comfyui-frontend-package", path=[str(frontend)])
    return next(iter(found)).version


if __name__ == "__main__":
    sys.exit(main())
