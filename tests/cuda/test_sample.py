"""Tokens and log-probabilities against a sampler in NumPy that sorts whole rows in float64."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
from small import DLL, normal, poisoned, run, same_bits, torch

BF16 = torch.bfloat16
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
    """Sampling parameters of a row; counts [vocab] or None."""

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
    """Tokens [n], their log-probabilities, and those of the n_top likeliest."""
    n, vocab = logits.shape
    picks = np.zeros(n, PICK)
    forbidden: list[int] = []
    for pick, s in zip(picks, settings):
        for name in ("temperature", "top_p", "top_k", "repetition", "frequency", "presence", "fraction"):
            pick[name] = getattr(s, name)
        pick["n_forbidden"], pick["first_forbidden"] = len(s.forbidden), len(forbidden)
        pick["counts"] = 0 if s.counts is None else s.counts.data_ptr()
        forbidden += s.forbidden
    on_gpu = torch.from_numpy(picks.view(np.uint8).reshape(-1)).cuda()
    ids = torch.tensor(forbidden or [0], dtype=torch.int32, device="cuda")
    bytes_ = DLL.qvlt_gpu_sample_scratch(ctypes.c_int64(n), ctypes.c_int64(vocab))
    scratch = torch.full([bytes_ + 64], 0xEE, dtype=torch.uint8, device="cuda")
    tokens = poisoned(n + 1, dtype=torch.int32)
    probabilities = poisoned(n + 1, dtype=torch.float32) if logprobs else None
    top_tokens = poisoned(n + 1, max(n_top, 1), dtype=torch.int32)
    top_logprobs = poisoned(n + 1, max(n_top, 1), dtype=torch.float32)
    any_draw = any(not s.greedy for s in settings)
    any_changed = any(s.penalised or s.forbidden for s in settings)
    run(
        "sample",
        BF16,
        *(logits, n, vocab, on_gpu, ids, any_draw, any_changed, scratch, tokens, probabilities, n_top),
        *(top_tokens, top_logprobs),
    )
    torch.cuda.synchronize()
    assert tokens[n].item() == -77777777
    assert bool((scratch[bytes_:] == 0xEE).all())
    assert bool((top_tokens[n if n_top else 0 :] == -77777777).all())
    return (
        tokens[:n].tolist(),
        None if probabilities is None else probabilities[:n],
        top_tokens[:n],
        top_logprobs[:n],
    )


def expected(logits, s, counts):
    """Token of a row, or None if `fraction` or top_p is within 1e-6 of a step of the sums. counts: before the draw."""
    x = logits.astype(np.float64)
    if not (x < np.inf).all() or not np.isfinite(x).any():
        return -1
    x[list(s.forbidden)] = -1e10
    if s.penalised:
        seen = counts > 0
        repetition, frequency, presence = (
            np.float64(np.float32(v)) for v in (s.repetition, s.frequency, s.presence)
        )
        x[seen] = np.where(x[seen] < 0, x[seen] * repetition, x[seen] / repetition)
        x[seen] -= counts[seen] * frequency + presence
    order = np.lexsort([np.arange(len(x)), -x])
    if s.greedy:
        return int(order[0])
    if s.top_k > 0:
        order = order[: s.top_k]
    weights = np.exp((x[order] - x[order[0]]) / np.float64(np.float32(s.temperature)))
    sums = np.cumsum(weights)
    top_p = np.float64(np.float32(s.top_p))
    if top_p < 1:
        parts = sums / sums[-1]
        if np.abs(parts - top_p).min() < 1e-6:
            return None
        sums = sums[: np.searchsorted(parts, top_p) + 1]
    parts = sums / sums[-1]
    if np.abs(parts - s.fraction).min() < 1e-6:
        return None
    return int(order[np.searchsorted(parts, s.fraction, side="right")])


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


def some_settings(random, logits):
    """Settings of each kind in turn for the rows of logits; forbidden ids include the likeliest."""
    n, vocab = logits.shape
    settings = []
    for i in range(n):
        changes = dict(KINDS[i % len(KINDS)])
        s = Setting(fraction=float(random.random()))
        if changes.pop("forbidden", False):
            ids = torch.topk(logits[i], min(vocab, 5)).indices.tolist()
            s.forbidden = (*ids, *random.integers(0, vocab, 9).tolist())
        for name, value in changes.items():
            setattr(s, name, value)
        if i % 3 or s.repetition != 1 or s.frequency or s.presence:
            counts = random.integers(0, 4, vocab) * (random.random(vocab) < 0.3)
            s.counts = torch.tensor(counts, dtype=torch.int32, device="cuda")
        settings.append(s)
    return settings


@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
@pytest.mark.parametrize(("vocab", "n"), [(151936, 34), (640, 119), (5003, 51), (77, 34), (2, 34), (1, 17)])
def test_tokens(vocab, n, scale):
    """Rows of all kinds in one batch; only the count of the sampled token is incremented."""
    random = np.random.default_rng(vocab + int(scale))
    logits = normal(n, vocab, scale=scale)
    settings = some_settings(random, logits)
    before = [None if s.counts is None else s.counts.cpu().numpy() for s in settings]
    tokens, logprobs, _, _ = sample(logits, settings)
    unclear = 0
    floor = torch.logsumexp(logits.double(), 1)
    for i, s in enumerate(settings):
        wanted = expected(logits[i].cpu().numpy(), s, before[i])
        unclear += wanted is None
        assert wanted is None or tokens[i] == wanted, (i, s, tokens[i], wanted)
        assert abs(logprobs[i].item() - (logits[i, tokens[i]].double() - floor[i]).item()) < 2e-5
        if s.counts is not None:
            before[i][tokens[i]] += 1
            assert np.array_equal(s.counts.cpu().numpy(), before[i])
    assert unclear <= n // 2


@pytest.mark.parametrize("vocab", [151936, 640, 5003])
@pytest.mark.parametrize("top_p", [1.0, 0.25])
def test_equal_logits(vocab, top_p):
    """Equal logits: the lowest id wins, and draws are in the order of ids, however many share a bin."""
    fractions = np.random.default_rng(3).random(9)
    logits = torch.full([10, vocab], 1.5, device="cuda")
    settings = [Setting(temperature=1.0, top_p=top_p, fraction=f) for f in fractions] + [Setting()]
    tokens, _, top, _ = sample(logits, settings, n_top=60)
    n = -(-vocab * top_p // 1)
    assert tokens == [int(f * n) for f in fractions] + [0]
    assert top.tolist() == [list(range(60))] * 10


@pytest.mark.parametrize("vocab", [640, 151936])
def test_few_different_logits(vocab):
    """Integer logits, so that most have many equals."""
    random = np.random.default_rng(4)
    logits = torch.tensor(random.integers(-3, 3, [34, vocab]), dtype=torch.float32, device="cuda")
    settings = some_settings(random, logits)
    before = [None if s.counts is None else s.counts.cpu().numpy() for s in settings]
    tokens, _, top, _ = sample(logits, settings, n_top=64)
    for i, s in enumerate(settings):
        row = logits[i].cpu().numpy()
        wanted = expected(row, s, before[i])
        assert wanted is None or tokens[i] == wanted, (i, s, tokens[i], wanted)
        assert top[i].tolist() == np.lexsort([np.arange(vocab), -row])[:64].tolist()


@pytest.mark.parametrize("n_top", [1, 2, 5, 64])
@pytest.mark.parametrize("vocab", [151936, 64, 5003])
def test_likeliest(vocab, n_top):
    logits = normal(3, vocab, scale=4)
    logits[1, vocab // 2] = -float("inf")
    logits[2, 1::2] = -0.0
    logits[2, ::2] = 0.0
    _, _, top, top_logprobs = sample(logits, [Setting()] * 3, n_top=n_top)
    wanted = torch.log_softmax(logits.double(), 1).cpu().numpy()
    for i in range(3):
        order = np.lexsort([np.arange(vocab), -logits[i].cpu().numpy()])[:n_top]
        assert top[i].tolist() == order.tolist()
        np.testing.assert_allclose(top_logprobs[i].cpu().numpy(), wanted[i, order], atol=2e-5)


@pytest.mark.parametrize("where", [slice(None), slice(5, 9), slice(639, 640), slice(0, 1)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_row(value, where):
    """A NaN, a positive infinity, or no finite value gives -1 and no count; a single -infinity is allowed."""
    rows = np.zeros([3, 640], np.float32)
    rows[:, where] = value
    logits = torch.tensor(rows, device="cuda")
    settings = [Setting(), Setting(temperature=1.0), Setting(presence=1.0)]
    for s in settings:
        s.counts = torch.zeros(640, dtype=torch.int32, device="cuda")
    tokens, logprobs, top, top_logprobs = sample(logits, settings, n_top=3)
    for i, s in enumerate(settings):
        if not (rows < np.inf).all() or not np.isfinite(rows).any():
            assert tokens[i] == -1
            assert s.counts.count_nonzero() == 0
            assert top[i].tolist() == [-1] * 3
            assert bool(logprobs[i].isnan())
            assert bool(top_logprobs[i].isnan().all())
        else:
            assert rows[i, tokens[i]] == rows.max()
            assert s.counts[tokens[i]] == 1
            assert s.counts.sum() == 1


@pytest.mark.parametrize(("vocab", "n"), [(5003, 256), (151936, 40)])
def test_rows_are_their_own(vocab, n):
    """Each row alone gives the same token and the same bits."""
    random = np.random.default_rng(8)
    logits = normal(n, vocab, scale=3)
    settings = some_settings(random, logits)
    copies = [dataclasses.replace(s, counts=None if s.counts is None else s.counts.clone()) for s in settings]
    tokens, *figures = sample(logits, settings, n_top=4)
    for i in range(n):
        alone, *alone_figures = sample(logits[i : i + 1].clone(), copies[i : i + 1], n_top=4)
        assert alone == tokens[i : i + 1]
        for one, all_ in zip(alone_figures, figures):
            assert same_bits(one[0], all_[i])


def test_without_log_probabilities():
    logits = normal(2, 5003)
    tokens, *_ = sample(logits, [Setting()] * 2, logprobs=False)
    assert tokens == logits.argmax(1).tolist()


def test_draws_follow_the_distribution():
    """At fractions in equal steps each token is drawn as often as its probability says."""
    steps = 2000
    row = normal(1, 300, scale=2)
    logits = row.expand(steps, 300).contiguous()
    settings = [
        Setting(temperature=1.3, top_k=50, top_p=0.9, fraction=(i + 0.5) / steps) for i in range(steps)
    ]
    drawn = np.bincount(sample(logits, settings)[0], minlength=300) / steps
    top = torch.topk(row[0].double(), 50)
    probabilities = torch.softmax(top.values / 1.3, 0).cpu().numpy()
    kept = np.searchsorted(np.cumsum(probabilities), 0.9) + 1
    wanted = np.zeros(300)
    wanted[top.indices.cpu().numpy()[:kept]] = probabilities[:kept] / probabilities[:kept].sum()
    assert np.abs(drawn - wanted).max() <= 1.01 / steps
