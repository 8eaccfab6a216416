"""The chain of tags beside a sum over all paths, one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from llm_from_scratch.model.crf import NEVER, SPEED, Chain, legal

LABELS = ("O", "B-A", "I-A", "B-B", "I-B")
LENGTHS = (4, 1, 3)


def made(*, learnt: bool) -> tuple[Chain, Tensor, Tensor]:
    torch.manual_seed(3)
    chain = Chain(LABELS, learnt=learnt)
    n = len(LABELS)
    if learnt:
        chain.set_scores(torch.randn(n), torch.randn(n, n), torch.randn(n))
    scores = torch.randn(len(LENGTHS), max(LENGTHS), n) * 2
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return chain, scores, mask


def all_paths(chain: Chain, scores_un: Tensor) -> dict[tuple[int, ...], Tensor]:
    """The score of every path that the rules allow."""
    start, table, end = chain.scores()
    paths = {}
    for path in itertools.product(range(len(LABELS)), repeat=len(scores_un)):
        score = start[path[0]] + end[path[-1]]
        score = score + sum(scores_un[u, tag] for u, tag in enumerate(path))
        score = score + sum(table[a, b] for a, b in itertools.pairwise(path))
        if score > NEVER / 2:
            paths[path] = score
    return paths


def test_rules() -> None:
    begins, table = legal(LABELS)
    assert begins.tolist() == [True, True, False, True, False]
    follows = {(a, b) for a in range(5) for b in range(5) if table[a, b]}
    inner = {(1, 2), (2, 2), (3, 4), (4, 4)}
    assert follows == {(a, b) for a in range(5) for b in (0, 1, 3)} | inner
    assert legal(("O", "I-A"))[0].tolist() == [True, True]  # no B-A that could begin it


@pytest.mark.parametrize("learnt", [True, False])
def test_equal_to_the_sum_over_all_paths(learnt: bool) -> None:
    chain, scores, mask = made(learnt=learnt)
    partition = chain.log_partition(scores, mask)
    best = chain.best(scores, mask)
    marginals = chain.marginals(scores, mask)
    for b, length in enumerate(LENGTHS):
        paths = all_paths(chain, scores[b, :length])
        total = torch.stack(list(paths.values())).logsumexp(0)
        assert math.isclose(partition[b].item(), total.item(), abs_tol=1e-5)
        assert tuple(best[b]) == max(paths, key=lambda path: paths[path].item())
        for u in range(length):
            for tag in range(len(LABELS)):
                through = [(s - total).exp().item() for p, s in paths.items() if p[u] == tag]
                assert math.isclose(marginals[b, u, tag].item(), sum(through), abs_tol=1e-5)
        assert not marginals[b, length:].any()


def test_loss_and_its_gradients() -> None:
    chain, scores, mask = made(learnt=True)
    tags = torch.tensor([[1, 2, 0, 3], [3, -100, -100, -100], [0, 1, 2, -100]])
    scores.requires_grad_()
    loss = chain.loss_sum(scores, tags, mask)
    ours = torch.autograd.grad(loss, [scores, *chain.parameters()])
    wanted = torch.zeros(())
    for row, length in enumerate(LENGTHS):
        paths = all_paths(chain, scores[row, :length])
        right = paths[tuple(tags[row, :length].tolist())]
        wanted = wanted + torch.stack(list(paths.values())).logsumexp(0) - right
    theirs = torch.autograd.grad(wanted, [scores, *chain.parameters()])
    assert math.isclose(loss.item(), wanted.item(), abs_tol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    chain, scores, mask = made(learnt=True)
    tags = torch.tensor([[1, 2, 0, 3], [3, 0, 0, 0], [0, 1, 2, 0]])
    together = chain.loss_sum(scores, tags, mask)
    alone = [
        chain.loss_sum(scores[b : b + 1, :n], tags[b : b + 1, :n], mask[b : b + 1, :n])
        for b, n in enumerate(LENGTHS)
    ]
    assert math.isclose(together.item(), sum(loss.item() for loss in alone), rel_tol=1e-6)
    best = chain.best(scores, mask)
    for b, n in enumerate(LENGTHS):
        assert chain.best(scores[b : b + 1, :n], mask[b : b + 1, :n]) == [best[b]]


def test_half_precision_and_what_is_stored() -> None:
    chain, scores, mask = made(learnt=True)
    exact = chain.log_partition(scores, mask)
    rounded = chain.log_partition(scores.bfloat16(), mask)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.1, rtol=0.02)
    start, _, _ = chain.scores()
    assert math.isclose(start[0].item(), chain.start[0].item() * SPEED, rel_tol=1e-6)
    assert start[2] == NEVER
