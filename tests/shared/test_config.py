"""federation.toml and site.toml: the paper's defaults, every mistake at once, one digest."""

from __future__ import annotations

import datetime as dt
import re

import pytest

from gradualdiff.reproduction.presets import Preset
from shared.config import (
    FederationConfig,
    SiteConfig,
    canonical_json,
    load_federation,
    load_site,
    parse,
)
from shared.config.mistakes import section_of
from shared.errors import ConfigError

FEDERATION = """
[run]
name = "trial-1"
participants = ["site-a", "site-b"]

[base]
model = "models/base"
"""

SITE = """
[site]
name = "site-a"

[data]
path = "letters.jsonl"
text = "body"
"""


def federation(**sections) -> FederationConfig:
    """A minimal federation; keyword arguments are further sections, run's merged."""
    values = {
        "run": {"name": "trial-1", "participants": ["site-a", "site-b"], **sections.pop("run", {})},
        "base": {"model": "models/base"},
        **sections,
    }
    return parse(FederationConfig, values, "test")


def site(**data) -> SiteConfig:
    """A minimal site with this data section."""
    return parse(SiteConfig, {"site": {"name": "site-a"}, "data": {"path": "x", **data}}, "test")


def test_two_short_files_are_enough(tmp_path):
    """What has no default is the run's name, its participants, the model and the site's text."""
    (tmp_path / "federation.toml").write_text(FEDERATION)
    (tmp_path / "site.toml").write_text(SITE)
    assert load_federation(tmp_path / "federation.toml") == federation()
    assert load_site(tmp_path / "site.toml").data.text == "body"


def test_the_defaults_are_the_papers():
    """arXiv:2506.19164, section IV."""
    config = federation()
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (64, 16.0, 0.1)
    assert config.lora.target_modules == "all-linear"
    assert config.base.quantisation == "nf4"
    assert config.run.rounds == 15
    training = config.training
    assert (training.batch_size, training.max_grad_norm) == (4, 0.3)
    assert (training.weight_decay, training.warmup_ratio) == (0.001, 0.03)
    assert training.learning_rate in {1e-5, 3e-5, 5e-5, 8e-5, 1e-4}
    assert (config.aggregation.weights, config.policy.kind) == ("equal", "all")
    assert config.selection.method == "all"


def test_every_mistake_is_told_at_once():
    """Each on its line: field, what was expected, what came; the source in front."""
    with pytest.raises(ConfigError) as caught:
        federation(
            run={"name": "Trial 1", "rounds": 0},
            lora={"rnak": 8},
            training={"learning_rate": "fast"},
            codec={"name": "ZIP"},
        )
    first, *lines = str(caught.value).splitlines()
    assert first == "test: 5 mistakes"
    assert [line.split(":")[0].strip() for line in lines] == [
        "run.name",
        "run.rounds",
        "lora.rnak",
        "training.learning_rate",
        "codec.name",
    ]
    assert "'Trial 1'" in lines[0]
    assert "did you mean rank?" in lines[2]
    assert "'fast'" in lines[3]


def test_what_goes_wrong_together_is_told_beside_what_is_wrong_alone():
    """A bad number hides neither another table's misfit nor that of its own."""
    with pytest.raises(ConfigError) as caught:
        federation(
            run={"rounds": 0, "participants": ["a", "a", "any"], "min_participants": 4},
            policy={"kind": "quorum", "max_attempts": 0, "buffer": 2},
            aggregation={"averaging": "svd", "rule": "median"},
            training={"optimizer_state": "keep"},
            lora={"ranks": {"z": 8}},
        )
    text = str(caught.value)
    for said in (
        "run.rounds: expected 1 or more, got 0",
        "policy.max_attempts: expected 1 or more, got 0",
        "run.participants names a participant twice",
        "any is a reserved name",
        "run.min_participants is 4",
        'policy: kind = "quorum" needs quorum',
        'policy: kind = "quorum" needs deadline_seconds',
        "policy: buffer goes with",
        'aggregation.rule = "median" takes values one by one',
        'training.optimizer_state = "keep"',
        "lora.ranks: expected sites",
    ):
        assert said in text
    assert text.startswith("test: 11 mistakes\n")


