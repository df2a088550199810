"""What the commands have in common: options written once as fields, and errors in one line."""
