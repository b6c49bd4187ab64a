"""The dashboard in a real Chromium: live, without script, on a phone, dark and light."""

from __future__ import annotations

import shutil
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from coordinator.liveness import RunStatus
from shared import topology
from shared.config import canonical_json
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.cli.test_follow import Written
from tests.dashboard.serving import serving

PHONE = {"width": 390, "height": 844}
DESK = {"width": 1200, "height": 900}
PAGES = (
    "",
    "/runs/test",
    "/runs/test/rounds/2",
    "/runs/test/sites",
    "/runs/nix",
    "/runs/test/verify",
)
RECORD = "/runs/test/records/federation.json"


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium: as root it has no sandbox, and the pages are our own."""
    path = shutil.which("chromium")
    assert path, "no chromium here; as root: make test-servers"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A dashboard over one finished run."""
    folder = tmp_path_factory.mktemp("finished")
    federations.run(federations.config(), folder)
    with serving(DirectoryStore(folder / "store", create=False), folder) as url:
        yield url


@pytest.fixture
def begun(tmp_path):
    """A run whose first round is open, to be written on."""
    run = Written(tmp_path)
    run.now = time.time()
    run.genesis()
    run.open()
    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, url, scheme):
    """Contrast, names, order and what a keyboard reaches, on every page, on a phone and a desk."""
    for size in (PHONE, DESK):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        for path in (*PAGES, RECORD):
            page.goto(url + path)
            found = Axe().run(page)
            assert len(found.response["passes"]) > 10, "it looked"
            assert found.violations_count == 0, f"{path}: {found.generate_report()}"
        page.close()


def test_a_phone_scrolls_one_way_only(browser, url):
    """Wide tables scroll in their own box."""
    page = browser.new_page(viewport=PHONE)
    for path in (*PAGES, RECORD):
        page.goto(url + path)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], path
    page.close()


def test_a_browser_loads_only_what_is_ours_and_complains_of_nothing(browser, url):
    """No request goes elsewhere, the policy hinders nothing of ours, and stops what is inline."""
    page = browser.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    for path in (*PAGES[:4], RECORD):
        page.goto(url + path)
        page.wait_for_load_state("load")
    assert said == []
    assert asked
    assert all(address.startswith(url + "/") for address in asked)
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.body.append(s);"
        " document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.ran = 2\">x</b>');"
        " document.body.lastChild.click(); }"
    )
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in said)
    page.close()


def test_a_change_comes_without_reloading(browser, begun, tmp_path):
    """The sentence and the tables change in place; what has the keyboard's focus keeps it."""
    with serving(begun.store, tmp_path) as url:
        page = browser.new_page()
        page.goto(f"{url}/runs/test")
        page.evaluate("window.before = document.getElementById('state')")
        link = page.locator("#strip a", has_text="1")
        link.focus()
        page.get_by_text("has 0 of 3 deltas").wait_for()
        begun.accept("a")
        page.get_by_text("has 1 of 3 deltas").wait_for()
        begun.accept("b")
        begun.accept("c")
        begun.close()
        page.locator("#rounds", has_text="closed").wait_for()
        begun.open(2)
        page.locator("#strip a", has_text="2").wait_for()
        assert page.evaluate("window.before === document.getElementById('state')")
        assert page.evaluate("document.activeElement.textContent") == "1"
        status = RunStatus(
            run="test",
            writer="w",
            at=time.time(),
            round=2,
            state="open",
            since=begun.now,
            absent={"b": begun.now},
        )
        key = topology.status_key("test")
        begun.store.put(key, canonical_json(status.model_dump(mode="json")))
        page.get_by_text("waits for b, away since").wait_for()
        assert "trouble" in page.locator("#state").get_attribute("class")
        page.close()


def test_a_run_that_begins_appears_on_the_list(browser, tmp_path):
    """The page of all runs is live too."""
    store = DirectoryStore(tmp_path / "store")
    with serving(store, tmp_path) as url:
        page = browser.new_page()
        page.goto(url)
        page.get_by_text("There is no run in this store yet").wait_for()
        federations.run(federations.config(), tmp_path, store=store)
        page.get_by_role("link", name="test").wait_for()
        page.close()


def test_a_server_that_was_gone_is_found_again(browser, begun, tmp_path):
    """The page says that it is not live, and is again by itself."""
    with serving(begun.store, tmp_path) as url:
        page = browser.new_page()
        page.goto(f"{url}/runs/test")
        page.get_by_text("live", exact=True).wait_for()
    page.get_by_text("not live: trying again").wait_for()
    begun.accept("a")
    with serving(begun.store, tmp_path, port=int(url.rsplit(":", 1)[1])):
        page.get_by_text("has 1 of 3 deltas").wait_for(timeout=60_000)
        page.get_by_text("live", exact=True).wait_for()
        page.close()


def test_without_script_every_page_is_whole(browser, url):
    """Tables, curves and links: the script only keeps them fresh."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    page.get_by_role("link", name="test").click()
    assert page.locator("#rounds tbody tr").count() == 4
    assert page.locator("#charts figure svg polyline").count() > 3
    page.locator("#rounds").get_by_role("link", name="2").click()
    assert page.locator("#sites tbody tr").count() == 3
    page.get_by_role("link", name="closing").click()
    assert len(page.locator("#sha256").text_content()) == 64
    context.close()
