"""The Zarr data type ``bfloat16``: stored as the Zarr v3 registry names it, held in memory as uint16 bits.

NumPy has no bfloat16. The bits travel as uint16, which torch views as bfloat16 without a copy. Registered through
the entry point group ``zarr.data_type``, so any program in an environment with this package installed can open our
arrays with zarr-python; tensorstore needs nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import numpy as np
from zarr.core.dtype import UInt16, data_type_registry


@dataclass(frozen=True, kw_only=True)
class BFloat16(UInt16):
    """bfloat16 as uint16 bits; never inferred from a NumPy dtype, since every uint16 array would then be ambiguous."""

    _zarr_v3_name: ClassVar[str] = "bfloat16"  # type: ignore[assignment]
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # type: ignore[assignment]

    @classmethod
    def _check_native_dtype(cls, dtype: object) -> TypeGuard[np.dtypes.UInt16DType]:  # noqa: ARG003
        return False

    @classmethod
    def _from_json_v3(cls, data: Any) -> BFloat16:
        if data == cls._zarr_v3_name:
            return cls()
        return super()._from_json_v3(data)

    def to_json_scalar(self, data: object, *, zarr_format: Any) -> float:  # type: ignore[override]  # noqa: ARG002
        """Return the fill value as the number its bits stand for, which is what other Zarr libraries expect."""
        return float(bits_to_float32(np.asarray(data, np.uint16)))

    def from_json_scalar(self, data: Any, *, zarr_format: Any) -> np.uint16:  # noqa: ARG002
        """Return the bits of a fill value given as a number."""
        return np.uint16(struct.unpack("<I", struct.pack("<f", float(data)))[0] >> 16)


def bits_to_float32(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 ``bits`` (uint16, any shape); exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bits(values: np.ndarray) -> np.ndarray:
    """Return the bfloat16 bits (uint16) nearest to float32 ``values``, ties to even; NaN stays NaN."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((raw + (np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


data_type_registry.register("bfloat16", BFloat16)
