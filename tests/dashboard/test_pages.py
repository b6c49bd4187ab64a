"""The dashboard over HTTP: what it shows, to whom, and that it changes nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from typer.testing import CliRunner

import gradualdiff as gd
from coordinator.liveness import RunStatus, SiteStatus
from gradualdiff.cli.dashboard import shown_meanwhile
from gradualdiff.cli.main import app
from gradualdiff.dashboard.guarding import HEADERS
from gradualdiff.dashboard.read_only import ReadOnly
from gradualdiff.dashboard.recomputing import _AT_WORK
from gradualdiff.dashboard.serving import Server
from gradualdiff.store import Store
from gradualdiff.units import fixed
from gradualdiff.verified import in_one
from shared import topology
from shared.config import canonical_json
from shared.errors import ConfigError, StoreError
from shared.protocol.manifest import LocalMetrics
from shared.protocol.records import AcceptedRecord, DeclinedRecord, FailedRecord, RefusedRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.cli.test_follow import SHA, START, Written
from tests.dashboard.serving import ask, serving

PAGES = ("/", "/runs/test", "/runs/test/rounds/1", "/runs/test/rounds/0", "/runs/test/sites")
CHANGED = b"data: changed\n"
TOKEN = "a-token-of-more-than-16-characters"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with one finished run, ``test``."""
    folder = tmp_path_factory.mktemp("finished")
    federations.run(federations.config(), folder)
    return folder / "store"


@pytest.fixture(scope="module")
def url(folder):
    """A dashboard over it."""
    with serving(DirectoryStore(folder, create=False), folder) as url:
        yield url


def next_word(stream):
    """The next line of a stream that says anything."""
    return next(line for line in stream if line.startswith(b"data"))


def test_a_page_shows_the_figures_of_the_python_api(folder, url):
    """One read model below both: every round's and every site's, to the digit."""
    run = gd.open_store(folder).run("test")
    page = ask(f"{url}/runs/test").text
    for row in run.rounds:
        assert f">{fixed(row.held_out_nll, 4)}</td>" in page
        assert row.adapter_sha[:12] in page
    assert run.summary.adapter_sha in page
    shown = run.round(2)
    page = ask(f"{url}/runs/test/rounds/2").text
    for site in shown.sites:
        cells = (fixed(site.held_out_nll, 4), fixed(site.norm, 3), fixed(site.weight, 3))
        row = re.search(rf'<th scope="row">{site.site}</th>.*?</tr>', page, re.DOTALL)[0]
        assert all(f">{cell}</td>" in row for cell in cells)
    assert "Finished: 3 rounds are closed" in ask(url).text


def test_behind_a_number_is_its_record_to_the_byte(folder, url):
    """The page of a record gives the sha256 of the bytes that lie in the store, and these too."""
    page = ask(f"{url}/runs/test/rounds/1").text
    links = re.findall(r'href="(/runs/test/records/[^"]+)"', page)
    assert len(links) == 3 + 3  # opened, closing, closed, and each site's
    for link in links:
        stored = (folder / "runs/test" / link.removeprefix("/runs/test/records/")).read_bytes()
        shown = ask(url + link).text
        assert hashlib.sha256(stored).hexdigest() in shown
        assert ask(url + link.replace("/records/", "/bytes/")).text == stored.decode()


def test_nothing_but_records_is_shown(folder, url):
    """No adapter, no account of a site, nothing above the run, and no run that is not there."""
    (folder / "accounts").mkdir()
    (folder / "accounts" / "a.json").write_text("{}")
    adapter = next((folder / "runs/test/adapters").iterdir()).name
    for name in (f"adapters/{adapter}", "../../accounts/a.json", "%2e%2e/%2e%2e/accounts/a.json"):
        for kind in ("records", "bytes"):
            assert ask(f"{url}/runs/test/{kind}/{name}").status == 404
    assert "no run &#39;nix&#39;" in ask(f"{url}/runs/nix").text
    assert ask(f"{url}/runs/test/rounds/9").status == 404


def test_every_answer_forbids_what_is_not_from_here(url):
    """Also the errors, the stream, the script and the style sheet; nothing inline is in a page."""
    for path in (*PAGES, "/nix", "/runs/nix", "/static/dashboard.js", "/static/dashboard.css"):
        answer = ask(url + path)
        assert HEADERS.items() <= {k.title(): v for k, v in answer.headers.items()}.items(), path
        assert not re.search(r"<script>|<style|\sstyle=|\son\w+=|https?://(?!www\.w3)", answer.text)
    with urllib.request.urlopen(f"{url}/runs/test/changes", timeout=60) as stream:
        assert stream.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
        assert next_word(stream) == CHANGED


def test_it_is_only_read(url):
    """Any other method is refused, wherever it goes."""
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert ask(f"{url}/runs/test", method).status == 405
        assert ask(f"{url}/static/dashboard.js", method).status == 405


