"""`clex-serve` and `clex-worker`: llama-server with a plan of its memory, and layers for other machines."""
