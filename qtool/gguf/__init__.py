"""GGUF files, the container of llama.cpp: read through Hugging Face names, and written."""
