"""The pack in ComfyUI's page: every workflow opens, and what a node has to say stays readable."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path

import hosts
import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "comfyui_host"))

import node_texts  # noqa: E402

WORKFLOWS = sorted((TESTS.parent / "example_workflows").glob("*.json"))
LORAS = {"FreqLoss_LoraLoader": "applied: 204 of 204 modules", "FreqLoss_LoraBandGate": "model calls in each step"}
BANDS = {"FreqLoss_BandSplit": "wavelet db3, 2 levels"}
SHORT = {"width": 128, "height": 128, "steps": 2}

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]


@pytest.fixture(scope="module")
def open_page(comfyui_server):
    """Opens the server's page with settings."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no browser: playwright is missing; run tests/run.sh")
    import browser

    if browser.chromium() is None:
        pytest.skip("no browser: install chromium")
    with browser.start() as started:
        yield functools.partial(browser.open_page, started, comfyui_server)


@pytest.fixture(scope="module")
def japanese(open_page):
    with open_page("ja") as opened:
        yield opened


@pytest.fixture
def page(japanese):
    """The program in a browser, in Japanese: whatever is not translated shows."""
    japanese.errors.clear()  # what the program itself does while it starts, and what a test before did
    return japanese


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_browser_opens_every_workflow_without_missing_nodes_or_errors(page, file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    assert page.load(workflow, file.stem) == []
    assert page.errors == []
    japanese = node_texts.texts("ja")
    shown = page.page.evaluate(
        "() => app.graph._nodes.map(n => [n.type, n.title, (n.widgets ?? []).map(w => w.label ?? w.name)])"
    )
    assert len(shown) == len(workflow["nodes"])
    for (kind, title, labels), stored in zip(
        sorted(shown), sorted([node["type"], node.get("title")] for node in workflow["nodes"]), strict=True
    ):
        assert kind == stored[0]
        if kind in japanese:
            names = {entry["name"] for entry in japanese[kind]["inputs"].values()}
            assert {label for label in labels if label} <= names, kind
            assert title


def test_a_missing_node_would_be_seen(page):
    unknown = {"id": 1, "type": "FreqLoss_Nowhere", "pos": [0, 0], "size": [100, 50], "inputs": [], "outputs": []}
    workflow = {"last_node_id": 1, "last_link_id": 0, "nodes": [unknown], "links": [], "groups": [], "version": 0.4}
    assert page.load(workflow) == ["FreqLoss_Nowhere"]


def test_the_browser_runs_a_workflow_and_shows_its_texts_and_images(page):
    page.load(json.loads(WORKFLOWS[1].read_text(encoding="utf-8")), "run")
    page.run()
    images, texts = page.page.evaluate(
        """() => { const node = app.graph._nodes.find(n => n.type === 'FreqLoss_BandSplit');
           return [(node.imgs ?? []).map(i => [i.naturalWidth, i.naturalHeight]),
                   (node.widgets ?? []).map(w => String(w.value))] }"""
    )
    assert images == [[3 * 768, 768]]
    assert any("wavelet db3, 2 levels" in text for text in texts)
    assert page.errors == []


def assert_texts(page, expected):
    for kind, words in expected.items():
        texts = page.texts(kind)
        assert texts, kind
        assert all(words in text for text in texts), (kind, texts)


def open_workflow(page, number):
    file = WORKFLOWS[number - 1]
    page.load(json.loads(file.read_text(encoding="utf-8")), file.stem)
    page.set(SHORT)


@pytest.mark.parametrize("rendering", ["LiteGraph", "Vue"])
def test_texts_stay_after_a_job_with_cached_nodes_and_over_a_reload(open_page, rendering):
    settings = {"Comfy.VueNodes.Enabled": rendering == "Vue", "Comfy.Workflow.Persist": True}
    number_of_run = 1 + (rendering == "Vue")
    with open_page(**settings) as page:
        version = page.page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
        if rendering == "Vue" and tuple(map(int, version.split("."))) < (1, 40):
            pytest.skip(f"the Vue nodes of frontend {version} are unfinished: they show no widget that is an element")
        page.errors.clear()
        for number, expected in ((2, BANDS), (4, {"FreqLoss_LoraLoader": LORAS["FreqLoss_LoraLoader"]})):
            open_workflow(page, number)
            # Other values than in any test before: ComfyUI up to 0.3.67 tells a new page nothing of what is cached.
            page.set({"cutoff": 0.2 + 0.01 * number_of_run, "strength_model": 0.9 + 0.01 * number_of_run})
            page.run()
            page.page.wait_for_timeout(3000)
            assert_texts(page, expected)
            page.run()  # everything is cached
            page.page.wait_for_timeout(1000)
            assert_texts(page, expected)
        assert page.errors == []
        page.reload()
        page.page.wait_for_timeout(1000)
        assert_texts(page, expected)


def test_the_gate_says_what_it_does(page):
    open_workflow(page, 5)
    page.run()
    page.page.wait_for_timeout(1000)
    texts = page.texts("FreqLoss_LoraBandGate")
    assert sum(LORAS["FreqLoss_LoraBandGate"] in text for text in texts) == 2
    assert sum("applied as by the core loader" in text for text in texts) == len(texts) - 2


def test_the_operation_on_a_core_whose_node_has_a_start_and_an_end(page):
    """ComfyUI 0.39 gives LatentApplyOperationCFG two more inputs; the workflow leaves room for them."""
    if hosts.pinned_frontend(hosts.comfyui()).startswith("1.27."):
        pytest.skip("the frontends of such cores are newer, and draw nodes lower")
    options = {"min": 0.0, "max": 1.0, "step": 0.001}
    newer = {
        "start_percent": ["FLOAT", {"default": 0.0, **options}],
        "end_percent": ["FLOAT", {"default": 1.0, **options}],
    }

    def answer(route):
        nodes = route.fetch().json()
        nodes["LatentApplyOperationCFG"]["input"]["optional"] = newer
        nodes["LatentApplyOperationCFG"]["input_order"]["optional"] = list(newer)
        route.fulfill(json=nodes)

    page.page.route("**/object_info", answer)
    try:
        page.reload()
        page.errors.clear()  # as in the fixture
        open_workflow(page, 6)
        prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
        (inputs,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "LatentApplyOperationCFG"]
        assert (inputs["start_percent"], inputs["end_percent"]) == (0.0, 1.0)
        end, begin = page.page.evaluate(
            """() => { const [node] = app.graph._nodes.filter(n => n.type === 'LatentApplyOperationCFG');
               const links = node.outputs[0].links;
               const [below] = app.graph._nodes.filter(n => n.inputs?.some(i => links.includes(i.link)));
               return [node.getBounding()[1] + node.getBounding()[3], below.getBounding()[1]] }"""
        )
        assert end <= begin
        assert page.errors == []
    finally:
        page.page.unroute("**/object_info")
        page.reload()


def test_the_text_is_no_input_and_no_value_of_the_workflow(page):
    open_workflow(page, 4)
    before = page.page.evaluate("() => app.graph.serialize().nodes.map(n => [n.type, n.widgets_values ?? []])")
    page.run()
    page.page.wait_for_timeout(1000)
    assert page.texts("FreqLoss_LoraLoader")
    assert page.page.evaluate("() => app.graph.serialize().nodes.map(n => [n.type, n.widgets_values ?? []])") == before
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    (inputs,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "FreqLoss_LoraLoader"]
    assert not any("text" in name for name in inputs)
