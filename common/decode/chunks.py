"""One answer of a question that was read in several windows."""

from collections.abc import Iterable

from common.decode.answers import Prediction


def merge(answers: Iterable[Prediction]) -> dict[str, Prediction]:
    """By id, the most probable where a question was read in several windows; in order of ids."""
    best: dict[str, Prediction] = {}
    for answer in answers:
        other = best.get(answer.id)
        if (
            other is None
            or other.logprob is None
            or (answer.logprob, answer.token_ids) > (other.logprob, other.token_ids)
        ):
            best[answer.id] = answer
    return dict(sorted(best.items()))
