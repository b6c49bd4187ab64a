"""Settings given beside a file: typed by the schema, and told as those of the file are."""

from __future__ import annotations

import pytest

from shared.config import load_federation
from shared.errors import ConfigError
from tests.shared.test_config import FEDERATION


@pytest.mark.parametrize(
    ("given", "table", "key", "value"),
    [
        ("lora.rank=8", "lora", "rank", 8),
        ("training.learning_rate = 1e-3", "training", "learning_rate", 1e-3),
        ("run.name=trial-2", "run", "name", "trial-2"),
        ('run.name="trial-2"', "run", "name", "trial-2"),
        ("run.name=2024", "run", "name", "2024"),
        ("base.model=hub/model=v2", "base", "model", "hub/model=v2"),
        ('run.participants=["site-a"]', "run", "participants", ("site-a",)),
        ("aggregation.clip_to_median=off", "aggregation", "clip_to_median", "off"),
        ("aggregation.clip_to_median=2", "aggregation", "clip_to_median", 2.0),
        ("training.gradient_checkpointing=true", "training", "gradient_checkpointing", True),
    ],
)
def test_a_setting_given_beside_the_file_is_used_instead(tmp_path, given, table, key, value):
    """Typed by what the setting takes: a TOML value, or text as it is. The last one counts."""
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION)
    config = load_federation(path, ["lora.rank=2", "run.name=other", given])
    assert getattr(getattr(config, table), key) == value
    assert config.recorded() != load_federation(path).recorded()


def test_an_entry_of_a_table_may_be_given_beside_the_file(tmp_path):
    """``lora.ranks`` is a table: one site's rank is given by its name."""
    (tmp_path / "federation.toml").write_text(FEDERATION)
    given = ["lora.ranks.site-a=8", "aggregation.averaging=svd"]
    assert load_federation(tmp_path / "federation.toml", given).lora.ranks == {"site-a": 8}


def test_a_mistake_given_beside_the_file_is_told_with_those_in_it(tmp_path):
    """The option, the setting, the name that was perhaps meant; and what the file has wrong."""
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION.replace('"models/base"', '"models/base"\nquantisation = "nf5"'))
    given = ["lora.rnak=8", "training.batch_size=none", "rank=8", "policy.kind=quorum"]
    with pytest.raises(ConfigError) as caught:
        load_federation(path, given)
    first, *lines = [line.strip() for line in str(caught.value).splitlines()]
    assert first == f"{path} with --set: 6 mistakes"
    assert lines[0].startswith("base.quantisation: expected 'nf4'")
    assert any(
        line.startswith("--set lora.rnak: ") and "did you mean rank?" in line for line in lines
    )
    assert "--set training.batch_size: expected a whole number, got 'none'" in lines
    assert any(
        line.startswith("--set rank: ") and "did you mean lora.rank?" in line for line in lines
    )
    assert sum('kind = "quorum" needs' in line for line in lines) == 2


@pytest.mark.parametrize("given", ["lora.rank", "lora.=8", "=8", ""])
def test_what_is_no_setting_is_told(tmp_path, given):
    """What was expected, what came, and an example."""
    (tmp_path / "federation.toml").write_text(FEDERATION)
    with pytest.raises(ConfigError, match=r"--set: expected SECTION\.KEY=VALUE, got "):
        load_federation(tmp_path / "federation.toml", [given])
