"""What is known and asked of a run: tables, controls, branches, exports, retention, deletion."""
