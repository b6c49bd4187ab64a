"""The language model behind a site: base, quantisation, adapter, loss and greedy replies.

The only package that imports transformers, peft and bitsandbytes; what it gives out are torch
tensors, numpy arrays and the project's own records.
"""

from participant.model.attaching import attach_adapter
from participant.model.finding_bases import write_bases
from participant.model.local_model import LocalModel
from participant.model.merging import save_merged
from participant.model.numerics import pick_device, settle_threads
from participant.model.talking import Sampling, Talker

__all__ = [
    "LocalModel",
    "Sampling",
    "Talker",
    "attach_adapter",
    "pick_device",
    "save_merged",
    "settle_threads",
    "write_bases",
]
