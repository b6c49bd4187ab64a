"""Which codec, and which kind of adapter, keeps how much of a run's gain: short local trials."""
