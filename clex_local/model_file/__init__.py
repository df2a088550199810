"""What a model file says, read from its header before anything is loaded: tables, shape, and the memory they need."""
