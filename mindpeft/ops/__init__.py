"""The arithmetic of the backbones, chosen by device.

Each operation has a plain composition for any device; where an operator of the CPU is slow, inexact or keeps
its buffers (measured), a second composition with the same result stands beside it.
"""
