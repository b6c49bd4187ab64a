"""Where a secret comes from: a file, the environment or a command, and no word of it."""

from __future__ import annotations

import sys

import pytest

from shared.config import load_federation, load_site
from shared.config.servers import BrokerSection, OperatedBrokerSection
from shared.credentials import broker_address, read_secret
from shared.errors import ConfigError

SECRET = "tell-tale-0815"
URL = "amqps://north@rabbit.example/"
SITE = '[site]\nname = "a"\n[data]\npath = "a.jsonl"\ntext = "text"\n[broker]\nurl = "{url}"\n'
FEDERATION = (
    '[run]\nname = "night"\nparticipants = ["a"]\n[base]\nmodel = "m"\n[store]\n'
    'url = "https://s3.example"\n'
)


def printing(code):
    """A command that runs these words of Python."""
    return (sys.executable, "-c", code)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The same secret at all three places."""
    (tmp_path / "secret").write_text(SECRET + "\n")
    monkeypatch.setenv("OUR_SECRET", SECRET)
    return {
        "password_file": "secret",
        "password_env": "OUR_SECRET",
        "password_command": printing("print(open('secret').read())"),
    }


@pytest.mark.parametrize("source", ["password_file", "password_env", "password_command"])
def test_a_secret_comes_from_either_place(sources, tmp_path, source):
    """A command runs in the TOML file's folder; the address shows none of it."""
    address = broker_address(BrokerSection(url=URL, **{source: sources[source]}), tmp_path)
    assert address.password == SECRET
    assert SECRET not in repr(address)


@pytest.mark.parametrize(
    "given",
    ["", 'password_file = "x"\npassword_env = "Y"', 'password_env = "Y"\npassword_command = ["z"]'],
)
def test_a_site_says_exactly_one_place(tmp_path, given):
    """None and two are refused, and the error names the settings there are."""
    file = tmp_path / "site.toml"
    file.write_text(SITE.format(url=URL) + given + "\n")
    with pytest.raises(ConfigError, match=r"password_file, password_env and password_command, got"):
        load_site(file)


def test_a_store_wants_both_keys_and_each_from_one_place(tmp_path):
    """They may come from different ones."""
    file = tmp_path / "federation.toml"
    file.write_text(FEDERATION + 'access_key_env = "A"\nsecret_key_command = ["b", "c"]\n')
    assert load_federation(file).store.secret_key_command == ("b", "c")
    file.write_text(FEDERATION + 'access_key_env = "A"\n')
    with pytest.raises(ConfigError, match="secret_key_file, secret_key_env and"):
        load_federation(file)
    file.write_text(
        FEDERATION + 'access_key_env = "A"\naccess_key_file = "a"\nsecret_key_env = "B"\n'
    )
    with pytest.raises(ConfigError, match="got access_key_file and access_key_env"):
        load_federation(file)


def test_an_administrators_password_may_be_left_out_and_not_said_twice():
    """Then the coordinator's own account manages the others."""
    OperatedBrokerSection(url=URL, password_env="X")
    with pytest.raises(ValueError, match="management_password_env and management_password_command"):
        OperatedBrokerSection(
            url=URL,
            password_env="X",
            management_password_env="Y",
            management_password_command=("z",),
        )


NOT_ONE = {
    "a variable that is not set": ({"password_env": "NOBODY_SET_THIS"}, "NOBODY_SET_THIS"),
    "a command that is not there": ({"password_command": ("/nowhere/vault",)}, "/nowhere/vault"),
    "a command that fails": (
        {"password_command": printing(f"import sys; print('{SECRET}'); sys.exit('{SECRET}')")},
        "code 0, got 1",
    ),
    "a command that prints nothing": ({"password_command": printing("")}, "got nothing"),
    "a command that prints more": (
        {"password_command": printing(f"print('{SECRET}'); print('{SECRET}')")},
        "one line",
    ),
    "a command that is silent": (
        {"password_command": printing("import time; time.sleep(600)")},
        "nothing in 0.5 s",
    ),
    "a file that is not there": ({"password_file": "nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("what", NOT_ONE)
def test_what_is_no_secret_is_named_and_nothing_that_was_printed_is_repeated(
    tmp_path, monkeypatch, what
):
    """The setting, and what to look at. A failing vault may well print what it should not."""
    if "silent" in what:
        monkeypatch.setattr("shared.credentials.SECRET_SECONDS", 0.5)
    settings, names = NOT_ONE[what]
    with pytest.raises(ConfigError) as caught:
        read_secret(BrokerSection(url=URL, **settings), "password", tmp_path, "broker")
    assert f"broker.{next(iter(settings))}: expected" in str(caught.value)
    assert names in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_no_shell_reads_a_command(tmp_path):
    """What would be a second command is a word of the first."""
    words = (sys.executable, "-c", "import sys; print(sys.argv[1])", "$(touch here); x")
    section = BrokerSection(url=URL, password_command=words)
    assert read_secret(section, "password", tmp_path, "broker") == "$(touch here); x"
    assert list(tmp_path.iterdir()) == []
