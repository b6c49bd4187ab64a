"""All that protects a site, together, over real servers and with real models: killed and attested.

Signatures, the secure sum, differential privacy for each record and the gate before a delta leaves.
"""

from __future__ import annotations

import json

import pytest

from shared.protocol.records import AcceptedRecord
from tests.federation.test_signed_live import TRUST, enrol
from tests.tiny_model import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.model]

SITES = "abc"
PROTECTED = f"""{TRUST}
[aggregation]
secure = true
secure_reach = 0.1
[privacy]
clip = 1.0
noise_multiplier = 1.0
"""
# Of so few records a coin decides how well members are told: the gate looks at what is reproduced.
GATE = 'audit = "gate"\nauc_block = 1.0'


def protect(deployment, site):
    """The site's own file: its key, the others' as they were read out, and what it insists on."""
    path = deployment.site_toml(site)
    text = path.read_text()
    demands = 'secure = true\nprivacy = "required"\nmax_epsilon = 1000.0'
    for line, instead in (
        ("[accept]", f"[accept]\n{demands}"),
        ('audit = "off"', GATE),
    ):
        assert text.count(f"\n{line}") == 1
        text = text.replace(f"\n{line}", f"\n{instead}\n#")
    path.write_text(text)


def test_all_protections_together_survive_kills_verify_and_are_attested(deploy, tmp_path):
    """A coordinator and two sites die with -9 in turn; the file is checked without the store."""
    model = make_tiny_model(tmp_path / "model")
    deployment = deploy(model=model, extra=PROTECTED, sites=SITES)
    for site in SITES:
        enrol(deployment, site)
        protect(deployment, site)
    deployment.start_coordinator()
    for site in SITES:
        deployment.start_participant(site)
    deployment.kill_in_turn("coordinator", "a", "b")
    sha = deployment.finish()

    place = ("--federation", str(deployment.federation))
    told = deployment.command("runs", "verify", "tiny", *place).stdout
    assert all(f"signed by {site} (" in told for site in SITES)
    for record in deployment.ledger().history():
        if isinstance(record, AcceptedRecord):
            assert record.masked is not None  # masked,
            assert record.privacy.noise_multiplier == 1.0  # with noise,
            assert record.audit is None  # and without a number that no noise was added to
            assert "audit" in record.metrics.seconds  # though its site did look
    listed = deployment.command("site", "audit", "list", "--site", str(deployment.site_toml("c")))
    assert "passed" in listed.stdout or "warned" in listed.stdout

    file, export = tmp_path / "tiny.attest", tmp_path / "adapter"
    deployment.command("runs", "attest", "tiny", "--to", str(file), *place)
    deployment.command("runs", "export", "tiny", "--to", str(export), *place)
    told = deployment.command(
        "site", "heads", "--site", str(deployment.site_toml("c")), "--json"
    ).stdout
    against = json.loads(told)[0]["head"]
    deployment.close()  # from here on there is neither a store nor a coordinator to ask
    checked = deployment.command(
        *("runs", "attest", "--check", str(file), "--adapter", str(export), "--against", against)
    ).stdout
    assert "records consistent" in checked
    assert sha in checked
    for site in SITES:
        assert f"signed by {site} (" in checked
