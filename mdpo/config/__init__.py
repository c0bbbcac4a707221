"""What a recipe may say, and its strict reading."""

from typing import Any

PUBLIC = ("MDPOConfig", "DataArguments")  # `training_args.bin` of older runs names them here


def __getattr__(name: str) -> Any:
    """The dataclasses, which need trl, when they are asked for."""
    if name in PUBLIC:
        from mdpo.config import schema

        return getattr(schema, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
