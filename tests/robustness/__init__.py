"""Random and damaged input: one sentence and exit code 2, or a right result; never a traceback, a hang or half a file."""
