"""The methods, one file each; importing this package registers them all."""

from mindpeft.tuners.lora import LoraConfig

__all__ = ["LoraConfig"]
