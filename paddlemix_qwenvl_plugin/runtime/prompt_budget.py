"""How many prompt tokens run in a step beside requests that decode."""

from __future__ import annotations

# Prompts may take so long of a step, or so many times what its decoding takes by itself, if that is longer: on a slow
# machine streams go on at a quarter of their pace, and the first token of the last of many prompts does not wait for
# ever. Fewer tokens would take hardly less time: a step of prompts reads the weights, too.
_PROMPT_SECONDS = 0.25
_PROMPT_SHARE = 3.0
_LEAST_TOKENS = 64
# What a decode step costs beside its rows (it reads the weights), in rows.
_ROWS_FOR_WEIGHTS = 4


class PromptBudget:
    """Chooses the budget by the times of the last steps.

    Attributes:
        tokens: prompt tokens of the next step beside which others decode, at least 1.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.tokens = most
        self._row_seconds = 0.0  # of decoding, by the last step without prompts

    def learn(self, n_prompt: int, n_decoding: int, seconds: float) -> None:
        """Note the time of a step with so many tokens of prompts and of decoding requests."""
        if not n_prompt:
            self._row_seconds = seconds / (n_decoding + _ROWS_FOR_WEIGHTS)
        elif n_prompt >= _LEAST_TOKENS // 2:  # the rate by fewer tokens would be that of reading the weights
            decode_seconds = self._row_seconds * (n_decoding + _ROWS_FOR_WEIGHTS)
            # Times vary: a step may be shorter than its decoding was thought to be.
            prompt_seconds = max(seconds - (decode_seconds if n_decoding else 0), seconds / 8)
            allowed = max(_PROMPT_SECONDS, _PROMPT_SHARE * decode_seconds)
            self.tokens = min(max(int(n_prompt / prompt_seconds * allowed), _LEAST_TOKENS), self._most)
