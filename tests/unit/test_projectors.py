"""Projectors by hand: which tokens go where, and what the question weighs."""

from math import prod

import pytest
import torch
from torch import nn

from medvlm.encoders.base import Features
from medvlm.errors import ModelError
from medvlm.projectors import compress, interslice, mlp, pool, resampler, shuffle


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def features(grid, dim=1, batch=1, tokens=None) -> Features:
    """Tokens numbered in reading order, unless given."""
    tokens = torch.arange(prod(grid) * dim).float().reshape(1, prod(grid), dim).repeat(batch, 1, 1) if tokens is None else tokens
    return Features(tokens, grid, tokens.mean(1))


def bare(projector, name="layers"):
    """Without the layers behind it, so that what it arranges is seen."""
    setattr(projector, name, nn.Identity())
    return projector


def test_shuffle_lays_neighbours_side_by_side():
    """0 1 2 3 / 4 5 6 7 in blocks of 2 x 2: [0 1 4 5] [2 3 6 7]; in 3-D the two slices of a block follow one another."""
    flat = bare(shuffle.build(1, 4))(features((2, 4)))
    assert flat.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    deep = bare(shuffle.build(1, 4, (2, 1, 2)))(features((2, 2, 2)))
    assert deep.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    pairs = bare(shuffle.build(2, 4, (1, 2)))(features((1, 4), dim=2))
    assert pairs.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]


def test_pool_averages_blocks_in_reading_order():
    assert bare(pool.build(1, 4))(features((2, 4))).flatten().tolist() == [2.5, 4.5]
    assert bare(pool.build(1, 4, (1, 2, 2)))(features((2, 2, 2))).flatten().tolist() == [1.5, 5.5]
    thirds = pool.build(1, 4, grid=(1, 2))
    assert bare(thirds)(features((2, 3))).flatten().tolist() == [2.0, 3.0] and thirds.count((7, 5)) == 2


@torch.no_grad()
def test_a_pool_of_one_layer_is_gemma_3_s_projector():
    from transformers import Gemma3Config
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    config = Gemma3Config(vision_config={"hidden_size": 6, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}, text_config={"hidden_size": 10, "num_attention_heads": 2}, mm_tokens_per_image=16)
    theirs, mine = Gemma3MultiModalProjector(config), pool.build(6, 10, grid=(4, 4), layers=1)
    theirs.mm_input_projection_weight.normal_()
    theirs.mm_soft_emb_norm.weight.normal_()
    mine.layers[0].weight.copy_(1 + theirs.mm_soft_emb_norm.weight)
    mine.layers[1].weight.copy_(theirs.mm_input_projection_weight.T)
    tokens = torch.randn(2, 64, 6)
    assert mine.layers[1].bias is None and mine.count((8, 8)) == 16
    torch.testing.assert_close(mine(features((8, 8), tokens=tokens)), theirs(tokens), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="1 or 2 linear layers"):
        pool.build(1, 4, layers=3)


