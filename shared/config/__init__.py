"""``federation.toml`` (the run, written once for all) and ``site.toml`` (one site's own affairs).

Read from a file that is named, never at import and never from the environment. All mistakes are
reported at once, each with its field, what was expected and what came. The resolved federation
config and its digest are stored with the run; a run is resumed only under an equal digest.

The paper's settings (arXiv:2506.19164, section IV) are the defaults.
"""

from shared.config.federation import NOT_RECORDED, FederationConfig, load_federation
from shared.config.privacy import PrivacySection
from shared.config.reading import parse
from shared.config.rounds import AggregationSection, PolicySection, SelectionSection, ServerSection
from shared.config.section import Section
from shared.config.servers import BrokerSection, LimitsSection, OperatedBrokerSection, StoreSection
from shared.config.site import AcceptSection, DataSection, SiteConfig, load_site
from shared.config.site_privacy import SitePrivacySection
from shared.config.training import BaseSection, LoraSection, TrainingSection
from shared.config.values import (
    NAME_PATTERN,
    RESERVED_NAMES,
    Name,
    Positive,
    Sha256,
    canonical_json,
)

__all__ = [
    "NAME_PATTERN",
    "NOT_RECORDED",
    "RESERVED_NAMES",
    "AcceptSection",
    "AggregationSection",
    "BaseSection",
    "BrokerSection",
    "DataSection",
    "FederationConfig",
    "LimitsSection",
    "LoraSection",
    "Name",
    "OperatedBrokerSection",
    "PolicySection",
    "Positive",
    "PrivacySection",
    "Section",
    "SelectionSection",
    "ServerSection",
    "Sha256",
    "SiteConfig",
    "SitePrivacySection",
    "StoreSection",
    "TrainingSection",
    "canonical_json",
    "load_federation",
    "load_site",
    "parse",
]
