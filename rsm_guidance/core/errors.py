"""The errors that callers are told about; importable without torch."""


class UsageError(ValueError):
    """Bad input that its sentence explains; the command line prints that alone."""


class StopRequested(Exception):
    """Something outside asked a run to end, such as a callback that interrupts the pipeline: the best so far is returned."""
