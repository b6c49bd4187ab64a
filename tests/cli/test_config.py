"""``gradualdiff config show``: the settings as they will be used, and where each comes from."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradualdiff.cli.main import app
from shared.config import FederationConfig, SiteConfig, load_federation, load_site, parse
from shared.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
FEDERATION = """
[run]
name = "trial-1"
participants = ["site-a", "site-b"]
[base]
model = "models/base"
[lora]
ranks = {site-a = 8}
[aggregation]
averaging = "svd"
[store]
url = "https://s3.example:9000"
access_key_file = "access-key"
secret_key_file = "secret-key"
"""


@pytest.fixture
def show(tmp_path):
    """``show(text, *arguments)``: what the command prints of a file with this text."""

    def run(text, *arguments):
        (tmp_path / "it.toml").write_text(text)
        (tmp_path / "secret-key").write_text("hunter2")
        done = CliRunner().invoke(app, ["config", "show", str(tmp_path / "it.toml"), *arguments])
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (FEDERATION, FederationConfig),
        ((EXAMPLES / "federation.toml").read_text(), FederationConfig),
        ((EXAMPLES / "site.toml").read_text(), SiteConfig),
        ('[site]\nname = "a"\n[data]\npath = "x \\u007f"\ntext = "b\\"c"\n', SiteConfig),
    ],
)
def test_what_is_shown_is_the_same_config(show, tmp_path, text, kind):
    """It is TOML that names every setting, so it can be kept as a file."""
    shown = show(text)
    load = load_federation if kind is FederationConfig else load_site
    config = load(tmp_path / "it.toml")
    assert parse(kind, tomllib.loads(shown), "shown") == config
    for table, section in config:
        assert section is None or f"[{table}]" in shown
        for name in type(section).model_fields if section else ():
            assert f"{name} = " in shown or f"# {name} is not set" in shown


def test_where_a_setting_comes_from_is_marked(show):
    """A default and what --set says; what stands in the file has no mark. No secret is shown."""
    shown = show(FEDERATION, "--set", "lora.rank=16", "--set", "run.rounds=2").splitlines()
    lines = {line.split(" ")[0]: line for line in shown}
    assert lines["rank"].split() == ["rank", "=", "16", "#", "--set"]
    assert lines["rounds"].endswith("# --set")
    assert lines["alpha"].endswith("# default")
    assert lines["ranks"] == "ranks = {site-a = 8}"
    assert lines["secret_key_file"] == 'secret_key_file = "secret-key"'
    assert not any("hunter2" in line for line in shown)


def test_programs_get_the_same_as_json(show):
    """A row for each setting; a setting without a value is null."""
    rows = {
        (row["table"], row["name"]): (row["value"], row["source"])
        for row in json.loads(show(FEDERATION, "--json", "--set", "lora.alpha=8"))
    }
    assert rows["run", "participants"] == (["site-a", "site-b"], "file")
    assert rows["lora", "alpha"] == (8.0, "--set")
    assert rows["training", "local_epochs"] == (1, "default")
    assert rows["policy", "quorum"] == (None, "default")


def test_a_file_with_mistakes_is_not_shown(show):
    """All of them are told, those of --set by that name."""
    with pytest.raises(ConfigError) as caught:
        show(FEDERATION.replace("svd", "fedavg"), "--set", "lora.rnak=8")
    assert "--set lora.rnak" in str(caught.value)
    assert "lora.ranks: expected one rank for all sites" in str(caught.value)


@pytest.mark.parametrize("command", ["simulate", "setup", "coordinator"])
def test_each_command_that_takes_settings_tells_a_wrong_one(tmp_path, command):
    """By the option, before it does anything; the file is well."""
    (tmp_path / "federation.toml").write_text(FEDERATION)
    arguments = [command, str(tmp_path / "federation.toml"), "--set", "lora.rnak=8"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError)
    assert "--set lora.rnak: expected a known setting" in str(done.exception)
    assert "did you mean rank?" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["federation.toml"]
