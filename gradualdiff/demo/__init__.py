"""The demo's model, text and files."""
