"""Adapters of other projects, one file for each format, converted to Hugging Face PEFT's."""
