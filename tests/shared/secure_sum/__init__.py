"""The secure sum: its parts, then whole sums with sites that go away."""
