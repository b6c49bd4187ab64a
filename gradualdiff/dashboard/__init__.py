"""Pages over a store, live in a browser: what the command line shows. Nothing is written."""
