"""The tables of a ``federation.toml``."""

from __future__ import annotations

from pydantic import Field

from shared.config.privacy import PrivacySection
from shared.config.rounds import (
    AggregationSection,
    CodecSection,
    ConvergenceSection,
    PolicySection,
    SelectionSection,
    ServerSection,
)
from shared.config.section import Section
from shared.config.servers import LimitsSection, OperatedBrokerSection, StoreSection, TrustSection
from shared.config.training import BaseSection, LoraSection, RunSection, TrainingSection


class SimulationSection(Section):
    """For ``gradualdiff simulate`` only: the sites' own files, relative to the TOML file."""

    sites: tuple[str, ...] = ()
    """The ``site.toml`` of each participant, relative to this file."""


class FederationTables(Section):
    """What every table says, whether or not they go together."""

    run: RunSection
    base: BaseSection
    lora: LoraSection = LoraSection()
    training: TrainingSection = Field(default_factory=TrainingSection)
    selection: SelectionSection = SelectionSection()
    policy: PolicySection = Field(default_factory=PolicySection)
    aggregation: AggregationSection = AggregationSection()
    server: ServerSection = ServerSection()
    codec: CodecSection = CodecSection()
    convergence: ConvergenceSection = ConvergenceSection()
    privacy: PrivacySection | None = None
    limits: LimitsSection = LimitsSection()
    broker: OperatedBrokerSection | None = None
    trust: TrustSection | None = None
    store: StoreSection = StoreSection()
    simulation: SimulationSection = SimulationSection()
