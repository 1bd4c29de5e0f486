"""Errors edgetune raises on purpose, and the exit code each one gives the command line.

EdgetuneError            1
+-- ConfigError          2   a flag, config or profile is wrong; the user can fix it
|   +-- MissingExtraError     an optional package is not installed
+-- DataError            3   the data is not what the task needs
+-- ResourceError        4   memory, disk, device or network ran out
|   +-- PredictionTimeout     an answer took longer than was allowed
+-- GateError            5   a budget or accuracy gate was not met
+-- IntegrityError       6   a file is not what its signed description says
"""


class EdgetuneError(Exception):
    """Base of every error that edgetune raises on purpose."""

    exit_code = 1


class ConfigError(EdgetuneError):
    """A flag, config file or profile is wrong."""

    exit_code = 2


class MissingExtraError(ConfigError):
    """A package of an optional extra is needed and not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the missing `package` and the `extra` of edgetune that brings it."""
        super().__init__(
            f"{package} is not installed; it comes with: pip install 'edgetune[{extra}]'"
        )
        self.package = package
        self.extra = extra


class DataError(EdgetuneError):
    """The user's data is not what the task needs."""

    exit_code = 3


class ResourceError(EdgetuneError):
    """Memory, disk, a device or the network ran out or is absent."""

    exit_code = 4


class PredictionTimeout(ResourceError):  # noqa: N818 - as TimeoutError and its kin are called
    """An answer took longer than was allowed."""


class GateError(EdgetuneError):
    """A budget or an accuracy gate was not met."""

    exit_code = 5


class IntegrityError(EdgetuneError):
    """A file is not what its description says it is."""

    exit_code = 6
