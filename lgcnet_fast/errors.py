"""Errors that a user can mend. The command line prints their message and exits with status 2."""


class UserError(ValueError):
    """A mistake in what the user gave.

    The message names the file, key, shape or value and the remedy.
    """


class ConfigError(UserError):
    """A configuration file, override or combination of options that cannot work."""


class GenotypeError(UserError):
    """A genotype that is malformed or that no known search space can build."""


class DataError(UserError):
    """A missing, unreadable or inconsistent image, mask, list file or folder."""


class TableError(UserError):
    """A latency lookup table that is malformed or lacks a needed entry."""


class RunError(UserError):
    """A run folder or checkpoint that is missing, damaged or belongs to another configuration."""


class EngineError(UserError):
    """An engine file that is missing, damaged, altered or of another version."""


class ExportError(UserError):
    """An export that cannot be made here, or whose file disagrees with the network."""


class DeviceError(UserError):
    """A device that is absent or that the installed torch cannot run on."""


class BackendError(UserError):
    """A backend that cannot serve, with the reason, or a tuning table that is malformed."""


class OperandError(UserError):
    """An argument that an operation cannot take: its device, dtype, layout, shape or value."""
