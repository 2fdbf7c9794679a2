"""Divergences from a teacher of which only some probabilities are known, against autograd on events in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distilvlm.losses import Distillation, Objective, Sparse, Targets, gram, linear, linear_distillation
from distilvlm.losses.divergences import DIVERGENCES

ROWS, COMMON, STUDENT = 23, 27, 30
BY_ID = [name for name in DIVERGENCES if name != "uld"]
NAIVE = {
    "forward_kl": lambda s, t: kl(t, s),
    "reverse_kl": lambda s, t: kl(s, t),
    "jensen_shannon": lambda s, t: 0.9 * kl(s, 0.1 * t + 0.9 * s) + 0.1 * kl(t, 0.1 * t + 0.9 * s),
    "skew_forward_kl": lambda s, t: kl(t, 0.1 * t + 0.9 * s),
    "skew_reverse_kl": lambda s, t: kl(s, 0.9 * t + 0.1 * s),
}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).where(p > 0, 0).sum(-1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=tolerance, rtol=tolerance, check_dtype=False)


class World:
    """A student of 30 ids, a teacher of the first 27 of them, and rows of which 4 to 16 are compared over known ids."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.hidden, self.head = normal(ROWS, 8).requires_grad_(), normal(STUDENT, 8).requires_grad_()
        self.teacher, self.teacher_head = normal(ROWS, 12), normal(COMMON, 12)
        self.labels = torch.randint(0, STUDENT, (ROWS,), generator=draw)
        self.labels[::3] = -100
        self.text_weight, self.weight = torch.rand(2, ROWS, generator=draw, dtype=torch.float64).to(dtype)
        self.weight[[2, 9]] = 0
        self.rows = torch.arange(4, 17)[torch.randperm(13, generator=draw)]

    @property
    def known(self) -> Tensor:
        """[13, 27] the teacher's log-probabilities of the sparse rows."""
        return (self.teacher @ self.teacher_head.T).log_softmax(-1)[self.rows]

    def likeliest(self, kept: int) -> Sparse:
        found = self.known.topk(kept)
        return Sparse(found.indices, found.values, tail=True)

    def run(self, sparse: Sparse | None, exact: bool = True, **options) -> Distillation:
        """With the teacher's hidden states for the rows that `sparse` is not of, or without any."""
        weight = self.weight if exact else torch.zeros(ROWS).index_copy(0, self.rows, self.weight[self.rows].float())
        return linear_distillation(
            self.hidden,
            self.head,
            self.teacher if exact else None,
            self.teacher_head if exact else None,
            self.labels,
            self.text_weight,
            weight,
            sparse=sparse,
            sparse_rows=None if sparse is None else self.rows,
            teacher_ids=COMMON,
            **options,
        )

    def naive(self, sparse: Sparse, divergence: str) -> tuple[Tensor, Tensor]:
        """Loss and divergences [ROWS], by hand: row by row over events."""
        logits = self.hidden @ self.head.T
        s = logits[:, :COMMON].softmax(-1)
        t = (self.teacher @ self.teacher_head.T).softmax(-1)
        values = NAIVE[divergence](s, t)
        for row, ids, logs in zip(self.rows.tolist(), sparse.ids, sparse.log_probabilities.double().exp(), strict=True):
            known: dict[int, Tensor] = {}
            for id, probability in zip(ids.tolist(), logs, strict=True):
                if 0 <= id < COMMON:
                    known[id] = (
                        probability if sparse.tail else known.get(id, torch.zeros_like(probability)) + probability
                    )
            own = list(known)
            theirs = torch.stack([*known.values()]) if own else torch.zeros(0)
            others = [id for id in range(COMMON) if id not in known]
            if sparse.tail and others:
                both = (
                    torch.cat([s[row, own], s[row, others].sum(0, True)]),
                    torch.cat([theirs, 1 - theirs.sum(0, True)]),
                )
            elif sparse.tail:
                both = s[row, own], theirs
            else:
                both = s[row, own], theirs / theirs.sum()
            value = NAIVE[divergence](*both) if own else values.new_zeros(())
            values = values.index_put((torch.tensor(row),), value)
        text = cross_entropy(logits, self.labels, reduction="none", ignore_index=-100)
        return (self.text_weight * text + self.weight * values).sum(), values

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.hidden, self.head))


