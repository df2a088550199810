"""Measure what long context is worth to models: GGUF files in the quantized runtime, Hugging Face folders beside."""
