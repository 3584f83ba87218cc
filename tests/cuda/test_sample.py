"""Sampled tokens and log probabilities, compared with a sampler in NumPy that sorts all logits in float64.

The import of small.py skips these tests without a GPU or libqwenvl_cuda_test.so.
"""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from small import DLL, UNWRITTEN, normal, poisoned, run, same_bits, torch

BF16 = torch.bfloat16  # the compute type; the kernels of sampling are the same for both
# Sampling parameters of a row as the kernel reads them: Pick of csrc/cuda/kernels/pick.h.
PICK = np.dtype(
    [
        ("temperature", "f4"),
        ("top_p", "f4"),
        ("top_k", "i4"),
        ("repetition", "f4"),
        ("frequency", "f4"),
        ("presence", "f4"),
        ("n_forbidden", "i4"),
        ("first_forbidden", "i4"),
        ("fraction", "f8"),
        ("counts", "u8"),
    ]
)


@dataclasses.dataclass
class Setting:
    """Sampling parameters of a row.

    `fraction` is the random number of the draw in [0, 1). `counts`: how often each token id was generated, int32
    [vocab], or None.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    forbidden: tuple[int, ...] = ()
    fraction: float = 0.5
    counts: torch.Tensor | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return self.counts is not None and (self.repetition, self.frequency, self.presence) != (1, 0, 0)


def sample(logits, settings, n_top=0, logprobs=True):
    """Sample a token for each row.

    Returns the tokens [n], their log probabilities (None unless `logprobs`), and the `n_top` most likely tokens of each
    row with their log probabilities.
    """
    n, vocab = logits.shape
    picks = np.zeros(n, PICK)
    forbidden: list[int] = []
    for pick, setting in zip(picks, settings):
        for name in ("temperature", "top_p", "top_k", "repetition", "frequency", "presence", "fraction"):
            pick[name] = getattr(setting, name)
        pick["n_forbidden"], pick["first_forbidden"] = len(setting.forbidden), len(forbidden)
        pick["counts"] = 0 if setting.counts is None else setting.counts.data_ptr()
        forbidden += setting.forbidden
    gpu_picks = torch.from_numpy(picks.view(np.uint8).reshape(-1)).cuda()
    ids = torch.tensor(forbidden or [0], dtype=torch.int32, device="cuda")
    n_bytes = DLL.qvlt_gpu_sample_scratch(ctypes.c_int64(n), ctypes.c_int64(vocab))
    scratch = torch.full([n_bytes + 64], 0xEE, dtype=torch.uint8, device="cuda")
    tokens = poisoned(n + 1, dtype=torch.int32)
    probabilities = poisoned(n + 1, dtype=torch.float32) if logprobs else None
    top_tokens = poisoned(n + 1, max(n_top, 1), dtype=torch.int32)
    top_logprobs = poisoned(n + 1, max(n_top, 1), dtype=torch.float32)
    any_draw = any(not setting.greedy for setting in settings)
    any_changed = any(setting.penalised or setting.forbidden for setting in settings)
    run(
        "sample",
        BF16,
        *(logits, n, vocab, gpu_picks, ids, any_draw, any_changed, scratch, tokens, probabilities, n_top),
        *(top_tokens, top_logprobs),
    )
    torch.cuda.synchronize()
    assert tokens[n].item() == UNWRITTEN
    assert bool((scratch[n_bytes:] == 0xEE).all())
    assert bool((top_tokens[n if n_top else 0 :] == UNWRITTEN).all())
    return (
        tokens[:n].tolist(),
        None if probabilities is None else probabilities[:n],
        top_tokens[:n],
        top_logprobs[:n],
    )


def expected(logits, setting, counts):
    """The token of a row; -1 if a logit is NaN or +infinity, or if none is finite. `counts`: those before the draw.

    None if rounding may decide: `fraction` or top_p is within 1e-6 of one of the cumulative probabilities.
    """
    x = logits.astype(np.float64)
    if not (x < np.inf).all() or not np.isfinite(x).any():
        return -1
    x[list(setting.forbidden)] = -1e10
    if setting.penalised:
        generated = counts > 0
        repetition, frequency, presence = (
            np.float64(np.float32(value))
            for value in (setting.repetition, setting.frequency, setting.presence)
        )
        x[generated] = np.where(x[generated] < 0, x[generated] * repetition, x[generated] / repetition)
        x[generated] -= counts[generated] * frequency + presence
    # By decreasing logits; equal logits by increasing ids.
    order = np.lexsort([np.arange(len(x)), -x])
    if setting.greedy:
        return int(order[0])
    if setting.top_k > 0:
        order = order[: setting.top_k]
    weights = np.exp((x[order] - x[order[0]]) / np.float64(np.float32(setting.temperature)))
    sums = np.cumsum(weights)
    top_p = np.float64(np.float32(setting.top_p))
    if top_p < 1:
        cumulative = sums / sums[-1]
        if np.abs(cumulative - top_p).min() < 1e-6:
            return None
        sums = sums[: np.searchsorted(cumulative, top_p) + 1]
    cumulative = sums / sums[-1]
    if np.abs(cumulative - setting.fraction).min() < 1e-6:
        return None
    return int(order[np.searchsorted(cumulative, setting.fraction, side="right")])


# Changes of the default Setting; "forbidden" stands for the most likely and for random tokens.
KINDS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 10**9},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 3.0, "top_k": 1},
    {"temperature": 100.0, "top_p": 0.9},
    {"temperature": 100.0, "top_k": 20000, "top_p": 0.99},
    {"temperature": 1e-3},
    {"temperature": 1e-30, "top_p": 0.5},
    {"temperature": 2.0, "repetition": 1.3, "frequency": 0.4, "presence": 0.3},
    {"repetition": 1.5, "presence": -0.5},
    {"temperature": 30.0, "frequency": -0.7, "top_p": 0.97},
    {"forbidden": True},
    {"temperature": 1.0, "forbidden": True, "repetition": 2.0, "top_k": 40},
]


def varied_settings(random, logits):
    """A setting for each row, of each kind in turn; forbidden tokens include the most likely ones."""
    n, vocab = logits.shape
    settings = []
    for i in range(n):
        changes = dict(KINDS[i % len(KINDS)])
        setting = Setting(fraction=float(random.random()))
        if changes.pop("forbidden", False):
            ids = torch.topk(logits[i], min(vocab, 5)).indices.tolist()
            setting.forbidden = (*ids, *random.integers(0, vocab, 9).tolist())
        for name, value in changes.items():
            setattr(setting, name, value)
        if i % 3 or setting.repetition != 1 or setting.frequency or setting.presence:
            counts = random.integers(0, 4, vocab) * (random.random(vocab) < 0.3)
            setting.counts = torch.tensor(counts, dtype=torch.int32, device="cuda")
        settings.append(setting)
    return settings


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize(("vocab", "n"), [(151936, 34), (640, 119), (5003, 51), (77, 34), (2, 34), (1, 17)])
def test_tokens(vocab, n, scale):
    """Rows of all kinds in one batch; only the count of the sampled token is incremented."""
    random = np.random.default_rng(vocab + int(scale))
    logits = normal(n, vocab, scale=scale)
    settings = varied_settings(random, logits)
    before = [None if setting.counts is None else setting.counts.cpu().numpy() for setting in settings]
    tokens, logprobs, _, _ = sample(logits, settings)
    n_undecided = 0
    log_sums = torch.logsumexp(logits.double(), 1)
    for i, setting in enumerate(settings):
        token = expected(logits[i].cpu().numpy(), setting, before[i])
        n_undecided += token is None
        assert token is None or tokens[i] == token, (i, setting, tokens[i], token)
        assert abs(logprobs[i].item() - (logits[i, tokens[i]].double() - log_sums[i]).item()) < 2e-5
        if setting.counts is not None:
            before[i][tokens[i]] += 1
            assert np.array_equal(setting.counts.cpu().numpy(), before[i])
    assert n_undecided <= n // 2


@pytest.mark.parametrize("vocab", [151936, 640, 5003])
@pytest.mark.parametrize("top_p", [1.0, 0.25])
def test_equal_logits(vocab, top_p):
    """With equal logits, the most likely token is the lowest id, and the cumulative probabilities follow the ids."""
    fractions = np.random.default_rng(3).random(9)
    logits = torch.full([10, vocab], 1.5, device="cuda")
    settings = [Setting(temperature=1.0, top_p=top_p, fraction=fraction) for fraction in fractions]
    settings.append(Setting())
    tokens, _, top, _ = sample(logits, settings, n_top=60)
    n_kept = -(-vocab * top_p // 1)  # rounded up
    assert tokens == [int(fraction * n_kept) for fraction in fractions] + [0]
    assert top.tolist() == [list(range(60))] * 10


@pytest.mark.parametrize("vocab", [640, 151936])
def test_few_different_logits(vocab):
    """Integer logits, so that many are equal."""
    random = np.random.default_rng(4)
    logits = torch.tensor(random.integers(-3, 3, [34, vocab]), dtype=torch.float32, device="cuda")
    settings = varied_settings(random, logits)
    before = [None if setting.counts is None else setting.counts.cpu().numpy() for setting in settings]
    tokens, _, top, _ = sample(logits, settings, n_top=64)
    for i, setting in enumerate(settings):
        row = logits[i].cpu().numpy()
        token = expected(row, setting, before[i])
        assert token is None or tokens[i] == token, (i, setting, tokens[i], token)
        assert top[i].tolist() == np.lexsort([np.arange(vocab), -row])[:64].tolist()


@pytest.mark.parametrize("n_top", [1, 2, 5, 64])
@pytest.mark.parametrize("vocab", [151936, 64, 5003])
def test_most_likely(vocab, n_top):
    logits = normal(3, vocab, scale=4)
    logits[1, vocab // 2] = -float("inf")
    logits[2, 1::2] = -0.0  # equal to 0.0
    logits[2, ::2] = 0.0
    _, _, top, top_logprobs = sample(logits, [Setting()] * 3, n_top=n_top)
    logprobs = torch.log_softmax(logits.double(), 1).cpu().numpy()
    for i in range(3):
        order = np.lexsort([np.arange(vocab), -logits[i].cpu().numpy()])[:n_top]
        assert top[i].tolist() == order.tolist()
        np.testing.assert_allclose(top_logprobs[i].cpu().numpy(), logprobs[i, order], atol=2e-5)


@pytest.mark.parametrize("where", [slice(None), slice(5, 9), slice(639, 640), slice(0, 1)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite(value, where):
    """A row with NaN or +infinity, or without a finite logit, gives token -1 and no count; -infinity is allowed."""
    rows = np.zeros([3, 640], np.float32)
    rows[:, where] = value
    logits = torch.tensor(rows, device="cuda")
    settings = [Setting(), Setting(temperature=1.0), Setting(presence=1.0)]
    for setting in settings:
        setting.counts = torch.zeros(640, dtype=torch.int32, device="cuda")
    tokens, logprobs, top, top_logprobs = sample(logits, settings, n_top=3)
    for i, setting in enumerate(settings):
        if not (rows < np.inf).all() or not np.isfinite(rows).any():
            assert tokens[i] == -1
            assert setting.counts.count_nonzero() == 0
            assert top[i].tolist() == [-1] * 3
            assert bool(logprobs[i].isnan())
            assert bool(top_logprobs[i].isnan().all())
        else:
            assert rows[i, tokens[i]] == rows.max()
            assert setting.counts[tokens[i]] == 1
            assert setting.counts.sum() == 1


@pytest.mark.parametrize(("vocab", "n"), [(5003, 256), (151936, 40)])
def test_a_row_does_not_depend_on_other_rows(vocab, n):
    """Each row alone gives the same token and the same bits of its log probabilities."""
    random = np.random.default_rng(8)
    logits = normal(n, vocab, scale=3)
    settings = varied_settings(random, logits)
    # A sample changes the counts, so the rows alone have copies.
    copies = [
        dataclasses.replace(setting, counts=None if setting.counts is None else setting.counts.clone())
        for setting in settings
    ]
    tokens, *batch_results = sample(logits, settings, n_top=4)
    for i in range(n):
        token, *results = sample(logits[i : i + 1].clone(), copies[i : i + 1], n_top=4)
        assert token == tokens[i : i + 1]
        for result, batch_result in zip(results, batch_results):
            assert same_bits(result[0], batch_result[i])


def test_without_log_probabilities():
    logits = normal(2, 5003)
    tokens, *_ = sample(logits, [Setting()] * 2, logprobs=False)
    assert tokens == logits.argmax(1).tolist()


def test_draws_follow_the_distribution():
    """With equally spaced fractions, the frequency of each token is its probability."""
    steps = 2000
    row = normal(1, 300, scale=2)
    logits = row.expand(steps, 300).contiguous()
    settings = [
        Setting(temperature=1.3, top_k=50, top_p=0.9, fraction=(i + 0.5) / steps) for i in range(steps)
    ]
    drawn = np.bincount(sample(logits, settings)[0], minlength=300) / steps
    top = torch.topk(row[0].double(), 50)
    probabilities = torch.softmax(top.values / 1.3, 0).cpu().numpy()
    n_kept = np.searchsorted(np.cumsum(probabilities), 0.9) + 1
    distribution = np.zeros(300)
    distribution[top.indices.cpu().numpy()[:n_kept]] = probabilities[:n_kept] / probabilities[:n_kept].sum()
    assert np.abs(drawn - distribution).max() <= 1.01 / steps
