"""What a closed round is made of: deltas checked, joined and added to the adapter."""
