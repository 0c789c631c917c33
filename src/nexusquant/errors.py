"""The one exception family of the package, and its warning.

Every message says what was given and what to do.
"""


class NexusQuantError(Exception):
    """Base of every error raised on purpose by nexusquant."""


class ConfigError(NexusQuantError, ValueError):
    """A setting, preset or argument that does not exist or is out of range."""


class UnsupportedError(NexusQuantError):
    """A model, cache or operation that cannot work on a compressed cache."""


class NonFiniteError(NexusQuantError, ValueError):
    """NaN or infinity in keys, values or scores: compressing it would spread silently."""


class ProfileError(NexusQuantError, ValueError):
    """A profile that is damaged, missing its statistics, or not the model's."""


class LoadError(NexusQuantError):
    """A model, tokenizer or file that could not be loaded."""


class FormatError(NexusQuantError, ValueError):
    """Bytes that are not an .nxq file, are damaged, or are of a version this one cannot read."""


class StoreError(NexusQuantError, OSError):
    """A store that could not be opened, read or written; what it held before is still there."""


class NexusQuantWarning(UserWarning):
    """Something stays uncompressed, is compressed less well than it could be, or takes longer."""
