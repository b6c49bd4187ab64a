"""Modes of other packages: what they are, and every way in which one does not work."""

from __future__ import annotations

import sys

import pytest

from shared import modes
from shared.config import FederationConfig, parse
from shared.errors import ConfigError, ForeignPackageError, MissingPackageError
from shared.stores.directory import DirectoryStore
from tests import federations
from tests.extension.installing import install

VALUE = {"averaging": {"toy": "toy_mode:MODE"}}
CODE = "from shared.methods.averaging import Averaging\nMODE = Averaging()\n"


def test_a_mode_of_another_package_is_found_by_its_name(packages):
    """Its package and version are told without importing it."""
    (packages / "toy_mode.py").write_text(CODE)
    install(packages, VALUE)
    own = ("fedavg", "ffa", "flora", "range-finder", "rolora", "svd")
    assert modes.names("averaging") == (*own, "toy")
    where = modes.origin("averaging", "toy")
    assert str(where) == "averaging.toy of toy-modes 1.0"
    assert "toy_mode" not in sys.modules
    assert modes.get("averaging", "toy") is sys.modules["toy_mode"].MODE


def test_settings_may_name_it(packages):
    """As they name a built-in one; without the package it is a mistake like any other."""
    values = federations.config().recorded()
    values["aggregation"] = {"averaging": "toy"}
    with pytest.raises(ConfigError, match=r"aggregation.averaging: expected .*got 'toy'"):
        parse(FederationConfig, values, "file")
    (packages / "toy_mode.py").write_text(CODE)
    install(packages, VALUE)
    config = parse(FederationConfig, values, "file")
    assert list(map(str, modes.origins(config))) == ["averaging.toy of toy-modes 1.0"]
    assert modes.origins(federations.config()) == ()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, r"expected broken_mode:MODE to be imported, got ModuleNotFoundError"),
        ("MODE = 1 / 0", r"expected broken_mode:MODE to be imported, got ZeroDivisionError"),
        ("", r"expected broken_mode:MODE to be imported, got AttributeError"),
        ("class MODE: pass", r"expected a value, got the class MODE; offer an instance of it"),
        ("MODE = 1", r"expected all that Codec in shared.tensors.codecs has, .* decode, encode"),
    ],
)
def test_one_that_does_not_work_is_told_by_package_and_entry_point(packages, code, said):
    """And what to do. The other modes work."""
    if code is not None:
        (packages / "broken_mode.py").write_text(code)
    install(packages, {"codecs": {"toy": "broken_mode:MODE"}})
    named = r"toy-modes 1\.0 \(entry point 'toy' of gradualdiff\.codecs\): "
    with pytest.raises(ForeignPackageError, match=named + said):
        modes.get("codecs", "toy")
    assert modes.get("codecs", "fp32").name == "fp32"


def test_no_run_begins_with_one_that_does_not_work(packages, tmp_path):
    """A codec is needed when settings are read, to say what it does not go with."""
    (packages / "broken_mode.py").write_text("MODE = 1")
    install(packages, {"codecs": {"toy": "broken_mode:MODE"}})
    with pytest.raises(ForeignPackageError, match=r"toy-modes 1\.0"):
        federations.run(federations.config(codec={"name": "toy"}), tmp_path)
    assert list(DirectoryStore(tmp_path / "store").list("runs/")) == []


def test_a_name_that_is_taken_is_told(packages):
    """Of a built-in mode, or of another package's: nobody has to guess which one ran."""
    install(packages, {"averaging": {"fedavg": "a:MODE", "toy": "a:MODE"}})
    install(packages, {"averaging": {"toy": "b:MODE"}}, "more-modes", "2.0")
    for name, said in (("fedavg", "toy-modes 1.0 .*built in"), ("toy", "more-modes 2.0")):
        with pytest.raises(ForeignPackageError, match=f"expected one mode called '{name}'.*{said}"):
            modes.get("averaging", name)


def test_what_a_record_names_and_is_not_here_is_told_by_name(packages):
    """Missing, or of another version."""
    install(packages, VALUE)
    (wanted,) = [modes.origin("averaging", "toy")]
    modes.require([wanted], "run x")
    other = wanted.model_copy(update={"version": "2.0"})
    gone = wanted.model_copy(update={"name": "gone"})
    with pytest.raises(MissingPackageError) as caught:
        modes.require([other, gone], "run x")
    assert str(caught.value) == (
        "run x: expected averaging.toy of toy-modes 2.0, got averaging.toy of toy-modes 1.0; "
        "install toy-modes==2.0 here; averaging.gone of toy-modes 1.0 is not installed; "
        "install toy-modes==1.0 here"
    )
