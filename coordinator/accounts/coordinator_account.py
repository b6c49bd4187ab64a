"""The coordinator's own account on the broker, where another is the broker's administrator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordinator.accounts.broker_administration import broker_admin
from coordinator.accounts.site_accounts import hash_password
from shared.credentials import broker_account, broker_address
from shared.topology import coordinator_rights

if TYPE_CHECKING:
    from pathlib import Path

    from shared.config import OperatedBrokerSection


def make_coordinator_account(section: OperatedBrokerSection, folder: Path) -> str | None:
    """Make the account that ``broker.url`` names, with ``coordinator_rights``; its name.

    None where the coordinator's account is the administrator itself, or none is known: it is then
    whatever the operator made. An account that is there keeps its password and tags, and its rights
    in this virtual host become these. Repeatable. Raises as ``BrokerAdmin`` does.
    """
    account = broker_account(section)
    if section.management_account in (None, account):
        return None
    address, rights = broker_address(section, folder), coordinator_rights()
    admin = broker_admin(section, folder)
    definitions: dict[str, list[dict[str, Any]]] = {
        "permissions": [
            {
                "user": account,
                "vhost": address.vhost,
                "configure": rights.configure.pattern,
                "write": rights.write.pattern,
                "read": rights.read.pattern,
            }
        ]
    }
    if account not in admin.accounts():
        user = {"name": account, "password_hash": hash_password(address.password), "tags": ""}
        user["hashing_algorithm"] = "rabbit_password_hashing_sha256"
        definitions["users"] = [user]
    admin.apply(definitions)
    return account
