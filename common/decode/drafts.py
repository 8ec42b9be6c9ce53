"""Draft tokens by prompt lookup: what followed the last tokens where they stood in the prompt."""

from collections import Counter

from common.data.tokens import Ids

LONGEST_MATCH, NEAR = 4, 24  # tokens


def draft_from(prompt_ids: Ids, token_ids: Ids, most: int) -> Ids:
    """Up to `most` tokens that follow `token_ids` in the prompt; none where the last of them is not in it.

    Of all places where the longest part of its end is found (at most 4 tokens), the one with most of the question's
    tokens around it, rare ones counting more: the question is the end of the prompt.
    """
    if most < 1:
        return []
    for length in range(min(LONGEST_MATCH, len(token_ids)), 0, -1):
        end = token_ids[-length:]
        places = [
            i + length for i in range(len(prompt_ids) - length) if prompt_ids[i] == end[0]
            and prompt_ids[i : i + length] == end
        ]  # fmt: skip
        if places:
            break
    else:
        return []
    if len(places) > 1:
        counts, asked = Counter(prompt_ids), set(prompt_ids[-NEAR:])

        def about(place: int) -> float:
            if place > len(prompt_ids) - NEAR:
                return 0.0  # the question itself
            near = set(prompt_ids[max(0, place - NEAR) : place + NEAR])
            return sum(1 / counts[token] for token in near & asked)

        places.sort(key=about, reverse=True)
    return prompt_ids[places[0] : places[0] + most]
