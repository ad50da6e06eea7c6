"""The errors that kvcapsule raises for what a person can mend; all of them are KVCapsuleError, which is a ValueError.

A command prints such an error as one line. Any other exception is a defect, of kvcapsule or of a library, and keeps its
traceback. Long texts stand in messages as `shortened` gives them.
"""


class KVCapsuleError(ValueError):
    """Base of all errors that kvcapsule raises on purpose. The message says what was wrong, what was expected and what
    to do."""


class CapsuleError(KVCapsuleError):
    """A capsule's files are missing, damaged, or of a kind that this version does not know."""


class ConfigError(KVCapsuleError):
    """An option or setting cannot be used."""


class DataError(KVCapsuleError):
    """A data set cannot be read, or a row lacks what is needed."""


class GeometryError(KVCapsuleError):
    """The KV geometry is not one that kvcapsule supports, or not the one that a capsule was made for."""


class InputError(KVCapsuleError):
    """An argument of a command, or a file or folder named by one, cannot be used."""


class KernelError(KVCapsuleError, RuntimeError):
    """A kernel for attention cannot be compiled, loaded or used on this machine."""


class ModelError(KVCapsuleError):
    """A model cannot be loaded, or is of a kind that kvcapsule does not support."""


class PackageError(KVCapsuleError):
    """A package that a test bed is made from cannot be fetched or is damaged."""


class ModelMismatchWarning(UserWarning):
    """A capsule is used with a model of the right geometry that is not the one that it was trained on."""


def shortened(text: object) -> str:
    """The text for a message, its middle left out if it is long."""
    words = str(text)
    return words if len(words) <= 200 else f"{words[:160]}...{words[-20:]}"
