"""What a hosted model's failure means: try again, a question that its content filter refuses, or what a user can do.

By HTTP status, or by an error that a host reports with status 200. Texts are as a host sent them, without the key.
"""

import re

from common.config import FIELDS, Config
from common.decode.responses import Body, Json, Retryable, error_message, named
from common.errors import UserError

RETRY_STATUSES = {408, 409, 425, 429, *range(500, 600)}  # HTTP: timeout, conflict, too early, rate limit, server error
LONGEST_WAIT_S = 300.0  # that a host may ask for; longer waits are for the user to decide
TRANSIENT = re.compile(
    r"overload|rate.?limit|too many requests|timed?.?out|temporar|try again|busy|at capacity|unavailable|server.?error",
    re.I,
)
FILTER_STATUSES = {400, 403, 422, 451}
FILTER = re.compile(
    r"content[ _-]?filter|content[ _-]?(management )?polic|usage polic|responsible.?ai|moderation|\bsafety\b"
    r"|\b(input|prompt|content|text|message)\b.{0,40}\bflagged|data_inspection|(prohibited|sensitive).?content"
    r"|\Asensitive\Z",
    re.I,
)
OF_ALL = {401, 402, 403, 404, 405, 410}  # statuses that every question meets; others are reported with the question


class OfQuestion(UserError):
    """A failure that another question may not meet: the message gets the question's id."""


class Failures:
    """Those of one endpoint. `has_key`: a key is sent."""

    def __init__(self, config: Config, has_key: bool):
        assert config.api
        self.api, self.config, self.has_key = config.api, config, has_key

    def are_filters(self, text: str) -> bool:
        """True if an error's code, type or message names a content filter; `text` is JSON, or all of the message."""
        return FILTER.search(named(text).replace(self.config.base.path, "")) is not None

    def by_status(self, status: int, text: str, after: float | None) -> UserError | Retryable:
        """The error of a reply of another status than 200; `after`: seconds that the host asks to wait."""
        message = f"HTTP {status}: {error_message(text)}"
        if after and after > LONGEST_WAIT_S:
            return UserError(f"{self.api.url}: {message}; it asks to wait {after:.0f} s: start again then, to go on")
        if status in RETRY_STATUSES:
            return Retryable(message, after)
        if status in (401, 403):
            message += f"; the key is read from {self.api.key}, which is {'set' if self.has_key else 'not set'}"
        if status == 404:
            message += f"; is base.path={self.config.base.path} (still) a model there, and does api.url end with /v1?"
        if status in (404, 405) and not self.config.prompt.chat:
            message += " A host without /completions needs prompt.chat=true"
        if status in (400, 422):
            message += self._omittable(text)
        return (UserError if status in OF_ALL else OfQuestion)(f"{self.api.url}: {message}")

    def in_reply(self, error: Json, said: str) -> UserError | Retryable:
        """The error that a host reports in a reply of status 200; `said` is its JSON, without the key."""
        message = f"an error in a reply of status 200: {error_message(said)}"
        inner = error["error"] if isinstance(error.get("error"), dict) else error
        codes = [str(inner.get(key)) for key in ("code", "status", "status_code")]
        retried = any(code.isdecimal() and int(code) in RETRY_STATUSES for code in codes)
        if retried or TRANSIENT.search(named(said)):
            return Retryable(message)
        message += "; does api.url end with /v1?" if isinstance(error, Body) else ""
        return OfQuestion(f"{self.api.url}: {message}{self._omittable(said)}")

    def _omittable(self, text: str) -> str:
        """The end of an error that names a field of our requests: how to leave it out."""
        words = f"{error_message(text)} {named(text)}"
        if re.search(r"context.(length|window)", words):  # which names max_tokens, too
            return ""
        names = dict(word.partition("=")[::2] for word in self.api.omit)
        found = [field for field in FIELDS if field not in names and re.search(rf"\b{field}\b", words)]
        other = re.search(r"\bmax_(completion|new|output)_tokens\b", words)
        omitted = [f"{field}={other[0]}" if field == "max_tokens" and other else field for field in found]
        return (
            f"; a host that refuses {found[0]} needs api.omit=[{','.join([*self.api.omit, *omitted])}]" if found else ""
        )
