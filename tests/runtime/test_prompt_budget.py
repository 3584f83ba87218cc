"""The budget of prompt tokens per step, on a simulated device with known times."""

from __future__ import annotations

import pytest

from paddlemix_qwenvl_plugin.runtime.prompt_budget import PromptBudget

STEP_TOKENS = 512


def settled_budget(seconds_per_prompt_token: float, decode: float, rows: int) -> PromptBudget:
    """The budget after 21 steps in which `rows` requests decode in `decode` seconds; 20 steps also have prompts."""
    budget = PromptBudget(STEP_TOKENS)
    budget.learn(0, rows, decode)
    for _ in range(20):
        n = budget.tokens
        budget.learn(n, rows, decode + n * seconds_per_prompt_token)
    return budget


@pytest.mark.parametrize(
    # per_token, decode: times in seconds; prompt_seconds: the expected time of the prompt tokens in the budget.
    ("per_token", "decode", "rows", "prompt_seconds"),
    [
        pytest.param(0.001, 0.01, 4, 0.25, id="fast decoding: 0.25 s"),
        pytest.param(0.001, 0.15, 4, 0.45, id="slow decoding: three times its time"),
        pytest.param(0.001, 0.15, 64, 0.45, id="many requests"),
        pytest.param(1e-5, 0.01, 4, STEP_TOKENS * 1e-5, id="at most the tokens of a step"),
        pytest.param(0.1, 0.01, 4, 6.4, id="at least 64 tokens"),
    ],
)
def test_time_of_prompts(per_token: float, decode: float, rows: int, prompt_seconds: float) -> None:
    budget = settled_budget(per_token, decode, rows)
    assert budget.tokens * per_token == pytest.approx(prompt_seconds, rel=0.02)


def test_more_decoding_requests_than_before() -> None:
    """Prompts get 199 tokens instead of 64, the minimum.

    Decoding is estimated to take four times as long. So prompts get more time, and the computed rate of prompt tokens
    is higher, because more of a step's time counts as decoding.
    """
    one, many = PromptBudget(STEP_TOKENS), PromptBudget(STEP_TOKENS)
    for budget, rows in ((one, 1), (many, 16)):
        budget.learn(0, 1, 0.1)
        budget.learn(200, rows, 1.6)
    assert many.tokens > 2 * one.tokens


def test_a_step_of_prompts_only() -> None:
    """The whole step counts as the time of its prompt tokens."""
    budget = PromptBudget(STEP_TOKENS)
    # Reading the weights counts as four rows: with no row instead of one, a decode step is estimated to take four
    # fifths of 0.125 s, 0.1 s.
    budget.learn(0, 1, 0.125)
    budget.learn(400, 0, 1.0)
    assert budget.tokens == 120  # 400 tokens/s for three times the estimated 0.1 s


def test_a_step_shorter_than_the_decode_step_before() -> None:
    """After a slow decode step, as on a busy machine, the rate is high but finite."""
    budget = PromptBudget(100_000)
    budget.learn(0, 4, 10.0)
    budget.learn(64, 4, 1.0)
    # At least an eighth of the step counts as prompt time: 64 tokens in 1/8 s. The budget is for three times 10 s.
    assert budget.tokens == 64 * 8 * 30
