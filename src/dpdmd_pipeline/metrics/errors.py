"""Errors of metrics: missing or damaged weights, missing libraries, and input that a metric cannot judge."""


class UnavailableError(OSError):
    """A metric cannot be measured here; the message has the reason and the remedy in one line."""


class MissingWeightsError(UnavailableError):
    """The weights of a metric are not on this disk."""


class DamagedWeightsError(UnavailableError):
    """The weights of a metric are on this disk but cannot be read."""


class MissingLibraryError(UnavailableError):
    """The library of a metric is not installed."""


class UnfitError(ValueError):
    """A prompt, or pictures, that a metric's network or reader cannot judge; it can judge others."""


def not_installed(library: str, extra: str = "metrics") -> MissingLibraryError:
    """The error for a library that an extra of this package installs."""
    return MissingLibraryError(f"{library} is not installed: pip install 'dpdmd-pipeline[{extra}]'")
