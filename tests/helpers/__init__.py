"""What tests share: makers of model files, small models, and the C API at its lowest level."""
