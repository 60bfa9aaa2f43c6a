"""What the command line exits with; EXPLAINED is what --help says of it."""

FAILED, USAGE, UNREACHABLE, NOT_FOUND, JOB_FAILED, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 4, 5, 130, 141

EXPLAINED = """\b
Exit codes:
  0    done
  1    the request failed, or what was checked is not valid
  2    bad usage: wrong arguments, or a file that cannot be sent
  3    server unreachable
  4    no such adapter, version, data set, job or strategy
  5    the tuning job failed or was cancelled
  130  interrupted
  141  the reader of the output went away
"""
