"""What both roles speak: events, ledger, ports, tensors, codecs. Imports no role."""
