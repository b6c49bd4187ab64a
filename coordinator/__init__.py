"""GradualDiff-Fed: the coordinator. Decides rounds, checks deltas, aggregates; without torch."""
