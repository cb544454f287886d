"""The arithmetic of the backbones, chosen by device."""
