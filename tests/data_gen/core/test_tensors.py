"""Products without a gradient, and the scores made of them, against float64."""

import pytest
import torch

from data_gen.core.cpu import product
from data_gen.core.tensors import lightning_scores, tiled_scores


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 64, 33), (130, 128, 300), (2, 0, 16), (0, 3, 4)])
def test_products_against_float64(shape, relu):
    rows, width, columns = shape
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2 * width, generator=rng)[:, width:]  # gaps between rows
    weight = torch.randn(columns, 3 * width, generator=rng)[:, :width]
    expected = x.double() @ weight.double().T
    expected = expected.clamp_min(0) if relu else expected
    torch.testing.assert_close(product(x, weight, relu).double(), expected, atol=1e-4, rtol=1e-5)
    turned = product(x.T.contiguous().T, weight.T.contiguous().T, relu)
    torch.testing.assert_close(turned.double(), expected, atol=1e-4, rtol=1e-5)
    bf16 = product(x.bfloat16(), weight.bfloat16(), relu)
    torch.testing.assert_close(bf16.double(), expected, atol=0.5, rtol=0.1)


@pytest.mark.parametrize("relu", [False, True])
def test_a_product_with_nan_is_nan(relu):
    assert product(torch.full((3, 16), torch.nan), torch.ones(5, 16), relu).isnan().all()


@pytest.mark.parametrize(("queries", "heads", "chunks"), [(1, 1, 1), (3, 4, 70), (9, 130, 2100), (0, 4, 5), (2, 4, 0)])
def test_tiles_give_the_whole(queries, heads, chunks):
    rng = torch.Generator().manual_seed(1)
    query = torch.randn(queries, heads, 16, generator=rng)
    weights, keys = torch.randn(queries, heads, generator=rng), torch.randn(chunks, 48, generator=rng)[:, 16:32]
    whole = lightning_scores(query.double(), weights.double(), keys.double())
    torch.testing.assert_close(tiled_scores(query, weights, keys).double(), whole, atol=1e-3, rtol=1e-4)
