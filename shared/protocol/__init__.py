"""What is said and what is recorded: events, records, the ledger's order, and the bytes of both."""