@pytest.mark.parametrize(
    "sections",
    [
        {"policy": {"kind": "quorum", "quorum": "two", "deadline_seconds": 5}},
        {"policy": {"kind": "quorum", "qourum": 2, "deadline_seconds": 5}},
        {"run": {"min_participants": 3, "participants": "ab"}},
        {"selection": {"fraction": 0.5, "methd": "random"}},
    ],
)
def test_a_mistake_is_not_told_twice(sections):
    """What follows from a value that could not be read is not known, and not told."""
    with pytest.raises(ConfigError, match="test: 1 mistake\n"):
        federation(**sections)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"lora": {"rnak": 8}}, "lora.rnak: expected a known setting, .*; did you mean rank"),
        ({"training": {"rank": 8}}, "training.rank: expected .*; did you mean lora.rank"),
        ({"codec": {"kind": "int8"}}, r"codec.kind: .*; .*\[codec\] takes name"),
        ({"trainig": {}}, "trainig: .*did you mean training"),
        ({"base": {"model": "m", "quantisation": "n4f"}}, "'int8' or 'none', got 'n4f'; .*nf4"),
        ({"lora": {"target_modules": "all_linear"}}, "'all-linear' or a list, .*mean all-linear"),
        ({"lora": {"target_modules": ["q", 3]}}, r"target_modules: entry 2: expected text, got 3"),
        ({"run": {"participants": ["a", "B"]}}, "participants: entry 2: expected a-z, .*'B'"),
        ({"lora": {"ranks": {"site-a": 0}}}, "lora.ranks: site-a: expected 1 or more, got 0"),
        ({"run": {"participants": []}}, "a list with at least one entry, got"),
        ({"aggregation": {"clip_to_median": 0.5}}, "clip_to_median: .*1.0 or more or 'off', got"),
        ({"training": {"gradient_checkpointing": "perhaps"}}, "true or false, got 'perhaps'"),
    ],
)
def test_a_mistake_says_what_was_perhaps_meant(sections, says):
    """An unknown name, a wrong choice, an entry of a list: the nearest that there is."""
    with pytest.raises(ConfigError, match=says):
        federation(**sections)


WRONG = (
    None, True, -1, 0, 2**70, 1e400, float("nan"), 0.5, "", "x", "A b", [], [3], [[]], {}, {"a": 1},
    {"A b": "c"}, dt.date(2026, 1, 1),
)  # fmt: skip
WORDS_OF_PYDANTIC = re.compile(r"[Ii]nput|Tuple|tuple|[Vv]alid |Value error|should|instance")


@pytest.mark.parametrize("kind", [FederationConfig, SiteConfig, Preset])
def test_no_wrong_value_is_told_in_another_librarys_words(kind):
    """Each setting with each kind of wrong value: its name, expected, got, on one line."""
    told = 0
    for table, field in kind.model_fields.items():
        section = section_of(field.annotation)
        for name in section.model_fields if section else ():
            for value in WRONG:
                try:
                    parse(kind, {table: {name: value}}, "test")
                except ConfigError as error:
                    lines = [line for line in str(error).splitlines() if f"{table}.{name}:" in line]
                    told += bool(lines)
                    for line in lines:
                        assert "expected" in line
                        assert not WORDS_OF_PYDANTIC.search(line.partition(", got")[0]), line
    assert told > 50


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (
            FederationConfig,
            {"run": {"name": "a", "participants": ["b"]}},
            'base: expected a table, got nothing; add [base] with model = "..."',
        ),
        (
            FederationConfig,
            {"base": {"model": "m"}},
            'run: expected a table, got nothing; add [run] with name = "...", participants = [...]',
        ),
        (
            SiteConfig,
            {"site": {}, "data": {"path": "x", "text": "t"}},
            'site.name: expected a value, got nothing; add name = "..."',
        ),
    ],
)
def test_what_is_missing_is_named_with_the_least_to_write(kind, values, says):
    """A table by its brackets and what it cannot be without; one mistake is called one."""
    with pytest.raises(ConfigError) as caught:
        parse(kind, values, "test")
    assert str(caught.value).splitlines() == ["test: 1 mistake", f"  {says}"]


