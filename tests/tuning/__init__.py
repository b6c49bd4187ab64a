"""Arms that are tried without a ledger: the wire, and what is worth choosing."""
