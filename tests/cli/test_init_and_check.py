"""``init`` writes a federation, ``check`` tries it, ``simulate`` runs it; mistakes cost nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from participant.data import split_text
from shared import errors
from shared.config import load_federation, load_site
from tests.tiny_model import make_tiny_model, write_federation


def gradualdiff(*arguments, cwd=None):
    """Run the command in a process of its own: a demo keeps its log open to the end of it."""
    return subprocess.run(
        [sys.executable, "-m", "gradualdiff.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


def text(path, rows=12, question="question", answer="reply"):
    """A file whose columns have names of its own."""
    lines = [json.dumps({question: f"count {i}", answer: f"{i} and {i}"}) for i in range(rows)]
    path.write_text("\n".join(lines))
    return path


def tree(folder):
    """Every file and folder under it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# init ----------


def test_init_writes_a_federation_that_reads_back(tmp_path):
    """A site for each file, named after it; paths relative to the files; all else is default."""
    text(tmp_path / "North Clinic.jsonl")
    text(tmp_path / "south.jsonl")
    (tmp_path / "model").mkdir()
    done = gradualdiff(
        *("init", "mine", "--model", "model", "--columns", "prompt=question,answer=reply"),
        *("--data", "North Clinic.jsonl", "--data", "south.jsonl"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "gradualdiff check mine/federation.toml" in done.stdout
    config = load_federation(tmp_path / "mine" / "federation.toml")
    assert config.run.participants == ("north-clinic", "south")
    assert (config.run.name, config.base.model) == ("mine-1", "../model")
    sites = [load_site(tmp_path / "mine" / name) for name in config.simulation.sites]
    assert [site.data.path for site in sites] == ["../North Clinic.jsonl", "../south.jsonl"]
    assert {(site.data.prompt, site.data.answer) for site in sites} == {("question", "reply")}


def test_what_init_shows_behind_a_hash_is_the_default(tmp_path):
    """Taking every # away changes no setting."""
    text(tmp_path / "a.jsonl", question="prompt", answer="answer")
    done = gradualdiff(
        *("init", "mine", "--model", "some/model", "--data", "a.jsonl"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "mine" / "federation.toml"
    before = load_federation(path)
    shown = path.read_text()
    _, rest = shown.split("\n", maxsplit=1)
    path.write_text(rest.replace("\n# ", "\n"))
    assert load_federation(path) == before
    assert shown.count("\n# ") == 6


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (("--data", "none.jsonl"), errors.DataError, "none.jsonl"),
        (("--data", "a.jsonl", "--data", "b/a.jsonl"), errors.ConfigError, "rename the file"),
        (("--data", "a.jsonl", "--columns", "prompt"), errors.ConfigError, "SETTING=COLUMN"),
        (("--data", "a.jsonl", "--columns", "prompt=x,answer=y"), errors.DataError, "column"),
        (("--data", "a.jsonl", "--columns", "prompt=prompt"), errors.ConfigError, "go together"),
        (("--data", "a.jsonl", "--name", "My run"), errors.ConfigError, "run.name"),
        (("--data", "any.jsonl"), errors.ConfigError, "reserved"),
    ],
)
def test_a_mistake_in_init_writes_nothing(tmp_path, options, error, says):
    """Its own exit code, and no file."""
    (tmp_path / "b").mkdir()
    for name in ("a.jsonl", "b/a.jsonl", "any.jsonl"):
        text(tmp_path / name, question="prompt", answer="answer")
    before = tree(tmp_path)
    done = gradualdiff("init", "mine", "--model", "some/model", *options, cwd=tmp_path)
    assert done.returncode == error.exit_code, done.stderr
    assert says in done.stderr
    assert tree(tmp_path) == before


def test_init_overwrites_nothing(tmp_path):
    """Also where only one of its files is there: none is written, none is changed."""
    text(tmp_path / "a.jsonl", question="prompt", answer="answer")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.toml").write_text("mine")
    done = gradualdiff(
        *("init", "mine", "--model", "some/model", "--data", "a.jsonl"), cwd=tmp_path
    )
    assert done.returncode == errors.ConfigError.exit_code
    assert "a.toml" in done.stderr
    assert (tmp_path / "mine" / "a.toml").read_text() == "mine"
    assert not (tmp_path / "mine" / "federation.toml").exists()


def test_the_demo_takes_columns_of_other_names(tmp_path):
    """Two columns, as in site.toml; a name that is not there is an error of the data."""
    text(tmp_path / "own.jsonl")
    options = ("demo", "--prepare", "--dir", "d", "--model", "some/model", "--participants", "2")
    given = (*options, "--data", "own.jsonl", "--columns")
    done = gradualdiff(*given, "prompt=question,answer=answr", cwd=tmp_path)
    assert done.returncode == errors.DataError.exit_code, done.stderr
    assert "--columns: answer = 'answr'" in done.stderr
    done = gradualdiff(*options, "--columns", "prompt=question,answer=reply", cwd=tmp_path)
    assert done.returncode == errors.ConfigError.exit_code
    assert "--columns: expected --data FILE with it" in done.stderr
    done = gradualdiff(*given, "prompt=question,answer=reply", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = tmp_path.rglob("site-*.jsonl")
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert sorted(row["messages"][1]["content"] for row in rows) == sorted(
        f"{i} and {i}" for i in range(12)
    )


# check ----------

slow = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_of_ones_own_text_asks_what_is_held_out(tmp_path, model):
    """Its sample prompts are of the file, and no site trained on them."""
    text(tmp_path / "own.jsonl", rows=40)
    done = gradualdiff(
        *("demo", "--dir", "d", "--model", model, "--data", "own.jsonl", "--rounds", "1"),
        *("--columns", "prompt=question,answer=reply", "--participants", "2"),
        *("--local-steps", "1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^count \d+", done.stdout, re.MULTILINE)
    (federation,) = tmp_path.glob("d/**/federation.toml")
    name = load_federation(federation).simulation.sites[0]
    site = load_site(federation.parent / name)
    folder = (federation.parent / name).parent
    _, split, _ = split_text(site.data, folder)
    held_out = [example.prompt[-1].content for example in split.held_out]
    assert 0 < len(shown) <= 3
    assert shown == held_out[: len(shown)]
    assert not {example.prompt[-1].content for example in split.train} & set(shown)


class TestCheck:
    """With a tiny model in processes of their own."""

    pytestmark = slow

    def test_a_dry_run_measures_each_site_and_writes_nothing(self, tmp_path, model):
        """Counts, seconds a step and minutes a round; not a file more than before."""
        path = write_federation(tmp_path, model)
        before = tree(tmp_path)
        done = gradualdiff("check", path, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert sorted(told["sites"]) == ["a", "b"]
        for site in told["sites"].values():
            assert (site["examples"], site["held_out"], site["steps"]) == (18, 6, 3)
            assert site["tokens"] > 18 * 10
            assert 0 < site["step_seconds"] < site["round_seconds"]
            assert site["memory"]["resident"] > 10**8
        assert {finding["verdict"] for finding in told["findings"]} <= {"OK", "WARN"}
        assert tree(tmp_path) == before

    def test_what_is_wrong_is_told_of_all_sites(self, tmp_path, model):
        """A column at one, nothing to train on at the other: exit code 11, both named."""
        path = write_federation(tmp_path, model)
        site = tmp_path / "a.toml"
        site.write_text(site.read_text().replace('prompt = "prompt"', 'prompt = "promt"'))
        (tmp_path / "b.jsonl").write_text('{"prompt": "", "answer": ""}\n')
        done = gradualdiff("check", path, cwd=tmp_path)
        assert done.returncode == errors.DataError.exit_code, done.stderr
        assert "FAIL  a: " in done.stdout
        assert "FAIL  b: " in done.stdout
        assert "'promt'" in done.stderr
        assert "b.jsonl" in done.stderr
        assert not (tmp_path / "store").exists()

    def test_a_store_that_cannot_be_fails_the_check(self, tmp_path, model):
        """FAIL and exit code 31 go together; the sites are looked at all the same."""
        path = write_federation(tmp_path, model, extra='[store]\ndirectory = "a.jsonl"')
        done = gradualdiff("check", path, cwd=tmp_path)
        assert "FAIL  store: " in done.stdout
        assert "OK    b: " in done.stdout
        assert done.returncode == errors.StoreUnavailableError.exit_code, done.stderr
        assert str(tmp_path / "a.jsonl") in done.stderr

    def test_what_no_site_can_tell_alone_is_a_finding(self, tmp_path, model):
        """As what is wrong at one site is: here, no disk has room for so many rounds."""
        path = write_federation(tmp_path, model, rounds=10**12)
        done = gradualdiff("check", path, "--json", cwd=tmp_path)
        assert done.returncode == errors.StoreUnavailableError.exit_code, done.stderr
        found = json.loads(done.stdout)["findings"]
        assert [f["check"] for f in found if f["verdict"] == "FAIL"] == ["run"]

    def test_a_model_that_is_not_there_has_its_own_exit_code(self, tmp_path):
        """As settings do: 12 here, 10 for what is wrong in the files, all files at once."""
        path = write_federation(tmp_path, tmp_path / "none")
        done = gradualdiff("check", path, cwd=tmp_path)
        assert done.returncode == errors.ModelError.exit_code, done.stderr
        for name in "ab":
            site = tmp_path / f"{name}.toml"
            site.write_text(site.read_text().replace("[data]", "[dta]"))
        done = gradualdiff("check", path, cwd=tmp_path)
        assert done.returncode == errors.ConfigError.exit_code
        assert done.stderr.count("dta: expected a known setting") == 2
        assert "did you mean data?" in done.stderr

    def test_a_site_with_nothing_held_out_is_warned_of(self, tmp_path, model):
        """In check and doctor before, and at load."""
        path = write_federation(tmp_path, model, rounds=1)
        for name in "ab":
            site = tmp_path / f"{name}.toml"
            site.write_text(site.read_text().replace("held_out_fraction = 0.25", ""))
            site.write_text(site.read_text() + "held_out_fraction = 0.0\n")
        done = gradualdiff("check", path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("nothing is held out") == 2
        looked = gradualdiff("doctor", "a.toml", "--json", cwd=tmp_path)
        found = {f["check"]: f for f in json.loads(looked.stdout)["findings"]}
        assert found["data"]["verdict"] == "WARN"
        assert "nothing is held out" in found["data"]["says"]
        done = gradualdiff("simulate", path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("data.not_held_out") >= 2

    def test_a_data_error_ends_simulate_with_its_own_exit_code(self, tmp_path, model):
        """11, the file and the column; no run is begun."""
        path = write_federation(tmp_path, model)
        site = tmp_path / "a.toml"
        site.write_text(site.read_text().replace('prompt = "prompt"', 'prompt = "promt"'))
        done = gradualdiff("simulate", path, cwd=tmp_path)
        assert done.returncode == errors.DataError.exit_code, done.stderr
        assert "'promt'" in done.stderr
        assert not (tmp_path / "store" / "runs" / "tiny" / "federation.json").exists()
