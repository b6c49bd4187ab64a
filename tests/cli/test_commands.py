"""The command line as a stranger uses it: errors, exit codes, JSON, and no torch for a look."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from typer.testing import CliRunner

from gradualdiff.cli.output import print_table
from gradualdiff.figures.held_out import looks
from shared import errors, topology
from shared.protocol.ledger import Ledger
from shared.protocol.records import AcceptedRecord
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.command_line import gradualdiff

THIN = {"name": "int4", "down": "int4"}  # the defaults, which need no codec's code to be checked


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with one finished run named ``test``."""
    folder = tmp_path_factory.mktemp("run")
    federations.run(federations.config(codec=THIN), folder)
    return folder / "store"


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("runs", "list"),
        ("runs", "show", "test"),
        ("runs", "compare", "test"),
        ("rounds", "list", "test"),
        ("rounds", "show", "test", "1"),
    ],
)
def test_looking_imports_neither_torch_nor_numpy(store, command):
    """Inspection works on a coordinator's machine and answers at once."""
    script = (
        "import sys\n"
        "from gradualdiff.cli.main import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    options = [] if command == ("--help",) else ["--store", str(store)]
    done = subprocess.run(
        [sys.executable, "-c", script, *command, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", ["", "store/runs", "elsewhere", "elsewhere/store"])
def test_a_folder_that_is_no_store_is_said_and_the_near_one_named(store, tmp_path, place):
    """One level off is told where the store is; a folder with files of its own is no store."""
    (tmp_path / "elsewhere" / "runs" / "tensorboard").mkdir(parents=True)
    folder = store.parent / place if place in ("", "store/runs") else tmp_path / place
    done = gradualdiff("runs", "list", "--store", folder)
    assert done.returncode == errors.StoreMissingError.exit_code
    assert f"no store at {folder}" in done.stderr
    assert (f"there is one here: {store}" in done.stderr) == (place in ("", "store/runs"))
    assert done.stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        ("runs", "list"),
        ("runs", "show", "test"),
        ("runs", "verify", "test"),
        ("rounds", "list", "test"),
        ("rounds", "show", "test", "2"),
    ],
)
def test_json_is_json_and_nothing_else(store, command):
    """Standard output can be piped into a program."""
    done = gradualdiff(*command, "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_verify_fails_with_its_exit_code_and_names_the_object(tmp_path):
    """One flipped byte: exit code 21, the round and the key on standard error."""
    federations.run(federations.config(), tmp_path)
    store = DirectoryStore(tmp_path / "store")
    history = Ledger(store, "test", "t", lambda: 0.0).history()
    record = next(r for r in history if isinstance(r, AcceptedRecord))
    key = topology.delta_key("test", record.round, record.site, record.sha)
    data = store.get(key)
    store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    done = gradualdiff("runs", "verify", "test", "--store", tmp_path / "store")
    assert done.returncode == errors.LedgerDamagedError.exit_code
    assert f"round {record.round}: {key}" in done.stderr


def test_export_writes_a_peft_directory_once(store, tmp_path):
    """A second export into the same folder is refused, not mixed in."""
    target = tmp_path / "adapter"
    first = gradualdiff("runs", "export", "test", "--to", target, "--store", store)
    assert first.returncode == 0, first.stderr
    names = sorted(path.name for path in target.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "| 3 |" in (target / "README.md").read_text()
    again = gradualdiff("runs", "export", "test", "--to", target, "--store", store)
    assert again.returncode == errors.ConfigError.exit_code


def test_an_export_names_a_hub_id_and_what_is_left_out(store, tmp_path):
    """Where neither the base nor torch is: others load it by its id."""
    target = tmp_path / "adapter"
    done = gradualdiff(
        *("runs", "export", "test", "--best", "--base", "some/model"),
        *("--to", target, "--store", store),
    )
    assert done.returncode == 0, done.stderr
    assert "with the lowest held-out loss" in done.stdout
    assert "tokenizer is left out" in done.stdout
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    card = (target / "README.md").read_text()
    assert "base_model: some/model\n" in card
    assert 'AutoModelForCausalLM.from_pretrained("some/model")' in card


def test_a_merge_without_its_packages_says_which(store, tmp_path):
    """Exit code 13 and the command that installs them, as on a coordinator's machine."""
    script = "import sys; sys.modules['peft'] = None; from gradualdiff.cli.main import main; main()"
    options = ("--merge", "--to", str(tmp_path / "m"), "--store", str(store))
    done = subprocess.run(
        [sys.executable, "-c", script, "runs", "export", "test", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == errors.MissingPackageError.exit_code, done.stderr
    assert "pip install 'gradualdiff-fed[participant]'" in done.stderr


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF-"), ("svg", b"<?xml")]
)
def test_a_plot_is_of_the_kind_that_its_name_says(store, tmp_path, suffix, begins):
    """Rounds show --plot writes a picture; the curve over all sites is called pooled."""
    path = tmp_path / f"loss.{suffix}"
    done = gradualdiff("rounds", "show", "test", "--plot", path, "--store", store)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes().startswith(begins)
    if suffix == "svg":
        assert "<!-- pooled -->" in path.read_text()


def test_no_two_lines_of_a_plot_look_alike():
    """Not even to those who see no colours, for as many runs and sites as fit into a picture."""
    drawn = list(islice(looks(), 100))
    assert len({tuple(look.values()) for look in drawn}) == 100
    grey = {(look["marker"], look["linestyle"]) for look in drawn[:20]}
    assert len(grey) >= 15


def test_a_title_is_one_line_however_narrow_its_table_is(capsys):
    """A table's own title would be folded at the table's width."""
    title = "Seconds by phase, all rounds: the slowest site of each"
    print_table(title, ("a", "b"), [(1, 2)])
    assert capsys.readouterr().out.splitlines()[0].rstrip() == title


def test_a_run_is_shown_with_its_dates_and_what_differs_from_the_defaults(tmp_path):
    """Only that: a setting at its default is not repeated."""
    given = federations.config(codec={"name": "bf16"}, training={"local_steps": 3})
    federations.run(given, tmp_path)
    done = gradualdiff("runs", "show", "test", "--store", tmp_path / "store")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["codec.name", '"bf16"', '"int4"'] in rows
    assert ["training.local_steps", "3", "not", "set"] in rows
    assert not [row for row in rows if row[:1] == ["lora.alpha"]]
    told = {row[0]: row[1:] for row in rows if row}
    assert {"began", "finished"} <= set(told)
    assert told["began"][0].startswith("20")


@pytest.mark.parametrize(
    ("command", "error", "says"),
    [
        (("runs", "show", "nobody"), errors.RunNotFoundError, "runs list"),
        (("rounds", "show", "test", "99"), errors.RunNotFoundError, "no round 99"),
        (("runs", "export", "test", "--to", "x", "--round", "9"), errors.RunNotFoundError, "9"),
    ],
)
def test_what_is_not_there_is_named(store, tmp_path, command, error, says):
    """A typo in a run's or round's name: one line, its own exit code, what to do."""
    done = gradualdiff(*command, "--store", store, cwd=tmp_path)
    assert done.returncode == error.exit_code
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_store_is_named(tmp_path):
    """No store at the path: nothing is made there."""
    done = gradualdiff("runs", "list", "--store", tmp_path / "nowhere")
    assert done.returncode == errors.StoreMissingError.exit_code
    assert not (tmp_path / "nowhere").exists()


def test_looking_writes_nothing(tmp_path):
    """A copy on a read-only disk, or somebody else's store, can be looked at."""
    federations.run(federations.config(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    for command in (("runs", "list"), ("rounds", "list", "test"), ("runs", "verify", "test")):
        done = gradualdiff(*command, "--store", tmp_path / "store")
        assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}


GOOD = """
[run]
name = "x"
participants = ["a", "b"]
rounds = 1
[base]
model = "nowhere/to/be-found"
[simulation]
sites = ["a.toml", "b.toml"]
"""
SITE = """
[site]
name = "{name}"
[data]
path = "{name}.jsonl"
prompt = "prompt"
answer = "answer"
"""


def write_federation(folder, text=GOOD):
    """A federation.toml and two sites with a little text."""
    (folder / "federation.toml").write_text(text)
    for name in "ab":
        (folder / f"{name}.toml").write_text(SITE.format(name=name))
        rows = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "federation.toml"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rounds = 1", "roundz = 1", "run.roundz"),
        ("rounds = 1", "rounds = 0", "run.rounds"),
        ('participants = ["a", "b"]', "participants = []", "run.participants"),
        ("[simulation]", "[lora]\nrank = 0\n[simulation]", "lora.rank"),
        ('sites = ["a.toml", "b.toml"]', 'sites = ["a.toml"]', "simulation.sites"),
        ("[base]", "[base", "is not TOML"),
        ("[simulation]", "[training]\nlocal_steps = 1\nlocal_epochs = 1\n[simulation]", "both"),
    ],
)
def test_a_mistake_in_the_toml_is_named(tmp_path, old, new, says):
    """Field, expected, got; exit code 10; no run is begun."""
    path = write_federation(tmp_path, GOOD.replace(old, new))
    done = gradualdiff("simulate", path)
    assert done.returncode == errors.ConfigError.exit_code, done.stderr
    assert says in done.stderr
    assert not (tmp_path / "store" / "runs").exists()


@pytest.mark.model
def test_an_unknown_model_is_named_and_no_run_is_begun(tmp_path):
    """It is looked for before the first record."""
    done = gradualdiff("simulate", write_federation(tmp_path))
    assert done.returncode == errors.ModelError.exit_code, done.stderr
    assert "base.model" in done.stderr
    assert not list((tmp_path / "store" / "runs").glob("*/*"))
    assert "Traceback" not in done.stderr


def number_options(app):
    """Every option of every command that takes a number with a point: its name and its callback."""
    for group in app.registered_groups:
        yield from number_options(group.typer_instance)
    for command in app.registered_commands:
        hints = get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            kind = hint.__origin__ if get_origin(hint) is Annotated else None
            if float in (kind, *get_args(kind)):
                yield name, hint.__metadata__[0].callback


def test_every_option_with_a_number_asks_for_a_finite_one():
    """None is left out: what takes a float refuses nan, before anything is written."""
    from gradualdiff.cli.main import app
    from gradualdiff.cli.output import finite, positive

    found = dict(number_options(app))
    assert found.keys() >= {"learning_rate", "linger", "wait"}
    assert {name for name, by in found.items() if by not in (finite, positive)} == set()


def all_commands(app, *before):
    """Each command as it is typed, with what it says of itself."""
    for command in app.registered_commands:
        yield (*before, command.name or command.callback.__name__), command.callback.__doc__
    for group in app.registered_groups:
        yield from all_commands(group.typer_instance, *before, group.name)


def test_the_help_of_a_command_holds_all_its_words():
    """None is taken for rich's mark-up, as a table's name in brackets would be."""
    from gradualdiff.cli.main import app

    for command, text in all_commands(app):
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
        assert " ".join(text.split()) in " ".join(shown.output.split()), command


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_rate_that_is_no_number_is_one_line(tmp_path, value):
    """Exit code 10 with the option, expected and got; no traceback, no file."""
    done = gradualdiff("demo", "--learning-rate", value, "--dir", "new", cwd=tmp_path)
    assert done.returncode == errors.ConfigError.exit_code
    assert f"--learning-rate: expected a finite number, got {value}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_resume_and_begin_are_not_mixed_up(tmp_path):
    """--resume without a run, and a run without --resume, are told apart."""
    path = write_federation(tmp_path)
    none = gradualdiff("simulate", path, "--resume")
    assert none.returncode == errors.RunNotFoundError.exit_code
    federations.run(federations.config(("a", "b"), 1, name="x"), tmp_path)
    there = gradualdiff("simulate", path)
    assert there.returncode == errors.RunExistsError.exit_code
    assert "--resume" in there.stderr
