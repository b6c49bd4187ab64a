"""GradualDiff-Fed: the command line, one file per noun. It parses, calls the API and prints."""
