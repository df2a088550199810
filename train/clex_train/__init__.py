"""Training of causal language models for contexts longer than they were trained for, with a CLEX layer or without."""
