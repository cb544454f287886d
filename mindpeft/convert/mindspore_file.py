"""MindSpore's own `.ckpt` files behind the interface of the other readers."""

from __future__ import annotations

import os
from pathlib import Path

import mindspore as ms

from mindpeft.convert.tensors import RawTensor, TensorInfo, dtype_name, is_shape
from mindpeft.errors import InputError


class MindSporeFile:
    """A `.ckpt` file. MindSpore reads it whole, so its tensors stay in memory until ``close``.

    Raises:
        InputError: MindSpore can't read the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        try:
            content = ms.load_checkpoint(str(self.path))
        except Exception as error:  # MindSpore raises whatever its parser meets
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{self.path} is no readable MindSpore checkpoint: {reason}") from error
        self._tensors = {name: value for name, value in content.items() if isinstance(value, ms.Tensor)}
        self.ignored = [name for name in content if name not in self._tensors]
        self.infos = {
            name: TensorInfo(name, dtype_name(value.dtype), tuple(value.shape), self.path)
            for name, value in self._tensors.items()
        }
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Refuse shapes that the file can't hold: MindSpore would take what else is in memory for values."""
        for name, info in self.infos.items():
            if not is_shape(info.shape):
                raise InputError(f"{self.path} is damaged: tensor {name!r} has shape {info.shape}")
        claimed, size = sum(info.nbytes for info in self.infos.values()), self.path.stat().st_size
        if claimed > size:
            raise InputError(f"{self.path} is damaged: {size} bytes can't hold tensors of {claimed} bytes")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor:
        """A copy of one tensor, or of its leading rows ``start:stop`` alone."""
        array = self._tensors[name].asnumpy()
        rows = array if start == 0 and stop is None else array[start:stop]
        return RawTensor.from_numpy(rows.copy())

    def close(self) -> None:
        """Let the tensors go."""
        self._tensors = {}
