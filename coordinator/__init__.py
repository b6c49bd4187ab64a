"""The coordinator's role: decide rounds, check deltas, aggregate. Never loads a model or torch."""
