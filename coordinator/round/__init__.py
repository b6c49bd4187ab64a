"""What happens next in a run: a pure machine over records, with the decisions it asks for."""
