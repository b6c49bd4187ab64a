"""GradualDiff-Fed: a participant (a site). Trains on private text, submits deltas."""
