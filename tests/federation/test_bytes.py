"""What a site says it moved is what went over its connections."""

from coordinator.history import read_history
from coordinator.runs.comparison import gather
from coordinator.runs.wire import of_run
from gradualdiff.embedded.metering import Meter
from participant.traffic import Meter as SiteMeter
from participant.workspace import Workspace
from shared.protocol.manifest import Traffic
from shared.protocol.records import AcceptedRecord
from shared.stores.directory import DirectoryStore
from tests.federations import config, run

SHA = "a" * 64


def test_what_is_on_record_is_what_went_over_the_wire(tmp_path):
    """Every object is on record; of the messages all but those after a site's last word."""
    store, meter = DirectoryStore(tmp_path / "store"), Meter()
    run(config(), tmp_path, store=store, meter=meter)
    history = read_history(store, "test")
    wire = of_run(history)
    moved = [meter.of(site) for site in history.members]
    assert wire.total.down == sum(one.objects_down for one in moved) > 0
    assert wire.total.up == sum(one.objects_up for one in moved)
    assert wire.total.up == sum(record.size for record in history.accepted.values())
    up, down = sum(o.messages_up for o in moved), sum(o.messages_down for o in moved)
    assert 0.7 * up < wire.total.messages_up < up
    assert 0.7 * down < wire.total.messages_down <= down
    assert wire.turns == 9
    last = gather(history, "test").last
    told = sum(r.traffic.up + r.traffic.messages_up for r in history.accepted.values())
    assert last.up == told / 3


def test_a_kill_forgets_no_byte_and_a_refused_delta_is_told_with_the_next(tmp_path):
    """What was told counts once it is taken; another word of the same delta tells the same."""
    workspace = Workspace(tmp_path)
    workspace.begin("r", SHA)
    meter = SiteMeter(workspace)
    meter.run = "r"
    meter.sent(10)
    meter.heard("r", 3)
    assert meter.tell("r", SHA) == Traffic(up=10, messages_down=3)
    meter.sent(5)
    again = SiteMeter(workspace)
    assert again.tell("r", SHA) == Traffic(up=10, messages_down=3)
    again.answered("r", SHA, taken=False)
    assert again.tell("r", "b" * 64) == Traffic(up=15, messages_down=3)
    again.answered("r", "b" * 64, taken=True)
    assert SiteMeter(workspace).tell("r", "c" * 64) == Traffic()


def test_a_record_of_a_site_that_did_not_count_keeps_its_bytes(tmp_path):
    """Nothing is written where nothing was told."""
    store = DirectoryStore(tmp_path / "store")
    run(config(rounds=1), tmp_path, store=store)
    record = next(iter(read_history(store, "test").accepted.values()))
    old = {k: v for k, v in record.model_dump(mode="json").items() if k != "traffic"}
    assert AcceptedRecord.model_validate(old).model_dump(mode="json") == old
