"""A store that an earlier release wrote, and what that release said of it."""