def test_the_store_is_only_read(folder):
    """All pages are shown over a store whose every other method fails, and none was called."""

    class Strict(DirectoryStore):
        def _fails(self, *words, **_):
            raise AssertionError(f"written: {words}")

        put = create = create_from = put_file = write = delete = _fails
        sign_get = sign_put = sign_create = _fails

    with serving(Strict(folder, create=False), folder) as url:
        assert {ask(url + path).status for path in PAGES} == {200}
    held = ReadOnly(Strict(folder, create=False))
    for write in (
        lambda: held.put("a", b""),
        lambda: held.create("a", b""),
        lambda: held.put_file("a", folder),
        lambda: held.delete("a"),
        lambda: held.sign_get("a", 0.0),
        lambda: held.sign_put("a", 0.0, 1),
        lambda: held.sign_create("a", 0.0, 1),
    ):
        with pytest.raises(StoreError, match="read-only"):
            write()


def test_a_page_elsewhere_cannot_have_its_own_name_answered(url):
    """Without a token only this machine's own names are answered."""
    assert ask(url, Host="evil.example").status == 421
    assert ask(url, Host="127.0.0.1.evil.example:80").status == 421
    assert ask(url, Host="localhost:1").status == 200
    assert ask(url, Host="[::1]:1").status == 200


def test_another_address_needs_a_token(folder, tmp_path):
    """It is refused by name; so is a token that can be guessed, and a port that is taken."""
    store = Store(folder, DirectoryStore(folder, create=False))
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="--token-file"):
            Server(store, host, 0)
    short = tmp_path / "short"
    for text in ("short", "two words of enough length", ""):
        short.write_text(text)
        with pytest.raises(ConfigError, match="one word of at least 16"):
            Server(store, "127.0.0.1", 0, short)
    with pytest.raises(ConfigError, match="expected a file"):
        Server(store, "127.0.0.1", 0, tmp_path / "nix")
    words = ["dashboard", "--store", str(folder), "--host", "0.0.0.0", "--port", "0"]
    assert isinstance(CliRunner().invoke(app, words).exception, ConfigError)
    with serving(store.objects, folder) as url, pytest.raises(ConfigError, match="--port"):
        Server(store, "127.0.0.1", int(url.rsplit(":", 1)[1]))


