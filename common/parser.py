"""argparse as every script uses it. Imports the standard library alone."""

import argparse
from typing import Any, NoReturn

from common.errors import UserError
from common.words import ELSEWHERE, nearest


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are `UserError`s, and whose flags are never abbreviated."""

    def __init__(self, description: str | None = None, prog: str | None = None, **options: Any):
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        unknown, hint = message.removeprefix("unrecognized arguments: "), ""
        if unknown != message:
            word = unknown.partition("=")[0].partition(" ")[0]
            name = word.lstrip("-").replace("-", "_")
            hint = nearest(name if name in ELSEWHERE else word, [*self._option_string_actions, *ELSEWHERE.values()])
        raise UserError(f"{self.prog}: {message}{hint}")
