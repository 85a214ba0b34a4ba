"""Processes that have everything imported already: forks of the tests' own."""

import os
import traceback


def forked(function, *arguments):
    """Id of a process that runs a function and ends with status 0 if it returns."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def ended(process):
    """Exit code of a process when it has ended; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
