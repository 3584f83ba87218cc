"""Budget of prompt tokens in a step with decoding requests, adapted to measured step times."""

from __future__ import annotations

# Prompt time per step: 0.25 s, or 3 times the step's decode time if that is longer. In the second case, streams
# continue at a quarter of their rate, and prompts get three quarters of the time, so that the last of many prompts does
# not wait long for its first token. A budget below 64 tokens would hardly shorten the step, since prefill reads all
# weights.
_PROMPT_SECONDS = 0.25
_PROMPT_TO_DECODE = 3.0
_MIN_TOKENS = 64
# Time to read the weights in a decode step, as the number of rows (decoding requests) that take as long.
_ROWS_FOR_WEIGHTS = 4


class PromptBudget:
    """Budget of prompt tokens for the next step with decoding requests, chosen by the times of the last steps.

    Attributes:
        tokens: the budget, at least 64, or the maximum if that is smaller.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self.tokens = maximum
        self._row_seconds = 0.0  # decode time per row in the last step without prompts

    def learn(self, n_prompt: int, n_decoding: int, seconds: float) -> None:
        """Update the budget with the time of a step of `n_prompt` prompt tokens and `n_decoding` decoding requests.

        The tokens of a preempted request that is recomputed count as prompt tokens, the generated ones too.
        """
        if not n_prompt:
            self._row_seconds = seconds / (n_decoding + _ROWS_FOR_WEIGHTS)
        elif n_prompt >= _MIN_TOKENS // 2:  # with fewer tokens, reading the weights dominates the rate
            decode_seconds = self._row_seconds * (n_decoding + _ROWS_FOR_WEIGHTS)
            # Times vary, and the measured step may be shorter than the estimated decode time: at least 1/8 of the step
            # counts as prompt time.
            prompt_seconds = max(seconds - (decode_seconds if n_decoding else 0), seconds / 8)
            allowed = max(_PROMPT_SECONDS, _PROMPT_TO_DECODE * decode_seconds)
            self.tokens = min(max(int(n_prompt / prompt_seconds * allowed), _MIN_TOKENS), self._maximum)
