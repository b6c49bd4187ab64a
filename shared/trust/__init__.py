"""Who said it: signing keys, what they sign, and how that is checked. Knows no run and no store."""
