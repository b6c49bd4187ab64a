"""The command line: one file per noun. The only package that may import both roles, lazily."""
