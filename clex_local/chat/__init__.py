"""`clex-chat`: a conversation at a terminal."""
