"""GradualDiff-Fed: the command line, one file per noun. It alone imports both roles, and lazily."""
