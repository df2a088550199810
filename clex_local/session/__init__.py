"""A conversation: its messages, what is kept of it in a file, what to do when it fills the context."""
