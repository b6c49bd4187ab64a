"""A participant's role (a site): train on private text and submit deltas. Never holds a store key."""
