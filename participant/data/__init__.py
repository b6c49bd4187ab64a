"""A site's private text: read, mapped, split into train and held-out, tokenised.

Knows files and a tokenizer, nothing of a run, a model or the network. No text leaves through an
error: messages name files, lines, columns and counts.
"""

from participant.data.examples import Message
from participant.data.loading import (
    NOTHING_HELD_OUT,
    SiteData,
    held_out_prompts,
    load_site_data,
    split_text,
)
from participant.data.tokenising import ChatTokenizer, TokenisedExample, prompt_ids

__all__ = [
    "NOTHING_HELD_OUT",
    "ChatTokenizer",
    "Message",
    "SiteData",
    "TokenisedExample",
    "held_out_prompts",
    "load_site_data",
    "prompt_ids",
    "split_text",
]
