"""A store on another file system than the coordinator's spool, as a mounted /data is."""

import tempfile
from pathlib import Path

from shared.stores.directory import DirectoryStore
from tests import federations


def test_a_store_on_another_file_system_ends_in_the_same_adapter(tmp_path):
    """Nothing can be linked between the two; what is copied is taken as what is stored."""
    config = federations.config(rounds=2)
    wanted = federations.run(config, tmp_path / "one")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "two").mkdir()
        assert Path(elsewhere).stat().st_dev != tmp_path.stat().st_dev
        store = DirectoryStore(Path(elsewhere) / "store")
        state = federations.run(config, tmp_path / "two", store=store)
    assert state.finished.sha == wanted.finished.sha
