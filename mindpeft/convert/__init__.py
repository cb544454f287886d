"""Reading and writing Hugging Face / PyTorch checkpoints, without torch."""
