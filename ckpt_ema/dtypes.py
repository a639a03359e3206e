"""The one table of dtypes: a torch, safetensors or storage-class name in, one DType out."""

from __future__ import annotations

from typing import Literal, NamedTuple

WrittenDtype = Literal["student", "float32", "bfloat16", "float16"]
"""What the floating-point tensors of a teacher's file may be asked to be."""


class DType(NamedTuple):
    """The type of a tensor's elements.

    A tuple, because pickles get hold of these: a frozen dataclass with slots can be rewritten by pickle's BUILD.
    """

    name: str
    """torch's own name, `getattr(torch, name)`."""

    itemsize: int
    """Bytes per element."""

    kind: Literal["float", "complex", "integer"]
    """`integer` covers bool as well: whatever is never averaged."""

    code: str | None
    """Name in a safetensors header; None where safetensors has none."""

    storage: str | None = None
    """torch's typed storage class, as old pickles name it."""

    @property
    def is_floating_point(self) -> bool:
        """Whether torch's `is_floating_point` holds."""
        return self.kind == "float"

    @property
    def is_wide(self) -> bool:
        """Whether it has digits that float32 has not: its students are computed in it, and `--dtype` offers none."""
        return self.name in ("float64", "complex128")

    def __str__(self) -> str:
        return self.name


DTYPES = (
    DType("float64", 8, "float", "F64", "DoubleStorage"),
    DType("float32", 4, "float", "F32", "FloatStorage"),
    DType("float16", 2, "float", "F16", "HalfStorage"),
    DType("bfloat16", 2, "float", "BF16", "BFloat16Storage"),
    DType("float8_e4m3fn", 1, "float", "F8_E4M3", "Float8_e4m3fnStorage"),
    DType("float8_e5m2", 1, "float", "F8_E5M2", "Float8_e5m2Storage"),
    DType("float8_e4m3fnuz", 1, "float", "F8_E4M3FNUZ", "Float8_e4m3fnuzStorage"),
    DType("float8_e5m2fnuz", 1, "float", "F8_E5M2FNUZ", "Float8_e5m2fnuzStorage"),
    DType("float8_e8m0fnu", 1, "float", "F8_E8M0"),
    DType("complex128", 16, "complex", None, "ComplexDoubleStorage"),
    DType("complex64", 8, "complex", "C64", "ComplexFloatStorage"),
    DType("complex32", 4, "complex", None),
    DType("int64", 8, "integer", "I64", "LongStorage"),
    DType("int32", 4, "integer", "I32", "IntStorage"),
    DType("int16", 2, "integer", "I16", "ShortStorage"),
    DType("int8", 1, "integer", "I8", "CharStorage"),
    DType("uint64", 8, "integer", "U64"),
    DType("uint32", 4, "integer", "U32"),
    DType("uint16", 2, "integer", "U16"),
    DType("uint8", 1, "integer", "U8", "ByteStorage"),
    DType("bool", 1, "integer", "BOOL", "BoolStorage"),
    # Quantised, two or four of some in a byte: known so that what lies beside them can be read.
    DType("qint8", 1, "integer", None, "QInt8Storage"),
    DType("quint8", 1, "integer", None, "QUInt8Storage"),
    DType("qint32", 4, "integer", None, "QInt32Storage"),
    DType("quint4x2", 1, "integer", None, "QUInt4x2Storage"),
    DType("quint2x4", 1, "integer", None, "QUInt2x4Storage"),
)

BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_CODE = {dtype.code: dtype for dtype in DTYPES if dtype.code}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES if dtype.storage}


def is_rounded(computed: DType, written: DType) -> bool:
    """Whether a number computed in one floating-point dtype may lose digits where it is written in another.

    Of two dtypes of one size, float16 and bfloat16, each has numbers that the other one has not.
    """
    return written is not computed and written.itemsize <= computed.itemsize


def is_change_of_precision(before: DType, after: DType) -> bool:
    """Whether both hold floating-point numbers, or both complex ones, and not in the same way."""
    return before != after and before.kind == after.kind != "integer"
