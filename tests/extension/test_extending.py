"""Each mode of docs/how-to/extend.md in whole federations: run, killed, verified, branched."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from coordinator.announcing import announcement
from coordinator.history import read_history
from coordinator.runs.branching import branch_run
from coordinator.runs.export import export_adapter
from coordinator.runs.inspection import summarise_runs
from coordinator.runs.operating import operator_ledger
from participant.acceptance import objections
from shared import modes
from shared.errors import ConfigError, ForeignPackageError, MissingPackageError, RunStuckError
from shared.protocol import wire
from shared.protocol.records import ClosedRecord, ClosingRecord, FederationRecord
from tests import federations
from tests.extension.installing import install, uninstall
from tests.extension.page import PROJECT, SECTIONS, install_page, settings
from tests.numpy_learner import ANYTHING
from tests.steering import records, store_of, verify

KILLED = textwrap.dedent(
    """
    import os, pathlib, signal, sys
    from tests import federations
    from tests.extension.page import settings
    config = federations.config(**settings(sys.argv[2]))
    sites = federations.learners(config)
    def die(task):
        if task.round == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    sites["b"].fault = die
    federations.run(config, pathlib.Path(sys.argv[1]), sites)
    """
)


@pytest.fixture(params=SECTIONS)
def title(request, packages):
    """A section whose mode is installed."""
    install_page(packages)
    return request.param


def named(config):
    """Kind and name of each mode that is not built in."""
    return [f"{one.kind}.{one.name}" for one in modes.origins(config)]


def test_a_killed_run_resumes_to_the_same_adapter_and_verifies(title, tmp_path):
    """The mode, its version and its package are on record. The process is really killed."""
    config = federations.config(**settings(title))
    wanted = federations.run(config, tmp_path / "whole").adapter_sha
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(folder), title]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(records(folder, ClosedRecord)) == 1
    assert federations.run(config, folder).adapter_sha == wanted
    (first,) = records(folder, FederationRecord)
    (mode,) = first.modes
    assert (mode.distribution, mode.version) == (PROJECT["name"], PROJECT["version"])
    found = verify(folder)
    assert (found.findings, found.rounds) == ([], 3)


def test_a_run_is_exported_and_branched(title, tmp_path):
    """The branch begins with its adapter and ends in a verified one of its own."""
    federations.run(federations.config(**settings(title)), tmp_path)
    store = store_of(tmp_path)
    exported = export_adapter(read_history(store, "test"), store, tmp_path / "out", None, "base")
    parent, child = (operator_ledger(store, run, lambda: 1.0) for run in ("test", "new"))
    assert branch_run(parent, 3, child).adapter_sha == exported.sha
    federations.run(federations.config(name="new", **settings(title)), tmp_path)
    found = verify(tmp_path, "new")
    assert (found.findings, found.rounds) == ([], 3)


def test_a_mode_changes_what_it_is_for(packages, tmp_path):
    """Each ends in another adapter."""
    install_page(packages)
    ends = [
        federations.run(federations.config(**given), tmp_path / str(number)).adapter_sha
        for number, given in enumerate(({}, *map(settings, SECTIONS)))
    ]
    assert len(set(ends)) == 5


def test_a_rule_takes_part_in_what_settings_refuse(packages):
    """Its own number of deltas, in its own words."""
    install_page(packages)
    given = {"rule": "winsorized-mean", "assumed_bad": 2}
    said = r"assumed_bad = 2 needs at least 5 deltas in every round \(2 x 2 \+ 1\), .* lists 3"
    with pytest.raises(ConfigError, match=said):
        federations.config(aggregation=given)
    with pytest.raises(ConfigError, match=r'expected "equal" with .*winsorized-mean'):
        federations.config(("a", "b", "c"), aggregation={**given, "weights": "examples"})


def test_a_policy_takes_part_in_what_settings_refuse(packages):
    """What it needs, and what it has no use for."""
    install_page(packages)
    with pytest.raises(ConfigError, match='kind = "first" needs quorum; add it'):
        federations.config(policy={"kind": "first"})
    given = {"kind": "first", "quorum": 4, "late": "carry"}
    with pytest.raises(ConfigError, match='late goes with kind = "quorum", got kind = "first"'):
        federations.config(policy=given)
    with pytest.raises(ConfigError, match=r"policy.quorum is 4, but run.participants lists 3"):
        federations.config(policy={**given, "late": "drop"})
    with pytest.raises(ConfigError, match='quorum goes with kind = "first" or "quorum", got'):
        federations.config(policy={"quorum": 2})


def test_a_policy_decides_and_its_decisions_are_audited(packages, tmp_path):
    """Two of three count; a decision that counts fewer than the policy asks for is found."""
    install_page(packages)
    federations.run(federations.config(**settings("A round policy")), tmp_path)
    closings = records(tmp_path, ClosingRecord)
    assert [len(closing.inputs) for closing in closings] == [2, 2, 2]
    assert {why for c in closings for why in c.excluded.values()} == {"not among the first 2"}
    store, key = store_of(tmp_path), closings[0].key("test")
    altered = json.loads(store.get(key))
    altered["inputs"] = altered["inputs"][:1]
    store.put(key, json.dumps(altered).encode())
    found = [finding.problem for finding in verify(tmp_path).findings if finding.key == key]
    assert "inputs: expected the first 2, got 1" in found


SPOILED = {  # what is replaced in the page's code, and what by
    "A codec": ("parts[0].astype(np.float32)", "parts[0][:1] * 1.0", "expected float32"),
    "An averaging mode": ("+ step).astype", "+ step * np.nan).astype", "expected finite values"),
    "A rule": ("mean_of_sorted(rows", "1 / 0; mean_of_sorted(rows", "ZeroDivisionError"),
    "A round policy": ("fresh = fresh_deltas", "1 / 0; fresh = fresh_deltas", "ZeroDivisionError"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_a_mode_that_fails_at_work_is_told_by_package_and_harms_no_run(
    spoiled, packages, tmp_path, monkeypatch
):
    """Nor ends "runs verify" in a traceback; with the mended mode the run goes on.

    Without error feedback, by which a site would meet a codec's fault before the coordinator does.
    """
    install_page(packages)
    tables = settings(spoiled)
    tables["codec"] = {**tables.get("codec", {}), "feedback": False}
    config = federations.config(**tables)
    (origin,) = modes.origins(config)
    (file,) = re.findall(r"`(toy_\w+\.py)`:", SECTIONS[spoiled])
    good, (here, broken, said) = (packages / file).read_text(), SPOILED[spoiled]
    bad = good.replace(here, broken)
    told = rf"toy-modes 1\.0 \(entry point '{origin.name}'.*{said}"

    def use(code):
        mode = modes.get(origin.kind, origin.name)
        scope = {}
        exec(compile(code, file, "exec"), scope)
        monkeypatch.setattr(mode, "__class__", type(scope["MODE"]))

    use(bad)
    with pytest.raises(ForeignPackageError, match=told):
        federations.run(config, tmp_path)
    use(good)
    federations.run(config, tmp_path)
    assert verify(tmp_path).findings == []
    if spoiled != "A round policy":  # audit has no fault here
        use(bad)
        with pytest.raises(ForeignPackageError, match=told):
            verify(tmp_path)


def test_a_codec_that_fails_at_a_site_is_told_by_package(packages, tmp_path):
    """With error feedback a site decodes what it sends; the run waits for it with the reason."""
    install_page(packages)
    here, broken, _ = SPOILED["A codec"]
    (packages / "toy_codec.py").write_text(
        (packages / "toy_codec.py").read_text().replace(here, broken)
    )
    with pytest.raises(RunStuckError, match=r"toy-modes 1\.0 \(entry point 'fp16'"):
        federations.run(federations.config(**settings("A codec")), tmp_path)


def test_of_two_packages_the_one_that_failed_is_told(packages, tmp_path):
    """A rule and a server optimiser of other packages: each answers for its own code only."""
    install_page(packages)
    (packages / "stuck.py").write_text(
        "from shared.methods.server_optimizers import ServerOptimizer\n"
        "class Stuck(ServerOptimizer):\n"
        "    rows = 1\n"
        "    def step(self, section, delta, state, room, /):\n"
        "        1 / 0\n"
        "MODE = Stuck()\n"
    )
    install(packages, {"server_optimizers": {"stuck": "stuck:MODE"}}, "stuck-steps")
    config = federations.config(**settings("A rule"), server={"optimizer": "stuck"})
    said = r"stuck-steps 1\.0 \(entry point 'stuck' of gradualdiff.server_optimizers\)"
    with pytest.raises(ForeignPackageError, match=said):
        federations.run(config, tmp_path)


def test_without_the_package_the_mode_is_told_by_name(title, packages, tmp_path):
    """To whoever verifies, exports or resumes: not as damage, and not in a traceback."""
    config = federations.config(**settings(title))
    federations.run(config, tmp_path)
    (name,) = named(config)
    uninstall(packages)
    said = rf"run test: {name} of toy-modes 1\.0 is not installed; install toy-modes==1\.0"
    with pytest.raises(MissingPackageError, match=said):
        verify(tmp_path)
    (listed,) = summarise_runs(store_of(tmp_path))
    assert listed.state == "needs a package"
    assert re.search(said, listed.reason)
    store = ("--store", str(tmp_path / "store"))
    done = run_command("runs", "verify", "test", *store)
    assert done.returncode == MissingPackageError.exit_code
    assert f"{name} of toy-modes 1.0 is not installed" in " ".join(done.stderr.split())


def test_an_export_without_the_averaging_mode_says_its_name(packages, tmp_path):
    """What an adapter of it looks like, only the mode knows."""
    install_page(packages)
    federations.run(federations.config(**settings("An averaging mode")), tmp_path)
    uninstall(packages)
    options = ("--to", str(tmp_path / "out"), "--store", str(tmp_path / "store"))
    done = run_command("runs", "export", "test", *options)
    assert done.returncode == MissingPackageError.exit_code
    assert "averaging.elected of toy-modes 1.0 is not installed" in " ".join(done.stderr.split())


def test_another_version_is_told(title, packages, tmp_path):
    """Neither resumed nor verified by other code."""
    config = federations.config(**settings(title))
    federations.run(config, tmp_path)
    install_page(packages, "2.0")
    said = rf"expected {named(config)[0]} of toy-modes 1\.0, got .* 2\.0; install toy-modes==1\.0"
    with pytest.raises(MissingPackageError, match=said):
        verify(tmp_path)
    with pytest.raises(MissingPackageError, match=said):
        federations.run(config, tmp_path)


def test_a_mode_that_was_struck_from_the_record_is_found(title, tmp_path):
    """Whatever the settings name and this project does not bring is to be on record."""
    config = federations.config(**settings(title))
    federations.run(config, tmp_path)
    store, key = store_of(tmp_path), "runs/test/federation.json"
    values = json.loads(store.get(key))
    del values["modes"]
    store.put(key, json.dumps(values).encode())
    (found,) = verify(tmp_path).findings
    assert (found.key, found.problem) == (
        key,
        f"modes: expected {modes.origins(config)[0]}, got none",
    )


def test_a_run_of_built_in_modes_has_no_word_of_them_on_record(tmp_path):
    """Its records are what they were before there were others."""
    federations.run(federations.config(), tmp_path)
    assert b"modes" not in store_of(tmp_path).get("runs/test/federation.json")


@pytest.mark.parametrize("kind", ["codecs", "averaging"])
def test_a_site_takes_part_only_where_it_names_the_mode(kind, packages, tmp_path):
    """Otherwise it declines, and says which it is."""
    install_page(packages)
    given = {"codecs": "A codec", "averaging": "An averaging mode"}[kind]
    config = federations.config(**settings(given))
    (name,) = named(config)
    said = f"accept.modes: expected no mode of another package, got {name} of toy-modes 1.0"
    with pytest.raises(RunStuckError, match=said):
        federations.run(config, tmp_path / "declined", accept=ANYTHING)
    willing = ANYTHING.model_copy(update={"modes": (name,)})
    federations.run(config, tmp_path / "willing", accept=willing)
    assert verify(tmp_path / "willing").findings == []


def test_a_site_that_lacks_the_mode_declines_by_name(packages):
    """Or has another version, or is asked in a round for one that was not announced."""
    install_page(packages)
    config = federations.config(**settings("An averaging mode"), **settings("A codec"))
    announced = announcement(config, "a")
    assert [str(mode) for mode in announced.modes] == [
        "averaging.elected of toy-modes 1.0",
        "codecs.fp16 of toy-modes 1.0",
    ]
    accept = ANYTHING.model_copy(update={"modes": ("averaging.elected", "codecs.fp16")})
    assert objections(announced, accept) == ""
    install_page(packages, "2.0")
    said = objections(announced, accept)
    assert "expected codecs.fp16 of toy-modes 1.0, got codecs.fp16 of toy-modes 2.0" in said
    uninstall(packages)
    there = wire.decode(wire.encode(announced, 1.0)).event
    assert there == announced
    said = objections(there, accept)
    assert "averaging.elected of toy-modes 1.0 is not installed; install toy-modes==1.0" in said
    hidden = announced.model_copy(update={"modes": ()})
    said = objections(hidden, accept)
    assert "aggregation.averaging: expected a built-in mode, or one that the run" in said


def run_command(*arguments):
    """``gradualdiff`` in a process of its own."""
    command = [sys.executable, "-m", "gradualdiff", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
