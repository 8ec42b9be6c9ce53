"""What a person can cause ends as one line and exit code 2; only our own mistakes show a traceback."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NO_SUCH_PLACE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# the system's, safetensors' and torch.save's
NO_ROOM_WORDS = ("no space left", "quota exceeded", "file too large", "unexpected pos", "failed writing file")


class UserError(ValueError):
    """What is wrong, where (file, line or id), and what to do about it, in one line."""


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an exception's text, at most so many characters; the exception's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def way_on(error: BaseException) -> str:
    """What to do about a write that failed: make room if that was missing, as libraries say in words of their own."""
    full = isinstance(error, OSError) and error.errno in NO_ROOM
    full = full or any(words in str(error).lower() for words in NO_ROOM_WORDS)
    return "make room" if full else "see to that"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrap a script's `main()`: `UserError` becomes one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; what was saved stays, run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno in NO_SUCH_PLACE and error.filename:
            print(f"error: {str(error.filename)[:200]}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        if error.errno not in NO_ROOM:
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(f"error: no room left to write{where}; make room, then run the same command again", file=sys.stderr)
        sys.exit(2)
