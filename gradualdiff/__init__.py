"""GradualDiff-Fed: what a user touches. The command line, the embedded federation, the demo."""
