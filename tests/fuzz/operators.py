"""What an operator's commands read from outside: the broker's answers, accounts, status, keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from coordinator.accounts.broker_administration import ManagementAdmin
from coordinator.accounts.site_accounts import SiteAccount, list_accounts
from coordinator.liveness import read_status
from shared.config import canonical_json
from shared.trust.keys import PublicKey, SigningKey

if TYPE_CHECKING:
    from pathlib import Path

ANSWERS = [b'[{"name":"a"},{"name":"b"}]', b'{"messages_unacknowledged":3}', b'{"reason":"no"}']
ACCOUNT = SiteAccount(
    site="a", version=1, state="active", password_hash="h" * 48, created=1.0, changed=1.0
)
ACCOUNTS = [canonical_json(ACCOUNT.model_dump(mode="json"))]
STATUS = [b'{"at":5.5,"sites":{"a":{"seen":5.0}},"absent":["b"]}']
KEYS = [SigningKey.generate().public.text.encode()]


class Answering:
    """The pool of connections: every request gets this."""

    def __init__(self, status: int, data: bytes) -> None:
        self._answer = SimpleNamespace(status=status, data=data)

    def request(self, *_: object, **__: object) -> Any:
        """One answer."""
        return self._answer


def management(data: bytes) -> None:
    """Each question, answered by these bytes under a status that they choose too."""
    admin = ManagementAdmin("http://127.0.0.1:1", "operator", "x", None)
    admin._pool = Answering((200, 204, 403, 404, 500)[len(data) % 5], data)  # type: ignore[assignment]
    admin.unacknowledged("/", "q")
    admin.accounts()


class OneKey:
    """A store with one object."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def list(self, _prefix: str) -> list[Any]:
        """Its name."""
        return [SimpleNamespace(key="sites/a.json")]

    def get(self, _key: str) -> bytes:
        """What lies there."""
        return self._data


def accounts(data: bytes) -> None:
    """A site's account, and then the run's status."""
    read_status(OneKey(data), "test")  # type: ignore[arg-type]
    list_accounts(OneKey(data))  # type: ignore[arg-type]


def keys(data: bytes, file: Path) -> None:
    """A public key as somebody typed it, then a private one in a file."""
    file.write_bytes(data)
    file.chmod(0o600)
    PublicKey(data.decode(errors="replace"))
    SigningKey.load(file, "site.key_file")
