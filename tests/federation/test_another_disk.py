"""A store on another file system than the coordinator's spool, as a mounted /data is."""

from shared.stores.directory import DirectoryStore
from tests import federations


def test_a_store_on_another_file_system_ends_in_the_same_adapter(tmp_path, elsewhere):
    """Nothing can be linked between the two; what is copied is taken as what is stored."""
    config = federations.config(rounds=2)
    wanted = federations.run(config, tmp_path / "one")
    (tmp_path / "two").mkdir()
    store = DirectoryStore(elsewhere / "store")
    state = federations.run(config, tmp_path / "two", store=store)
    assert state.finished.sha == wanted.finished.sha
