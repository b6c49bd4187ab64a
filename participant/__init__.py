"""A participant's role (a site): train on private text, submit deltas. Holds no store key."""
