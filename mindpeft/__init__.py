"""mindpeft: parameter-efficient fine-tuning of Hugging Face checkpoints in MindSpore."""
