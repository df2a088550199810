"""`clex-inspect`: what is in a model file, as text, JSON and a picture."""