def test_a_token_is_asked_for_everywhere(folder, tmp_path):
    """As a browser's password or a bearer's; on pages, records, the stream and the style sheet."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with serving(DirectoryStore(folder, create=False), folder, token_file=file) as url:
        for path in (*PAGES, "/changes", "/static/dashboard.css", "/nix"):
            refused = ask(url + path)
            assert refused.status == 401
            assert refused.headers["www-authenticate"].startswith("Basic")
            assert "test" not in refused.text
            assert ask(url + path, Authorization="Bearer another-token-of-16").status == 401
            assert ask(url + path, Authorization="Basic ???").status == 401
        assert ask(url, Authorization=f"Bearer {TOKEN}", Host="its.name").status == 200
        basic = f"Basic {base64.b64encode(f'me:{TOKEN}'.encode()).decode()}"
        assert ask(f"{url}/runs/test", Authorization=basic).status == 200


MARK = "<img src=x onerror=alert(1)>\"'</td><script>alert(2)</script>{{7*7}}\u202e"


def test_what_a_site_says_stays_text(tmp_path):
    """Markup in a refusal, a failure, a declined run, metrics, a device, a remark of progress.

    A site's name and a run's cannot hold any: their pattern is a-z, 0-9 and dashes.
    """
    run = Written(tmp_path)
    run.ledger.write(DeclinedRecord(site="c", reason=MARK))
    run.join("a", "b", "c")
    member = run.store.get(topology.member_key("test", "a")).decode()
    told = json.loads(member)
    told["numerics"] |= {"device": "<b>gpu</b>", "versions": {"<i>torch</i>": "<u>2</u>"}}
    run.store.put(topology.member_key("test", "a"), canonical_json(told))
    run.genesis()
    run.open()
    run.ledger.write(RefusedRecord(round=1, site="a", sha=SHA, reason=MARK))
    run.ledger.write(FailedRecord(round=1, site="b", attempt=1, reason=MARK, retryable=True))
    metrics = LocalMetrics(steps=1, seconds={"<s>train</s>": 1.0, "encode": 1.0})
    run.ledger.write(
        AcceptedRecord(
            round=1, site="c", sha=SHA, size=1, examples=1, tokens=1, norm=1.0,
            metrics=metrics, state="fresh",
        )
    )  # fmt: skip
    said = SiteStatus(seen=START, progress_at=START + 1e9, round=1, activity=MARK, step=1, of=2)
    status = RunStatus(
        run="test", writer="w", at=START, round=1, state="open", since=START,
        sites={"b": said}, problem=MARK, over={"a": {MARK: 1}},
    )  # fmt: skip
    run.store.put(topology.status_key("test"), canonical_json(status.model_dump(mode="json")))
    with serving(run.store, tmp_path) as url:
        pages = {path: ask(url + path) for path in PAGES}
        links = {
            link
            for page in pages.values()
            for link in re.findall(r'href="(/runs/test/records/[^"]+)"', page.text)
        }
        assert any("refused" in link for link in links)
        pages |= {link: ask(url + link) for link in links}
    seen = "".join(page.text for page in pages.values())
    for path, page in pages.items():
        assert page.status == 200, path
        assert not re.search("<(img|script>|b>|i>|u>|s>)|\u202e", page.text), path
    for escaped in (
        "&lt;img src=x",
        "&lt;b&gt;gpu",
        "&lt;i&gt;torch",
        "&lt;s&gt;train",
        "{{7*7}}",
        "\\u202e",
    ):
        assert escaped in seen, escaped
    with pytest.raises(ValueError, match="pattern"):
        RefusedRecord(round=1, site="<b>", sha=SHA, reason="")


def test_a_record_that_comes_is_told_at_once(tmp_path):
    """The stream says so, and the page shows it."""
    run = Written(tmp_path)
    run.genesis()
    run.open()
    with (
        serving(run.store, tmp_path) as url,
        urllib.request.urlopen(f"{url}/runs/test/changes", timeout=60) as stream,
        urllib.request.urlopen(f"{url}/changes", timeout=60) as of_all,
    ):
        for one in (stream, of_all):
            assert next_word(one) == CHANGED
        assert "waits for a, b, c" in ask(f"{url}/runs/test").text
        run.accept("a")
        for one in (stream, of_all):
            assert next_word(one) == CHANGED
        assert "has 1 of 3 deltas; it waits for b, c" in ask(f"{url}/runs/test").text


def test_a_site_that_is_away_is_named_with_what_to_do(tmp_path):
    """Since when, and how to go on: for whoever is on call."""
    run = Written(tmp_path)
    run.now = time.time()
    run.genesis()
    run.open()
    status = RunStatus(
        run="test", writer="w", at=run.now, round=1, state="open", since=run.now,
        waiting_for=("a", "b", "c"), absent={"b": run.now},
    )  # fmt: skip
    run.store.put(topology.status_key("test"), canonical_json(status.model_dump(mode="json")))
    with serving(run.store, tmp_path) as url:
        for path in ("/", "/runs/test", "/runs/test/rounds/1"):
            assert "Round 1 of 3 waits for b, away since" in ask(url + path).text
        assert "gradualdiff runs exclude test b --reason" in ask(f"{url}/runs/test").text
        assert "no process reads its queue" in ask(f"{url}/runs/test/sites").text


def test_a_damaged_run_hides_no_other(tmp_path):
    """The list says what is the matter with it, and its own page too."""
    for name in ("one", "two"):
        federations.run(federations.config(name=name, rounds=1), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    store.put(topology.round_key("one", 1, "closed"), b"{")
    with serving(store, tmp_path) as url:
        page = ask(url).text
        assert "Finished: 1 rounds are closed" in page
        assert "restore this object" in page
        assert ask(f"{url}/runs/one").status == 500
        assert ask(f"{url}/runs/two").status == 200


def test_a_demo_is_shown_while_it_runs(tmp_path, capfd):
    """Its store, as it grows, on the usual port or a free one; the page goes with the demo."""
    store = DirectoryStore(tmp_path / "store")
    with shown_meanwhile(store), shown_meanwhile(store):
        urls = re.findall(r"dashboard: (\S+) while", capfd.readouterr().err)
        assert len(set(urls)) == 2
        federations.run(federations.config(), tmp_path, store=store)
        assert all("Finished: 3 rounds" in ask(url).text for url in urls)
    assert f"gradualdiff dashboard --store {tmp_path / 'store'}" in capfd.readouterr().err
    with pytest.raises(OSError, match="refused"):
        ask(urls[0])


def test_a_run_is_computed_again_line_by_line(tmp_path):
    """What ``runs verify`` prints, a finding included, and nothing written; one at a time."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store", create=False)
    run = gd.open_store(tmp_path / "store").run("test")
    with serving(store, tmp_path / "store") as url:
        page = ask(f"{url}/runs/test/verify").text
        assert "checking round 3" in page
        assert f"run test verified: {in_one(run.verify())}" in page
        key = topology.adapter_key("test", run.adapter(2).sha)
        DirectoryStore(tmp_path / "store").put(key, b"<script>")
        page = ask(f"{url}/runs/test/verify").text
        assert "FINDING: round 2: " in page
        assert "verified:" not in page
        assert ask(f"{url}/runs/nix/verify").status == 404
        with _AT_WORK:
            assert "another verification is at work" in ask(f"{url}/runs/test/verify").text


def test_ctrl_c_ends_it_although_somebody_watches(folder):
    """Without a word of complaint, and with the exit code of whatever Ctrl-C ends."""
    command = [sys.executable, "-m", "gradualdiff", "dashboard", "--port", "0", "--store", folder]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as server:
        url = server.stdout.readline().split()[1]
        with urllib.request.urlopen(f"{url}runs/test/changes", timeout=60) as stream:
            assert next_word(stream) == CHANGED
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 130
            assert server.stderr.read() == ""