@pytest.mark.parametrize("divergence", BY_ID)
@pytest.mark.parametrize("kept", [1, 5])
def test_loss_and_gradients_match_autograd_over_events(divergence: str, kept: int):
    world = World()
    sparse = world.likeliest(kept)
    out = world.run(sparse, divergence=divergence, chunk_elements=5 * STUDENT)
    expected, values = world.naive(sparse, divergence)
    close(out.loss, expected)
    close(out.divergence, values * (world.weight != 0))
    for actual, wanted in zip(world.gradients(3 * out.loss), world.gradients(3 * expected), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("tail", [True, False])
def test_repeated_missing_and_unknown_ids(tail: bool):
    world = World()
    ids = world.known.topk(6).indices
    logs = world.known.gather(1, ids)
    ids[0, 3] = ids[0, 1]  # twice: once with a tail, added up without
    logs[0, 3] = logs[0, 1]
    ids[1, :2] = -1
    logs[1, :2] = -torch.inf
    ids[2, 2] = COMMON + 1  # the student's alone
    ids[3, 4] = 1000  # nobody's
    ids[4] = -1
    logs[4] = -torch.inf
    logs = logs if tail else logs - logs.logsumexp(-1, keepdim=True).nan_to_num(neginf=0)
    sparse = Sparse(ids, logs, tail)
    out = world.run(sparse)
    expected, values = world.naive(sparse, "forward_kl")
    close(out.divergence, values * (world.weight != 0))
    close(out.loss, expected)
    for actual, wanted in zip(world.gradients(out.loss), world.gradients(expected), strict=True):
        close(actual, wanted)
    assert out.divergence[world.rows[4]] == 0 and out.divergence[world.rows[0]] > 0


@pytest.mark.parametrize("elements", [1, 7 * STUDENT, 10**6])
def test_chunks_and_tiles_do_not_matter(elements: int, monkeypatch: pytest.MonkeyPatch):
    world = World()
    sparse = world.likeliest(4)
    expected = world.run(sparse)
    monkeypatch.setattr(linear, "TILE_ELEMENTS", 1 + elements // 3)
    out = world.run(sparse, chunk_elements=elements)
    close(out.loss, expected.loss)
    close(out.divergence, expected.divergence)
    for actual, wanted in zip(world.gradients(out.loss), world.gradients(expected.loss), strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("divergence", BY_ID)
def test_the_whole_vocabulary_is_the_dense_divergence(divergence: str):
    world = World(torch.float32)
    dense, sparse = world.run(None, divergence=divergence), world.run(world.likeliest(COMMON), divergence=divergence)
    close(sparse.divergence, dense.divergence, 1e-6)
    for actual, wanted in zip(world.gradients(sparse.loss), world.gradients(dense.loss), strict=True):
        close(actual, wanted, 1e-6)


@pytest.mark.parametrize("divergence", BY_ID)
def test_known_ids_bound_the_divergence_from_below_and_reach_it(divergence: str):
    world = World()
    dense = world.run(None, divergence=divergence).divergence[world.rows]
    before = torch.zeros_like(dense)
    for kept in (1, 3, 9, 20, COMMON):
        value = world.run(world.likeliest(kept), divergence=divergence).divergence[world.rows]
        assert bool((value >= before - 1e-12).all())  # events that are split apart tell more
        before = value
        assert bool((value <= dense + 1e-12).all())
    close(before, dense)


def test_gradients_of_draws_are_the_dense_one_on_average():
    world, draws, times = World(), 8, 200
    generator = torch.Generator().manual_seed(1)
    dense = world.gradients(world.run(None).loss)[1]
    found = []
    for _ in range(times):
        ids = torch.multinomial(world.known.exp(), draws, replacement=True, generator=generator)
        shares = torch.full(ids.shape, -torch.log(torch.tensor(float(draws))))
        found.append(world.gradients(world.run(Sparse(ids, shares, tail=False)).loss)[1])
    found = torch.stack(found)
    error = found.std(0) / times**0.5  # of the mean
    off = ((found.mean(0) - dense) / error.clamp_min(1e-12)).abs()[error > 0]
    assert float(off.max()) < 4.5  # 240 numbers: 4.5 deviations come once in 600 tests, and these draws are fixed
    assert float(off.mean()) < 1.2  # 0.8 of a normal distribution


def test_fp32_and_bf16_stay_close():
    exact, sparse = World(), World().likeliest(5)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        world = World(dtype)
        out, expected = world.run(sparse), exact.run(sparse)
        assert out.divergence.dtype == torch.float32
        assert (out.divergence.double() - expected.divergence).norm() < tolerance * expected.divergence.norm()
        for actual, wanted in zip(world.gradients(out.loss), exact.gradients(expected.loss), strict=True):
            assert (actual.double() - wanted).norm() < tolerance * wanted.norm()


def test_improbable_ids_give_finite_numbers():
    world = World(torch.float32)
    sharp = World(torch.float32)
    sharp.head = (60 * world.head).detach().requires_grad_()  # the student is sure, and wrong
    for divergence in BY_ID:
        out = sharp.run(world.likeliest(3), divergence=divergence)
        assert out.loss.isfinite() and all(gradient.isfinite().all() for gradient in sharp.gradients(out.loss))


ONE = Sparse(torch.zeros(13, 1, dtype=torch.long), torch.zeros(13, 1), tail=True)


@pytest.mark.parametrize(
    ("sparse", "options", "message"),
    [
        (
            ONE,
            {"temperature": 2.0},
            "temperature 1;",
        ),
        (ONE, {"divergence": "uld"}, "uld ranks"),
        (
            replace(ONE, tail=False),
            {"divergence": "reverse_kl"},
            "only forward_kl is linear",
        ),
        (
            Sparse(torch.arange(2).expand(13, 2), torch.zeros(13, 2), True),
            {},
            "known probabilities of a row sum to 2: give log",
        ),
        (
            Sparse(torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1), True),
            {},
            "sparse_rows names 13 rows, and .* are of 4",
        ),
        (
            ONE,
            {"relation_rows": [torch.tensor([4, 5])]},
            "give it twice",
        ),
    ],
)
def test_refusals_say_what_to_do(sparse: Sparse, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        World().run(sparse, **options)


def test_no_hidden_states_are_needed_where_all_rows_are_known():
    world = World()
    sparse = world.likeliest(5)
    out = world.run(sparse, exact=False)
    close(out.divergence[world.rows], world.run(sparse).divergence[world.rows])
    assert not out.divergence[[0, 1, 2, 3, 20]].any()


class Batch:
    """Two samples of 12 positions; the last visual row of the first one also predicts its answer."""

    response = torch.tensor([5, 6, 7, 8, 19, 20])
    visual = torch.tensor([2, 3, 4, 5, 14, 15, 16, 17])
    targets = torch.tensor([1, 2, 3, 4, 5, 6])

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.hidden, self.head = normal(24, 6).requires_grad_(), normal(30, 6).requires_grad_()
        self.teacher, self.teacher_head = normal(24, 5), normal(28, 5)

    @property
    def sparse(self) -> Sparse:
        """Of all ids, so that it is the dense one in another form."""
        known = (self.teacher @ self.teacher_head.T).log_softmax(-1)[self.response]
        return Sparse(torch.arange(28).expand(6, 28), known, tail=True)

    @property
    def relations(self) -> tuple[Tensor, ...]:
        logits = self.teacher[self.visual] @ self.teacher_head.T
        return tuple(z @ z.T for z in logits.split(4))

    def run(self, objective: Objective, targets: Targets | None, frozen: bool = False):
        rows = objective.rows(self.response, self.visual)
        return objective(
            *(self.hidden[rows], self.head, targets, rows, rows // 12),
            *(self.response, self.targets, self.visual, torch.ones(2), 2),
            student_gram=gram(self.head.detach()[:28]) if frozen else None,
        )

    def dense(self, objective: Objective) -> Targets:
        return Targets(self.teacher[objective.rows(self.response, self.visual)], self.teacher_head)


ALL = Objective(text=1.0, response=0.7, visual=0.4, relation=0.5, divergence="jensen_shannon")


def same(batch: Batch, objective: Objective, targets: Targets) -> None:
    out, expected = batch.run(objective, targets), batch.run(objective, batch.dense(objective))
    assert out.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        close(out.terms[name], value)
    for actual, wanted in zip(
        *(torch.autograd.grad(one.loss, (batch.hidden, batch.head)) for one in (out, expected)), strict=True
    ):
        close(actual, wanted)


@pytest.mark.parametrize("objective", [ALL, replace(ALL, relation=0), replace(ALL, response=0), replace(ALL, text=0)])
def test_known_response_rows_and_exact_visual_rows_work_together(objective: Objective):
    batch = Batch()
    same(batch, objective, Targets(batch.teacher[batch.visual], batch.teacher_head, responses=batch.sparse))


@pytest.mark.parametrize("frozen", [True, False])
def test_relation_matrices_stand_in_for_visual_rows(frozen: bool):
    batch, objective = Batch(), replace(ALL, visual=0)
    targets = Targets(None, None, batch.sparse, batch.relations, vocabulary=28)
    out, expected = batch.run(objective, targets, frozen), batch.run(objective, batch.dense(objective))
    for name, value in expected.terms.items():
        close(out.terms[name], value, 1e-10)
    same(batch, replace(objective, response=0), replace(targets, responses=None))
    same(batch, replace(objective, response=0, relation=0), targets)
    lacking = replace(batch.dense(objective), relations=batch.relations)  # responses are hidden states
    close(batch.run(objective, lacking).loss, expected.loss, 1e-10)


def test_what_targets_lack_is_refused():
    batch = Batch()
    for targets, lacking in (
        (None, "teacher.relation, teacher.responses, teacher.visual"),
        (Targets(None, None, batch.sparse), "teacher.relation, teacher.visual"),
        (Targets(None, None, batch.sparse, batch.relations, vocabulary=28), "teacher.visual"),
        (Targets(None, None, None, batch.relations), "teacher.responses, teacher.visual"),
    ):
        with pytest.raises(ValueError, match=f"compare with a teacher, and {lacking} are not given"):
            batch.run(ALL, targets)
    targets = Targets(None, None, batch.sparse, batch.relations[:1], vocabulary=28)
    with pytest.raises(ValueError, match="1 relation matrices of the teacher's, for 2 samples with pictures"):
        batch.run(replace(ALL, visual=0), targets)
    shifted = replace(ALL, visual=0, relation=0, reference=frozenset({"unshifted_mask"}))
    with pytest.raises(ValueError, match="unshifted_mask"):
        batch.run(shifted, Targets(None, None, batch.sparse))
