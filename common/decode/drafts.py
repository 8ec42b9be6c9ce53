"""Draft tokens from the prompt, of which answers are spans (https://github.com/apoorvumang/prompt-lookup-decoding)."""

from collections import Counter

from common.data.tokens import Ids

LONGEST_MATCH = 4  # tokens
NEAR = 24  # tokens on either side of a match, and of the prompt's end, where the question is


def draft_from(prompt_ids: Ids, token_ids: Ids, most: int) -> Ids:
    """Up to `most` tokens that follow the end of `token_ids` in the prompt; [] if its last token is not in there.

    The longest match decides. Of several places, the one whose neighbourhood has most of the question's tokens is
    taken; a token weighs 1 / its count in the prompt.
    """
    if most < 1:
        return []
    counts, question = Counter(prompt_ids), set(prompt_ids[-NEAR:])

    def weight(place: int) -> float:
        if place > len(prompt_ids) - NEAR:
            return 0.0  # in the question itself
        near = set(prompt_ids[max(0, place - NEAR) : place + NEAR])
        return sum(1 / counts[token] for token in near & question)

    for n in range(min(LONGEST_MATCH, len(token_ids)), 0, -1):
        end = token_ids[-n:]
        starts = (i for i in range(len(prompt_ids) - n) if prompt_ids[i] == end[0] and prompt_ids[i : i + n] == end)
        if places := [i + n for i in starts]:
            place = max(places, key=weight)
            return prompt_ids[place : place + most]
    return []
