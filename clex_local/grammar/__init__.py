"""Grammars that constrain an answer, made from JSON schemas and patterns."""
