"""A site's private text: read, mapped, split into train and held-out, tokenised.

Knows files and a tokenizer, nothing of a run, a model or the network. No text leaves through an
error: messages name files, lines, columns and counts.
"""

from participant.data.loading import SiteData, load_site_data
from participant.data.tokenising import ChatTokenizer, TokenisedExample

__all__ = ["ChatTokenizer", "SiteData", "TokenisedExample", "load_site_data"]
