"""What both roles speak: events, ledger, store and broker ports, tensors, codecs. Imports no role."""
