"""Pictures of runs, through matplotlib."""
