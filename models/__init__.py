"""The backbones: one file per architecture, imported as ``mindpeft.models``."""
