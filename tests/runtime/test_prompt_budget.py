"""The budget of prompt tokens on a simulated device with known times."""

from __future__ import annotations

import pytest

from paddlemix_qwenvl_plugin.runtime.prompt_budget import PromptBudget

MOST = 512


def settle(seconds_per_prompt_token: float, decode: float, rows: int) -> PromptBudget:
    """The budget after some steps of the device, all but the first with prompts."""
    budget = PromptBudget(MOST)
    budget.learn(0, rows, decode)
    for _ in range(20):
        n = budget.tokens
        budget.learn(n, rows, decode + n * seconds_per_prompt_token)
    return budget


@pytest.mark.parametrize(
    ("per_token", "decode", "rows", "prompt_seconds"),
    [
        pytest.param(0.001, 0.01, 4, 0.25, id="decoding is fast: a quarter of a second"),
        pytest.param(0.001, 0.15, 4, 0.45, id="decoding is slow: three times its time"),
        pytest.param(0.001, 0.15, 64, 0.45, id="many rows"),
        pytest.param(1e-5, 0.01, 4, MOST * 1e-5, id="not more than a step holds"),
        pytest.param(0.1, 0.01, 4, 6.4, id="not less than 64 tokens"),
    ],
)
def test_time_of_prompts(per_token: float, decode: float, rows: int, prompt_seconds: float) -> None:
    budget = settle(per_token, decode, rows)
    assert budget.tokens * per_token == pytest.approx(prompt_seconds, rel=0.02)


def test_more_rows_than_were_seen() -> None:
    """Decoding takes longer for 16 requests than for one: the prompt rate accounts for it."""
    one, many = PromptBudget(MOST), PromptBudget(MOST)
    for budget, rows in ((one, 1), (many, 16)):
        budget.learn(0, 1, 0.1)
        budget.learn(200, rows, 1.6)
    assert many.tokens > 2 * one.tokens


def test_prompts_alone_give_the_rate_whole() -> None:
    budget = PromptBudget(MOST)
    budget.learn(0, 1, 0.125)  # without rows, a decode step takes four fifths of it: 0.1 s
    budget.learn(400, 0, 1.0)
    assert budget.tokens == 120  # 0.3 s of it, as its decoding takes 0.1


def test_a_step_shorter_than_its_decoding_was() -> None:
    """After a slow step, as on a busy machine, the rate is high but finite."""
    budget = PromptBudget(100_000)
    budget.learn(0, 4, 10.0)
    budget.learn(64, 4, 1.0)
    assert budget.tokens == 64 * 8 * 30