def test_a_long_value_is_not_printed_whole():
    """A pasted page does not fill the screen."""
    with pytest.raises(ConfigError) as caught:
        federation(training={"learning_rate": "x" * 10_000})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"run": {"participants": ["a", "b", "a"]}}, "run.participants names a participant twice"),
        ({"run": {"participants": []}}, "run.participants"),
        ({"run": {"participants": ["a", "any"]}}, "run.participants: any is a reserved name"),
        ({"run": {"participants": ["coordinator"]}}, "coordinator is a reserved name"),
        ({"run": {"name": "any"}}, "run.name: any is a reserved name"),
        ({"run": {"name": "a.b"}}, "run.name: expected a-z, 0-9 and dashes"),
        ({"run": {"name": "a\n"}}, "run.name: expected a-z, 0-9 and dashes"),
        ({"run": {"name": "a" * 41}}, "run.name: expected a-z, 0-9 and dashes"),
        ({"run": {"min_participants": 3}}, "run.min_participants is 3.*lists 2"),
        ({"run": {"seed": -1}}, "run.seed"),
        ({"run": {"seed": 2**63}}, "run.seed"),
        ({"selection": {"fraction": 0.5}}, 'selection: fraction needs method = "random"'),
        ({"selection": {"method": "random", "fraction": 0.0}}, "selection.fraction"),
        ({"training": {"local_steps": 1, "local_epochs": 1}}, "training: local_steps and local_ep"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"base": {"model": ""}}, "base.model"),
        (
            {"base": {"model": "m", "fingerprint": "ABC"}},
            "base.fingerprint: expected 64 hex digits",
        ),
        ({"unknown": {}}, "unknown: expected a known setting"),
    ],
)
def test_a_federation_that_cannot_be_is_refused(sections, says):
    """By a message that names the field, or both where two do not fit together."""
    with pytest.raises(ConfigError, match=says):
        federation(**sections)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, r"exactly one of.*got none"),
        ({"text": "t", "messages": "m"}, r"exactly one of.*got messages, text"),
        ({"prompt": "p"}, "prompt and answer go together"),
        ({"answer": "a"}, "prompt and answer go together"),
        ({"text": "t", "held_out_fraction": 1.0}, "held_out_fraction"),
        ({"text": "t", "format": "xml"}, "format"),
    ],
)
def test_a_site_that_cannot_be_is_refused(data, says):
    """Exactly one way to read the text."""
    with pytest.raises(ConfigError, match=f"data.*{says}"):
        site(**data)


@pytest.mark.parametrize("data", [{"messages": "m"}, {"prompt": "p", "answer": "a"}, {"text": "t"}])
def test_each_way_to_read_text_is_enough(data):
    """One at a time."""
    assert site(**data).data.path == "x"


@pytest.mark.parametrize(
    ("given", "steps", "epochs"),
    [({}, None, 1), ({"local_steps": 7}, 7, None), ({"local_epochs": 2}, None, 2)],
)
def test_local_training_lasts_one_epoch_unless_said(given, steps, epochs):
    """Exactly one of steps and epochs is set in the resolved config."""
    training = federation(training=given).training
    assert (training.local_steps, training.local_epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"[run\n", "is not TOML")],
)
@pytest.mark.parametrize("load", [load_federation, load_site])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, says, load):
    """ConfigError with the path, for a missing, a binary and a torn file."""
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}: {says}"):
        load(path)


# The digest ----------


def test_the_recorded_config_reads_back_with_the_same_digest():
    """What the ledger keeps is enough to resume, through JSON, with every default resolved."""
    config = federation(
        run={"seed": 2**63 - 1},
        lora={"target_modules": ["q_proj", "v_proj"]},
        training={"local_steps": 3},
        aggregation={"max_delta_norm": 0.1},
    )
    again = FederationConfig.from_record(config.recorded(), "ledger")
    assert again.digest == config.digest
    assert again == config


def test_where_things_lie_on_this_machine_is_not_in_the_digest():
    """A run may be resumed from another folder."""
    moved = federation(store={"directory": "/else/where"}, simulation={"sites": ["a.toml"]})
    assert moved.digest == federation().digest


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"seed": 2}},
        {"run": {"participants": ["site-b", "site-a"]}},
        {"base": {"model": "models/base", "quantisation": "none"}},
        {"lora": {"rank": 8}},
        {"training": {"learning_rate": 1e-4}},
        {"policy": {"on_failure": "exclude"}},
        {"aggregation": {"weights": "tokens"}},
        {"codec": {"name": "bf16"}},
    ],
)
def test_what_can_change_the_result_changes_the_digest(sections):
    """A run is not resumed under another config."""
    assert federation(**sections).digest != federation().digest


def test_the_digest_is_of_canonical_json():
    """Order of keys, spaces and escapes do not matter; NaN is refused."""
    assert canonical_json({"b": [1, 0.5], "a": "ä"}) == '{"a":"ä","b":[1,0.5]}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


