"""ComfyUI's page in a real browser: load a workflow, run it, and read what is on the screen."""

from __future__ import annotations

import contextlib
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server import Server

# No tutorial, no badges, nothing that changes from day to day.
_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.NodeBadge.NodeIdBadgeMode": "None",
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Workflow.Persist": False,
}


def chromium() -> str | None:
    """The browser's program, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """ComfyUI in a browser window.

    Attributes:
        errors: what the page's scripts threw, with the stack.
        failed: addresses that the server had no answer to.
    """

    def __init__(self, page: Any, server: Server) -> None:
        self.page, self.server = page, server
        self.errors: list[str] = []
        self.failed: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack}"))
        page.on("response", lambda answer: self.failed.append(answer.url) if answer.status >= 400 else None)
        page.goto(server.address)
        self._wait()

    def reload(self) -> None:
        """Load the page anew, as a user does with F5; the workflow that was open opens again, where that is set."""
        self.page.reload()
        self._wait()

    def texts(self, kind: str) -> list[str]:
        """The visible text fields of the nodes of this type."""
        return self.page.evaluate(
            """(kind) => app.graph._nodes.filter(n => n.type === kind).flatMap(n => n.widgets ?? [])
               .map(w => w.element).filter(e => e?.tagName === 'TEXTAREA' && e.checkVisibility()).map(e => e.value)""",
            kind,
        )

    def load(self, workflow: dict[str, Any], name: str = "workflow") -> list[str]:
        """Open a workflow; the types of its nodes that are unknown here."""
        self.page.evaluate("([data, name]) => app.loadGraphData(data, true, true, name)", [workflow, name])
        self.page.wait_for_timeout(800)
        return self.page.evaluate("() => app.graph._nodes.filter(n => n.has_errors).map(n => n.type)")

    def set(self, values: dict[str, Any], title: str = "") -> None:
        """Give widgets of these names these values, in nodes of this title or everywhere."""
        self.page.evaluate(
            """([values, title]) => { for (const node of app.graph._nodes) if (!title || node.title === title)
               for (const widget of node.widgets ?? [])
                   if (widget.name in values) widget.value = values[widget.name] }""",
            [values, title],
        )

    def run(self, timeout: float = 240) -> None:
        """Queue what is open and wait until nothing is queued any more."""
        before = len(self.server.get("/history"))
        self.page.evaluate("() => app.queuePrompt(0)")
        for _ in range(int(timeout * 2)):
            self.page.wait_for_timeout(500)
            queue = self.server.get("/queue")
            if len(self.server.get("/history")) > before and not queue["queue_running"] + queue["queue_pending"]:
                break
        else:
            raise TimeoutError(f"the workflow did not finish in {timeout} s")
        self.page.wait_for_timeout(1500)

    def _wait(self) -> None:
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager?.workflow", timeout=60_000)
        self.page.wait_for_timeout(1500)

    def fit(self, file: Path, width: int = 1600, margin: int = 30) -> None:
        """An image of the whole workflow, ``width`` pixels wide, without the program's own frame."""
        left, top, wide, high = self.page.evaluate(
            """() => { const all = app.graph._nodes.map(n => n.getBounding());
               const x = Math.min(...all.map(b => b[0])), y = Math.min(...all.map(b => b[1]));
               const right = Math.max(...all.map(b => b[0] + b[2])), end = Math.max(...all.map(b => b[1] + b[3]));
               return [x, y, right - x, end - y] }"""
        )
        scale = (width - 2 * margin) / wide
        height = round(high * scale) + 2 * margin
        # The program's bars cover the edges of the canvas; this padding keeps the workflow clear of them.
        padding = 160
        self.page.set_viewport_size({"width": width + 2 * padding, "height": height + 2 * padding})
        self.page.wait_for_timeout(300)
        self.page.evaluate(
            """([x, y, scale]) => { const view = app.canvas.ds; view.scale = scale; view.offset = [x, y];
               app.canvas.setDirty(true, true) }""",
            [(padding + margin) / scale - left, (padding + margin) / scale - top, scale],
        )
        self.page.wait_for_timeout(700)
        canvas = self.page.evaluate("() => { const r = app.canvas.canvas.getBoundingClientRect(); return [r.x, r.y] }")
        clip = {"x": padding + canvas[0], "y": padding + canvas[1], "width": width, "height": height}
        self.page.screenshot(path=str(file), clip=clip)


@contextlib.contextmanager
def start() -> Iterator[Any]:
    """Playwright's handle of the browser, which ends with the context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(
    browser: Any, server: Server, locale: str = "en", size: tuple[int, int] = (1600, 1000), **settings: Any
) -> Iterator[Page]:
    """A page in the given language, with further settings of ComfyUI's; the window closes at the end."""
    request = urllib.request.Request(
        f"{server.address}/settings",
        json.dumps({**_SETTINGS, "Comfy.VueNodes.Enabled": False, "Comfy.Locale": locale, **settings}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).read()
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    try:
        yield Page(page, server)
    finally:
        page.close()
