"""One answer of a question that was read in several windows: the most probable one."""

from collections.abc import Iterable

from common.data.tokens import Ids
from common.decode.answers import Generation, Prediction


def by_probability(answer: Prediction | Generation) -> tuple[float, Ids]:
    """Sort key: the log-probability of the whole answer; token ids decide between equal ones."""
    assert answer.logprob is not None, "hosted models read one window"
    return answer.logprob, answer.token_ids


def merge(answers: Iterable[Prediction]) -> dict[str, Prediction]:
    """The most probable answer of each question, by id, in order of ids."""
    falling = sorted(answers, key=lambda answer: (answer.id, by_probability(answer)), reverse=True)
    return {answer.id: answer for answer in reversed(falling)}
