"""The document store: what was computed of a text, kept on disk."""
