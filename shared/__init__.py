"""GradualDiff-Fed: what both roles speak: events, ledger, ports, codecs. Imports no role."""