FIVE = {"participants": ["a", "b", "c", "d", "e"]}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({}, r"needs at least 5 deltas in every round \(2 x 1 \+ 3\), .*participants lists 4"),
        ({"run": FIVE, "aggregation": {"assumed_bad": 2}}, r"at least 7 .*\(2 x 2 \+ 3\)"),
        (
            {"aggregation": {"rule": "trimmed-mean", "assumed_bad": 2}},
            r"at least 5 .*\(2 x 2 \+ 1\), .*participants lists 4",
        ),
        (
            {"run": {"participants": ["a", "b"]}, "aggregation": {"rule": "median"}},
            r"at least 3 .*\(3\), .*participants lists 2",
        ),
        ({"run": {**FIVE, "min_participants": 4}}, "run.min_participants is 4"),
        (
            {"run": FIVE, "selection": {"method": "random", "fraction": 0.8}},
            "selection.fraction takes 0.8 of 5",
        ),
        (
            {"run": FIVE, "policy": {"kind": "quorum", "quorum": 4, "deadline_seconds": 9.0}},
            "policy.quorum is 4",
        ),
        (
            {
                "run": FIVE,
                "policy": {"kind": "quorum", "quorum": 5, "deadline_seconds": 9.0, "late": "carry"},
            },
            'policy.late = "carry" does not go with .*one vote',
        ),
        (
            {"run": FIVE, "policy": {"kind": "buffered", "buffer": 5}},
            'policy.kind = "buffered" does not go with .*one vote',
        ),
        ({"run": FIVE, "aggregation": {"weights": "examples"}}, 'expected "equal" .*"examples"'),
        ({"run": FIVE, "aggregation": {"averaging": "svd"}}, "takes values one by one, but .*svd"),
    ],
)
def test_a_robust_rule_that_cannot_work_is_named(sections, says):
    """Too few deltas in some round, or deltas that are not one vote each: the rule and why."""
    run = sections.get("run", {"participants": ["a", "b", "c", "d"]})
    aggregation = {"rule": "multi-krum", **sections.get("aggregation", {})}
    with pytest.raises(ConfigError, match=says) as caught:
        federation(**{**sections, "run": run, "aggregation": aggregation})
    assert f'"{aggregation["rule"]}"' in str(caught.value)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "multi-krum"])
@pytest.mark.parametrize("averaging", ["fedavg", "ffa", "rolora"])
def test_robust_rules_go_with_five_sites_and_what_averages_factors(rule, averaging):
    """What is refused is no more than cannot work."""
    aggregation = {"rule": rule, "averaging": averaging}
    quorum = {"kind": "quorum", "quorum": 5, "deadline_seconds": 9.0}
    assert federation(run=FIVE, aggregation=aggregation, policy=quorum)
    # ceil(0.9 x 5) is all of them.
    assert federation(
        run=FIVE, aggregation=aggregation, selection={"method": "random", "fraction": 0.9}
    )


@pytest.mark.parametrize("name", ["rounds", "unknown"])
def test_a_config_is_frozen(name):
    """Nobody alters it on the way."""
    with pytest.raises(ValueError, match="frozen"):
        setattr(federation().run, name, 3)


def test_a_record_of_before_a_setting_keeps_its_meaning_and_its_digest():
    """An upgrade neither clips the deltas of an older run nor doubts its record."""
    plain = federation(aggregation={"clip_to_median": "off"})
    recorded = plain.recorded()
    assert "server" not in recorded
    assert recorded["aggregation"] == {"weights": "equal", "max_delta_norm": None}
    again = FederationConfig.from_record(recorded, "ledger")
    assert again.aggregation.clip_to_median == "off"
    assert again.digest == plain.digest
    clipped = federation()
    assert clipped.recorded()["aggregation"]["clip_to_median"] == 3.0
    assert FederationConfig.from_record(clipped.recorded(), "ledger") == clipped
    with pytest.raises(ConfigError, match="aggregation"):
        FederationConfig.from_record({**recorded, "aggregation": 3}, "ledger")


def test_every_setting_that_leaves_a_rule_too_few_deltas_is_named():
    """Whoever raises one of them is not told of the next one then."""
    with pytest.raises(ConfigError) as caught:
        federation(
            run={"participants": ["a", "b", "c", "d", "e", "f"], "min_participants": 4},
            aggregation={"rule": "multi-krum"},
            policy={"kind": "quorum", "quorum": 3, "deadline_seconds": 60},
        )
    assert "but run.min_participants is 4 and policy.quorum is 3; raise" in str(caught.value)
    assert "run.participants lists" not in str(caught.value)


def test_half_a_mapping_hides_no_second_one():
    """A prompt without an answer, beside a text: both are told."""
    with pytest.raises(ConfigError) as caught:
        site(prompt="question", text="body")
    assert "prompt and answer go together" in str(caught.value)
    assert "give exactly one of: messages; prompt and answer; text (got prompt, text)" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match=r"^test: 1 mistake\n.*go together"):
        site(answer="reply")


def test_an_unknown_codec_is_told_with_the_other_mistakes():
    """A misspelt codec is named with those there are, before a run can begin."""
    with pytest.raises(ConfigError) as caught:
        federation(run={"min_participants": 3}, codec={"name": "fp23"})
    first, codec, participants = str(caught.value).splitlines()
    assert first == "test: 2 mistakes"
    assert codec.strip().startswith("codec.name: expected 'bf16', 'fp32'")
    assert codec.endswith("got 'fp23'; did you mean fp32?")
    assert "run.min_participants is 3" in participants