@pytest.mark.parametrize(
    ("made", "grid", "says"),
    [
        (lambda: shuffle.build(1, 4), (3, 4), r"\(2, 2\) does not divide the encoder's grid \(3, 4\)"),
        (lambda: shuffle.build(1, 4), (2, 2, 2), "2-D Shuffle .* 3-D grid"),
        (lambda: pool.build(1, 4, (1, 2, 2)), (2, 2), "3-D Pool .* 2-D grid"),
        (lambda: pool.build(1, 4, (2, 2)), (2, 3), "does not divide"),
        (lambda: pool.build(1, 4, grid=(3, 3)), (2, 4), "finer"),
        (lambda: compress.build(1, 4, 3, 2), (2, 2, 2), r"3 \+ 2 .* the 4 in a slice"),
        (lambda: compress.build(1, 4), (8, 8), "3-D Compress .* 2-D grid"),
        (lambda: interslice.build(1, 4, pool=2), (2, 2, 3), "by 2 does not divide"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_before_and_at_the_tokens(made, grid, says):
    projector = made()
    for use in (lambda: projector.count(grid), lambda: projector.tokens(features(grid))):
        with pytest.raises(ModelError, match=says) as refused:
            use()
        assert refused.value.code == "BAD_RECIPE"


def test_arguments_that_cannot_be_are_refused():
    for build in (lambda: pool.build(1, 4, (2, 2), (2, 2)), lambda: pool.build(1, 4, (2,)), lambda: resampler.build(9, 4, heads=2)):
        with pytest.raises(ModelError) as refused:
            build()
        assert refused.value.code == "BAD_RECIPE"


def test_an_mlp_keeps_its_names_without_its_norm():
    """LLaVA's projector has none; the two linear layers stay where a checkpoint with one has them."""
    with_norm, without = mlp.build(4, 6), mlp.build(4, 6, norm=False)
    assert set(without.state_dict()) == {k for k in with_norm.state_dict() if not k.startswith("layers.0")}
    f = features((1, 2), tokens=torch.randn(1, 2, 4))
    by_hand = without.layers[3](nn.functional.gelu(without.layers[1](f.tokens)))
    assert torch.equal(without(f), by_hand)


def test_a_resampler_does_not_mind_the_order_of_tokens_but_what_they_say():
    made = resampler.build(8, 6, queries=3, heads=2).eval()
    tokens = torch.randn(2, 12, 8)
    out = made(features((3, 4), tokens=tokens))
    assert out.shape == (2, 3, 6) and made.count((9, 9, 9)) == 3
    assert torch.allclose(made(features((3, 4), tokens=tokens[:, torch.randperm(12)])), out, atol=1e-5)
    assert (made(features((3, 4), tokens=tokens + torch.randn(2, 12, 8))) - out).abs().max() > 1e-3


def test_a_resampler_layer_is_flamingo_s_worked_step_by_step():
    layer = resampler.Layer(8, 2).eval()
    tokens, queries = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    asked = layer.norm_queries(queries)
    seen = torch.cat([layer.norm_tokens(tokens), asked], 1)
    q, k, v = ((x @ w.T + b).unflatten(2, (2, 4)).transpose(1, 2) for x, w, b in zip((asked, seen, seen), layer.attend.in_proj_weight.split(8), layer.attend.in_proj_bias.split(8)))
    mixed = ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    by_hand = queries + layer.attend.out_proj(mixed)
    by_hand = by_hand + layer.feed(by_hand)
    gap = (layer(tokens, queries) - by_hand).abs().max().item()
    print(f"perceiver layer by hand: largest difference {gap:.1e}")
    assert gap <= 1e-5


def test_compression_keeps_what_stands_out_and_merges_the_rest():
    """One slice of six tokens: others attend most to the long ones along their own direction; equal ones merge into their mean."""
    made = compress.build(2, 4, keep=1, merge=2)
    strong, up, right = [0.0, 9.0], [0.0, 1.0], [1.0, 0.0]
    kept = made.select(torch.tensor([[up, right, strong, up, right, right]]))
    assert kept[0, 0].tolist() == strong
    assert sorted(kept[0, 1:].tolist()) == [up, right]
    two = compress.build(2, 4, keep=2, merge=0).select(torch.tensor([[strong, up, right, [9.0, 0.0]]]))
    assert two[0].tolist() == [strong, [9.0, 0.0]]  # in reading order


def test_compression_is_a_mean_slice_and_then_each_slice():
    made = compress.build(4, 6, keep=2, merge=1).eval()
    tokens = torch.randn(2, 20 * 6, 4)
    out = made(features((20, 2, 3), tokens=tokens))
    assert out.shape == (2, made.count((20, 2, 3)), 6) and made.count((20, 2, 3)) == 6 + 20 * 3
    slices = tokens.unflatten(1, (20, 6))
    whole = made.out((slices + made.expert(slices)).mean(1))
    assert torch.allclose(out[:, :6], whole, atol=1e-5)
    assert torch.allclose(out[1, 6 + 3 * 17 : 9 + 3 * 17], made.out(made.select(slices[1, 17:18]))[0], atol=1e-5)
    changed = tokens.clone()
    changed[:, 6 * 4 : 6 * 5] = torch.randn(2, 6, 4)
    moved = (made(features((20, 2, 3), tokens=changed)) - out).abs().amax((0, 2)) > 1e-5
    assert moved[:6].all() and moved[6 + 3 * 4 : 9 + 3 * 4].any() and not moved[6 : 6 + 3 * 4].any() and not moved[9 + 3 * 4 :].any()


def test_merging_passes_gradient_to_every_token_it_merges():
    made = compress.build(4, 6, keep=2, merge=2)
    tokens = torch.randn(1, 3 * 8, 4, requires_grad=True)
    made(features((3, 2, 4), tokens=tokens)).square().sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()


def aligned():
    """Slice k is e_k everywhere; slices and question are compared as they are."""
    made = interslice.build(4, 4)
    made.layers, made.ask = nn.Identity(), nn.Identity()
    return made, features((4, 2, 2), tokens=torch.eye(4).repeat_interleave(4, 0)[None])


def test_the_question_decides_which_slice_weighs():
    """softmax(q . k / 2): a question of 8 e_k weighs its slice e^4 times as much as another."""
    made, f = aligned()
    for k in range(4):
        asked = 8 * torch.eye(4)[k : k + 1]
        expected = torch.ones(4)
        expected[k] = torch.e**4
        scores = made.scores(f, asked)[0]
        assert torch.allclose(scores, expected / expected.sum(), atol=1e-5) and scores.argmax() == k
        assert torch.allclose(made(f, asked)[0], scores.expand(4, 4), atol=1e-5)  # every token is the weighted sum
    assert torch.allclose(made.scores(f, torch.zeros(1, 4)), torch.full((1, 4), 0.25))


def test_each_row_is_weighed_by_its_own_question():
    made, f = aligned()
    both = features((4, 2, 2), tokens=f.tokens.repeat(2, 1, 1))
    assert made.scores(both, 8 * torch.eye(4)[[0, 3]]).argmax(1).tolist() == [0, 3]


def test_without_scores_every_slice_weighs_the_same():
    """The same layers without the question give the mean slice; nothing is left of what would weigh it, nor asked for."""
    guided = interslice.build(6, 8, pool=2)
    plain = interslice.build(6, 8, pool=2, guided=False)
    left = plain.load_state_dict(guided.state_dict(), strict=False)
    assert not left.missing_keys and {k.partition(".")[0] for k in left.unexpected_keys} == {"ask"}
    f = features((3, 4, 2), tokens=torch.randn(2, 24, 6))
    assert guided.guided and not plain.guided and plain.count(f.grid) == guided.count(f.grid) == 2
    assert torch.equal(plain.scores(f), torch.full((2, 3), 1 / 3))
    alone = [features((1, 4, 2), tokens=f.tokens[:, 8 * k : 8 * k + 8]) for k in range(3)]
    mean = torch.stack([guided(one, torch.randn(2, 8)) for one in alone]).mean(0)
    assert torch.allclose(plain(f), mean, atol=1e-6)
    assert (guided(f, torch.randn(2, 8)) - plain(f)).abs().max() > 1e-4


def test_the_score_is_learnt_from_the_answer_alone():
    """Two kinds of question, two slices that answer them: after training the right slice wins, for slices never seen."""
    made = interslice.build(6, 8)
    questions, kinds, finding = torch.randn(2, 8), torch.randn(2, 6) * 2, torch.randn(6)
    probe = nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*made.parameters(), *probe.parameters()], lr=1e-2)

    def case(batch):
        """Each kind's slice shows its finding, or not; the question asks for one of them."""
        order = torch.stack([torch.randperm(5) for _ in range(batch)])
        shown, asked = torch.randint(0, 2, (batch, 2)).float() * 2 - 1, torch.randint(0, 2, (batch,))
        slices = torch.randn(batch, 5, 4, 6) * 0.3
        for kind in range(2):
            slices[torch.arange(batch), order[:, kind]] += kinds[kind] + finding * shown[:, kind, None, None]
        return features((5, 2, 2), tokens=slices.flatten(1, 2)), questions[asked], shown[torch.arange(batch), asked], order[torch.arange(batch), asked]

    for _ in range(150):
        f, query, answer, _ = case(32)
        loss = nn.functional.soft_margin_loss(probe(made(f, query).mean(1))[:, 0], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    f, query, answer, where = case(200)
    right = (made.scores(f, query).argmax(1) == where).float().mean().item()
    told = ((probe(made(f, query).mean(1))[:, 0] > 0) == (answer > 0)).float().mean().item()
    print(f"asked slice weighs most: {right:.2f}; answers right: {told:.2f}")
    assert right > 0.9 and told > 0.9
