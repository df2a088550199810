"""`Llama`: opening a model, computing with it, drawing tokens."""
