"""Whether a run is what its records say: the chain of records, and every round computed again."""
