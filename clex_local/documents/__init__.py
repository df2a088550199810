"""What a person attaches to a message: files of many kinds, folders, patterns and pages of the web, as texts."""
