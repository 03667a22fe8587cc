"""Sizes of memory as people write them."""

from pydantic import ByteSize, TypeAdapter, ValidationError

from stdist.errors import InputError


def parse_memory(text: str) -> int:
    """Bytes of ``32GiB``, ``80 GB`` or a plain number. Raises InputError for anything else."""
    try:
        memory = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        memory = ByteSize(0)
    if memory <= 0:
        raise InputError(f"--device-memory {text!r} is no size; write it as 32GiB or 80GB")
    return int(memory)
